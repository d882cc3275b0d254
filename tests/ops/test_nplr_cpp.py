"""The compiled kernel op at every level of vector instructions, against the textbook."""

from __future__ import annotations

import math

import pytest
import torch

from sssd_hpc.ops.nplr import cpp, reference
from sssd_hpc.ops.nplr.nodes import half_angles

SIZES = [  # H, N2, channels, L
    (1, 1, 1, 1),
    (1, 1, 2, 2),
    (3, 3, 2, 3),
    (17, 3, 3, 64),
    (2, 32, 2, 1000),
    (3, 33, 1, 515),
    (70, 2, 2, 300),
]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "H{}-N{}-C{}-L{}".format(*size))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
NAMES = ("w", "P", "Q", "B", "C", "log_dt")


def draw(H: int, N2: int, channels: int) -> list[torch.Tensor]:
    """Random stable parameters in double precision, frequencies up to past the last node."""
    real = {"dtype": torch.float64}
    w = torch.complex(-0.5 - torch.rand(H, N2, **real), 3 * torch.rand(H, N2, **real).cumsum(1))
    P, B = torch.randn(2, H, N2, dtype=torch.complex128)
    C = torch.randn(channels, H, N2, dtype=torch.complex128)
    log_dt = math.log(1e-3) + math.log(100) * torch.rand(H, **real)
    return [w, P, P.conj().resolve_conj(), B, C, log_dt]


