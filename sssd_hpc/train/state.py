"""What a run is made of at one moment, to and from a checkpoint's plain tensors and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sssd_hpc.errors import UserError
from sssd_hpc.train.checkpoint import Checkpoint
from sssd_hpc.train.ema import MovingAverage

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Tally:
    """Sums over the steps since the last line of metrics.jsonl."""

    steps: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0

    def add(self, loss: float, grad_norm: float) -> None:
        """Count one step."""
        self.steps += 1
        self.loss += loss
        self.grad_norm += grad_norm


@dataclass
class TrainState:
    """The model, AdamW, the moving average and the counters of a run."""

    model: nn.Module
    optimizer: torch.optim.AdamW
    average: MovingAverage
    samples: int = 0
    tally: Tally = field(default_factory=Tally)

    def capture(self, data: Mapping[str, Any]) -> Checkpoint:
        """Return the state as a checkpoint; `data` says what the run is trained on."""
        optimizer = {
            f"{moment}/{name}": self.optimizer.state[parameter][moment]
            for name, parameter in self.model.named_parameters()
            if parameter in self.optimizer.state
            for moment in MOMENTS
        }
        return Checkpoint(
            samples=self.samples,
            tensors={
                "model": self.model.state_dict(),
                "optimizer": optimizer,
                "ema": self.average.weights,
            },
            state={"tally": asdict(self.tally), "data": dict(data)},
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take the state from a checkpoint, bit for bit.

        Raises:
            UserError: the checkpoint's tensors are not this model's.
        """
        try:
            self.model.load_state_dict(checkpoint.tensors["model"])
            self.average.load(dict(checkpoint.tensors["ema"]))
            self._restore_optimizer(checkpoint.tensors["optimizer"])
            self.tally = Tally(**checkpoint.state["tally"])
        except (RuntimeError, KeyError, TypeError) as error:
            raise UserError(
                f"the checkpoint at {checkpoint.samples} samples is not of this model: "
                f"{' '.join(str(error).split())}"
            ) from error
        self.samples = checkpoint.samples

    def _restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for key, tensor in tensors.items():
            moment, _, name = key.partition("/")
            parameter = parameters[name]
            if moment not in MOMENTS or (moment != "step" and tensor.shape != parameter.shape):
                raise KeyError(f"{key} of shape {tuple(tensor.shape)}")
            # AdamW keeps its step counter on the CPU.
            device = "cpu" if moment == "step" else parameter.device
            self.optimizer.state[parameter][moment] = tensor.to(device)
