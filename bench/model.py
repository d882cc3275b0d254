"""Suites `training_step` and `denoising_step`: the papers' network against the textbook one.

Both run in this process with the same weights, taking turns. First they must agree: the noise they
predict and, in training, the gradient of every kind of parameter. Errors here are differences from
the textbook network in float32, not from float64.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from bench.cases import BOUNDS, GRADIENTS, Candidate, Comparison, Record, Refusal, describe, label
from bench.ceilings import matmul_precision
from bench.textbook import Textbook
from bench.timing import (
    Clock,
    available_gb,
    forget_peak,
    peak_gb,
    release,
    say,
)
from sssd_hpc.ops import counts

NUM_LEADS, NUM_LABELS, NUM_STEPS = 8, 71, 200
# Memory of a textbook training step at the papers' widths on a CPU: fixed, of each block, and of
# each record in a block; from stacks of 1 and 3 blocks at batches 2 and 4.
TEXTBOOK_GB = (2.5, 0.373, 0.042)
# The blocks that are compared where that is too much.
FEWER = 12
# A step slower than this is timed twice, its first and checked pass included.
SLOW_S = 15.0


@dataclass(frozen=True)
class Size:
    """Sizes of a network."""

    blocks: int = 36
    channels: int = 256
    N: int = 64
    L: int = 1000

    def shape(self, B: int) -> dict[str, int]:
        """Return the shape of a record."""
        return {"blocks": self.blocks, "B": B, "C": self.channels, "N": self.N, "L": self.L}


PAPER, TINY = Size(), Size(blocks=2, channels=8, N=16, L=64)


@dataclass(frozen=True)
class Mode:
    """How products are taken: float32, tf32 or bfloat16 autocast."""

    name: str

    @contextlib.contextmanager
    def __call__(self, device: str) -> Iterator[None]:
        """Set the mode inside the block."""
        setting = "highest" if self.name == "float32" else "high"
        autocast = torch.autocast(device, torch.bfloat16, enabled=self.name == "bfloat16")
        with matmul_precision(setting), autocast:
            yield

    @property
    def precision(self) -> str:
        """Name the ceiling that products of this mode have."""
        return {"float32": "fp32", "tf32": "tf32", "bfloat16": "bf16"}[self.name]


MODES = [Mode("float32"), Mode("tf32"), Mode("bfloat16")]


def build(size: Size, device: str) -> Any:
    """Return our network with random weights in its head, which starts at zero otherwise."""
    from sssd_hpc.model.sssd import SSSDECG

    torch.manual_seed(0)
    model = SSSDECG(
        num_leads=NUM_LEADS,
        num_labels=NUM_LABELS,
        num_blocks=size.blocks,
        channels=size.channels,
        d_state=size.N,
        lmax=size.L,
    )
    nn.init.normal_(model.head.weight, std=0.1)
    return model.to(device)


def batch(size: Size, B: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_t, t and labels."""
    labels = torch.randint(0, 2, (B, NUM_LABELS), device=device)
    t = torch.randint(0, NUM_STEPS, (B,), device=device)
    return torch.randn(B, NUM_LEADS, size.L, device=device), t, labels


def training_step(device: str, quick: bool, ceilings: dict[str, float]) -> list[Record]:
    """Time forward, backward and AdamW; the gradients are compared in the first step."""
    size = TINY if quick else PAPER
    records: list[Record] = []
    for B in (2,) if quick else ((8, 64) if device == "cuda" else (2, 4)):
        used = size
        fixed, each, record = TEXTBOOK_GB
        need = fixed + size.blocks * (each + record * B)
        if device == "cpu" and not quick and available_gb() < need:
            used = Size(blocks=FEWER)
            say(f"  the textbook needs {need:.0f} GB, {available_gb():.0f} are free: fewer blocks")
        records += _compare("training step", _training, device, used, B, quick, ceilings)
        release(device)
    if device == "cpu":
        records += _training_memory(size, 2)
    return records


def denoising_step(device: str, quick: bool, ceilings: dict[str, float]) -> list[Record]:
    """Time one step of the sampler's network, its kernels kept, its step projections tabulated."""
    size = TINY if quick else PAPER
    records: list[Record] = []
    batches = (2,) if quick else ((8, 256) if device == "cuda" else (2, 4))
    for B in batches:
        records += _compare("denoising step", _denoising, device, size, B, quick, ceilings)
        release(device)
    if device == "cpu":
        records += _sampling_memory(size, batches[-1])
    return records


