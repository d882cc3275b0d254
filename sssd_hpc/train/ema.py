"""The exponential moving average of the weights, its memory measured in samples.

Source: Karras et al., Elucidating the design space of diffusion models (arXiv 2206.00364), whose
training ramps the half-life up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

RAMP_UP = 0.05


def ema_decay(*, samples: int, batch: int, half_life: float) -> float:
    """Return the weight of the old average in the step that ends at `samples` samples seen.

    The half-life is at most a twentieth of the samples seen, so that random initial weights are
    forgotten early.
    """
    return float(0.5 ** (batch / min(half_life, RAMP_UP * samples)))


class MovingAverage:
    """Averages of some tensors that change in place, by name.

    Args:
        start: where the averages begin.
    """

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in start.items()}

    @torch.no_grad()
    def update(
        self, current: Callable[[str], Tensor], *, samples: int, batch: int, half_life: float
    ) -> None:
        """Move the averages towards `current(name)`, reached after `samples` samples."""
        if self.weights:
            decay = ema_decay(samples=samples, batch=batch, half_life=half_life)
            values = [current(name) for name in self.weights]
            get_ema_multi_avg_fn(decay)(list(self.weights.values()), values, 0)
