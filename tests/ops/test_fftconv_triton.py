"""The GPU convolution, form by form: in the interpreter, or on the device where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sssd_hpc.errors import UserError
from sssd_hpc.ops import launch
from sssd_hpc.ops.fftconv import butterfly, monarch, packing, reference, toeplitz
from sssd_hpc.ops.fftconv import triton as kernels
from sssd_hpc.ops.fftconv.packing import chunks, circle

# The interpreter takes CPU tensors; where kernels are compiled the same tests run on the GPU.
DEVICE = "cpu" if launch.interpreted() else "cuda"
# Relative norm; gradients may err by three times as much. The interpreter cuts bfloat16 off where
# a device rounds, so that what it writes errs twice as much.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def relative(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())


def draw(
    B: int, H: int, L: int, dtype: torch.dtype = torch.float32, walk: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return u, k, D and a gradient of y; rows are white noise or a random walk."""
    u, dy = torch.randn(2, B, H, L)
    if walk:
        u = u.cumsum(-1) / L**0.5
    k = torch.randn(2, H, L) * torch.exp(-torch.arange(L) / 60) / 8
    return u.to(DEVICE, dtype), k.to(DEVICE), torch.randn(H, device=DEVICE), dy.to(DEVICE, dtype)


def run(module, u, k, D, dy, activation: str) -> list[Tensor]:
    """Return y, du and the gradients of k and D, D behind k."""
    H, L = u.shape[1:]
    K = module.prepare(k, D)
    assert K.shape == module.spectrum_shape(H, L)
    y, pre = module.forward(u, K, activation, True)
    assert pre.shape == (u.shape if activation == "gelu" else (0,))
    du, dK = module.backward(dy, u, K, pre, activation)
    assert y.dtype == pre.dtype == du.dtype == u.dtype
    assert dK.shape == K.shape
    assert dK.dtype == K.dtype == torch.float32
    dk, dD = module.prepare_backward(dK, H, L)
    assert not dk[1, :, -1].any(), "lag -L reaches no output"
    return [y, du, torch.cat([dk.flatten(), dD])]


def truths(u, k, D, dy, activation: str) -> list[Tensor]:
    leaves = [x.double().requires_grad_() for x in (u, k, D)]
    y = reference.run(*leaves, activation if activation == "gelu" else None)
    du, dk, dD = torch.autograd.grad((y * dy.double()).sum(), leaves)
    return [y.detach(), du, torch.cat([dk.flatten(), dD])]


def assert_close(ours: list[Tensor], true: list[Tensor], bound: float) -> None:
    errors = [relative(a, b) for a, b in zip(ours, true, strict=True)]
    assert errors[0] < bound, errors
    assert max(errors) < 3 * bound, errors


@pytest.mark.parametrize("activation", ["gelu", "none"])
@pytest.mark.parametrize(
    ("B", "H", "L"),
    [
        (1, 2, 1),
        (2, 1, 2),
        (3, 1, 63),
        (2, 2, 64),
        (1, 1, 100),
        (2, 1, 250),
        (1, 1, 256),
        (3, 1, 257),
        (2, 1, 1000),
    ],
)
def test_butterflies_keep_single_precision(B, H, L, activation):
    case = draw(B, H, L)
    assert_close(run(kernels, *case, activation), truths(*case, activation), 1e-6)