class Step:
    """A training step of a network: loss, backward, AdamW."""

    def __init__(
        self, network: nn.Module, given: tuple[Tensor, ...], target: Tensor, mode: Mode
    ) -> None:
        self.network, self.given, self.target, self.mode = network, given, target, mode
        # At rate 0 the optimizer does all its work and every step begins with the same weights.
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)
        self.output = target

    def __call__(self) -> None:
        """Take the step; gradients stay until the next one."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.mode(self.target.device.type):
            output = self.network(*self.given).float()
            mse_loss(output, self.target).backward()
            self.optimizer.step()
        self.output = output.detach()

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the last step."""
        named = self.network.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None}

    def forget(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)


class Prediction:
    """One denoising step; the last output is kept, and there are no gradients."""

    def __init__(
        self, network: Callable[..., Tensor], given: tuple[Tensor, ...], mode: Mode
    ) -> None:
        self.network, self.given, self.mode = network, given, mode
        self.output = given[0]

    @torch.no_grad()
    def __call__(self) -> None:
        """Take the step."""
        with self.mode(self.given[0].device.type):
            self.output = self.network(*self.given).float()

    def gradients(self) -> dict[str, Tensor]:
        """Return none."""
        return {}

    def forget(self) -> None:
        """Do nothing."""


# The steps to be compared in a mode by the names of their backends, the textbook's first.
Works = Callable[[Mode], Iterator[tuple[str, Step | Prediction]]]


def _training(device: str, size: Size, B: int) -> Works:
    model = build(size, device)
    given, target = batch(size, B, device), torch.randn(B, NUM_LEADS, size.L, device=device)
    public = Textbook(model)

    def works(mode: Mode) -> Iterator[tuple[str, Step | Prediction]]:
        yield "textbook", Step(public, given, target, mode)
        yield "auto", Step(model, given, target, mode)

    return works


@torch.no_grad()
def _denoising(device: str, size: Size, B: int) -> Works:
    model = build(size, device).eval()
    given = batch(size, B, device)
    public, sampler = Textbook(model), model.for_sampling(size.L, NUM_STEPS)

    def works(mode: Mode) -> Iterator[tuple[str, Step | Prediction]]:
        yield "textbook", Prediction(public, given, mode)
        yield "auto", Prediction(sampler, given, mode)
        if device == "cuda":
            from sssd_hpc.diffusion.capture import captured

            # A graph keeps the precision that it was captured in.
            yield "auto, captured", Prediction(captured(sampler), given, mode)

    return works


