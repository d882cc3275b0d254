"""Validation of a run while it trains: averaged weights draw the records of fold 9 anew.

One record for each record of fold 9, with its labels and noise of its own that is the same each
time, by few steps; a classifier trained once on the real training folds looks at drawn and real
ones. Which checkpoint is best is decided by the Frechet distance of its features (`metrics.best`),
whose bias, large with few records, is the same for each; the ROC-AUC is that of TRTS, macro over
labels. Thus fold 9 chooses a checkpoint, as it chooses thresholds, and fold 10 stays unseen.
Nothing here draws from the random state that training knows.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sssd_hpc import __version__, files
from sssd_hpc import config as configs
from sssd_hpc.config import Config, TrainConfig
from sssd_hpc.diffusion import NoiseSchedule
from sssd_hpc.diffusion.method import quick
from sssd_hpc.ecg.leads import LEADS
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.evaluate.classify import Classifier, Recipe, fit
from sssd_hpc.evaluate.features import frechet_distance
from sssd_hpc.evaluate.metrics import roc_auc
from sssd_hpc.evaluate.splits import FOLDS, split
from sssd_hpc.evaluate.xresnet1d import XResNet1d
from sssd_hpc.model import SSSDECG
from sssd_hpc.model.checkpoint import folder, read
from sssd_hpc.model.draw import draw_signals, ready
from sssd_hpc.train.build import model_arguments, model_leads, schedule_arguments
from sssd_hpc.train.engine import matmul_precision
from sssd_hpc.train.ranks import Group

_log = logging.getLogger(__name__)

T = TypeVar("T")

RECIPE = Recipe()
SEED = 0
"""Of the classifier and of the records' noise: the same in every run, so that runs compare."""
BATCH = {"cpu": 16, "cuda": 64}
"""Records drawn at once; part of what decides the last bits of a record."""
CHUNK = 64
"""Real records looked at between meetings."""
LEAST = 2
"""Records that a covariance needs."""
EVERY_S = 1.0
"""Seconds between meetings of the ranks."""
FACTS = "classifier"


def due(train: TrainConfig, samples: int) -> bool:
    """Tell whether a validation belongs to this count: a multiple was reached, or the end."""
    every = train.validate_every
    if not every or samples < 1:
        return False
    before = max(samples - train.batch_size, 0)
    return samples // every > before // every or samples == train.samples


class Watch:
    """Keeps the ranks together while each works for as long as it takes.

    They meet once a second: none is silent for as long as the others allow, and a signal to one
    ends the work of all.

    Args:
        group: the processes of the run.
        device: where they add up.
        stop: tells whether a signal came to this process.
        stopped: returns what to raise on all ranks once a signal came to any.
        beat: called at each meeting with what this rank is doing.
    """

    def __init__(
        self,
        group: Group,
        device: torch.device,
        stop: Callable[[], bool],
        stopped: Callable[[], Exception],
        beat: Callable[[str], None],
    ) -> None:
        self._group, self._device, self._stop = group, device, stop
        self._stopped, self._beat = stopped, beat
        self._met = -EVERY_S

    def tick(self, doing: str) -> None:
        """Meet if it is time to; long work calls this every few seconds at least."""
        if time.monotonic() - self._met >= EVERY_S:
            self._meet(doing, busy=True)

    def everywhere(self, work: Callable[[], T]) -> list[T]:
        """Let every rank work; return all results, small objects, to every rank.

        Raises:
            UserError, OSError: a rank's, on every rank.
        """

        def together() -> T:
            try:
                result = work()
            except (UserError, OSError):
                self._wait()
                raise
            self._wait()
            return result

        return self._group.everywhere(together)

    def _wait(self) -> None:
        """Meet the others until none of them works."""
        while self._meet("", busy=False):
            pass

    def _meet(self, doing: str, *, busy: bool) -> bool:
        """Tell the others whether this rank works; return whether any does."""
        self._beat(doing)
        working, signals = self._group.total([busy, self._stop()], self._device)
        self._met = time.monotonic()
        if signals:
            raise self._stopped()
        return working > 0