def prepare(parameters: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return a, b, wr, wi as the op's public function computes them; differentiable."""
    w, P, Q, B, C, log_dt = parameters
    dt = log_dt.exp()[:, None]
    w = w * dt
    v = 2 * torch.stack([B * dt, P * dt])[:, None] * torch.cat([C, Q[None]])
    return v.real.contiguous(), (v * w.conj()).real.contiguous(), w.real, w.imag


def spectrum(k: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(torch.fft.rfft(k)).contiguous()


def relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


def inputs(size, dtype):
    """Return (arguments of the general op, gamma, truth k_f) with a truth of double precision."""
    H, N2, channels, L = size
    parameters = draw(H, N2, channels)
    truth = spectrum(reference.run(*parameters, L, False))
    c, s = half_angles(L, torch.float64, torch.device("cpu"))
    # gamma = c R_BQ / (1 + c R_PQ), where c R = r on the unit circle and c is 0 at Nyquist.
    w, P, Q, B, _, log_dt = parameters
    dt = log_dt.exp()[:, None]
    pole, z = (w * dt)[..., None], (2j * s / c.clamp(min=1e-30))

    def r(X: torch.Tensor) -> torch.Tensor:
        v = (X * Q * dt)[..., None]
        return (v / (z - pole) + v.conj() / (z - pole.conj())).sum(1)

    gamma = torch.where(c > 0, r(B) / (1 + r(P)), 0)
    arguments = tuple(t.to(dtype).contiguous() for t in (*prepare(parameters), c, s))
    return arguments, torch.view_as_real(gamma).to(dtype).contiguous(), truth


def frozen(arguments: tuple[torch.Tensor, ...], gamma: torch.Tensor) -> tuple[torch.Tensor, ...]:
    a, b, *rest = arguments
    return a[:, :-1].contiguous(), b[:, :-1].contiguous(), *rest, gamma


@sizes
@dtypes
def test_the_spectrum_equals_the_textbooks(level, size, dtype):
    arguments, gamma, truth = inputs(size, dtype)
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    assert relative(cpp.forward(*arguments, None), truth) < limit
    assert relative(cpp.forward(*frozen(arguments, gamma)), truth) < limit


@sizes
@dtypes
def test_the_gradients_equal_the_textbooks(level, size, dtype):
    H, N2, channels, L = size
    leaves = [p.requires_grad_() for p in draw(H, N2, channels)]
    weight = torch.randn(channels, H, L, dtype=torch.float64)
    truth = torch.autograd.grad((reference.run(*leaves, L, False) * weight).sum(), leaves)
    c, s = half_angles(L, torch.float64, torch.device("cpu"))
    # The adjoint of irfft, whose inner nodes stand for two.
    g = spectrum(weight) * torch.where((c == 0) | (s == 0), 1.0, 2.0)[:, None] / L
    outputs = prepare(leaves)
    arguments = [t.detach().to(dtype).contiguous() for t in (*outputs, c, s)]
    ours = cpp.backward(g.to(dtype), *arguments, None)
    mine = torch.autograd.grad(outputs, leaves, [t.double() for t in ours])
    # Single precision errs in proportion to the textbook's gradient as a whole: at few nodes some
    # parts of it nearly cancel.
    scale = max(float(t.norm()) for t in truth)
    limit = 3e-5 if dtype == torch.float32 else 3e-12
    for name, got, expected in zip(NAMES, mine, truth, strict=True):
        assert float((got - expected).norm()) < limit * scale, name


@sizes
@dtypes
def test_the_frozen_gradients_are_those_of_the_general_op(level, size, dtype):
    arguments, gamma, k_f = inputs(size, torch.float64)
    g = torch.randn_like(k_f)
    general = cpp.backward(g, *arguments, None)
    single = [t.to(dtype) for t in frozen(arguments, gamma)]
    *ours, dwr, dwi = cpp.backward(g.to(dtype), *single)
    assert dwr.shape == dwi.shape == (0,)
    limit = 3e-5 if dtype == torch.float32 else 3e-12
    for got, expected in zip(ours, general[:2], strict=True):
        truth = expected[:, :-1]
        # At L = 1 the only node has s = 0: no gradient reaches a.
        assert float((got - truth).norm()) <= limit * float(truth.norm())


def test_results_have_the_same_bits_with_one_and_two_threads(level):
    for size in ((3, 32, 2, 1000), (70, 3, 2, 300)):
        arguments, gamma, truth = inputs(size, torch.float32)
        g = truth.float()
        runs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            try:
                given = frozen(arguments, gamma)
                runs.append(
                    [
                        cpp.forward(*arguments, None),
                        cpp.forward(*given),
                        *cpp.backward(g, *arguments, None),
                        *cpp.backward(g, *given),
                    ]
                )
            finally:
                torch.set_num_threads(1)
        assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["a", "b", "wr", "wi"])
def test_what_is_not_finite_stays_so_and_in_its_feature(level, which, value):
    arguments, _, truth = inputs((3, 5, 2, 65), torch.float32)
    arguments[["a", "b", "wr", "wi"].index(which)][..., 1, 2] = value
    bad = torch.tensor([False, True, False])
    k_f = cpp.forward(*arguments, None)
    assert torch.equal(k_f.isfinite().all(-1).all(-1).all(0), ~bad)
    da, db, dwr, dwi = cpp.backward(truth.float(), *arguments, None)
    for gradient in (da.sum((0, 1)), db.sum((0, 1)), dwr, dwi):
        assert torch.equal(gradient.isfinite().all(-1), ~bad)


def test_shapes_and_types_that_do_not_fit_are_refused_at_the_door():
    (a, b, wr, wi, c, s), gamma, truth = inputs((2, 3, 2, 8), torch.float32)
    with pytest.raises(RuntimeError, match="nplr: wi is Double"):
        cpp.forward(a, b, wr, wi.double(), c, s, None)
    with pytest.raises(RuntimeError, match="nplr: b is Float"):
        cpp.forward(a, b[..., :2], wr, wi, c, s, None)
    with pytest.raises(RuntimeError, match="nplr: a is Half"):
        cpp.forward(*(t.half() for t in (a, b, wr, wi, c, s)), None)
    with pytest.raises(RuntimeError, match=r"nplr: a is Float.*expected contiguous"):
        cpp.forward(a.mT.contiguous().mT, b, wr, wi, c, s, None)
    with pytest.raises(RuntimeError, match="nplr: gamma is Float"):
        cpp.forward(a, b, wr, wi, c, s, gamma[:, 1:])
    with pytest.raises(RuntimeError, match="nplr: g is Float"):
        cpp.backward(truth.float()[:1], a, b, wr, wi, c, s, None)
    with pytest.raises(RuntimeError, match="not empty"):
        cpp.forward(a[:, :, :0], b[:, :, :0], wr[:0], wi[:0], c, s, None)
