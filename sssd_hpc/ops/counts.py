"""What every op must do at least: FLOPs and bytes, counted. The one place of these formulas.

They are those of docs/math.md, section 9, which derives them; a test compares the two. A
multiply-add is two FLOPs, every tensor moves once, everything but signals is float32 (twice the
bytes for float64). Legend: H features, N2 stored states, L samples, F = L // 2 + 1 nodes, B batch,
ch channels, C = H / 2 channels of a block, e bytes a number of the signals.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Cost(NamedTuple):
    """Operations and bytes of one call; a backend may well do more."""

    flops: float
    bytes: float

    def __add__(self, other: object) -> Cost:
        """Return the cost of both."""
        assert isinstance(other, Cost)
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: int) -> Cost:
        """Return the cost of `count` such calls."""
        return Cost(self.flops * count, self.bytes * count)


def frozen(H: int, N2: int, L: int, ch: int = 2, width: int = 4) -> Cost:
    """Kernel where only C trains: 4 products, the Woodbury factor is read."""
    F = L // 2 + 1
    numbers = 4 * ch * H * N2 + 2 * H * N2 + 2 * F + 2 * H * F + 2 * ch * H * F
    return Cost(H * N2 * F * (14 + 16 * ch), width * numbers)


def frozen_backward(H: int, N2: int, L: int, ch: int = 2, width: int = 4) -> Cost:
    """Its backward: the same sums the other way."""
    return frozen(H, N2, L, ch, width)


def general(H: int, N2: int, L: int, ch: int = 2, width: int = 4) -> Cost:
    """Kernel where everything trains: 6 products."""
    F = L // 2 + 1
    numbers = 4 * (ch + 1) * H * N2 + 2 * H * N2 + 2 * F + 2 * ch * H * F
    return Cost(H * N2 * F * (14 + 16 * (ch + 1)), width * numbers)


def general_backward(H: int, N2: int, L: int, ch: int = 2, width: int = 4) -> Cost:
    """Its backward, which needs the forward's sums again."""
    F = L // 2 + 1
    numbers = 8 * (ch + 1) * H * N2 + 4 * H * N2 + 2 * F + 2 * ch * H * F
    return Cost(H * N2 * F * (29 + 48 * (ch + 1)), width * numbers)


def cauchy(H: int, N2: int, F: int, width: int = 4) -> Cost:
    """Cauchy sum of H rows on F shared nodes."""
    return Cost(H * N2 * F * 26, width * (4 * H * N2 + 2 * F + 2 * H * F))


def cauchy_backward(H: int, N2: int, F: int, width: int = 4) -> Cost:
    """Its backward without the gradient of the nodes."""
    return Cost(H * N2 * F * 48, width * (8 * H * N2 + 2 * F + 2 * H * F))


def monarch(B: int, H: int, L: int, e: int = 4) -> Cost:
    """Convolution as matrix products on tensor cores, circle n = N1 M2."""
    n, N1, M2 = _circle(L)
    return Cost(B * H * (4 * n * (N1 + 2 * M2) + 9 * n), 2 * B * H * L * e + 8 * H * n)


def monarch_backward(B: int, H: int, L: int, e: int = 4) -> Cost:
    """Its backward: three transforms for two."""
    n, N1, M2 = _circle(L)
    return Cost(B * H * (6 * n * (N1 + 2 * M2) + 16 * n), 4 * B * H * L * e + 16 * H * n)


def composite(B: int, H: int, L: int) -> Cost:
    """Convolution by torch.fft on a circle of 2 L: the passes of its separate steps."""
    m = 2 * L
    return Cost(B * H * (5 * m * math.log2(m) + 3 * m), B * H * (9 * m + 3 * L) * 4)


def one_pass(B: int, H: int, L: int, e: int = 4) -> Cost:
    """Convolution by an FFT that reads the input once and writes the output once."""
    return Cost(composite(B, H, L).flops, 2 * B * H * L * e + 16 * H * L)


def one_pass_backward(B: int, H: int, L: int, e: int = 4) -> Cost:
    """Its backward: three transforms for two; reads u, dy and the kept value, writes du."""
    return Cost(1.5 * composite(B, H, L).flops, 4 * B * H * L * e + 32 * H * L)


