"""The kernel op: against the dense recurrence, the textbook formula and the public arrays."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sssd_hpc.errors import UserError
from sssd_hpc.ops import FrozenNplr, freeze, frozen_kernel, nplr_kernel
from sssd_hpc.ops.nplr import reference
from sssd_hpc.s4 import hippo

PARITY = Path(__file__).parents[1] / "data" / "parity" / "kernel_H4_N8_L100.npz"
NAMES = ("w", "P", "Q", "B", "C", "log_dt")
lengths = pytest.mark.parametrize("L", [1, 2, 3, 63, 100, 1000, 1023, 1025])
halves = pytest.mark.parametrize("half", [False, True], ids=["conjugate", "half"])


def draw(H: int, N2: int, channels: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """Random stable parameters in double precision, with frequencies past every node."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64, "device": "cpu"}

    def noise(*shape: int) -> torch.Tensor:
        return torch.complex(torch.randn(*shape, **options), torch.randn(*shape, **options))

    w = torch.complex(
        -0.5 - torch.rand(H, N2, **options), 40 * torch.rand(H, N2, **options).cumsum(1)
    )
    log_dt = math.log(1e-3) + math.log(100) * torch.rand(H, **options)
    P = noise(H, N2)
    drawn = [w, P, P.conj().resolve_conj(), noise(H, N2), noise(channels, H, N2), log_dt]
    # Drawn on the CPU: a GPU has no deterministic cumulative sum.
    return [x.to(torch.get_default_device()) for x in drawn]


def legs(H: int, N: int = 64) -> list[torch.Tensor]:
    """HiPPO-LegS in double precision, steps and C drawn as at initialisation."""
    nplr = hippo.nplr(N)
    w, P, B = (torch.tensor(x).expand(H, -1).clone() for x in (nplr.w, nplr.P, nplr.B))
    log_dt = math.log(1e-3) + math.log(100) * torch.rand(H, dtype=torch.float64)
    C = torch.randn(2, H, N // 2, dtype=torch.complex128)
    return [w, P, P.conj().resolve_conj(), B, C, log_dt]


def single(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return [p.to(torch.complex64) if p.is_complex() else p.float() for p in parameters]


def relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.detach().double() - truth.detach()).norm() / truth.detach().norm())


@pytest.mark.parametrize("L", [1, 2, 7, 40])
@pytest.mark.parametrize("N2", [1, 3])
def test_the_reference_equals_the_unrolled_dense_recurrence(L, N2):
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
    assert relative(nplr_kernel(w, P, Q, B, C_tilde, log_dt, L, "reference"), truth) < 1e-10


@lengths
def test_double_precision_equals_the_textbook(backend, L):
    for N2, H, channels in ((1, 1, 1), (4, 3, 3), (32, 2, 2)):
        parameters = draw(H, N2, channels)
        truth = nplr_kernel(*parameters, L, "reference")
        ours = nplr_kernel(*parameters, L, backend)
        assert ours.shape == (channels, H, L)
        assert relative(ours, truth) < 1e-12


@lengths
def test_single_precision_errs_by_less_than_a_hundred_thousandth(backend, L):
    parameters = legs(3)
    truth = nplr_kernel(*parameters, L, "reference")
    ours = nplr_kernel(*single(parameters), L, backend)
    assert ours.dtype == torch.float32
    assert relative(ours, truth) < 1e-5


@pytest.mark.parametrize(("L", "N2"), [(1, 3), (2, 3), (5, 1), (63, 4), (64, 3)])
def test_every_gradient_equals_the_textbooks(backend, L, N2):
    weight = torch.randn(2, 3, L, dtype=torch.float64)

    def gradients(name: str) -> tuple[torch.Tensor, ...]:
        leaves = [p.requires_grad_() for p in draw(3, N2)]
        return torch.autograd.grad((nplr_kernel(*leaves, L, name) * weight).sum(), leaves)

    for name, ours, truth in zip(NAMES, gradients(backend), gradients("reference"), strict=True):
        # At L = 1 the kernel is the static gain, which no dt changes: its gradient is rounding.
        assert (ours - truth).norm() <= 3e-12 * truth.norm() + 1e-14, name


