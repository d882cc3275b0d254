"""Train a model on a store, or go on where a run stopped: the same call does both.

Progress is counted in samples seen. All that a step does is decided by the configuration, the store
and that count, so that a resumed run equals an uninterrupted one, and a run on several processes
one on a single process but for the order of sums. All ranks go through this file in step; rank 0
alone writes what is not spread. What a run may be resumed with is checked in `resume.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sssd_hpc import config as configs
from sssd_hpc import files
from sssd_hpc.config import Config, TrainConfig
from sssd_hpc.diffusion import NoiseSchedule, distillation_loss, epsilon_loss, velocity_loss
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import Interrupted, UserError
from sssd_hpc.model.checkpoint import Checkpoint, folder, read
from sssd_hpc.model.export import save_export
from sssd_hpc.progress import Progress
from sssd_hpc.train import checkpoint as checkpoints
from sssd_hpc.train import heartbeat, metrics, resume, tensorboard
from sssd_hpc.train.build import (
    build_model,
    model_arguments,
    model_leads,
    parameter_groups,
    schedule_arguments,
)
from sssd_hpc.train.data import batch_positions, draw, drop_labels, share
from sssd_hpc.train.describe import describe, peak_flops, step_flops
from sssd_hpc.train.engine import Engine, device_here, open_engine, processes
from sssd_hpc.train.heartbeat import Heartbeat, Stragglers
from sssd_hpc.train.ranks import PEER_LOST, Group
from sssd_hpc.train.signals import StopFlag
from sssd_hpc.train.state import Tally, TrainState, load_weights
from sssd_hpc.train.teacher import Teacher, load_teacher
from sssd_hpc.train.tensorboard import Board
from sssd_hpc.train.validation import Validator, Watch, due

__all__ = ["describe", "train"]

_log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
LOSSES = {"epsilon": epsilon_loss, "velocity": velocity_loss}


def train(config: Config, store: Store, run: Path, distill_from: Path | None = None) -> None:
    """Train until `config.train.samples` records were seen, from the newest checkpoint in `run`.

    Writes config.yaml, metrics.jsonl, checkpoints, latest and export/model.safetensors to `run`.
    With `distill_from` it begins with that run's averaged weights and learns to do in
    `diffusion.distilled_steps` DDIM steps what they do in twice as many.

    Raises:
        UserError: the run was begun with other settings or data, its checkpoints are damaged, the
            loss is not finite, or the disk is full. The last good checkpoint is intact.
        OSError: the disk failed otherwise.
        Interrupted: SIGINT, SIGTERM, SIGUSR1 or SIGUSR2 came to a rank; the step was finished and
            saved.
        PeerLost: another process of the run is gone or silent.
    """
    with (
        processes(config.train.timeout_s) as group,
        contextlib.ExitStack() as owned,
        StopFlag() as stop,
    ):
        steps = config.diffusion.distilled_steps
        if (distill_from is None) != (steps == 0):
            raise UserError(
                f"diffusion.distilled_steps is {steps} and --distill-from is "
                f"{distill_from or 'missing'}; a student needs both"
            )
        taught: list[Teacher | None] = [None]

        def learn() -> None:
            if distill_from is not None:
                taught[0] = load_teacher(distill_from, config, store)

        group.everywhere(learn)
        teacher = taught.pop()
        data = resume.data_facts(store, teacher.sha256 if teacher else "")
        kept: list[Checkpoint | None] = [None]

        def begin() -> tuple[int | None, bool]:
            if config.train.tensorboard:
                tensorboard.check()
            owned.enter_context(resume.sole_owner(run))
            found = kept[0] = checkpoints.load_newest(run)
            resume.check(config, data, run, found)
            if not found:
                return None, False
            exported = resume.exported_samples(run) == found.samples
            validated = metrics.validations(run / METRICS)
            lacking = due(config.train, found.samples) and found.samples not in validated
            done = found.samples >= config.train.samples and exported and not lacking
            best = _best_there(run, validated) if done else None
            if best is not None:
                # A kill may have come before the name.
                checkpoints.point(run, folder(run, best), "best")
            return found.samples, done

        samples, done = group.first(begin)
        if done:
            _log.info("%s: nothing to do, %d samples were seen", run, samples)
            return

        group.first(lambda: heartbeat.clear(run, group.world_size))
        heart = owned.enter_context(
            Heartbeat(
                run,
                group.rank,
                samples=samples or 0,
                timeout_s=config.train.timeout_s,
                lost=PEER_LOST,
            )
        )

        def follow() -> None:
            if group.rank and samples is not None:
                kept[0] = read(folder(run, samples))

        group.everywhere(follow)
        trainer = Trainer(config, store, run, group, kept.pop(), heart, data, teacher)

        def sign() -> None:
            files.atomic_write_text(run / "config.yaml", configs.dump(config))
            metrics.truncate(run / METRICS, samples or 0)
            if samples is not None:
                checkpoints.point(run, folder(run, samples))

        group.first(sign)
        samples = trainer.go_on(stop)
        name = _signalled(group, stop)
        if name and samples < config.train.samples:
            raise _interrupted(name, samples, run)


def _best_there(run: Path, validated: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Return the best of the checkpoints that are there, by its samples."""
    there = {samples for samples in validated if folder(run, samples).is_dir()}
    return metrics.best({samples: validated[samples] for samples in there})


