"""The only file that imports DeepSpeed: engine, backward, optimizer step, and what ZeRO spreads.

It gives and takes weights and moments as whole float32 tensors by name, whatever ZeRO stage and
number of processes spread them: checkpoints are ours (checkpoint.py), and any of them can be gone
on from with any other stage and number. It refuses complex parameters, whose imaginary parts
DeepSpeed would drop.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sssd_hpc.config import TrainConfig
from sssd_hpc.errors import UserError
from sssd_hpc.train import ranks
from sssd_hpc.train.ranks import Group, Ranks

_log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 1 << 24
"""Numbers that DeepSpeed gathers before it sends, from stage 1 on, in a buffer that it holds: the
papers' weights go in three messages. Its default takes 2 GB, ten times those weights."""
# Where DeepSpeed keeps this rank's share of the weights, flat, at stages 1 and 2 and at stage 3.
SHARES = {
    1: "single_partition_of_fp32_groups",
    2: "single_partition_of_fp32_groups",
    3: "fp32_partitioned_groups_flat",
}


class Engine:
    """A model in DeepSpeed's hands: call it as a denoiser, then `backward`, then `step`."""

    def __init__(self, wrapped: Any, stage: int, device: torch.device) -> None:
        self._wrapped, self._stage = wrapped, stage
        self.device = device
        self._parameters: dict[str, nn.Parameter] = dict(wrapped.module.named_parameters())
        # DeepSpeed's own view of the optimizer where ZeRO flattens it; ours at stage 0.
        self._zero = wrapped.optimizer if stage else None
        self._optimizer = wrapped.optimizer.optimizer if stage else wrapped.basic_optimizer
        if stage:
            # As AdamW would make them in its first step, after which DeepSpeed links those of the
            # first group of parameters alone to their names.
            for flat in getattr(self._zero, SHARES[stage]):
                zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
                self._optimizer.state[flat] = {"step": torch.tensor(0.0), **zeros}
        if stage in (1, 2):
            wrapped.optimizer._lazy_init_hp_params_optimizer_state()

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return the model's float32 output, under autocast where the config asks for it."""
        eps_hat: Tensor = self._wrapped(x_t, t, labels)
        return eps_hat.float()

    def backward(self, loss: Tensor) -> None:
        """Compute gradients, averaged over the processes and pieces of a batch."""
        self._wrapped.backward(loss)

    def step(self, learning_rate: float) -> float | None:
        """Count a piece; after a batch's last, clip, update, clear; return the gradients' norm.

        The norm is that before clipping; None while the batch has more pieces.
        """
        last = self._wrapped.is_gradient_accumulation_boundary()
        norm = None
        if last:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate * group.get("scale", 1.0)
            if self._stage == 0:
                gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
                norm = float(nn.utils.get_total_norm(gradients))
        self._wrapped.step()
        if last and self._stage:
            norm = float(self._wrapped.get_global_grad_norm())
        return norm

    def size(self, name: str) -> int:
        """Return the number of elements of a whole parameter."""
        parameter: Any = self._parameters[name]
        return int(parameter.ds_numel if self._stage == 3 else parameter.numel())

    def parameter(self, name: str) -> Tensor:
        """Return a whole parameter, detached; every rank must ask."""
        parameter = self._parameters[name]
        if self._stage == 3:
            from deepspeed.utils import safe_get_full_fp32_param

            whole: Tensor = safe_get_full_fp32_param(parameter)
            return whole
        return parameter.detach()

    def local(self, name: str) -> Tensor:
        """Return the part of a parameter that this rank updates from: a shard at stage 3."""
        parameter: Any = self._parameters[name]
        shard: Tensor = parameter.ds_tensor if self._stage == 3 else parameter
        return shard.detach()

    def join(self, name: str, shard: Tensor) -> Tensor:
        """Return the whole of what is spread as `local` is; every rank must ask."""
        if self._stage != 3:
            return shard
        parameter: Any = self._parameters[name]
        whole = shard.new_empty(torch.distributed.get_world_size() * shard.numel())
        torch.distributed.all_gather_into_tensor(whole, shard.contiguous())
        joined: Tensor = whole[: parameter.ds_numel].reshape(parameter.ds_shape)
        return joined

    def split(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's part, as `local`, of a whole tensor."""
        if self._stage != 3:
            return whole
        parameter: Any = self._parameters[name]
        length = parameter.ds_tensor.numel()
        size = length * torch.distributed.get_world_size()
        padded = nn.functional.pad(whole.flatten(), (0, size - whole.numel()))
        shards: tuple[Tensor, ...] = padded.split(length)
        return shards[torch.distributed.get_rank()].clone()

    def moments(self, name: str) -> dict[str, Tensor]:
        """Return AdamW's whole moments of a parameter and its step, {} before the first step.

        Every rank must ask.
        """
        parameter = self._parameters[name]
        if self._zero is None:
            state = self._optimizer.state.get(parameter, {})
            return {key: state[key] for key in ("step", *MOMENTS) if key in state}
        from deepspeed.utils import safe_get_full_optimizer_state

        step = max(float(state["step"]) for state in self._optimizer.state.values())
        whole = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        return {"step": torch.tensor(step), **whole}

    def restore_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take AdamW's moments of every parameter, by name, as `moments` returns them."""
        if self._zero is None:
            for name, state in moments.items():
                parameter = self._parameters[name]
                # AdamW keeps its step counter on the CPU.
                self._optimizer.state[parameter] = {
                    key: tensor.clone() if key == "step" else tensor.to(self.device)
                    for key, tensor in state.items()
                }
            return
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        step = next(iter(moments.values()))["step"]
        for state in self._optimizer.state.values():
            state["step"].copy_(step)
        for name, state in moments.items():
            for key in MOMENTS:
                parameter, whole = self._parameters[name], state[key].to(self.device)
                if self._stage == 3:
                    # Its function for whole tensors fails where shards are padded.
                    shard = self.split(name, whole)
                    safe_set_local_optimizer_state(parameter, shard, key)
                else:
                    safe_set_full_optimizer_state(parameter, whole, key)


def deepspeed_config(train: TrainConfig, world_size: int) -> dict[str, Any]:
    """Derive the DeepSpeed configuration: a pure function, the only source of that dictionary.

    Batches are ours: a share of a batch need not be equal on all processes. DeepSpeed hears of a
    size that is, which it only counts with.
    """
    share = -(-train.batch_size // (world_size * train.accumulation_steps))
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.zero_stage:
        # Sums in the order of the parameters, not of whichever gradient came first.
        zero |= {"overlap_comm": False, "contiguous_gradients": True}
        zero |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if train.zero_stage == 3:
        # Spread small parameters, too. What was gathered in forward stays until backward, by
        # DeepSpeed's defaults: the weights are small beside the activations.
        zero |= {"stage3_param_persistence_threshold": 0}
    return {
        "train_batch_size": share * world_size * train.accumulation_steps,
        "train_micro_batch_size_per_gpu": share,
        "gradient_accumulation_steps": train.accumulation_steps,
        "gradient_clipping": train.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Weights stay float32, and so does what is sent, unlike that of the modules that DeepSpeed
        # takes as safe to round, by default linear layers and convolutions. The kernels and FFTs
        # opt out of autocast themselves.
        "torch_autocast": {
            "enabled": train.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": sys.maxsize,
    }


@contextlib.contextmanager
def open_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, train: TrainConfig, group: Group
) -> Iterator[Engine]:
    """Yield `model` and `optimizer` as an `Engine` of the group's processes.

    Raises:
        UserError: complex parameters, or no compiler for DeepSpeed's operation.
    """
    refuse_complex(model)
    with matmul_precision(train.precision), _communication() as device:
        with _quiet():
            import deepspeed

            wrapped, *_ = deepspeed.initialize(
                model=model.to(device),
                optimizer=optimizer,
                config=deepspeed_config(train, group.world_size),
                dist_init_required=False,
            )
        try:
            yield Engine(wrapped, train.zero_stage, device)
        finally:
            wrapped.destroy()


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
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
def processes(timeout_s: float) -> Iterator[Group]:
    """Yield the group of the processes that train this run, found by `ranks.discover`.

    Raises:
        UserError: half-set variables.
        PeerLost: ranks that do not find each other, or lose one.
    """
    found = ranks.discover(os.environ)
    with _environment(found):
        device = device_here()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        with ranks.open_group(found, backend, timeout_s) as group:
            yield group


@contextlib.contextmanager
def _communication() -> Iterator[torch.device]:
    """Yield the device with DeepSpeed's communication up; a process group that is there is adopted.

    Raises:
        UserError: see `open_engine`.
    """
    device, ours = device_here(), not torch.distributed.is_initialized()
    if device.type == "cpu":
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
        yield device
    finally:
        if ours:
            deepspeed.comm.destroy_process_group()


def prebuild() -> None:
    """Build what DeepSpeed compiles at first use, so that training starts at once."""
    with processes(timeout_s=60), _communication():
        pass


@contextlib.contextmanager
def _environment(found: Ranks) -> Iterator[None]:
    """Complete the environment for the start of DeepSpeed and put it back afterwards."""
    wanted = found.environment()
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
