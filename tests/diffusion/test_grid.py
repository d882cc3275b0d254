"""The levels that samplers visit, and the weights with which multistep methods look back."""

from __future__ import annotations

import numpy as np
import pytest

from sssd_hpc.diffusion.grid import adams_bashforth, intervals, timesteps


@pytest.mark.parametrize("num_steps", [1, 2, 7, 32, 200])
def test_any_number_of_steps_begins_at_the_last_level_and_repeats_none(num_steps: int) -> None:
    for steps in range(1, num_steps + 1):
        grid = timesteps(num_steps, steps)
        assert len(grid) == steps
        assert grid[0] == num_steps - 1
        assert grid[-1] >= 0
        lengths = [t - after for t, after in intervals(grid)]
        # Even to the rounding of both ends, the step down to x_0 included.
        assert min(lengths) >= 1
        assert max(lengths) - min(lengths) <= 2
        assert sum(lengths) == num_steps
    assert timesteps(num_steps, num_steps) == list(range(num_steps - 1, -1, -1))


def test_known_grids() -> None:
    assert timesteps(200, 4) == [199, 149, 99, 49]
    assert timesteps(200, 1) == [199]
    assert timesteps(10, 4) == [9, 7, 4, 1]
    assert intervals([9, 4]) == [(9, 4), (4, -1)]


@pytest.mark.parametrize("steps", [-1, 0, 201])
def test_a_number_of_steps_that_no_schedule_has_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps is {steps}; .* 200 allows 1 to 200"):
        timesteps(200, steps)


def test_even_spacing_gives_the_textbooks_weights() -> None:
    assert adams_bashforth([5.0], 3.0) == [1.0]
    assert adams_bashforth([9.0, 14.0], 4.0) == pytest.approx([3 / 2, -1 / 2], rel=1e-13)
    assert adams_bashforth([9.0, 14.0, 19.0], 4.0) == pytest.approx(
        [23 / 12, -16 / 12, 5 / 12], rel=1e-12
    )
    quartic = [55 / 24, -59 / 24, 37 / 24, -9 / 24]
    assert adams_bashforth([9.0, 14.0, 19.0, 24.0], 4.0) == pytest.approx(quartic, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_uneven_weights_integrate_polynomials_exactly(order: int) -> None:
    nodes, end = [2.0, 2.7, 4.1, 4.6][:order], 1.1
    weights = adams_bashforth(nodes, end)
    for degree in range(order):
        mean = (end ** (degree + 1) - 2.0 ** (degree + 1)) / (degree + 1) / (end - 2.0)
        assert np.dot(weights, np.power(nodes, degree)) == pytest.approx(mean, rel=1e-11)
