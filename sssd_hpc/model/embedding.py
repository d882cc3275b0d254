"""Embeddings of the diffusion step and of the labels; they know no network.

Three label embeddings, one call: labels (batch, num_labels) int64 of 1 present, 0 absent and, where
the embedding has it, -1 unknown -> (batch, label_dim).
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu

from sssd_hpc.errors import UserError

LabelKind: TypeAlias = Literal["nle", "sum", "frozen"]


def sinusoids(
    t: Int[Tensor, " batch"], width: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "batch width"]:
    """Return sin and cos of t at width/2 frequencies from 1 down to 1e-4, rounded to float32.

    Source: DiffWave (arXiv:2009.09761), section 3.2, with base 1e4.
    """
    half = width // 2
    rate = math.log(1e4) / max(half - 1, 1)
    frequency = torch.exp(torch.arange(half, device=t.device) * -rate)
    angle = t[:, None] * frequency.to(dtype)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class StepEmbedding(nn.Module):
    """Sinusoids of the diffusion step through two linear layers with SiLU."""

    def __init__(self, step_dims: tuple[int, int, int]) -> None:
        super().__init__()
        self.width = step_dims[0]
        self.fc1 = nn.Linear(step_dims[0], step_dims[1])
        self.fc2 = nn.Linear(step_dims[1], step_dims[2])

    def forward(self, t: Int[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        """Embed the steps t, counted from 0."""
        waves = sinusoids(t, self.width, self.fc1.weight.dtype)
        return silu(self.fc2(silu(self.fc1(waves))))


class SumLabels(nn.Module):
    """The sum of the rows of present labels (SSSD-ECG); unknown adds nothing, as absent does.

    So no label known and no label present are one thing to it: it has no null for guidance.
    """

    has_unknown = False

    def __init__(self, num_labels: int, label_dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_labels, label_dim))

    def forward(self, labels: Int[Tensor, "batch label"]) -> Float[Tensor, "batch width"]:
        """Embed the labels."""
        return (labels == 1).to(self.table.dtype) @ self.table


class RowLabels(nn.Module):
    """One row picked per label, folded over the labels by a 1x1 convolution (SSSD-ECG-nle).

    "nle" is the paper's: learned rows for absent and present, and a third for unknown, which label
    dropout trains and guidance uses. "frozen" is the public code's: its present row never learns
    (padding index -1 means the last row) and begins at zero, and it has no unknown row.
    A single label has no fold.
    """

    def __init__(self, num_labels: int, label_dim: int, kind: Literal["nle", "frozen"]) -> None:
        super().__init__()
        self.has_unknown = kind == "nle"
        rows = torch.randn(num_labels, 3 if self.has_unknown else 2, label_dim)
        if not self.has_unknown:
            rows[:, 1] = 0.0
        # Rows absent, present, unknown: a label is its own index, -1 the last.
        self.table = nn.Parameter(rows)
        self.fold = nn.Conv1d(num_labels, 1, 1) if num_labels > 1 else None

    def forward(self, labels: Int[Tensor, "batch label"]) -> Float[Tensor, "batch width"]:
        """Embed the labels.

        Raises:
            UserError: an unknown label, and there is no row for it (on a GPU a device assertion).
        """
        table: Tensor = self.table
        if not self.has_unknown:
            _refuse_unknown(labels)
            table = torch.cat([table[:, :1], table[:, 1:].detach()], dim=1)
        rows = table[torch.arange(labels.shape[1], device=labels.device), labels]
        folded = rows if self.fold is None else self.fold(rows)
        return folded.squeeze(1)


def _refuse_unknown(labels: Tensor) -> None:
    message = (
        "labels hold -1 (unknown) but label_embedding 'frozen' has no unknown row; "
        "use 'nle', or turn label dropout and guidance off"
    )
    if labels.device.type == "cuda" or torch.compiler.is_compiling():
        # Asserted on the device: neither a CUDA graph nor a compiled one can wait for an answer.
        torch._assert_async((labels >= 0).all(), message)
    elif bool((labels < 0).any()):
        raise UserError(message)


def embed_labels(kind: LabelKind, num_labels: int, label_dim: int) -> SumLabels | RowLabels:
    """Build the label embedding that `kind` names."""
    if kind == "sum":
        return SumLabels(num_labels, label_dim)
    return RowLabels(num_labels, label_dim, kind)
