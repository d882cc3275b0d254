"""The Slurm cluster that this folder's tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.slurm_lab.lab import Lab
from tests.slurm_lab.packages import missing


@pytest.fixture(scope="session")
def start_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Lab]]:
    """Start a lab that stands till the session's end; no lab is a failure in CI, else a skip."""
    with ExitStack() as labs:

        def start(accounting: bool = False) -> Lab:
            if reason := missing(accounting):
                if os.environ.get("CI"):
                    pytest.fail(reason)
                pytest.skip(reason)
            folder = tmp_path_factory.mktemp("slurm-lab")
            return labs.enter_context(Lab(folder, accounting=accounting))

        yield start


@pytest.fixture(scope="session")
def _shared_lab(start_lab: Callable[..., Lab]) -> Lab:
    return start_lab()


@pytest.fixture
def lab(_shared_lab: Lab) -> Iterator[Lab]:
    """Four idle nodes, two processors each; what a test does to them is mended after it."""
    yield _shared_lab
    _shared_lab.restore()


@pytest.fixture(scope="session")
def accounting_lab(start_lab: Callable[..., Lab]) -> Lab:
    """A cluster of its own with slurmdbd and MariaDB, so that sacct answers."""
    return start_lab(accounting=True)
