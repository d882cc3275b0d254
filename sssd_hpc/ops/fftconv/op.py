"""The public convolution op: checks at the door, spectra in float32 or float64.

Two registered ops carry it, so that a spectrum can be kept: `sssd_hpc::conv_spectrum` (kernels and
skip to a spectrum in the backend's own layout) and `sssd_hpc::convolve`. The backends' functions
are those of plain.py.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sssd_hpc.errors import UserError
from sssd_hpc.ops import backends
from sssd_hpc.ops.fftconv import reference

NARROW = (torch.bfloat16, torch.float16)


def bidirectional_conv(
    u: Tensor, k: Tensor, D: Tensor, activation: str | None = "gelu", backend: str = "auto"
) -> Tensor:
    """Convolve each feature with a forward and a backward kernel, add the skip D u, activate.

    y_i = sum_{j <= i} k0_{i-j} u_j + sum_{j > i} k1_{j-i-1} u_j + D u_i; the backward kernel begins
    one sample ahead, and its last entry never reaches the output.

    Args:
        u: input, real (batch, H, L); bfloat16 and float16 are read and written as such, the
            arithmetic is float32 or, by triton, the tensor cores'.
        k: forward and backward kernel, real (2, H, L).
        D: skip weight, real (H,).
        activation: "gelu" (exact, by erf) or None.
        backend: auto, reference, torch, cpp or triton.

    Returns:
        Real (batch, H, L): u's dtype where that is narrower than float32, otherwise float64 if any
        input is, else float32.

    Raises:
        UserError: shapes or devices that do not fit, complex input, unknown activation, unusable
            backend.
    """
    _check_input(u, activation)
    _check_kernels("bidirectional_conv", k, D, tuple(u.shape[1:]), u.device)
    wide = torch.float64 if torch.float64 in (u.dtype, k.dtype, D.dtype) else torch.float32
    u = u if u.dtype in NARROW and wide == torch.float32 else u.to(wide)
    name = resolve(backend, u.device.type, u.dtype, u.shape[-1])
    with torch.autocast(u.device.type, enabled=False):
        if name == "reference":
            return reference.run(u.to(wide), k.to(wide), D.to(wide), activation).to(u.dtype)
        K = _spectrum(k.to(wide), D.to(wide), name)
        return _run(u, K, activation, name)


class Spectrum(NamedTuple):
    """Kernels and skip made ready for one length, in the layout of one backend."""

    K: Tensor
    features: int
    length: int
    backend: str


@torch.no_grad()
def prepare(k: Tensor, D: Tensor, backend: str = "auto") -> Spectrum:
    """Return the spectrum of fixed kernels (2, H, L) and skip (H,), for `convolve`.

    Args:
        k, D: as in `bidirectional_conv`, both float32 or both float64; inputs to come may be
            narrower.
        backend: auto, torch, cpp or triton.

    Raises:
        UserError: shapes, dtypes or devices that do not fit, unusable backend.
    """
    _check_kernels("prepare", k, D, tuple(k.shape[1:]), k.device)
    if k.dtype != D.dtype or k.dtype not in backends.WIDE:
        raise UserError(
            f"prepare: k is {k.dtype} and D {D.dtype}; both must be torch.float32 or torch.float64"
        )
    _, features, length = k.shape
    name = resolve(backend, k.device.type, k.dtype, length)
    if name == "reference":
        raise UserError(
            f"prepare: backend 'reference' (named by the call or by {backends.VARIABLE}) keeps no "
            "spectrum; name another, or use bidirectional_conv"
        )
    return Spectrum(_spectrum(k, D, name), features, length, name)


def convolve(u: Tensor, spectrum: Spectrum, activation: str | None = "gelu") -> Tensor:
    """Convolve u (batch, H, L) with kernels made ready by `prepare`; else as `bidirectional_conv`.

    Raises:
        UserError: u has other features, another length or device than the spectrum.
    """
    _check_input(u, activation)
    K, features, length, backend = spectrum
    if u.shape[1:] != (features, length) or u.device != K.device:
        raise UserError(
            f"convolve: the spectrum is for {features} features of {length} samples on {K.device} "
            f"but u is {tuple(u.shape)} on {u.device}"
        )
    # What is narrower than the backend reads is widened here; the result is narrow all the same.
    dtype = u.dtype if u.dtype in NARROW and u.dtype in _dtypes(backend) else K.dtype
    with torch.autocast(u.device.type, enabled=False):
        y = _run(u.to(dtype), K, activation, backend)
        return y.to(u.dtype) if u.dtype in NARROW else y


def resolve(backend: str, device: str, dtype: torch.dtype, length: int) -> str:
    """Return the name of the backend for inputs of a dtype and length, as `backends.resolve` does.

    "auto" passes over a backend that does not reach `length`.
    """
    name: str = backends.resolve("fftconv", backend, device, dtype)
    if backend == "auto" and length > _longest(name):
        backend = backends.unless_wished("fftconv", "torch")
        name = backends.resolve("fftconv", backend, device, dtype)
    return name


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _longest(name: str) -> int:
    return getattr(backends.module("fftconv", name), "LONGEST", sys.maxsize)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _dtypes(name: str) -> tuple[torch.dtype, ...]:
    return getattr(backends.module("fftconv", name), "DTYPES", backends.WIDE)


def one_row(backend: str, device: str) -> Tensor:
    """Run the smallest convolution through a backend: one feature of two samples."""
    u, k, D = (torch.ones(*shape, device=device) for shape in ((1, 1, 2), (2, 1, 2), (1,)))
    if backend == "reference":
        return reference.run(u, k, D, "gelu")
    return _run(u, _spectrum(k, D, backend), "gelu", backend)


def _check_input(u: Tensor, activation: str | None) -> None:
    if activation not in ("gelu", None):
        raise UserError(f"bidirectional_conv: activation is {activation!r}; use 'gelu' or None")
    if u.dim() != 3 or 0 in u.shape[1:] or not u.is_floating_point():
        raise UserError(
            f"bidirectional_conv: u is {u.dtype} {tuple(u.shape)} and does not fit; it must be "
            "real (batch, H, L), H and L at least 1"
        )


def _check_kernels(
    function: str, k: Tensor, D: Tensor, shape: tuple[int, ...], device: torch.device
) -> None:
    """Refuse kernels and skip that do not fit signals of `shape` (H, L) on a device."""
    real = k.is_floating_point() and D.is_floating_point()
    if k.shape != (2, *shape) or 0 in shape or D.shape != shape[:1] or not real:
        raise UserError(
            f"{function}: k is {k.dtype} {tuple(k.shape)} and D {D.dtype} {tuple(D.shape)}, which "
            f"do not fit (H, L) = {shape}; they must be real (2, H, L) and (H,)"
        )
    if not device == k.device == D.device:
        raise UserError(
            f"{function}: k is on {k.device}, D on {D.device}, the signals on {device}; "
            "move them together"
        )


def _run(u: Tensor, K: Tensor, activation: str | None, backend: str) -> Tensor:
    keep = torch.is_grad_enabled() and (u.requires_grad or K.requires_grad)
    y: Tensor = _convolve(u, K, activation or "none", keep, backend)[0]
    return y


@torch.library.custom_op(
    "sssd_hpc::conv_spectrum",
    mutates_args=(),
    schema="(Tensor k, Tensor D, str backend) -> Tensor",
)
def _spectrum(k: Tensor, D: Tensor, backend: str) -> Tensor:
    K: Tensor = backends.module("fftconv", backend).prepare(k.contiguous(), D.contiguous())
    return K


@_spectrum.register_fake
def _(k: Tensor, D: Tensor, backend: str) -> Tensor:
    # The circle depends on the very length: a symbolic one is made concrete.
    shape = backends.module("fftconv", backend).spectrum_shape(int(k.shape[1]), int(k.shape[2]))
    return k.new_empty(shape)


@torch.library.custom_op(
    "sssd_hpc::conv_spectrum_backward",
    mutates_args=(),
    schema="(Tensor dK, int H, int L, str backend) -> (Tensor, Tensor)",
)
def _spectrum_backward(dK: Tensor, H: int, L: int, backend: str) -> tuple[Tensor, Tensor]:
    run = backends.module("fftconv", backend).prepare_backward
    dk, dD = run(dK.contiguous(), H, L)
    return dk, dD


@_spectrum_backward.register_fake
def _(dK: Tensor, H: int, L: int, backend: str) -> tuple[Tensor, Tensor]:
    return dK.new_empty(2, H, L), dK.new_empty(H)


@torch.library.custom_op(
    "sssd_hpc::convolve",
    mutates_args=(),
    schema="(Tensor u, Tensor K, str activation, bool keep, str backend) -> (Tensor, Tensor)",
)
def _convolve(
    u: Tensor, K: Tensor, activation: str, keep: bool, backend: str
) -> tuple[Tensor, Tensor]:
    if u.shape[0] == 0:
        return u.clone(), u.new_empty(u.shape if keep and activation == "gelu" else 0)
    run = backends.module("fftconv", backend).forward
    y, pre = run(u.contiguous(), K.contiguous(), activation, keep)
    return y, pre


@_convolve.register_fake
def _(u: Tensor, K: Tensor, activation: str, keep: bool, backend: str) -> tuple[Tensor, Tensor]:
    pre = u.new_empty(u.shape if keep and activation == "gelu" else 0)
    return u.new_empty(u.shape), pre


@torch.library.custom_op(
    "sssd_hpc::convolve_backward",
    mutates_args=(),
    schema=(
        "(Tensor dy, Tensor u, Tensor K, Tensor pre, str activation, str backend)"
        " -> (Tensor, Tensor)"
    ),
)
def _convolve_backward(
    dy: Tensor, u: Tensor, K: Tensor, pre: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    if u.shape[0] == 0:
        return u.clone(), torch.zeros_like(K)
    run = backends.module("fftconv", backend).backward
    tensors = (t.contiguous() for t in (dy, u, K, pre))
    du, dK = run(*tensors, activation)
    return du, dK


@_convolve_backward.register_fake
def _(
    dy: Tensor, u: Tensor, K: Tensor, pre: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), K.new_empty(K.shape)


def _save_spectrum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    k, _, ctx.backend = inputs
    _, ctx.features, ctx.length = k.shape


def _differentiate_spectrum(ctx: Any, dK: Tensor) -> tuple[Tensor | None, ...]:
    dk, dD = _spectrum_backward(dK, ctx.features, ctx.length, ctx.backend)
    return dk, dD, None


def _save_convolution(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    u, K, ctx.activation, _, ctx.backend = inputs
    ctx.save_for_backward(u, K, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate_convolution(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    du, dK = _convolve_backward(dy, *ctx.saved_tensors, ctx.activation, ctx.backend)
    return du, dK, None, None, None


_spectrum.register_autograd(_differentiate_spectrum, setup_context=_save_spectrum)
_convolve.register_autograd(_differentiate_convolution, setup_context=_save_convolution)
