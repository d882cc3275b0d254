"""The cost model of training on many processes: pure functions of counts and rates.

Counts come from `sssd_hpc/ops/counts.py` and the model itself, rates are given. It follows the
engine as it is configured: float32 weights and gradients, no overlap of sending and computing.
Legend: P parameters, n processes, m nodes of g GPUs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from sssd_hpc.ops import counts
from sssd_hpc.ops.counts import Cost
from sssd_hpc.train.describe import WIDTH
from sssd_hpc.train.engine import BUCKET

REUSE = 1_000_000_000
"""Parameters up to which stage 3 keeps in backward what it gathered in forward, default."""


class Link(NamedTuple):
    """Seconds to begin, and bytes a second in one direction, of each GPU."""

    latency_s: float
    bytes_per_s: float


class Cluster(NamedTuple):
    """Nodes of GPUs: links inside a node and between nodes."""

    gpus: int
    inside: Link
    between: Link


class Device(NamedTuple):
    """What a GPU attains: matrix products, other arithmetic, memory, and the host's launches."""

    matrix_flops_per_s: float
    vector_flops_per_s: float
    bytes_per_s: float
    launch_s: float
    memory_bytes: float


class Part(NamedTuple):
    """Calls of one kind in a training step."""

    cost: Cost
    matrix: bool


def parts(B: int, C: int, N2: int, L: int, e: int = 4) -> list[Part]:
    """Return the parts of one block, forward and backward; they sum to `counts.training_step`."""
    H = 2 * C
    layer = [
        Part(counts.one_pass(B, H, L, e) + counts.one_pass_backward(B, H, L, e), False),
        Part(counts.linear(B, H, H, L, e) + counts.linear_backward(B, H, H, L, e), True),
        Part(counts.residual_norm(B, H, L, e) + counts.residual_norm_backward(B, H, L, e), False),
        Part(counts.frozen(H, N2, L) + counts.frozen_backward(H, N2, L), False),
    ]
    widen = counts.linear(B, C, H, L, e, taps=3) + counts.linear_backward(B, C, H, L, e, taps=3)
    narrow = counts.residual_skip(B, C, L, e) + counts.residual_skip_backward(B, C, L, e)
    return [
        *(Part(part.cost.times(2), part.matrix) for part in layer),
        Part(widen, True),
        Part(counts.gate(B, C, L, e) + counts.gate_backward(B, C, L, e), False),
        Part(narrow, True),
    ]


def update_s(P: int, stage: int, n: int, device: Device) -> float:
    """Return the seconds of AdamW and of the moving average, whose share is a rank's own."""
    share = P / n if stage else P
    return (7 * share + 3 * P / n) * WIDTH / device.bytes_per_s


def compute_s(blocks: int, B: int, C: int, N2: int, L: int, device: Device, e: int = 4) -> float:
    """Return the seconds of forward and backward: the slower of arithmetic, memory and launches."""
    seconds = 0.0
    for cost, matrix in parts(B, C, N2, L, e):
        rate = device.matrix_flops_per_s if matrix else device.vector_flops_per_s
        seconds += max(cost.flops / rate, cost.bytes / device.bytes_per_s)
    return blocks * max(seconds, device.launch_s)


def volumes(P: int, stage: int) -> dict[str, int]:
    """Return the whole bytes that each collective of a step handles."""
    whole = WIDTH * P
    if stage == 0:
        return {"all_reduce": whole}
    if stage < 3:
        # DeepSpeed all-reduces here, too, then drops what is not a rank's own.
        return {"all_reduce": whole, "all_gather": whole}
    return {"all_gather": whole * (1 if P <= REUSE else 2), "reduce_scatter": whole}


def messages(P: int, stage: int) -> int:
    """Return how many collectives send P numbers: one a bucket, at stage 0 a single one."""
    return math.ceil(P / BUCKET) if stage else 1


def collective_s(op: str, size: float, n: int, cluster: Cluster, messages: int = 1) -> float:
    """Return the seconds to handle `size` bytes in so many equal collectives, one after another.

    Rings in nodes, then between them.
    """
    if op == "all_reduce":
        return sum(
            collective_s(half, size, n, cluster, messages)
            for half in ("reduce_scatter", "all_gather")
        )
    g = min(n, cluster.gpus)
    m = -(-n // g)
    bytes_s = (g - 1) * size / g / cluster.inside.bytes_per_s
    bytes_s += size / g * (m - 1) / m / cluster.between.bytes_per_s
    hops_s = (g - 1) * cluster.inside.latency_s
    hops_s += math.ceil(math.log2(m)) * cluster.between.latency_s
    return bytes_s + messages * hops_s


def communication_s(P: int, stage: int, n: int, cluster: Cluster) -> float:
    """Return the seconds of a step's collectives; none on one process."""
    if n == 1:
        return 0.0
    parts = messages(P, stage)
    return sum(collective_s(op, size, n, cluster, parts) for op, size in volumes(P, stage).items())


def checkpoint_bytes(P: int, buffers: int) -> int:
    """Return the bytes of a checkpoint: weights, average, two moments, and the model's buffers."""
    return 4 * WIDTH * P + buffers


def export_bytes(P: int, buffers: int) -> int:
    """Return the bytes of an export: weights and average, each with the buffers."""
    return 2 * (WIDTH * P + buffers)


class Disk(NamedTuple):
    """Bytes a second: copied off the device, written and flushed, hashed, read."""

    copy: float
    write: float
    hash: float
    read: float


def save_s(P: int, buffers: int, n: int, disk: Disk) -> float:
    """Return the seconds that a checkpoint takes beside the training, its export included.

    Ranks hash side by side but share the disk; the first then writes the export alone, for which it
    reads and proves what the others wrote.
    """
    size = checkpoint_bytes(P, buffers)
    seconds = size / disk.write + size / n / disk.hash + export_bytes(P, buffers) / disk.write
    return seconds if n == 1 else seconds + size / disk.read + size / disk.hash


def interval_s(every_s: float, gap_s: float) -> float:
    """Return the seconds between checkpoints that fall due every `every_s` and keep a gap."""
    return every_s * max(1, math.ceil(gap_s / every_s))


def waited_s(P: int, buffers: int, n: int, disk: Disk, interval_s: float) -> float:
    """Return the seconds that training waits for a checkpoint, one every `interval_s`.

    It waits while a rank copies its part, and where the checkpoint before is not done yet.
    """
    copy = checkpoint_bytes(P, buffers) / n / disk.copy
    return copy + max(0.0, save_s(P, buffers, n, disk) - interval_s)
