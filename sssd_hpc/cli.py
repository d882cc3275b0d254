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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import tyro

from sssd_hpc import __version__, config, files
from sssd_hpc.errors import AgreedError, Interrupted, PeerLost, UserError

EXIT_FAILED, EXIT_USER, EXIT_RESUMABLE = 1, 2, 75
# What Slurm sends: USR1 as slurm/*.sbatch ask, before the time is up.
STOPS = (signal.SIGTERM, signal.SIGUSR1)


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
    validate_every: int | None = None,
    distill_from: Path | None = None,
    steps: int | None = None,
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Train a model on a store, or resume: the same command again goes on where it stopped.

    Example: sssd-hpc train --preset tiny --data store --run run --train.samples 20000

    Args:
        data: Store made by prepare.
        run: Folder of the run: configuration, metrics, checkpoints, exported weights.
        preset: tiny, sssd_ecg, sssd_ecg_nle, or a YAML file; flags override it.
        validate_every: The same as --train.validate-every: samples between validations, which draw
            the records of fold 9 anew and name the best checkpoint in RUN/best; 0: none.
        distill_from: Folder of a trained run, instead of a preset: its settings with a tenth of the
            learning rate, and its weights to start from; the new network learns to do in one step
            what they do in two.
        steps: With --distill-from: DDIM steps that the new network samples in. Of a distilled run
            half of its own, 16 to 8 to 4; else at most half of the schedule's.
        dry_run: Print the resolved configuration, parameter count and memory estimate, then stop.
    """
    from sssd_hpc.ecg.store import Store
    from sssd_hpc.train import loop

    if preset and distill_from:
        raise UserError(
            "--preset and --distill-from are given: a student has its teacher's settings"
        )
    config = _student(config, distill_from, steps)
    if validate_every is not None:
        settings = dataclasses.replace(config.train, validate_every=validate_every)
        config = dataclasses.replace(config, train=settings)
    store = Store.open(data, verify=not dry_run)
    if dry_run:
        print(loop.describe(config, store))
        return
    loop.train(config, store, run, distill_from)
    print(f"{run}: trained; weights in {run / 'export' / 'model.safetensors'}")


def status(
    run: tyro.conf.Positional[Path],
    /,
    *,
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Say how a run or a synthetic set stands, from its files: alive or not, how far, how fast.

    Example: sssd-hpc status run

    Args:
        run: Folder of a run, or of a set that sample makes.
        json: Print JSON instead of text.
    """
    from sssd_hpc.generate import status as of_set
    from sssd_hpc.train import status as of_run

    if of_set.is_root(run):
        made = of_set.examine(run)
        print(_json(dataclasses.asdict(made)) if json else of_set.text(made, sys.stdout))
        return
    found = of_run.examine(run)
    print(_json(dataclasses.asdict(found)) if json else of_run.text(found, sys.stdout))


