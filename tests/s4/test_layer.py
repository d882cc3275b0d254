"""The S4 layer: parity, lengths, what trains, its constants, autocast, the frozen copy."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from sssd_hpc.errors import UserError
from sssd_hpc.ops import bidirectional_conv, nplr_kernel
from sssd_hpc.s4 import KernelBank, S4Layer, hippo

PARITY = Path(__file__).parents[1] / "data" / "parity" / "s4layer_H32_N8_L100.npz"
kinds = pytest.mark.parametrize("kind", ["conj", "slow"])
KERNEL = {"conj": "conjugate", "slow": "half"}
PUBLIC = {
    "C": "s4_layer.kernel.kernel.C",
    "D": "s4_layer.D",
    "output.weight": "s4_layer.output_linear.weight",
    "output.bias": "s4_layer.output_linear.bias",
    "norm.weight": "norm_layer.weight",
    "norm.bias": "norm_layer.bias",
}


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(PARITY) as archive:
        return dict(archive)


def public_layer(arrays, kind: str, stored_nodes: bool = True) -> S4Layer:
    layer = S4Layer(
        d_model=32,
        d_state=8,
        lmax=100,
        kernel=KERNEL[kind],
        stored_nodes=stored_nodes,
    )
    state = {}
    for name, tensor in layer.state_dict().items():
        theirs = arrays["sd/" + PUBLIC.get(name, f"s4_layer.kernel.kernel.{name}")]
        state[name] = torch.tensor(theirs).reshape(tensor.shape)
    layer.load_state_dict(state)
    return layer


def small(**changes) -> S4Layer:
    return S4Layer(**{"d_model": 6, "d_state": 4, "lmax": 20, **changes})


@kinds
def test_layer_matches_the_public_code(arrays, kind):
    layer = public_layer(arrays, kind)
    u = torch.tensor(arrays["in/u"]).permute(1, 2, 0).requires_grad_()
    out = layer(u)
    np.testing.assert_allclose(
        out.detach().permute(2, 0, 1), arrays[f"{kind}/out"], rtol=1e-4, atol=2e-6
    )
    inner = layer.output(layer.mix(u)).detach()
    np.testing.assert_allclose(inner, arrays[f"{kind}/inner_s4_out_BHL"], rtol=1e-4, atol=2e-6)
    k = torch.tensor(arrays[f"{kind}/k"])
    assert (layer.kernel(100) - k).norm() < 1e-5 * k.norm()
    out.backward(torch.tensor(arrays["in/grad_out"]).permute(1, 2, 0))
    gradients = {PUBLIC[name]: p.grad for name, p in layer.named_parameters()}
    gradients["u"] = u.grad.permute(2, 0, 1)
    assert {f"{kind}/grad/{name}" for name in gradients} == {
        key for key in arrays if key.startswith(f"{kind}/grad/")
    }
    for name, gradient in gradients.items():
        theirs = torch.tensor(arrays[f"{kind}/grad/{name}"])
        error = gradient.reshape(theirs.shape) - theirs
        assert error.norm() < 1e-4 * theirs.norm(), name


@kinds
def test_shorter_input_matches_the_public_code(arrays, kind):
    layer = public_layer(arrays, kind)
    u = torch.tensor(arrays["in/u"]).permute(1, 2, 0)[..., :50]
    np.testing.assert_allclose(
        layer(u).detach().permute(2, 0, 1), arrays[f"{kind}/out_shorter"], rtol=1e-4, atol=2e-6
    )


@kinds
def test_exact_nodes_move_the_public_kernel_by_little(arrays, kind):
    exact = public_layer(arrays, kind, stored_nodes=False).kernel(100)
    theirs = torch.tensor(arrays[f"{kind}/k"])
    assert (exact - theirs).norm() < 2e-4 * theirs.norm()


@pytest.mark.parametrize("lmax", [1, 2, 19, 20])
@pytest.mark.parametrize("H", [1, 17])
def test_the_kernel_and_its_gradient_are_those_of_the_general_op(lmax, H):
    layer = small(d_model=H, lmax=lmax).double()
    weight = torch.randn(2, H, lmax, dtype=torch.float64)
    k = layer.kernel(lmax)
    (gradient,) = torch.autograd.grad((k * weight).sum(), layer.C)
    planes = (layer.w, layer.P, layer.Q, layer.B, layer.C)
    truth = nplr_kernel(
        *(torch.view_as_complex(plane) for plane in planes), layer.log_dt, lmax, "reference"
    )
    (true_gradient,) = torch.autograd.grad((truth * weight).sum(), layer.C)
    torch.testing.assert_close(k, truth, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-9, atol=1e-11)


def test_the_constants_follow_loaded_buffers_and_a_change_of_dtype():
    layer, other = small(), small()
    layer.kernel(20)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.kernel(20), other.kernel(20))
    layer.double()
    assert layer.kernel(20).dtype == torch.float64
    torch.testing.assert_close(layer.kernel(20).float(), other.kernel(20))


def test_the_constants_follow_a_buffer_that_is_written_in_place():
    layer = small()
    bank = KernelBank([layer])
    before = layer.kernel(20), bank(20)[0]
    assert torch.equal(*before)
    with torch.no_grad():
        layer.log_dt.add_(0.5)
    fresh = small()
    fresh.load_state_dict(layer.state_dict())
    for k in (layer.kernel(20), bank(20)[0]):
        assert torch.equal(k, fresh.kernel(20))
        assert not torch.equal(k, before[0])


def test_a_layer_first_used_in_inference_mode_still_trains():
    layer = small()
    x = torch.randn(1, 6, 20)
    with torch.inference_mode():
        expected = layer(x)
    y = layer(x)
    assert torch.equal(y, expected)
    y.square().mean().backward()
    assert layer.C.grad.any()


def test_a_fresh_c_is_complex_normal_and_corrected_for_lmax(monkeypatch):
    seen = {}

    def record(C, log_dt, L):
        seen.update(C=C, log_dt=log_dt, L=L)
        return 3 * C

    monkeypatch.setattr(hippo, "correct_length", record)
    layer = S4Layer(d_model=256, d_state=8, lmax=10)
    assert seen["L"] == 10
    assert torch.equal(seen["log_dt"], layer.log_dt)
    assert torch.equal(torch.view_as_complex(layer.C.detach()), 3 * seen["C"])
    # Unit variance in all, half of it in each plane; 2048 draws: four standard errors.
    for plane in (seen["C"].real, seen["C"].imag):
        assert plane.std().item() == pytest.approx(0.5**0.5, rel=4 / (2 * 2048) ** 0.5)


def test_only_c_and_d_of_the_state_space_train_and_the_constants_are_not_saved():
    layer = small()
    layer.kernel(20)
    trained = {name for name, _ in layer.named_parameters()}
    assert trained == {"C", "D", "output.weight", "output.bias", "norm.weight", "norm.bias"}
    assert layer.state_dict().keys() - trained == {"log_dt", "w", "P", "Q", "B"}
    assert not any(tensor.is_complex() for tensor in layer.state_dict().values())


def test_layer_is_post_norm_of_skip_plus_linear_of_gelu_of_convolution():
    layer = small().double()
    x = torch.randn(2, 6, 20, dtype=torch.float64)
    mixed = bidirectional_conv(x, layer.kernel(20), layer.D, "gelu", "reference")
    y = torch.einsum("oi,bil->bol", layer.output.weight[..., 0], mixed)
    y = x + y + layer.output.bias[:, None]
    centred = y - y.mean(1, keepdim=True)
    truth = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), truth, rtol=1e-10, atol=1e-10)


def test_fresh_weights_have_the_public_ranges():
    layer = S4Layer(d_model=256, d_state=4, lmax=10)
    assert layer.log_dt.exp().min() >= 1e-3
    assert layer.log_dt.exp().max() <= 1e-1
    assert layer.log_dt.std() > 1.0
    assert layer.output.weight.abs().max() <= 1 / 16
    assert layer.output.bias.abs().max() <= 1 / 16
    assert layer.D.std().item() == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("lmax", [20, 21])
def test_a_shorter_input_uses_the_head_of_the_kernel(lmax):
    layer = small(lmax=lmax)
    torch.testing.assert_close(layer.kernel(7), layer.kernel(lmax)[..., :7])
    assert layer(torch.randn(1, 6, 7)).shape == (1, 6, 7)
    assert layer(torch.randn(1, 6, lmax)).isfinite().all()


def test_a_longer_input_is_refused_and_changes_nothing():
    layer = small()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(UserError, match=r"model\.lmax .* is 20 but the input has 21 samples"):
        layer(torch.randn(1, 6, 21))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_kernel_stays_float32_under_autocast():
    layer = small()
    plain = layer.kernel(20)
    mixed = layer.mix(torch.ones(1, 6, 20))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.kernel(20), plain)
        assert torch.equal(layer.mix(torch.ones(1, 6, 20)), mixed)
        assert layer(torch.ones(1, 6, 20)).isfinite().all()


def test_a_kernel_cast_to_half_precision_is_refused():
    with pytest.raises(UserError, match=r"bfloat16; keep the model in float32"):
        small().bfloat16()(torch.ones(1, 6, 20, dtype=torch.bfloat16))


def test_a_frozen_layer_gives_the_same_output_and_fixes_its_length():
    layer = small()
    x = torch.randn(3, 6, 15)
    expected = layer(x)
    layer.freeze(15)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"for_sampling\(15\) but the input has 14"):
        layer(x[..., :14])
    with pytest.raises(UserError, match=r"for_sampling\(15\) and generates no other kernel"):
        layer.freeze(14)


def test_building_on_meta_takes_no_memory_and_loads():
    with torch.device("meta"):
        empty = small()
    full = small()
    empty.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(empty.kernel(20), full.kernel(20))
