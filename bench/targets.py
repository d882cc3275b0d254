"""What the measurements must show, as data; the report says which are met on which device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
Results = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """Which records of a suite are meant: all that agree in what is given."""

    suite: str
    op: str
    backend: str = ""
    """One backend, several separated by |, or "" for all but baselines."""
    dtype: str = ""
    shape: tuple[tuple[str, int], ...] = ()

    def find(self, results: Results) -> list[Record]:
        """Return the records meant."""
        records = results["suites"].get(self.suite, {}).get("records", [])
        return [entry for entry in records if self._matches(entry)]

    def _matches(self, entry: Record) -> bool:
        if self.backend:
            fits = entry["backend"] in self.backend.split("|")
        else:
            fits = entry["backend"] not in BASELINES
        fits = fits and entry["op"] == self.op and self.dtype in ("", entry["dtype"])
        return fits and all(entry["shape"].get(name) == size for name, size in self.shape)


@dataclass(frozen=True)
class Target:
    """A promise: the ratio of two times, or one number, against a bound.

    Of several records that a key finds the quickest counts, or the smallest peak.
    """

    device: str
    text: str
    ours: Key
    bound: float
    over: Key | None = None
    """What our time is divided into; without it our own number counts, at most `bound`."""
    field: str = "median_s"
    unit: str = "x"
    scale: float = 1.0

    def value(self, results: Results) -> float | None:
        """Return what was measured, None where it was not."""
        mine = _least(self.ours.find(results), self.field)
        if self.over is None or mine is None:
            return None if mine is None else mine * self.scale
        theirs = _least(self.over.find(results), self.field)
        return None if theirs is None else theirs / mine

    def met(self, value: float) -> bool:
        """Say whether a measured value keeps the promise."""
        return value >= self.bound if self.over else value <= self.bound


BASELINES = ("textbook", "keops textbook", "torch.fft", "torch.compile", "public form")

CENTRE = (("H", 512), ("N", 64), ("L", 1000))
_CONV = (("B", 64), ("H", 512), ("L", 1000))
_KERNEL = {"suite": "kernels", "dtype": "float32", "shape": CENTRE}


def _step(suite: str, B: int, dtype: str, backend: str = "") -> Key:
    op = suite.replace("_", " ")
    return Key(suite, op, backend, dtype, (("blocks", 36), ("B", B)))


TARGETS = [
    Target(
        "cpu",
        "kernel forward (H 512, N 64, L 1000), cpp against the textbook in complex64",
        Key(op="kernel", backend="cpp", **_KERNEL),  # type: ignore[arg-type]
        40,
        Key(op="kernel", backend="textbook", **_KERNEL),  # type: ignore[arg-type]
    ),
    Target(
        "cpu",
        "the same against KeOps, the quicker of its two forms",
        Key(op="kernel", backend="cpp", **_KERNEL),  # type: ignore[arg-type]
        5,
        Key(op="kernel", backend="keops|keops textbook", **_KERNEL),  # type: ignore[arg-type]
    ),
    Target(
        "cpu",
        "frozen kernel forward and backward, cpp against the textbook under autograd",
        Key(op="frozen kernel with gradients", backend="cpp", **_KERNEL),  # type: ignore[arg-type]
        20,
        Key(op="frozen kernel with gradients", backend="textbook", **_KERNEL),  # type: ignore[arg-type]
    ),
    Target(
        "cpu",
        "training step of the papers' network, batch 2, against the textbook",
        _step("training_step", 2, "float32"),
        6,
        _step("training_step", 2, "float32", "textbook"),
    ),
    Target(
        "cpu",
        "denoising step of the papers' network, batch 4, against the textbook",
        _step("denoising_step", 4, "float32"),
        6,
        _step("denoising_step", 4, "float32", "textbook"),
    ),
    Target(
        "cpu",
        "peak memory of training at batch 2, no checkpointing",
        Key("training_step", "training memory", "auto", shape=(("blocks", 36), ("B", 2))),
        5,
        field="peak_gb",
        unit=" GB",
    ),
    Target(
        "cpu",
        "peak memory of sampling at batch 4",
        Key("denoising_step", "sampling memory", "auto", shape=(("blocks", 36), ("B", 4))),
        2.5,
        field="peak_gb",
        unit=" GB",
    ),
    Target(
        "cuda",
        "frozen kernels of all 72 layers in one call",
        Key("kernels", "grouped kernels", "triton", "float32", (("layers", 72),)),
        1.5,
        unit=" ms",
        scale=1e3,
    ),
    Target(
        "cuda",
        "convolution at batch 64, float32, against torch.fft",
        Key("convolution", "convolution", "triton", "float32", _CONV),
        3,
        Key("convolution", "convolution", "torch.fft", "float32", _CONV),
    ),
    Target(
        "cuda",
        "convolution at batch 64, bfloat16 signals, against torch.fft",
        Key("convolution", "convolution", "triton", "bfloat16", _CONV),
        3,
        Key("convolution", "convolution", "torch.fft", "bfloat16", _CONV),
    ),
    Target(
        "cuda",
        "training step at batch 64, tf32 on both sides, against the textbook",
        _step("training_step", 64, "tf32"),
        3,
        _step("training_step", 64, "tf32", "textbook"),
    ),
    Target(
        "cuda",
        "training step at batch 64, bfloat16 autocast, against the textbook in tf32",
        _step("training_step", 64, "bfloat16"),
        4.5,
        _step("training_step", 64, "tf32", "textbook"),
    ),
    Target(
        "cuda",
        "denoising step at batch 256, the quickest precision",
        _step("denoising_step", 256, ""),
        110,
        unit=" ms",
        scale=1e3,
    ),
]


def _least(records: list[Record], field: str) -> float | None:
    return min((float(entry[field]) for entry in records), default=None)
