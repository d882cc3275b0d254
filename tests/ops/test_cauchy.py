"""The Cauchy op against its sum written out."""

from __future__ import annotations

import pytest
import torch

from sssd_hpc.errors import UserError
from sssd_hpc.ops import cauchy


def draw(*shape: int, dtype: torch.dtype = torch.complex128) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_one_state_is_its_quotient_plus_the_conjugate_states(backend):
    v, z, w = torch.tensor([2 + 1j]), torch.tensor([3j, 1 + 1j]), torch.tensor([-1 + 2j])
    truth = (2 + 1j) / (z + 1 - 2j) + (2 - 1j) / (z + 1 + 2j)
    torch.testing.assert_close(cauchy(v, z, w, backend), truth)


@pytest.mark.parametrize("N2", [1, 4, 32])
@pytest.mark.parametrize("L", [1, 3, 63, 501])
def test_torch_equals_the_reference(N2, L):
    v, w, z = draw(3, 2, N2), draw(2, N2), draw(L)
    truth = cauchy(v, z, w, "reference")
    assert truth.shape == (3, 2, L)
    torch.testing.assert_close(cauchy(v, z, w, "torch"), truth, rtol=1e-12, atol=1e-12)


def test_float32_stays_finite_where_the_node_is_nearly_infinite():
    v, w = draw(4, dtype=torch.complex64), draw(4, dtype=torch.complex64)
    z = torch.tensor([1e16j, -8e5 + 2e4j], dtype=torch.complex64)
    truth = cauchy(v.to(torch.complex128), z.to(torch.complex128), w.to(torch.complex128))
    torch.testing.assert_close(
        cauchy(v, z, w, "torch").to(torch.complex128), truth, rtol=1e-4, atol=0
    )


def test_every_gradient_equals_the_references():
    leaves = [draw(2, 3), draw(5), draw(2, 3)]
    weight = draw(2, 5)

    def gradients(backend: str) -> tuple[torch.Tensor, ...]:
        copies = [leaf.clone().requires_grad_() for leaf in leaves]
        return torch.autograd.grad((cauchy(*copies, backend) * weight).sum().real, copies)

    for ours, truth in zip(gradients("torch"), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    leaves = [draw(2, 3).requires_grad_(), draw(4).requires_grad_(), draw(2, 3).requires_grad_()]
    assert torch.autograd.gradcheck(lambda v, z, w: cauchy(v, z, w, "torch"), leaves)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.ones(3), torch.ones(4), torch.ones(3)),
        (draw(3), draw(4), draw(2)),
        (draw(2, 3), draw(5, 4), draw(2, 3)),
        (torch.tensor(1j), draw(4), draw(2)),
    ],
    ids=["real", "states", "rows", "scalar"],
)
def test_inputs_that_do_not_fit_are_refused(arguments):
    with pytest.raises(UserError, match="cauchy: "):
        cauchy(*arguments)
