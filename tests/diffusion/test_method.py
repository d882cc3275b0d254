"""Samplers by name, with options that fit each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.mixture import THREE
from sssd_hpc.diffusion import (
    NoiseSchedule,
    ancestral_sample,
    ddim_sample,
    dpmpp_sample,
    guided,
    plms_sample,
    split_sample,
)
from sssd_hpc.diffusion.method import Method, choose
from sssd_hpc.errors import UserError

SCHEDULE = NoiseSchedule.linear(num_steps=40, beta_end=0.1)
DENOISER = THREE.denoiser(SCHEDULE)
X_T = torch.randn(3, 1, 2, dtype=torch.float64)
LABELS = torch.ones(3, 1, dtype=torch.int64)
NOISE = torch.randn(40, 3, 1, 2, dtype=torch.float64)
INTERVAL = (0.3, 1.0)
WITHIN = SCHEDULE.steps_within(*INTERVAL)
GUIDED = guided(DENOISER, 2.0, WITHIN)
CASES: dict[str, tuple[dict[str, Any], Tensor]] = {
    "ddpm": ({}, ancestral_sample(GUIDED, X_T, LABELS, SCHEDULE, NOISE)),
    "ddim": (
        {"steps": 8, "eta": 0.5},
        ddim_sample(GUIDED, X_T, LABELS, SCHEDULE, steps=8, eta=0.5, noise=NOISE[:8]),
    ),
    "dpmpp": (
        {"steps": 8, "eta": 0.5},
        dpmpp_sample(GUIDED, X_T, LABELS, SCHEDULE, steps=8, eta=0.5, noise=NOISE[:8]),
    ),
    "plms": ({"steps": 8}, plms_sample(GUIDED, X_T, LABELS, SCHEDULE, steps=8)),
    "split": (
        {"steps": 8},
        split_sample(DENOISER, X_T, LABELS, SCHEDULE, steps=8, weight=2.0, interval=WITHIN),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_method_is_its_sampler_with_its_options(name: str) -> None:
    options, expected = CASES[name]
    method = choose(SCHEDULE, sampler=name, guidance=2.0, guidance_interval=INTERVAL, **options)
    got = method.draw(DENOISER, X_T, LABELS, SCHEDULE, NOISE.__getitem__)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_calls_is_never_more_than_told(name: str) -> None:
    asked = 0

    def denoiser(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return DENOISER(x_t, t, labels)

    for guidance in (0.0, 2.0):
        method, asked = choose(SCHEDULE, sampler=name, guidance=guidance), 0
        method.draw(denoiser, X_T, LABELS, SCHEDULE, NOISE.__getitem__)
        assert asked == method.num_calls(SCHEDULE)


def test_steps_default_to_the_samplers_own_or_to_what_the_schedule_has() -> None:
    steps = {name: choose(NoiseSchedule.linear(), sampler=name).steps for name in CASES}
    assert steps == {"ddpm": 200, "ddim": 50, "dpmpp": 20, "plms": 20, "split": 20}
    short = NoiseSchedule.linear(num_steps=32)
    assert choose(short, sampler="ddim").steps == 32
    assert choose(short, sampler="ddpm", steps=32) == Method(steps=32)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sampler": "euler"}, "--sampler is 'euler'; samplers are ddpm, ddim, dpmpp, plms, split"),
        ({"steps": 20}, "--steps is 20; ddpm takes all 40"),
        ({"sampler": "ddim", "steps": 0}, "--steps is 0; .* 1 to 40"),
        ({"sampler": "plms", "steps": 41}, "--steps is 41; .* 1 to 40"),
        ({"eta": 0.0}, "--eta is 0 but ddpm has no eta; leave it out or use ddim or dpmpp"),
        ({"sampler": "split", "eta": 0.0}, "--eta is 0 but split has no eta"),
        ({"sampler": "ddim", "eta": -0.5}, "--eta is -0.5; it must be in"),
        ({"sampler": "ddim", "eta": float("nan")}, "--eta is nan; it must be in"),
        ({"guidance": -1.0}, "--guidance is -1.0"),
        ({"guidance": float("inf")}, "--guidance is inf"),
        ({"guidance_interval": (0.1, 1.0)}, "--guidance is 0; give both or neither"),
        ({"guidance": 1.0, "guidance_interval": (1.0, 0.1)}, "interval is 1 0.1; .*LOW <= HIGH"),
        ({"guidance": 1.0, "guidance_interval": (-1.0, 0.1)}, "interval is -1 0.1"),
        ({"guidance": 1.0, "guidance_interval": (90.0, 99.0)}, "no step's noise level"),
        ({"guidance": 1.0, "guidance_interval": (0.0, float("nan"))}, "must be finite"),
    ],
)
def test_options_that_do_not_fit_are_one_clear_error(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        choose(SCHEDULE, **options)


def test_a_distilled_network_is_sampled_as_it_was_distilled() -> None:
    ddim = Method(sampler="ddim", steps=4)
    assert choose(SCHEDULE, distilled_steps=4) == ddim
    assert choose(SCHEDULE, distilled_steps=4, sampler="ddim", steps=4, eta=0.0) == ddim
    options: list[dict[str, Any]] = [{"sampler": "dpmpp"}, {"steps": 8}, {"eta": 0.5}]
    for given in options:
        with pytest.raises(UserError, match="distilled to sample by ddim in 4 steps"):
            choose(SCHEDULE, distilled_steps=4, **given)
