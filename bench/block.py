"""Suite `block`: the pointwise parts of a residual block, and one whole block.

The baselines are the separate operations of the public codes, with their permutes. Where a result
is a permuted view its dense copy is part of the time: whoever reads it next pays for that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d

from bench import textbook
from bench.cases import BOUNDS, Candidate, Comparison, Outcome
from bench.ceilings import matmul_precision
from bench.kernels import differentiated, usable_backends
from bench.textbook import TextbookBlock
from sssd_hpc.ops import counts, gate, pointwise, residual_norm, residual_skip
from sssd_hpc.ops.block import reference


def comparisons(device: str, quick: bool) -> Iterator[Comparison]:
    """Yield the parts, then the whole block, at the model's shape and a few batches."""
    C, L, N = (8, 64, 16) if quick else (256, 1000, 64)
    batches = (2,) if quick else ((8, 64) if device == "cuda" else (4, 16))
    dtypes = [torch.float32]
    if device == "cuda":
        dtypes.append(torch.bfloat16)
    for B in batches:
        for dtype in dtypes:
            yield from _parts(device, B, C, L, dtype)
    for B in batches[:1] if device == "cpu" else batches:
        for setting in ("highest", "high") if device == "cuda" else ("highest",):
            yield from _block(device, B, C, N, L, setting)


