"""The 1-D XResNet-50 that the PTB-XL benchmark and the paper use as their classifier.

It maps waveforms to logits; crops, standardisation and training belong to `classify`.

Sources of the structure:
- He et al., "Bag of Tricks for Image Classification with CNNs" (arXiv 1812.01187): stem of three
  convolutions (figure 2b, ResNet-C), stride in the middle convolution (ResNet-B), average pool
  before the 1x1 shortcut (ResNet-D), zero gamma in the last normalisation of a block (section 3.1).
- Strodthoff et al., "Deep Learning for ECG Analysis" (arXiv 2004.13701) and its public code
  `xresnet1d.py`, `basic_conv1d.py`, `fastai_model.py`: stem widths 32, 32, 64, kernel size 5, all
  four stages 64 wide (256 after expansion; an image network doubles them), 3-4-6-3 blocks,
  concatenated max and mean pool, head 512 -> 128 -> labels with dropout 0.25 and 0.5.
One known difference: that code resets every gamma to 1 just before training; here the zero stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

EXPANSION = 4
STEM_WIDTHS = (32, 32, 64)
HEAD_WIDTH = 128


def _conv(
    num_in: int,
    num_out: int,
    kernel_size: int,
    *,
    stride: int = 1,
    activation: bool = True,
    zero_gamma: bool = False,
) -> nn.Sequential:
    """Convolution without bias, batch norm, and ReLU unless told otherwise."""
    padding = (kernel_size - 1) // 2
    norm = nn.BatchNorm1d(num_out)
    if zero_gamma:
        nn.init.zeros_(norm.weight)
    layers: list[nn.Module] = [
        nn.Conv1d(num_in, num_out, kernel_size, stride=stride, padding=padding, bias=False),
        norm,
    ]
    return nn.Sequential(*layers, nn.ReLU()) if activation else nn.Sequential(*layers)


class Bottleneck(nn.Module):
    """ReLU(shortcut(x) + 1x1, kxk, 1x1 convolutions of x); a fresh block is ReLU(shortcut(x))."""

    def __init__(self, num_in: int, width: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        num_out = EXPANSION * width
        self.residual = nn.Sequential(
            _conv(num_in, width, 1),
            _conv(width, width, kernel_size, stride=stride),
            _conv(width, num_out, 1, activation=False, zero_gamma=True),
        )
        shortcut: list[nn.Module] = []
        if stride != 1:
            shortcut.append(nn.AvgPool1d(stride, ceil_mode=True))
        if num_in != num_out:
            shortcut.append(_conv(num_in, num_out, 1, activation=False))
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, num_in, L) to (B, 4 * width, ceil(L / stride))."""
        return torch.relu(self.shortcut(x) + self.residual(x))


class XResNet1d(nn.Module):
    """XResNet of bottleneck blocks for signals of any length (xresnet1d50 by default).

    Args:
        num_leads: input channels.
        num_outputs: logits, one for each label.
        num_blocks: blocks in each stage; every stage but the first halves the length.
        width: channels inside a block; a block puts out four times as many.
        kernel_size: of the stem and of the middle convolutions, odd.
    """

    def __init__(
        self,
        *,
        num_leads: int = 12,
        num_outputs: int = 1,
        num_blocks: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        kernel_size: int = 5,
    ) -> None:
        super().__init__()
        widths = (num_leads, *STEM_WIDTHS)
        self.stem = nn.Sequential(
            *(
                _conv(widths[i], widths[i + 1], kernel_size, stride=2 if i == 0 else 1)
                for i in range(len(STEM_WIDTHS))
            ),
            nn.MaxPool1d(3, stride=2, padding=1),
        )
        channels = STEM_WIDTHS[-1]
        blocks = []
        for stage, count in enumerate(num_blocks):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Bottleneck(channels, width, kernel_size, stride))
                channels = EXPANSION * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(
            nn.BatchNorm1d(2 * channels),
            nn.Dropout(0.25),
            nn.Linear(2 * channels, HEAD_WIDTH),
            nn.ReLU(),
            nn.BatchNorm1d(HEAD_WIDTH),
            nn.Dropout(0.5),
            nn.Linear(HEAD_WIDTH, num_outputs),
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> Tensor:
        """Return pooled features (B, 2 * 4 * width) of (B, num_leads, L): maxima, then means."""
        x = self.blocks(self.stem(x))
        return torch.cat([x.amax(dim=-1), x.mean(dim=-1)], dim=1)

    def penultimate(self, x: Tensor) -> Tensor:
        """Return what the last linear layer reads, (B, 128), of (B, num_leads, L)."""
        values: Tensor = self.head[:-1](self.features(x))
        return values

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_outputs) of (B, num_leads, L)."""
        logits: Tensor = self.head[-1](self.penultimate(x))
        return logits
