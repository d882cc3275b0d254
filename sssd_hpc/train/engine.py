"""The only file that imports DeepSpeed: process group, engine, backward and optimizer step.

One process takes the same path as many would: this file finds or makes the rendezvous variables,
initialises the process group (gloo on a CPU, nccl on a GPU) and takes it down again. It refuses
half-set variables, complex parameters (DeepSpeed drops imaginary parts) and, for now, more than one
process. Checkpoints are not DeepSpeed's but ours: see checkpoint.py.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sssd_hpc.config import TrainConfig
from sssd_hpc.errors import UserError

_log = logging.getLogger(__name__)

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Engine:
    """A model in DeepSpeed's hands: call it as a denoiser, then `step` on the loss."""

    def __init__(self, wrapped: Any, device: torch.device, world_size: int) -> None:
        self._wrapped = wrapped
        self.device = device
        self.world_size = world_size

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return the model's float32 output, under autocast where the config asks for it."""
        eps_hat: Tensor = self._wrapped(x_t, t, labels)
        return eps_hat.float()

    def backward(self, loss: Tensor) -> float:
        """Compute gradients; return their total norm before any clipping."""
        self._wrapped.backward(loss)
        gradients = [p.grad for p in self._wrapped.module.parameters() if p.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def step(self) -> None:
        """Clip if configured, update the parameters, clear the gradients."""
        self._wrapped.step()


def deepspeed_config(train: TrainConfig, world_size: int) -> dict[str, Any]:
    """Derive the DeepSpeed configuration: a pure function, the only source of that dictionary.

    Raises:
        UserError: the batch cannot be shared equally.
    """
    if train.batch_size % world_size:
        raise UserError(
            f"train.batch_size is {train.batch_size}; it must be a multiple of the "
            f"{world_size} processes"
        )
    return {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.grad_clip,
        "zero_optimization": {"stage": 0},
        # Weights stay float32; the kernels and FFTs opt out of autocast themselves.
        "torch_autocast": {"enabled": train.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": sys.maxsize,
    }


@contextlib.contextmanager
def open_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, train: TrainConfig
) -> Iterator[Engine]:
    """Yield `model` and `optimizer` as an `Engine`; the process group ends with the block.

    Raises:
        UserError: complex parameters, half-set rendezvous variables, several processes, or no
            compiler for DeepSpeed's operation.
    """
    refuse_complex(model)
    with _matmul_precision(train.precision), process_group() as (device, world_size):
        with _quiet():
            import deepspeed

            wrapped, *_ = deepspeed.initialize(
                model=model.to(device),
                optimizer=optimizer,
                config=deepspeed_config(train, world_size),
                dist_init_required=False,
            )
        try:
            yield Engine(wrapped, device, world_size)
        finally:
            wrapped.destroy()


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """Let tensor cores round float32 operands to tf32 inside the block, unless asked for fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def refuse_complex(model: nn.Module) -> None:
    """Check that all parameters are real.

    Raises:
        UserError: names the complex ones; some ZeRO stages would lose their imaginary parts.
    """
    names = [name for name, p in model.named_parameters() if p.is_complex()]
    if names:
        raise UserError(
            f"model has the complex parameter(s) {', '.join(names)}; DeepSpeed would drop their "
            "imaginary parts: store real pairs (torch.view_as_real)"
        )


def device_here() -> torch.device:
    """Return this process's GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextlib.contextmanager
def process_group() -> Iterator[tuple[torch.device, int]]:
    """Yield (device, world size) with torch's process group up, by way of DeepSpeed.

    Raises:
        UserError: see `open_engine`.
    """
    with _environment():
        device, world_size = device_here(), int(os.environ["WORLD_SIZE"])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            _announce_build()
        with _quiet():
            import deepspeed

            try:
                deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo")
            except (RuntimeError, OSError) as error:
                raise UserError(
                    "DeepSpeed's process group does not start; its CPU operation needs g++ and "
                    f"ninja to be built: {' '.join(str(error).split())[-300:]}"
                ) from error
        try:
            yield device, world_size
        finally:
            deepspeed.comm.destroy_process_group()


def prebuild() -> None:
    """Build what DeepSpeed compiles at first use, so that training starts at once."""
    with process_group():
        pass


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Complete the environment for the start of DeepSpeed and put it back afterwards."""
    given = [name for name in RENDEZVOUS if name in os.environ]
    missing = [name for name in RENDEZVOUS if name not in os.environ]
    if given and missing:
        raise UserError(
            f"of the rendezvous variables {', '.join(given)} are set but {', '.join(missing)} "
            "are not; set all (torchrun does) or none (one process)"
        )
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}; this version trains with one process: "
            "start it once, without torchrun"
        )
    # Port 0: the store takes any free port, without a race.
    wanted = dict(zip(RENDEZVOUS, ("0", "1", "0", "127.0.0.1", "0"), strict=True))
    if not torch.cuda.is_available():
        wanted["DS_ACCELERATOR"] = "cpu"
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        wanted["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in added})
    # This environment's ninja first, activated or not: another one would build everything again.
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
    try:
        yield
    finally:
        os.environ["PATH"] = path
        for name in added:
            os.environ.pop(name, None)


def _announce_build() -> None:
    """Say why the start takes long, if DeepSpeed's operation is not built yet."""
    place = os.environ.get("TORCH_EXTENSIONS_DIR")
    if place is None:
        return
    folder = Path(place) / "deepspeed_shm_comm"
    lock = folder / "lock"
    if lock.exists():
        _log.warning(
            "waiting for another process to build in %s; if there is none, remove it", lock
        )
    elif not any(folder.glob("*.so")):
        _log.warning("DeepSpeed builds its CPU communication once: about a minute")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed off stdout, which is for results; its warnings go to our logging."""
    with contextlib.redirect_stdout(io.StringIO()) as spoken:
        yield
    if spoken.getvalue().strip():
        _log.debug("DeepSpeed: %s", spoken.getvalue().strip())
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()
    logger.propagate = True


if __name__ == "__main__":
    prebuild()
