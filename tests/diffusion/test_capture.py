"""CUDA graphs of a denoiser; on a CPU there is nothing to capture."""

from __future__ import annotations

import pytest
import torch

from sssd_hpc.diffusion import captured
from sssd_hpc.model import SSSDECG


def denoiser(x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return x_t * t[:, None, None] + labels.sum(1)[:, None, None]


def arguments(batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, 2, (batch, 3), device=device)
    return torch.randn(batch, 2, 5, device=device), torch.arange(batch, device=device), labels


def test_on_a_cpu_it_calls_the_denoiser():
    given = arguments(2, "cpu")
    assert torch.equal(captured(denoiser)(*given), denoiser(*given))


@pytest.mark.gpu
def test_replays_give_each_calls_own_result_for_every_shape():
    replay = captured(denoiser)
    given = [arguments(batch, "cuda") for batch in (2, 3, 2, 3, 2)]
    outputs = [replay(*call) for call in given]
    for call, output in zip(given, outputs, strict=True):
        assert torch.equal(output, denoiser(*call))


@pytest.mark.gpu
def test_replays_of_a_model_for_sampling_equal_its_calls():
    sizes = {"num_blocks": 2, "channels": 32, "d_state": 16, "lmax": 200, "label_dim": 8}
    model = SSSDECG(num_leads=8, num_labels=3, step_dims=(16, 32, 32), **sizes)
    # A fresh head gives zero.
    torch.nn.init.normal_(model.head.weight)
    model = model.cuda().for_sampling(200, num_steps=10)
    replay = captured(model)
    for batch in (2, 3, 2):
        x_t, t = torch.randn(batch, 8, 200, device="cuda"), torch.arange(batch, device="cuda")
        labels = torch.randint(0, 2, (batch, 3), device="cuda")
        with torch.no_grad():
            truth = model(x_t, t, labels)
        assert (replay(x_t, t, labels) - truth).norm() <= 1e-5 * truth.norm()
        assert truth.norm() > 0
