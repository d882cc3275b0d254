"""One rank of `bench.scaling`'s measurement: steps, what they send, and what is held between them.

    RANK=.. WORLD_SIZE=.. python -m bench.scaling_rank '{"channels": 64, ...}'

Every step is paired with one that all ranks take at the same time without DeepSpeed or collectives,
so that both meet the same machine. Collectives are waited for where they are called, so that a
step's time splits in three: waiting for the last rank to come to a collective, sending from then
on, and the rest. Rank 0 prints one JSON object.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

NAMES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "reduce")


class Meter:
    """Begin and end, calls and bytes of torch's collectives since the last `clear`."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []
        self.calls: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def clear(self) -> None:
        """Forget what was counted."""
        self.__init__()  # type: ignore[misc]

    def wrap(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        """Return the collective, counted: its whole tensor, not the pieces, is its size."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            work = collective(*args, **kwargs)
            if work is not None and hasattr(work, "wait"):
                work.wait()
            self.spans.append((begin, time.perf_counter()))
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            self.calls[name] = self.calls.get(name, 0) + 1
            size = max(t.numel() * t.element_size() for t in tensors)
            self.bytes[name] = self.bytes.get(name, 0) + size
            return work

        return counted


@contextmanager
def metered() -> Iterator[Meter]:
    """Yield the meter of this process's collectives; DeepSpeed must not be imported yet."""
    meter = Meter()
    before = {name: getattr(dist, name) for name in NAMES}
    for name, collective in before.items():
        setattr(dist, name, meter.wrap(name, collective))
    try:
        yield meter
    finally:
        for name, collective in before.items():
            setattr(dist, name, collective)


def split(spans: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    """Return the first rank's seconds of waiting and of sending, from every rank's collectives.

    Linux has one such clock for all processes of a machine.
    """
    waiting = sending = 0.0
    for ranks in zip(*spans, strict=True):
        begin, end = ranks[0]
        last = min(max(first for first, _ in ranks), end)
        waiting, sending = waiting + last - begin, sending + end - last
    return waiting, sending


def held_bytes() -> int:
    """Return the bytes of all tensors that Python knows of."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def collectives(sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    """Time each collective alone on tensors of these numbers of bytes."""
    rows = []
    world = dist.get_world_size()
    for size in sizes:
        whole = torch.zeros(size // 4 // world * world)
        part = torch.zeros(whole.numel() // world)
        works: dict[str, Callable[[], Any]] = {
            "all_reduce": partial(dist.all_reduce, whole),
            "all_gather": partial(dist.all_gather_into_tensor, whole, part),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, part, whole),
        }
        for name, work in works.items():
            times = []
            for _ in range(repeats + 1):
                dist.barrier()
                begin = time.perf_counter()
                work()
                times.append(time.perf_counter() - begin)
            rows.append({"op": name, "bytes": whole.numel() * 4, "times_s": times[1:]})
    return rows


def alone(model: torch.nn.Module, update: torch.optim.Optimizer, given: Any) -> float:
    """Return the seconds of a step that asks nobody."""
    begin = time.perf_counter()
    update.zero_grad(set_to_none=True)
    model(*given).square().mean().backward()
    update.step()
    return time.perf_counter() - begin


def steps(plan: dict[str, Any], stage: Any, group: Any, meter: Meter) -> dict[str, Any]:
    """Time steps of one ZeRO stage, the batch a rank held fixed."""
    from bench.model import Size, batch, build
    from sssd_hpc.config import TrainConfig
    from sssd_hpc.train.engine import open_engine
    from sssd_hpc.train.state import TrainState

    size = Size(plan["blocks"], plan["channels"], plan["N"], plan["L"])
    twin = build(size, "cpu")
    update = torch.optim.AdamW(twin.parameters(), lr=0.0)
    alone(twin, update, batch(size, plan["batch"], "cpu"))
    start = held_bytes()
    model = build(size, "cpu")
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    parameters = sum(p.numel() for p in model.parameters())
    train = TrainConfig(zero_stage=stage, batch_size=plan["batch"] * group.world_size)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    with open_engine(model, optimizer, train, group) as engine:
        state = TrainState(model, [], engine, group, every=stage == 3)
        state.samples = 0
        rows = []
        for number in range(plan["steps"] + 2):
            given = batch(size, plan["batch"], "cpu")
            group.gather(0)  # All start together, here and below.
            by_rank = group.gather(alone(twin, update, given))
            meter.clear()
            begin = time.perf_counter()
            loss = engine(*given).square().mean()
            group.total([float(loss.detach())], engine.device)
            engine.backward(loss)
            engine.step(1e-4)
            state.samples += train.batch_size
            state.average.update(
                engine.local, samples=state.samples, batch=train.batch_size, half_life=1000
            )
            elapsed = time.perf_counter() - begin
            spans = group.gather(meter.spans)
            if number >= 2:
                rows.append((elapsed, *split(spans), max(by_rank)))
        calls, sent = dict(meter.calls), dict(meter.bytes)
        del given, loss
        held = held_bytes() - start - buffers
    return {
        "stage": stage,
        "parameters": parameters,
        "tensors": len(list(model.parameters())),
        "step_s": [row[0] for row in rows],
        "waiting_s": [row[1] for row in rows],
        "sending_s": [row[2] for row in rows],
        "alone_s": [row[3] for row in rows],
        "calls": calls,
        "bytes": sent,
        "held_bytes": held,
    }


def main() -> None:
    """Measure what the plan asks for."""
    plan = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    with metered() as meter:
        from sssd_hpc.train.engine import processes

        with processes(timeout_s=120) as group:
            found: dict[str, Any] = {"world": group.world_size, "stages": [], "collectives": []}
            for stage in plan["stages"]:
                found["stages"].append(steps(plan, stage, group, meter))
            if group.world_size > 1:
                found["collectives"] = collectives(plan["sizes"], plan["repeats"])
    if group.rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