def test_every_gradient_in_single_precision_errs_by_less_than_three_parts(backend):
    # At the initialisation that models train from, and its length.
    parameters, L = legs(2), 250
    weight = torch.randn(2, 2, L, dtype=torch.float64)

    def gradients(name: str, given: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = [p.clone().requires_grad_() for p in given]
        return torch.autograd.grad((nplr_kernel(*leaves, L, name) * weight).sum(), leaves)

    ours = gradients(backend, single(parameters))
    for name, mine, truth in zip(NAMES, ours, gradients("reference", parameters), strict=True):
        error = (mine.to(truth.dtype) - truth).norm() / truth.norm()
        assert error < 3e-5, name


@pytest.mark.parametrize("L", [4, 5])
def test_gradcheck(backend, L):
    leaves = [p.requires_grad_() for p in draw(1, 2)]
    assert torch.autograd.gradcheck(lambda *p: nplr_kernel(*p, L, backend), leaves, rtol=1e-4)


@pytest.mark.parametrize(("L", "N2"), [(1, 1), (2, 3), (63, 3), (64, 32)])
def test_the_frozen_kernel_and_its_gradient_equal_the_general_ones(backend, L, N2):
    w, P, Q, B, C, log_dt = draw(3, N2)
    weight = torch.randn(2, 3, L, dtype=torch.float64)
    frozen = freeze(w, P, Q, B, log_dt, L, torch.float64)
    planes = torch.view_as_real(C).clone().requires_grad_()
    ours = frozen_kernel(planes, frozen, backend)
    truth = nplr_kernel(w, P, Q, B, torch.view_as_complex(planes), log_dt, L, "reference")
    assert relative(ours, truth) < 1e-12
    (mine,) = torch.autograd.grad((ours * weight).sum(), planes)
    (true,) = torch.autograd.grad((truth * weight).sum(), planes)
    assert relative(mine, true) < 3e-12


def test_the_frozen_kernel_and_its_gradient_in_single_precision_are_as_close(backend):
    parameters, L = legs(2), 1000
    *fixed, C, log_dt = parameters
    weight = torch.randn(2, 2, L, dtype=torch.float64)
    C.requires_grad_()
    truth = nplr_kernel(*fixed, C, log_dt, L, "reference")
    (dC,) = torch.autograd.grad((truth * weight).sum(), C)
    planes = torch.view_as_real(C.detach()).float().requires_grad_()
    k = frozen_kernel(planes, freeze(*fixed, log_dt, L, torch.float32), backend)
    (ours,) = torch.autograd.grad((k * weight.float()).sum(), planes)
    assert relative(k, truth) < 1e-5
    assert relative(ours, torch.view_as_real(dC)) < 3e-5


def test_freezing_passes_opcheck(opcheck):
    w, P, Q, B, _, log_dt = draw(2, 3)
    planes = [torch.view_as_real(x) for x in (w, P, Q, B)]
    opcheck(torch.ops.sssd_hpc.nplr_freeze.default, (*planes, log_dt, 9, "torch"))


def test_layers_grouped_along_their_features_give_their_own_kernels(backend):
    layers = [draw(3, 4, seed=seed) for seed in (1, 2)]
    frozen = [freeze(*layer[:4], layer[5], 20, torch.float64) for layer in layers]
    planes = [torch.view_as_real(layer[4]) for layer in layers]
    together = frozen_kernel(torch.cat(planes, 1), FrozenNplr.group(frozen), backend)
    for ours, C, constants in zip(together.split(3, dim=1), planes, frozen, strict=True):
        torch.testing.assert_close(
            ours, frozen_kernel(C, constants, backend), rtol=1e-13, atol=1e-13
        )


def test_strided_inputs_give_the_same_kernel(backend):
    parameters = draw(4, 3)
    strided = [p.repeat_interleave(2, -1)[..., ::2] for p in parameters]
    assert torch.equal(nplr_kernel(*strided, 9, backend), nplr_kernel(*parameters, 9, backend))


def test_the_same_call_gives_the_same_bits(backend):
    parameters = single(draw(5, 8))

    def run() -> list[torch.Tensor]:
        leaves = [p.clone().requires_grad_() for p in parameters]
        k = nplr_kernel(*leaves, 100, backend)
        return [k, *torch.autograd.grad(k.square().sum(), leaves)]

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("index", range(6), ids=NAMES)
def test_a_parameter_that_is_not_finite_spoils_its_own_feature_alone(backend, index, bad):
    parameters = single(draw(3, 4))
    clean = nplr_kernel(*parameters, 16, backend)
    feature = 1 if index == 5 else (..., 1, 0)
    parameters[index][feature] = bad
    spoiled = nplr_kernel(*parameters, 16, backend)
    assert not spoiled[:, 1].isfinite().all()
    assert torch.equal(spoiled[:, [0, 2]], clean[:, [0, 2]])


def test_autocast_does_not_reach_the_kernel(backend):
    parameters = single(draw(2, 32))
    plain = nplr_kernel(*parameters, 100, backend)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        cast = nplr_kernel(*parameters, 100, backend)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)


