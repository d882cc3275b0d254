"""The models against the public codes' arrays: outputs, gradients, whole trajectories."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from sssd_hpc.diffusion import NoiseSchedule, ancestral_sample
from sssd_hpc.model import SSSDECG, load_reference
from sssd_hpc.model.embedding import sinusoids
from sssd_hpc.model.reference import public_name

models = pytest.mark.parametrize("name", ["small_ecg", "small_nle", "small_nle_binary"])
kernels = pytest.mark.parametrize("kind", ["conj", "slow"])
KERNEL = {"conj": "conjugate", "slow": "half"}
# The arrays' float64 runs keep constants rounded to float32 (their step frequencies, for one).
FLOAT64_BOUND = 2e-7


def state_of(arrays) -> dict[str, np.ndarray]:
    return {key[3:]: value for key, value in arrays.items() if key.startswith("sd/")}


def load(arrays, kind: str, nodes: str = "checkpoint") -> SSSDECG:
    return load_reference(state_of(arrays), kernel=KERNEL[kind], nodes=nodes)


def inputs(arrays) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, t, labels = (torch.tensor(arrays[f"in/{name}"]) for name in ("x", "step", "label"))
    return x, t[:, 0], labels


def relative(ours: torch.Tensor, theirs: np.ndarray) -> float:
    truth = torch.tensor(theirs, dtype=torch.float64)
    return float((ours.double().reshape(truth.shape) - truth).norm() / truth.norm())


def public_gradients(model: SSSDECG, arrays) -> dict[str, torch.Tensor | None]:
    """Gradients by the names that the arrays have."""
    state = {
        re.sub("weight_g$", "parametrizations.weight.original0", k): 0 for k in state_of(arrays)
    }
    gradients: dict[str, torch.Tensor | None] = {}
    for name, parameter in model.named_parameters():
        if name == "label_embedding.table" and "embedding.weight" not in state:
            for label, gradient in enumerate(parameter.grad):
                gradients[f"label_embedding.{label}.weight"] = gradient
            continue
        key = public_name(name, state)
        if "embedding.weight" in state:
            key = re.sub(r"parametrizations\.weight\.original0", "weight_g", key)
            key = re.sub(r"parametrizations\.weight\.original1", "weight_v", key)
        gradients[key] = parameter.grad
    return gradients


@models
@kernels
def test_outputs_match_the_public_code_in_float32(parity, name, kind):
    arrays = parity(name)
    with torch.no_grad():
        out = load(arrays, kind)(*inputs(arrays))
    np.testing.assert_allclose(out, arrays[f"{kind}/out"], rtol=1e-4, atol=2e-6)


@models
@kernels
def test_outputs_match_the_public_code_in_float64(parity, name, kind):
    arrays = parity(name)
    x, t, labels = inputs(arrays)
    with torch.no_grad():
        out = load(arrays, kind).double()(x.double(), t, labels)
    assert relative(out, arrays[f"{kind}/out64"]) < FLOAT64_BOUND


@models
@kernels
def test_outputs_with_exact_nodes_stay_close(parity, name, kind):
    arrays = parity(name)
    with torch.no_grad():
        out = load(arrays, kind, nodes="exact")(*inputs(arrays))
    assert relative(out, arrays[f"{kind}/out"]) < 2e-4


@models
@kernels
@pytest.mark.parametrize(
    ("suffix", "bound"), [("", 1e-4), ("64", FLOAT64_BOUND)], ids=["f32", "f64"]
)
def test_every_gradient_matches_the_public_code(parity, name, kind, suffix, bound):
    arrays = parity(name)
    x, t, labels = inputs(arrays)
    target = torch.tensor(arrays["in/target"])
    model = load(arrays, kind)
    if suffix:
        model, x, target = model.double(), x.double(), target.double()
    loss = (model(x, t, labels) - target).square().mean()
    loss.backward()
    if not suffix:
        np.testing.assert_allclose(loss.item(), arrays[f"{kind}/loss"], rtol=1e-5)
    prefix = f"{kind}/grad{suffix}/"
    theirs = {key.removeprefix(prefix): value for key, value in arrays.items() if prefix in key}
    ours = public_gradients(model, arrays)
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        if theirs[key].size == 0:
            assert gradient is None, key
        elif not theirs[key].any():
            assert not gradient.any(), key
        else:
            assert relative(gradient, theirs[key]) < bound, key


@kernels
def test_sampling_trajectory_matches_the_public_code(parity, kind):
    arrays = parity("ddpm_ecg_T10")
    model = load(arrays, kind).for_sampling(100)
    noise, labels = torch.tensor(arrays["in/noise"]), torch.tensor(arrays["in/label"])
    seen, estimates = [], []

    def denoiser(x_t, t, labels):
        eps_hat = model(x_t, t, labels)
        seen.append(x_t)
        estimates.append(eps_hat)
        return eps_hat

    schedule = NoiseSchedule.linear(num_steps=10, beta_start=1e-4, beta_end=0.02)
    x0 = ancestral_sample(denoiser, noise[0], labels, schedule, noise=noise)
    np.testing.assert_allclose(torch.stack(estimates), arrays[f"{kind}/eps"], rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(
        torch.stack([*seen, x0]), arrays[f"{kind}/x_t"], rtol=1e-4, atol=2e-6
    )
    np.testing.assert_allclose(x0, arrays[f"{kind}/x0"], rtol=1e-4, atol=2e-6)


def test_step_embedding_matches_the_public_code(parity):
    ours = sinusoids(torch.arange(200), 128)
    np.testing.assert_allclose(ours, parity("misc")["step_embedding_0_199"], rtol=0, atol=1e-7)
