"""Which noise levels a sampler visits, and the weights with which it looks back on them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def timesteps(num_steps: int, steps: int) -> list[int]:
    """Return `steps` of the levels num_steps - 1 .. 0, descending and evenly spaced: "trailing".

    The first is always the last level of the schedule, which is what pure noise stands for: where
    it is left out ("leading"), sampling starts with noise that the network was told is less. The
    last step, down to x_0 (t = -1), is as long as the others. Ties round to even.

    Source: Lin et al., Common diffusion noise schedules and sample steps are flawed
    (arXiv 2305.08891), section 3.3.

    Raises:
        ValueError: not 1 <= steps <= num_steps.
    """
    if not 1 <= steps <= num_steps:
        raise ValueError(f"steps is {steps}; a schedule of {num_steps} allows 1 to {num_steps}")
    return [round(Fraction(num_steps * left, steps)) - 1 for left in range(steps, 0, -1)]


def intervals(grid: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs (t, next t) of a walk over `grid`, the last of them down to x_0, t = -1."""
    return list(zip(grid, [*grid[1:], -1], strict=True))


def adams_bashforth(nodes: Sequence[float], end: float) -> list[float]:
    """Return the weights of f(nodes) in the mean of f from nodes[0] to `end`, by extrapolation.

    `nodes` holds the newest first. The weights integrate polynomials up to degree len(nodes) - 1
    exactly; for even spacing they are the textbook's, such as (55, -59, 37, -9) / 24 for four.
    """
    u = (np.asarray(nodes, dtype=np.float64) - nodes[0]) / (end - nodes[0])
    powers = np.arange(len(u))
    # The mean of u^j from 0 to 1.
    weights: list[float] = np.linalg.solve(u[None, :] ** powers[:, None], 1 / (powers + 1)).tolist()
    return weights
