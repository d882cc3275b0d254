"""HiPPO-LegS and its NPLR form, from their definitions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sssd_hpc.ops import nplr_kernel
from sssd_hpc.s4 import hippo

PARITY = Path(__file__).parents[1] / "data" / "parity" / "kernel_H4_N8_L100.npz"


def relative(ours, truth) -> float:
    return float((ours - truth).norm() / truth.norm())


def test_legs_has_the_entries_of_its_formula():
    A, B = hippo.legs(5)
    assert A[3, 1] == pytest.approx(-math.sqrt(7 * 3))
    assert A[2, 2] == -3
    assert A[1, 3] == 0
    assert B[4] == 3


@pytest.mark.parametrize("N", [2, 8, 64])
def test_nplr_reconstructs_the_dense_matrix(N):
    A, B = hippo.legs(N)
    form = hippo.nplr(N)
    V, w, P = (np.concatenate([x, x.conj()], axis=-1) for x in (form.V, form.w, form.P))
    np.testing.assert_allclose(V.conj().T @ V, np.eye(N), atol=1e-13)
    rebuilt = V @ (np.diag(w) - np.outer(P, P.conj())) @ V.conj().T
    np.testing.assert_allclose(rebuilt, A, atol=1e-12 * abs(A).max() * N)
    np.testing.assert_allclose(2 * (form.V @ form.B).real, B, atol=1e-12 * N)
    assert (form.w.imag > 0).all()
    np.testing.assert_array_equal(form.w.real, -0.5)


@pytest.mark.parametrize(("N", "L"), [(2, 1), (2, 10), (8, 33), (64, 200)])
def test_dplr_kernel_equals_the_unrolled_dense_recurrence(N, L):
    H = 3
    form = hippo.nplr(N)
    C = torch.randn(2, H, N // 2, dtype=torch.complex128)
    log_dt = torch.linspace(math.log(1e-3), math.log(1e-1), H, dtype=torch.float64)
    w, P, B = (torch.tensor(x).expand(H, -1) for x in (form.w, form.P, form.B))
    corrected = hippo.correct_length(C, log_dt, L)
    dense_C = 2 * (C @ torch.tensor(form.V).mH).real
    truth = torch.empty(2, H, L, dtype=torch.float64)
    A, b = (torch.tensor(x) for x in hippo.legs(N))
    eye = torch.eye(N, dtype=torch.float64)
    for h, dt in enumerate(log_dt.exp()):
        dA = torch.linalg.solve(eye - dt / 2 * A, eye + dt / 2 * A)
        state = torch.linalg.solve(eye - dt / 2 * A, dt * b)
        for step in range(L):
            truth[:, h, step] = dense_C[:, h] @ state
            state = dA @ state
    for backend in ("reference", "torch"):
        k = nplr_kernel(w, P, P.conj().resolve_conj(), B, corrected, log_dt, L, backend)
        assert relative(k, truth) < 1e-11


@pytest.mark.parametrize(("prefix", "bound"), [("f32", 1e-5), ("f64", 1e-9)])
def test_length_correction_matches_the_public_code(prefix, bound):
    with np.load(PARITY) as archive:
        get = {key[4:]: archive[key] for key in archive if key.startswith(prefix)}
    theirs, before, w, P = (
        torch.view_as_complex(torch.tensor(get[name]).double())
        for name in ("C", "C_before_correction", "w", "P")
    )
    # The public code's eigenvectors have phases and an order of their own.
    order = w[0].imag.argsort()
    form = hippo.nplr(8)
    phase = P[0, 0][order] / torch.tensor(form.P)
    phase = phase / phase.abs()
    log_dt = torch.tensor(get["log_dt"])
    ours = hippo.correct_length(before[..., order] * phase, log_dt, 100)
    assert relative(ours, theirs[..., order] * phase) < bound
    assert relative(theirs, before) > 0.01