@pytest.mark.parametrize(
    ("L", "dtype"), [(1500, torch.float32), (1100, torch.bfloat16), (2049, torch.float32)]
)
def test_the_longest_circles_are_transformed_by_butterflies(L, dtype, monkeypatch):
    monkeypatch.delattr(monarch, "forward")
    case = draw(1, 1, L, dtype)
    bound = {torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    assert_close(run(kernels, *case, "gelu"), truths(*case, "gelu"), bound)


@pytest.mark.parametrize("walk", [False, True], ids=["white", "walk"])
@pytest.mark.parametrize(
    ("B", "H", "L", "activation"),
    [
        (2, 2, 2, "none"),
        (3, 1, 63, "gelu"),
        (1, 2, 250, "none"),
        (2, 1, 256, "gelu"),
        (3, 2, 257, "gelu"),
        (3, 1, 1000, "gelu"),
    ],
)
def test_products_of_bfloat16_stay_within_their_bound(B, H, L, activation, walk, monkeypatch):
    monkeypatch.delattr(butterfly, "forward")
    case = draw(B, H, L, torch.bfloat16, walk)
    assert_close(run(kernels, *case, activation), truths(*case, activation), 2e-2)


@pytest.mark.parametrize("L", [200, 300])
@pytest.mark.parametrize(("form", "dtype"), [(butterfly, torch.float32), (monarch, torch.bfloat16)])
def test_the_backward_is_the_adjoint_for_any_spectrum(form, dtype, L):
    u, _, _, dy = draw(3, 2, L, dtype)
    # Not the spectrum of a real kernel: rows of a pair mix, and must do so in both directions.
    K = torch.randn(2, circle(L), 2, device=DEVICE) / circle(L)
    y, _ = form.forward(u, K, "none", False)
    du, dK = form.backward(dy, u, K, u.new_empty(0), "none")
    pairing = (y.double() * dy.double()).sum()
    size = y.double().norm() * dy.double().norm()
    bound = BOUNDS[dtype]
    assert (pairing - (du.double() * u.double()).sum()).abs() < bound * size
    assert (pairing - (dK.double() * K.double()).sum()).abs() < bound * size


@pytest.mark.parametrize("module", [kernels, toeplitz])
@pytest.mark.parametrize("L", [1, 2, 37])
def test_the_gradients_of_kernel_and_skip_are_the_adjoint_of_the_spectrum(module, L):
    _, k, D, _ = (x.double() for x in draw(1, 3, L))
    K = module.prepare(k, D)
    dK = torch.randn_like(K)
    dk, dD = module.prepare_backward(dK, 3, L)
    torch.testing.assert_close((K * dK).sum(), (k * dk).sum() + (D * dD).sum())


@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_batch_of_several_programs_adds_up_the_same_every_time(dtype, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 2)
    # Three pairs in two programs of two; the last pair has one row, and one is empty.
    case = draw(5, 1, 40, dtype)
    assert chunks(5) == (2, 2)
    first, second = (run(kernels, *case, "gelu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_close(first, truths(*case, "gelu"), BOUNDS[dtype])


def test_every_batch_is_shared_out_whole_with_little_waste():
    for batch in range(1, 300):
        programs, pairs = chunks(batch)
        assert pairs <= 8
        assert 0 <= 2 * programs * pairs - batch < 2 * programs


def test_nothing_is_kept_unless_wanted():
    u, k, D, _ = draw(1, 1, 5)
    K = kernels.prepare(k, D)
    assert kernels.forward(u, K, "gelu", False)[1].numel() == 0
    assert kernels.forward(u, K, "none", True)[1].numel() == 0


def test_more_samples_than_a_program_holds_are_refused():
    assert kernels.spectrum_shape(1, 4096) == (1, 8192, 2)
    with pytest.raises(UserError, match="4096 samples, not 4097"):
        kernels.prepare(torch.zeros(2, 1, 4097), torch.zeros(1))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("B", "H", "L", "activation"), [(2, 2, 1, "none"), (3, 2, 70, "gelu"), (1, 1, 130, "none")]
)
def test_the_toeplitz_product_equals_the_sum(B, H, L, activation, dtype):
    case = draw(B, H, L, dtype)
    bound = {torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    assert_close(run(toeplitz, *case, activation), truths(*case, activation), bound)


def test_the_second_term_of_the_taps_counts():
    # 1 and 1.00390625 are neighbours in bfloat16: what lies between is the second term's.
    taps = torch.full((1, 3), 1 + 2.0**-9, device=DEVICE)
    u = torch.tensor([[[256.0, -256.0]]], dtype=torch.bfloat16, device=DEVICE)
    taps[0, 1] = 1.0
    y, _ = toeplitz.forward(u, taps, "none", False)
    assert torch.equal(y, torch.tensor([[[-0.5, 0.5]]], dtype=torch.bfloat16, device=DEVICE))


class Recorder:
    """A kernel that only notes how it is launched."""

    def __init__(self) -> None:
        self.constants: dict[str, object] = {}

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *_, **constants: self.constants.update(constants)


@pytest.mark.parametrize(("allowed", "precision"), [("highest", "ieee"), ("high", "tf32")])
def test_the_toeplitz_product_rounds_single_precision_only_if_allowed(
    allowed, precision, monkeypatch
):
    recorder = Recorder()
    monkeypatch.setattr(toeplitz, "_kernel", recorder)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: allowed)
    u, taps = torch.ones(1, 1, 5, device=DEVICE), torch.ones(1, 9, device=DEVICE)
    toeplitz.forward(u, taps, "none", False)
    assert recorder.constants["PRECISION"] == precision


@pytest.mark.gpu
@pytest.mark.parametrize("walk", [False, True], ids=["white", "walk"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_device_agrees_with_the_sum(dtype, walk):
    for L in (63, 64, 250, 256, 257, 999, 1000, 1024, 2000, 4096):
        for B, H, activation in ((1, 1, "gelu"), (5, 3, "none"), (33, 2, "gelu")):
            case = draw(B, H, L, dtype, walk)
            first, second = (run(kernels, *case, activation) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            assert_close(first, truths(*case, activation), BOUNDS[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("walk", [False, True], ids=["white", "walk"])
@pytest.mark.parametrize("allowed", ["highest", "high"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_toeplitz_product_agrees_on_the_device(dtype, allowed, walk, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: allowed)
    case = draw(33, 3, 1000, dtype, walk)
    strict = 1e-6 if allowed == "highest" else 3e-3
    bound = strict if dtype == torch.float32 else 5e-3
    assert_close(run(toeplitz, *case, "gelu"), truths(*case, "gelu"), bound)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_device_replays_a_captured_convolution(dtype):
    case = draw(6, 5, 1000, dtype)
    eager = run(kernels, *case, "gelu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, pre = kernels.forward(case[0], kernels.prepare(case[1], case[2]), "gelu", True)
    y.zero_()
    graph.replay()
    assert torch.equal(y, eager[0])
    assert torch.isfinite(pre).all()
