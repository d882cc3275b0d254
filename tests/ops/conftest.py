"""The backends that every op's own tests run over."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from sssd_hpc.ops import backends, native


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with the argument `backend` on every backend of the op that its file names.

    Where there is a GPU, those that can use one run on it, too, marked `gpu`; Triton only there.
    """
    op = metafunc.module.__name__.rpartition("test_")[2]
    if "backend" not in metafunc.fixturenames or op not in backends.OPS:
        return
    skip = pytest.mark.skipif(_lacks_keops(), reason="pykeops is not installed")
    gpu = torch.cuda.is_available()
    cases = []
    for name, file in backends.FILES.items():
        if name == "reference" or not importlib.util.find_spec(f"sssd_hpc.ops.{op}.{file}"):
            continue
        marks = [skip] if name == "keops" else []
        if not (gpu and name == "triton"):
            cases.append(pytest.param(name, marks=marks, id=name))
        if gpu and name != "cpp":
            cases.append(pytest.param(name, marks=[*marks, pytest.mark.gpu], id=f"{name}-gpu"))
    metafunc.parametrize("backend", cases)


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make a test's tensors on the GPU where its backend runs there."""
    on_gpu = "backend" in request.fixturenames and request.node.get_closest_marker("gpu")
    with torch.device("cuda") if on_gpu else contextlib.nullcontext():
        yield


def _lacks_keops() -> bool:
    """Say whether to leave KeOps out, visibly; where CI is set it must be there."""
    return not (importlib.util.find_spec("pykeops") or os.environ.get("CI"))


@pytest.fixture
def opcheck() -> Callable[..., object]:
    """torch.library.opcheck; filling uninitialised memory would fail its comparison of outputs."""
    torch.use_deterministic_algorithms(False)
    return torch.library.opcheck


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the compiled ops by each level of vector instructions that this processor has."""
    extension = native.load()
    before = extension.cpu_level()
    try:
        extension.set_cpu_level(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield request.param
    extension.set_cpu_level(before)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut Triton's tiles so that small sizes have several blocks, the last one part full."""
    launch = pytest.importorskip("sssd_hpc.ops.launch")
    monkeypatch.setattr(launch, "widened", lambda tile: max(tile // 4, 4))
