"""What a run is made of at one moment, to and from a checkpoint's plain tensors and numbers.

Each rank holds what the engine leaves it and writes the tensors that it owns; together they are the
whole, whoever reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sssd_hpc.errors import UserError
from sssd_hpc.model.checkpoint import Checkpoint
from sssd_hpc.train.ema import MovingAverage
from sssd_hpc.train.engine import Engine
from sssd_hpc.train.ranks import Group


@dataclass
class Tally:
    """Sums over the steps since the last line of metrics.jsonl."""

    steps: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    skipped: int = 0

    def add(self, loss: float, grad_norm: float) -> None:
        """Count one step."""
        self.steps += 1
        self.loss += loss
        self.grad_norm += grad_norm


def owners(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Return which rank writes each tensor: the largest first, each to who has least so far."""
    load, owner = [0] * world_size, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights into a model.

    Raises:
        UserError: they are not this model's.
    """
    try:
        model.load_state_dict(dict(checkpoint.tensors["model"]))
    except (RuntimeError, KeyError) as error:
        raise _foreign(checkpoint, error) from error


class TrainState:
    """The model and AdamW in the engine, the moving average and the counters of a run.

    Args:
        model: the model that the engine holds.
        buffers: names of the buffers that its state holds, besides the parameters.
        engine: where weights and moments are.
        group: the processes of the run.
        every: whether each rank averages a shard of every parameter (ZeRO 3), not all of its own.
    """

    def __init__(
        self, model: nn.Module, buffers: Iterable[str], engine: Engine, group: Group, *, every: bool
    ) -> None:
        self.engine, self.tally = engine, Tally()
        self.samples = 0
        self.bad = 0
        """Steps in a row that were skipped."""
        self.rate = 0.0
        """Learning rate of the last step."""
        self.norm = 0.0
        """Gradient norm of the last step that was taken."""
        self._names = [name for name, _ in model.named_parameters()]
        self._buffers = {name: model.get_buffer(name) for name in buffers}
        sizes = {name: engine.size(name) for name in self._names}
        sizes |= {name: buffer.numel() for name, buffer in self._buffers.items()}
        owner = owners(sizes, group.world_size)
        self._mine = {name for name, rank in owner.items() if rank == group.rank}
        averaged = [name for name in self._names if every or name in self._mine]
        self.average = MovingAverage({name: engine.local(name) for name in averaged})

    def capture(self, data: Mapping[str, Any]) -> Checkpoint:
        """Return this rank's part of a checkpoint; every rank must ask.

        `data` says what the run is trained on.
        """
        model: dict[str, Tensor] = {}
        optimizer: dict[str, Tensor] = {}
        average: dict[str, Tensor] = {}
        for name in self._names:
            weights = self.engine.parameter(name)
            moments = self.engine.moments(name)
            mine = name in self._mine
            if name in self.average.weights:
                averaged = self.engine.join(name, self.average.weights[name])
                if mine:
                    average[name] = _kept(averaged)
            if mine:
                model[name] = _kept(weights)
                optimizer |= {f"{key}/{name}": _kept(tensor) for key, tensor in moments.items()}
        model |= {n: _kept(buffer) for n, buffer in self._buffers.items() if n in self._mine}
        state = {"tally": asdict(self.tally), "bad": self.bad, "data": dict(data)}
        tensors = {"model": model, "optimizer": optimizer, "ema": average}
        return Checkpoint(samples=self.samples, tensors=tensors, state=state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take everything but the weights, which `load_weights` took, from a whole checkpoint.

        Then all that the engine holds is compared with the checkpoint, bit for bit.

        Raises:
            UserError: the checkpoint's tensors are not this model's.
        """
        try:
            moments: dict[str, dict[str, Tensor]] = {}
            for key, tensor in checkpoint.tensors["optimizer"].items():
                moment, _, name = key.partition("/")
                if moment != "step" and tensor.numel() != self.engine.size(name):
                    raise KeyError(f"{key} of shape {tuple(tensor.shape)}")
                moments.setdefault(name, {})[moment] = tensor
            for name, average in self.average.weights.items():
                whole = checkpoint.tensors["ema"][name]
                if whole.numel() != self.engine.size(name):
                    raise KeyError(f"{name} of shape {tuple(whole.shape)}")
                average.copy_(self.engine.split(name, whole.to(average.device)))
            self.tally = Tally(**checkpoint.state["tally"])
            self.bad = int(checkpoint.state.get("bad", 0))
        except (RuntimeError, KeyError, TypeError) as error:
            raise _foreign(checkpoint, error) from error
        if moments:
            self.engine.restore_moments(moments)
        self.samples = checkpoint.samples
        self._prove(checkpoint, moments)

    def _prove(self, checkpoint: Checkpoint, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Check that the engine holds what the checkpoint does: every rank compares all of it."""
        for name in self._names:
            pairs = {"weight": (self.engine.parameter(name), checkpoint.tensors["model"][name])}
            held = self.engine.moments(name)
            for key, tensor in moments.get(name, {}).items():
                pairs[key] = held[key], tensor
            for what, (ours, theirs) in pairs.items():
                if not torch.equal(ours.cpu(), theirs.reshape(ours.shape)):
                    raise UserError(
                        f"after loading the checkpoint at {checkpoint.samples} samples the {what} "
                        f"of {name} differs from it: this is a fault of the program, report it"
                    )


def _kept(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU that training does not write to."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _foreign(checkpoint: Checkpoint, error: Exception) -> UserError:
    return UserError(
        f"the checkpoint at {checkpoint.samples} samples is not of this model: "
        f"{' '.join(str(error).split())}"
    )