def sample(
    *,
    run: Path,
    like: Path,
    out: Path,
    checkpoint: str | None = None,
    folds: str = "1-10",
    sampler: Literal["ddpm", "ddim", "dpmpp", "plms", "split"] | None = None,
    steps: int | None = None,
    eta: float | None = None,
    guidance: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    weights: Literal["ema", "raw"] = "ema",
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int | None = None,
    seed: int = 0,
    shard: str = "0/1",
    only: int | None = None,
) -> None:
    """Make one synthetic record for each real one, with its labels, in PTB-XL's layout.

    Example: sssd-hpc sample --run run --like store --out synthetic

    Args:
        run: Folder of a trained run, or of a converted checkpoint.
        like: Store whose labels and folds are copied.
        out: Folder of the new WFDB root; the same command again goes on where it stopped.
        checkpoint: best (of the validations), latest, or a folder's name such as samples-000004000:
            draw with the weights of this checkpoint of the run. Default: those in RUN/export.
        folds: Folds to copy, for example 1-8; evaluate wants 9 and 10 too.
        sampler: ddpm: ancestral, as in the paper; ddim; dpmpp: DPM-Solver++(2M); plms; split: two
            calls a step, for strong guidance. Default: ddpm, or of a distilled run its ddim.
        steps: Steps a record, each one network call. Default: ddpm all of the run's, and no other
            number; ddim 50; the others 20.
        eta: Noise that ddim and dpmpp add: 0, the default, none; 1 as ancestral sampling does,
            which mends errors of the network.
        guidance: Weight of classifier-free guidance; 0 is none. It doubles what a call costs.
        guidance_interval: LOW HIGH: guide only where the noise level, sqrt(1 / alpha_bar - 1), lies
            in LOW to HIGH; elsewhere a call costs half. Default: everywhere.
        weights: Averaged (ema) or last (raw) weights.
        precision: fp32; or bf16: products in bfloat16, faster on a GPU, moving a record by some uV
            (docs/samplers.md).
        batch_size: Records made at once. Default: as the set was begun; else 16 on a CPU, and on a
            GPU what its memory holds, by measurement. Several shards on GPUs need it said.
        seed: Seed; record and seed alone decide the noise.
        shard: K/N: make part K, of 0 .. N-1; any process, at any time, may make another. The last
            to end finishes the set. launch/sample.py starts them on a cluster.
        only: Number of one record: draw it alone, compare it with the one in --out, write nothing.
    """
    from sssd_hpc.ecg.store import Store
    from sssd_hpc.generate import sampling

    chosen, part = config.parse_folds(folds), config.parse_shard(shard)
    plan = sampling.plan(
        run,
        Store.open(like, verify=True),
        checkpoint=checkpoint,
        folds=chosen,
        sampler=sampler,
        steps=steps,
        eta=eta,
        guidance=guidance,
        guidance_interval=guidance_interval,
        weights=weights,
        precision=precision,
        batch_size=batch_size,
        begun=out,
        shards=part[1],
        seed=seed,
    )
    if only is not None:
        apart, exact = sampling.redraw(plan, out, only)
        where = "at its batch size and device" if exact else "at another batch size or device"
        print(f"{out}: record {only} drawn alone {where}: {apart} uV apart")
        return
    made = sampling.make(plan, out, part)
    whole = sampling.is_finished(out)
    print(f"{out}: {made} record(s) made now, the set is {'complete' if whole else 'unfinished'}")


def verify(root: tyro.conf.Positional[Path], /) -> None:
    """Prove a synthetic set: every record of its manifest once, with its labels, and every hash.

    Example: sssd-hpc verify synthetic

    Args:
        root: Folder that sample made.
    """
    from sssd_hpc.generate.merge import verify as run

    print(f"{root}: {run(root)} record(s), each once and with its labels; every hash is right")


def export(
    root: tyro.conf.Positional[Path],
    /,
    *,
    out: Path,
    format: Literal["npy", "zarr", "hdf5"] = "npy",
) -> None:
    """Write a synthetic set as arrays: float32 signals in mV, labels, folds, ecg ids, names.

    Example: sssd-hpc export synthetic --out synthetic.h5 --format hdf5

    Args:
        root: Folder that sample made.
        out: New folder (npy, zarr) or file (hdf5).
        format: npy: one file an array; zarr or hdf5: pip install "sssd_hpc[arrays]".
    """
    from sssd_hpc.generate.export import export as run

    print(f"{out}: {run(root, out, format)} record(s) as {format}")


