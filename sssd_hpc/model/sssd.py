"""SSSD-ECG and SSSD-ECG-nle: predict the noise in an ECG from the step and the labels.

The network knows no schedule, no device and no rank. Signals are (batch, lead, L) throughout.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from sssd_hpc.errors import UserError
from sssd_hpc.model.embedding import LabelKind, StepEmbedding, embed_labels
from sssd_hpc.ops import gate, pointwise, residual_skip
from sssd_hpc.s4 import KernelBank, S4Layer
from sssd_hpc.s4.layer import KernelKind

# Larger means a mistaken or hostile config: HiPPO needs an N x N eigenproblem, and no tensor of an
# export bounds lmax.
MAX_D_STATE = 1024
MAX_LMAX = 1 << 20


class Block(nn.Module):
    """One residual block: step, convolution, S4, labels, S4, gate, residual and skip."""

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
        skips: Float[Tensor, "batch channel L"],
        step: Float[Tensor, "batch channel"],
        label: Float[Tensor, "batch feature"],
        kernel_in: Float[Tensor, "2 feature L"] | None = None,
        kernel_out: Float[Tensor, "2 feature L"] | None = None,
        *,
        last: bool = False,
    ) -> tuple[Float[Tensor, "batch channel L"], Float[Tensor, "batch channel L"]]:
        """Return the block's output (x + residual) / sqrt(2) and the sum of skips with its own.

        Args:
            x: output of the block before.
            skips: sum of the skips of all blocks before.
            step: `self.step` of the step embedding.
            label: `self.label` of the label embedding.
            kernel_in, kernel_out: the kernels of the S4 layers, or None to let them generate.
            last: nobody wants the output: return x in its place.
        """
        h = self.conv(x + step[..., None])
        h = self.s4_in(h, label, kernel_in)
        h = gate(self.s4_out(h, None, kernel_out))
        if last:
            return x, skips + pointwise(h, self.skip.weight[..., 0], self.skip.bias)
        weight = torch.cat([self.res.weight, self.skip.weight])[..., 0]
        bias = torch.cat([self.res.bias, self.skip.bias])
        return residual_skip(h, x, skips, weight, bias)


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

    Set the attribute `activation_checkpointing` to compute each block's inner activations again in
    backward instead of keeping them: about a third more time for a fraction of the memory.

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

        self.activation_checkpointing = False

        s4 = {"d_state": d_state, "lmax": lmax, "kernel": kernel, "stored_nodes": stored_nodes}
        self.init_conv = weight_norm(nn.Conv1d(num_leads, channels, 1))
        self.step_embedding = StepEmbedding(step_dims)
        self.label_embedding = embed_labels(label_embedding, num_labels, label_dim)
        self.blocks = nn.ModuleList(
            Block(channels, step_dims[2], label_dim, s4) for _ in range(num_blocks)
        )
        self.kernels = KernelBank([m for m in self.blocks.modules() if isinstance(m, S4Layer)])
        # Set by `for_sampling` alone: the step projections of every block, tabulated, and the label
        # projections of every block as one linear layer.
        self.step_table: Tensor | None
        self.register_buffer("step_table", None, persistent=False)
        self.label_projections: nn.Linear | None = None
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
                only, where looking costs nothing, and not under torch.compile), L over lmax.
        """
        self._check(x_t, t, labels)
        steps, projected = self._conditions(t, labels)
        kernels = self.kernels(x_t.shape[-1])
        x = relu(self.init_conv(x_t)).to(x_t.dtype)
        skips = torch.zeros_like(x)
        for i, block in enumerate(self.blocks):
            arguments = (x, skips, steps[i], projected[i], kernels[2 * i], kernels[2 * i + 1])
            last = i == len(self.blocks) - 1
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, skips = checkpoint(block, *arguments, last=last, use_reentrant=False)
            else:
                x, skips = block(*arguments, last=last)
        y = relu(self.skip_conv(skips * math.sqrt(1 / len(self.blocks))))
        eps_hat: Tensor = self.head(y).to(x_t.dtype)
        return eps_hat

    def _conditions(self, t: Tensor, labels: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return each block's projection of the step (batch, channel) and labels (batch, 2C)."""
        label, blocks = self.label_embedding(labels), cast("Sequence[Block]", self.blocks)
        steps: Sequence[Tensor]
        projected: Sequence[Tensor]
        if self.step_table is None:
            step = self.step_embedding(t)
            steps = [block.step(step) for block in blocks]
        else:
            steps = self.step_table[t].chunk(len(blocks), dim=1)
        if self.label_projections is None:
            projected = [block.label(label) for block in blocks]
        else:
            projected = self.label_projections(label).chunk(len(blocks), dim=1)
        return steps, projected

    @property
    def has_unknown(self) -> bool:
        """Whether unknown labels (-1) have rows of their own, which guidance needs."""
        return self.label_embedding.has_unknown

    def for_sampling(self, length: int, num_steps: int = 0) -> SSSDECG:
        """Return a copy for signals of `length` samples whose steps generate nothing.

        The spectrum of every S4 kernel is computed once, weight norm is folded into the weights,
        the labels are projected for all blocks at once and, given `num_steps`, the step projections
        are looked up. No gradient is kept. The copy cannot be trained or saved; the original is
        untouched.

        Args:
            length: samples of the signals to come.
            num_steps: steps t of 0..num_steps-1 to tabulate; 0 tabulates none.

        Raises:
            UserError: `length` is over lmax, or this is such a copy.
        """
        model = copy.deepcopy(self).eval().requires_grad_(False)
        model.activation_checkpointing = False
        for module in list(model.modules()):
            if isinstance(module, S4Layer):
                module.freeze(length)
            for name, child in module.named_children():
                if parametrize.is_parametrized(child, "weight"):
                    setattr(module, name, _folded(child))
        blocks = cast("Sequence[Block]", model.blocks)
        model.label_projections = _stacked([block.label for block in blocks])
        if num_steps:
            step = model.step_embedding(torch.arange(num_steps, device=model.head.weight.device))
            model.step_table = torch.cat([block.step(step) for block in blocks], dim=1)
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
        look = labels.device.type == "cpu" and not torch.compiler.is_compiling()
        if look and bool(((labels < -1) | (labels > 1)).any()):
            raise UserError("labels must be 1 (present), 0 (absent) or -1 (unknown)")


def _stacked(layers: Sequence[nn.Module]) -> nn.Linear:
    """Return the linear layers of one input as one, their outputs side by side."""
    weight = torch.cat([layer.get_parameter("weight") for layer in layers])
    bias = torch.cat([layer.get_parameter("bias") for layer in layers])
    stacked = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    stacked.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return stacked


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