def _compare(
    op: str,
    build_works: Callable[[str, Size, int], Works],
    device: str,
    size: Size,
    B: int,
    quick: bool,
    ceilings: dict[str, float],
) -> list[Record]:
    """Check the works of each mode against the first of all, then time them in turns."""
    count = counts.training_step if op == "training step" else counts.denoising_step
    works = build_works(device, size, B)
    truth: tuple[Tensor, dict[str, Tensor]] | None = None
    records = []
    for mode in MODES if device == "cuda" else MODES[:1]:
        width = 2 if mode.name == "bfloat16" else 4
        cost = count(size.blocks, B, size.channels, size.N // 2, size.L, width)
        errors, peaks, ready = {}, {}, {}
        for backend, work in works(mode):
            try:
                peaks[backend], first_s = _first(work, device)
            except torch.OutOfMemoryError:
                say(f"  {op} B{B} {mode.name}: {backend} is out of memory")
                work.forget()
                release(device)
                continue
            if truth is None:
                truth = work.output, {name: g.cpu() for name, g in work.gradients().items()}
            errors[backend] = _agreement(work.output, work.gradients(), *truth)
            _refuse(backend, mode, errors[backend], op)
            work.forget()
            ready[backend] = work, first_s
        latest = []
        for backend, mine in _turns(ready, device, quick).items():
            comparison = Comparison(op, size.shape(B), mode.name, cost, tuple, [])
            bound = None if backend == "textbook" else BOUNDS["model"][mode.name]
            candidate = Candidate(backend, tuple, bound, precision=mode.precision)
            entry = describe(comparison, candidate, mine, errors[backend], ceilings)
            entry["peak_gb"] = peaks[backend]
            latest.append(entry)
        _add_speedups(latest)
        records += latest
    return records


def _first(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Return the peak memory in GB and the time of a first pass.

    On a CPU the peak is the whole process's, in which both networks stand.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    begin = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 1e9
    else:
        peak = peak_gb()
    return peak, time.perf_counter() - begin


def _turns(
    works: Mapping[str, tuple[Callable[[], object], float]], device: str, quick: bool
) -> dict[str, list[float]]:
    """Time works in turns, several shots of the quicker ones; the first pass was the warm-up.

    On a GPU 10 turns, on a CPU 3. On a CPU a work over SLOW_S has no warm-up: its first pass
    counts, and one more turn follows.
    """
    clock = Clock(device)
    first = {backend: first_s for backend, (_, first_s) in works.items()}
    slowest = max(first.values(), default=0.0)
    slow = device == "cpu" and slowest > SLOW_S
    turns = 10 if device == "cuda" else 1 if slow else 2 if quick else 3
    times: dict[str, list[float]] = {backend: [] for backend in works}
    for backend, first_s in first.items():
        if slow and first_s > SLOW_S:
            times[backend].append(first_s)
    for _ in range(turns):
        for backend, (work, _) in works.items():
            shots = 1 if device == "cuda" else min(3, max(1, int(slowest / first[backend] / 2)))
            times[backend] += [clock(work) for _ in range(shots)]
    return times


def _agreement(
    output: Tensor, gradients: dict[str, Tensor], true: Tensor, truth: dict[str, Tensor]
) -> tuple[float, float | None]:
    """Return the relative differences of outputs and of the worst kind of parameter's gradient."""
    error = float((output - true).norm() / true.norm())
    kinds: dict[str, list[float]] = {}
    for name, gradient in truth.items():
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        sums = kinds.setdefault(kind, [0.0, 0.0])
        mine = gradients.get(name)
        # A parameter that nothing reaches may have no gradient or a zero one.
        difference = gradient if mine is None else gradient - mine.cpu()
        sums[0] += float(difference.double().square().sum())
        sums[1] += float(gradient.double().square().sum())
    worst = ((wrong / max(whole, 1e-30)) ** 0.5 for wrong, whole in kinds.values())
    return error, max(worst, default=None)


def _refuse(backend: str, mode: Mode, errors: tuple[float, float | None], what: str) -> None:
    bound = BOUNDS["model"][mode.name]
    if backend == "textbook":
        return
    for part, error, limit in (
        ("output", errors[0], bound),
        ("gradients", errors[1], GRADIENTS * bound),
    ):
        if error is not None and not error <= limit:
            raise Refusal(
                f"{what} in {mode.name}: {part} of {backend} differ from the textbook's by "
                f"{error:.2e}, the bound is {limit:.0e}"
            )


def _add_speedups(latest: list[Record]) -> None:
    """Compare records with the textbook's among them, and show them."""
    base = next((r["median_s"] for r in latest if r["backend"] == "textbook"), None)
    for entry in latest:
        entry["speedup"] = base / entry["median_s"] if base else None
    if latest:
        cells = ", ".join(f"{r['backend']} {r['median_s']:.3g} s" for r in latest)
        say(f"  {label(latest[0])}: {cells}")


def _training_memory(size: Size, B: int) -> list[Record]:
    """Measure processes of their own that train alone."""
    return [
        _memory("training memory", size, B, "auto"),
        _memory("training memory", size, B, "auto, checkpointed"),
    ]


def _sampling_memory(size: Size, B: int) -> list[Record]:
    return [_memory("sampling memory", size, B, "auto")]


def _memory(op: str, size: Size, B: int, backend: str) -> Record:
    numbers = map(str, (size.blocks, size.channels, size.N, size.L, B))
    command = [sys.executable, "-m", "bench.memory", op.partition(" ")[0], *numbers]
    if "checkpointed" in backend:
        command.append("--checkpoint")
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, seconds = map(float, done.stdout.split())
    say(f"  {op} B{B} {backend}: {peak:.2f} GB, {seconds:.2f} s a step")
    return {
        "op": op,
        "shape": size.shape(B),
        "dtype": "float32",
        "backend": backend,
        "peak_gb": peak,
        "median_s": seconds,
        "repeats": 1.0,
    }
