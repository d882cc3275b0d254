"""SSSD-ECG and SSSD-ECG-nle: predict the noise in an ECG from the step and the labels.

The network knows no schedule, no device and no rank. Signals are (batch, lead, L) throughout.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from sssd_hpc.errors import UserError
from sssd_hpc.model.embedding import LabelKind, StepEmbedding, embed_labels
from sssd_hpc.s4 import S4Layer
from sssd_hpc.s4.layer import KernelKind

# Larger means a mistaken or hostile config: HiPPO needs an N x N eigenproblem, and no tensor of an
# export bounds lmax.
MAX_D_STATE = 1024
MAX_LMAX = 1 << 20


class Block(nn.Module):
    """One residual block: step, convolution, S4, labels, S4, gate; returns residual and skip."""

    def __init__(self, channels: int, step_dim: int, label_dim: int, s4: dict[str, Any]) -> None:
        super().__init__()
        self.step = nn.Linear(step_dim, channels)
        self.conv = weight_norm(nn.Conv1d(channels, 2 * channels, 3, padding=1))
        self.s4_in = S4Layer(d_model=2 * channels, **s4)
        self.label = nn.Linear(label_dim, 2 * channels)
        self.s4_out = S4Layer(d_model=2 * channels, **s4)
        self.res = weight_norm(nn.Conv1d(channels, channels, 1))
        self.skip = weight_norm(nn.Conv1d(channels, channels, 1))

    def forward(
        self,
        x: Float[Tensor, "batch channel L"],
        step: Float[Tensor, "batch step"],
        label: Float[Tensor, "batch label"],
    ) -> tuple[Float[Tensor, "batch channel L"], Float[Tensor, "batch channel L"]]:
        """Return the block's output (x + residual) / sqrt(2) and its skip."""
        h = self.conv(x + self.step(step)[..., None])
        h = self.s4_in(h) + self.label(label)[..., None]
        filtered, gate = self.s4_out(h).chunk(2, dim=1)
        h = filtered.tanh() * gate.sigmoid()
        return (x + self.res(h)) * math.sqrt(0.5), self.skip(h)


