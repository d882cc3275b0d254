"""The kernel op: against the dense recurrence, the textbook formula and the public arrays."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sssd_hpc.errors import UserError
from sssd_hpc.ops import nplr_kernel
from sssd_hpc.ops.nplr import reference

PARITY = Path(__file__).parents[1] / "data" / "parity" / "kernel_H4_N8_L100.npz"
NAMES = ("w", "P", "Q", "B", "C", "log_dt")
lengths = pytest.mark.parametrize("L", [1, 2, 3, 63, 100, 1000, 1023, 1025])
halves = pytest.mark.parametrize("half", [False, True], ids=["conjugate", "half"])


def draw(H: int, N2: int, channels: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """Random stable parameters in double precision, with frequencies past every node."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}

    def noise(*shape: int) -> torch.Tensor:
        return torch.complex(torch.randn(*shape, **options), torch.randn(*shape, **options))

    w = torch.complex(
        -0.5 - torch.rand(H, N2, **options), 40 * torch.rand(H, N2, **options).cumsum(1)
    )
    log_dt = math.log(1e-3) + math.log(100) * torch.rand(H, **options)
    P = noise(H, N2)
    return [w, P, P.conj().resolve_conj(), noise(H, N2), noise(channels, H, N2), log_dt]


def single(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return [p.to(torch.complex64) if p.is_complex() else p.float() for p in parameters]


def relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("L", [1, 2, 7, 40])
@pytest.mark.parametrize("N2", [1, 3])
def test_kernel_equals_the_unrolled_dense_recurrence(L, N2):
    w, P, Q, B, C_raw, log_dt = draw(2, N2)
    C_tilde, truth = torch.empty_like(C_raw), torch.empty(2, 2, L, dtype=torch.float64)
    for h, dt in enumerate(log_dt.exp()):
        both = [torch.cat([x, x.conj()], dim=-1) for x in (w[h], P[h], Q[h], B[h], C_raw[:, h])]
        A = torch.diag(both[0]) - torch.outer(both[1], both[2])
        eye = torch.eye(2 * N2, dtype=A.dtype)
        dA = torch.linalg.solve(eye - dt / 2 * A, eye + dt / 2 * A)
        dB = torch.linalg.solve(eye - dt / 2 * A, dt * both[3])
        for step in range(L):
            truth[:, h, step] = (both[4] @ torch.linalg.matrix_power(dA, step) @ dB).real
        C_tilde[:, h] = (both[4] @ (eye - torch.linalg.matrix_power(dA, L)))[:, :N2]
    for backend in ("reference", "torch"):
        k = nplr_kernel(w, P, Q, B, C_tilde, log_dt, L, backend)
        assert relative(k, truth) < 1e-10


@lengths
@halves
@pytest.mark.parametrize("N2", [1, 4, 32])
def test_torch_equals_the_textbook_in_double_precision(L, N2, half):
    parameters = draw(2, N2)
    truth = nplr_kernel(*parameters, L, "reference", half=half)
    ours = nplr_kernel(*parameters, L, "torch", half=half)
    assert ours.shape == (2, 2, L)
    assert relative(ours, truth) < 1e-11


@lengths
@halves
def test_torch_in_float32_is_as_close_as_the_textbook_in_float32(L, half):
    parameters = draw(3, 32)
    truth = nplr_kernel(*parameters, L, "reference", half=half)
    textbook = nplr_kernel(*single(parameters), L, "reference", half=half)
    ours = nplr_kernel(*single(parameters), L, "torch", half=half)
    assert ours.dtype == torch.float32
    assert relative(ours, truth) < 2 * relative(textbook, truth) + 1e-5


@halves
@pytest.mark.parametrize("L", [1, 2, 5, 63, 64])
def test_every_gradient_equals_the_textbooks(L, half):
    weight = torch.randn(2, 2, L, dtype=torch.float64)

    def gradients(backend: str) -> tuple[torch.Tensor, ...]:
        leaves = [p.requires_grad_() for p in draw(2, 3)]
        return torch.autograd.grad(
            (nplr_kernel(*leaves, L, backend, half=half) * weight).sum(), leaves
        )

    for name, ours, truth in zip(NAMES, gradients("torch"), gradients("reference"), strict=True):
        # At L = 1 the kernel is the static gain, which no dt changes: its gradient is rounding.
        assert (ours - truth).norm() <= 1e-9 * truth.norm() + 1e-14, name


@halves
@pytest.mark.parametrize("L", [4, 5])
def test_gradcheck(L, half):
    leaves = [p.requires_grad_() for p in draw(1, 2)]
    assert torch.autograd.gradcheck(
        lambda *p: nplr_kernel(*p, L, "torch", half=half), leaves, rtol=1e-4
    )


def test_strided_inputs_give_the_same_kernel():
    parameters = draw(4, 3)
    strided = [p.repeat_interleave(2, -1)[..., ::2] for p in parameters]
    assert torch.equal(nplr_kernel(*strided, 9), nplr_kernel(*parameters, 9))


def test_autocast_does_not_reach_the_kernel():
    parameters = single(draw(2, 32))
    plain = nplr_kernel(*parameters, 100)
    with torch.autocast("cpu", torch.bfloat16):
        cast = nplr_kernel(*parameters, 100)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)


