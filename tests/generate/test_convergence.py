"""Sets from the checkpoints of a run, and the table and picture of how good they are."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sssd_hpc import cli
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.evaluate import figures, paper, report
from sssd_hpc.evaluate.classify import Recipe
from sssd_hpc.generate import convergence as room
from sssd_hpc.generate import sampling, shard
from sssd_hpc.generate.convergence import convergence
from sssd_hpc.generate.merge import verify
from sssd_hpc.model.export import export_path, load_export
from sssd_hpc.train.loop import train
from tests.train.conftest import make_config, make_store, with_model

TINY = Recipe(epochs=1, batch_size=32, num_blocks=(1,), width=4)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = make_store(80, length=1000, folds=10)
    manifest = {
        **made.manifest,
        "label_names": ["AFIB", "NORM"],
        "source": {"layout": "PTB-XL", "version": "1.0.3", "synthetic": False},
        "command": {"labels": "AFIB,NORM"},
    }
    path = tmp_path_factory.mktemp("real") / "store"
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps(manifest))
    return dataclasses.replace(made, path=path, manifest=manifest)


@pytest.fixture(scope="module")
def run(real: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at 8 and 16 samples, of which the first is called best."""
    folder = tmp_path_factory.mktemp("run") / "run"
    config = with_model(make_config(samples=16, keep_checkpoints=0), lmax=1000)
    train(config, real, folder)
    (folder / "best").write_text("checkpoints/samples-000000008\n")
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture(scope="module")
def made(run: Path, real: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "report"
    convergence(run, real, out, labels=["AFIB", "NORM"], steps=4, recipe=TINY)
    return out


def test_a_checkpoint_is_exported_as_training_exports_it(run: Path) -> None:
    exported = export_path(run)
    newest = export_path(run, "latest")
    assert newest == run / "export" / "samples-000000016.safetensors"
    assert newest.read_bytes() == exported.read_bytes()
    older = export_path(run, "samples-000000008")
    assert load_export(older)[1]["samples_seen"] == 8
    assert older.read_bytes() != newest.read_bytes()
    assert export_path(run, "best") == older


def test_a_set_tells_which_checkpoint_made_it(run: Path, real: Store, tmp_path: Path) -> None:
    options: dict[str, Any] = {"folds": [9], "sampler": "dpmpp", "steps": 4}
    plans = {
        name: sampling.plan(run, real, checkpoint=name, **options)
        for name in ("best", "latest", "samples-000000008")
    }
    assert "| samples seen in training | 8 |" in plans["best"].card()
    assert "| samples seen in training | 16 |" in plans["latest"].card()
    assert plans["best"].request == plans["samples-000000008"].request
    assert plans["best"].request.model_sha256 != plans["latest"].request.model_sha256
    assert plans["latest"].request == sampling.plan(run, real, **options).request
    sampling.make(plans["best"], tmp_path / "set")
    with pytest.raises(UserError, match="was begun with model_sha256"):
        sampling.make(plans["latest"], tmp_path / "set")


@pytest.mark.parametrize("name", ["samples-000000012", "../export", "", "best\n"])
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(
    run: Path, name: str
) -> None:
    with pytest.raises(UserError, match="has best, latest, samples-000000016, samples-000000008"):
        export_path(run, name)


def test_a_run_without_a_best_or_any_checkpoint_says_so(copy: Path, real: Store) -> None:
    (copy / "best").write_text("../../elsewhere\n")
    with pytest.raises(UserError, match="--checkpoint is 'best'; "):
        export_path(copy, "best")
    (copy / "best").unlink()
    with pytest.raises(UserError, match="no best checkpoint: train it with --validate-every"):
        export_path(copy, "best")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoints; leave out --checkpoint"):
        export_path(copy, "latest")
    with pytest.raises(UserError, match="no checkpoints to compare"):
        convergence(copy, real, copy / "out")


def test_a_damaged_checkpoint_is_refused(copy: Path) -> None:
    path = copy / "checkpoints" / "samples-000000008" / "ema.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="does not have the SHA-256 of its manifest"):
        export_path(copy, "best")


def test_a_set_that_was_begun_outlives_its_checkpoint(copy: Path) -> None:
    path = export_path(copy, "samples-000000008")
    shutil.rmtree(copy / "checkpoints" / "samples-000000008")
    assert export_path(copy, "samples-000000008") == path


def test_every_checkpoint_has_a_whole_set_and_a_row_each_way(made: Path) -> None:
    result = json.loads((made / "report.json").read_text())
    table = result["table"]
    assert table["samples"] == [8, 16]
    names = ["TRTR", *(f"{way} {n}" for way in ("TSTR", "TRTS") for n in (8, 16))]
    for label in ("AFIB", "NORM"):
        assert list(table["rows"][label]) == names
        for row in table["rows"][label].values():
            metric = row["metrics"]["roc_auc"]
            assert metric["low"] <= metric["value"] <= metric["high"]
    for name in ("samples-000000008", "samples-000000016"):
        assert verify(made / "cache" / "sets" / name) == 80
        assert result["sides"][name]["num_records"] == 80
    drawn, *theirs = table["notes"]
    assert drawn == "Drawn with averaged weights by dpmpp, 4 steps, eta 1, guidance 0."
    assert [words.split(", G-mean")[0] for words in theirs] == [
        "The paper's AFIB, TSTR",
        "The paper's AFIB, TRTS",
    ]
    assert "24,000: 0.828 and 0.434, 100,000: 0.745 and 0.564" in theirs[0]
    assert set(table["paper"]["NORM"]) == set()
    assert table["paper"]["AFIB"]["TSTR 4000"] == {"g_mean": 0.507, "f1": 0.308}


def test_the_page_holds_table_picture_and_how_sets_were_drawn(made: Path) -> None:
    page = (made / "report.html").read_text()
    for words in ("TSTR 16", "data:image/png;base64,", "Drawn with averaged weights by dpmpp"):
        assert words in page
    assert (made / "figures" / "convergence.png").stat().st_size > 10_000
    text = report.table(json.loads((made / "report.json").read_text()))
    assert "[paper, Table IV]" in text
    assert text.endswith("1,200,000: 0.985 and 0.858.")


def test_again_nothing_is_drawn_or_trained(
    made: Path, run: Path, real: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads((made / "report.json").read_text())["table"]
    monkeypatch.setattr(sampling, "run_shard", lambda *given, **options: pytest.fail("drawn"))
    monkeypatch.setattr("sssd_hpc.evaluate.utility.fit", None)
    with pytest.raises(UserError, match="begun with"):
        convergence(run, real, made, labels=["AFIB"], steps=3, recipe=TINY)
    monkeypatch.undo()
    monkeypatch.setattr("sssd_hpc.evaluate.utility.fit", None)
    again = convergence(run, real, made, labels=["AFIB", "NORM"], steps=4, recipe=TINY)
    assert again["table"] == before


def test_a_checkpoint_whose_records_cannot_be_held_is_left_out_and_named(
    run: Path, real: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, drawn = shard.draw_signals, []

    def diverged(*given: Any, **options: Any) -> Any:
        drawn.append(1)
        signals = draw(*given, **options)
        return signals * np.inf if len(drawn) == 1 else signals

    monkeypatch.setattr(shard, "draw_signals", diverged)
    with np.errstate(invalid="ignore"):
        result = convergence(run, real, tmp_path, labels=["NORM"], steps=4, recipe=TINY)
    assert result["table"]["samples"] == [16]
    assert (
        "samples-000000008 is left out, its records cannot be held" in result["table"]["notes"][1]
    )


def test_the_picture_bears_metrics_without_a_value() -> None:
    def cell(value: float | None) -> dict[str, Any]:
        return {"value": value, "low": value, "high": value, "reason": None}

    rows = {
        name: {"metrics": {"g_mean": cell(value), "f1": cell(None)}}
        for name, value in (("TRTR", None), ("TSTR 4000", 0.5), ("TRTS 4000", None))
    }
    table = {"rows": {"AFIB": rows}, "samples": [4000], "paper": {"AFIB": {}}}
    axes = figures.convergence(table).axes
    assert len(axes) == 2
    assert [len(one.containers) for one in axes] == [1, 0]
    figures.convergence(table).savefig(io.BytesIO(), format="png")
    counts = (8, 4000, 1_200_000)
    assert [figures._short_count(count) for count in counts] == ["8", "4k", "1.2m"]


def test_the_papers_table_is_the_papers() -> None:
    for of_labels in paper.TABLE_IV.values():
        assert {label: len(row) for label, row in of_labels.items()} == {
            "AFIB": 4,
            "CRBBB": 4,
            "PVC": 3,
        }
    assert paper.TABLE_IV["TRTS"]["PVC"][1_632_000] == (0.808, 0.621)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--protocol", "convergence"], "takes --run, the others --synthetic"),
        (["--protocol", "convergence", "--run", "r", "--synthetic", "s"], "takes --run"),
        (["--run", "r"], "takes --run"),
        ([], "--synthetic is missing"),
        (["--synthetic", "s", "--steps", "3"], "are for --protocol convergence"),
    ],
)
def test_what_does_not_belong_to_a_protocol_is_refused(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = cli.main(["evaluate", "--real", "a", "--out", str(tmp_path / "out"), *flags])
    assert code == 2
    assert words in capsys.readouterr().err


def test_the_command_hands_its_flags_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def called(run: Path, real: Any, out: Path, **options: Any) -> None:
        seen.update(options, run=run)
        raise UserError("enough")

    monkeypatch.setattr("sssd_hpc.ecg.store.Store.open", lambda path, verify: path)
    monkeypatch.setattr(room, "convergence", called)
    flags = ["--real", "a", "--run", "r", "--out", str(tmp_path), "--protocol", "convergence"]
    assert cli.main(["evaluate", *flags, "--label", "AFIB,PVC", "--steps", "7"]) == 2
    assert (seen["run"], seen["labels"], seen["steps"]) == (Path("r"), ["AFIB", "PVC"], 7)
    assert (seen["sampler"], seen["eta"], seen["batch_size"]) == (None, None, None)
