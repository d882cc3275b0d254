"""Kernel generation in Triton: every edge of its tiles, and on a GPU what only a GPU can show."""

from __future__ import annotations

import pytest
import torch

from sssd_hpc.ops import freeze, frozen_kernel, launch, nplr_kernel
from sssd_hpc.ops.nplr import plain
from sssd_hpc.ops.nplr import triton as ours
from sssd_hpc.ops.nplr.nodes import half_angles

GPU = torch.cuda.is_available()
# The interpreter takes CPU tensors; where kernels are compiled the same tests run on the GPU.
DEVICE = "cpu" if launch.interpreted() else "cuda"
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU")]


def draw(channels: int, H: int, N2: int, device: str = DEVICE) -> list[torch.Tensor]:
    """Stable parameters in double precision: w, P, Q, B, C, log_dt."""
    w = torch.complex(-0.5 - torch.rand(H, N2), 20 * torch.rand(H, N2).cumsum(1))
    P, B = torch.randn(2, H, N2, dtype=torch.complex128)
    Q = P.conj().resolve_conj()
    C = torch.randn(channels, H, N2, dtype=torch.complex128)
    log_dt = -3 - 3 * torch.rand(H, dtype=torch.float64)
    return [x.to(device) for x in (w.to(C.dtype), P, Q, B, C, log_dt)]


def planes(channels: int, H: int, N2: int, L: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Arguments of a backend's frozen forward."""
    options = {"device": DEVICE, "dtype": dtype}
    a, b = 0.1 * torch.randn(2, 2, channels, H, N2, **options)
    wr = -0.05 - 0.5 * torch.rand(H, N2, **options)
    wi = torch.randn(H, N2, **options)
    c, s = half_angles(L, dtype, torch.device(DEVICE))
    return [a, b, wr, wi, c, s, torch.randn(H, L // 2 + 1, 2, **options)]


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.detach().double().cpu() - truth.double().cpu()).norm() / truth.norm())


def kernel_and_gradients(
    parameters: list[torch.Tensor], L: int, backend: str
) -> list[torch.Tensor]:
    leaves = [p.clone().requires_grad_() for p in parameters]
    k = nplr_kernel(*leaves, L, backend)
    weight = torch.linspace(-1, 2, k.numel(), dtype=k.dtype, device=k.device).view_as(k).cos()
    return [k.detach(), *torch.autograd.grad((k * weight).sum(), leaves)]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("channels", "N2", "L"),
    [(1, 1, 1), (1, 8, 2), (2, 3, 66), (3, 3, 5), (3, 8, 33), (5, 2, 3), (2, 12, 65)],
)
def test_the_kernel_and_every_gradient_equal_the_textbooks(channels, N2, L):
    parameters = draw(channels, 2, N2)
    truth = kernel_and_gradients([p.cpu() for p in parameters], L, "reference")
    for x, y in zip(kernel_and_gradients(parameters, L, "triton"), truth, strict=True):
        assert (x.cpu() - y).norm() < 3e-12 * y.norm() + 1e-13


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("channels", "N2", "L"), [(1, 3, 1), (2, 20, 66), (3, 8, 33)])
def test_the_frozen_kernel_and_its_gradient_equal_the_textbooks(channels, N2, L):
    w, P, Q, B, C, log_dt = draw(channels, 2, N2)
    frozen = freeze(w, P, Q, B, log_dt, L, torch.float64)
    C_r = torch.view_as_real(C).clone().requires_grad_()
    k = frozen_kernel(C_r, frozen, "triton")
    weight = torch.linspace(-1, 2, k.numel(), dtype=k.dtype, device=k.device).view_as(k).cos()
    k.backward(weight)
    truth = kernel_and_gradients([p.cpu() for p in (w, P, Q, B, C, log_dt)], L, "reference")
    assert relative(k, truth[0]) < 1e-12
    assert relative(C_r.grad, torch.view_as_real(truth[5])) < 3e-12


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "general"])
def test_the_paper_size_errs_by_less_than_a_hundred_thousandth(frozen):
    *parameters, gamma = planes(3 - frozen, 2, 32, 1000, torch.float32)
    gamma = gamma if frozen else None
    g = torch.randn(2, 2, 501, 2, device=DEVICE)
    wide = [None if x is None else x.double().cpu() for x in (*parameters, gamma)]
    truth = plain.forward(*wide)
    assert relative(ours.forward(*parameters, gamma), truth) < 1e-5
    # The general gradient of such parameters passes through poles of gamma: compare with what
    # single precision costs in plain torch.
    narrow = [None if x is None else x.cpu() for x in (*parameters, gamma)]
    floors = plain.backward(g.cpu(), *narrow)
    made = ours.backward(g, *parameters, gamma)
    for x, floor, y in zip(made, floors, plain.backward(g.double().cpu(), *wide), strict=True):
        assert x.shape == y.shape
        assert not y.numel() or relative(x, y) < 2 * relative(floor, y) + 3e-6


