"""What a training run would be: the report of `train --dry-run`.

The model is built without memory (torch's meta device), so that the paper's sizes can be described
on a laptop. Trains and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sssd_hpc import config as configs
from sssd_hpc.config import Config
from sssd_hpc.diffusion import NoiseSchedule
from sssd_hpc.ecg.store import Store
from sssd_hpc.model import SSSDECG
from sssd_hpc.ops import counts
from sssd_hpc.train.build import model_arguments, model_leads, schedule_arguments
from sssd_hpc.train.engine import BUCKET, device_here

GIB = 1 << 30
WIDTH = 4
"""Bytes of a weight or gradient in memory and on the wire, in every precision."""
PROCESSES = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of processes whose memory is told."""
# Dense TFLOP/s by precision, from NVIDIA's data sheets; the longest name that fits counts.
PEAKS = {
    "A100": {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0},
    "H100": {"fp32": 67.0, "tf32": 494.5, "bf16": 989.5},
    "H100 PCIe": {"fp32": 51.0, "tf32": 378.0, "bf16": 756.0},
    "H200": {"fp32": 67.0, "tf32": 494.5, "bf16": 989.5},
}
# Slices of a GPU, and variants with other clocks.
UNKNOWN = ("MIG", "NVL")


def describe(config: Config, store: Store) -> str:
    """Return the resolved configuration, the model's size, its memory and the length of the run."""
    train = config.train
    with torch.device("meta"):
        model = SSSDECG(**model_arguments(config, store))
    records = len(store.indices(configs.parse_folds(train.folds)))
    schedule = NoiseSchedule.linear(**schedule_arguments(config))
    parameters = sum(p.numel() for p in model.parameters())
    steps = -(-train.samples // train.batch_size)
    lines = [
        configs.dump(config).rstrip(),
        f"data: {store.path}, {records} records in folds {train.folds}, {store.length} samples at "
        f"{store.rate_hz} Hz, labels {_short(store.label_names)}",
        f"model: {parameters:,} trainable parameters, leads {' '.join(model_leads(config))}",
        f"schedule: {schedule.num_steps} steps, terminal signal-to-noise ratio "
        f"{schedule.terminal_snr:.3g} (sampling starts from pure noise, ratio 0)",
        f"run: {train.samples:,} samples = {steps:,} steps of {train.batch_size} = "
        f"{train.samples / max(1, records):.1f} epochs, on {device_here()}",
        _memory(config, model, store),
    ]
    return "\n".join(lines)


def step_flops(config: Config, length: int, batch: int) -> float:
    """Return the FLOPs that a training step on `batch` records of `length` samples needs at least.

    Those of the blocks, forward and backward, by `ops/counts.py`; what activation checkpointing
    computes again is not counted.
    """
    model = config.model
    cost = counts.training_step(model.num_blocks, batch, model.channels, model.d_state // 2, length)
    return cost.flops


def peak_flops(device: str, precision: str) -> float | None:
    """Return the FLOP/s that a GPU of this name can do at most, None where that is not known."""
    if any(word in device for word in UNKNOWN):
        return None
    fitting = [name for name in PEAKS if name in device]
    return 1e12 * PEAKS[max(fitting, key=len)][precision] if fitting else None


class Held(NamedTuple):
    """Bytes that a process holds between steps, and what a step adds besides activations."""

    rest: float
    step: float


def held(parameters: int, stage: int, processes: int, bucket: float = WIDTH * BUCKET) -> Held:
    """Return what ZeRO leaves a process: weights, gradients, moments, moving average, copies.

    From stage 1 on there is a second float32 copy of a process's share of the weights, and a bucket
    of fixed size, which stage 3 never gives back.
    """
    whole = WIDTH * parameters
    share = whole / processes
    if stage == 0:
        return Held(3 * whole + share, whole)
    if stage < 3:
        return Held(whole + 4 * share, (whole if stage == 1 else share) + bucket)
    # Weights, copy, gradients, moments, average; whole weights while a step runs.
    return Held(6 * share + bucket, whole)


def _memory(config: Config, model: SSSDECG, store: Store) -> str:
    """Say what a process holds in a training step, alone and as one of several."""
    train = config.train
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    parameters = sum(p.numel() for p in model.parameters())
    activations = _activations(config, store)
    totals = {}
    for processes in PROCESSES:
        if processes > train.batch_size:
            break
        state = sum(held(parameters, train.zero_stage, processes))
        records = -(-train.batch_size // (processes * train.accumulation_steps))
        parts = state, float(buffers), activations(records)
        totals[processes] = tuple(part / GIB for part in parts)
    state, constant, kept = totals[1]
    several = [f"{sum(parts):.2f} on {processes}" for processes, parts in totals.items()][1:]
    return (
        f"memory: about {sum(totals[1]):.2f} GiB (weights, gradients, AdamW's moments and moving "
        f"average {state:.2f}, buffers {constant:.2f}, activations {kept:.2f})"
        + (f"; each of several processes {', '.join(several)}" if several else "")
        + f", at ZeRO stage {train.zero_stage} with {train.accumulation_steps} piece(s) a batch; "
        "activations are what autograd keeps from forward to backward in float32, the kernels' "
        "constants included; temporaries and libraries come on top"
    )


def _activations(config: Config, store: Store) -> Callable[[int], float]:
    """Return the bytes kept as a function of the records, extrapolated from 1 and 2 blocks on 1
    and 2 records: linear in either.
    """
    blocks = config.model.num_blocks
    arguments = model_arguments(config, store)
    small = {n: SSSDECG(**{**arguments, "num_blocks": n}) for n in (1, 2)}
    for model in small.values():
        model.activation_checkpointing = config.train.activation_checkpointing
    kept = {(n, b): _saved_bytes(small[n], b, store.length) for n in (1, 2) for b in (1, 2)}
    one = kept[1, 1] + (blocks - 1) * (kept[2, 1] - kept[1, 1])
    two = kept[1, 2] + (blocks - 1) * (kept[2, 2] - kept[1, 2])
    return lambda records: one + (records - 1) * (two - one)


def _saved_bytes(model: SSSDECG, batch: int, length: int) -> int:
    """Return how many bytes autograd keeps between the forward and the backward pass."""
    constants = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    # Kept alive, so that no two of them can have the same address.
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in constants:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(
            torch.zeros(batch, model.config["num_leads"], length),
            torch.zeros(batch, dtype=torch.int64),
            torch.zeros(batch, model.config["num_labels"], dtype=torch.int64),
        )
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _short(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