def evaluate(
    *,
    out: Path,
    real: Path | None = None,
    synthetic: tuple[str, ...] = (),
    run: Path | None = None,
    protocol: Literal[
        "utility", "conditioning", "multilabel", "augmentation", "convergence"
    ] = "utility",
    label: str | None = None,
    epochs: int | None = None,
    seed: int = 0,
    seeds: int = 1,
    sampler: Literal["ddpm", "ddim", "dpmpp", "plms", "split"] | None = None,
    steps: int | None = None,
    eta: float | None = None,
    batch_size: int | None = None,
    allow_leakage: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    self_test: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Score a synthetic data set by what classifiers learn of it; make the tables of the paper.

    Example: sssd-hpc evaluate --real store --synthetic synthetic --out report --label NORM

    Args:
        out: Folder of the report: report.json, report.html, figures; cache may be removed.
        real: Store of the real records.
        synthetic: Synthetic WFDB root, or a store of it; for conditioning several, each as
            NAME=PATH, for example sssd_ecg=a nle=b frozen=c.
        protocol: utility: TRTR, TSTR, TRTS and TSTS of one label, and fidelity, physiology, effects
            of labels and privacy beside what real records have. conditioning (Table I): TSTR and
            TRTS of several sets, label by label. multilabel (Table II): all labels at once.
            augmentation (Table III): real positives doubled, or synthetic ones added.
            convergence (Table IV): a set of each checkpoint in --run, by samples seen; no
            --synthetic.
        run: Folder of the run whose checkpoints convergence compares.
        label: Label to classify, several with commas except for utility; default:
            NORM where the store has it, the paper's labels, or all labels for multilabel.
        epochs: Epochs of each classifier; default: 15.
        seed: Seed of the first classifier and of the bootstrap.
        seeds: Classifiers of each side; metrics are means over them, intervals cover them.
        sampler: What convergence draws its sets with, as in sample; default: dpmpp with eta 1.
        steps: Of that sampler; default: its own, 20 of dpmpp.
        eta: Noise that it adds.
        batch_size: Records that it makes at once; default: see sample.
        allow_leakage: Go on though training records turn up in a test set; the report says so.
        self_test: Instead: damage simulated records at rising doses and see that every measure
            notices what it must; 3 minutes, matrix pictures, exit code 1 if one does not.
    """
    from sssd_hpc.ecg.store import Store
    from sssd_hpc.evaluate import inspection, protocols, report

    if self_test:
        if real or synthetic or run:
            raise UserError("--self-test makes its own records; leave out --real and --synthetic")
        tested = inspection.self_check(out, seed=seed)
        for name, one in tested.items():
            print(
                f"{name}: {len(one.measures)} measures, {len(one.damages)} damages, "
                f"{len(one.failures)} failures"
            )
            print(f"picture: {out / 'figures' / f'self_test_{name}.png'}")
            for failure in one.failures:
                print(failure)
        if any(one.failures for one in tested.values()):
            sys.exit(EXIT_FAILED)
        return
    if (protocol == "convergence") != (run is not None) or (run and synthetic):
        raise UserError("--protocol convergence takes --run, the others --synthetic; give that one")
    if real is None or not (synthetic or run):
        missing = "--synthetic" if real else "--real"
        raise UserError(f"{missing} is missing; evaluate needs --real STORE and --synthetic ROOT")
    if run is None and (sampler, steps, eta, batch_size) != (None, None, None, None):
        raise UserError(
            "--sampler, --steps, --eta and --batch-size are for --protocol convergence, which draws"
        )

    options: dict[str, Any] = {
        "seed": seed,
        "seeds": seeds,
        "epochs": epochs,
        "allow_leakage": allow_leakage,
    }
    labels = label.split(",") if label else ()
    named = protocols.named_sets(synthetic)
    if protocol == "utility" and len(named) != 1:
        raise UserError(f"--synthetic names {len(named)} sets; utility takes one")
    real_store = Store.open(real, verify=True)
    sets = {
        name: protocols.open_store_or_root(
            path, out / protocols.CACHE, real_store, allow_leakage=allow_leakage
        )
        for name, path in named.items()
    }
    if run is not None:
        from sssd_hpc.generate.convergence import convergence

        options |= {"sampler": sampler, "steps": steps, "eta": eta, "batch_size": batch_size}
        result = convergence(run, real_store, out, labels=labels, **options)
    elif protocol == "utility":
        (only,) = sets.values()
        result = protocols.evaluate(real_store, only, out, label=label, **options)
    else:
        result = protocols.tabulate(protocol, real_store, sets, out, labels=labels, **options)
    print(report.table(result))
    print(f"report: {out / 'report.html'}")
    if protocol == "utility":
        print(f"picture: {out / 'figures' / 'records.png'}")


def review_make(
    *,
    real: Path,
    synthetic: Path,
    out: Path,
    labels: str = "AFIB,CRBBB,PVC,IMI",
    records_per_class: int = 20,
    ask: Literal["both", "report", "generated"] = "both",
    seed: int = 0,
) -> None:
    """Make a blinded questionnaire for physicians: one offline HTML file to send, one key to keep.

    Example: sssd-hpc review make --real store --synthetic synthetic --out review

    Args:
        real: Store of the real records.
        synthetic: Synthetic WFDB root, or a store of it.
        out: Folder of questionnaire.html, which is sent, and key.json, which never is.
        labels: Statement codes or label names asked about, joined by commas; class Other, records
            with none of them, is added.
        records_per_class: Real records of each class, and as many synthetic ones; the default
            makes the paper's 200.
        ask: report: a free-text report of each record; generated: "is this a generated
            recording?"; both.
        seed: Seed of choice, order and ids.
    """
    from sssd_hpc.ecg.store import Store
    from sssd_hpc.evaluate import protocols
    from sssd_hpc.review import make as room

    real_store = Store.open(real, verify=True)
    synthetic_store = protocols.open_store_or_root(synthetic, out / protocols.CACHE, real_store)
    key = room.make(
        real_store,
        synthetic_store,
        out,
        labels=labels.split(","),
        records_per_class=records_per_class,
        ask=ask,
        seed=seed,
    )
    print(
        f"send: {out / room.PAGE} ({len(key.records)} records)\n"
        f"keep: {out / room.KEY}, which tells real from synthetic; never send it"
    )


def review_score(
    *,
    key: Path,
    answers: tuple[Path, ...],
    out: Path,
    keywords: Path | None = None,
) -> None:
    """Score physicians' answers: accuracy per class, real against generated, agreement.

    Example: sssd-hpc review score --key review/key.json --answers anna.json ben.json --out scores

    Args:
        key: The questionnaire's key.json.
        answers: Files that the page saved, one a reader.
        out: Folder of the result: review.json, review.html.
        keywords: YAML file with further keywords of classes and signs, in the form of
            sssd_hpc/review/keywords.yaml.
    """
    from sssd_hpc.review import result, score

    scored = score.score(key, answers, keywords)
    result.write(scored, out)
    print(f"{result.text(scored)}\nreport: {out / result.PAGE}")


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
    function.__name__.replace("_", " "): function
    for function in (
        *(doctor, simulate, prepare, train, status, sample, verify, export, evaluate),
        *(review_make, review_score, plot, convert),
    )
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of the process."""
    # OpenMP threads that spin while they wait starve whatever else runs on their cores, which made
    # steps 20 times slower on a shared machine. Read when torch is loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for number in STOPS:
        signal.signal(number, _terminate)
    try:
        return _run(list(sys.argv[1:] if args is None else args))
    finally:
        # srun sends TERM to all ranks when the first one ends: a code that is decided stays.
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)


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
        print(_overview(COMMANDS))
        return
    if args[0] in ("-V", "--version"):
        print(__version__)
        return
    name, *flags = args
    if flags and f"{name} {flags[0]}" in COMMANDS:
        name, *flags = f"{name} {flags[0]}", *flags[1:]
    group = [command for command in COMMANDS if command.startswith(f"{name} ")]
    if group and flags in ([], ["-h"], ["--help"]):
        print(_overview(group))
        return
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


