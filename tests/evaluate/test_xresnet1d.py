from __future__ import annotations

import pytest
import torch
from torch import nn

from sssd_hpc.evaluate.xresnet1d import Bottleneck, XResNet1d


def test_the_number_of_parameters_is_that_of_the_benchmarks_xresnet1d50() -> None:
    # Counted by hand from the published structure: a convolution without bias, then 2 for each
    # channel of its batch norm.
    def conv(num_in: int, num_out: int, kernel_size: int) -> int:
        return num_in * num_out * kernel_size + 2 * num_out

    stem = conv(12, 32, 5) + conv(32, 32, 5) + conv(32, 64, 5)
    first = conv(64, 64, 1) + conv(64, 64, 5) + conv(64, 256, 1) + conv(64, 256, 1)
    other = conv(256, 64, 1) + conv(64, 64, 5) + conv(64, 256, 1)
    head = 2 * 512 + 512 * 128 + 128 + 2 * 128 + 128 * 71 + 71
    expected = stem + first + (3 + 4 + 6 + 3 - 1) * other + head
    network = XResNet1d(num_outputs=71)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected == 962_503


def test_the_length_is_halved_five_times() -> None:
    network = XResNet1d().eval()
    with torch.no_grad():
        x = network.stem(torch.zeros(1, 12, 250))
        assert x.shape == (1, 64, 63)
        lengths = []
        for block in network.blocks:
            x = block(x)
            lengths.append(x.shape[-1])
    assert lengths == [63] * 3 + [32] * 4 + [16] * 6 + [8] * 3
    assert x.shape[1] == 256


@pytest.mark.parametrize("length", [1, 63, 250, 1001])
def test_any_length_gives_one_logit_a_label(length: int) -> None:
    network = XResNet1d(num_leads=8, num_outputs=3, num_blocks=(1, 1), width=8).eval()
    assert network(torch.randn(2, 8, length)).shape == (2, 3)
    assert network.features(torch.randn(2, 8, length)).shape == (2, 64)


@pytest.mark.parametrize(("num_in", "stride"), [(16, 1), (64, 1), (64, 2)])
def test_a_fresh_block_passes_its_shortcut_alone(num_in: int, stride: int) -> None:
    block = Bottleneck(num_in, 16, 5, stride)
    x = torch.randn(4, num_in, 31)
    torch.testing.assert_close(block(x), torch.relu(block.shortcut(x)), rtol=0, atol=0)


def test_a_strided_shortcut_averages_instead_of_dropping_samples() -> None:
    block = Bottleneck(64, 16, 5, 2).eval()
    x = torch.arange(5.0).expand(1, 64, 5).contiguous()
    assert block(x)[0, 0].tolist() == [0.5, 2.5, 4.0]


def test_every_parameter_learns_once_gamma_has_left_zero() -> None:
    network = XResNet1d(num_blocks=(1, 1), width=8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    x, y = torch.randn(8, 12, 100), torch.rand(8, 1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(network(x), y).backward()
        optimizer.step()
    dead = [name for name, p in network.named_parameters() if not p.grad.abs().sum() > 0]
    assert dead == []


def test_pooled_features_are_maxima_then_means() -> None:
    network = XResNet1d(num_blocks=(1,), width=8).eval()
    x = torch.randn(2, 12, 100)
    maps = network.blocks(network.stem(x))
    torch.testing.assert_close(network.features(x)[:, :32], maps.max(dim=2).values)
    torch.testing.assert_close(network.features(x)[:, 32:], maps.mean(dim=2))