def _signalled(group: Group, stop: StopFlag) -> str | None:
    """Return the name of a signal that came to any rank."""
    return next(filter(None, group.gather(stop.name)), None)


def _interrupted(name: str | None, samples: int, run: Path) -> Interrupted:
    return Interrupted(
        f"{name} came after {samples} samples, saved in {run}; the same command goes on"
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


class Vote(NamedTuple):
    """What every rank knows of a step once it has ended, the same on each."""

    loss: float
    stopping: bool
    """Whether a signal came to any rank."""
    rested: bool
    """Whether the last checkpoint is as long ago as `train.checkpoint_gap_s` says."""


class Trainer:
    """One run's model, data and settings together; `go_on` is the loop."""

    def __init__(
        self,
        config: Config,
        store: Store,
        run: Path,
        group: Group,
        found: Checkpoint | None,
        heart: Heartbeat,
        data: dict[str, Any],
        teacher: Teacher | None,
    ) -> None:
        self.config, self.store, self.run, self.group = config, store, run, group
        train = config.train
        self.heart, self.data = heart, data
        self.leads = model_leads(config)
        self.records = store.indices(configs.parse_folds(train.folds))
        if not len(self.records):
            raise UserError(
                f"train.folds is {train.folds!r}, but {store.path} has no record in them"
            )
        self.validator = Validator(config, store, run, group) if train.validate_every else None
        self.validated: dict[int, dict[str, Any]] = {}
        """What each validation found, by samples."""
        device = device_here()
        self.model = build_model(config, store).to(device)
        if found:
            load_weights(self.model, found)
        elif teacher:
            self.model.load_state_dict(teacher.model.state_dict())
        self.found = found
        self.schedule = NoiseSchedule.linear(**schedule_arguments(config)).to(device)
        self.teacher = teacher and teacher.network(store.length, self.schedule.num_steps, device)
        batch, world_size = train.batch_size, group.world_size
        shares = [share(batch, world_size, rank) for rank in range(world_size)]
        self.stragglers = Stragglers(run, [of.stop - of.start for of in shares])
        self.flops = step_flops(config, store.length, batch) / batch
        """What a sample takes."""
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_flops(gpu, train.precision)
        self.peak = peak and peak * world_size
        self.seen: dict[str, float] = {}
        """What progress shows of the last line of metrics.jsonl."""
        self.judged: dict[str, float | int] = {}
        """What progress shows of the best validation."""
        self.saved_at = -math.inf
        """When the last checkpoint was begun, by this process's monotonic clock."""
        self.prepared = 0.0
        """When the last piece's data were ready."""

    def go_on(self, stop: StopFlag) -> int:
        """Step until the configured count of samples or a signal, logging and saving.

        Returns the count that was reached, and saved.
        """
        train, model = self.config.train, self.model
        parameters = {name for name, _ in model.named_parameters()}
        buffers = [name for name in model.state_dict() if name not in parameters]
        optimizer = torch.optim.AdamW(parameter_groups(model, train))
        with open_engine(model, optimizer, train, self.group) as engine:
            state = TrainState(model, buffers, engine, self.group, every=train.zero_stage == 3)
            if self.found:
                state.restore(self.found)
                # Its tensors are the engine's now.
                self.found = dataclasses.replace(self.found, tensors={})
            self._loop(state, stop)
            return state.samples

    def _loop(self, state: TrainState, stop: StopFlag) -> None:
        train, saved = self.config.train, state.samples
        shown = Progress("train", total=train.samples, unit="samples", done=saved)
        keep = train.keep_checkpoints
        with (
            shown if self.group.rank == 0 else contextlib.nullcontext() as progress,
            self._board(saved) as self.board,
            checkpoints.Writer(self.run, self.group, keep, self._export) as writer,
        ):
            self.writer = writer
            self.validated = self.group.first(lambda: metrics.validations(self.run / METRICS))
            self._name_best(saved)
            if due(train, saved) and saved not in self.validated:
                # A kill came between the checkpoint and its validation.
                self._validate(saved, stop, state.engine.device, progress)
            since = (time.monotonic(), saved)
            stopping = False
            while state.samples < train.samples and not stopping:
                before = state.samples
                loss, stopping, rested = self._step(state, stop)
                self.heart.beat("step", state.samples)
                if progress:
                    told = {"loss": loss, "grad_norm": state.norm, "lr": state.rate}
                    progress.advance(state.samples - before, **told, **self.seen, **self.judged)
                if _crossed(train.log_every, before, state) or state.samples == train.samples:
                    since = self._log_line(state, since)
                if rested and _crossed(train.checkpoint_every, before, state):
                    saved = self._save(state)
                if due(train, state.samples):
                    saved = saved if saved == state.samples else self._save(state)
                    began = time.monotonic()
                    self._validate(saved, stop, state.engine.device, progress)
                    since = since[0] + time.monotonic() - began, since[1]
            self.heart.beat("save", state.samples)
            if state.samples > saved:
                self._save(state)
            writer.finish()
            if self.found and self.found.samples == state.samples:
                # Only the export was missing.
                path = folder(self.run, state.samples)
                self.group.first(lambda: self._export(read(path)))

    def _save(self, state: TrainState) -> int:
        """Begin a checkpoint; return its count of samples."""
        self.heart.beat("save", state.samples)
        self.writer.begin(state.capture(self.data))
        self.saved_at = time.monotonic()
        return state.samples

    def _validate(
        self, samples: int, stop: StopFlag, device: torch.device, progress: Progress | None
    ) -> None:
        """Score the checkpoint at this count, begun or whole, and name the best so far."""
        assert self.validator is not None
        self.writer.finish()

        def beat(doing: str) -> None:
            self.heart.beat("validate", samples)
            if progress and doing:
                progress.advance(0, validation=doing)

        def stopped() -> Exception:
            return _interrupted(_signalled(self.group, stop), samples, self.run)

        watch = Watch(self.group, device, lambda: stop.name is not None, stopped, beat)
        found = self.validator.score(samples, watch, device)

        def write() -> None:
            metrics.append(self.run / METRICS, {"samples": samples, "validation": found})
            if self.board:
                numbers = {f"validation_{name}": found[name] for name in ("frechet", "roc_auc")}
                known = {name: value for name, value in numbers.items() if value is not None}
                self.board.add({"samples": samples, **known})

        self.group.first(write)
        self.validated[samples] = found
        self._name_best(samples)
        if progress:
            progress.advance(0, **self.judged)
        if self.group.rank == 0:
            _log.info("validation at %d samples: %s", samples, metrics.words(found))

    def _name_best(self, newest: int) -> None:
        """Keep and name the best of the checkpoints that are there, `newest` being the newest."""
        best = self.group.first(lambda: _best_there(self.run, self.validated))
        self.writer.name_best(newest, best)
        self.judged = {}
        if best is not None:
            self.judged = {"best": float(self.validated[best]["frechet"]), "at": best}

    def _step(self, state: TrainState, stop: StopFlag) -> Vote:
        """Take one optimizer step, and have all ranks agree on what follows from it."""
        train, group, engine = self.config.train, self.group, state.engine
        count = min(train.batch_size, train.samples - state.samples)
        mine = range(state.samples, state.samples + count)[
            share(count, group.world_size, group.rank)
        ]
        state.rate = learning_rate(train, state.samples)
        sum_of_losses, norm, vote = 0.0, None, None
        own_s = 0.0
        for piece in range(train.accumulation_steps):
            numbers = mine[share(len(mine), train.accumulation_steps, piece)]
            began = time.monotonic()
            loss = self._loss(engine, numbers or range(state.samples, state.samples + 1))
            sum_of_losses += len(numbers) * float(loss.detach())
            # Backward waits for the slowest rank, and at stage 3 forward, which gathers weights.
            own_s += (self.prepared if train.zero_stage == 3 else time.monotonic()) - began
            if piece == train.accumulation_steps - 1:
                vote = self._vote(sum_of_losses / count, own_s, stop, engine.device)
                if not math.isfinite(vote.loss):
                    self._skip(state, vote.loss, count)
                    return vote
            # DeepSpeed divides by ranks and pieces; a rank without a record left adds nothing.
            engine.backward(
                loss * (len(numbers) * group.world_size * train.accumulation_steps / count)
            )
            norm = engine.step(state.rate)
        assert norm is not None
        assert vote is not None
        self._finite(state, "gradient norm", norm)
        state.bad = 0
        state.samples += count
        state.average.update(
            engine.local,
            samples=state.samples,
            batch=count,
            half_life=train.ema_half_life_samples,
        )
        state.tally.add(vote.loss, norm)
        state.norm = norm
        return vote

    def _vote(self, loss: float, own_s: float, stop: StopFlag, device: torch.device) -> Vote:
        """Sum the ranks' shares of the loss, and let each say what the others must know."""
        group, seconds = self.group, [0.0] * self.group.world_size
        seconds[group.rank] = own_s
        # The first rank's clock counts.
        rest = time.monotonic() - self.saved_at >= self.config.train.checkpoint_gap_s
        flags = bool(stop.name), self.writer.busy, rest and group.rank == 0
        total, signals, busy, rested, *seconds = group.total([loss, *flags, *seconds], device)
        if group.rank == 0:
            self.stragglers.add(seconds)
        if self.writer.pending and not busy:
            self.writer.finish()
        return Vote(total, signals > 0, rested > 0)

    def _loss(self, engine: Engine, numbers: range) -> Tensor:
        """Return the mean loss of the samples of these numbers."""
        config, train = self.config, self.config.train
        places = batch_positions(train.seed, numbers.start, len(numbers), len(self.records))
        records = self.records[places]
        x0 = (
            torch.from_numpy(self.store.signals_mv(records, self.leads)) / config.diffusion.scale_mv
        )
        labels = torch.from_numpy(self.store.labels_of(records))
        diffusion = config.diffusion
        levels = diffusion.distilled_steps or diffusion.num_steps
        level, eps, chance = draw(train.seed, numbers, (x0.shape[1], x0.shape[2]), levels)
        if config.model.label_embedding == "nle":
            labels = drop_labels(labels, chance, train.label_dropout)
        x0, labels, level, eps = (x.to(engine.device) for x in (x0, labels, level, eps))
        self.prepared = time.monotonic()
        given = (x0, labels, self.schedule)
        if self.teacher:
            steps, prediction = diffusion.distilled_steps, diffusion.prediction
            return distillation_loss(
                engine,
                self.teacher,
                *given,
                steps=steps,
                prediction=prediction,
                drawn=(level, eps),
            )
        return LOSSES[diffusion.prediction](engine, *given, drawn=(level, eps))

    def _skip(self, state: TrainState, value: float, count: int) -> None:
        """Pass over a step whose loss is not finite, as often as the configuration allows."""
        if state.bad >= self.config.train.bad_steps:
            self._finite(state, "loss", value)
        state.bad += 1
        state.samples += count
        state.tally.skipped += 1
        if self.group.rank == 0:
            _log.warning("the loss is %s at %d samples: step skipped", value, state.samples)

    def _finite(self, state: TrainState, name: str, value: float) -> None:
        """Check a number that is the same on every rank."""
        if not math.isfinite(value):
            self.writer.finish()
            self.group.first(lambda: self._refuse(name, value, state.samples))

    def _refuse(self, name: str, value: float, samples: int) -> None:
        raise UserError(
            f"the {name} is {value} after {samples} samples: training diverged; "
            "lower train.learning_rate or set train.grad_clip in a new --run "
            f"(the checkpoints in {self.run} are intact)"
        )

    def _log_line(self, state: TrainState, since: tuple[float, int]) -> tuple[float, int]:
        """Add a line of means since the last one; return the time and count of this one."""
        then, samples = since
        now = time.monotonic()
        rate = (state.samples - samples) / max(now - then, 1e-9)
        tally, state.tally = state.tally, Tally()
        row = {
            "samples": state.samples,
            "loss": tally.loss / max(tally.steps, 1),
            "grad_norm": tally.grad_norm / max(tally.steps, 1),
            "lr": state.rate,
            "samples_per_s": round(rate, 2),
        }
        self.seen = {"memory_gib": metrics.peak_memory_gib()}
        if self.peak:
            self.seen["mfu"] = round(rate * self.flops / self.peak, 4)
        row |= self.seen
        if tally.skipped:
            row["skipped"] = tally.skipped

        def write() -> None:
            metrics.append(self.run / METRICS, row)
            if self.board:
                self.board.add(row)

        self.group.first(write)
        return now, state.samples

    def _board(self, samples: int) -> contextlib.AbstractContextManager[Board | None]:
        wanted = self.config.train.tensorboard and self.group.rank == 0
        return Board(self.run, samples) if wanted else contextlib.nullcontext()

    def _export(self, whole: Checkpoint) -> None:
        """Export the weights of a checkpoint."""
        metadata: dict[str, Any] = {
            "leads": list(self.leads),
            "labels": list(self.store.label_names),
            "rate_hz": self.store.rate_hz,
            "length": self.store.length,
            "diffusion": schedule_arguments(self.config),
            "prediction": self.config.diffusion.prediction,
            "scale_mv": self.config.diffusion.scale_mv,
            "label_dropout": self.config.train.label_dropout,
            "distilled_steps": self.config.diffusion.distilled_steps,
            "samples_seen": whole.samples,
        }
        path = self.run / "export" / "model.safetensors"
        with checkpoints.refusing(str(path), "the checkpoints"):
            save_export(
                path,
                model_config=model_arguments(self.config, self.store),
                raw=whole.tensors["model"],
                ema={**whole.tensors["model"], **whole.tensors["ema"]},
                metadata=metadata,
            )


def _crossed(every: int, before: int, state: TrainState) -> bool:
    """Whether a multiple of `every` samples was reached since `before`."""
    return state.samples // every > before // every
