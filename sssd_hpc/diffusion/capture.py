"""A denoiser replayed as a CUDA graph: one launch a call in place of thousands."""

from __future__ import annotations

import torch
from torch import Tensor

from sssd_hpc.diffusion.denoiser import Denoiser

# Calls before the capture: libraries choose algorithms and take their workspaces in them.
WARMUP = 3


def captured(denoiser: Denoiser) -> Denoiser:
    """Return a denoiser that captures `denoiser` once per shape of its arguments and replays it.

    On a CPU it is `denoiser` itself. On a GPU the weights must stay where they are, nothing may
    require a gradient, and `denoiser` may not wait for the device.
    """
    graphs: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def replay(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        if x_t.device.type != "cuda":
            return denoiser(x_t, t, labels)
        arguments = (x_t, t, labels)
        key = tuple((a.shape, a.dtype, a.device) for a in arguments)
        if key not in graphs:
            graphs[key] = _capture(denoiser, arguments)
        graph, inputs, output = graphs[key]
        for mine, given in zip(inputs, arguments, strict=True):
            mine.copy_(given)
        graph.replay()
        # The next replay writes there again.
        return output.clone()

    return replay


@torch.no_grad()
def _capture(
    denoiser: Denoiser, arguments: tuple[Tensor, ...]
) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
    inputs = [a.clone() for a in arguments]
    device = inputs[0].device
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                denoiser(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, as NCCL's that watches a training run, may go on asking the device.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = denoiser(*inputs)
    return graph, inputs, output
