"""From an exported model and a store to a finished synthetic root, whatever happens in between."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import wfdb
from numpy.typing import NDArray

import sssd_hpc
from sssd_hpc import generate
from sssd_hpc.diffusion import NoiseSchedule, from_velocity
from sssd_hpc.ecg.leads import EIGHT, LEADS
from sssd_hpc.ecg.prepare import prepare
from sssd_hpc.ecg.ptbxl import read_table
from sssd_hpc.ecg.statements import STATEMENTS, label_names
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.generate import sampling
from sssd_hpc.generate.manifest import build
from sssd_hpc.generate.names import MANIFEST_FILE, REQUEST_FILE
from sssd_hpc.model.draw import Sampler, draw_signals
from sssd_hpc.model.export import load_export

from .conftest import ECG_IDS, FOLDS, LABELS, LENGTH, STEPS, make_run, make_store


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def adc(root: Path) -> dict[int, NDArray[np.int64]]:
    return {
        row.ecg_id: wfdb.rdrecord(str(root / row.filename_lr), physical=False).d_signal.T.astype(
            np.int64
        )
        for row in read_table(root).rows
    }


@pytest.fixture(scope="module")
def twin(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed root in batches of 8."""
    folder = tmp_path_factory.mktemp("canary")
    out = folder / "twin"
    made = generate.sample(run, make_store(folder / "store"), out, seed=3, batch_size=8)
    assert made == len(ECG_IDS)
    return out


def test_the_twin_has_one_record_for_each_real_one_with_its_labels(twin: Path) -> None:
    like = make_store(twin)
    rows = {row.ecg_id: row for row in read_table(twin).rows}
    assert sorted(rows) == sorted(ECG_IDS)
    for index, ecg_id in enumerate(ECG_IDS):
        given = {name for k, name in enumerate(LABELS) if like.labels[index, k]}
        assert rows[ecg_id].scp_codes == dict.fromkeys(given, 100.0)
        assert rows[ecg_id].strat_fold == FOLDS[index]
        header = wfdb.rdheader(str(twin / rows[ecg_id].filename_lr))
        assert (header.fs, header.sig_len, tuple(header.sig_name)) == (100, LENGTH, LEADS)
        assert f"labels: {' '.join(sorted(given)) or 'none'}" in header.comments
        assert "seed: 3" in header.comments
        assert any("synthetic" in comment for comment in header.comments)


def test_the_twin_lists_its_files_with_their_hashes(twin: Path) -> None:
    listed = {}
    for line in (twin / "SHA256SUMS.txt").read_text().splitlines():
        digest, _, name = line.partition(" ")
        listed[name] = digest
    for name, digest in listed.items():
        assert hashlib.sha256((twin / name).read_bytes()).hexdigest() == digest
    assert set(contents(twin)) - set(listed) == {"SHA256SUMS.txt", REQUEST_FILE, MANIFEST_FILE}
    assert (twin / "RECORDS").read_text().count("\n") == len(ECG_IDS)


def test_nothing_private_and_no_path_is_in_the_twin(twin: Path) -> None:
    for name, data in contents(twin).items():
        assert b"canary" not in data, name
        assert str(twin.parent).encode() not in data, name
        assert b"/home" not in data, name


@pytest.mark.parametrize("column", ["age", "sex", "report", "recording_date", "device"])
def test_columns_about_people_are_empty(twin: Path, column: str) -> None:
    table = pandas.read_csv(twin / "ptbxl_database.csv", index_col="ecg_id")
    assert table[column].isna().all()
    assert table.patient_id.astype(int).is_unique
    assert (table.source_ecg_id == table.index).all()
    assert (table.seed == 3).all()


def test_the_card_counts_every_label_in_every_fold(twin: Path) -> None:
    card = (twin / "README.md").read_text()
    like = make_store(twin)
    table = {
        cells[0]: [int(cell) for cell in cells[1:]]
        for cells in ([c.strip() for c in row.strip("|").split("|")] for row in card.splitlines())
        if cells[0] in (*LABELS, "records")
    }
    folds = sorted(set(FOLDS))
    for k, name in enumerate(LABELS):
        per_fold = [int(like.labels[np.equal(FOLDS, fold), k].sum()) for fold in folds]
        assert table[name] == [sum(per_fold), *per_fold]
    assert table["records"][0] == len(ECG_IDS)
    for said in ("synthetic", "4000", "ddpm, 5 steps", "CC BY 4.0", "Not for diagnosis"):
        assert said in card


