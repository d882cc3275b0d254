from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sssd_hpc.config import TrainConfig
from sssd_hpc.errors import UserError
from sssd_hpc.train import engine
from sssd_hpc.train.engine import deepspeed_config, open_engine, refuse_complex
from sssd_hpc.train.ranks import Group

ROOT = Path(__file__).parents[2]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 10)
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        y: Tensor = self.linear(x_t)
        return y


def one_step(train: TrainConfig) -> tuple[Toy, float]:
    """Return a toy after one step of learning rate 0.5, and the gradient norm it reported."""
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x_t, t = torch.ones(4, 2, 10), torch.zeros(4, dtype=torch.int64)
    with engine.processes(60) as group, open_engine(model, optimizer, train, group) as opened:
        opened.backward(100 * opened(x_t, t, t[:, None]).square().mean())
        norm = opened.step(0.5)
    assert norm is not None
    return model, norm


def moved(model: nn.Module) -> float:
    """Return how far a toy lies from a fresh one of the same seed."""
    torch.manual_seed(0)
    pairs = zip(model.parameters(), Toy().parameters(), strict=True)
    return sum((a - b).square().sum().item() for a, b in pairs) ** 0.5


def test_the_deepspeed_configuration_is_this() -> None:
    assert deepspeed_config(TrainConfig(batch_size=12, grad_clip=0.5, precision="bf16"), 4) == {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": sys.maxsize,
    }
    assert not deepspeed_config(TrainConfig(), 1)["torch_autocast"]["enabled"]


def test_deepspeed_counts_shares_that_are_rounded_up() -> None:
    config = deepspeed_config(TrainConfig(batch_size=8, accumulation_steps=2, zero_stage=2), 3)
    assert config["train_batch_size"] == 12
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 2
    assert config["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": 1 << 24,
        "allgather_bucket_size": 1 << 24,
    }


def test_a_step_through_deepspeed_is_the_optimizers_step() -> None:
    model, norm = one_step(TrainConfig(batch_size=4))
    assert norm > 1.0
    assert moved(model) == pytest.approx(0.5 * norm, rel=1e-5)


def test_clipping_bounds_the_step_and_the_reported_norm_is_the_unclipped_one() -> None:
    model, norm = one_step(TrainConfig(batch_size=4, grad_clip=0.1))
    assert norm > 1.0
    assert moved(model) == pytest.approx(0.5 * 0.1, rel=1e-3)


def test_bf16_keeps_float32_weights_and_output() -> None:
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters())
    x_t = torch.ones(1, 2, 10)
    train = TrainConfig(batch_size=1, precision="bf16")
    with engine.processes(60) as group, open_engine(model, optimizer, train, group) as opened:
        y = opened(x_t, torch.zeros(1), torch.zeros(1))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert y.dtype == torch.float32
    exact = model(x_t, torch.zeros(1), torch.zeros(1))
    assert not torch.equal(y, exact)
    torch.testing.assert_close(y, exact, rtol=0.02, atol=0.02)


def test_complex_parameters_are_refused_by_name() -> None:
    model = Toy()
    model.kernel = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UserError, match=r"complex parameter\(s\) kernel"):
        refuse_complex(model)
    with (
        pytest.raises(UserError, match="kernel"),
        open_engine(model, torch.optim.SGD(Toy().parameters(), lr=1.0), TrainConfig(), Group()),
    ):
        pass


def test_the_environment_and_the_process_group_are_left_as_they_were() -> None:
    before = dict(os.environ)
    one_step(TrainConfig(batch_size=4))
    assert dict(os.environ) == before
    assert not torch.distributed.is_initialized()


def test_the_process_group_ends_after_an_error_too() -> None:
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with (
        pytest.raises(ZeroDivisionError),
        engine.processes(60) as group,
        open_engine(model, optimizer, TrainConfig(), group),
    ):
        raise ZeroDivisionError
    assert not torch.distributed.is_initialized()


def test_half_set_rendezvous_variables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    expected = "RANK, WORLD_SIZE are set but LOCAL_RANK, MASTER_ADDR, MASTER_PORT"
    with pytest.raises(UserError, match=expected), engine.processes(60):
        pass


def test_deepspeed_is_quiet_on_stdout_and_its_warnings_reach_our_logging(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    one_step(TrainConfig(batch_size=4))
    assert capsys.readouterr().out == ""
    with caplog.at_level(logging.WARNING):
        logging.getLogger("DeepSpeed").warning("heard")
    assert "heard" in caplog.text


def test_building_ahead_works_as_a_program_without_the_environment_activated() -> None:
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if "venv" not in p)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "sssd_hpc.train.engine"],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_without_a_compiler_the_error_names_what_is_needed(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sssd_hpc.train.engine"],
        cwd=ROOT,
        env={
            "PATH": str(tmp_path),
            "PYTHONPATH": str(ROOT),
            "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
            "CXX": "no-such-compiler",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1
    assert "builds its CPU communication once" in result.stderr
    assert "UserError: DeepSpeed's process group does not start" in result.stderr
    assert "needs g++ and ninja" in result.stderr
