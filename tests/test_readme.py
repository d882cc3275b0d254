"""Every command of the README runs, in its order, on a small simulated set."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from sssd_hpc import cli
from sssd_hpc.evaluate.classify import Recipe
from sssd_hpc.train import validation

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# What makes each command small; flags that come later win.
SMALL = {
    "simulate": ["--records", "40"],
    "train": [
        *("--train.samples", "32", "--train.batch-size", "8", "--model.num-blocks", "1"),
        *("--model.channels", "8", "--diffusion.num-steps", "4"),
    ],
    "evaluate": ["--epochs", "1"],
}


def commands(block: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [line[1:] for line in lines if line[:1] == ["sssd-hpc"]]


def blocks() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)


def test_the_main_job_by_hand_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    by_hand = next(block for block in blocks() if "simulate" in block)
    for command in commands(by_hand):
        args = [*command, *SMALL.get(command[0], [])]
        assert cli.main(args) == 0, capsys.readouterr().err
    assert (tmp_path / "report" / "report.html").is_file()
    assert (tmp_path / "00001.png").is_file()
    out = capsys.readouterr().out
    assert "TSTR" in out
    picture = Path(out.rpartition("picture: ")[2].split()[0])
    assert picture.is_file()
    recipe = Recipe(epochs=1, num_blocks=(1,), width=4)
    monkeypatch.setattr(validation, "RECIPE", recipe)
    by_checkpoint = next(block for block in blocks() if "--validate-every" in block)
    for command in commands(by_checkpoint):
        args = [*command, *SMALL.get(command[0], [])]
        assert cli.main(args) == 0, capsys.readouterr().err
    assert (tmp_path / "run2" / "best").read_text() == "checkpoints/samples-000000032\n"
    assert (tmp_path / "convergence" / "figures" / "convergence.png").is_file()
    at_scale = next(block for block in blocks() if "launch/sample.py" in block)
    for command in commands(at_scale):
        assert cli.main(command) == 0, capsys.readouterr().err
    assert (tmp_path / "synthetic.h5").is_file()


def test_the_papers_models_are_accepted_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ptbxl_root: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ptb-xl").symlink_to(ptbxl_root)
    paper = next(block for block in blocks() if "sssd_ecg_nle" in block)
    for command in commands(paper):
        extra = ["--dry-run"] if command[0] == "train" else []
        assert cli.main([*command, *extra]) == 0


def test_physicians_are_asked_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, root in enumerate(("real", "synthetic")):
        assert cli.main(["simulate", "--out", root, "--records", "20", "--seed", str(seed)]) == 0
    assert cli.main(["prepare", "--source", "real", "--out", "store"]) == 0
    make, score = commands(next(block for block in blocks() if "review make" in block))
    assert cli.main([*make, "--labels", "AFIB,CRBBB", "--records-per-class", "1"]) == 0
    key = json.loads(Path("review/key.json").read_text())
    for rater in ("anna", "ben"):
        answers = {
            "format": 1, "questionnaire": key["questionnaire"], "rater": rater, "answers": [],
        }  # fmt: skip
        Path(f"{rater}.json").write_text(json.dumps(answers))
    assert cli.main(score) == 0, capsys.readouterr().err
    assert (tmp_path / "scores" / "review.html").is_file()


def test_a_set_is_judged_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, root in enumerate(("real", "synthetic")):
        assert cli.main(["simulate", "--out", root, "--records", "40", "--seed", str(seed)]) == 0
    assert cli.main(["prepare", "--source", "real", "--out", "store", "--labels", "super"]) == 0
    for name in "abc":
        Path(name).symlink_to("synthetic")
    judged = commands(next(block for block in blocks() if "--protocol multilabel" in block))
    # The first is the main job's, the last has tests of its own.
    for command in judged[1:-1]:
        assert cli.main([*command, "--epochs", "1"]) == 0, capsys.readouterr().err
        assert "paper, Table I" in capsys.readouterr().out
    assert judged[-1] == ["evaluate", "--self-test", "--out", "self-test"]
    assert {f"table{n}" for n in (1, 2, 3)} <= {path.name for path in tmp_path.iterdir()}


def test_the_table_of_commands_is_the_command_line() -> None:
    table = README[README.index("## Commands") : README.index("The main job by hand")]
    assert re.findall(r"^\| `([\w ]+)` \|", table, flags=re.MULTILINE) == list(cli.COMMANDS)


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_to_files_lead_somewhere() -> None:
    for path in re.findall(r"`((?:docs|bench)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
