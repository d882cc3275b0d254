"""Choosing a backend: by name, by environment, automatically; and what is said about it."""

from __future__ import annotations

import logging

import pytest
import torch

from sssd_hpc.errors import UserError
from sssd_hpc.ops import backends, bidirectional_conv, freeze, frozen_kernel, prepare
from sssd_hpc.ops.fftconv import plain


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    caches = (backends.probe, backends._automatic, backends._named)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def resolve(op: str, backend: str = "auto", dtype: torch.dtype = torch.float32) -> str:
    return backends.resolve(op, backend, "cpu", dtype)


def test_report_lists_every_backend_of_every_op_with_a_reason():
    rows = backends.report()
    assert len(rows) == len(backends.OPS) * len(backends.FILES)
    usable = {(op, backend) for op, backend, works, _ in rows if works}
    assert {(op, name) for op in backends.OPS for name in ("reference", "torch")} <= usable
    assert all(works == (reason == "") for _, _, works, reason in rows)


def test_a_backend_that_an_op_does_not_have_is_refused():
    with pytest.raises(UserError, match="there is no keops backend of fftconv"):
        resolve("fftconv", "keops")


def test_an_unknown_backend_names_the_allowed_ones():
    with pytest.raises(UserError, match=r"'cuda'; use one of auto, reference, torch"):
        resolve("nplr", "cuda")


def test_auto_takes_the_first_that_works_and_logs_it_once(caplog, monkeypatch):
    monkeypatch.setitem(backends.AUTO_ORDER, "cpu", ("keops", "torch"))
    with caplog.at_level(logging.INFO, "sssd_hpc.ops.backends"):
        assert resolve("fftconv") == "torch"
        resolve("fftconv")
    message = "fftconv: backend torch on cpu (keops: there is no keops backend of fftconv)"
    assert [record.message for record in caplog.records] == [message]


def test_the_environment_decides_what_auto_means(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "reference")
    assert resolve("fftconv") == "reference"
    assert resolve("fftconv", "torch") == "torch"
    monkeypatch.setenv(backends.VARIABLE, "keops")
    with pytest.raises(UserError, match=backends.VARIABLE):
        resolve("fftconv")


def test_the_reference_is_refused_where_it_has_no_form(monkeypatch):
    """What is kept, constants or a spectrum, is of no use to plain autograd."""
    monkeypatch.setenv(backends.VARIABLE, "torch")
    w = torch.view_as_complex(torch.tensor([[[-0.5, 1.0]]]))
    frozen = freeze(w, w, w, w, torch.zeros(1), 4, torch.float32)
    monkeypatch.setenv(backends.VARIABLE, "reference")
    with pytest.raises(UserError, match="frozen_kernel: backend 'reference'"):
        frozen_kernel(torch.ones(1, 1, 1, 2), frozen)
    with pytest.raises(UserError, match="freeze: backend 'reference'"):
        freeze(w, w, w, w, torch.zeros(1), 4, torch.float32)
    with pytest.raises(UserError, match="prepare: backend 'reference'"):
        prepare(torch.ones(2, 1, 4), torch.ones(1))


def test_the_environment_may_name_a_backend_for_each_op(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "nplr=reference,fftconv=torch")
    assert resolve("nplr") == "reference"
    assert resolve("fftconv") == "torch"
    assert resolve("cauchy") in backends.AUTO_ORDER["cpu"]


@pytest.mark.parametrize("text", ["nplr=cuda", "conv=torch", "nplr=torch;cauchy=torch", "=torch"])
def test_a_malformed_wish_is_refused(monkeypatch, text):
    monkeypatch.setenv(backends.VARIABLE, text)
    with pytest.raises(UserError, match=f"{backends.VARIABLE} holds"):
        resolve("nplr")


def test_a_dtype_that_a_backend_does_not_take_is_refused_or_passed_over(monkeypatch):
    monkeypatch.setattr(plain, "DTYPES", (torch.float32,))
    with pytest.raises(UserError, match=r"it takes torch.float32, not torch.float64"):
        resolve("fftconv", "torch", torch.float64)
    monkeypatch.setitem(backends.AUTO_ORDER, "cpu", ("torch", "reference"))
    assert resolve("fftconv", "auto", torch.float64) == "reference"


def test_a_backend_that_imports_but_cannot_run_is_not_usable(monkeypatch):
    def broken(*_):
        raise OSError("libcuda.so.1: cannot open shared object file\nmore")

    monkeypatch.setattr(plain, "forward", broken)
    monkeypatch.setitem(backends.AUTO_ORDER, "cpu", ("torch",))
    assert backends.probe("fftconv", "torch", "cpu").startswith("OSError: libcuda.so.1")
    with pytest.raises(UserError, match=r"no backend of fftconv works on cpu: \(torch: OSError"):
        bidirectional_conv(torch.ones(1, 1, 2), torch.ones(2, 1, 2), torch.ones(1))


def test_a_backend_whose_row_is_not_finite_is_not_usable(monkeypatch):
    row = torch.full((1, 1, 2), float("nan"))
    monkeypatch.setattr(plain, "forward", lambda *_: (row.clone(), row.new_empty(0)))
    assert backends.probe("fftconv", "torch", "cpu") == "one row came out not finite"