def _parts(device: str, B: int, C: int, L: int, dtype: torch.dtype) -> Iterator[Comparison]:
    H, e, name = 2 * C, dtype.itemsize, str(dtype).removeprefix("torch.")
    backends = usable_backends("block", device, dtype)

    def signal(features: int) -> Tensor:
        return torch.randn(B, features, L, device=device).type(dtype)

    def weights(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device) * math.sqrt(1 / shape[-1])

    def dense(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        norm = functools.partial(
            nn.functional.layer_norm,
            normalized_shape=(H,),
            weight=weight.to(dtype),
            bias=bias.to(dtype),
        )
        return textbook.residual_norm(x, y, norm, shift.to(dtype)).contiguous()

    def truth_skip(h: Tensor, x: Tensor, skips: Tensor, weight: Tensor, bias: Tensor) -> Outcome:
        return reference.residual_skip(h, x, skips, weight, bias)

    def separate(h: Tensor, x: Tensor, skips: Tensor, weight: Tensor, bias: Tensor) -> Outcome:
        weight, bias = weight.to(dtype), bias.to(dtype)
        res = conv1d(h, weight[:C, :, None], bias[:C])
        skip = conv1d(h, weight[C:, :, None], bias[C:])
        return (x + res) * 0.5**0.5, skips + skip

    norm_inputs = {
        "x": signal(H),
        "y": signal(H),
        "weight": 1 + weights(H),
        "bias": weights(H),
        "shift": torch.randn(B, H, device=device),
    }
    yield from _both(
        "residual_norm",
        {"B": B, "H": H, "L": L},
        name,
        norm_inputs,
        signal(H),
        counts.residual_norm(B, H, L, e),
        counts.residual_norm_backward(B, H, L, e),
        lambda x, y, weight, bias, shift: reference.residual_norm(x, y, weight, bias, shift, 1e-5),
        dense,
        {backend: functools.partial(residual_norm, backend=backend) for backend in backends},
    )
    yield from _both(
        "gate",
        {"B": B, "C": C, "L": L},
        name,
        {"h": signal(H)},
        signal(C),
        counts.gate(B, C, L, e),
        counts.gate_backward(B, C, L, e),
        reference.gate,
        textbook.gate,
        {backend: functools.partial(gate, backend=backend) for backend in backends},
    )
    skip_inputs = {
        "h": signal(C),
        "x": signal(C),
        "skips": signal(C),
        "weight": weights(H, C),
        "bias": weights(H),
    }
    yield from _both(
        "residual_skip",
        {"B": B, "C": C, "L": L},
        name,
        skip_inputs,
        (signal(C), signal(C)),
        counts.residual_skip(B, C, L, e),
        counts.residual_skip_backward(B, C, L, e),
        truth_skip,
        separate,
        {backend: functools.partial(residual_skip, backend=backend) for backend in backends},
        num_values=2,
    )
    yield from _both(
        "linear",
        {"B": B, "H": H, "L": L},
        name,
        {"x": signal(H), "weight": weights(H, H).to(dtype), "bias": weights(H).to(dtype)},
        signal(H),
        counts.linear(B, H, H, L, e),
        counts.linear_backward(B, H, H, L, e),
        lambda x, weight, bias: torch.einsum("oi,bil->bol", weight, x) + bias[:, None],
        lambda x, weight, bias: torch.einsum("oi,bil->bol", weight, x) + bias[:, None],
        {"torch": pointwise},
    )


def _both(
    op: str,
    shape: dict[str, int],
    dtype: str,
    inputs: dict[str, Tensor],
    cotangent: Tensor | Outcome,
    forward: counts.Cost,
    backward: counts.Cost,
    truth: Callable[..., Tensor | Outcome],
    baseline: Callable[..., Tensor | Outcome],
    ours: Mapping[str, Callable[..., Tensor | Outcome]],
    num_values: int = 1,
) -> Iterator[Comparison]:
    """Yield an op alone and with the gradients of all its inputs."""
    double = {key: value.double() for key, value in inputs.items()}
    given = (cotangent,) if isinstance(cotangent, Tensor) else cotangent
    wide = tuple(part.double() for part in given)
    for suffix, wanted, cost in (
        ("", (), forward),
        (" with gradients", tuple(inputs), forward + backward),
    ):
        yield Comparison(
            op + suffix,
            shape,
            dtype,
            cost,
            functools.partial(differentiated, truth, double, wanted, wide),
            [
                Candidate(
                    backend,
                    functools.partial(differentiated, way, inputs, wanted, cotangent),
                    BOUNDS["block"][dtype] if backend in ours else None,
                )
                for backend, way in {"public form": baseline, **ours}.items()
            ],
            num_values=num_values,
        )


def _block(device: str, B: int, C: int, N: int, L: int, setting: str) -> Iterator[Comparison]:
    """Yield one whole block with its two kernels generated; every backend as `auto` has it."""
    from sssd_hpc.model.sssd import Block

    ours = Block(C, 2 * C, C, {"d_state": N, "lmax": L}).to(device)
    public = TextbookBlock(ours)
    truth = TextbookBlock(ours).double()
    step, label = (torch.randn(B, width, device=device) for width in (2 * C, C))
    inputs = {"x": torch.randn(B, C, L, device=device)}
    skips = torch.zeros(B, C, L, device=device)
    cotangent = tuple(torch.randn(B, C, L, device=device) for _ in range(2))

    def by_ours(x: Tensor) -> Outcome:
        with matmul_precision(setting):
            return ours(x, skips, ours.step(step), ours.label(label))  # type: ignore[no-any-return]

    def by_public(x: Tensor) -> Outcome:
        with matmul_precision(setting):
            x_out, skip = public(x, step, label)
            return x_out, skips + skip

    def by_truth(x: Tensor) -> Outcome:
        return truth(x, step.double(), label.double())  # type: ignore[no-any-return]

    def trained(way: Callable[[Tensor], Outcome], block: nn.Module, x: Tensor) -> Outcome:
        x = x.detach().requires_grad_()
        values = way(x)
        g = tuple(part.to(x.dtype) for part in cotangent)
        leaves = [x, *block.parameters()]
        with matmul_precision(setting):
            gradients = torch.autograd.grad(values, leaves, g)
        return *(value.detach() for value in values), gradients[0]

    def once(way: Callable[[Tensor], Outcome], x: Tensor) -> Outcome:
        with torch.no_grad():
            return way(x)

    x, precision = inputs["x"], "tf32" if setting == "high" else "fp32"
    bound = BOUNDS["block"]["tf32" if setting == "high" else "float32"]
    shape = {"B": B, "C": C, "N": N, "L": L}
    forward = counts.block(B, C, N // 2, L)
    for op, cost, works in (
        (
            "block",
            forward,
            (
                functools.partial(once, by_truth, x.double()),
                functools.partial(once, by_public, x),
                functools.partial(once, by_ours, x),
            ),
        ),
        (
            "block with gradients",
            forward + counts.block_backward(B, C, N // 2, L),
            (
                functools.partial(trained, by_truth, truth, x.double()),
                functools.partial(trained, by_public, public, x),
                functools.partial(trained, by_ours, ours, x),
            ),
        ),
    ):
        yield Comparison(
            op,
            shape,
            "float32",
            cost,
            works[0],
            [
                Candidate("textbook", works[1], None, precision=precision),
                Candidate("auto", works[2], bound, precision=precision),
            ],
            num_values=2,
        )
