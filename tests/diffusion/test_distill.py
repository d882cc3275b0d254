from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sssd_hpc.diffusion import (
    Denoiser,
    NoiseSchedule,
    ddim_sample,
    distillation_loss,
    from_velocity,
    timesteps,
)
from sssd_hpc.diffusion.distill import Prediction

LABELS = torch.zeros(4, 1, dtype=torch.int64)


def schedule(**more: bool) -> NoiseSchedule:
    made = NoiseSchedule.linear(num_steps=21, beta_start=0.01, beta_end=0.3, **more)
    return NoiseSchedule(
        made.beta.double(), made.alpha.double(), made.alpha_bar.double(), made.sigma.double()
    )


def teacher(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """A network of no use but that depends on all that it is given."""
    return torch.tanh(x_t * (1.0 + 0.1 * t[:, None, None])) + 0.3


def drawn(steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(4) % steps
    return place, torch.randn(4, 2, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["epsilon", "velocity"])
@pytest.mark.parametrize("steps", [1, 3, 4, 10])
def test_a_student_that_answers_the_target_ends_where_two_steps_of_its_teacher_do(
    prediction: Prediction, steps: int
) -> None:
    """The walk of two steps and the answer are worked out here by scalars, a sample at a time."""
    process = schedule()
    place, eps = drawn(steps)
    x0 = 0.3 * drawn(steps, seed=1)[1]
    grid = [*timesteps(21, steps), -1]
    fine = [*timesteps(21, 2 * steps), -1]

    def at(t: int) -> tuple[float, float]:
        alpha_bar = process.alpha_bar_at(t)
        return math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)

    def walk(x: Tensor, k: int) -> Tensor:
        for t, after in zip(fine[2 * k : 2 * k + 2], fine[2 * k + 1 : 2 * k + 3], strict=True):
            output = teacher(x[None], torch.tensor([t]), LABELS[:1])[0]
            (s, n), (s_after, n_after) = at(t), at(after)
            if prediction == "velocity":
                x_0, noise = s * x - n * output, s * output + n * x
            else:
                x_0, noise = (x - n * output) / s, output
            x = s_after * x_0 + n_after * noise
        return x

    def perfect(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        answers = []
        for x, step in zip(x_t, t.tolist(), strict=True):
            k = grid.index(step)
            (s, n), (s_end, n_end) = at(step), at(grid[k + 1])
            x_0 = (walk(x, k) - n_end / n * x) / (s_end - n_end / n * s)
            noise = (x - s * x_0) / n
            answers.append(s * noise - n * x_0 if prediction == "velocity" else noise)
        return torch.stack(answers)

    given = (teacher, x0, LABELS, process)
    asked = {"steps": steps, "prediction": prediction, "drawn": (place, eps)}
    assert distillation_loss(perfect, *given, **asked) < 1e-20
    assert distillation_loss(teacher, *given, **asked) > 1e-6


def test_the_weight_is_the_truncated_signal_to_noise_ratio() -> None:
    process = schedule()
    place, eps = drawn(4)
    x0 = torch.zeros_like(eps)
    levels = torch.tensor(timesteps(21, 4))[place]
    snr = (process.alpha_bar / (1.0 - process.alpha_bar))[levels]

    def loss(offset: Tensor) -> Tensor:
        """Shift x0_hat of a velocity network by `offset`."""
        noise = (1.0 - process.alpha_bar[levels]).sqrt()[:, None, None]

        def student(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return x_t * 0.0 - offset / noise

        zero = lambda x_t, t, labels: torch.zeros_like(x_t)  # noqa: E731
        return distillation_loss(
            student,
            zero,
            x0,
            LABELS,
            process,
            steps=4,
            prediction="velocity",
            drawn=(place, 0.0 * eps),
        )

    # With a teacher of zeros and no noise every target is 0.
    found = loss(torch.ones(4, 1, 1, dtype=torch.float64))
    assert float(found) == pytest.approx(float(snr.clamp(min=1.0).mean()), rel=1e-12)
    assert bool((snr < 1.0).any())
    assert bool((snr > 1.0).any())


def test_a_network_that_is_exact_is_its_own_student() -> None:
    """Where all data are one point, x0_hat is it at every level: nothing is to be learned."""
    process, point = schedule(zero_terminal_snr=True), 0.7

    def exact(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        alpha_bar = process.alpha_bar[t][:, None, None]
        signal, noise = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
        return (signal * x_t - point) / noise

    place, eps = drawn(4)
    x0 = torch.full_like(eps, point)
    loss = distillation_loss(
        exact, exact, x0, LABELS, process, steps=4, prediction="velocity", drawn=(place, eps)
    )
    assert loss < 1e-20
    end = ddim_sample(from_velocity(exact, process), eps, LABELS, process, steps=4)
    assert torch.allclose(end, x0, atol=1e-12)


def test_the_gradient_reaches_the_student_alone() -> None:
    place, eps = drawn(2)
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def scaled(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return weight * x_t

    def frozen(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return 0.1 * x_t

    loss = distillation_loss(
        scaled, frozen, eps, LABELS, schedule(), steps=2, prediction="epsilon", drawn=(place, eps)
    )
    loss.backward()
    assert weight.grad is not None
    assert weight.grad != 0.0


def test_more_steps_than_the_teacher_can_take_are_refused() -> None:
    place, eps = drawn(4)
    with pytest.raises(ValueError, match="steps is 22"):
        distillation_loss(
            teacher,
            teacher,
            eps,
            LABELS,
            schedule(),
            steps=11,
            prediction="epsilon",
            drawn=(place, eps),
        )


def test_a_trained_student_ends_nearer_to_its_teachers_end_in_half_the_steps() -> None:
    """Data at -1 and 1; the student is the teacher and a sum of bumps that begin as 0."""
    process, spread = schedule(), 0.2

    def exact(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        alpha_bar = process.alpha_bar[t][:, None, None]
        signal, noise = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
        variance = alpha_bar * spread**2 + 1.0 - alpha_bar
        side = torch.tanh(signal * x_t / variance)
        x_0 = side + signal * spread**2 / variance * (x_t - signal * side)
        return (signal * x_t - x_0) / noise

    generator = torch.Generator().manual_seed(0)
    centres = torch.linspace(-4.0, 4.0, 61, dtype=torch.float64)
    more = torch.zeros(21, 61, dtype=torch.float64, requires_grad=True)

    def student(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        bumps = torch.exp(-((x_t[:, 0] - centres) / 0.15).square())
        return exact(x_t, t, labels) + (bumps * more[t]).sum(1)[:, None, None]

    def ends(network: Denoiser, steps: int) -> Tensor:
        x_T = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)[:, None, None]
        labels = torch.zeros(101, 1, dtype=torch.int64)
        return ddim_sample(from_velocity(network, process), x_T, labels, process, steps=steps)

    update = torch.optim.Adam([more], lr=0.02)
    for _ in range(200):
        side = torch.randint(2, (256, 1, 1), generator=generator).double() * 2.0 - 1.0
        noise = torch.randn(2, 256, 1, 1, generator=generator, dtype=torch.float64)
        place = torch.randint(3, (256,), generator=generator)
        loss = distillation_loss(
            student,
            exact,
            side + spread * noise[0],
            torch.zeros(256, 1, dtype=torch.int64),
            process,
            steps=3,
            prediction="velocity",
            drawn=(place, noise[1]),
        )
        update.zero_grad()
        loss.backward()
        update.step()

    def error(network: Denoiser, steps: int) -> float:
        return float((ends(network, steps) - ends(exact, 6)).square().mean().sqrt())

    assert error(student, 3) < 0.1 * error(exact, 3)
