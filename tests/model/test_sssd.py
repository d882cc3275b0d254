"""The network: its size, its start, its door, its gradients, and the copy for sampling."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from sssd_hpc.errors import UserError
from sssd_hpc.model import SSSDECG
from sssd_hpc.model.embedding import StepEmbedding
from sssd_hpc.ops import frozen_kernel
from sssd_hpc.ops.nplr import reference
from sssd_hpc.s4 import bank as s4_bank
from sssd_hpc.s4 import layer as s4_layer

from .conftest import SMALL


def small(**changes) -> SSSDECG:
    model = SSSDECG(**{**SMALL, **changes})
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize(
    ("label_embedding", "num_labels", "count"),
    [
        ("sum", 71, 50_202_504),
        ("frozen", 1, 50_193_672),
        ("frozen", 40, 50_203_697),
        ("frozen", 71, 50_211_664),
        # A third row of 128 for each label.
        ("nle", 1, 50_193_672 + 128),
        ("nle", 71, 50_211_664 + 71 * 128),
    ],
)
def test_parameter_counts_are_the_public_ones(label_embedding, num_labels, count):
    with torch.device("meta"):
        model = SSSDECG(
            num_leads=8,
            num_labels=num_labels,
            num_blocks=36,
            channels=256,
            d_state=64,
            lmax=1000,
            label_embedding=label_embedding,
            stored_nodes=True,
        )
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in model.blocks[0].parameters()) == 1_383_168
    assert sum(b.numel() for b in model.buffers()) == 9_618_336


def oracle(model: SSSDECG, x, t, labels):
    """The network written out in float64 from its tensors, with the textbook kernel."""
    s = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def normed(name):
        g, v = (s[f"{name}.parametrizations.weight.original{i}"] for i in (0, 1))
        return g * v / v.square().sum((1, 2), keepdim=True).sqrt()

    def pointwise(name, h, weight=None):
        weight = normed(name) if weight is None else weight
        return torch.einsum("oc,bcl->bol", weight[..., 0], h) + s[f"{name}.bias"][:, None]

    def s4(name, h):
        planes = (s[f"{name}.{key}"] for key in ("w", "P", "Q", "B", "C"))
        complexes = (torch.view_as_complex(p) for p in planes)
        k = reference.run(*complexes, s[f"{name}.log_dt"], model.config["lmax"], False)
        y = s[f"{name}.D"][:, None] * h
        for i in range(h.shape[-1]):
            for j in range(h.shape[-1]):
                weight = k[0, :, i - j] if j <= i else k[1, :, j - i - 1]
                y[..., i] = y[..., i] + weight * h[..., j]
        y = h + pointwise(f"{name}.output", gelu(y), s[f"{name}.output.weight"])
        scale, shift = s[f"{name}.norm.weight"], s[f"{name}.norm.bias"]
        return layer_norm(y.transpose(1, 2), scale.shape, scale, shift).transpose(1, 2)

    def linear(name, h):
        return h @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    half = model.config["step_dims"][0] // 2
    frequency = torch.exp(torch.arange(half) * (-math.log(1e4) / (half - 1))).double()
    step = torch.cat([(t[:, None] * frequency).sin(), (t[:, None] * frequency).cos()], dim=1)
    for name in ("step_embedding.fc1", "step_embedding.fc2"):
        step = linear(name, step)
        step = step * step.sigmoid()
    rows = torch.stack([s["label_embedding.table"][range(3), row] for row in labels])
    label = torch.einsum("n,bnd->bd", s["label_embedding.fold.weight"][0, :, 0], rows)
    label = label + s["label_embedding.fold.bias"]

    h = pointwise("init_conv", x).clamp(min=0)
    skips = 0
    for i in range(model.config["num_blocks"]):
        name = f"blocks.{i}"
        u = h + linear(f"{name}.step", step)[..., None]
        padded = torch.nn.functional.pad(u, (1, 1)).unfold(2, 3, 1)
        u = torch.einsum("ock,bclk->bol", normed(f"{name}.conv"), padded)
        u = s4(f"{name}.s4_in", u + s[f"{name}.conv.bias"][:, None])
        u = s4(f"{name}.s4_out", u + linear(f"{name}.label", label)[..., None])
        channels = model.config["channels"]
        u = u[:, :channels].tanh() * u[:, channels:].sigmoid()
        h = (h + pointwise(f"{name}.res", u)) * math.sqrt(0.5)
        skips = skips + pointwise(f"{name}.skip", u)
    y = pointwise("skip_conv", skips / math.sqrt(model.config["num_blocks"])).clamp(min=0)
    return pointwise("head", y, s["head.weight"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lmax": 24, "d_state": 2, "channels": 3},
        {"lmax": 31, "num_blocks": 3},
        {"num_leads": 12},
    ],
    ids=["odd", "tiny-state", "longer-than-input", "twelve-leads"],
)
def test_network_equals_its_definition(changes, batch):
    _, t, labels = batch
    model = small(**changes).double()
    x = torch.randn(2, model.config["num_leads"], 24, dtype=torch.float64)
    truth = oracle(model, x, t, labels)
    torch.testing.assert_close(model(x, t, labels), truth, rtol=1e-8, atol=1e-9)
    single = model.float()(x.float(), t, labels)
    assert (single - truth).norm() < 1e-4 * truth.norm()


@pytest.mark.parametrize("label_embedding", ["nle", "sum", "frozen"])
def test_a_fresh_network_outputs_exactly_zero(label_embedding, batch):
    x, t, labels = batch
    model = SSSDECG(**SMALL, label_embedding=label_embedding)
    assert not model(x, t, labels.abs()).any()


def test_weight_norm_starts_at_the_plain_weights():
    model = small()
    conv = model.blocks[0].conv
    v = conv.parametrizations.weight.original1
    torch.testing.assert_close(conv.weight, v)
    assert conv.weight.abs().max() <= 1 / math.sqrt(3 * SMALL["channels"])


def test_only_the_last_residual_path_gets_no_gradient(small_model, batch):
    small_model(*batch).square().mean().backward()
    without = {name for name, p in small_model.named_parameters() if p.grad is None}
    prefix = "blocks.1.res."
    assert without == {name for name, _ in small_model.named_parameters() if prefix in name}


@pytest.mark.parametrize("label_embedding", ["nle", "sum"])
def test_changing_a_label_or_the_step_changes_the_output(label_embedding, batch):
    x, t, labels = batch
    model = small(label_embedding=label_embedding)
    out = model(x, t, labels)
    assert not torch.allclose(model(x, t + 1, labels), out)
    assert not torch.allclose(model(x, t, 1 - labels.abs()), out)


def test_bf16_autocast_keeps_float32_outside_the_linear_layers(batch):
    x, t, labels = batch
    model = small()
    truth = model(x, t, labels)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, labels)
    assert out.dtype == torch.float32
    assert (out - truth).norm() < 0.05 * truth.norm()
    out.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_checkpointed_activations_give_the_same_gradients(batch):
    model = small()
    model(*batch).square().mean().backward()
    kept = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.activation_checkpointing = True
    model(*batch).square().mean().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in kept)
        assert p.grad is None or torch.equal(p.grad, kept[name]), name


@pytest.mark.parametrize("num_steps", [0, 200])
@pytest.mark.parametrize("length", [24, 25])
def test_the_copy_for_sampling_gives_the_same_output(num_steps, length, batch):
    x, t, labels = batch
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = x[..., :length]
    expected = model(x, t, labels)
    sampler = model.for_sampling(length, num_steps)
    out = sampler(x, t, labels)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert not out.requires_grad
    assert not sampler.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    assert torch.equal(model(x, t, labels), expected)
    assert torch.equal(model.for_sampling(length, num_steps)(x, t, labels), out)


def test_the_copy_for_sampling_runs_under_autocast(batch):
    model = small()
    sampler = model.for_sampling(25, 200)
    with torch.autocast("cpu", torch.bfloat16):
        out = sampler(*batch)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, model(*batch), rtol=0.1, atol=0.1)


def test_steps_of_the_copy_for_sampling_generate_no_kernel_and_embed_no_step(batch, monkeypatch):
    model = small()
    sampler = model.for_sampling(25, 200)

    def forbidden(*_, **__):
        raise AssertionError("something was generated")

    monkeypatch.setattr(s4_layer, "nplr_kernel", forbidden)
    monkeypatch.setattr(s4_bank, "frozen_kernel", forbidden)
    monkeypatch.setattr(StepEmbedding, "forward", forbidden)
    monkeypatch.setattr(torch.nn.utils.parametrize.ParametrizationList, "forward", forbidden)
    sampler(*batch)
    with pytest.raises(AssertionError, match="generated"):
        model(*batch)


def test_all_kernels_come_from_one_call_and_are_those_of_the_layers(batch, monkeypatch):
    model = small()
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return frozen_kernel(*arguments)

    monkeypatch.setattr(s4_bank, "frozen_kernel", spy)
    kernels = model.kernels(25)
    assert len(calls) == 1
    assert len(kernels) == 2 * len(model.blocks)
    for layer, kernel in zip(model.kernels.layers, kernels, strict=True):
        torch.testing.assert_close(kernel, layer.kernel(25))


def test_the_kernels_follow_loaded_buffers_and_a_change_of_dtype(batch):
    model, other = small(), small()
    x, t, labels = batch
    model(x, t, labels)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x, t, labels), other(x, t, labels))
    model.blocks[0].s4_in.load_state_dict(small().blocks[0].s4_in.state_dict())
    torch.testing.assert_close(model.kernels(25)[0], model.blocks[0].s4_in.kernel(25))
    model.double()
    assert model(x.double(), t, labels).dtype == torch.float64


def test_the_copy_for_sampling_serves_one_length(small_model, batch):
    x, t, labels = batch
    with pytest.raises(UserError, match=r"model\.lmax .* 25 .* 26"):
        small_model.for_sampling(26)
    with pytest.raises(UserError, match=r"for_sampling\(20\)"):
        small_model.for_sampling(20)(x, t, labels)


def test_records_do_not_depend_on_their_batch(small_model, batch):
    x, t, labels = batch
    together = small_model(x, t, labels)
    alone = torch.cat([small_model(x[i : i + 1], t[i : i + 1], labels[i : i + 1]) for i in (0, 1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, torch.zeros(2, 12, 25), r"x_t has shape \(2, 12, 25\).*8"),
        (0, torch.zeros(8, 25), "x_t has shape"),
        (1, torch.zeros(2, 1, dtype=torch.int64), r"t is torch.int64 \(2, 1\)"),
        (1, torch.zeros(2), "t is torch.float32"),
        (2, torch.zeros(2, 3), "labels are torch.float32"),
        (2, torch.zeros(2, 4, dtype=torch.int64), r"labels .* \(2, 4\)"),
        (2, torch.full((2, 3), 2), "labels must be 1"),
        (2, torch.full((2, 3), -2), "labels must be 1"),
    ],
)
def test_the_door_names_what_does_not_fit(small_model, batch, position, value, words):
    arguments = list(batch)
    arguments[position] = value
    with pytest.raises(UserError, match=words):
        small_model(*arguments)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_labels", 0),
        ("d_state", 3),
        ("d_state", 2048),
        ("lmax", 0),
        ("step_dims", (7, 4, 4)),
    ],
)
def test_impossible_sizes_are_named(field, value):
    with pytest.raises(UserError, match=rf"model\.{field} is"):
        SSSDECG(**{**SMALL, field: value})