class SSSDECG(nn.Module):
    """eps_hat = model(x_t, t, labels): the noise predictor of both public codes.

    Args:
        num_leads: leads of the signal; the attribute `leads` may name them.
        num_labels: labels, at least 1.
        num_blocks: residual blocks, two S4 layers each.
        channels: residual and skip channels; S4 layers have twice as many features.
        d_state: S4 state size N, even.
        lmax: longest signal in samples.
        label_embedding: "nle" (rows absent, present, unknown), "sum" (SSSD-ECG), or "frozen" (the
            public nle code); see `model.embedding`.
        label_dim: width of the label embedding.
        step_dims: widths of the step embedding: sinusoids (even), first and second linear layer.
        kernel: "half" for old public checkpoints, see `S4Layer`.
        stored_nodes: as in `S4Layer`.
        kernel_basis_mb: where the frozen kernel bases of all S4 layers together take at most this
            many MiB (2 num_blocks * 2 channels * d_state * lmax * 4 bytes) they are kept, and a
            training step generates no kernel; above it every step generates them. The papers' size
            (9.4 GB) lies above the default.

    Raises:
        UserError: a size that no model can have.

    Source: SSSD-ECG (arXiv:2301.08227), figure 1 and its public code.
    """

    def __init__(
        self,
        *,
        num_leads: int,
        num_labels: int,
        num_blocks: int,
        channels: int,
        d_state: int,
        lmax: int,
        label_embedding: LabelKind = "nle",
        label_dim: int = 128,
        step_dims: tuple[int, int, int] = (128, 512, 512),
        kernel: KernelKind = "conjugate",
        stored_nodes: bool = False,
        kernel_basis_mb: int = 1024,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "num_leads": num_leads,
            "num_labels": num_labels,
            "num_blocks": num_blocks,
            "channels": channels,
            "d_state": d_state,
            "lmax": lmax,
            "label_embedding": label_embedding,
            "label_dim": label_dim,
            "step_dims": tuple(step_dims),
            "kernel": kernel,
            "stored_nodes": stored_nodes,
        }
        """The constructor's arguments: what an export must hold to build the model again."""
        _check_sizes(self.config)
        self.leads: tuple[str, ...] | None = None
        """Names of the leads in order, where known."""

        basis_bytes = 2 * num_blocks * 2 * channels * d_state * lmax * 4
        s4 = {
            "d_state": d_state,
            "lmax": lmax,
            "kernel": kernel,
            "stored_nodes": stored_nodes,
            "frozen_basis": basis_bytes <= kernel_basis_mb << 20,
        }
        self.init_conv = weight_norm(nn.Conv1d(num_leads, channels, 1))
        self.step_embedding = StepEmbedding(step_dims)
        self.label_embedding = embed_labels(label_embedding, num_labels, label_dim)
        self.blocks = nn.ModuleList(
            Block(channels, step_dims[2], label_dim, s4) for _ in range(num_blocks)
        )
        self.skip_conv = weight_norm(nn.Conv1d(channels, channels, 1))
        self.head = nn.Conv1d(channels, num_leads, 1)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Predict the noise.

        The sums over blocks stay in the dtype of `x_t`, autocast or not; so does the result.

        Args:
            x_t: noised signals (batch, num_leads, L) in model units, L <= lmax.
            t: diffusion steps (batch,) int64, counted from 0.
            labels: (batch, num_labels) int64: 1 present, 0 absent, -1 unknown.

        Returns:
            eps_hat (batch, num_leads, L); a fresh network returns zeros.

        Raises:
            UserError: shapes or dtypes that do not fit, labels out of range (checked on the CPU
                only, where looking costs nothing), L over lmax.
        """
        self._check(x_t, t, labels)
        step = self.step_embedding(t)
        label = self.label_embedding(labels)
        x = relu(self.init_conv(x_t)).to(x_t.dtype)
        skips = torch.zeros_like(x)
        for block in self.blocks:
            x, skip = block(x, step, label)
            skips = skips + skip
        y = relu(self.skip_conv(skips * math.sqrt(1 / len(self.blocks))))
        eps_hat: Tensor = self.head(y).to(x_t.dtype)
        return eps_hat

    @property
    def has_unknown(self) -> bool:
        """Whether unknown labels (-1) have rows of their own, which guidance needs."""
        return self.label_embedding.has_unknown

    def for_sampling(self, length: int) -> SSSDECG:
        """Return a copy for signals of `length` samples whose steps generate nothing.

        The spectrum of every S4 kernel is computed once, weight norm is folded into the weights and
        no gradient is kept. The copy cannot be trained or saved; the original is untouched.

        Raises:
            UserError: `length` is over lmax, or this is such a copy.
        """
        model = copy.deepcopy(self).eval()
        for module in list(model.modules()):
            if isinstance(module, S4Layer):
                module.freeze(length)
            for name, child in module.named_children():
                if parametrize.is_parametrized(child, "weight"):
                    setattr(module, name, _folded(child))
        return model.requires_grad_(False)

    def _check(self, x_t: Tensor, t: Tensor, labels: Tensor) -> None:
        batch = x_t.shape[0] if x_t.dim() == 3 else -1
        num_leads, num_labels = self.config["num_leads"], self.config["num_labels"]
        if batch < 0 or x_t.shape[1] != num_leads or x_t.shape[2] < 1:
            raise UserError(
                f"x_t has shape {tuple(x_t.shape)}; the model wants (batch, {num_leads}, L)"
            )
        if t.shape != (batch,) or t.dtype != torch.int64:
            raise UserError(f"t is {t.dtype} {tuple(t.shape)}; it must be int64 ({batch},)")
        if labels.shape != (batch, num_labels) or labels.dtype != torch.int64:
            raise UserError(
                f"labels are {labels.dtype} {tuple(labels.shape)}; "
                f"they must be int64 ({batch}, {num_labels})"
            )
        if labels.device.type == "cpu" and bool(((labels < -1) | (labels > 1)).any()):
            raise UserError("labels must be 1 (present), 0 (absent) or -1 (unknown)")


def _folded(conv: nn.Module) -> nn.Conv1d:
    """Return a plain convolution with the weight that weight norm yields.

    torch's own remove_parametrizations would take the weight from the original, too: a deep copy
    shares the class that holds it.
    """
    assert isinstance(conv, nn.Conv1d)
    size, padding = conv.kernel_size[0], conv.padding[0]
    plain = nn.Conv1d(conv.in_channels, conv.out_channels, size, padding=padding, device="meta")
    plain.load_state_dict({"weight": conv.weight.detach(), "bias": conv.bias}, assign=True)
    return plain


def _check_sizes(config: dict[str, Any]) -> None:
    step_dims = config["step_dims"]
    counts = ("num_leads", "num_labels", "num_blocks", "channels", "lmax", "label_dim")
    for name in counts:
        if config[name] < 1:
            raise UserError(f"model.{name} is {config[name]}; it must be at least 1")
    if config["d_state"] % 2 or not 2 <= config["d_state"] <= MAX_D_STATE:
        raise UserError(
            f"model.d_state is {config['d_state']}; it must be even, from 2 to {MAX_D_STATE}"
        )
    if config["lmax"] > MAX_LMAX:
        raise UserError(f"model.lmax is {config['lmax']}; it must be at most {MAX_LMAX}")
    if len(step_dims) != 3 or min(step_dims) < 1 or step_dims[0] % 2:
        raise UserError(f"model.step_dims is {step_dims}; give three widths, the first even")
    for name, allowed in (
        ("label_embedding", ("nle", "sum", "frozen")),
        ("kernel", ("conjugate", "half")),
    ):
        if config[name] not in allowed:
            raise UserError(f"model.{name} is {config[name]!r}; use one of {', '.join(allowed)}")
