"""The Cauchy op against its sum written out."""

from __future__ import annotations

import pytest
import torch

from sssd_hpc.errors import UserError
from sssd_hpc.ops import cauchy


def draw(*shape: int, dtype: torch.dtype = torch.complex128) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def test_one_state_is_its_quotient_plus_the_conjugate_states(backend):
    v, z, w = torch.tensor([2 + 1j]), torch.tensor([3j, 1 + 1j]), torch.tensor([-1 + 2j])
    truth = (2 + 1j) / (z + 1 - 2j) + (2 - 1j) / (z + 1 + 2j)
    torch.testing.assert_close(cauchy(v, z, w, backend), truth)
    torch.testing.assert_close(cauchy(v, z, w, "reference"), truth)


@pytest.mark.parametrize("N2", [1, 4, 32])
@pytest.mark.parametrize("L", [1, 3, 63, 130])
def test_double_precision_equals_the_reference(backend, N2, L):
    v, w, z = draw(3, 2, N2), draw(2, N2), draw(L)
    truth = cauchy(v, z, w, "reference")
    assert truth.shape == (3, 2, L)
    torch.testing.assert_close(cauchy(v, z, w, backend), truth, rtol=1e-12, atol=1e-12)


def test_single_precision_errs_by_less_than_a_hundred_thousandth(backend):
    # The sum of a kernel: poles left of the axis, nodes on it.
    w = torch.complex(-0.5 - torch.rand(3, 32), 100 * torch.rand(3, 32)).to(torch.complex128)
    z = (100j * torch.rand(130, dtype=torch.float64)).expand(3, -1)
    leaves = [x.requires_grad_() for x in (draw(3, 32), z, w)]
    weight = draw(3, 130)

    def run(dtype: torch.dtype, name: str) -> list[torch.Tensor]:
        r = cauchy(*(leaf.to(dtype) for leaf in leaves), name)
        return [r, *torch.autograd.grad((r * weight.to(dtype)).real.sum(), leaves)]

    pairs = zip(run(torch.complex64, backend), run(torch.complex128, "reference"), strict=True)
    for number, (ours, truth) in enumerate(pairs):
        assert (ours - truth).norm() < (3e-5 if number else 1e-5) * truth.norm()


@pytest.mark.parametrize("z_shape", [(5,), (1, 5), (2, 5), (3, 1, 5), (3, 2, 5)])
def test_nodes_of_any_leading_dimensions_broadcast(backend, z_shape):
    leaves = [draw(3, 2, 4), draw(*z_shape), draw(2, 4)]
    weight = draw(3, 2, 5)

    def both(name: str) -> list[torch.Tensor]:
        copies = [leaf.clone().requires_grad_() for leaf in leaves]
        r = cauchy(*copies, name)
        return [r.detach(), *torch.autograd.grad((r * weight).sum().real, copies)]

    for ours, truth in zip(both(backend), both("reference"), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_float32_stays_finite_where_the_node_is_nearly_infinite(backend):
    v, w = draw(4, dtype=torch.complex64), draw(4, dtype=torch.complex64)
    z = torch.tensor([1e16j, -8e5 + 2e4j], dtype=torch.complex64)

    def both(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (v, z, w)]
        r = cauchy(*leaves, name)
        return [r.detach(), *torch.autograd.grad(r.abs().sum(), (leaves[0], leaves[2]))]

    ours, truth = both(backend, torch.complex64), both("reference", torch.complex128)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.to(true.dtype), true, rtol=1e-4, atol=1e-30)


def test_gradcheck(backend):
    leaves = [draw(2, 3).requires_grad_(), draw(4).requires_grad_(), draw(2, 3).requires_grad_()]
    assert torch.autograd.gradcheck(lambda v, z, w: cauchy(v, z, w, backend), leaves)


def test_strided_and_conjugated_inputs_give_the_same_sum(backend):
    v, z, w = draw(4, 3), draw(5), draw(4, 3)
    truth = cauchy(v, z, w, backend)
    strided = (v.mT.contiguous().mT, z.repeat_interleave(2)[::2], w.conj().resolve_conj().conj())
    assert torch.equal(cauchy(*strided, backend), truth)


def test_a_value_that_is_not_finite_spoils_its_own_row_alone(backend):
    v, z, w = draw(3, 4), draw(5), draw(3, 4)
    clean = cauchy(v, z, w, backend)
    v[1, 2] = float("nan")
    spoiled = cauchy(v, z, w, backend)
    assert spoiled[1].isnan().all()
    assert torch.equal(spoiled[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("need_z", [False, True])
def test_the_registered_ops_pass_opcheck(opcheck, backend, need_z):
    v, z, w = torch.randn(3, 4, 2), torch.randn(1, 5, 2, requires_grad=need_z), torch.randn(3, 4, 2)
    v, w = v.requires_grad_(), w.requires_grad_()
    opcheck(torch.ops.sssd_hpc.cauchy, (v, z, w, backend))
    tensors = (t.detach() for t in (v, z, w))
    opcheck(torch.ops.sssd_hpc.cauchy_backward, (torch.randn(3, 5, 2), *tensors, need_z, backend))


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.ones(3), torch.ones(4), torch.ones(3)),
        (draw(3), draw(4), draw(2)),
        (draw(2, 3), draw(5, 4), draw(2, 3)),
        (torch.tensor(1j), draw(4), draw(2)),
        (draw(3, 0), draw(4), draw(3, 0)),
        (draw(3), draw(4).to("meta"), draw(3)),
    ],
    ids=["real", "states", "rows", "scalar", "no-state", "another-device"],
)
def test_inputs_that_do_not_fit_are_refused(arguments):
    with pytest.raises(UserError, match="cauchy: "):
        cauchy(*arguments)
