"""docs/math.md is true: every numbered formula, evaluated in float64 against a definition.

Formulas are written out here as the page has them, then compared with the code that they describe;
numbers of the page's tables are computed again.
"""

from __future__ import annotations

import ast
import importlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.fft import fft, ifft, irfft, rfft
from torch.nn.functional import gelu, layer_norm

from sssd_hpc.ops import cauchy, nplr_kernel
from sssd_hpc.ops.block import plain as block_plain
from sssd_hpc.ops.block import reference as block
from sssd_hpc.ops.cauchy import plain as cauchy_plain
from sssd_hpc.ops.fftconv import plain as conv_plain
from sssd_hpc.ops.fftconv import reference as conv_reference
from sssd_hpc.ops.nplr import op as nplr_op
from sssd_hpc.ops.nplr import plain as nplr_plain
from sssd_hpc.ops.nplr.nodes import half_angles
from sssd_hpc.s4 import hippo

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "math.md").read_text()
EVALUATED: list[str] = []

lengths = pytest.mark.parametrize("L", [8, 9])


def formula(*numbers: str) -> Callable[[Callable], Callable]:
    """Note that a test evaluates the formulas of these numbers."""
    EVALUATED.extend(numbers)
    return lambda test: test


def close(ours: Tensor, truth: Tensor, bound: float = 1e-11) -> bool:
    assert ours.shape == truth.shape
    return bool((ours - truth).norm() <= bound * truth.norm())


def relative(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).norm() / truth.norm())


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex128)


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def root(j: Tensor, n: int) -> Tensor:
    """exp(-2 pi i j / n)."""
    angle = -2 * math.pi * (j % n).double() / n
    return torch.polar(torch.ones_like(angle), angle)


def pairs(x: Tensor) -> Tensor:
    """All states of stored halves."""
    return torch.cat([x, x.conj()], dim=-1)


def system(L: int, N2: int = 3) -> SimpleNamespace:
    """A random stable system of one feature with two channels, and its dense discretisation."""
    m = SimpleNamespace(L=L, N2=N2, dt=0.3)
    m.lam = torch.complex(-0.2 - real(N2).abs(), 6 * real(N2))
    m.P, m.Q, m.B, m.C = noise(N2), noise(N2), noise(N2), noise(2, N2)
    m.A = torch.diag(pairs(m.lam)) - torch.outer(pairs(m.P), pairs(m.Q))  # (1.1)
    m.eye = torch.eye(2 * N2, dtype=m.A.dtype)
    left = m.eye - m.dt / 2 * m.A
    m.dA = torch.linalg.solve(left, m.eye + m.dt / 2 * m.A)  # (1.2)
    m.dB = torch.linalg.solve(left, m.dt * pairs(m.B))
    power = torch.linalg.matrix_power
    m.k = torch.stack([pairs(m.C) @ power(m.dA, step) @ m.dB for step in range(L)], -1)  # (1.3)
    m.C_tilde = pairs(m.C) @ (m.eye - power(m.dA, L))  # (1.4)
    m.omega = root(torch.arange(L), L)
    m.w = m.dt * m.lam
    m.c, m.s = half_angles(L, torch.float64, torch.device("cpu"))
    m.half = m.C_tilde[:, :N2]
    rows = torch.cat([m.half, m.Q[None]])
    m.v = torch.stack([m.B, m.P])[:, None] * rows
    m.a, m.b = 2 * m.dt * m.v.real, 2 * m.dt * (m.v * m.w.conj()).real
    return m


def polefree(m: SimpleNamespace) -> SimpleNamespace:
    """(3.4) to (3.7), written out; R is (2, 3, F): B and P with both channels and Q."""
    c, s, wr, wi = m.c, m.s, m.w.real[:, None], m.w.imag[:, None]
    dr = (c * wr) ** 2 + (c * wi - 2 * s) * (c * wi + 2 * s)
    di = -4 * s * c * wr
    p, q = dr / (dr**2 + di**2), -di / (dr**2 + di**2)
    a, b = m.a[..., None], m.b[..., None]
    R = torch.complex(-c * b * p - 2 * s * a * q, 2 * s * a * p - c * b * q).sum(-2)
    gamma = c * R[0, 2] / (1 + c * R[1, 2])
    k_f = torch.complex(c, s) * (R[0, :2] - gamma * R[1, :2])
    return SimpleNamespace(dr=dr, di=di, p=p, q=q, R=R, gamma=gamma, k_f=k_f)


def arguments(m: SimpleNamespace) -> list[Tensor]:
    """The system as a backend of one feature takes it."""
    shape = (*m.a.shape[:2], 1, m.N2)
    return [m.a.reshape(shape), m.b.reshape(shape), m.w.real[None], m.w.imag[None], m.c, m.s]


