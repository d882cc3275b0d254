"""The command line: parses, calls one room, prints. No logic of its own.

Exit codes: 0 done; 2 the user's mistake (one line on stderr); 75 stopped early and resumable;
1 anything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import tyro

from sssd_hpc import __version__, config, files
from sssd_hpc.errors import AgreedError, Interrupted, PeerLost, UserError

EXIT_FAILED, EXIT_USER, EXIT_RESUMABLE = 1, 2, 75


def doctor(*, json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False) -> None:
    """Say what this machine can run; every part is tried. Exit code 1 if the main job cannot run.

    Example: sssd-hpc doctor

    Args:
        json: Print JSON instead of a table.
    """
    from sssd_hpc import doctor as room

    findings = room.examine(Path())
    if json:
        print(_json([dataclasses.asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            mark = "ok " if finding.usable else "NO " if finding.needed else "-  "
            print(f"{mark} {finding.name:<32} {finding.detail}")
    if not room.can_run(findings):
        sys.exit(EXIT_FAILED)


def simulate(*, out: Path, records: int = 500, seed: int = 0) -> None:
    """Make the embedded data set: simulated, labelled 12-lead ECGs in PTB-XL's layout.

    Example: sssd-hpc simulate --out simulated --records 500 --seed 0

    Args:
        out: Folder of the new WFDB root.
        records: Number of records of 10 s.
        seed: Seed; the same seed gives the same files.
    """
    from sssd_hpc.ecg.simulate import simulate as run

    run(out, num_records=records, seed=seed)


def prepare(
    *,
    source: Path,
    out: Path,
    rate: Literal[100, 500] = 100,
    labels: str = "all",
    min_likelihood: float | None = None,
    band_pass: tuple[float, float] | None = None,
    allow_leakage: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Check a PTB-XL root (real, simulated or synthetic) and pack it into a training store.

    Example: sssd-hpc prepare --source ptb-xl --out store --labels super

    Args:
        source: PTB-XL root: ptbxl_database.csv, scp_statements.csv, records100, records500.
        out: Folder of the new store.
        rate: Sampling rate in Hz.
        labels: all, diag, sub, super, form, rhythm, or SCP codes such as AFIB,CRBBB.
        min_likelihood: Least likelihood in percent of a diagnostic label; default: any counts. Form
            and rhythm statements carry none in PTB-XL and always count.
        band_pass: Zero-phase band-pass from LOW to HIGH Hz, for example 0.5 40; default: none.
        allow_leakage: Go on though a patient stands in several folds, or a waveform in two of
            training, validation and test; it is recorded.
    """
    from sssd_hpc.ecg.prepare import prepare as run

    store = run(
        source,
        out,
        rate=rate,
        labels=labels,
        min_likelihood=min_likelihood,
        band_pass=band_pass,
        allow_leakage=allow_leakage,
    )
    print(f"{out}: {store.num_records} records, {len(store.label_names)} label(s), {rate} Hz")