@pytest.mark.usefixtures("small_tiles")
def test_rows_of_one_launch_do_not_touch_one_another():
    tensors = planes(2, 3, 5, 20, torch.float32)
    whole = ours.forward(*tensors)
    a, b, wr, wi, c, s, gamma = tensors
    for h in range(3):
        one = slice(h, h + 1)
        alone = ours.forward(
            a[:, :, one].contiguous(), b[:, :, one].contiguous(), wr[one], wi[one], c, s, gamma[one]
        )
        assert torch.equal(whole[:, one], alone)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "general"])
def test_outputs_are_dense_and_new(frozen):
    *parameters, gamma = planes(3 - frozen, 2, 3, 9, torch.float32)
    gamma = gamma if frozen else None
    k_f = ours.forward(*parameters, gamma)
    da, db, dwr, dwi = ours.backward(k_f, *parameters, gamma)
    assert all(x.is_contiguous() and x.isfinite().all() for x in (k_f, da, db, dwr, dwi))
    assert (da.shape, db.shape) == (parameters[0].shape, parameters[1].shape)
    assert dwr.shape == dwi.shape == ((0,) if frozen else (2, 3))


@pytest.mark.parametrize("channels", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_are_powers_of_two_and_their_sums_fit_the_registers(channels, dtype):
    words = dtype.itemsize // 4
    by_nodes = ours._by_nodes(channels, dtype)
    assert all(size & (size - 1) == 0 for size in by_nodes.values())
    nodes = by_nodes["NODES"] // launch.widened(1) // 32
    assert 8 * by_nodes["ROWS"] * nodes * words <= 128
    for frozen in (True, False):
        tile = ours._by_states(channels, 32, dtype, frozen)
        assert all(size & (size - 1) == 0 for size in tile.values())
        assert tile["STATES"] >= 4


class TestOnGpu:
    """What the interpreter cannot show."""

    pytestmark = on_gpu

    @pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "general"])
    def test_the_same_bits_come_twice(self, frozen):
        *parameters, gamma = planes(3 - frozen, 512, 32, 1000, torch.float32)
        gamma = gamma if frozen else None
        g = torch.randn(2, 512, 501, 2, device=DEVICE)
        runs = [
            (ours.forward(*parameters, gamma), *ours.backward(g, *parameters, gamma))
            for _ in range(2)
        ]
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))

    def test_a_captured_graph_follows_its_inputs(self):
        tensors = planes(2, 64, 32, 1000, torch.float32)
        g = torch.randn(2, 64, 501, 2, device=DEVICE)
        ours.backward(g, *tensors)
        ours.forward(*tensors)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            k_f = ours.forward(*tensors)
            da, _, _, _ = ours.backward(g, *tensors)
        tensors[0].mul_(2)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(k_f, ours.forward(*tensors))
        assert torch.equal(da, ours.backward(g, *tensors)[0])

    def test_more_rows_than_a_grid_axis_holds(self):
        tensors = planes(1, 70000, 2, 4, torch.float32)
        assert relative(ours.forward(*tensors), plain.forward(*tensors)) < 1e-5

    def test_addresses_pass_two_to_the_31(self):
        if torch.cuda.mem_get_info()[0] < 24 << 30:
            pytest.skip("less than 24 GiB of GPU memory free")
        tensors = planes(2, 1_100_000, 1, 1000, torch.float32)
        k_f = ours.forward(*tensors)
        assert k_f.numel() > 2**31
        a, b, wr, wi, c, s, gamma = tensors
        tail = (a[:, :, -4:], b[:, :, -4:], wr[-4:], wi[-4:], c, s, gamma[-4:])
        assert relative(k_f[:, -4:], plain.forward(*tail)) < 1e-5
