"""Train a classifier of ECG records and score records with it: arrays in, probabilities out.

The recipe is that of the PTB-XL benchmark (Strodthoff et al., arXiv 2004.13701, and its public
code): random 2.5 s crops in training, one standardisation fitted on the training records alone,
AdamW with a one-cycle schedule up to 1e-2, weight decay 1e-2, the last epoch's weights (no early
stopping, so nothing here chooses by validation or test records). A record's score is the mean
probability of windows as long as a crop, one every half window. That code offers mean and maximum
with maximum as default; the mean did better in cross-validation on real records.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sssd_hpc.errors import UserError
from sssd_hpc.evaluate.xresnet1d import XResNet1d
from sssd_hpc.progress import Progress

Signals = NDArray[np.floating[Any]]

FEATURE_BOUND = 3.0
"""What a feature may reach at most, in deviations of training records."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a classifier is trained."""

    epochs: int = 15
    """Passes over the training records; the benchmark takes 50 in batches of 128."""
    batch_size: int = 32
    """Small, so that a few hundred records still give enough steps."""
    learning_rate: float = 1e-2
    """Peak of the one-cycle schedule."""
    weight_decay: float = 1e-2
    crop_s: float = 2.5
    """Length of a training crop and of a prediction window in seconds."""
    num_blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64


@dataclass(frozen=True)
class Classifier:
    """A trained network with its standardisation: `predict` and `features` of records."""

    network: XResNet1d
    mean_mv: float
    std_mv: float
    window: int
    """Samples in a prediction window."""

    def standardise(self, signals_mv: Signals) -> Tensor:
        """Return float32 signals in units of the training records, on the network's device."""
        x = torch.from_numpy(np.array(signals_mv, dtype=np.float32))
        return ((x - self.mean_mv) / self.std_mv).to(next(self.network.parameters()).device)

    def predict(self, signals_mv: Signals, batch_size: int = 64) -> NDArray[np.float64]:
        """Return probabilities (n, num_labels) of signals (n, leads, L) in mV."""

        def probabilities(windows: Tensor) -> Tensor:
            logits: Tensor = self.network(windows)
            return logits.double().sigmoid()

        return self._over_windows(probabilities, signals_mv, batch_size, self.window // 2)

    def features(self, signals_mv: Signals, batch_size: int = 64) -> NDArray[np.float64]:
        """Return what the last layer reads, (n, 128), of signals (n, leads, L) in mV, bounded.

        The batch norm before that layer makes the training records' deviation about 1, yet a few
        records lie fifty deviations out, and one of them would rule every distance made of second
        or third moments. So a value f counts as b tanh(f / b), which leaves the small as they are.
        Windows do not overlap, unlike those of `predict`: half the time for many more records.
        """

        def penultimate(windows: Tensor) -> Tensor:
            return self.network.penultimate(windows).double()

        values = self._over_windows(penultimate, signals_mv, batch_size, self.window)
        return FEATURE_BOUND * np.tanh(values / FEATURE_BOUND)

    def _over_windows(
        self,
        score: Callable[[Tensor], Tensor],
        signals_mv: Signals,
        batch_size: int,
        stride: int,
    ) -> NDArray[np.float64]:
        """Return each record's mean over its windows of what `score` says of a window."""
        starts = window_starts(signals_mv.shape[-1], self.window, stride)
        self.network.eval()
        scores = []
        with torch.inference_mode():
            for begin in range(0, len(signals_mv), batch_size):
                x = self.standardise(signals_mv[begin : begin + batch_size])
                windows = torch.stack([x[..., s : s + self.window] for s in starts], dim=1)
                values = score(windows.flatten(0, 1)).unflatten(0, (len(x), len(starts)))
                scores.append(values.mean(dim=1).cpu())
        return torch.cat(scores).numpy()


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin: every `stride`, the last one flush with the record's end."""
    starts = list(range(0, length - window + 1, max(stride, 1)))
    if starts[-1] != length - window:
        starts.append(length - window)
    return starts


def fit(
    signals_mv: Signals,
    labels: NDArray[np.integer[Any]],
    rate_hz: int,
    *,
    recipe: Recipe,
    seed: int,
    title: str = "classifier",
    on_batch: Callable[[int, int], None] | None = None,
) -> Classifier:
    """Train a classifier on signals (n, leads, L) in mV and labels (n, num_labels) of 0 and 1.

    On a CPU the same arguments and thread count give the same classifier; the caller's random state
    is left alone. `on_batch(done, total)`, where given, is told of each batch instead of a progress
    bar; what it raises ends the training.

    Raises:
        UserError: fewer than two records, or signals that are not finite.
    """
    count, num_leads, length = signals_mv.shape
    if count < 2:
        raise UserError(f"a classifier needs at least 2 training records, {count} given")
    mean_mv, std_mv = _mean_and_std(signals_mv)
    if not np.isfinite(mean_mv + std_mv):
        raise UserError("training signals hold samples that are not finite; prepare the set again")
    window = min(round(recipe.crop_s * rate_hz), length)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = XResNet1d(
            num_leads=num_leads,
            num_outputs=labels.shape[1],
            num_blocks=recipe.num_blocks,
            width=recipe.width,
        )
        network.to("cuda" if torch.cuda.is_available() else "cpu")
        # A flat training set has no spread; it is left as it is.
        classifier = Classifier(network, mean_mv, std_mv or 1.0, window)
        _train(classifier, signals_mv, labels, recipe, np.random.default_rng(seed), title, on_batch)
    return classifier


def _mean_and_std(signals_mv: Signals) -> tuple[float, float]:
    """Return mean and standard deviation of all samples, in chunks: a copy in float64 is large."""
    total = squares = 0.0
    for begin in range(0, len(signals_mv), 256):
        chunk = signals_mv[begin : begin + 256].astype(np.float64)
        total += float(chunk.sum())
        squares += float(np.square(chunk).sum())
    mean = total / signals_mv.size
    return mean, float(np.sqrt(max(squares / signals_mv.size - mean**2, 0.0)))


def _train(
    classifier: Classifier,
    signals_mv: Signals,
    labels: NDArray[np.integer[Any]],
    recipe: Recipe,
    generator: np.random.Generator,
    title: str,
    on_batch: Callable[[int, int], None] | None,
) -> None:
    """Run the recipe's epochs; a crop begins anywhere in its record, anew in each epoch."""
    network, window = classifier.network, classifier.window
    device = next(network.parameters()).device
    count, _, length = signals_mv.shape
    num_batches = max(count // recipe.batch_size, 1)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    # One step more than is taken: the schedule is also read after the last one.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.epochs * num_batches + 1
    )
    criterion = nn.BCEWithLogitsLoss()
    network.train()
    batches = itertools.count(1)
    bar = Progress(title, total=recipe.epochs, unit="epochs") if on_batch is None else None
    with bar or contextlib.nullcontext():
        for _ in range(recipe.epochs):
            losses = []
            # Batches of nearly equal size: batch norm cannot take a last batch of one record.
            for rows in np.array_split(generator.permutation(count), num_batches):
                starts = generator.integers(0, length - window + 1, len(rows))
                crops = np.stack(
                    [signals_mv[i, :, s : s + window] for i, s in zip(rows, starts, strict=True)]
                )
                targets = torch.from_numpy(labels[rows].astype(np.float32)).to(device)
                loss = criterion(network(classifier.standardise(crops)), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
                if on_batch:
                    on_batch(next(batches), recipe.epochs * num_batches)
            if bar:
                bar.advance(1, loss=float(torch.stack(losses).mean()))