def train(
    *,
    data: Path,
    run: Path,
    config: Annotated[config.Config, tyro.conf.arg(name="")],
    preset: str = "",
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Train a model on a store, or resume: the same command again goes on where it stopped.

    Example: sssd-hpc train --preset tiny --data store --run run --train.samples 20000

    Args:
        data: Store made by prepare.
        run: Folder of the run: configuration, metrics, checkpoints, exported weights.
        preset: tiny, sssd_ecg, sssd_ecg_nle, or a YAML file; flags override it.
        dry_run: Print the resolved configuration, parameter count and memory estimate, then stop.
    """
    from sssd_hpc.ecg.store import Store
    from sssd_hpc.train import loop

    store = Store.open(data, verify=not dry_run)
    if dry_run:
        print(loop.describe(config, store))
        return
    loop.train(config, store, run)
    print(f"{run}: trained; weights in {run / 'export' / 'model.safetensors'}")


def status(
    run: tyro.conf.Positional[Path],
    /,
    *,
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Say how a run stands, from its files: alive or not, how far, how fast, restarts, loss.

    Example: sssd-hpc status run

    Args:
        run: Folder of the run.
        json: Print JSON instead of text.
    """
    from sssd_hpc.train import status as room

    found = room.examine(run)
    print(_json(dataclasses.asdict(found)) if json else room.text(found, sys.stdout))


def sample(
    *,
    run: Path,
    like: Path,
    out: Path,
    folds: str = "1-10",
    sampler: Literal["ddpm"] = "ddpm",
    steps: int | None = None,
    guidance: float = 0.0,
    weights: Literal["ema", "raw"] = "ema",
    batch_size: int = 16,
    seed: int = 0,
) -> None:
    """Make one synthetic record for each real one, with its labels, in PTB-XL's layout.

    Example: sssd-hpc sample --run run --like store --out synthetic

    Args:
        run: Folder of a trained run, or of a converted checkpoint.
        like: Store whose labels and folds are copied.
        out: Folder of the new WFDB root; the same command again goes on where it stopped.
        folds: Folds to copy, for example 1-8; evaluate wants 9 and 10 too.
        sampler: ddpm: ancestral sampling, as in the paper.
        steps: Network calls a record; ddpm takes all of the run's diffusion steps, the default.
        guidance: Weight of classifier-free guidance; 0 is none.
        weights: Averaged (ema) or last (raw) weights.
        batch_size: Records made at once; 16 suits a CPU's cache, a GPU takes hundreds.
        seed: Seed; record and seed alone decide the noise.
    """
    from sssd_hpc import generate
    from sssd_hpc.ecg.store import Store

    chosen = config.parse_folds(folds)
    made = generate.sample(
        run,
        Store.open(like, verify=True),
        out,
        folds=chosen,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        weights=weights,
        batch_size=batch_size,
        seed=seed,
    )
    print(f"{out}: {made} record(s) made now, the set is complete")


def evaluate(
    *,
    real: Path,
    synthetic: Path,
    out: Path,
    label: str | None = None,
    epochs: int | None = None,
    seed: int = 0,
    allow_leakage: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Score a synthetic data set: TRTR, TSTR and TRTS of an xresnet1d50 for one binary label.

    Example: sssd-hpc evaluate --real store --synthetic synthetic --out report --label NORM

    Args:
        real: Store of the real records.
        synthetic: Synthetic WFDB root, or a store of it.
        out: Folder of the report: report.json, report.html, figures.
        label: Label to classify; default: NORM where the store has it.
        epochs: Epochs of each classifier; default: 15.
        seed: Seed of the classifiers and of the bootstrap.
        allow_leakage: Go on though training records turn up in a test set; the report says so.
    """
    from sssd_hpc.ecg.store import Store
    from sssd_hpc.evaluate import protocols, report

    real_store = Store.open(real, verify=True)
    synthetic_store = protocols.open_store_or_root(
        synthetic, out, real_store, allow_leakage=allow_leakage
    )
    result = protocols.evaluate(
        real_store,
        synthetic_store,
        out,
        label=label,
        seed=seed,
        epochs=epochs,
        allow_leakage=allow_leakage,
    )
    print(report.table(result))
    print(f"report: {out / 'report.html'}\npicture: {out / 'figures' / 'records.png'}")


def plot(record: tyro.conf.Positional[Path], /, *, out: Path) -> None:
    """Draw a 12-lead record on ECG paper: 25 mm/s, 10 mm/mV.

    Example: sssd-hpc plot ptb-xl/records100/00000/00001_lr --out 00001.png

    Args:
        record: WFDB record, with or without .hea.
        out: Picture: .png, .svg or .pdf.
    """
    from sssd_hpc.ecg.plot import plot_file

    plot_file(record, out)


def convert(
    source: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    /,
    *,
    kernel: Literal["conjugate", "half"] = "conjugate",
    labels: str | None = None,
) -> None:
    """Convert a public SSSD-ECG or SSSD-ECG-nle checkpoint into a run that sample can use.

    Objects are never unpickled: a checkpoint may hold tensors alone.

    Example: sssd-hpc convert 100000.pkl converted

    Args:
        source: Checkpoint: .pkl of the public code, or .npz.
        out: Folder of the new run: config.yaml, export/model.safetensors.
        kernel: conjugate: its KeOps and CUDA kernels; half: its fallback without conjugates.
        labels: Names of the labels in the checkpoint's order, separated by commas.
    """
    from sssd_hpc.model.reference import convert_reference

    names = tuple(labels.split(",")) if labels else None
    made = convert_reference(source, out, kernel=kernel, labels=names)
    model = made["model"]
    print(
        f"{out}: {model['num_blocks']} blocks, {model['channels']} channels, "
        f"label embedding {model['label_embedding']}, {len(made['labels'])} label(s), "
        f"kernel {kernel}; leads {' '.join(made['leads'])}"
    )


COMMANDS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (doctor, simulate, prepare, train, status, sample, evaluate, plot, convert)
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of the process."""
    # OpenMP threads that spin while they wait starve whatever else runs on their cores, which made
    # steps 20 times slower on a shared machine. Read when torch is loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(list(sys.argv[1:] if args is None else args))
    finally:
        # srun sends TERM to all ranks when the first one ends: a code that is decided stays.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _run(args: list[str]) -> int:
    try:
        _dispatch(args)
    except AgreedError:
        _say("ended with the first rank, which says why")
        return EXIT_USER
    except UserError as error:
        _say(f"error: {' '.join(str(error).split())}")
        return EXIT_USER
    except PeerLost as loss:
        _say(f"error: {loss}")
        return EXIT_FAILED
    except Interrupted as stop:
        _say(f"stopped early: {stop}")
        return EXIT_RESUMABLE
    except KeyboardInterrupt as stop:
        reason = str(stop) or "interrupted"
        _say(f"stopped early: {reason}; the same command goes on")
        return EXIT_RESUMABLE
    except OSError as error:
        bad_path = error.errno in files.BAD_PATH
        hint = "; name another path" if bad_path else ""
        _say(f"error: {' '.join(str(error).split())}{hint}")
        return EXIT_USER if bad_path else EXIT_FAILED
    return 0


def _say(words: str) -> None:
    # Where the log lies on the full disk that is the error, the exit code still tells.
    with contextlib.suppress(OSError):
        print(words, file=sys.stderr)


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if args[0] in ("-V", "--version"):
        print(__version__)
        return
    name, *flags = args
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; perhaps you meant {close[0]}" if close else ""
        raise UserError(f"{name!r} is not a command; commands are {', '.join(COMMANDS)}{hint}")
    if name == "train":
        flags = _with_preset(flags)
    try:
        config.parse(COMMANDS[name], flags, prog=f"sssd-hpc {name}")
    except SystemExit as stop:
        if stop.code:
            raise


def _overview() -> str:
    lines = ["usage: sssd-hpc COMMAND [--help] [OPTIONS]", ""]
    for name, function in COMMANDS.items():
        lines.append(f"  {name:<10} {(function.__doc__ or '').splitlines()[0]}")
    return "\n".join(
        [*lines, "", "sssd-hpc COMMAND --help shows its options, defaults and an example."]
    )


def _with_preset(flags: list[str]) -> list[str]:
    """Place the flags of `--preset` before the user's own, so that these win."""
    for index, flag in enumerate(flags):
        name, _, value = flag.partition("=")
        if name == "--preset":
            value = value or "".join(flags[index + 1 : index + 2])
            return [*config.flags(config.read_yaml(config.preset_path(value))), *flags]
    return flags


def _json(value: object) -> str:
    return json.dumps(value, indent=2)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"signal {signal.Signals(number).name}")
