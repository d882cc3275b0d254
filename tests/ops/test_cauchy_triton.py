"""The Cauchy sum in Triton: every edge of its tiles, and on a GPU what only a GPU can show."""

from __future__ import annotations

import pytest
import torch

from sssd_hpc.ops import cauchy, launch
from sssd_hpc.ops.cauchy import plain
from sssd_hpc.ops.cauchy import triton as ours

GPU = torch.cuda.is_available()
# The interpreter takes CPU tensors; where kernels are compiled the same tests run on the GPU.
DEVICE = "cpu" if launch.interpreted() else "cuda"


def draw(R: int, N2: int, L: int, shared: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """Planes v, z, w: poles and nodes anywhere."""
    options = {"dtype": dtype, "device": DEVICE}
    z = torch.randn(1 if shared else R, L, 2, **options)
    return [torch.randn(R, N2, 2, **options), z, torch.randn(R, N2, 2, **options)]


def sum_and_gradients(planes: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
    leaves = [torch.view_as_complex(x).clone().requires_grad_() for x in planes]
    r = cauchy(*leaves, backend)
    turn = torch.linspace(-1, 2, r.numel(), dtype=planes[0].dtype, device=r.device).view_as(r)
    loss = (r * torch.polar(torch.ones_like(turn), turn)).real.sum()
    return [r.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("shared", [True, False], ids=["shared nodes", "own nodes"])
@pytest.mark.parametrize(("R", "N2", "L"), [(1, 1, 1), (2, 3, 2), (3, 8, 33), (2, 34, 9)])
def test_the_sum_and_every_gradient_equal_the_reference(R, N2, L, shared):
    planes = draw(R, N2, L, shared, torch.float64)
    truth = sum_and_gradients([x.cpu() for x in planes], "reference")
    for x, y in zip(sum_and_gradients(planes, "triton"), truth, strict=True):
        assert (x.cpu() - y).norm() < 1e-12 * y.norm()


def test_poles_of_a_kernel_err_by_less_than_a_hundred_thousandth():
    R, N2, L = 2, 32, 501
    w = torch.stack([-0.5 - torch.rand(R, N2), 100 * torch.rand(R, N2)], -1)
    z = torch.stack([torch.zeros(1, L), 100 * torch.rand(1, L)], -1)
    v, g = torch.randn(R, N2, 2), torch.randn(R, L, 2)
    v, z, w, g = (x.to(DEVICE) for x in (v, z, w, g))
    made = (ours.forward(v, z, w), *ours.backward(g, v, z, w, True))
    v, z, w, g = (x.double().cpu() for x in (v, z, w, g))
    truth = (plain.forward(v, z, w), *plain.backward(g, v, z, w, True))
    for x, y, bound in zip(made, truth, (1e-5, 3e-5, 3e-5, 3e-5), strict=True):
        assert x.is_contiguous()
        assert (x.cpu() - y).norm() < bound * y.norm()


@pytest.mark.parametrize("large", [1e16, 3e19])
def test_float32_stays_finite_and_right_beside_a_huge_node(large):
    v, z, w = draw(2, 4, 5, True, torch.float32)
    z[0, 0] = torch.tensor([0.0, large])
    g = torch.randn(2, 5, 2, device=DEVICE)
    made = (ours.forward(v, z, w), *ours.backward(g, v, z, w, True))
    v, z, w, g = (x.double() for x in (v, z, w, g))
    truth = (plain.forward(v, z, w), *plain.backward(g, v, z, w, True))
    for x, y in zip(made, truth, strict=True):
        assert (x - y).norm() < 1e-5 * y.norm()


@pytest.mark.parametrize("value", [1.0, 0.0, 1e30])
def test_nodes_past_the_end_meet_no_pole(value):
    # A pole where masked lanes could look for a node: their share must be 0, not 0 times infinity.
    v, z, w = draw(1, 3, 5, True, torch.float32)
    w[0, 0] = torch.tensor([value, 0.0])
    dv, dz, dw = ours.backward(torch.ones(1, 5, 2, device=DEVICE), v, z, w, True)
    assert dv.isfinite().all()
    assert dz.isfinite().all()
    assert dw.isfinite().all()


def test_the_gradient_of_the_nodes_is_left_out_on_wish():
    v, z, w = draw(2, 3, 4, False, torch.float32)
    g = torch.randn(2, 4, 2, device=DEVICE)
    dv, dz, dw = ours.backward(g, v, z, w, False)
    assert dz.shape == (0,)
    full = ours.backward(g, v, z, w, True)
    assert torch.equal(dv, full[0])
    assert torch.equal(dw, full[2])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU")
class TestOnGpu:
    """What the interpreter cannot show."""

    def test_the_same_bits_come_twice(self):
        v, z, w = draw(1024, 32, 1000, True, torch.float32)
        g = torch.randn(1024, 1000, 2, device=DEVICE)
        first = (ours.forward(v, z, w), *ours.backward(g, v, z, w, True))
        second = (ours.forward(v, z, w), *ours.backward(g, v, z, w, True))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))

    def test_a_captured_graph_follows_its_inputs(self):
        v, z, w = draw(8, 32, 1000, True, torch.float32)
        ours.forward(v, z, w)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            r = ours.forward(v, z, w)
        v.mul_(2)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(r, ours.forward(v, z, w))
