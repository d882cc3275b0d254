"""The two-sided convolution against the sum over pairs of samples."""

from __future__ import annotations

import pytest
import torch

from sssd_hpc.errors import UserError
from sssd_hpc.ops import bidirectional_conv
from sssd_hpc.ops.fftconv.plain import circle

lengths = pytest.mark.parametrize("L", [1, 2, 3, 63, 64, 250])
activations = pytest.mark.parametrize("activation", ["gelu", None])


def draw(L: int, H: int = 3, batch: int = 2) -> list[torch.Tensor]:
    return [torch.randn(*shape, dtype=torch.float64) for shape in ((batch, H, L), (2, H, L), (H,))]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_an_impulse_reads_out_both_kernels_and_the_skip(backend):
    u = torch.zeros(1, 1, 5)
    u[..., 2] = 1.0
    k = torch.tensor([[[1.0, 2, 3, 4, 5]], [[10.0, 20, 30, 40, 50]]])
    y = bidirectional_conv(u, k, torch.tensor([100.0]), None, backend)
    # Backward lags -2, -1; then lag 0 with the skip; then forward lags 1, 2.
    torch.testing.assert_close(y, torch.tensor([[[20.0, 10, 101, 2, 3]]]))


@lengths
@activations
def test_torch_equals_the_sum_over_samples(L, activation):
    arguments = draw(L)
    ours = bidirectional_conv(*arguments, activation, "torch")
    truth = bidirectional_conv(*arguments, activation, "reference")
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-11)


@lengths
def test_float32_errs_by_less_than_a_millionth(L):
    arguments = draw(L)
    truth = bidirectional_conv(*arguments, None, "reference")
    ours = bidirectional_conv(*(a.float() for a in arguments), None, "torch")
    assert ours.dtype == torch.float32
    assert (ours - truth).norm() < 1e-6 * truth.norm()


@lengths
@activations
def test_every_gradient_equals_the_sums(L, activation):
    leaves = draw(L)
    weight = torch.randn_like(leaves[0])

    def gradients(backend: str) -> tuple[torch.Tensor, ...]:
        copies = [leaf.clone().requires_grad_() for leaf in leaves]
        return torch.autograd.grad(
            (bidirectional_conv(*copies, activation, backend) * weight).sum(), copies
        )

    ours = gradients("torch")
    for mine, truth in zip(ours, gradients("reference"), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-10)
    assert not ours[1][1, :, -1].any(), "lag -L reaches no output"


@activations
def test_gradcheck(activation):
    leaves = [leaf.requires_grad_() for leaf in draw(4, H=2)]
    assert torch.autograd.gradcheck(
        lambda u, k, D: bidirectional_conv(u, k, D, activation, "torch"), leaves
    )


def test_autocast_and_half_precision_input_compute_in_float32():
    u, k, D = (a.float() for a in draw(50))
    u = u.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = bidirectional_conv(u, k, D)
    assert y.dtype == torch.float32
    assert torch.equal(y, bidirectional_conv(u.float(), k, D))


def test_strided_input_gives_the_same_output():
    u, k, D = draw(20)
    strided = u.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(bidirectional_conv(strided, k, D), bidirectional_conv(u, k, D))


def test_the_circle_is_long_enough_and_easy_to_transform():
    for L in (1, 2, 37, 1000, 1023):
        n = circle(L)
        assert 2 * L - 1 <= n <= 2.2 * L + 8
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        assert rest == 1


@pytest.mark.parametrize(
    "shapes",
    [((2, 3), (2, 3, 4), (3,)), ((1, 3, 4), (1, 3, 4), (3,)), ((1, 3, 4), (2, 3, 4), (4,))],
    ids=["no-batch", "one-kernel", "D"],
)
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(UserError, match="do not fit"):
        bidirectional_conv(*(torch.zeros(*shape) for shape in shapes))


def test_an_unknown_activation_is_refused():
    with pytest.raises(UserError, match="'relu'"):
        bidirectional_conv(*draw(4), "relu")
