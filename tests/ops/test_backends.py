"""Choosing a backend: by name, by environment, automatically; and what is said about it."""

from __future__ import annotations

import logging

import pytest
import torch

from sssd_hpc.errors import UserError
from sssd_hpc.ops import backends, bidirectional_conv
from sssd_hpc.ops.fftconv import plain, reference


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    caches = (backends.probe, backends._automatic, backends._named)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_report_lists_every_backend_of_every_op_with_a_reason():
    rows = backends.report()
    assert len(rows) == len(backends.OPS) * len(backends.FILES)
    usable = {(op, backend) for op, backend, works, _ in rows if works}
    assert {(op, name) for op in backends.OPS for name in ("reference", "torch")} <= usable
    assert all(works == (reason == "") for _, _, works, reason in rows)


@pytest.mark.parametrize("backend", ["cpp", "keops", "triton"])
def test_a_known_but_absent_backend_says_why(backend):
    with pytest.raises(UserError, match=f"{backend}.*not part of this version"):
        backends.choose("nplr", backend)


def test_an_unknown_backend_names_the_allowed_ones():
    with pytest.raises(UserError, match=r"'cuda'; use one of auto, reference, torch"):
        backends.choose("nplr", "cuda")


def test_auto_takes_torch_and_logs_it_once(caplog):
    with caplog.at_level(logging.INFO, "sssd_hpc.ops.backends"):
        assert backends.choose("fftconv", "auto") is plain.run
        backends.choose("fftconv", "auto")
    assert [record.message for record in caplog.records] == ["fftconv: backend torch"]


def test_the_environment_decides_what_auto_means(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "reference")
    assert backends.choose("fftconv", "auto") is reference.run
    assert backends.choose("fftconv", "torch") is plain.run
    monkeypatch.setenv(backends.VARIABLE, "triton")
    with pytest.raises(UserError, match=backends.VARIABLE):
        backends.choose("fftconv", "auto")


def test_a_backend_that_imports_but_cannot_run_is_not_usable(monkeypatch):
    def broken(*_):
        raise OSError("libcuda.so.1: cannot open shared object file\nmore")

    monkeypatch.setattr(plain, "run", broken)
    assert backends.probe("fftconv", "torch").startswith("OSError: libcuda.so.1")
    with pytest.raises(UserError, match=r"no backend of fftconv works here: OSError"):
        bidirectional_conv(torch.ones(1, 1, 2), torch.ones(2, 1, 2), torch.ones(1))


def test_a_backend_whose_row_is_not_finite_is_not_usable(monkeypatch):
    monkeypatch.setattr(plain, "run", lambda *_: torch.tensor([float("nan")]))
    assert backends.probe("fftconv", "torch") == "one row came out not finite"