def gradients(run: Callable[..., Tensor], weight: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Torch's own gradients of sum Re(conj(weight) run(inputs))."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = run(*leaves)
    loss = (weight.conj() * out).sum()
    return torch.autograd.grad(loss.real if loss.is_complex() else loss, leaves)


# 1 and 2: the definition and the textbook.


@formula("1.1", "1.2", "1.3")
def test_kernel_is_the_impulse_response_of_the_trapezoidal_rule():
    m = system(9)
    u, x, outputs = real(9), torch.zeros(2 * m.N2, dtype=torch.complex128), []
    for sample in u:
        before = x
        x = torch.linalg.solve(
            m.eye - m.dt / 2 * m.A, before + m.dt / 2 * m.A @ before + m.dt * sample * pairs(m.B)
        )
        residue = x - before - m.dt / 2 * m.A @ (x + before) - m.dt * sample * pairs(m.B)
        assert residue.norm() < 1e-12
        outputs.append(pairs(m.C) @ x)
    convolved = [sum(m.k[:, i - j] * u[j] for j in range(i + 1)) for i in range(9)]
    assert close(torch.stack(outputs), torch.stack(convolved))
    assert m.k.imag.abs().max() < 1e-12


@lengths
@formula("1.4", "1.5", "1.6")
def test_generating_function_at_the_roots_of_unity_is_the_kernels_spectrum(L):
    m = system(L)
    powers = m.omega[:, None] ** torch.arange(L)
    summed = m.k @ powers.T
    closed = torch.stack(
        [m.C_tilde @ torch.linalg.solve(m.eye - omega * m.dA, m.dB) for omega in m.omega], -1
    )
    assert close(closed, summed)
    assert close(summed @ powers.conj() / L, m.k)
    assert close(irfft(summed[:, : L // 2 + 1], n=L), m.k.real)
    for j in range((L + 1) // 2):
        omega = m.omega[j]
        z = 2 * (1 - omega) / (1 + omega)
        resolvent = torch.linalg.solve(z * m.eye - m.dt * m.A, m.dt * pairs(m.B))
        assert close(2 / (1 + omega) * (m.C_tilde @ resolvent), summed[:, j])


@formula("1.7")
def test_length_correction_is_real_in_the_basis_of_the_dense_matrix():
    N, L, dt = 8, 13, 0.05
    form = hippo.nplr(N)
    w, P, V = (torch.tensor(x) for x in (form.w, form.P, form.V))
    C = noise(2, N // 2)
    eye = torch.eye(N, dtype=torch.complex128)
    A = torch.diag(pairs(w)) - torch.outer(pairs(P), pairs(P.conj()))
    dA = torch.linalg.solve(eye - dt / 2 * A, eye + dt / 2 * A)
    definition = (pairs(C) @ (eye - torch.linalg.matrix_power(dA, L)))[:, : N // 2]
    dense, eye = torch.tensor(hippo.legs(N)[0]), eye.real
    step = torch.linalg.solve(eye - dt / 2 * dense, eye + dt / 2 * dense)
    r = 2 * (C @ V.mH).real
    formula_17 = (r - r @ torch.linalg.matrix_power(step, L)).to(V.dtype) @ V
    assert close(formula_17, definition)
    log_dt = torch.tensor([math.log(dt)], dtype=torch.float64)
    assert close(hippo.correct_length(C[:, None], log_dt, L)[:, 0], definition)


@lengths
@formula("2.1", "2.2", "2.3")
def test_woodbury_over_pairs_is_the_resolvent(L):
    m = system(L)
    omega = m.omega[: (L + 1) // 2]
    z = 2 * (1 - omega) / (1 + omega)

    def r(X: Tensor, Y: Tensor) -> Tensor:
        v = (X * Y)[..., None]
        w = m.w[:, None]
        return m.dt * (v / (z - w) + v.conj() / (z - w.conj())).sum(-2)

    both = r(m.B, m.half) - r(m.B, m.Q) * r(m.P, m.half) / (1 + r(m.P, m.Q))
    k_f = rfft(m.k.real)
    assert close(2 / (1 + omega) * both, k_f[:, : len(omega)])
    dense = torch.linalg.det(z[:, None, None] * m.eye - m.dt * m.A)
    diagonal = ((z - m.w[:, None]) * (z - m.w.conj()[:, None])).prod(0)
    assert close(1 + r(m.P, m.Q), dense / diagonal)


@lengths
@formula("2.4")
def test_the_half_sum_lacks_the_lower_half_of_the_circle(L):
    m = system(L)
    steps = ((1 + m.w / 2) / (1 - m.w / 2))[:, None] ** torch.arange(L)
    kappa = m.C @ (steps * (m.dt * m.B / (1 - m.w / 2))[:, None])
    whole = 2 * kappa.real
    spectrum = fft(kappa)
    half = irfft(spectrum[:, : L // 2 + 1], n=L)
    lags = torch.arange(L)
    missing = spectrum[:, :1] + (0 if L % 2 else (-1.0) ** lags * spectrum[:, L // 2, None])
    for j in range(L // 2 + 1, L):
        missing = missing + 2 * spectrum[:, j, None] * root(-j * lags, L)
    assert close(whole - half, missing.real / L)
    # The code's half sum is that function: with P = 0 there is no rank 1 term.
    corrected = m.C * (1 - steps[:, -1] * (1 + m.w / 2) / (1 - m.w / 2))
    none = torch.zeros_like(m.B)[None]
    log_dt = torch.tensor([m.dt], dtype=torch.float64).log()
    inputs = (m.lam[None], none, none, m.B[None], corrected[:, None], log_dt, L)
    assert close(nplr_kernel(*inputs, "reference", half=True)[:, 0], half)
    assert close(nplr_kernel(*inputs, "reference")[:, 0], whole)


# 3: the pole-free form.


@formula("3.1", "3.2")
def test_nodes_are_imaginary_and_pairs_have_a_real_denominator():
    m = system(9)
    omega = m.omega[:5]
    z = 2 * (1 - omega) / (1 + omega)
    assert close(2j * m.s / m.c, z)
    assert close(torch.complex(m.c, m.s) / m.c, 2 / (1 + omega))
    v, w, z = m.v[0, 0, :, None], m.w[:, None], noise(7)
    merged = (2 * z * v.real - 2 * (v * w.conj()).real) / (z**2 - 2 * z * w.real + w.abs() ** 2)
    assert close(merged, v / (z - w) + v.conj() / (z - w.conj()))


@lengths
@formula("3.3", "3.4", "3.5", "3.6", "3.7")
def test_polefree_form_gives_the_spectrum_of_the_recurrence(L):
    m = system(L)
    f = polefree(m)
    c, s, w = m.c, m.s, m.w[:, None]
    d = c**2 * w.abs() ** 2 - 4 * s**2 - 4j * s * c * w.real
    assert close(d, (c * w - 2j * s) * (c * w.conj() - 2j * s))
    assert close(torch.complex(f.dr, f.di), d)
    assert close(torch.complex(f.p, f.q), 1 / d)
    R = ((2j * s * m.a[..., None] - c * m.b[..., None]) / d).sum(-2)
    assert close(f.R, R)
    z = 2j * s[:-1] / c[:-1]
    v = m.v[..., None]
    r = m.dt * (v / (z - w) + v.conj() / (z - w.conj())).sum(-2)
    assert close(c[:-1] * R[..., :-1], r)
    assert close(f.k_f, rfft(m.k.real))
    code = nplr_plain.forward(*arguments(m), None)
    assert close(torch.view_as_complex(code)[:, 0], f.k_f)


@formula("3.8")
def test_nyquist_is_the_static_gain_of_the_products():
    m = system(8)
    assert m.c[-1] == 0
    assert m.s[-1] == 1
    f = polefree(m)
    assert torch.equal(f.p[:, -1], torch.full((m.N2,), -0.25, dtype=torch.float64))
    assert not f.q[:, -1].any()
    assert f.gamma[-1] == 0
    limit = m.a[0, :2].sum(-1) / 2
    assert close(limit, m.dt * (m.B * m.half).sum(-1).real)
    assert close(f.k_f[:, -1].real, limit)
    assert close(rfft(m.k.real)[:, -1].real, limit)


@formula("3.9")
def test_a_relative_error_of_a_frequency_grows_by_wi_over_wr_at_resonance():
    w, theta = torch.tensor(-0.01 + 3j, dtype=torch.complex128), 2 * math.atan(3 / 2)
    c, s = math.cos(theta / 2), math.sin(theta / 2)
    assert c * w.imag == pytest.approx(2 * s)

    def d(wi: float) -> complex:
        return (c * w.real) ** 2 + (c * wi - 2 * s) * (c * wi + 2 * s) - 4j * s * c * w.real

    step = 1e-6
    slope = abs(d(3 + step) - d(3 - step)) / (2 * step)
    growth = float(slope * 3 / abs(d(3)))
    assert growth == pytest.approx(300, rel=1e-4)
    w = torch.tensor(hippo.nplr(64).w)
    assert f"{(w.imag / w.real).abs().max():.0f} for LegS" in PAGE


@formula("3.10")
def test_a_dominating_state_cancels_in_the_woodbury_term():
    R = noise(2, 2)
    (B, P, C, Q), t = noise(4), 1e9
    r = R + t * torch.outer(torch.stack([B, P]), torch.stack([C, Q]))
    exact = r[0, 0] - r[0, 1] * r[1, 0] / (1 + r[1, 1])
    limit = R[0, 0] - B / P * R[1, 0] - C / Q * R[0, 1] + B * C / (P * Q) * (1 + R[1, 1])
    assert abs(exact - limit) < 1e-5 * abs(limit)


def denominators(form: str, c: Tensor, s: Tensor, wr: Tensor, wi: Tensor) -> tuple[Tensor, Tensor]:
    """d in the dtype of the inputs, rounded as the named row of the page's table says."""
    cw, di = c * wr, -4 * s * c * wr
    if form == "fused":
        wide = [x.double() for x in (c, s, wi)]
        below, above = ((wide[0] * wide[2] + sign * 2 * wide[1]).to(c.dtype) for sign in (-1, 1))
        square = (cw * cw).double()
        return (square + below.double() * above.double()).to(c.dtype), di
    if form == "product":
        return cw * cw + (c * wi - 2 * s) * (c * wi + 2 * s), di
    return c * c * (wr * wr + wi * wi) - 4 * s * s, di


def rounding_errors(seed: int) -> dict[str, list[float]]:
    """The columns of the page's table of float32 errors, by row."""
    generator = torch.Generator().manual_seed(seed)
    legs, H, L = hippo.nplr(64), 32, 1000
    w, P, B = (torch.tensor(x) for x in (legs.w, legs.P, legs.B))
    uniform = torch.rand(H, 1, generator=generator, dtype=torch.float64)
    dt = (math.log(1e-3) + math.log(100) * uniform).exp()
    C = torch.randn(H, 32, generator=generator, dtype=torch.complex128)
    v = 2 * dt * torch.stack([B, P])[:, None, None] * torch.stack([C, P.conj().expand(H, -1)])
    w = w * dt
    exact = [v.real, (v * w.conj()).real, w.real, w.imag, *half_angles(L, w.real.dtype, w.device)]
    single = [x.float() for x in exact]
    rounded = [x.double() for x in single]

    def run(form: str, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        a, b, wr, wi, c, s = inputs
        dr, di = denominators(form, c, s, wr[..., None], wi[..., None])
        inverse = 1 / (dr * dr + di * di)
        p, q = dr * inverse, -di * inverse
        (ap, aq), (bp, bq) = (
            [torch.einsum("ijhn,hnl->ijhl", x, y) for y in (p, q)] for x in (a, b)
        )
        return torch.complex(dr, di), torch.complex(-c * bp - 2 * s * aq, 2 * s * ap - c * bq)

    def spectrum(R: Tensor, R_PC: Tensor | None = None) -> Tensor:
        c, s = (x.to(R.real.dtype) for x in exact[4:])
        R_PC = R[1, 0] if R_PC is None else R_PC
        return torch.complex(c, s) * (R[0, 0] - c * R[0, 1] / (1 + c * R[1, 1]) * R_PC)

    def errors(ours: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> list[float]:
        (d, R), (d0, R0) = ours, truth
        worst = float(((d - d0).abs() / d0.abs()).max())
        return [worst, relative(R[0, 0], R0[0, 0]), relative(spectrum(R), spectrum(R0))]

    truth, nearest = run("product", exact), run("product", rounded)
    forms = {form: run(form, single) for form in ("fused", "product", "expanded")}
    apart = spectrum(forms["product"][1], forms["expanded"][1][1, 0])
    return {
        "inputs": errors(nearest, truth),
        **{form: errors(result, nearest) for form, result in forms.items()},
        "apart": [relative(apart, spectrum(truth[1]))],
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_float32_errors_are_those_of_the_table(seed):
    """Within a factor 3: the page has one digit, and processors sum in different orders."""
    rows = rounding_errors(seed)
    lines = PAGE[PAGE.index("| | $d$ | $R_{BC}$") :].splitlines()[2:7]
    for (name, row), line in zip(rows.items(), lines, strict=True):
        printed = [cell.split(", ")[seed] for cell in re.findall(r"\de-\d, \de-\d", line)]
        assert len(printed) == len(row), name
        for number, text in zip(row, printed, strict=True):
            assert float(text) / 3 < number < 3 * float(text), (name, row)
    assert rows["product"][2] < 1e-5 < rows["apart"][0] / 5


# 4: the backward pass of the kernel.


@formula("4.1")
def test_torch_returns_the_gradients_of_the_page():
    X, x, eta, G = noise(5), real(5), noise(5), noise(5)
    (dX,) = gradients(lambda X: X**3, G, X)
    assert close(dX, (3 * X**2).conj() * G)
    (dx,) = gradients(lambda x: eta * x, G, x)
    assert close(dx, (G.conj() * eta).real)


@lengths
@formula("4.2", "4.3", "4.4", "4.5", "4.6", "4.7")
def test_kernel_gradients_are_those_of_autograd(L):
    m = system(L)
    f = polefree(m)
    g = noise(2, L // 2 + 1)
    c, s, wr, wi = m.c, m.s, m.w.real[:, None], m.w.imag[:, None]
    G = torch.empty_like(f.R)
    G[0, :2] = torch.complex(c, -s) * g  # (4.2)
    G[1, :2] = -f.gamma.conj() * G[0, :2]
    G_gamma = -(f.R[1, :2].conj() * G[0, :2]).sum(0)
    u = 1 / (1 + c * f.R[1, 2])
    G[0, 2] = (c * u).conj() * G_gamma  # (4.3)
    G[1, 2] = -(c * f.gamma * u).conj() * G_gamma
    G = G[:, :, None]
    da = (2 * s * (G.imag * f.p - G.real * f.q)).sum(-1)  # (4.4)
    db = -(c * (G.real * f.p + G.imag * f.q)).sum(-1)  # (4.5)
    rho = torch.complex(f.p, f.q)
    x = ((2j * s * m.a[..., None] - c * m.b[..., None]).conj() * G).sum((0, 1))
    dd = -(rho**2).conj() * x  # (4.6)
    dwr = (2 * c**2 * wr * dd.real - 4 * s * c * dd.imag).sum(-1)  # (4.7)
    dwi = (2 * c**2 * wi * dd.real).sum(-1)

    def run(a: Tensor, b: Tensor, wr: Tensor, wi: Tensor) -> Tensor:
        moved = SimpleNamespace(a=a, b=b, w=torch.complex(wr, wi), c=c, s=s)
        return polefree(moved).k_f

    truth = gradients(run, g, m.a, m.b, m.w.real, m.w.imag)
    code = nplr_plain.backward(torch.view_as_real(g)[:, None], *arguments(m), None)
    for ours, autograd, theirs in zip((da, db, dwr, dwi), truth, code, strict=True):
        assert close(ours, autograd)
        assert close(theirs.reshape(ours.shape), autograd)


@formula("4.8", "4.9")
def test_frozen_products_are_linear_in_c_and_back():
    m = system(8)
    X = torch.stack([m.B, m.P])[:, None]
    x = 2 * m.dt * X
    y = x * m.w.conj()

    def products(C: Tensor) -> Tensor:
        return torch.stack([x.real * C.real - x.imag * C.imag, (y * C).real])

    assert close(products(m.half), torch.stack([m.a, m.b])[:, :, :2])
    weight = real(2, 2, 2, m.N2)
    da, db = weight
    (dC,) = gradients(products, weight, m.half)
    assert close((x.conj() * da + y.conj() * db).sum(0), dC)
    log_dt = torch.tensor([m.dt], dtype=torch.float64).log()
    constants = (t[None] for t in (m.lam, m.P, m.Q, m.B))
    frozen = nplr_op.freeze(*constants, log_dt, m.L, torch.float64)
    code = (frozen.mix[:, :, None, 0] * torch.view_as_real(m.half)).sum(-1)
    assert close(code, products(m.half))
    assert close(torch.view_as_complex(frozen.gamma)[0], polefree(m).gamma)
    k = nplr_op.frozen_kernel(torch.view_as_real(m.half)[:, None], frozen, "torch")
    assert close(k[:, 0], m.k.real)


@lengths
@formula("4.10")
def test_irfft_weighs_inner_nodes_twice_and_its_adjoint_too(L):
    k_f, weight = noise(L // 2 + 1), real(L)
    epsilon = torch.full((L // 2 + 1,), 2.0, dtype=torch.float64)
    epsilon[0] = 1
    if L % 2 == 0:
        epsilon[-1] = 1
    j, lags = torch.arange(L // 2 + 1), torch.arange(L)[:, None]
    k = (epsilon * (k_f * root(-j * lags, L)).real).sum(-1) / L
    assert close(irfft(k_f, n=L), k)
    (truth,) = gradients(lambda k_f: irfft(k_f, n=L), weight, k_f)
    assert close(epsilon / L * rfft(weight), truth)


# 5: the Cauchy sum.


@formula("5.1", "5.2", "5.3", "5.4")
def test_cauchy_gradients_are_those_of_autograd():
    v, w, z, G = noise(4), noise(4), noise(6), noise(6)
    up, down = 1 / (z - w[:, None]), 1 / (z - w.conj()[:, None])

    def run(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
        v, w = v[:, None], w[:, None]
        return (v / (z - w) + v.conj() / (z - w.conj())).sum(0)

    assert close((v[:, None] * up + v.conj()[:, None] * down).sum(0), run(v, z, w))
    assert close(cauchy(v, z, w, "torch"), run(v, z, w))
    dv = (G * up.conj() + G.conj() * down).sum(-1)
    dw = v.conj() * (G * up.conj() ** 2 + G.conj() * down**2).sum(-1)
    dz = -G * (v[:, None] * up**2 + v.conj()[:, None] * down**2).conj().sum(0)
    truth = gradients(run, G, v, z, w)
    planes = [torch.view_as_real(t)[None] for t in (G, v, z, w)]
    code = cauchy_plain.backward(*planes, True)
    for ours, autograd, theirs in zip((dv, dz, dw), truth, code, strict=True):
        assert close(ours, autograd)
        assert close(torch.view_as_complex(theirs)[0], autograd)


def test_merged_pairs_overflow_float32_where_separate_ones_do_not():
    z = torch.tensor(1e16j, dtype=torch.complex64)
    v, w = torch.tensor(1 + 2j, dtype=z.dtype), torch.tensor(-0.5 + 3j, dtype=z.dtype)
    truth = (1 + 2j) / (1e16j - (-0.5 + 3j)) + (1 - 2j) / (1e16j - (-0.5 - 3j))
    separate = cauchy(v[None], z[None], w[None], "torch")[0]
    assert abs(complex(separate) - truth) < 1e-5 * abs(truth)
    denominator = (z - w) * (z - w.conj())
    modulus = denominator.real.square() + denominator.imag.square()
    assert not torch.isfinite(modulus)
    reciprocal = (z - w).conj() / ((z - w).real.square() + (z - w).imag.square())
    square = reciprocal * reciprocal
    assert square.abs() > torch.finfo(torch.float32).tiny
    assert close(
        square.to(torch.complex128), torch.tensor(-1e-32 + 0j, dtype=torch.complex128), 1e-5
    )


# 6: the convolution.


def signals(L: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, k, D of one feature, and the gradient of y."""
    return real(batch, 1, L), real(2, 1, L), real(1), real(batch, 1, L)


def on_circle(k: Tensor, D: Tensor, n: int) -> Tensor:
    """kappa of (6.2)."""
    L = k.shape[-1]
    kappa = torch.zeros(n, dtype=torch.float64)
    kappa[:L] = k[0, 0]
    for m in range(L - 1):
        kappa[n - 1 - m] = k[1, 0, m]
    kappa[0] += D[0]
    return kappa


@pytest.mark.parametrize("L", [1, 2, 7])
@pytest.mark.parametrize("extra", [0, 1, 6])
@formula("6.1", "6.2", "6.3", "6.4", "6.5")
def test_convolution_on_any_circle_and_its_gradients(L, extra):
    n = 2 * L - 1 + extra
    u, k, D, g = signals(L)
    y = torch.zeros_like(u)
    for i in range(L):
        for j in range(L):
            y[..., i] += (k[0, 0, i - j] if j <= i else k[1, 0, j - i - 1]) * u[..., j]
    y += D * u
    assert close(conv_reference.run(u, k, D, None), y)
    kappa = on_circle(k, D, n)
    i = torch.arange(L)
    assert close(u @ kappa[(i[:, None] - i) % n].T, y)
    U, G = (rfft(x, n=n)[:, 0] for x in (u, g))
    K = rfft(on_circle(k, 0 * D, n)) + D
    assert close(irfft(U * K, n=n)[:, None, :L], y)
    du = irfft(G * K.conj(), n=n)[:, None, :L]
    rho = irfft((G * U.conj()).sum(0), n=n)
    correlation = sum((g[..., lag:] * u[..., : L - lag]).sum() for lag in (L - 1,))
    assert rho[L - 1].item() == pytest.approx(float(correlation))
    dk = torch.zeros_like(k)
    dk[0, 0] = rho[:L]
    for m in range(L - 1):
        dk[1, 0, m] = rho[n - 1 - m]
    truth = gradients(lambda u, k, D: conv_reference.run(u, k, D, None), g, u, k, D)
    for ours, autograd in zip((du, dk, rho[:1]), truth, strict=True):
        assert (ours - autograd).norm() < 1e-11 * (1 + autograd.norm())
    assert not truth[1][1, 0, -1]


@formula("6.6")
def test_gradient_of_the_half_spectrum_and_back_to_the_kernel():
    L = 7
    u, k, D, g = signals(L)
    n = conv_plain.circle(L)
    U, G = (rfft(x, n=n)[:, 0] for x in (u, g))
    epsilon = torch.full((n // 2 + 1,), 2.0, dtype=torch.float64)
    epsilon[0] = epsilon[-1] = 1
    K = rfft(on_circle(k, D, n))
    dK = epsilon / n * (G * U.conj()).sum(0)
    (truth,) = gradients(lambda K: irfft(U * K, n=n)[:, None, :L], g, K)
    assert close(dK, truth)
    j, m = torch.arange(n // 2 + 1), torch.arange(n)[:, None]
    rho = (dK * root(-j * m, n)).real.sum(-1)
    assert close(rho, n * irfft(dK / epsilon, n=n))
    assert close(rho, gradients(rfft, dK, on_circle(k, D, n))[0])
    assert close(dK.real.sum(), rho[0])
    planes = conv_plain.prepare(k, D)
    assert close(torch.view_as_complex(planes)[0], K)
    du, dK_code = conv_plain.backward(g, u, planes, u.new_empty(0), "none")
    assert close(torch.view_as_complex(dK_code)[0], dK)
    dk, dD = conv_plain.prepare_backward(dK_code, 1, L)
    truths = gradients(lambda u, k, D: conv_reference.run(u, k, D, None), g, u, k, D)
    for ours, autograd in zip((du, dk, dD), truths, strict=True):
        assert close(ours, autograd)


@formula("6.7", "6.8")
def test_one_complex_transform_carries_two_real_rows():
    L, n = 7, 16
    u, k, D, g = signals(L)
    kappa = on_circle(k, D, n)
    K = fft(kappa)
    Zu, Zg = (fft(torch.complex(x[0, 0], x[1, 0]), n=n) for x in (u, g))
    y, du = ifft(Zu * K)[:L], ifft(Zg * K.conj())[:L]
    truth = gradients(lambda u, k, D: conv_reference.run(u, k, D, None), g, u, k, D)
    expected = conv_reference.run(u, k, D, None)[:, 0]
    assert close(torch.stack([y.real, y.imag]), expected)
    assert close(torch.stack([du.real, du.imag]), truth[0][:, 0])
    dK = Zg * Zu.conj()
    rho = ifft(dK).real
    assert close(rho, irfft((rfft(g, n=n) * rfft(u, n=n).conj()).sum((0, 1)), n=n))
    turns = root(-torch.arange(n) * torch.arange(L)[:, None], n)
    assert close(turns @ (Zu * K / n), y)
    (full,) = gradients(
        lambda K: torch.view_as_real(turns @ (Zu * K)), torch.stack([g[0, 0], g[1, 0]], -1), K / n
    )
    assert close(dK, full)


def test_the_packed_spectrum_of_the_gpu_is_that_of_the_page():
    pytest.importorskip("triton")
    conv_triton = importlib.import_module("sssd_hpc.ops.fftconv.triton")
    L = 7
    u, k, D, g = signals(L)
    planes = conv_triton.prepare(k, D)
    n = planes.shape[1]
    assert close(torch.view_as_complex(planes)[0], fft(on_circle(k, D, n)) / n)
    Zu, Zg = (fft(torch.complex(x[0, 0], x[1, 0]), n=n) for x in (u, g))
    ours = conv_triton.prepare_backward(torch.view_as_real(Zg * Zu.conj())[None], 1, L)
    truth = gradients(lambda k, D: conv_reference.run(u, k, D, None), g, k, D)
    for mine, autograd in zip(ours, truth, strict=True):
        assert close(mine, autograd)


@pytest.mark.parametrize("m", [6, 7])
@formula("6.9", "6.10", "6.11", "6.12")
def test_real_transforms_and_products_are_complex_ones_of_half_the_size(m):
    n, L = 2 * m, m
    u, k, D, g = signals(L, batch=1)
    kappa = on_circle(k, D, n)

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([x, x.new_zeros(n - len(x))])
        Z = fft(torch.complex(x[::2], x[1::2]))
        Z = torch.cat([Z, Z[:1]])
        mirror = Z.flip(0).conj()
        return (Z + mirror) / 2, (Z - mirror) / 2j

    def whole(even: Tensor, odd: Tensor) -> Tensor:
        z = ifft((even + 1j * odd)[:m])
        return torch.stack([z.real, z.imag], -1).flatten()[:L]

    E, Od = halves(u[0, 0])
    assert close(E + root(torch.arange(m + 1), n) * Od, rfft(u[0, 0], n=n))
    KE, KO = halves(kappa)
    W = root(torch.arange(m + 1), m)
    y = whole(KE * E + W * KO * Od, KO * E + KE * Od)
    assert close(y, conv_reference.run(u, k, D, None)[0, 0])
    GE, GO = halves(g[0, 0])
    du = whole(KE.conj() * GE + KO.conj() * GO, (W * KO).conj() * GE + KE.conj() * GO)
    (truth, *_) = gradients(lambda *p: conv_reference.run(*p, None), g, u, k, D)
    assert close(du, truth[0, 0])
    free = slice(m // 2 + 1)
    epsilon = torch.full((m // 2 + 1,), 2.0, dtype=torch.float64)
    epsilon[0] = 1
    if m % 2 == 0:
        epsilon[-1] = 1
    dKE = epsilon / m * (E.conj() * GE + Od.conj() * GO)[free]
    dKO = epsilon / m * ((W * Od).conj() * GE + E.conj() * GO)[free]

    def run(KE: Tensor, KO: Tensor) -> Tensor:
        even = irfft(KE * E[free] + W[free] * KO * Od[free], n=m)
        odd = irfft(KO * E[free] + KE * Od[free], n=m)
        return torch.stack([even, odd], -1).flatten()[:L]

    for ours, autograd in zip((dKE, dKO), gradients(run, g[0, 0], KE[free], KO[free]), strict=True):
        assert close(ours, autograd)


# 7: the transform on a GPU.


@pytest.mark.parametrize("radices", [(8, 2), (2, 8), (4, 8, 2)])
@formula("7.1", "7.2")
def test_stages_end_in_the_transform_in_natural_order(radices):
    n = math.prod(radices)
    x = noise(n)
    left, z = n, x[:, None]
    for R in radices:
        v = left // R
        q = torch.arange(R)
        digits = torch.einsum("rq,qjf->jrf", root(q[:, None] * q, R), z.reshape(R, v, -1))
        turned = digits * root(torch.arange(v)[:, None] * q, left)[..., None]
        left, z = v, turned.flatten(1)
    assert close(z[0], fft(x))
    swapped = torch.complex(x.imag, x.real)
    assert close(swapped, 1j * x.conj())
    back = fft(swapped)
    assert close(torch.complex(back.imag, back.real), n * ifft(x))


def matrices(N1: int, N2: int) -> tuple[Tensor, Tensor, Tensor]:
    def roots(rows: int, columns: int, n: int) -> Tensor:
        return root(torch.arange(rows)[:, None] * torch.arange(columns), n)

    return roots(N1, N1, N1), roots(N1, N2, N1 * N2), roots(N2, N2, N2)


def monarch(
    x: Tensor, K: Tensor, N1: int, N2: int, rounded: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """(7.4) and (7.5) of (..., n/2) complex signals, operands of every product `rounded`."""
    F1, T, F2 = matrices(N1, N2)
    half = N1 // 2
    x = x.unflatten(-1, (half, N2))
    X = rounded(rounded(F1[:, :half]) @ rounded(x) * T) @ rounded(F2)
    Z = rounded(rounded(X * K) @ rounded(F2.conj()) * T.conj())
    return (rounded(F1[:half].conj()) @ Z).flatten(-2)


@pytest.mark.parametrize(("N1", "N2"), [(4, 8), (8, 4)])
@formula("7.3", "7.4", "7.5", "7.6")
def test_monarch_is_the_transform_in_permuted_order(N1, N2):
    n = N1 * N2
    F1, T, F2 = matrices(N1, N2)
    n1, n2, k1, k2 = torch.meshgrid(*map(torch.arange, (N1, N2, N1, N2)), indexing="ij")
    turn = root((N2 * n1 + n2) * (k1 + N1 * k2), n)
    assert close(F1[n1, k1] * T[k1, n2] * F2[n2, k2], turn)
    x = torch.cat([noise(n // 2), torch.zeros(n // 2)])
    X = (F1 @ x.reshape(N1, N2) * T) @ F2
    order = torch.arange(N1)[:, None] + N1 * torch.arange(N2)
    assert close(X, fft(x)[order])
    assert close(fft(x).reshape(N2, N1).T, X)
    L = n // 2
    u, k, D, _ = signals(L)
    K = fft(on_circle(k, D, n)).reshape(N2, N1).T / n
    y = monarch(torch.complex(u[0, 0], u[1, 0]), K, N1, N2)
    assert close(torch.stack([y.real, y.imag]), conv_reference.run(u, k, D, None)[:, 0])
    products = [(N1, N1 // 2, N2), (N1, N2, N2), (N1, N2, N2), (N1 // 2, N1, N2)]
    assert sum(math.prod(sizes) for sizes in products) == n * (N1 + 2 * N2)


def significant(bits: int) -> Callable[[Tensor], Tensor]:
    """Round both planes to so many significant bits, to nearest."""

    def plane(x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)

    return lambda x: torch.complex(plane(x.real), plane(x.imag))


def cut(bits: int) -> Callable[[Tensor], Tensor]:
    """Drop all but so many significant bits of both planes."""

    def plane(x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**bits).trunc() / 2**bits, exponent)

    return lambda x: torch.complex(plane(x.real), plane(x.imag))


def test_tensor_core_errors_are_those_of_the_table():
    L, N1, N2 = 1000, 32, 64
    n = N1 * N2
    k = real(2, 1, L) * torch.exp(-torch.arange(L) / 60.0)
    K = fft(on_circle(k, real(1), n)).reshape(N2, N1).T / n
    white, walk = (significant(8)(x) for x in (noise(8, L), noise(8, L).cumsum(-1)))
    lines = PAGE[PAGE.index("| operands | white noise") :].splitlines()[2:5]
    for rounding, line in zip((significant(8), significant(11), cut(11)), lines, strict=True):
        printed = re.findall(r"[\d.]+e-\d", line)
        for signal, text in zip((white, walk), printed, strict=True):
            x = torch.nn.functional.pad(signal, (0, n // 2 - L))
            error = relative(monarch(x, K, N1, N2, rounding), monarch(x, K, N1, N2))
            assert float(text) / 2 < error < 2 * float(text), line
    shortened = monarch(torch.nn.functional.pad(white, (0, n // 2 - L)), K, N1, N2, cut(11))
    whole = monarch(torch.nn.functional.pad(white, (0, n // 2 - L)), K, N1, N2)
    gain = float((shortened.conj() * whole).sum().real / whole.abs().square().sum())
    assert -0.003 < gain - 1 < -0.001


@formula("7.7")
def test_two_bfloat16_terms_keep_sixteen_bits_of_a_tap():
    L = 50
    u, k, D, _ = signals(L)
    u = u.bfloat16().double()
    taps = torch.cat([k[1, 0, : L - 1].flip(0), k[0, 0]])
    taps[L - 1] += D[0]
    high = taps.bfloat16().double()
    low = (taps - high).bfloat16().double()
    assert ((taps - high - low).abs() <= 2.0**-16 * taps.abs()).all()
    i = torch.arange(L)
    y = u @ (high + low)[i[:, None] - i + L - 1].T
    assert relative(y, conv_reference.run(u, k, D, None)) < 2.0**-16
    product = u[..., None] * high
    assert torch.equal(product.float().double(), product)


def test_half_an_ulp_of_tf32_makes_the_cut_a_rounding():
    x = torch.randn(1000)
    kept = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    mantissa, exponent = torch.frexp(x.double())
    nearest = torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)
    assert torch.equal(kept.double(), nearest)


# 8: the pointwise ops.


@formula("8.1")
def test_gelu_and_its_derivative():
    x, g = 3 * real(50), real(50)
    Phi = 0.5 * (1 + torch.erf(x / 2**0.5))
    phi = torch.exp(-x * x / 2) / (2 * math.pi) ** 0.5
    assert close(x * Phi, gelu(x))
    assert close(g * (Phi + x * phi), gradients(gelu, g, x)[0])


@formula("8.2", "8.3", "8.4")
def test_residual_norm_and_its_gradients():
    x, y, g = real(2, 5, 3), real(2, 5, 3), real(2, 5, 3)
    weight, bias, shift, eps = real(5), real(5), real(2, 5), 0.1
    t = x + y
    mean = t.mean(1, keepdim=True)
    rstd = ((t - mean).square().mean(1, keepdim=True) + eps) ** -0.5
    d = t - t[:, :1]
    first, second = d.mean(1, keepdim=True), d.square().mean(1, keepdim=True)
    assert close(t[:, :1] + first, mean)
    assert close((second - first**2 + eps) ** -0.5, rstd)
    that = (t - mean) * rstd
    out = that * weight[:, None] + bias[:, None] + shift[..., None]
    norm = layer_norm(t.transpose(1, 2), (5,), weight, bias, eps).transpose(1, 2)
    assert close(out, norm + shift[..., None])
    assert close(out, block.residual_norm(x, y, weight, bias, shift, eps))
    e = g * weight[:, None]
    dt = rstd * (e - e.mean(1, keepdim=True) - that * (e * that).mean(1, keepdim=True))
    ours = (dt, dt, (g * that).sum((0, 2)), g.sum((0, 2)), g.sum(2))
    truth = gradients(lambda *p: block.residual_norm(*p, eps), g, x, y, weight, bias, shift)
    for mine, autograd in zip(ours, truth, strict=True):
        assert close(mine, autograd)
    code = block_plain.residual_norm_backward(g, x, y, weight, mean[:, 0], rstd[:, 0])
    for mine, theirs in zip((dt, ours[2], ours[4]), code, strict=True):
        assert close(theirs, mine)


@formula("8.5", "8.6")
def test_gate_and_its_gradient():
    h, g = real(2, 6, 3), real(2, 3, 3)
    a, c = h[:, :3], h[:, 3:]
    S = torch.sigmoid(c)
    assert close(a.tanh() * S, block.gate(h))
    da, dc = g * S * (1 - a.tanh() ** 2), g * a.tanh() * S * (1 - S)
    (dh,) = gradients(block.gate, g, h)
    assert close(torch.cat([da, dc], 1), dh)
    m, e = (2 * a).expm1(), (-c).exp()
    assert close(m / (m + 2), a.tanh())
    r = (-2 * a.abs()).exp()
    assert close((1 - r) / (1 + r), a.tanh().abs())
    assert close(4 * r / (1 + r) ** 2, 4 * (m + 1) / (m + 2) ** 2)
    assert close(g * 4 * (m + 1) / (m + 2) ** 2 / (1 + e), da)
    assert close(g * m / (m + 2) * e / (1 + e) ** 2, dc)
    assert close(block_plain.gate_backward(g, h), dh)


@formula("8.7")
def test_residual_skip_and_its_gradients():
    h, x, skips, weight, bias = real(2, 3, 4), real(2, 3, 4), real(2, 3, 4), real(6, 3), real(6)
    gx, gs = real(2, 3, 4), real(2, 3, 4)
    z = weight @ h + bias[:, None]
    out = torch.stack([(x + z[:, :3]) / 2**0.5, skips + z[:, 3:]])
    assert close(out, torch.stack(block.residual_skip(h, x, skips, weight, bias)))
    dz = torch.cat([gx / 2**0.5, gs], 1)
    dW = (dz @ h.mT).sum(0)
    ours = (weight.T @ dz, gx / 2**0.5, gs, dW, dz.sum((0, 2)))
    truth = gradients(
        lambda *p: torch.stack(block.residual_skip(*p)),
        torch.stack([gx, gs]),
        *(h, x, skips, weight, bias),
    )
    for mine, autograd in zip(ours, truth, strict=True):
        assert close(mine, autograd)


# 9: the counts.


class Counted:
    """A number that counts the operations done with it; a sign costs nothing."""

    done = 0

    def _count(self, _: object) -> Counted:
        Counted.done += 1
        return Counted()

    __add__ = __sub__ = __mul__ = __truediv__ = _count

    def __neg__(self) -> Counted:
        return self


def counted(work: Callable[..., object], count: int) -> int:
    """Operations that `work` does on so many numbers."""
    Counted.done = 0
    work(*(Counted() for _ in range(count)))
    return Counted.done


def test_operations_of_a_state_at_a_node_are_as_counted():
    def reciprocal(c, s2, minus_s4, wr, wi, one):
        cw, cv = c * wr, c * wi
        dr, di = cw * cw + (cv - s2) * (cv + s2), minus_s4 * cw
        inverse = one / (dr * dr + di * di)
        return dr * inverse, -di * inverse

    def product(a, b, p, q, ap, aq, bp, bq):
        return ap + a * p, aq + a * q, bp + b * p, bq + b * q

    def adjoint(sr, si, cr, ci, p, q, da, db):
        return da + si * p - sr * q, db - cr * p - ci * q

    def pole(a, b, sr, si, cr, ci, xr, xi):
        return xr + a * si - b * cr, xi - a * sr - b * ci

    def squared(p, q, xr, xi, cc, cs, two, first, second):
        rr, ri = p * p - q * q, two * p * q
        return first - cc * (rr * xr + ri * xi), second - cs * (rr * xi - ri * xr)

    assert counted(reciprocal, 6) == 14
    assert counted(product, 8) == counted(adjoint, 8) == counted(pole, 8) == 8
    assert counted(squared, 9) == 15
    # Two products a channel and two of Q; the general backward sums each three times.
    assert "`H*N2*F*(14 + 16*ch)`" in PAGE
    assert "`H*N2*F*(14 + 16*(ch + 1))`" in PAGE
    assert "`H*N2*F*(29 + 48*(ch + 1))`" in PAGE

    def quotients(zr, zi, wr, wi, one):
        x, up, down = zr - wr, zi - wi, zi + wi
        xx = x * x
        over_up, over_down = one / (xx + up * up), one / (xx + down * down)
        return x * over_up, -up * over_up, x * over_down, -down * over_down

    def cauchy_sum(vr, vi, ur, ui, dr, di, sr, si):
        return sr + vr * (ur + dr) - vi * (ui - di), si + vr * (ui + di) + vi * (ur - dr)

    def square(ur, ui, dr, di, two):
        return ur * ur - ui * ui, two * ur * ui, dr * dr - di * di, two * dr * di

    reciprocals, pair = counted(quotients, 5), counted(cauchy_sum, 8)
    assert f"`H*N2*F*{reciprocals + pair}`" in PAGE
    assert f"`H*N2*F*{reciprocals + 2 * pair + counted(square, 5)}`" in PAGE


def test_counts_of_the_page_are_their_formulas_at_its_sizes():
    (sizes,) = re.findall(r"evaluated at `([^`]+)`", PAGE)
    values = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", sizes)}
    assert values["n"] == values["N1"] * values["M2"]
    assert values["m"] == conv_plain.circle(values["L"])
    counts = re.findall(r"`([^`=]+)` = ([\d.]+e\d+)", PAGE)
    assert len(counts) > 20
    for text, printed in counts:
        value = eval(text, {"log2": math.log2, **values})
        assert f"{value:.2e}".replace("e+0", "e").replace("e+", "e") == printed, text


# The page itself.


def test_every_numbered_formula_of_the_page_is_evaluated():
    numbers = re.findall(r"\\tag\{([\d.]+)\}", PAGE)
    assert len(set(numbers)) == len(numbers)
    assert sorted(EVALUATED) == sorted(numbers)
    assert set(re.findall(r"\((\d+\.\d+)\)", PAGE)) <= set(numbers), "a reference to no formula"


def test_every_name_on_the_page_exists():
    names = re.findall(r"`([\w/]+\.\w+)(?:: (\w+))?`", PAGE)
    assert len(names) > 30
    for file, name in names:
        top = file.partition("/")[0]
        path = ROOT / "sssd_hpc" / file if top in ("ops", "s4") else ROOT / file
        assert path.is_file(), file
        if path.suffix == ".py" and name:
            tree = ast.walk(ast.parse(path.read_text()))
            kinds = (ast.FunctionDef, ast.ClassDef)
            assert name in {node.name for node in tree if isinstance(node, kinds)}, (file, name)
        elif name:
            assert re.search(rf"\b{name}\(", path.read_text()), (file, name)
