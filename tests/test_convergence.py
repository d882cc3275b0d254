"""The bench of the samplers: its page quotes what it has kept, and it measures what it says."""

from __future__ import annotations

import json
import re

import pytest
import torch

from bench import convergence
from bench.timing import RESULTS, ROOT
from sssd_hpc.diffusion.method import DEFAULT_STEPS


def test_the_page_shows_the_kept_results() -> None:
    results = json.loads((RESULTS / "convergence.json").read_text())
    page = convergence.PAGE.read_text()
    assert page.split(convergence.MARK)[1] == f"\n{convergence.table(results)}\n"
    for name in DEFAULT_STEPS:
        assert f"| `{name}` |" in page


def test_the_page_names_files_that_exist() -> None:
    page = convergence.PAGE.read_text()
    named = re.findall(r"`((?:bench|docs|sssd_hpc)/[\w./-]+)`", page)
    assert len(named) > 4
    assert all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize(
    ("name", "calls"),
    [("ddim", 8), ("dpmpp", 8), ("plms", 10), ("split", 16), ("STSP4 as published", 18)],
)
def test_costs_and_errors_are_those_of_the_walk(name: str, calls: int) -> None:
    x_T = torch.randn(8, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.ones(8, 1, dtype=torch.int64)
    found = convergence.errors([name], x_T, labels, convergence.PAPER, (4, 40), 1.0)[name]
    # A guided call counts twice; the published method also makes plain ones.
    assert found[0]["calls_a_record"] == calls
    assert found[0]["error"] > 8 * found[1]["error"] > 0


def test_orders_are_read_from_the_two_finest_walks() -> None:
    points = [{"steps": s, "error": 3.0 * s**-2} for s in (4, 10, 20)]
    assert convergence.order([{"steps": 2, "error": 9.0}, *points]) == pytest.approx(2.0)
