"""The exponential moving average of the weights, its memory measured in samples.

Source: Karras et al., Elucidating the design space of diffusion models (arXiv 2206.00364), whose
training ramps the half-life up.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

RAMP_UP = 0.05


def ema_decay(*, samples: int, batch: int, half_life: float) -> float:
    """Return the weight of the old average in the step that ends at `samples` samples seen.

    The half-life is at most a twentieth of the samples seen, so that random initial weights are
    forgotten early.
    """
    return float(0.5 ** (batch / min(half_life, RAMP_UP * samples)))


class MovingAverage:
    """Averages of a model's parameters, by name; buffers are constants and are not averaged."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters()
        }

    def update(self, *, samples: int, batch: int, half_life: float) -> None:
        """Move the average towards the weights reached after `samples` samples."""
        decay = ema_decay(samples=samples, batch=batch, half_life=half_life)
        current = [parameter.detach() for parameter in self._model.parameters()]
        get_ema_multi_avg_fn(decay)(list(self.weights.values()), current, 0)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the averages from a checkpoint.

        Raises:
            KeyError: they are not this model's.
        """
        for name, average in self.weights.items():
            if weights[name].shape != average.shape:
                raise KeyError(f"{name} of shape {tuple(weights[name].shape)}")
            average.copy_(weights[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the model's state with averaged parameters."""
        return {**self._model.state_dict(), **self.weights}
