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
from sssd_hpc.ops import bidirectional_conv, nplr_kernel
from sssd_hpc.ops.fftconv.plain import convolve, spectrum
from sssd_hpc.ops.nplr import reference
from sssd_hpc.s4 import hippo

KernelKind: TypeAlias = Literal["conjugate", "half"]

DT_MIN, DT_MAX = 1e-3, 1e-1
# Features whose basis is built at once: bounds the memory of the float64 intermediates.
BASIS_ROWS = 16


class S4Layer(nn.Module):
    """Compute LayerNorm_H(x + W GELU(k * x + D x) + b), k from C by the DPLR generating function.

    Since only C trains, k is linear in its N real coefficients. With `frozen_basis` the N kernels
    of the unit coefficients are generated once, in float64, and a step's kernel is one small matrix
    product a feature. The basis takes H * N * lmax * 4 bytes, follows the buffers when they move or
    load, and is never saved. Without it every step generates its kernel.

    Args:
        d_model: features H.
        d_state: state size N, even; N/2 states are stored.
        lmax: length that C is corrected for, in samples; shorter inputs use the kernel's head.
        kernel: "half" leaves out the conjugate states, as public checkpoints trained without the
            CUDA extension did; for those only.
        stored_nodes: keep the rounded nodes of a public checkpoint and the textbook formula.
        frozen_basis: trade memory for kernel generation, as above.

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
        frozen_basis: bool = True,
    ) -> None:
        super().__init__()
        self.lmax = lmax
        self.single_states = kernel == "half"
        self.frozen_basis = frozen_basis
        self._basis: Tensor | None = None
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

        C = torch.randn(2, d_model, d_state // 2, dtype=torch.complex64)
        C = hippo.correct_length(C, log_dt, lmax)
        self.C = nn.Parameter(torch.view_as_real(C).float())
        self.D = nn.Parameter(torch.randn(d_model))
        self.output = nn.Conv1d(d_model, d_model, 1)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Float[Tensor, "batch H L"]) -> Float[Tensor, "batch H L"]:
        """Apply the layer.

        Raises:
            UserError: L is over `lmax`, or not the length the layer was frozen for.
        """
        x = x + self.output(self.mix(x))
        # On a CPU a transposed view beats mean and variance over dim 1, and a contiguous copy of
        # the result does not pay.
        y: Tensor = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return y

    def mix(self, x: Float[Tensor, "batch H L"]) -> Float[Tensor, "batch H L"]:
        """Return GELU(k * x + D x) in float32 or wider: the part that mixes along time."""
        L = x.shape[-1]
        if self.spectrum is None:
            return bidirectional_conv(x, self.kernel(L), self.D)
        if self.lmax != L:
            raise UserError(
                f"this copy of the model was made for_sampling({self.lmax}) but the input has "
                f"{L} samples; make one for {L}"
            )
        with torch.autocast(x.device.type, enabled=False):
            return convolve(x.to(self.D.dtype), self.spectrum, "gelu")

    def kernel(self, length: int) -> Float[Tensor, "2 H length"]:
        """Return the forward and backward kernels, cut to `length` samples.

        Raises:
            UserError: `length` is over `lmax`, or the layer was cast to half precision.
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
        with torch.autocast(self.C.device.type, enabled=False):
            if not self.frozen_basis:
                return self._generate(torch.view_as_complex(self.C), slice(None))[..., :length]
            if self._basis is None:
                self._basis = self._unit_kernels()
            coefficients = self.C.transpose(0, 1).flatten(2)
            return (coefficients @ self._basis[..., :length]).transpose(0, 1)

    @torch.no_grad()
    def freeze(self, length: int) -> None:
        """Keep the kernel's spectrum for inputs of `length` samples, drop what generates it.

        Raises:
            UserError: `length` is over `lmax`, or the layer is frozen already.
        """
        if self.spectrum is not None:
            raise UserError(
                f"this copy of the model was made for_sampling({self.lmax}) and generates no other "
                "kernel; call for_sampling on the model itself"
            )
        self.spectrum = spectrum(self.kernel(length), self.D)
        self.lmax = length
        self._basis = self.C = self.omega = self.z = None  # type: ignore[assignment]
        self.log_dt = self.w = self.P = self.Q = self.B = None  # type: ignore[assignment]

    # Not an inference tensor, wherever it is first asked for: training saves it for backward.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _unit_kernels(self) -> Float[Tensor, "H N lmax"]:
        """Generate the kernel of each real coefficient of C, in the order of C's last two axes."""
        H, N2 = self.w.shape[:2]
        eye = torch.eye(N2, dtype=torch.complex128, device=self.w.device)
        units = torch.stack([eye, 1j * eye], dim=1).flatten(0, 1)
        blocks = []
        for start in range(0, H, BASIS_ROWS):
            rows = slice(start, min(start + BASIS_ROWS, H))
            C = units[:, None].expand(-1, rows.stop - rows.start, -1)
            blocks.append(self._generate(C, rows).to(self.C.dtype).transpose(0, 1))
        return torch.cat(blocks)

    def _generate(self, C: Tensor, rows: slice) -> Tensor:
        """Generate the kernels of C (channels, rows, N2) over the full length."""
        planes = (self.w, self.P, self.Q, self.B)
        w, P, Q, B = (torch.view_as_complex(plane[rows]).to(C.dtype) for plane in planes)
        log_dt = self.log_dt[rows].to(C.real.dtype)
        if self.omega is None or self.z is None:
            return nplr_kernel(w, P, Q, B, C, log_dt, self.lmax, half=self.single_states)
        nodes = (torch.view_as_complex(self.omega), torch.view_as_complex(self.z))
        return reference.run(w, P, Q, B, C, log_dt, self.lmax, self.single_states, nodes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> S4Layer:
        self._basis = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self._basis = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
