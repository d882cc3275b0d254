"""How many records a GPU draws at once, by a stand-in's memory; drawing is tested in generate."""

from __future__ import annotations

import pytest
import torch

from sssd_hpc.model import draw

GPU = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Stand in for a GPU: a call takes 100 MB and 10 MB a row; `free` bytes are free."""

    def of(free: int, row: int = 10_000_000) -> None:
        def taken(network: object, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> int:
            assert x.shape[1:] == (8, 1000)
            assert (t.dtype, labels.shape) == (torch.int64, (len(x), 71))
            return 100_000_000 + len(x) * row

        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *shape, device, **o: zeros(*shape, **o))
        monkeypatch.setattr(draw, "_call_bytes", taken)
        monkeypatch.setattr(draw, "_free_bytes", lambda device: free)

    return of


def fitting(**options: bool) -> int:
    return draw.fitting_batch(lambda: lambda x, t, labels: x, 8, 1000, 71, GPU, **options)


@pytest.mark.parametrize(
    ("free", "expected"),
    [(10**9, 16), (80 * 10**9, draw.MOST), (3 * 10**9, 64), (300 * 10**6, 2), (0, 1)],
)
def test_a_gpu_draws_the_power_of_two_that_fits(gpu, free: int, expected: int) -> None:
    gpu(free)
    assert fitting() == expected
    taken = 100_000_000 + 10_000_000 * expected
    assert taken <= draw.SHARE * free or expected == 1


def test_guidance_halves_what_fits(gpu) -> None:
    gpu(3 * 10**9)
    assert fitting(guided=True) == fitting() // 2


def test_a_network_whose_rows_cost_nothing_stays_bounded(gpu) -> None:
    gpu(10**9, row=0)
    assert fitting() == draw.MOST


def test_a_cpu_takes_what_its_cache_holds() -> None:
    def build() -> None:
        pytest.fail("a network was built for nothing")

    assert draw.fitting_batch(build, 8, 1000, 71, torch.device("cpu")) == draw.CPU_BATCH


@pytest.mark.gpu
def test_the_batch_that_fits_is_drawn() -> None:
    from sssd_hpc.model import SSSDECG

    model = SSSDECG(num_leads=8, num_labels=71, num_blocks=2, channels=64).to(GPU)
    network = model.for_sampling(1000, 200)
    rows = draw.fitting_batch(lambda: network, 8, 1000, 71, GPU)
    assert rows > 1
    x = torch.zeros(rows, 8, 1000, device=GPU)
    steps = torch.zeros(rows, dtype=torch.int64, device=GPU)
    labels = torch.zeros(rows, 71, dtype=torch.int64, device=GPU)
    with torch.no_grad():
        assert draw.captured(network)(x, steps, labels).shape == x.shape
