"""One set by any number of processes, in any order, whatever befalls them: the same bytes."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sssd_hpc import generate
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.files import BusyError
from sssd_hpc.generate import sampling
from sssd_hpc.generate.merge import verify
from sssd_hpc.generate.names import MANIFEST_FILE
from sssd_hpc.generate.root import locked, shard_locked

from .conftest import ECG_IDS, make_store

OPTIONS: dict[str, Any] = {"seed": 3, "batch_size": 2}


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def calm(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root that one process made undisturbed: six batches of two."""
    folder = tmp_path_factory.mktemp("calm")
    generate.sample(run, make_store(folder / "store"), folder / "out", **OPTIONS)
    return folder / "out"


@pytest.fixture
def make(run: Path, like: Store, tmp_path: Path) -> Callable[..., int]:
    def make(number: int, count: int, **changes: Any) -> int:
        options = {**OPTIONS, **changes}
        return generate.sample(run, like, tmp_path / "out", shard=(number, count), **options)

    return make


@pytest.mark.parametrize("count", [1, 3, 16])
def test_any_number_of_shards_in_any_order_makes_the_same_root(
    make: Callable[..., int], calm: Path, tmp_path: Path, count: int
) -> None:
    order = list(range(count))
    random.Random(count).shuffle(order)
    made = []
    for number in order:
        # Eleven records are six batches: of sixteen shards most have nothing to do.
        assert sampling.is_finished(tmp_path / "out") == (sum(made) == len(ECG_IDS))
        made.append(make(number, count))
    assert sum(made) == len(ECG_IDS)
    assert contents(tmp_path / "out") == contents(calm)
    assert all(make(number, count) == 0 for number in order[:2])


def test_the_number_of_shards_may_change_on_the_way(
    make: Callable[..., int], calm: Path, tmp_path: Path
) -> None:
    assert make(1, 3) == 4
    assert make(4, 5) == 0
    assert make(0, 2) == 4
    assert not sampling.is_finished(tmp_path / "out")
    assert make(0, 1) == len(ECG_IDS) - 8
    assert contents(tmp_path / "out") == contents(calm)


