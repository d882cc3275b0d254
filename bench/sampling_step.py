"""One denoising step at the papers' size on this machine's processor, and the memory of sampling.

    python -m bench.sampling_step

Compared in one process: the copy that `for_sampling` makes, and the same network generating every
S4 kernel in the step by the textbook formula in complex64, as the public codes do. Both sum the
conjugate states; the public codes' fallback leaves them out and has half as many quotients to sum.
The memory is the peak resident size of a process that loads an export and takes steps.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from bench.timing import measure, record
from sssd_hpc.ecg.leads import EIGHT
from sssd_hpc.model import SSSDECG, load_export, save_export
from sssd_hpc.ops.nplr import reference
from sssd_hpc.s4 import S4Layer

BATCH, LENGTH, NUM_LABELS = 4, 1000, 71
MIN_SPEEDUP, MAX_PEAK_GB = 5.0, 2.5


class TextbookLayer(S4Layer):
    """An S4 layer whose kernel is generated in every step by the textbook formula."""

    def kernel(self, length: int) -> Tensor:
        """Generate the kernel in complex64."""
        planes = (self.w, self.P, self.Q, self.B, self.C)
        w, P, Q, B, C = (torch.view_as_complex(plane) for plane in planes)
        return reference.run(w, P, Q, B, C, self.log_dt, self.lmax, False)[..., :length]


def build() -> SSSDECG:
    """Return a model of the papers' size with weights in its head."""
    torch.manual_seed(0)
    model = SSSDECG(
        num_leads=len(EIGHT),
        num_labels=NUM_LABELS,
        num_blocks=36,
        channels=256,
        d_state=64,
        lmax=LENGTH,
    )
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return x_t, t and labels of one step."""
    labels = torch.zeros(BATCH, NUM_LABELS, dtype=torch.int64)
    return torch.randn(BATCH, len(EIGHT), LENGTH), torch.full((BATCH,), 100), labels


def peak_gb(export: Path) -> float:
    """Return the peak resident memory of a sampling process in GB (1e9 bytes)."""
    command = [sys.executable, "-m", "bench.sampling_step", str(export)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def sample(export: Path) -> None:
    """Take two steps as a sampling process does and print this process's peak memory."""
    sampler = load_export(export)[0].for_sampling(LENGTH)
    for _ in range(2):
        sampler(*inputs())
    # Not ru_maxrss, which begins at the size of the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9)


def main() -> int:
    """Measure, record, and return 1 if a promise is broken."""
    model, step = build(), inputs()
    metadata = {
        "leads": list(EIGHT),
        "labels": [f"label_{i}" for i in range(NUM_LABELS)],
        "rate_hz": 100,
        "length": LENGTH,
        "diffusion": {},
        "scale_mv": 1.0,
        "samples_seen": 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        export = Path(folder) / "model.safetensors"
        save_export(export, model.config, model.state_dict(), model.state_dict(), metadata)
        peak = peak_gb(export)
    sampler = model.for_sampling(LENGTH)
    with torch.no_grad():
        cached = measure(lambda: sampler(*step), repeats=5)
        for layer in model.modules():
            if isinstance(layer, S4Layer):
                layer.__class__ = TextbookLayer
        # A minute each: the first has nothing to warm up.
        outputs: list[Tensor] = []
        textbook = measure(lambda: outputs.append(model(*step)), repeats=2, warmup=0)
        error = (outputs[-1] - sampler(*step)).norm() / outputs[-1].norm()
    speedup = textbook["median_s"] / cached["median_s"]
    record(
        "sampling_step",
        {
            "size": "36 blocks, 256 channels, N=64, L=1000, batch 4, float32",
            "for_sampling": cached,
            "textbook_in_step": textbook,
            "speedup": round(speedup, 2),
            "relative_difference": float(error),
            "sampling_process_peak_gb": round(peak, 3),
        },
    )
    return int(speedup < MIN_SPEEDUP or peak >= MAX_PEAK_GB)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sample(Path(sys.argv[1]))
    else:
        sys.exit(main())
