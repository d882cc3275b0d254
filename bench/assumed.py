"""What `bench.scaling` assumes of machines that it has not run on. None of it is measured."""

from __future__ import annotations

from bench.cluster import Cluster, Device, Link

# Data sheets of the H100 and H200 (SXM), dense: half of the rate of matrix products is taken to be
# attained, a third of that of other float32 arithmetic, 60 % of memory's, 80 % of that of links.
TF32, BF16, FP32 = 494e12, 989e12, 67e12
H100_MEMORY, H200_MEMORY = 3.35e12, 4.8e12
MATRIX, VECTOR, MEMORY, LINK = 0.5, 1 / 3, 0.6, 0.8
LAUNCHES, LAUNCH_S = 60, 5e-6
"""Kernels of a block, forward and backward, and the host's time for one: no graphs."""


def gpu(matrix: float, memory: float, capacity: float) -> Device:
    """Return a GPU by its data sheet."""
    return Device(
        MATRIX * matrix, VECTOR * FP32, MEMORY * memory, LAUNCHES * LAUNCH_S, capacity * 1e9
    )


DEVICES = {
    "H100 tf32": (gpu(TF32, H100_MEMORY, 80), 4),
    "H100 bf16": (gpu(BF16, H100_MEMORY, 80), 2),
    "H200 bf16": (gpu(BF16, H200_MEMORY, 141), 2),
}
"""GPUs, and bytes a number of the signals."""
NVLINK = Link(3e-6, LINK * 450e9)
CLUSTERS = {
    "400 Gb/s a GPU": Cluster(8, NVLINK, Link(10e-6, LINK * 50e9)),
    "100 Gb/s a node": Cluster(8, NVLINK, Link(30e-6, LINK * 12.5e9 / 8)),
}
STORAGE = 1e9
"""Bytes a second that a cluster's file system takes from one run, or gives."""
PCIE = 20e9
"""Bytes a second from a GPU to the host."""
USABLE = 0.9
"""Share of a GPU's memory that tensors can fill."""
HEARTBEAT_S = 5.0
"""Seconds between heartbeats."""