def test_limb_leads_obey_einthoven_and_goldberger_within_rounding(twin: Path) -> None:
    for signals in adc(twin).values():
        one, two, three, right, left, foot = signals[:6]
        # Each written lead is off by at most half a unit; the sums of whole numbers below are
        # therefore off by at most 1.5, that is 1, and the last by 0.5 + (0.5 + 0.5) / 2 = 1.
        assert np.abs(one + three - two).max() <= 1
        assert np.abs(right + left + foot).max() <= 1
        assert np.abs(right + (one + two) / 2).max() <= 1


def test_samples_are_the_models_output_in_microvolts(run: Path, twin: Path) -> None:
    model, metadata = load_export(run / "export" / "model.safetensors")
    manifest = build(make_store(twin), range(1, 11))
    ready = Sampler(
        denoiser=model,
        schedule=NoiseSchedule.linear(**metadata["diffusion"]),
        leads=EIGHT,
        length=LENGTH,
        scale_mv=0.5,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        signals = draw_signals(
            ready, manifest.ecg_id[:8], manifest.labels[:8], seed=3, batch_size=8
        )
    written = adc(twin)
    for ecg_id, signal_mv in zip(manifest.ecg_id[:8], signals, strict=True):
        assert np.abs(written[int(ecg_id)] - 1000 * signal_mv).max() < 0.5 + 0.1


def test_a_network_that_predicts_velocity_is_sampled_as_one(like: Store, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", prediction="velocity")
    generate.sample(run, like, tmp_path / "twin")
    model, metadata = load_export(run / "export" / "model.safetensors")
    schedule = NoiseSchedule.linear(**metadata["diffusion"])
    manifest = build(like, range(1, 11))
    ready = Sampler(
        denoiser=from_velocity(model, schedule),
        schedule=schedule,
        leads=EIGHT,
        length=LENGTH,
        scale_mv=0.5,
        device=torch.device("cpu"),
    )
    signals = draw_signals(ready, manifest.ecg_id, manifest.labels, seed=0, batch_size=16)
    written = adc(tmp_path / "twin")
    for ecg_id, signal_mv in zip(manifest.ecg_id, signals, strict=True):
        assert np.abs(written[int(ecg_id)] - 1000 * signal_mv).max() < 0.5 + 0.1


@pytest.mark.parametrize("batch_size", [8, 6])
def test_a_record_is_the_same_whichever_others_are_made(
    run: Path, like: Store, tmp_path: Path, batch_size: int
) -> None:
    generate.sample(run, like, tmp_path / "all", batch_size=batch_size)
    generate.sample(run, like, tmp_path / "some", batch_size=batch_size, folds=(9, 2))
    whole, part = adc(tmp_path / "all"), adc(tmp_path / "some")
    assert sorted(part) == sorted(
        i for i, fold in zip(ECG_IDS, FOLDS, strict=True) if fold in (2, 9)
    )
    for ecg_id, signals in part.items():
        assert np.array_equal(signals, whole[ecg_id])


def test_batch_sizes_differ_by_rounding_alone(run: Path, like: Store, tmp_path: Path) -> None:
    """Two roundings of values d uV apart differ by at most floor(d) + 1: by 1 LSB while d < 1.

    A sample flips where a half lies between the two values, so a share of about d of all flips.
    """
    model, metadata = load_export(run / "export" / "model.safetensors")
    ready = Sampler(
        denoiser=model.for_sampling(LENGTH),
        schedule=NoiseSchedule.linear(**metadata["diffusion"]),
        leads=EIGHT,
        length=LENGTH,
        scale_mv=0.5,
        device=torch.device("cpu"),
    )
    manifest = build(like, range(1, 11))
    drawn = {
        size: np.concatenate(
            [
                draw_signals(ready, manifest.ecg_id[b], manifest.labels[b], seed=0, batch_size=size)
                for b in manifest.batches(size)
            ]
        )
        for size in (8, 6, 3)
    }
    distance_uv = 1000 * max(np.abs(drawn[8] - drawn[size]).max() for size in (6, 3))
    assert distance_uv < 0.1
    roots = {}
    for size in (8, 6, 3):
        generate.sample(run, like, tmp_path / str(size), batch_size=size)
        roots[size] = np.stack(
            [signals for _, signals in sorted(adc(tmp_path / str(size)).items())]
        )
    for size in (6, 3):
        flips = np.abs(roots[8] - roots[size])
        assert flips.max() <= 1
        assert flips.mean() <= 2 * distance_uv + 1e-3


def test_labels_seed_weights_and_guidance_each_change_the_signals(
    run: Path, like: Store, tmp_path: Path
) -> None:
    def first(name: str, store: Store = like, **options: object) -> NDArray[np.int64]:
        generate.sample(run, store, tmp_path / name, folds=(10,), **options)  # type: ignore[arg-type]
        return adc(tmp_path / name)[10]

    other = make_store(like.path)
    other.labels[:] = 1 - other.labels
    base = first("base")
    for changed in (
        first("labels", other),
        first("seed", seed=1),
        first("weights", weights="raw"),
        first("guidance", guidance=2.0),
    ):
        assert np.abs(base - changed).max() > 2


METHODS: dict[str, dict[str, object]] = {
    "ddim, 5 steps, guidance 0": {"sampler": "ddim"},
    "ddim, 3 steps, eta 0.5, guidance 0": {"sampler": "ddim", "steps": 3, "eta": 0.5},
    "dpmpp, 3 steps, guidance 0": {"sampler": "dpmpp", "steps": 3},
    "dpmpp, 3 steps, eta 1, guidance 0": {"sampler": "dpmpp", "steps": 3, "eta": 1.0},
    "plms, 4 steps, guidance 0": {"sampler": "plms", "steps": 4},
    "split, 2 steps, guidance 2": {"sampler": "split", "steps": 2, "guidance": 2.0},
    "ddpm, 5 steps, guidance 1 at noise levels 0.1 to 0.9": {
        "guidance": 1.0,
        "guidance_interval": (0.1, 0.9),
    },
}


def test_every_sampler_makes_another_set_that_names_it(
    run: Path, like: Store, tmp_path: Path
) -> None:
    sets = []
    for number, (told, options) in enumerate({"ddpm, 5 steps, guidance 0": {}, **METHODS}.items()):
        out = tmp_path / str(number)
        generate.sample(run, like, out, folds=(9, 10), **options)  # type: ignore[arg-type]
        header = wfdb.rdheader(str(out / "records100/00000/00010_lr"))
        assert f"sampler: {told}" in header.comments
        assert f"| sampler | {told} |" in (out / "README.md").read_text()
        # The same command on the finished set finds it its own.
        assert generate.sample(run, like, out, folds=(9, 10), **options) == 0  # type: ignore[arg-type]
        sets.append(np.stack([signals for _, signals in sorted(adc(out).items())]))
    for number, one in enumerate(sets):
        assert all(np.abs(one - other).max() > 2 for other in sets[:number])


def test_bfloat16_is_another_set_near_the_first_and_told(
    run: Path, like: Store, tmp_path: Path
) -> None:
    sets = []
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        generate.sample(run, like, out, folds=(9, 10), precision=precision)
        sets.append(np.stack([signals for _, signals in sorted(adc(out).items())]))
    header = wfdb.rdheader(str(tmp_path / "bf16" / "records100/00000/00010_lr"))
    assert "sampler: ddpm, 5 steps, guidance 0, in bf16" in header.comments
    apart = np.abs(sets[1].astype(float) - sets[0]).max()
    # bfloat16 has 8 bits: each of 5 steps errs by under 2^-8 of what it adds.
    assert 0 < apart < 5 * 2**-8 * 4 * np.abs(sets[0]).max()
    with pytest.raises(UserError, match="precision bf16"):
        generate.sample(run, like, tmp_path / "bf16", folds=(9, 10))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp", "plms", "split"])
def test_a_model_of_pure_noise_is_sampled_by_every_sampler(
    like: Store, tmp_path: Path, sampler: str
) -> None:
    schedule = {"num_steps": 5, "beta_start": 1e-4, "beta_end": 0.5, "zero_terminal_snr": True}
    run = make_run(tmp_path / "run", diffusion=schedule, prediction="velocity")
    options: dict[str, object] = {"sampler": sampler, "guidance": 1.0}
    generate.sample(run, like, tmp_path / "out", folds=(10,), **options)  # type: ignore[arg-type]
    assert all(np.ptp(signals) > 10 for signals in adc(tmp_path / "out").values())
    run = make_run(tmp_path / "eps", diffusion=schedule)
    with pytest.raises(UserError, match="predicts epsilon on a schedule that ends in pure noise"):
        generate.sample(run, like, tmp_path / "eps out", sampler=sampler)


class Killed(BaseException):
    """Stands for a kill: nothing may catch it and go on."""


@pytest.mark.parametrize("after", [False, True], ids=["before the rename", "after the rename"])
def test_a_kill_at_any_write_ends_in_the_bytes_of_an_undisturbed_run(
    run: Path, like: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    options = {"folds": (9, 10), "batch_size": 3, "seed": 5}
    rename, fail_at, num_writes = os.replace, 0, 0

    def count(*args: object) -> None:
        nonlocal num_writes
        num_writes += 1
        if num_writes == fail_at and not after:
            raise Killed
        rename(*args)  # type: ignore[call-overload]
        if num_writes == fail_at:
            raise Killed

    monkeypatch.setattr("os.replace", count)
    generate.sample(run, like, tmp_path / "calm", **options)  # type: ignore[arg-type]
    calm, total = contents(tmp_path / "calm"), num_writes
    # The manifest, two of progress, two files for each of four records, five files of the root.
    assert total == 1 + 2 + 2 * 4 + 5
    for fail_at in range(1, total + 1):
        out, num_writes = tmp_path / f"killed{fail_at}", 0
        monkeypatch.setattr("os.replace", count)
        with pytest.raises(Killed):
            generate.sample(run, like, out, **options)  # type: ignore[arg-type]
        monkeypatch.setattr("os.replace", rename)
        for path in out.rglob("*.hea"):
            assert calm[path.relative_to(out).as_posix()] == path.read_bytes()
        # What a kill leaves that an exception does not: temporary files.
        if (out / "records100/00000").is_dir() and not (out / "SHA256SUMS.txt").exists():
            (out / "records100/00000/.tmp-00009_lr.dat-1-abcd").write_bytes(b"half")
        generate.sample(run, like, out, **options)  # type: ignore[arg-type]
        assert contents(out) == calm


def test_a_process_killed_while_writing_resumes_to_the_same_sums(
    run: Path, like: Store, tmp_path: Path, twin: Path
) -> None:
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.generate.conftest import make_store
from sssd_hpc import generate
import torch
torch.set_num_threads(1)
rename, left = os.replace, 12
def replace(*args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*args)
os.replace = replace
generate.sample(Path({str(run)!r}), make_store(Path("store")), Path({str(tmp_path / "out")!r}),
                seed=3, batch_size=8)
"""
    package = Path(sssd_hpc.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=package, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = contents(tmp_path / "out")
    assert any(".tmp-" in name for name in left)
    assert "SHA256SUMS.txt" not in left
    made = generate.sample(run, like, tmp_path / "out", seed=3, batch_size=8)
    assert 0 < made < len(ECG_IDS)
    assert contents(tmp_path / "out") == contents(twin)


def test_a_finished_root_is_checked_and_left_as_it_is(
    run: Path, like: Store, tmp_path: Path, twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(twin, tmp_path / "twin")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr("sssd_hpc.generate.sampling.run_shard", None)
    assert generate.sample(run, like, out, seed=3, batch_size=8) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_damaged_finished_root_is_mended(
    run: Path, like: Store, tmp_path: Path, twin: Path
) -> None:
    out = shutil.copytree(twin, tmp_path / "twin")
    data = out / "records100/00000/00007_lr.dat"
    samples = np.fromfile(data, dtype="<i2").reshape(LENGTH, 12)
    # The checksum of WFDB, a sum, does not see two samples exchanged; SHA-256 does.
    samples[[0, 1]] = samples[[1, 0]]
    data.write_bytes(samples.tobytes())
    (out / "records100/21000/21837_lr.hea").unlink()
    (out / "README.md").write_text("real ECGs")
    assert generate.sample(run, like, out, seed=3, batch_size=8) == 2
    assert contents(out) == contents(twin)


def test_another_request_on_a_root_is_refused_and_changes_nothing(
    run: Path, like: Store, tmp_path: Path, twin: Path
) -> None:
    before = contents(twin)
    for options in (
        {"seed": 4},
        {"guidance": 1.0},
        {"sampler": "ddim"},
        {"batch_size": 4},
        {"folds": (1,)},
    ):
        with pytest.raises(UserError, match=f"begun with {next(iter(options))}.*another --out"):
            generate.sample(run, like, twin, **({"seed": 3, "batch_size": 8} | options))  # type: ignore[arg-type]
    relabelled = make_store(like.path)
    relabelled.labels[0, 0] ^= 1
    with pytest.raises(UserError, match="manifest_sha256"):
        generate.sample(run, relabelled, twin, seed=3, batch_size=8)
    assert contents(twin) == before


def test_a_model_and_a_store_that_do_not_fit_are_refused(
    run: Path, like: Store, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cases = [
        (make_store(tmp_path / "a", ("1AVB", "AFIB", "SR")), "labels 1AVB,AFIB,NORM.*1AVB,AFIB,SR"),
        (make_store(tmp_path / "a", LABELS[::-1]), "labels 1AVB,AFIB,NORM.*NORM,AFIB,1AVB"),
        (make_store(tmp_path / "a", rate_hz=500), "rate in Hz 100, .* has 500"),
        (make_store(tmp_path / "a", length=100), f"length in samples {LENGTH}, .* has 100"),
    ]
    for store, match in cases:
        with pytest.raises(UserError, match=match) as caught:
            generate.sample(run, store, out)
        assert str(run) in str(caught.value)
        assert str(store.path) in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sampler": "euler"}, "'euler'; samplers are ddpm, ddim, dpmpp, plms, split"),
        ({"steps": STEPS - 1}, "--steps is 4; ddpm takes all 5"),
        ({"sampler": "ddim", "steps": 0}, "--steps is 0; .* allows 1 to 5"),
        ({"sampler": "dpmpp", "steps": STEPS + 1}, "--steps is 6; .* allows 1 to 5"),
        ({"sampler": "ddim", "eta": 1.5}, "--eta is 1.5"),
        ({"sampler": "plms", "eta": 0.5}, "--eta is 0.5 but plms has no eta"),
        ({"guidance_interval": (0.0, 1.0)}, "--guidance is 0; give both"),
        ({"guidance": 1.0, "guidance_interval": (5.0, 0.3)}, "interval is 5 0.3; .*LOW <= HIGH"),
        ({"guidance": 1.0, "guidance_interval": (50.0, 60.0)}, "no step's noise level"),
        ({"guidance": 1.0, "guidance_interval": (0.0, np.inf)}, "both ends must be finite"),
        ({"guidance": float("nan")}, "--guidance is nan"),
        ({"guidance": -0.5}, "--guidance is -0.5"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 2**64}, "2.64 - 1"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"folds": ()}, "no record in the folds"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_written(
    run: Path, like: Store, tmp_path: Path, options: dict[str, object], match: str
) -> None:
    with pytest.raises(UserError, match=match):
        generate.sample(run, like, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_the_models_own_number_of_steps_may_be_said(run: Path, like: Store, tmp_path: Path) -> None:
    assert generate.sample(run, like, tmp_path / "out", steps=STEPS, seed=2**64 - 1) == len(ECG_IDS)


def test_a_run_without_export_says_to_train(like: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train it first, or let its training finish"):
        generate.sample(tmp_path, like, tmp_path / "out")


def test_an_export_that_changes_while_it_is_read_is_refused(
    run: Path, like: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = iter(("a" * 64, "b" * 64))
    monkeypatch.setattr("sssd_hpc.generate.sampling.sha256_file", lambda path: next(hashes))
    with pytest.raises(UserError, match="changed while it was read"):
        generate.sample(run, like, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_without_a_schedule_or_with_other_leads_is_refused(
    like: Store, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "schedule", diffusion={"num_steps": 5, "beta_start": 2.0})
    with pytest.raises(UserError, match="describes no noise schedule"):
        generate.sample(run, like, tmp_path / "out")
    run = make_run(tmp_path / "leads", leads=[*LEADS[:8]])
    with pytest.raises(UserError, match=r"has the leads I,II,III,.*needs the 8 leads I,AVF,V1"):
        generate.sample(run, like, tmp_path / "out")


@pytest.mark.parametrize("kind", ["frozen", "sum"])
def test_guidance_needs_a_row_for_unknown_labels(like: Store, tmp_path: Path, kind: str) -> None:
    run = make_run(tmp_path / "run", kind=kind)
    with pytest.raises(UserError, match=rf"no row for unknown labels \(label_embedding {kind}\)"):
        generate.sample(run, like, tmp_path / "out", guidance=1.0)
    assert generate.sample(run, like, tmp_path / "out") == len(ECG_IDS)


def test_guidance_needs_a_training_that_dropped_labels(like: Store, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", label_dropout=0.0)
    with pytest.raises(UserError, match="trained with label_dropout 0"):
        generate.sample(run, like, tmp_path / "out", guidance=1.0)


def test_a_diverged_model_names_the_record_and_leaves_the_root_unfinished(
    like: Store, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", scale_mv=1e6)
    with pytest.raises(UserError, match=r"record 5: .*exceeds .*train longer"):
        generate.sample(run, like, tmp_path / "out")
    assert not (tmp_path / "out" / "SHA256SUMS.txt").exists()
    assert not list((tmp_path / "out").rglob("*.hea"))


def test_two_processes_cannot_write_one_root(run: Path, like: Store, tmp_path: Path) -> None:
    generate.sample(run, like, tmp_path / "out")
    with open(tmp_path / "out" / REQUEST_FILE, "rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is sampling"):
            generate.sample(run, like, tmp_path / "out")


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        ("super", ("CD", "HYP", "MI", "NORM", "STTC")),
        ("AFIB,NORM", ("AFIB", "NORM")),
        ("NORM", ("NORM",)),
        ("sub", None),
        ("all", None),
    ],
)
def test_prepare_reads_the_twin_back_with_the_same_labels(
    tmp_path: Path, selection: str, names: tuple[str, ...] | None
) -> None:
    names = names or label_names(selection, STATEMENTS)
    like = make_store(tmp_path / "store", names, length=1000, command={"labels": selection})
    like.labels[:] = np.random.default_rng(0).random(like.labels.shape) < 0.3
    run = make_run(tmp_path / "run", names, length=1000)
    generate.sample(run, like, tmp_path / "twin")
    back = prepare(tmp_path / "twin", tmp_path / "back", labels=selection)
    assert back.label_names == names
    assert back.num_records == len(ECG_IDS)
    assert back.manifest["source"]["synthetic"]
    order = np.argsort(ECG_IDS)
    assert np.array_equal(back.ecg_id, np.sort(ECG_IDS))
    assert np.array_equal(back.labels, like.labels[order])
    assert np.array_equal(back.strat_fold, np.array(FOLDS)[order])


def test_a_500_hz_store_gives_a_500_hz_root(tmp_path: Path) -> None:
    like = make_store(tmp_path / "store", rate_hz=500)
    run = make_run(tmp_path / "run", rate_hz=500)
    generate.sample(run, like, tmp_path / "twin", folds=(10,))
    rows = read_table(tmp_path / "twin").rows
    assert [row.filename_lr for row in rows] == ["", ""]
    assert [row.filename_hr for row in rows] == [
        "records500/00000/00010_hr",
        "records500/00000/00011_hr",
    ]
    assert wfdb.rdheader(str(tmp_path / "twin" / rows[0].filename_hr)).fs == 500


def test_without_a_batch_size_it_is_that_of_the_set_or_of_the_device(
    run: Path, like: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert sampling.plan(run, like, begun=out).request.batch_size == 16
    generate.sample(run, like, out, batch_size=6, folds=(9,))
    planned = sampling.plan(run, like, begun=out, folds=(9,))
    assert planned.request.batch_size == 6
    assert sampling.make(planned, out) == 0
    (out / ".generation.json").write_text('{"batch_size": "many"}')
    with pytest.raises(UserError, match="was begun with"):
        sampling.make(sampling.plan(run, like, begun=out, folds=(9,)), out)
    monkeypatch.setattr(sampling, "fitting_batch", lambda *a, guided: 32 if guided else 64)
    assert sampling.plan(run, like).request.batch_size == 64


def test_shards_on_gpus_need_one_batch_size(
    run: Path, like: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="--batch-size is missing: shards on GPUs"):
        sampling.plan(run, like, shards=4)
