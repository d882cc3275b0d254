"""The text of docs/scaling.md, from the results of `bench.scaling` alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench import assumed, cluster
from sssd_hpc.train.describe import WIDTH
from sssd_hpc.train.engine import BUCKET

TEXT = """# Scaling

Written by `python -m bench.scaling`, which measures and counts on this machine; the model is
`bench/cluster.py`, the assumptions `bench/assumed.py`, the results `bench/results/scaling.json`.
**No GPU has run this: every number about GPUs is a prediction** from counts and assumptions.

## Counts

{sizes}

*ten times* is `{paper}` with {channels} channels. P parameters on n ranks, all float32, hold
between steps, in units of 4 P bytes: ZeRO stage 0: 3 + 1/n; stages 1 and 2: 1 + 4/n; stage 3: 6/n
and a bucket of {bucket}. A step adds gradients (whole at stages 0 and 1, 1/n at 2), at
stages 1 and 2 the same bucket, at stage 3 whole weights: below {reuse} parameters it gathers all
of them once a step and keeps them until the step ends. A step sends an all-reduce of 4 P bytes at
stage 0, an all-gather besides at stages 1 and 2, an all-gather and a reduce-scatter at stage 3;
from stage 1 on in messages of one bucket each.
Nothing is sent while something is computed (`overlap_comm` is off).

## Checked on this machine

{processor}, {cores} cores shared with other jobs (load {before} before, {after} after, the runs'
own included), gloo, one thread a rank, {blocks} blocks of {small} channels, {batch} records a rank,
medians of {repeats} steps. *alone* is the slowest rank's step with neither DeepSpeed nor
collectives, all ranks at once, taken in turns with the real one, which is predicted as that plus
its collectives, each by its bytes, as they measure by themselves. *waiting* is for the last rank to
come to a collective, *sending* from then on.

{check}

Predictions are off by at most {bytes_off} for bytes sent, {held_off} for bytes held (one rank sets
the constant), {step_off} for steps at stages 0 to 2 and {third_off} at stage 3, where DeepSpeed's
own work, which is not in the model, is most. **Sending alone takes {least_late} to {most_late}
times what is predicted**: with more ranks than cores one of them always waits for the scheduler,
inside collectives, too. Waiting and sending are {least_part} to {most_part} of a step.

So bytes sent, and held between steps, are proven for this small network. Seconds of communication,
on which every efficiency below rests, are shown to within that factor, and seconds on GPUs not
at all; what a step adds to memory is read from DeepSpeed's source.

## Assumed

{assumed}

## Data-parallel efficiency

The smallest power of two of records a GPU, up to {most}, from which efficiency (the step of one GPU
over that of n, the records a GPU fixed) is at least 90 %; with fewer it is under. "-": none;
"*": more than fit without activation checkpointing or pieces, see below. A GPU slower than assumed
raises efficiency, a slower link lowers it.

{efficiency}

Milliseconds a step and efficiency at stage 0, H100 tf32, 400 Gb/s a GPU:

{steps}

## Which stage, which batch

What a rank of 8 holds at the height of a step besides activations, and the records that then fit
80 GB ({usable} used, no activation checkpointing, {record} a record as the CPU kernels keep it, in
proportion to channels for *ten times*):

{memory}

Activations fill a GPU, not weights. So **stage 0** for both networks; the batch a GPU from the
table above, and `--train.accumulation-steps` where that does not fit. Stage 1 sends half as much
again to save {little}, or {saves} for *ten times*. Stages 2 and 3 are for weights, gradients and
moments (16 P bytes) beyond half of a GPU: from about {large} parameters on 80 GB.

**Ten times the model** ({times} times the parameters, gradients and moments) costs {slower} times
the step at 8 records a GPU, {wider} times the activations and {heavier} times the checkpoint.

## Checkpoints and heartbeats

Measured here: written and flushed at {write} GB/s, hashed at {hash}, read at {read}; a real save of
{saved} took {saved_s} s, predicted {saved_told} s. With its proof and export a checkpoint of the
papers' network is {save} s of work beside training. At the default interval, {every} samples, and
the {here} s a record of docs/performance.md that is **{share}** of the time if training lost all
of it, {waited} if it waits for the copy alone. A heartbeat takes {beat} ms; every {pause} s that
is **{beats}**. On GPUs {every} samples pass faster than a checkpoint is made, and training would
wait for the one before; it passes over those that come within {gap} s of another
(`train.checkpoint_gap_s`).

{checkpoint}

