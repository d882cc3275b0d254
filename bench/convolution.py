"""Suite `convolution`: the two-sided convolution with skip and GELU, forward and with gradients.

The baseline is torch.fft's composite as the public codes write it (pad, two transforms, product,
inverse, slice, skip, GELU) under autograd. Kernels come ready; "kept" is our convolution where
their spectrum is kept, too, as sampling has it. Errors are taken on a few features against the sum
over pairs of samples in float64.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import textbook
from bench.cases import BOUNDS, Candidate, Comparison, Outcome
from bench.ceilings import matmul_precision
from bench.kernels import differentiated, usable_backends
from sssd_hpc.ops import Spectrum, bidirectional_conv, convolve, counts, prepare
from sssd_hpc.ops.fftconv import reference

H = 512
# Features and rows on which errors are taken.
PROBES, ROWS = 4, 2
# Forms of the Triton convolution that its backend does not take for a dtype, and the precision of
# float32 products: "high" is tf32.
CHALLENGERS = (
    ("toeplitz", torch.float32, "highest"),
    ("toeplitz", torch.float32, "high"),
    ("toeplitz", torch.bfloat16, "highest"),
    ("butterfly", torch.bfloat16, "highest"),
)
ROOM = "sssd_hpc.ops.fftconv"


def comparisons(device: str, quick: bool) -> Iterator[Comparison]:
    """Yield the sweep over batch and length in float32, and other dtypes at the model's length."""
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    if quick:
        batches, lengths, features = (1, 3), (64,), 8
    else:
        batches = (8, 64, 1, 256) if device == "cuda" else (4, 1, 16)
        lengths, features = (1000, 250, 2048), H
    for L in lengths:
        for B in batches:
            yield from _one_shape(device, B, features, L, torch.float32)
    narrow = torch.bfloat16 if device == "cuda" else torch.float64
    for B in batches if device == "cuda" else batches[:1]:
        yield from _one_shape(device, B, features, lengths[0], narrow)


def _one_shape(device: str, B: int, H: int, L: int, dtype: torch.dtype) -> Iterator[Comparison]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    decay = torch.linspace(0, -5, L, device=device).exp()
    given = {
        "u": torch.randn(B, H, L, device=device).to(dtype),
        "k": (torch.randn(2, H, L, device=device) * decay).to(wide),
        "D": torch.randn(H, device=device).to(wide),
    }
    cotangent = torch.randn(B, H, L, device=device).to(dtype)
    name = str(dtype).removeprefix("torch.")
    features = slice(None, None, max(H // PROBES, 1))
    double = {
        key: value.double()
        for key, value in (
            ("u", given["u"][:, features]),
            ("k", given["k"][:, features]),
            ("D", given["D"][features]),
        )
    }

    def pick(outcome: Outcome) -> Outcome:
        y, *rest = outcome
        if not rest:
            return (y[:ROWS, features],)
        du, dk, dD = rest
        return y[:ROWS, features], du[:ROWS, features], dk[:, features], dD[features]

    def truth(wanted: tuple[str, ...]) -> Outcome:
        whole = differentiated(
            functools.partial(reference.run, activation="gelu"),
            double,
            wanted,
            cotangent[:, features].double(),
        )
        y, *rest = whole
        return (y[:ROWS],) if not rest else (y[:ROWS], rest[0][:ROWS], *rest[1:])

    for op, wanted in (("convolution", ()), ("convolution with gradients", ("u", "k", "D"))):
        once = len(wanted) == 0
        fft = counts.composite(B, H, L)
        baseline = fft if once else fft + fft.times(2)
        yield Comparison(
            op,
            {"B": B, "H": H, "L": L},
            name,
            baseline,
            functools.partial(truth, wanted),
            [
                Candidate(
                    way.name,
                    functools.partial(_at_setting, way, given, wanted, cotangent),
                    None if way.baseline else BOUNDS["convolution"][way.precision or name],
                    None if way.baseline else _cost(way, dtype, B, H, L, not once),
                    way.precision,
                )
                for way in _ways(device, given, dtype, once)
            ],
            pick,
        )


class _Way(NamedTuple):
    """One way to convolve: `run` takes u, k and D."""

    name: str
    run: Callable[..., Tensor]
    baseline: bool = False
    setting: str = "highest"

    @property
    def precision(self) -> str:
        return "tf32" if self.setting == "high" else ""


def _ways(device: str, given: dict[str, Tensor], dtype: torch.dtype, once: bool) -> Iterator[_Way]:
    def plain(u: Tensor, k: Tensor, D: Tensor) -> Tensor:
        return textbook.convolution(u.to(k.dtype), k, D).to(u.dtype)

    yield _Way("torch.fft", plain, baseline=True)
    # Compiled for the shapes of training alone: each takes many seconds.
    if device == "cuda" and given["u"].shape[0] in (8, 64) and given["u"].shape[2] == 1000:
        yield _Way("torch.compile", torch.compile(plain, dynamic=False), baseline=True)
    for backend in usable_backends("fftconv", device, dtype):
        yield _Way(backend, functools.partial(bidirectional_conv, backend=backend))
        if once:
            spectrum = prepare(given["k"], given["D"], backend)
            yield _Way(f"{backend}, kept", functools.partial(_kept, spectrum))
    if device == "cuda" and "triton" in usable_backends("fftconv", device, dtype):
        for name, taken, setting in CHALLENGERS:
            if dtype == taken:
                way = _Way(name, _raw(importlib.import_module(f"{ROOM}.{name}")), setting=setting)
                yield way._replace(name=f"{name} {way.precision}".strip())


def _at_setting(
    way: _Way, given: dict[str, Tensor], wanted: tuple[str, ...], cotangent: Tensor
) -> Outcome:
    with matmul_precision(way.setting):
        return differentiated(way.run, given, wanted, cotangent)


def _kept(spectrum: Spectrum, u: Tensor, k: Tensor, D: Tensor) -> Tensor:
    return convolve(u, spectrum)


def _raw(module: Any) -> Callable[..., Tensor]:
    """Wrap a form of the Triton backend that no name of the op selects; it shares its spectrum."""
    shared = importlib.import_module(f"{ROOM}.triton")
    ends = module if hasattr(module, "prepare") else shared

    class Convolution(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, u: Tensor, k: Tensor, D: Tensor) -> Tensor:
            K = ends.prepare(k, D)
            y, pre = module.forward(u, K, "gelu", ctx.needs_input_grad[0])
            ctx.save_for_backward(u, K, pre)
            return y  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            u, K, pre = ctx.saved_tensors
            du, dK = module.backward(gradients[0].contiguous(), u, K, pre, "gelu")
            return du, *ends.prepare_backward(dK, u.shape[1], u.shape[2])

    return lambda u, k, D: Convolution.apply(u, k, D)


def _cost(way: _Way, dtype: torch.dtype, B: int, H: int, L: int, both: bool) -> counts.Cost:
    e = dtype.itemsize
    if way.name.startswith("torch"):
        once = counts.composite(B, H, L)
        backward = once.times(2)
    elif way.name.startswith("toeplitz"):
        once = counts.direct(B, H, L, e)
        backward = once.times(2)
    elif way.name.startswith("triton") and dtype == torch.bfloat16:
        once, backward = counts.monarch(B, H, L, e), counts.monarch_backward(B, H, L, e)
    else:
        once, backward = counts.one_pass(B, H, L, e), counts.one_pass_backward(B, H, L, e)
    return once + backward if both else once