@pytest.mark.parametrize("frozen", [False, True], ids=["general", "frozen"])
def test_the_registered_ops_pass_opcheck(opcheck, backend, frozen):
    a, b = torch.randn(2, 2, 2 + (not frozen), 3, 4, requires_grad=True).unbind()
    a, b = (t.detach().clone().requires_grad_() for t in (a, b))
    wr, wi = -torch.rand(3, 4) - 0.1, torch.rand(3, 4)
    gamma = torch.randn(3, 6, 2) if frozen else None
    if not frozen:
        wr, wi = wr.requires_grad_(), wi.requires_grad_()
    opcheck(torch.ops.sssd_hpc.nplr, (a, b, wr, wi, gamma, 10, backend))
    tensors = (a.detach(), b.detach(), wr.detach(), wi.detach(), gamma)
    opcheck(torch.ops.sssd_hpc.nplr_backward, (torch.randn(2, 3, 10), *tensors, backend))


@halves
@pytest.mark.parametrize("L", [1, 2, 5, 63, 64])
def test_half_sums_and_their_gradients_equal_the_textbooks(L, half):
    weight = torch.randn(2, 2, L, dtype=torch.float64)

    def both(backend: str) -> list[torch.Tensor]:
        leaves = [p.requires_grad_() for p in draw(2, 3)]
        k = nplr_kernel(*leaves, L, backend, half=half)
        return [k.detach(), *torch.autograd.grad((k * weight).sum(), leaves)]

    for ours, truth in zip(both("torch"), both("reference"), strict=True):
        assert (ours - truth).norm() <= 1e-9 * truth.norm() + 1e-14


def test_half_sums_run_by_torch_alone():
    with pytest.raises(UserError, match="half=True"):
        nplr_kernel(*draw(1, 2), 4, "cpp", half=True)


@pytest.mark.parametrize("prefix", ["f32", "f64"])
@pytest.mark.parametrize("kind", ["conj", "slow"])
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_kernels_match_the_public_code(prefix, kind, name):
    arrays = public(prefix)
    half, backend = kind == "slow", name
    k = nplr_kernel(*parameters_of(arrays), 100, backend, half=half)
    for key in (f"k_{kind}", f"k_{kind}_computed_in_f64"):
        assert relative(k, arrays[key].double()) < 2e-4, key
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
        (5, torch.ones(4, dtype=torch.int64), "log_dt"),
        (0, torch.ones(4, 3, dtype=torch.complex64, device="meta"), "is on"),
        (4, torch.ones(0, 4, 3, dtype=torch.complex64), "must not be empty"),
        (6, 0, "L is 0"),
    ],
    ids=[
        "real-w",
        "short-P",
        "C-without-channels",
        "short-log_dt",
        "integer-log_dt",
        "another-device",
        "no-channel",
        "no-samples",
    ],
)
def test_inputs_that_do_not_fit_are_named(index, replacement, words):
    arguments = [*single(draw(4, 3)), 8]
    arguments[index] = replacement
    with pytest.raises(UserError, match=words):
        nplr_kernel(*arguments)


@pytest.mark.parametrize(
    ("index", "replacement", "words"),
    [
        (0, torch.ones(0, 3, dtype=torch.complex64), "w is torch.complex64|w is torch.float32"),
        (1, torch.ones(4, 2, dtype=torch.complex64), "P is"),
        (2, torch.ones(4, 3, dtype=torch.complex64, device="meta"), "Q is on meta"),
        (4, torch.ones(3), "log_dt is torch.float32"),
        (4, torch.ones(4, dtype=torch.int64), "log_dt is torch.int64"),
        (5, 0, "L 0"),
        (6, torch.bfloat16, "dtype is torch.bfloat16"),
    ],
    ids=["empty-w", "short-P", "another-device", "short", "integer", "no-samples", "dtype"],
)
def test_constants_that_do_not_fit_are_named(index, replacement, words):
    w, P, Q, B, _, log_dt = single(draw(4, 3))
    arguments = [w, P, Q, B, log_dt, 8, torch.float32]
    arguments[index] = replacement
    with pytest.raises(UserError, match=words):
        freeze(*arguments)


@pytest.mark.parametrize(
    ("C", "words"),
    [
        (torch.ones(2, 4, 3), "C is torch.float32 .2, 4, 3."),
        (torch.ones(0, 4, 3, 2), "channels at least 1"),
        (torch.ones(2, 4, 3, 2, dtype=torch.float64), "C is torch.float64"),
        (torch.ones(2, 4, 3, 2, device="meta"), "C is on meta"),
    ],
)
def test_planes_that_do_not_fit_the_constants_are_named(C, words):
    w, P, Q, B, _, log_dt = single(draw(4, 3))
    with pytest.raises(UserError, match=words):
        frozen_kernel(C, freeze(w, P, Q, B, log_dt, 8, torch.float32))


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