Where your disk takes more than the gap for "work s", raise `--train.checkpoint-gap-s` above it.
"""


def page(results: dict[str, Any]) -> str:
    """Return the text of docs/scaling.md."""
    measured, model = results["measured"], results["model"]
    plan, disk, here = measured["plan"], measured["disk"], model["here"]
    paper, wide = model["sizes"]["sssd_ecg"], model["sizes"]["ten times"]
    several = [row for row in model["check"] if row["ranks"] > 1]
    off = {
        key: max(abs(row[f"predicted_{key}"] / row[key] - 1) for row in several)
        for key in ("bytes", "held")
    }
    third, others = (
        max(
            abs(row["predicted_step_s"] / row["step_s"] - 1)
            for row in several
            if (row["stage"] == 3) is last
        )
        for last in (True, False)
    )
    late = [row["sending_s"] / row["predicted_sending_s"] for row in several]
    part = [(row["waiting_s"] + row["sending_s"]) / row["step_s"] for row in several]
    steps = {(row["model"], row["batch"], row["gpus"]): row for row in model["steps"]}
    memory = {(row["model"], row["stage"]): row for row in model["memory"]}
    saves = {(row["model"], row["gpus"], row["batch"]): row for row in model["checkpoint"]}
    big, usual = "ten times", "sssd_ecg"
    return TEXT.format(
        sizes=_sizes(model),
        paper=usual,
        channels=wide["channels"],
        bucket=amount(WIDTH * BUCKET),
        reuse=f"{cluster.REUSE:,}",
        processor=measured["machine"]["processor"],
        cores=measured["cores"],
        before=measured["machine"]["load"],
        after=measured["load_after"],
        blocks=plan["blocks"],
        small=plan["channels"],
        batch=plan["batch"],
        repeats=len(measured["runs"][0]["stages"][0]["step_s"]),
        check=_check(model),
        bytes_off=f"{off['bytes']:.1%}",
        held_off=f"{off['held']:.1%}",
        step_off=f"{others:.0%}",
        third_off=f"{third:.0%}",
        least_late=f"{min(late):.1f}",
        most_late=f"{max(late):.1f}",
        least_part=f"{min(part):.0%}",
        most_part=f"{max(part):.0%}",
        assumed=_assumed(),
        most=model["most"],
        efficiency=_efficiency(model),
        steps=_steps(model),
        usable=f"{assumed.USABLE:.0%}",
        record=amount(memory[usual, 0]["record"]),
        memory=_memory(model),
        little=amount(memory[usual, 0]["held_8"] - memory[usual, 1]["held_8"]),
        saves=amount(memory[big, 0]["held_8"] - memory[big, 1]["held_8"]),
        large=f"{80e9 / 2 / 16 / 1e9:.1f}e9",
        times=f"{wide['parameters'] / paper['parameters']:.1f}",
        slower=f"{steps[big, 8, 1]['step_s'] / steps[usual, 8, 1]['step_s']:.1f}",
        wider=f"{memory[big, 0]['record'] / memory[usual, 0]['record']:.1f}",
        heavier=f"{saves[big, 1, 8]['bytes'] / saves[usual, 1, 8]['bytes']:.1f}",
        write=f"{disk['write_bytes_per_s'] / 1e9:.2f}",
        hash=f"{disk['hash_bytes_per_s'] / 1e9:.2f}",
        read=f"{disk['read_bytes_per_s'] / 1e9:.2f}",
        saved=amount(disk["saved_bytes"]),
        saved_s=f"{disk['save_s']:.1f}",
        saved_told=f"{here['saved_predicted_s']:.1f}",
        save=f"{here['save_s']:.1f}",
        every=f"{model['every']:,}",
        here=f"{here['record_s']:.2f}",
        share=f"{here['share']:.3%}",
        waited=f"{here['waited_share']:.3%}",
        beat=f"{disk['heartbeat_s'] * 1e3:.1f}",
        pause=f"{assumed.HEARTBEAT_S:.0f}",
        beats=f"{here['heartbeat_share']:.2%}",
        checkpoint=_checkpoint(model),
        gap=f"{model['gap_s']:.0f}",
    )


def _sizes(model: dict[str, Any]) -> str:
    return table(
        ("network", "parameters", "gradients", "checkpoint", "export"),
        (
            (
                name,
                f"{size['parameters']:,}",
                amount(WIDTH * size["parameters"]),
                amount(cluster.checkpoint_bytes(size["parameters"], size["buffers"])),
                amount(cluster.export_bytes(size["parameters"], size["buffers"])),
            )
            for name, size in model["sizes"].items()
        ),
    )


def _check(model: dict[str, Any]) -> str:
    megabytes = ("bytes", "predicted_bytes", "held", "predicted_held")
    times = ("alone_s", "waiting_s", "sending_s", "predicted_sending_s", "step_s")
    return table(
        (
            *("ranks", "ZeRO", "sent MB", "predicted", "held MB", "predicted", "alone ms"),
            *("waiting ms", "sending ms", "predicted", "step ms", "predicted"),
        ),
        (
            (
                *(row["ranks"], row["stage"]),
                *(f"{row[key] / 1e6:,.2f}" for key in megabytes),
                *(f"{row[key] * 1e3:.0f}" for key in (*times, "predicted_step_s")),
            )
            for row in model["check"]
        ),
    )


def _assumed() -> str:
    link = assumed.NVLINK
    return table(
        ("what", "assumed to be attained"),
        (
            (
                "matrix products",
                f"{assumed.MATRIX:.0%} of {assumed.TF32 / 1e12:.0f} (tf32) or "
                f"{assumed.BF16 / 1e12:.0f} TFLOP/s (bf16)",
            ),
            ("FFTs, S4 kernels", f"{assumed.VECTOR:.0%} of {assumed.FP32 / 1e12:.0f} TFLOP/s"),
            (
                "memory",
                f"{assumed.MEMORY:.0%} of {assumed.H100_MEMORY / 1e12} (H100) or "
                f"{assumed.H200_MEMORY / 1e12} TB/s (H200)",
            ),
            (
                "launches",
                f"{assumed.LAUNCHES} of {assumed.LAUNCH_S * 1e6:.0f} us a block, no graphs",
            ),
            (
                "NVLink, 8 GPUs a node",
                f"{link.bytes_per_s / 1e9:.0f} GB/s a direction, {link.latency_s * 1e6:.0f} us",
            ),
            *(
                (
                    f"network, {name}",
                    f"{net.between.bytes_per_s / 1e9:.3g} GB/s a GPU, "
                    f"{net.between.latency_s * 1e6:.0f} us",
                )
                for name, net in assumed.CLUSTERS.items()
            ),
            ("file system", f"{assumed.STORAGE / 1e9:.0f} GB/s a run; hashes as fast as here"),
            ("GPU to host", f"{assumed.PCIE / 1e9:.0f} GB/s"),
        ),
    )


def _efficiency(model: dict[str, Any]) -> str:
    fast, slow = assumed.CLUSTERS
    cells: dict[tuple[Any, ...], list[str]] = {}
    for net, numbers in ((fast, ("8", "64", "512")), (slow, ("64", "512"))):
        for row in model["efficiency"]:
            if row["net"] == net:
                key = row["model"], row["gpu"], row["stage"]
                cells.setdefault(key, []).extend(_least(row, n) for n in numbers)
    return table(
        ("network", "GPU", "ZeRO", "8", f"64, {fast}", "512", f"64, {slow}", "512"),
        ((*key, *found) for key, found in cells.items()),
    )


def _least(row: dict[str, Any], n: str) -> str:
    return f"{row[n] or '-'}{'' if row[f'fits_{n}'] or not row[n] else '*'}"


def _steps(model: dict[str, Any]) -> str:
    lines: dict[tuple[str, int], list[str]] = {}
    for row in model["steps"]:
        cell = f"{row['step_s'] * 1e3:.1f}, {row['efficiency']:.0%}"
        lines.setdefault((row["model"], row["batch"]), []).append(cell)
    return table(
        ("network", "records a GPU", "1 GPU", "8", "64", "512"),
        ((*key, *cells) for key, cells in lines.items()),
    )


def _memory(model: dict[str, Any]) -> str:
    return table(
        ("network", "ZeRO", "held", "records on 80 GB"),
        (
            (
                *(row["model"], row["stage"], amount(row["held_8"])),
                row["records_80gb"],
            )
            for row in model["memory"]
        ),
    )


def _checkpoint(model: dict[str, Any]) -> str:
    return table(
        (
            *("network", "GPUs", "records a GPU", "work s", "due every s"),
            *("made every s", "time waiting"),
        ),
        (
            (
                *(row[key] for key in ("model", "gpus", "batch")),
                f"{row['save_s']:.1f}",
                f"{row['due_s']:.2f}",
                f"{row['interval_s']:.1f}",
                f"{row['share']:.2%}",
            )
            for row in model["checkpoint"]
        ),
    )


def table(head: tuple[object, ...], rows: Iterable[tuple[object, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def amount(size: float) -> str:
    """Return bytes in MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def between(text: str, mark: str, section: str) -> str:
    """Return a page with the section between its two marks made again."""
    before, _, rest = text.partition(mark)
    return f"{before}{mark}\n{section}\n{mark}{rest.partition(mark)[2]}"
