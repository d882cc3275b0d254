"""Train a model on a store, or go on where a run stopped: the same call does both.

Progress is counted in samples seen. All that a step does is decided by the configuration, the store
and that count, so that a resumed run equals an uninterrupted one. What a run may be resumed with is
checked in `resume.py`.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sssd_hpc import config as configs
from sssd_hpc import files
from sssd_hpc.config import Config, TrainConfig
from sssd_hpc.diffusion import NoiseSchedule, epsilon_loss, velocity_loss
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import Interrupted, UserError
from sssd_hpc.model.export import save_export
from sssd_hpc.progress import Progress
from sssd_hpc.train import checkpoint as checkpoints
from sssd_hpc.train import metrics, resume
from sssd_hpc.train.build import build_model, model_arguments, model_leads, schedule_arguments
from sssd_hpc.train.data import batch_positions, drop_labels, step_generator
from sssd_hpc.train.describe import describe
from sssd_hpc.train.ema import MovingAverage
from sssd_hpc.train.engine import Engine, device_here, open_engine
from sssd_hpc.train.signals import StopFlag
from sssd_hpc.train.state import Tally, TrainState

__all__ = ["describe", "train"]

_log = logging.getLogger(__name__)

LOSSES = {"epsilon": epsilon_loss, "velocity": velocity_loss}


def train(config: Config, store: Store, run: Path) -> None:
    """Train until `config.train.samples` records were seen, from the newest checkpoint in `run`.

    Writes config.yaml, metrics.jsonl, checkpoints, latest and export/model.safetensors to `run`.

    Raises:
        UserError: the run was begun with other settings or data, its checkpoints are damaged, the
            loss is not finite, or the disk is full. The last good checkpoint is intact.
        Interrupted: SIGINT, SIGTERM or SIGUSR1 came; the step was finished and saved.
    """
    with resume.sole_owner(run), StopFlag() as stop:
        found = checkpoints.load_newest(run)
        resume.check(config, store, run, found)
        total = config.train.samples
        if found and found.samples >= total and resume.exported_samples(run) == found.samples:
            _log.info("%s: nothing to do, %d samples were seen", run, found.samples)
            return
        trainer = Trainer(config, store, run)
        files.atomic_write_text(run / "config.yaml", configs.dump(config))
        if found:
            trainer.state.restore(found)
        trainer.go_on(stop)
        if stop.name and trainer.state.samples < total:
            raise Interrupted(
                f"{stop.name} came after {trainer.state.samples} samples, saved in {run}; "
                "the same command goes on"
            )


def learning_rate(train: TrainConfig, samples: int) -> float:
    """Return the learning rate of the step that begins after `samples` samples.

    Linear warm-up from the first step, then constant, or a cosine that reaches 0 at the end.
    """
    warm = train.warmup_samples
    rate = train.learning_rate
    if samples < warm:
        rate *= min(1.0, (samples + train.batch_size) / warm)
    elif train.lr_schedule == "cosine":
        done = (samples - warm) / max(1, train.samples - warm)
        rate *= 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return rate


class Trainer:
    """One run's model, data and settings together; `go_on` is the loop."""

    def __init__(self, config: Config, store: Store, run: Path) -> None:
        self.config, self.store, self.run = config, store, run
        self.leads = model_leads(config)
        self.records = store.indices(configs.parse_folds(config.train.folds))
        if not len(self.records):
            raise UserError(
                f"train.folds is {config.train.folds!r}, but {store.path} has no record in them"
            )
        device = device_here()
        model = build_model(config, store).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.train.weight_decay)
        self.schedule = NoiseSchedule.linear(**schedule_arguments(config)).to(device)
        self.state = TrainState(model, optimizer, MovingAverage(model))

    def go_on(self, stop: StopFlag) -> None:
        """Step until the configured count of samples or a signal, logging and saving."""
        train, state = self.config.train, self.state
        saved = state.samples
        metrics.truncate(self.run / "metrics.jsonl", saved)
        with (
            open_engine(state.model, state.optimizer, train) as engine,
            Progress("train", total=train.samples, unit="samples", done=saved) as progress,
        ):
            since = (time.monotonic(), saved)
            while state.samples < train.samples and stop.name is None:
                before = state.samples
                loss = self._step(engine)
                progress.advance(state.samples - before, loss=loss)
                if _crossed(train.log_every, before, state) or state.samples == train.samples:
                    since = self._log_line(since)
                if _crossed(train.checkpoint_every, before, state):
                    self._save(engine.world_size)
                    saved = state.samples
            if state.samples > saved:
                self._save(engine.world_size)
            elif saved and resume.exported_samples(self.run) != saved:
                self._export()

    def _step(self, engine: Engine) -> float:
        """Take one optimizer step; return its loss."""
        train, state = self.config.train, self.state
        count = min(train.batch_size, train.samples - state.samples)
        generator = step_generator(train.seed, state.samples)
        x0, labels = self._batch(count, generator)
        x0, labels = x0.to(engine.device), labels.to(engine.device)
        loss = LOSSES[self.config.diffusion.prediction](
            engine, x0, labels, self.schedule, generator
        )
        value = self._finite("loss", loss.item())
        norm = self._finite("gradient norm", engine.backward(loss))
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(train, state.samples)
        engine.step()
        state.samples += count
        state.average.update(
            samples=state.samples, batch=count, half_life=train.ema_half_life_samples
        )
        state.tally.add(value, norm)
        return value

    def _batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the next records: signals (count, leads, L) in model units, labels (count, K)."""
        train = self.config.train
        places = batch_positions(train.seed, self.state.samples, count, len(self.records))
        records = self.records[places]
        x0 = torch.from_numpy(self.store.signals_mv(records, self.leads))
        labels = torch.from_numpy(self.store.labels_of(records))
        if self.config.model.label_embedding == "nle":
            labels = drop_labels(labels, train.label_dropout, generator)
        return x0 / self.config.diffusion.scale_mv, labels

    def _finite(self, name: str, value: float) -> float:
        if not math.isfinite(value):
            raise UserError(
                f"the {name} is {value} after {self.state.samples} samples: training diverged; "
                "lower train.learning_rate or set train.grad_clip in a new --run "
                f"(the checkpoints in {self.run} are intact)"
            )
        return value

    def _log_line(self, since: tuple[float, int]) -> tuple[float, int]:
        """Add a line of means since the last one; return the time and count of this one."""
        state, (then, samples) = self.state, since
        now = time.monotonic()
        tally, state.tally = state.tally, Tally()
        row = {
            "samples": state.samples,
            "loss": tally.loss / tally.steps,
            "grad_norm": tally.grad_norm / tally.steps,
            "lr": state.optimizer.param_groups[0]["lr"],
            "samples_per_s": round((state.samples - samples) / max(now - then, 1e-9), 2),
        }
        metrics.append(self.run / "metrics.jsonl", row)
        return now, state.samples

    def _save(self, world_size: int) -> None:
        """Write a checkpoint, then the export of the same weights."""
        checkpoints.save(
            self.run,
            self.state.capture(resume.data_facts(self.store)),
            world_size=world_size,
            keep=self.config.train.keep_checkpoints,
        )
        self._export()

    def _export(self) -> None:
        metadata: dict[str, Any] = {
            "leads": list(self.leads),
            "labels": list(self.store.label_names),
            "rate_hz": self.store.rate_hz,
            "length": self.store.length,
            "diffusion": schedule_arguments(self.config),
            "prediction": self.config.diffusion.prediction,
            "scale_mv": self.config.diffusion.scale_mv,
            "label_dropout": self.config.train.label_dropout,
            "samples_seen": self.state.samples,
        }
        path = self.run / "export" / "model.safetensors"
        try:
            save_export(
                path,
                model_config=model_arguments(self.config, self.store),
                raw=self.state.model.state_dict(),
                ema=self.state.average.state_dict(),
                metadata=metadata,
            )
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} cannot be written: {error}; the checkpoints are intact: "
                "make room and give the same command again"
            ) from error


def _crossed(every: int, before: int, state: TrainState) -> bool:
    """Whether a multiple of `every` samples was reached since `before`."""
    return state.samples // every > before // every
