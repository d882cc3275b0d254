"""Peak resident memory of a process that does nothing but train, or nothing but sample.

    python -m bench.memory training|sampling BLOCKS CHANNELS N L BATCH [--checkpoint]

Prints GB (1e9 bytes) and the seconds of the last step. Sampling begins with an export on disk, as
the command does: the network that was trained never stands in this process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.model import MODES, NUM_LABELS, NUM_LEADS, NUM_STEPS, Size, Step, batch, build
from bench.timing import peak_gb


def train(size: Size, B: int, checkpoint: bool) -> float:
    """Take two training steps; return the seconds of the second."""
    model = build(size, "cpu")
    model.activation_checkpointing = checkpoint
    step = Step(model, batch(size, B, "cpu"), torch.randn(B, NUM_LEADS, size.L), MODES[0])
    step()
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def export(size: Size, path: Path) -> None:
    """Write a network to disk."""
    from sssd_hpc.model import save_export

    model = build(size, "cpu")
    metadata = {
        "leads": [str(i) for i in range(NUM_LEADS)],
        "labels": [f"label_{i}" for i in range(NUM_LABELS)],
        "rate_hz": 100,
        "length": size.L,
        "diffusion": {},
        "prediction": "epsilon",
        "scale_mv": 1.0,
        "label_dropout": 0.0,
        "samples_seen": 0,
    }
    save_export(path, model.config, model.state_dict(), model.state_dict(), metadata)


def sample(size: Size, B: int, path: Path) -> float:
    """Take two denoising steps from an export; return the seconds of the second."""
    from sssd_hpc.model import load_export

    sampler = load_export(path)[0].for_sampling(size.L, NUM_STEPS)
    given = batch(size, B, "cpu")
    with torch.no_grad():
        sampler(*given)
        begin = time.perf_counter()
        sampler(*given)
    return time.perf_counter() - begin


def main() -> None:
    """Run one of the two and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["training", "sampling", "export"])
    parser.add_argument("sizes", type=int, nargs=5)
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--export", type=Path)
    options = parser.parse_args()
    *numbers, B = options.sizes
    size = Size(*numbers)
    if options.what == "export":
        export(size, options.export)
        return
    if options.what == "training":
        seconds = train(size, B, options.checkpoint)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            command = [sys.executable, "-m", "bench.memory", "export", *map(str, options.sizes)]
            subprocess.run([*command, "--export", str(path)], check=True)
            seconds = sample(size, B, path)
    print(peak_gb(), seconds)


if __name__ == "__main__":
    main()
