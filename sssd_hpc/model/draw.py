"""Signals from a trained network: per-record noise, one shape of batch, 12 leads in mV.

What `generate` draws data sets with and `train` its validation. Writes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from sssd_hpc.diffusion import Denoiser, NoiseSchedule, captured, from_velocity
from sssd_hpc.diffusion.denoiser import in_bfloat16, wrapped
from sssd_hpc.diffusion.method import Method
from sssd_hpc.ecg.leads import to_twelve
from sssd_hpc.model.sssd import SSSDECG

CPU_BATCH = 16
"""Rows a batch on a CPU: up to 32 stay in its cache."""
MOST = 1024
"""Rows a batch on a GPU at most: it is busy long before."""
PROBES = (8, 16)
"""Rows of the two calls whose memory is measured."""
SHARE = 0.4
"""Of the free memory that a call may take: its captured graph keeps as much again."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A trained model ready to draw: signals of `leads`, `length` samples, model units."""

    denoiser: Denoiser
    """Not guided: that is `method`'s."""
    schedule: NoiseSchedule
    method: Method = field(default_factory=Method)
    leads: tuple[str, ...]
    length: int
    scale_mv: float
    """Millivolts per model unit."""
    device: torch.device


def ready(
    model: SSSDECG,
    schedule: NoiseSchedule,
    method: Method,
    *,
    prediction: str,
    leads: Sequence[str],
    length: int,
    scale_mv: float,
    device: torch.device,
    precision: str = "fp32",
) -> Sampler:
    """Return a trained model ready to draw on a device.

    `prediction` is epsilon or velocity, `precision` fp32 or bf16; the rest is as in `Sampler`.
    """
    network: Denoiser = model.to(device).for_sampling(length, schedule.num_steps)
    if precision == "bf16":
        network = in_bfloat16(network, device)
    denoiser = captured(network)
    if prediction == "velocity":
        denoiser = from_velocity(denoiser, schedule.to(device))
    return Sampler(
        denoiser=denoiser,
        schedule=schedule,
        method=method,
        leads=tuple(leads),
        length=length,
        scale_mv=scale_mv,
        device=device,
    )


def fitting_batch(
    build: Callable[[], Denoiser],
    num_leads: int,
    length: int,
    num_labels: int,
    device: torch.device,
    *,
    guided: bool = False,
) -> int:
    """Return how many records to draw at once: on a GPU, a power of two by measured memory.

    A call's memory grows linearly with its rows: two small calls tell how many rows take `SHARE` of
    what is free. Guidance doubles the rows of a record. On a CPU it is `CPU_BATCH`.

    Args:
        build: makes the network, on the device and not captured; a CPU needs none.
        num_leads: leads that it draws.
        length: samples a record.
        num_labels: labels a record.
        device: where it runs.
        guided: whether it will be called with guidance.
    """
    if device.type == "cpu":
        return CPU_BATCH
    network = build()

    def taken(rows: int) -> int:
        return _call_bytes(
            network,
            torch.zeros(rows, num_leads, length, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.zeros(rows, num_labels, dtype=torch.int64, device=device),
        )

    few, more = map(taken, PROBES)
    of_row = max(more - few, 1) / (PROBES[1] - PROBES[0])
    rest = SHARE * _free_bytes(device) - (few - PROBES[0] * of_row)
    rows = int(rest / of_row) // (2 if guided else 1)
    return min(1 << max(rows.bit_length() - 1, 0), MOST) if rows > 1 else 1


@torch.no_grad()
def _call_bytes(network: Denoiser, *arguments: torch.Tensor) -> int:
    """Return the most memory that a call takes on its GPU, in bytes."""
    device = arguments[0].device
    # The first call also takes workspaces that stay.
    network(*arguments)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    network(*arguments)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _free_bytes(device: torch.device) -> int:
    """Return a GPU's free memory in bytes."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def record_noise(seed: int, ecg_id: int, step: int, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Draw the standard normal noise (leads, L) of one record in one step; step 0 is x_T.

    A function of its arguments alone: Philox with the key (seed, ecg_id), whose 256-bit counter
    starts at step * 2^64, so that no two steps or records share a number.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC11).
    """
    key = np.array([seed, ecg_id], dtype=np.uint64)
    counter = np.array([0, step, 0, 0], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    return generator.standard_normal(shape, dtype=np.float32)


def draw_signals(
    sampler: Sampler,
    ecg_ids: NDArray[np.int64],
    labels: NDArray[np.int64],
    *,
    seed: int,
    batch_size: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> NDArray[np.float64]:
    """Return signals (n, 12, L) in mV, LEADS order, for n <= batch_size records.

    The model always sees `batch_size` rows, the last repeated where records lack: matrix routines
    round by shape, so one shape keeps a record the same whichever records stand beside it.
    `on_step(i)` is called before network call i = 0, 1, ..
    """
    count = len(ecg_ids)
    padding = np.minimum(np.arange(batch_size), count - 1)
    shape = (len(sampler.leads), sampler.length)

    def noise(step: int) -> torch.Tensor:
        drawn = np.stack([record_noise(seed, int(ecg_id), step, shape) for ecg_id in ecg_ids])
        rows = torch.from_numpy(drawn[padding])
        if sampler.device.type == "cuda":
            # From pinned memory the copy waits for no call: the next noise is drawn meanwhile.
            return rows.pin_memory().to(sampler.device, non_blocking=True)
        return rows.to(sampler.device)

    def counted(network: Denoiser) -> Denoiser:
        calls = itertools.count()

        def call(x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            on_step(next(calls))
            return network(x_t, t, labels)

        return call

    conditions = torch.from_numpy(labels[padding]).to(sampler.device)
    # Without these, cuDNN may round to TF32 and choose another algorithm from run to run.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        x_0 = sampler.method.draw(
            wrapped(sampler.denoiser, counted), noise(0), conditions, sampler.schedule, noise
        )
    model_units = x_0[:count].cpu().numpy().astype(np.float64)
    # A diverged model's infinities are refused, with their record's name, when they are written.
    with np.errstate(invalid="ignore", over="ignore"):
        return to_twelve(model_units * sampler.scale_mv, sampler.leads)