def _overview(names: Iterable[str]) -> str:
    lines = ["usage: sssd-hpc COMMAND [--help] [OPTIONS]", ""]
    for name in names:
        lines.append(f"  {name:<12} {(COMMANDS[name].__doc__ or '').splitlines()[0]}")
    return "\n".join(
        [*lines, "", "sssd-hpc COMMAND --help shows its options, defaults and an example."]
    )


def _with_preset(flags: list[str]) -> list[str]:
    """Place the flags of `--preset`, or those of the teacher, before the user's own, which win."""
    for index, flag in enumerate(flags):
        name, _, value = flag.partition("=")
        if name in ("--preset", "--distill-from"):
            value = value or "".join(flags[index + 1 : index + 2])
            if name == "--preset":
                tree = config.read_yaml(config.preset_path(value))
            else:
                tree = config.for_student(config.read_yaml(Path(value) / "config.yaml"))
            return [*config.flags(tree), *flags]
    return flags


def _student(
    settings: config.Config, distill_from: Path | None, steps: int | None
) -> config.Config:
    """Return the settings of a student of so many steps; without a teacher, the settings."""
    if (distill_from is None) != (steps is None):
        raise UserError("--distill-from and --steps belong together; give both or neither")
    if steps is None:
        return settings
    if steps < 1:
        raise UserError(f"--steps is {steps}; a student takes at least 1 step")
    diffusion = dataclasses.replace(settings.diffusion, distilled_steps=steps)
    return dataclasses.replace(settings, diffusion=diffusion)


def _json(value: object) -> str:
    return json.dumps(value, indent=2)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"signal {signal.Signals(number).name}")
