"""What a training run would be: the report of `train --dry-run`.

The model is built without memory (torch's meta device), so that the paper's sizes can be described
on a laptop. Trains and writes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sssd_hpc import config as configs
from sssd_hpc.config import Config
from sssd_hpc.diffusion import NoiseSchedule
from sssd_hpc.ecg.store import Store
from sssd_hpc.model import SSSDECG
from sssd_hpc.ops import counts
from sssd_hpc.train.build import model_arguments, model_leads, schedule_arguments
from sssd_hpc.train.engine import device_here

GIB = 1 << 30
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


def _memory(config: Config, model: SSSDECG, store: Store) -> str:
    """Say what a training step holds."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    parts = {
        "weights": weights,
        "gradients": weights,
        "AdamW moments": 2 * weights,
        "moving average": weights,
        "buffers": buffers,
        "activations": _activations(config, store),
    }
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return (
        f"memory: about {sum(parts.values()) / GIB:.2f} GiB ({listed}); activations are what "
        "autograd keeps from forward to backward in float32, the kernels' constants included; "
        "temporaries and libraries come on top"
    )


def _activations(config: Config, store: Store) -> int:
    """Extrapolate the bytes kept by 1 and 2 blocks on 1 and 2 records: linear in either."""
    blocks, batch = config.model.num_blocks, config.train.batch_size
    arguments = model_arguments(config, store)
    small = {n: SSSDECG(**{**arguments, "num_blocks": n}) for n in (1, 2)}
    kept = {(n, b): _saved_bytes(small[n], b, store.length) for n in (1, 2) for b in (1, 2)}
    per_block, per_record = kept[2, 1] - kept[1, 1], kept[1, 2] - kept[1, 1]
    per_both = kept[2, 2] - kept[2, 1] - per_record
    return (
        kept[1, 1] + (blocks - 1) * per_block + (batch - 1) * (per_record + (blocks - 1) * per_both)
    )


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