def test_shards_at_once_leave_the_end_to_the_last(
    make: Callable[..., int], calm: Path, tmp_path: Path
) -> None:
    """Each shard is launched twice, all at once: one draws, the other waits and finds it done."""
    made: list[int] = []
    start = threading.Barrier(6)

    def launch(number: int) -> None:
        start.wait()
        made.append(make(number, 3))

    threads = [threading.Thread(target=launch, args=(number % 3,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(made) == len(ECG_IDS)
    assert contents(tmp_path / "out") == contents(calm)


def test_a_second_launch_says_that_it_waits_and_at_last_gives_up(
    make: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "WAIT_S", 0.0)
    make(0, 2)
    out = tmp_path / "out"
    with locked(out, shared=True), shard_locked(out, 1, 2):
        with pytest.raises(BusyError, match="another process makes shard 1/2"):
            make(1, 2)
        with pytest.raises(BusyError, match="another process is sampling"):
            make(0, 1)
        # Not the last: it leaves the end to the one that is at work.
        assert make(0, 2) == 0
    assert make(1, 2) > 0
    assert sampling.is_finished(out)


def test_a_manifest_edited_midway_is_refused_and_nothing_is_mixed(
    make: Callable[..., int], calm: Path, tmp_path: Path
) -> None:
    make(0, 2)
    path = tmp_path / "out" / MANIFEST_FILE
    path.write_text(path.read_text().replace('"labels": ["1AVB"]', '"labels": ["NORM"]'))
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="was changed after it was written"):
        make(1, 2)
    assert contents(tmp_path / "out") == before
    path.unlink()
    make(1, 2)
    assert contents(tmp_path / "out") == contents(calm)


def test_a_manifest_edited_while_records_are_drawn_is_found_at_the_end(
    make: Callable[..., int], calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_shard = sampling.run_shard
    path = tmp_path / "out" / MANIFEST_FILE

    def edit(*arguments: Any, **options: Any) -> int:
        made = run_shard(*arguments, **options)
        path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))
        return made

    monkeypatch.setattr(sampling, "run_shard", edit)
    with pytest.raises(UserError, match="was changed after it was written"):
        make(0, 1)
    assert not sampling.is_finished(tmp_path / "out")
    monkeypatch.setattr(sampling, "run_shard", run_shard)
    path.unlink()
    assert make(0, 1) == 0
    assert contents(tmp_path / "out") == contents(calm)


def test_a_root_begun_on_another_device_says_where_to_go_on(
    run: Path, like: Store, make: Callable[..., int], tmp_path: Path
) -> None:
    """A login node has no GPU: there only the launcher's questions are answered."""
    from sssd_hpc.generate import array

    make(0, 2)
    out = tmp_path / "out"
    plan = sampling.plan(run, like, **OPTIONS)
    there = replace(plan, request=replace(plan.request, device="NVIDIA H100"))
    with pytest.raises(UserError, match=r"begun with device cpu .*go on where there is"):
        sampling.make(there, out, (1, 2))
    assert array.settled(there, out).request == plan.request
    text = (out / MANIFEST_FILE).read_text()
    (out / MANIFEST_FILE).write_text("edited")
    with pytest.raises(UserError, match="is not the manifest that"):
        array.settled(there, out)
    # As a claim leaves it that is killed between its two files.
    (out / MANIFEST_FILE).unlink()
    assert array.settled(there, out).request == plan.request
    (out / MANIFEST_FILE).write_text(text)
    assert array.unfinished(plan, out, 2) == [1]
    assert array.unfinished(plan, out, 3) == [0, 1, 2]
    make(1, 2)
    assert array.unfinished(array.settled(there, out), out, 2) == []
    (out / "README.md").unlink()
    assert array.unfinished(plan, out, 2) == [0]
    (out / "records100/21000/21837_lr.dat").unlink()
    assert array.unfinished(plan, out, 3) == [2]
    with pytest.raises(UserError, match="begun with seed 3"):
        array.settled(sampling.plan(run, like, batch_size=2), out)


def test_the_launcher_finishes_what_its_last_shard_could_not(
    run: Path, like: Store, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sssd_hpc.generate import array

    plan = sampling.plan(run, like, **OPTIONS)
    out = tmp_path / "out"
    monkeypatch.setattr(sampling, "merge", lambda *_: None)
    for number in range(2):
        sampling.make(plan, out, (number, 2))
    assert not sampling.is_finished(out)
    array.finish(plan, out)
    array.finish(plan, out)
    assert contents(out) == contents(calm)


def test_a_shard_of_another_request_is_refused(make: Callable[..., int], tmp_path: Path) -> None:
    make(0, 2)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"begun with seed 3 \(now 4\)"):
        make(1, 2, seed=4)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("fail_at", [1, 2, 3, 5])
def test_a_full_disk_is_one_error_and_loses_nothing(
    make: Callable[..., int],
    calm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fail_at: int,
) -> None:
    make(0, 2)
    rename, count = os.replace, 0

    def full(source: Any, target: Any) -> None:
        nonlocal count
        if str(target).endswith((".dat", ".hea")):
            count += 1
            if count >= fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left on device"):
        make(1, 2)
    # What could not be written is not tried again and again.
    assert count == fail_at
    monkeypatch.setattr("os.replace", rename)
    make(1, 2)
    assert contents(tmp_path / "out") == contents(calm)


def test_a_clock_that_jumps_changes_nothing(
    make: Callable[..., int], calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for number, jump in enumerate((0.0, -86_400.0, 3e9)):
        with monkeypatch.context() as clock:
            clock.setattr("time.time", lambda jump=jump: now + jump)
            make(number, 3)
        for path in (tmp_path / "out").rglob("*"):
            os.utime(path, (1e9 + jump / 10, 1e9 + jump / 10))
    assert contents(tmp_path / "out") == contents(calm)


def test_a_finished_root_is_proven_from_its_own_files(calm: Path) -> None:
    before = contents(calm)
    assert verify(calm) == len(ECG_IDS)
    assert contents(calm) == before


DAMAGE: dict[str, tuple[str, str, str]] = {
    "a header": ("records100/00000/00007_lr.hea", "labels: NORM", "labels: none"),
    "a table": ("ptbxl_database.csv", "{'NORM': 100.0}", "{'AFIB': 100.0}"),
    "the card": ("README.md", "synthetic", "genuine"),
    "the list": ("SHA256SUMS.txt", " README.md", " README.txt"),
    "a manifest": (MANIFEST_FILE, '"seed": 3', '"seed": 4'),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_no_damage_passes_the_proof(calm: Path, tmp_path: Path, case: str) -> None:
    out = shutil.copytree(calm, tmp_path / "out")
    name, old, new = DAMAGE[case]
    labels = {"a header": ("labels:", "labels: SR"), "a table": ("NORM", "SR")}
    text = (out / name).read_text()
    old, new = labels.get(case, (old, new))
    (out / name).write_text(text.replace(old, new))
    assert (out / name).read_text() != text
    with pytest.raises(UserError, match=r"differ from SHA256SUMS|hash differs"):
        verify(out)


def test_a_table_and_its_hash_changed_together_do_not_pass(calm: Path, tmp_path: Path) -> None:
    from sssd_hpc.files import sha256_file

    out = shutil.copytree(calm, tmp_path / "out")
    table, sums = out / "ptbxl_database.csv", out / "SHA256SUMS.txt"
    before = sha256_file(table)
    table.write_text(table.read_text().replace("'NORM': 100.0", "'NORM': 0.0"))
    sums.write_text(sums.read_text().replace(before, sha256_file(table)))
    with pytest.raises(UserError, match="has other rows than the manifest"):
        verify(out)


def test_a_foreign_or_doubled_record_does_not_pass(calm: Path, tmp_path: Path) -> None:
    out = shutil.copytree(calm, tmp_path / "out")
    shutil.copy(out / "records100/00000/00007_lr.dat", out / "records100/00000/00008_lr.dat")
    with pytest.raises(UserError, match=r"00008_lr.dat .* no part of this data set"):
        verify(out)


def test_an_unfinished_root_says_how_much_is_there(
    make: Callable[..., int], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="not a folder that sample made"):
        verify(tmp_path)
    make(0, 2)
    with pytest.raises(UserError, match="is not finished: 6 of 11 records are there; repeat"):
        verify(tmp_path / "out")


def test_a_record_drawn_alone_is_the_one_in_the_set(run: Path, like: Store, calm: Path) -> None:
    before = contents(calm)
    same = sampling.plan(run, like, **OPTIONS)
    other = sampling.plan(run, like, seed=3, batch_size=8)
    few = sampling.plan(run, like, **OPTIONS, folds=(9, 10))
    for ecg_id in (5, 11, 21837):
        assert sampling.redraw(same, calm, ecg_id) == (0, True)
        apart, exact = sampling.redraw(other, calm, ecg_id)
        assert apart <= sampling.TOLERANCE_UV
        assert not exact
    assert sampling.redraw(few, calm, 9) == (0, True)
    with pytest.raises(UserError, match="no record has the number 4"):
        sampling.redraw(same, calm, 4)
    with pytest.raises(UserError, match=r"begun with seed 3 \(now 0\)"):
        sampling.redraw(sampling.plan(run, like, batch_size=2), calm, 5)
    assert contents(calm) == before


def test_a_record_that_differs_from_its_drawing_is_found(
    run: Path, like: Store, calm: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(calm, tmp_path / "out")
    data = out / "records100/00000/00007_lr.dat"
    samples = np.fromfile(data, dtype="<i2").reshape(-1, 12)
    # The checksum of a record, a sum, does not see two samples exchanged.
    samples[[0, 1]] = samples[[1, 0]]
    data.write_bytes(samples.tobytes())
    with pytest.raises(UserError, match=r"record 7 drawn alone is \d+ uV from .* must be equal"):
        sampling.redraw(sampling.plan(run, like, **OPTIONS), out, 7)
    data.unlink()
    with pytest.raises(UserError, match="does not hold record 7, records100/00000/00007_lr"):
        sampling.redraw(sampling.plan(run, like, **OPTIONS), out, 7)


def test_the_command_line_says_what_it_did(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sssd_hpc import cli
    from sssd_hpc.ecg.prepare import prepare
    from sssd_hpc.ecg.simulate import simulate

    from .conftest import make_run

    simulate(tmp_path / "root", num_records=10, seed=0)
    prepare(tmp_path / "root", tmp_path / "store", labels="NORM")
    trained = make_run(tmp_path / "run", ("NORM",), length=1000)
    flags = ["--run", str(trained), "--like", str(tmp_path / "store"), "--batch-size", "4"]
    flags += ["--out", str(tmp_path / "out")]
    said = []
    for args in (
        ["sample", *flags, "--shard", "1/2"],
        ["status", str(tmp_path / "out")],
        ["sample", *flags, "--shard", "0/2"],
        ["sample", *flags, "--only", "3"],
        ["verify", str(tmp_path / "out")],
        ["status", str(tmp_path / "out")],
    ):
        assert cli.main(args) == 0, capsys.readouterr().err
        said.append(capsys.readouterr().out)
    assert "4 record(s) made now, the set is unfinished" in said[0]
    assert "STOPPED" in said[1]
    assert "4 of 10, 40.0%" in said[1]
    assert "6 record(s) made now, the set is complete" in said[2]
    assert "record 3 drawn alone at its batch size and device: 0 uV apart" in said[3]
    assert "10 record(s), each once and with its labels; every hash is right" in said[4]
    assert "FINISHED" in said[5]
    for shard in ("2/2", "1", "-1/2", "a/b", "0/0"):
        assert cli.main(["sample", *flags, f"--shard={shard}"]) == 2
        assert "it must be K/N with K in 0 .. N-1" in capsys.readouterr().err