@pytest.mark.parametrize("prefix", ["f32", "f64"])
@pytest.mark.parametrize("kind", ["conj", "slow"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_kernels_match_the_public_code(prefix, kind, backend):
    arrays = public(prefix)
    half = kind == "slow"
    k = nplr_kernel(*parameters_of(arrays), 100, backend, half=half)
    for name in (f"k_{kind}", f"k_{kind}_computed_in_f64"):
        assert relative(k, arrays[name].double()) < 2e-4, name
    assert relative(k[..., :50], arrays[f"k_{kind}_half_length"].double()) < 2e-4
    if not half:
        wide = [
            p.to(torch.complex128 if p.is_complex() else torch.float64)
            for p in parameters_of(arrays)
        ]
        truth = arrays["k_recurrence"]
        assert relative(nplr_kernel(*wide, 100, backend), truth) < (
            1e-5 if prefix == "f32" else 1e-12
        )
        assert relative(k, truth) < 1e-5


@pytest.mark.parametrize("prefix", ["f32", "f64"])
@pytest.mark.parametrize("kind", ["conj", "slow"])
def test_the_public_nodes_reproduce_the_public_kernel_closely(prefix, kind):
    arrays = public(prefix)
    nodes = (arrays["omega"], arrays["z"])
    half = kind == "slow"
    ours = reference.run(*parameters_of(arrays), 100, half, nodes)
    assert relative(ours, arrays[f"k_{kind}"].double()) < (5e-6 if prefix == "f32" else 1e-12)
    wide = [
        p.to(torch.complex128 if p.is_complex() else torch.float64) for p in parameters_of(arrays)
    ]
    ours = reference.run(*wide, 100, half, nodes)
    assert relative(ours, arrays[f"k_{kind}_computed_in_f64"]) < 1e-12


@pytest.mark.parametrize(
    ("index", "replacement", "words"),
    [
        (0, torch.ones(4, 3), "w is torch.float32"),
        (1, torch.ones(4, 2, dtype=torch.complex64), "P has shape"),
        (4, torch.ones(4, 3, dtype=torch.complex64), "C has shape"),
        (5, torch.ones(3), "log_dt"),
        (6, 0, "L is 0"),
    ],
    ids=["real-w", "short-P", "C-without-channels", "short-log_dt", "no-samples"],
)
def test_inputs_that_do_not_fit_are_named(index, replacement, words):
    arguments = [*single(draw(4, 3)), 8]
    arguments[index] = replacement
    with pytest.raises(UserError, match=words):
        nplr_kernel(*arguments)


def public(prefix: str) -> dict[str, torch.Tensor]:
    with np.load(PARITY) as archive:
        arrays = {
            key.removeprefix(f"{prefix}/"): torch.tensor(archive[key])
            for key in archive
            if key.startswith(prefix)
        }
    for name in ("omega", "z", "w", "P", "Q", "B", "C", "C_before_correction"):
        arrays[name] = torch.view_as_complex(arrays[name])
    return arrays


def parameters_of(arrays: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    flat = {name: arrays[name].reshape(arrays["w"].shape) for name in ("w", "P", "Q", "B")}
    return [*flat.values(), arrays["C"], arrays["log_dt"]]
