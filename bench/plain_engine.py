"""The command line with training by plain torch, for GPU machines that have no DeepSpeed.

    python -m bench.plain_engine train --preset sssd_ecg --data store --run run ...

Loop, checkpoints and export are the real ones; only backward and the optimizer's step are not
DeepSpeed's. It is here for measurements and refuses nothing that the real engine would refuse.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor, nn

from bench.ceilings import matmul_precision
from sssd_hpc import cli
from sssd_hpc.config import TrainConfig
from sssd_hpc.errors import UserError
from sssd_hpc.train import loop
from sssd_hpc.train.engine import Engine, device_here
from sssd_hpc.train.ranks import Group


class Plain:
    """What `Engine` asks of a DeepSpeed engine at stage 0."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, train: TrainConfig, device: str
    ) -> None:
        self.module, self.basic_optimizer, self.train, self.device = (
            module,
            optimizer,
            train,
            device,
        )

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return the model's output, under autocast where the config asks for it."""
        enabled = self.train.precision == "bf16"
        with torch.autocast(self.device, torch.bfloat16, enabled=enabled):
            eps_hat: Tensor = self.module(x_t, t, labels)
        return eps_hat

    def is_gradient_accumulation_boundary(self) -> bool:
        """Say that every piece is a batch."""
        return True

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        loss.backward()

    def step(self) -> None:
        """Clip if configured, update the parameters, clear the gradients."""
        if self.train.grad_clip:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.train.grad_clip)
        self.basic_optimizer.step()
        self.basic_optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def open_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, train: TrainConfig, group: Group
) -> Iterator[Engine]:
    """Yield `model` and `optimizer` as an `Engine` of one process."""
    if group.world_size > 1 or train.zero_stage or train.accumulation_steps > 1:
        raise UserError("bench.plain_engine trains in one process, whole batches, without ZeRO")
    device = device_here()
    with matmul_precision("highest" if train.precision == "fp32" else "high"):
        yield Engine(Plain(model.to(device), optimizer, train, device.type), 0, device)


if __name__ == "__main__":
    with mock.patch.object(loop, "open_engine", open_engine):
        sys.exit(cli.main())