class Drawn(NamedTuple):
    """What the classifier makes of a batch of drawn records."""

    features: NDArray[np.float64]
    scores: NDArray[np.float64]


class Validator:
    """Scores checkpoints of one run on fold 9; see the head of this file.

    Raises:
        UserError: fold 9 trains the network, or holds too few records.
    """

    def __init__(self, config: Config, store: Store, run: Path, group: Group) -> None:
        self._config, self._store, self._run, self._group = config, store, run, group
        every = f"train.validate_every is {config.train.validate_every}"
        self._real = split(store, store.label_names, "validation")
        if set(FOLDS["validation"]) & set(configs.parse_folds(config.train.folds)):
            raise UserError(
                f"{every} but train.folds is {config.train.folds!r}: fold 9 cannot validate what "
                "it trains; leave it out of train.folds, or do not validate"
            )
        for part, least in (("training", LEAST), ("validation", LEAST)):
            found = len(split(store, store.label_names, part))
            if found < least:
                raise UserError(
                    f"{every} but {store.path} has {found} record(s) in the {part} folds, "
                    f"{least} are needed; prepare more records, or do not validate"
                )
        self._schedule = NoiseSchedule.linear(**schedule_arguments(config))
        self._method = quick(self._schedule, config.diffusion.distilled_steps)
        self._classifier: Classifier | None = None
        self._features: NDArray[np.float64] | None = None
        """Of the real records; rank 0 alone needs them."""

    def score(self, samples: int, watch: Watch, device: torch.device) -> dict[str, Any]:
        """Return what the checkpoint at `samples` samples, which is whole, is worth.

        frechet: distance of drawn from real records, None where a drawn one is not finite; roc_auc:
        of TRTS, macro over the labels that fold 9 has both kinds of; records; seconds; and, where
        a number lacks, the reason.

        Raises:
            UserError, OSError: the checkpoint, the classifier or the store cannot be read.
        """
        began = time.monotonic()
        with matmul_precision("fp32"):
            classifier = self._learned(watch, device)
            shares = watch.everywhere(lambda: self._draw(samples, classifier, watch, device))
        batches = {number: batch for of_rank in shares for number, batch in of_rank.items()}
        ordered = [batches[number] for number in sorted(batches)]
        return self._group.first(lambda: self._compare(ordered, began))

    def _compare(self, batches: Sequence[Drawn], began: float) -> dict[str, Any]:
        """Return the row of metrics.jsonl, from drawn batches in the order of records."""
        features = np.concatenate([batch.features for batch in batches])
        scores = np.concatenate([batch.scores for batch in batches])
        row: dict[str, Any] = {"frechet": None, "roc_auc": None, "records": len(features)}
        unusable = int((~np.isfinite(features).all(axis=1)).sum())
        if unusable:
            row["reason"] = f"{unusable} of {len(features)} drawn records are not finite"
        else:
            assert self._features is not None
            row["frechet"] = frechet_distance(features, self._features)
            areas = [
                roc_auc(labels, column)
                for labels, column in zip(self._real.labels.T, scores.T, strict=True)
                if 0 < labels.sum() < len(labels)
            ]
            row["roc_auc"] = float(np.mean(areas)) if areas else None
            if not areas:
                row["reason"] = "no label is both present and absent in fold 9"
        return {**row, "seconds": round(time.monotonic() - began, 1)}

    def _draw(
        self, samples: int, classifier: Classifier, watch: Watch, device: torch.device
    ) -> dict[int, Drawn]:
        """Draw this rank's batches of fold 9; return what the classifier makes of each."""
        if self._group.rank == 0 and self._features is None:
            self._features = self._look(classifier, watch)
        weights = read(folder(self._run, samples)).tensors
        config, length = self._config, self._store.length
        with torch.device("meta"):
            model = SSSDECG(**model_arguments(config, self._store))
        model.load_state_dict({**weights["model"], **weights["ema"]}, assign=True)
        sampler = ready(
            model,
            self._schedule,
            self._method,
            prediction=config.diffusion.prediction,
            leads=model_leads(config),
            length=length,
            scale_mv=config.diffusion.scale_mv,
            device=device,
        )
        ecg_id, labels, size = self._real.ecg_id, self._real.labels, BATCH[device.type]
        starts = range(0, len(ecg_id), size)
        mine = range(self._group.rank, len(starts), self._group.world_size)
        drawn = {}
        for number in mine:
            rows = slice(starts[number], starts[number] + size)
            doing = f"{starts[number]}/{len(ecg_id)} records"
            signals = draw_signals(
                sampler,
                ecg_id[rows],
                labels[rows],
                seed=SEED,
                batch_size=size,
                on_step=lambda _, doing=doing: watch.tick(doing),  # type: ignore[misc]
            )
            with np.errstate(over="ignore", invalid="ignore"):
                found = Drawn(classifier.features(signals), classifier.predict(signals))
            # Features are bounded: those of a diverged network's records may look like others.
            found.features[~np.isfinite(signals).all(axis=(1, 2))] = np.nan
            drawn[number] = found
        return drawn

    def _look(self, classifier: Classifier, watch: Watch) -> NDArray[np.float64]:
        """Return the features of the real records."""
        signals_mv, found = self._real.signals_mv(), []
        for begin in range(0, len(signals_mv), CHUNK):
            watch.tick(f"real {begin}/{len(signals_mv)} records")
            found.append(classifier.features(signals_mv[begin : begin + CHUNK]))
        return np.concatenate(found)

    def _learned(self, watch: Watch, device: torch.device) -> Classifier:
        """Return the classifier of this run: rank 0 trains it once, and it lies in the run."""
        if self._classifier is None:
            path = self._run / "validation" / "classifier.safetensors"
            training = split(self._store, self._store.label_names, "training")
            made_of = repr((training.digest, dataclasses.asdict(RECIPE), SEED, __version__))

            def learn() -> None:
                if self._group.rank or self._read(path, made_of):
                    return
                classifier = fit(
                    training.signals_mv(),
                    training.labels,
                    training.rate_hz,
                    recipe=RECIPE,
                    seed=SEED,
                    on_batch=lambda done, total: watch.tick(f"classifier {done}/{total}"),
                )
                _write(path, classifier, made_of)

            watch.everywhere(learn)
            # From the file on every rank, as a resumed run has it.
            self._group.everywhere(lambda: self._take(path, made_of, device))
        assert self._classifier is not None
        return self._classifier

    def _take(self, path: Path, made_of: str, device: torch.device) -> None:
        self._classifier = self._read(path, made_of)
        if self._classifier is None:
            raise UserError(f"{path} is gone or damaged; give the same command again")
        self._classifier.network.to(device)

    def _read(self, path: Path, made_of: str) -> Classifier | None:
        """Return the classifier of a file, None where there is none that is made of the same."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as stream:
                facts = json.loads((stream.metadata() or {})[FACTS])
                if facts.pop("made_of") != made_of:
                    return None
                state = {name: stream.get_tensor(name).clone() for name in stream.keys()}  # noqa: SIM118 - no dict
            with torch.device("meta"):
                network = XResNet1d(
                    num_leads=len(LEADS),
                    num_outputs=len(self._store.label_names),
                    num_blocks=RECIPE.num_blocks,
                    width=RECIPE.width,
                )
            network.load_state_dict(state, assign=True)
            return Classifier(network, **facts)
        except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s is damaged and made again: %s", path, " ".join(str(error).split()))
            return None


def _write(path: Path, classifier: Classifier, made_of: str) -> None:
    """Write a classifier, whole or not at all."""
    facts = {name: getattr(classifier, name) for name in ("mean_mv", "std_mv", "window")}
    tensors = {name: tensor.cpu() for name, tensor in classifier.network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_file(path) as temp:
        save_file(tensors, temp, metadata={FACTS: json.dumps({**facts, "made_of": made_of})})
