"""The samplers and the schedule against those of diffusers, an independent implementation."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.mixture import THREE
from sssd_hpc.diffusion import (
    Denoiser,
    NoiseSchedule,
    ddim_sample,
    dpmpp_sample,
    from_velocity,
    plms_sample,
)

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

# diffusers hands tensors to numpy in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULES = {
    "paper": NoiseSchedule.linear(),
    "tiny": NoiseSchedule.linear(num_steps=32, beta_start=0.002, beta_end=0.36),
}
# All divide the number of levels: elsewhere diffusers rounds the length of a step down.
CASES = [("paper", 4), ("paper", 8), ("paper", 20), ("tiny", 4), ("tiny", 8), ("tiny", 16)]
X_T = torch.randn(32, 1, 2, generator=torch.Generator().manual_seed(5))
LABELS = torch.tensor([[1], [0], [-1], [-1]] * 8)


def scheduler(name: str, kind: str, **options: Any) -> Any:
    """Return a scheduler of diffusers over the very constants of ours."""
    schedule = SCHEDULES[name]
    made = getattr(diffusers, kind)(
        num_train_timesteps=schedule.num_steps,
        trained_betas=schedule.beta.numpy(),
        timestep_spacing="trailing",
        **options,
    )
    made.alphas_cumprod = schedule.alpha_bar.clone()
    return made


def walk_of(
    oracle: Any, denoiser: Denoiser, steps: int, options: Mapping[str, Any] = MappingProxyType({})
) -> Tensor:
    """Return x at every network call and, last, x_0; noise in `options` is by step number."""
    oracle.set_timesteps(steps)
    xs = [X_T]
    for number, t in enumerate(oracle.timesteps, 1):
        now = {
            name: value[number % steps] if isinstance(value, Tensor) else value
            for name, value in options.items()
        }
        eps_hat = denoiser(xs[-1], torch.full((len(X_T),), int(t)), LABELS)
        xs.append(oracle.step(eps_hat, t, xs[-1], **now).prev_sample)
    return torch.stack(xs)


def our_walk(
    sampler: Any, name: str, denoiser: Denoiser, dtype: torch.dtype, **options: Any
) -> Tensor:
    xs = []

    def spy(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        xs.append(x_t)
        return denoiser(x_t, t, labels)

    x_0 = sampler(spy, X_T.to(dtype), LABELS, SCHEDULES[name], **options)
    return torch.stack([*xs, x_0])


def assert_equal_to_rounding(theirs: Tensor, ours: Tensor, exact: Tensor) -> None:
    """Compare at every call with float64, within twice our own float32 error and a floor.

    The floor is one rounding of the largest state a step, for where ours is right by luck.
    """
    assert theirs.shape == ours.shape == exact.shape
    own = (ours - exact).abs().max().item()
    floor = len(exact) * 2.0**-24 * exact.abs().max().item()
    assert (theirs - exact).abs().max().item() <= 2.0 * own + floor
    assert own <= 1e-5


@pytest.mark.parametrize(("name", "steps"), CASES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_equals_diffusers(name: str, steps: int, eta: float) -> None:
    denoiser = THREE.denoiser(SCHEDULES[name])
    noise = torch.randn(steps, *X_T.shape, generator=torch.Generator().manual_seed(6))
    theirs = walk_of(
        scheduler(name, "DDIMScheduler", clip_sample=False),
        denoiser,
        steps,
        {"eta": eta, "variance_noise": noise} if eta else {},
    )
    ours, exact = (
        our_walk(ddim_sample, name, denoiser, dtype, steps=steps, eta=eta, noise=noise.to(dtype))
        for dtype in (torch.float32, torch.float64)
    )
    assert_equal_to_rounding(theirs, ours, exact)


@pytest.mark.parametrize(("name", "steps"), CASES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpm_solver_equals_diffusers(name: str, steps: int, eta: float) -> None:
    denoiser = THREE.denoiser(SCHEDULES[name])
    noise = torch.randn(steps, *X_T.shape, generator=torch.Generator().manual_seed(6))
    oracle = scheduler(
        name,
        "DPMSolverMultistepScheduler",
        algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
    )
    theirs = walk_of(oracle, denoiser, steps, {"variance_noise": noise} if eta else {})
    ours, exact = (
        our_walk(dpmpp_sample, name, denoiser, dtype, steps=steps, eta=eta, noise=noise.to(dtype))
        for dtype in (torch.float32, torch.float64)
    )
    assert_equal_to_rounding(theirs, ours, exact)


@pytest.mark.parametrize(("name", "steps"), CASES)
def test_plms_equals_diffusers(name: str, steps: int) -> None:
    denoiser = THREE.denoiser(SCHEDULES[name])
    oracle = scheduler(name, "PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=True)
    theirs = walk_of(oracle, denoiser, steps)
    # diffusers counts levels, we count network calls: the first level takes two.
    ours, exact = (
        our_walk(plms_sample, name, denoiser, dtype, steps=steps + 1)
        for dtype in (torch.float32, torch.float64)
    )
    assert_equal_to_rounding(theirs, ours, exact)


@pytest.mark.parametrize("num_steps", [2, 32, 200])
def test_zero_terminal_snr_equals_diffusers(num_steps: int) -> None:
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    beta = NoiseSchedule.linear(num_steps=num_steps).beta.double()
    expected = rescale_zero_terminal_snr(beta)
    schedule = NoiseSchedule.linear(num_steps=num_steps, zero_terminal_snr=True)
    # alpha_bar, a float32, is the product of up to num_steps factors of relative error 2^-24.
    torch.testing.assert_close(
        schedule.beta.double(), expected, rtol=2.0**-23, atol=num_steps * 2.0**-24
    )
    product = (1.0 - expected).cumprod(0)
    torch.testing.assert_close(
        schedule.alpha_bar.double(), product, rtol=num_steps * 2.0**-23, atol=2.0**-23
    )
    assert schedule.alpha_bar[-1] == 0.0


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_ddim_from_pure_noise_equals_diffusers(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = NoiseSchedule.linear(zero_terminal_snr=True)
    monkeypatch.setitem(SCHEDULES, "zero", schedule)

    def network(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.tanh(2.0 * x_t) * (0.2 + t[:, None, None] / 200) + 0.1 * labels[:, None]

    oracle = scheduler("zero", "DDIMScheduler", clip_sample=False, prediction_type="v_prediction")
    theirs = walk_of(oracle, network, steps)[-1]
    denoiser = from_velocity(network, schedule)
    ours, exact = (
        ddim_sample(denoiser, X_T.to(dtype), LABELS, schedule, steps=steps)
        for dtype in (torch.float32, torch.float64)
    )
    assert_equal_to_rounding(theirs, ours, exact)
