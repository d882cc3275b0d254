"""docs/ops.md is true: its Python blocks run in textbook S4 code and change nothing there."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from sssd_hpc.ops import backends

PAGE = (Path(__file__).parents[1] / "docs" / "ops.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def run(word: str, **names: object) -> dict[str, object]:
    """Run the page's block that has a word, where these names are known."""
    (block,) = (block for block in BLOCKS if word in block)
    exec(block, names)
    return names


def pair_sum(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """The sum that a user's own code computes, every state with its conjugate."""
    v, w = (torch.cat([x, x.conj()], dim=-1)[..., None] for x in torch.broadcast_tensors(v, w))
    return (v / (z - w)).sum(-2)


def textbook(parameters: list[Tensor], L: int, cauchy_line: str = "") -> Tensor:
    """The kernel as the paper writes it, with nodes at the roots of unity."""
    w, P, Q, B, C, log_dt = parameters
    dt = log_dt.exp()
    omega = torch.exp(-2j * math.pi * torch.arange(L // 2 + 1, dtype=torch.float64) / L)
    z, w = 2 * (1 - omega) / (1 + omega), w * dt[:, None]
    v = torch.stack([B, P])[:, None] * torch.cat([C, Q[None]])
    r = run(cauchy_line, v=v, z=z, w=w)["r"] if cauchy_line else pair_sum(v, z, w)
    r = r * dt[:, None]
    k_f = r[0, :-1] - r[0, -1] * r[1, :-1] / (1 + r[1, -1])
    return torch.fft.irfft(k_f * 2 / (1 + omega), n=L)


def draw(H: int = 3, N2: int = 4, channels: int = 2) -> list[Tensor]:
    real = {"dtype": torch.float64}
    w = torch.complex(-0.5 - torch.rand(H, N2, **real), 40 * torch.rand(H, N2, **real))
    P, Q, B = torch.randn(3, H, N2, dtype=torch.complex128)
    C = torch.randn(channels, H, N2, dtype=torch.complex128)
    return [w, P, Q, B, C, -4 - 2 * torch.rand(H, **real)]


@pytest.mark.parametrize("backend", ["auto", "torch", "keops"])
@pytest.mark.parametrize("L", [10, 11])
def test_the_two_lines_change_nothing_in_textbook_code(monkeypatch, L, backend):
    if reason := backend != "auto" and backends.probe("cauchy", backend, "cpu"):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    monkeypatch.setenv(backends.VARIABLE, backend)
    results = []
    for line in ("", "r = cauchy(v, z, w)"):
        leaves = [p.requires_grad_() for p in draw_again()]
        k = textbook(leaves, L, line)
        gradients = torch.autograd.grad(k.square().sum(), leaves)
        results.append([k.detach(), *gradients])
    for own, ours in zip(*results, strict=True):
        assert (ours - own).norm() < 1e-9 * own.norm()


def draw_again() -> list[Tensor]:
    torch.manual_seed(0)
    return draw()


@pytest.mark.parametrize("word", ["nplr_kernel(", "frozen_kernel("])
@pytest.mark.parametrize("L", [10, 11])
def test_the_kernels_lines_give_the_textbooks_kernel(L, word):
    parameters = draw()
    names = dict(zip(("w", "P", "Q", "B", "C", "log_dt"), parameters, strict=True))
    truth = textbook(parameters, L)
    assert (run(word, **names, L=L)["k"] - truth).norm() < 1e-9 * truth.norm()


def test_the_convolutions_lines_give_the_sums_written_out():
    u, k, D = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(3)
    forward, both = D[:, None] * u, torch.zeros_like(u)
    for i in range(8):
        for j in range(8):
            if j <= i:
                forward[..., i] += k[0][:, i - j] * u[..., j]
            else:
                both[..., i] += k[1][:, j - i - 1] * u[..., j]
    names = run("bidirectional_conv(u, k, D)", u=u, k=k, D=D)
    torch.testing.assert_close(names["y"], gelu(forward + both), rtol=1e-5, atol=1e-5)
    names = run("activation=None", **names, torch=torch)
    torch.testing.assert_close(names["y_causal"], forward, rtol=1e-5, atol=1e-5)


def test_every_block_of_the_page_is_run_here():
    words = ("cauchy(v, z, w)", "nplr_kernel(", "frozen_kernel(", "(u, k, D)", "activation=None")
    assert len(BLOCKS) == len(words)
    assert all(any(word in block for word in words) for block in BLOCKS)


def test_the_page_names_the_backends_and_the_ops_as_they_are():
    table = PAGE[PAGE.index("## Backends") : PAGE.index("`backend=")]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == list(backends.FILES)
    printed = re.findall(r"^\S+ +op (\w+) \[(\w+)\] on cpu", PAGE, flags=re.MULTILINE)
    assert printed
    rows = {(op, name): not reason for op, name, _, reason in backends.report("cpu")}
    assert set(printed) <= set(rows)
    for wish in re.findall(r"^SSSD_HPC_BACKEND=(\S+)", PAGE, flags=re.MULTILINE):
        assert all(backends._wish(op, wish) in ("", *backends.FILES) for op in backends.OPS)
    order = {device: " ".join(names) for device, names in backends.AUTO_ORDER.items()}
    assert order == {"cpu": "cpp torch", "cuda": "triton torch"}
