"""What the machine can do: copy bandwidth and the rate of large matrix products.

Measured at the start of every run, on the same threads as what is compared with them. A rate above
100 % of the copy bandwidth means that the data came from a cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from bench.timing import Clock, release


def measured(device: str, quick: bool) -> dict[str, float]:
    """Return copy_bytes_per_s and <dtype>_flops_per_s for every dtype that the device multiplies.

    The best of a few: a ceiling is what is possible, not what is usual.
    """
    cuda = device == "cuda"
    size = (1 << 22) if quick else (1 << 31 if cuda else 1 << 29)
    repeats = 2 if quick else 5
    clock = Clock(device)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(clock(lambda: target.copy_(source)) for _ in range(repeats))
    found = {"copy_bytes_per_s": 2 * size / best}
    del source, target
    side = 256 if quick else (8192 if cuda else 2048)
    for name, dtype, precision in _products(device):
        with matmul_precision(precision):
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            torch.mm(a, b)
            best = min(clock(lambda a=a, b=b: torch.mm(a, b)) for _ in range(repeats))  # type: ignore[misc]
        found[f"{name}_flops_per_s"] = 2 * side**3 / best
    release(device)
    return found


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Set how float32 matrix products are taken: "highest" is float32, "high" allows tf32.

    Convolutions of cuDNN follow, whose own default is tf32: both sides of a ratio must agree.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(name)
    torch.backends.cudnn.allow_tf32 = name != "highest"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _products(device: str) -> list[tuple[str, torch.dtype, str]]:
    products = [
        ("fp32", torch.float32, "highest"),
        ("fp64", torch.float64, "highest"),
        ("bf16", torch.bfloat16, "highest"),
    ]
    if device == "cuda":
        products.insert(1, ("tf32", torch.float32, "high"))
    return products
