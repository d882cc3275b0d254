"""What is KeOps' own: building at first use, refusals with plain reasons, formulas shared by cases.

The numbers of the KeOps backends are held by the matrix of test_nplr.py and test_cauchy.py.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from sssd_hpc.ops import cauchy, formulas
from sssd_hpc.ops.cauchy import keops as cauchy_keops
from sssd_hpc.ops.formulas import Sum
from sssd_hpc.ops.nplr import keops, plain
from sssd_hpc.ops.nplr.nodes import half_angles

# Runs without the package, whose import would take longer than the test.
CHILD = """
import os, runpy, sys, torch
os.environ["VICTIM"] = str(os.getpid())
Sum = runpy.run_path(sys.argv[1])["Sum"]
x = torch.arange(3.0).view(1, 3, 1)
print(Sum("x * y", "x = Vi(1)", "y = Vj(1)")(x, x).flatten().tolist())
"""
PRODUCT = ("x * y", "x = Vi(1)", "y = Vj(1)")


@pytest.fixture(autouse=True)
def _installed():
    if importlib.util.find_spec("pykeops") is None:
        message = "pykeops is not installed"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture
def pykeops():
    return formulas._load()


def start(folder: Path, compiler: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, formulas.FOLDER: str(folder), "CXX": str(compiler)}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", CHILD, formulas.__file__],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def compiler(path: Path, on_formula: str) -> Path:
    """Write a compiler that runs a line of shell where it is asked for a formula."""
    path.write_text(
        textwrap.dedent(
            f"""\
            #!/bin/sh
            case "$*" in *pykeops_cpp_*) {on_formula} ;; esac
            exec g++ "$@" -O0 -fno-lto
            """
        )
    )
    path.chmod(0o755)
    return path


def test_two_processes_that_start_cold_at_once_build_one_formula_after_a_third_was_killed(
    tmp_path,
):
    # The victim dies when the linker has begun to write.
    half = 'for out; do :; done; echo half > "$out"; kill -9 "$VICTIM"'
    victim = start(tmp_path / "builds", compiler(tmp_path / "killer", half))
    victim.communicate()
    assert victim.returncode == -9
    assert list(tmp_path.rglob("pykeops_cpp_*.so"))

    log = tmp_path / "log"
    counting = compiler(tmp_path / "counter", f"echo formula >> {log}")
    pair = [start(tmp_path / "builds", counting) for _ in range(2)]
    for process in pair:
        out, err = process.communicate()
        assert process.returncode == 0, err
        # Nothing but the sums, which are exact.
        assert out == "[0.0, 3.0, 6.0]\n"
    assert log.read_text() == "formula\n"


def test_what_was_finished_before_a_killed_build_stays(tmp_path):
    old, new = tmp_path / "old.so", tmp_path / "host" / "new.so"
    new.parent.mkdir()
    old.touch()
    os.utime(old, ns=(0, 0))
    with contextlib.suppress(KeyboardInterrupt), formulas._alone(tmp_path):
        new.touch()
        raise KeyboardInterrupt
    assert new.exists()
    with formulas._alone(tmp_path):
        assert old.exists()
        assert not new.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["host", "old.so", "sssd_hpc.lock"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(RuntimeError, match=rf"cannot write .*file/x: .*{formulas.FOLDER}"),
        formulas._alone(tmp_path / "file" / "x"),
    ):
        pass


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "pykeops", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"pip install 'sssd_hpc\[keops\]'"):
        formulas._load.__wrapped__()


def test_a_missing_compiler_is_named(monkeypatch, pykeops):
    monkeypatch.setattr(pykeops.config.pykeops_base, "cxx_compiler", None)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler; install g\+\+"):
        Sum(*PRODUCT)(torch.ones(1, 1, 1), torch.ones(1, 1, 1))


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(monkeypatch, pykeops, tmp_path, capfd):
    folder = Path(pykeops.get_build_folder())
    with formulas._alone(folder):
        before = set(folder.iterdir())
    failing = compiler(tmp_path / "c++", "echo 'x.cpp:1: fatal error: Python.h: gone' >&2; exit 1")
    monkeypatch.setattr(pykeops.config.pykeops_base, "cxx_compiler", str(failing))
    fresh = Sum("x + y + y", *PRODUCT[1:])
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"cannot build a formula: .*Python\.h: gone"):
            fresh(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    assert capfd.readouterr().out == ""
    with formulas._alone(folder):
        assert set(folder.iterdir()) == before


def test_tensors_that_keops_cannot_reach_are_refused(monkeypatch, pykeops):
    with pytest.raises(RuntimeError, match="KeOps runs on cpu and cuda tensors, not on meta"):
        Sum(*PRODUCT)(*(torch.empty(1, 1, 1, device="meta") for _ in range(2)))
    monkeypatch.setattr(pykeops.config, "gpu_available", False)
    with (
        torch._subclasses.FakeTensorMode(),
        pytest.raises(RuntimeError, match="KeOps sees no GPU"),
    ):
        Sum(*PRODUCT)(*(torch.empty(1, 1, 1, device="cuda") for _ in range(2)))


def test_sums_run_on_as_many_threads_as_torch():
    before = torch.get_num_threads()
    rows = torch.ones(1, 2, 2)
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            cauchy_keops.forward(rows, 2 * rows, -rows)
            assert formulas._openmp().omp_get_max_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("frozen", [False, True], ids=["general", "frozen"])
def test_any_number_of_channels_shares_two_formulas(channels, frozen):
    H, N2, L = 3, 4, 9
    real = {"dtype": torch.float64}
    a, b = torch.randn(2, 2, channels + (not frozen), H, N2, **real)
    wr, wi = -torch.rand(H, N2, **real) - 0.1, torch.rand(H, N2, **real)
    gamma = torch.randn(H, L // 2 + 1, 2, **real) if frozen else None
    inputs = (a, b, wr, wi, *half_angles(L, torch.float64, a.device), gamma)
    g = torch.randn(channels, H, L // 2 + 1, 2, **real)
    ours = [keops.forward(*inputs), *keops.backward(g, *inputs)]
    truth = [plain.forward(*inputs), *plain.backward(g, *inputs)]
    for mine, true in zip(ours, truth, strict=True):
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)
    sums = [value for value in vars(keops).values() if isinstance(value, Sum)]
    assert [set(each._built) <= {("cpu", torch.float32), ("cpu", torch.float64)} for each in sums]
    assert len(sums) == 2


def test_the_nyquist_node_in_single_precision_is_the_static_sum():
    # c = 0 and s = 1: k_f = dt Re sum B C = sum a / 2, with gamma, a multiple of c, gone.
    a, b = torch.randn(2, 2, 3, 2, 4)
    wr, wi = -torch.rand(2, 4) - 0.1, torch.rand(2, 4)
    c, s = half_angles(10, torch.float32, a.device)
    k_f = keops.forward(a, b, wr, wi, c, s, None)
    assert k_f.isfinite().all()
    truth = a[0, :2].sum(-1) / 2
    torch.testing.assert_close(k_f[..., -1, 0], truth)
    torch.testing.assert_close(k_f[..., -1, 1], torch.zeros_like(truth))
    assert all(d.isfinite().all() for d in keops.backward(k_f, a, b, wr, wi, c, s, None))


@pytest.mark.parametrize("rows", [1, 3])
def test_the_gradient_of_a_node_that_is_nearly_infinite_is_finite(rows):
    v, w = torch.randn(2, 3, 4, 2)
    z = torch.tensor([[0.0, 1e16], [-8e5, 2e4]]).expand(rows, 2, 2).contiguous()
    g = torch.randn(3, 2, 2)
    ours = cauchy_keops.backward(g, v, z, w, True)
    # In double precision autograd through the quotients is exact enough.
    leaves = [torch.view_as_complex(t.double()).requires_grad_() for t in (v, z, w)]
    r = cauchy(*leaves, "reference")
    truth = torch.autograd.grad(r, leaves, torch.view_as_complex(g.double()))
    for mine, true in zip(ours, truth, strict=True):
        mine = torch.view_as_complex(mine.double())
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-30)