def direct(B: int, H: int, L: int, e: int = 4) -> Cost:
    """Convolution as the sum itself, a product with a Toeplitz matrix."""
    return Cost(B * H * 2 * L**2, 2 * B * H * L * e + 8 * H * L)


def residual_norm(B: int, H: int, L: int, e: int = 4) -> Cost:
    """LayerNorm of a sum."""
    return Cost(9 * B * H * L, 3 * B * H * L * e + 8 * B * L)


def residual_norm_backward(B: int, H: int, L: int, e: int = 4) -> Cost:
    """Its backward."""
    return Cost(14 * B * H * L, 4 * B * H * L * e + 8 * B * L)


def gate(B: int, C: int, L: int, e: int = 4) -> Cost:
    """tanh times sigmoid, 2 C features in: bytes alone count."""
    return Cost(0, 3 * B * C * L * e)


def gate_backward(B: int, C: int, L: int, e: int = 4) -> Cost:
    """Its backward."""
    return Cost(0, 5 * B * C * L * e)


def residual_skip(B: int, C: int, L: int, e: int = 4) -> Cost:
    """Two linear layers C to C and the sums that they go into."""
    return Cost(4 * B * L * C**2, 5 * B * C * L * e + 8 * C**2)


def residual_skip_backward(B: int, C: int, L: int, e: int = 4) -> Cost:
    """Its backward: two products for one; reads both gradients and h, writes dh and dx."""
    return Cost(8 * B * L * C**2, 5 * B * C * L * e + 16 * C**2)


def linear(B: int, inputs: int, outputs: int, L: int, e: int = 4, taps: int = 1) -> Cost:
    """Linear layer over features, or a convolution of `taps` samples."""
    weights = taps * inputs * outputs
    return Cost(2 * B * L * weights, B * L * (inputs + outputs) * e + 4 * weights)


def linear_backward(B: int, inputs: int, outputs: int, L: int, e: int = 4, taps: int = 1) -> Cost:
    """Its backward: two products; reads the input and the gradient, writes the input's gradient."""
    weights = taps * inputs * outputs
    return Cost(4 * B * L * weights, B * L * (2 * inputs + outputs) * e + 8 * weights)


def block(B: int, C: int, N2: int, L: int, e: int = 4, kernels: bool = True) -> Cost:
    """One residual block forward; `kernels` says whether its two kernels are generated."""
    H = 2 * C
    layer = one_pass(B, H, L, e) + linear(B, H, H, L, e) + residual_norm(B, H, L, e)
    if kernels:
        layer += frozen(H, N2, L)
    ends = linear(B, C, H, L, e, taps=3) + gate(B, C, L, e) + residual_skip(B, C, L, e)
    return layer.times(2) + ends


def block_backward(B: int, C: int, N2: int, L: int, e: int = 4) -> Cost:
    """Its backward."""
    H = 2 * C
    layer = one_pass_backward(B, H, L, e) + linear_backward(B, H, H, L, e)
    layer += residual_norm_backward(B, H, L, e) + frozen_backward(H, N2, L)
    ends = linear_backward(B, C, H, L, e, taps=3) + gate_backward(B, C, L, e)
    return layer.times(2) + ends + residual_skip_backward(B, C, L, e)


def denoising_step(blocks: int, B: int, C: int, N2: int, L: int, e: int = 4) -> Cost:
    """The blocks of one denoising step with kept kernels; the thin ends are left out."""
    return block(B, C, N2, L, e, kernels=False).times(blocks)


def training_step(blocks: int, B: int, C: int, N2: int, L: int, e: int = 4) -> Cost:
    """The blocks of one training step, forward and backward; the optimizer is left out."""
    return (block(B, C, N2, L, e) + block_backward(B, C, N2, L, e)).times(blocks)


def _circle(L: int) -> tuple[int, int, int]:
    """Return n, N1 and M2 of docs/math.md, section 7: 32 rows, or fewer of a small circle."""
    n = 1 << max(2 * L - 1, 1).bit_length()
    rows = min(32, 1 << (n.bit_length() // 2))
    return n, rows, n // rows
