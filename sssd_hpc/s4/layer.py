"""The bidirectional S4 layer on (batch, H, L): convolution, GELU, linear, skip, LayerNorm over H.

Only C of the state space is trained, as in both public codes: log_dt, w, P, Q and B are buffers.
It refuses inputs longer than `lmax` (a kernel that doubled itself would change the checkpoint) and
kernels in half precision. Complex quantities are stored as real planes (..., 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sssd_hpc.errors import UserError
from sssd_hpc.ops import (
    FrozenNplr,
    Spectrum,
    bidirectional_conv,
    convolve,
    freeze,
    frozen_kernel,
    nplr_kernel,
    pointwise,
    prepare,
    residual_norm,
)
from sssd_hpc.ops.nplr import reference
from sssd_hpc.s4 import hippo

KernelKind: TypeAlias = Literal["conjugate", "half"]

DT_MIN, DT_MAX = 1e-3, 1e-1


class S4Layer(nn.Module):
    """Compute LayerNorm_H(x + W GELU(k * x + D x) + b), k from C by the DPLR generating function.

    Since only C trains, a step's kernel takes the frozen path of `ops.nplr`: its constants follow
    the buffers when they move or load, and are never saved.

    Args:
        d_model: features H.
        d_state: state size N, even; N/2 states are stored.
        lmax: length that C is corrected for, in samples; shorter inputs use the kernel's head.
        kernel: "half" leaves out the conjugate states, as public checkpoints trained without the
            CUDA extension did; for those only.
        stored_nodes: keep the rounded nodes of a public checkpoint and the textbook formula.

    Source: S4 (arXiv:2111.00396); SSSD-ECG (arXiv:2301.08227).
    """

    def __init__(
        self,
        *,
        d_model: int,
        d_state: int,
        lmax: int,
        kernel: KernelKind = "conjugate",
        stored_nodes: bool = False,
    ) -> None:
        super().__init__()
        self.lmax = lmax
        self.single_states = kernel == "half"
        self._moves = 0
        self._constants: FrozenNplr | None = None
        self._revision = (0, 0)
        nplr = hippo.nplr(d_state)

        def every_feature(vector: Any) -> Tensor:
            planes = torch.view_as_real(torch.tensor(vector)).float()
            return planes.expand(d_model, -1, -1).clone()

        self.w: Tensor
        self.P: Tensor
        self.Q: Tensor
        self.B: Tensor
        self.log_dt: Tensor
        uniform = torch.rand(d_model)
        log_dt = math.log(DT_MIN) + uniform * (math.log(DT_MAX) - math.log(DT_MIN))
        self.register_buffer("log_dt", log_dt)
        self.register_buffer("w", every_feature(nplr.w))
        self.register_buffer("P", every_feature(nplr.P))
        self.register_buffer("Q", every_feature(nplr.P.conj()))
        self.register_buffer("B", every_feature(nplr.B))
        self.omega: Tensor | None
        self.z: Tensor | None
        nodes = torch.zeros(lmax // 2 + 1, 2) if stored_nodes else None
        self.register_buffer("omega", nodes)
        self.register_buffer("z", nodes if nodes is None else nodes.clone())
        # Set by `freeze` alone: the constant spectrum that replaces C and the buffers.
        self.spectrum: Tensor | None
        self.register_buffer("spectrum", None, persistent=False)
        self.spectrum_backend = ""

        C = torch.randn(2, d_model, d_state // 2, dtype=torch.complex64)
        C = hippo.correct_length(C, log_dt, lmax)
        self.C = nn.Parameter(torch.view_as_real(C).float())
        self.D = nn.Parameter(torch.randn(d_model))
        self.output = nn.Conv1d(d_model, d_model, 1)
        self.norm = nn.LayerNorm(d_model)

    def forward(
        self,
        x: Float[Tensor, "batch H L"],
        shift: Float[Tensor, "batch H"] | None = None,
        kernel: Float[Tensor, "2 H L"] | None = None,
    ) -> Float[Tensor, "batch H L"]:
        """Apply the layer.

        Args:
            x: input.
            shift: what is added to the output of every sample, or None.
            kernel: what `self.kernel(L)` would return, where somebody generated it already.

        Raises:
            UserError: L is over `lmax`, or not the length the layer was frozen for.
        """
        assert self.output.bias is not None
        y = pointwise(self.mix(x, kernel), self.output.weight[..., 0], self.output.bias)
        return residual_norm(x, y, self.norm.weight, self.norm.bias, shift, self.norm.eps)

    def mix(
        self, x: Float[Tensor, "batch H L"], kernel: Float[Tensor, "2 H L"] | None = None
    ) -> Float[Tensor, "batch H L"]:
        """Return GELU(k * x + D x): the part that mixes along time."""
        L = x.shape[-1]
        if self.spectrum is None:
            kernel = self.kernel(L) if kernel is None else kernel
            return bidirectional_conv(x, kernel, self.D)
        if self.lmax != L:
            raise UserError(
                f"this copy of the model was made for_sampling({self.lmax}) but the input has "
                f"{L} samples; make one for {L}"
            )
        return convolve(x, Spectrum(self.spectrum, self.D.shape[0], L, self.spectrum_backend))

    @property
    def trains_c_alone(self) -> bool:
        """Whether kernels take the frozen path: all but those of old public checkpoints."""
        return self.omega is None and not self.single_states

    @property
    def revision(self) -> tuple[int, int]:
        """Counts how often the buffers moved or were loaded, and how often they were written to.

        What was made of them is stale once either differs. torch.compile cannot read the second
        count, which is 0 there.
        """
        if torch.compiler.is_compiling():
            return self._moves, 0
        buffers = (self.w, self.P, self.Q, self.B, self.log_dt)
        return self._moves, sum(b._version for b in buffers if not b.is_inference())

    def kernel(self, length: int) -> Float[Tensor, "2 H length"]:
        """Return the forward and backward kernels, cut to `length` samples.

        Raises:
            UserError: `length` is over `lmax`, or the layer was cast to half precision.
        """
        self.check(length)
        if not self.trains_c_alone:
            return self._generate(torch.view_as_complex(self.C))[..., :length]
        if self._constants is None or is_stale(self._revision, self.revision):
            self._constants, self._revision = self.constants(), self.revision
        return frozen_kernel(self.C, self._constants)[..., :length]

    def check(self, length: int) -> None:
        """Check that kernels of `length` samples can be generated.

        Raises:
            UserError: see `kernel`.
        """
        if length > self.lmax:
            raise UserError(
                f"model.lmax (the S4 kernel) is {self.lmax} but the input has {length} samples; "
                f"set model.lmax >= {length}"
            )
        if self.C.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"the S4 kernel's parameters are {self.C.dtype}; keep the model in float32 and "
                "use autocast for the rest"
            )

    # Not inference tensors, wherever they are first asked for: training saves them for backward.
    @torch.inference_mode(False)
    def constants(self) -> FrozenNplr:
        """Return what `frozen_kernel` needs besides C."""
        return freeze(self.w, self.P, self.Q, self.B, self.log_dt, self.lmax, self.C.dtype)

    @torch.no_grad()
    def freeze(self, length: int) -> None:
        """Keep the kernel's spectrum for inputs of `length` samples, drop what generates it.

        The kernel is generated in float64: it is made once.

        Raises:
            UserError: `length` is over `lmax`, or the layer is frozen already.
        """
        if self.spectrum is not None:
            raise UserError(
                f"this copy of the model was made for_sampling({self.lmax}) and generates no other "
                "kernel; call for_sampling on the model itself"
            )
        self.check(length)
        C = torch.view_as_complex(self.C)
        kernel = self._generate(C.to(torch.complex128) if self.omega is None else C)
        kernel = kernel[..., :length].to(self.D.dtype)
        self.spectrum, _, _, self.spectrum_backend = prepare(kernel, self.D)
        self.lmax = length
        self._constants = self.C = self.omega = self.z = None  # type: ignore[assignment]
        self.log_dt = self.w = self.P = self.Q = self.B = None  # type: ignore[assignment]

    def _generate(self, C: Tensor) -> Tensor:
        """Generate the kernels of C (channels, H, N2) over the full length by the general op."""
        planes = (self.w, self.P, self.Q, self.B)
        w, P, Q, B = (torch.view_as_complex(plane).to(C.dtype) for plane in planes)
        log_dt = self.log_dt.to(C.real.dtype)
        if self.omega is None or self.z is None:
            return nplr_kernel(w, P, Q, B, C, log_dt, self.lmax, half=self.single_states)
        nodes = (torch.view_as_complex(self.omega), torch.view_as_complex(self.z))
        with torch.autocast(C.device.type, enabled=False):
            return reference.run(w, P, Q, B, C, log_dt, self.lmax, self.single_states, nodes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> S4Layer:
        self._forget()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self._forget()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _forget(self) -> None:
        self._constants = None
        self._moves += 1


def is_stale(kept: tuple[int, int], now: tuple[int, int]) -> bool:
    """Whether a `revision` that something was made at is no longer that of its layer."""
    return kept[0] != now[0] or (kept[1] != now[1] and not torch.compiler.is_compiling())
