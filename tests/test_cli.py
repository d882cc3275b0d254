"""The command line as a user meets it: exit codes, one-line errors, help with an example."""

from __future__ import annotations

import dataclasses
import inspect
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from sssd_hpc import cli, config
from sssd_hpc.diffusion.method import DEFAULT_STEPS
from sssd_hpc.errors import Interrupted, UserError


def run(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-m", "sssd_hpc", *args],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment,
    )


def test_no_command_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_shows_an_example_and_every_default(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"Example: sssd-hpc {name}" in out
    parameters = len(inspect.signature(cli.COMMANDS[name]).parameters)
    if name == "train":
        trees = (config.ModelConfig, config.DiffusionConfig, config.TrainConfig)
        parameters += sum(len(dataclasses.fields(tree)) for tree in trees) - 1
    assert out.count("(default:") + out.count("(required)") == parameters


MISTAKES = {
    "unknown command": (["trian"], "perhaps you meant train"),
    "unknown flag": (["prepare", "--sauce", "x", "--source", "a", "--out", "b"], "--sauce"),
    "missing flag": (["prepare", "--source", "a"], "--out"),
    "one edge of a band": (
        ["prepare", "--source", "a", "--out", "b", "--band-pass", "1"],
        "`FLOAT FLOAT`",
    ),
    "not a choice": (["prepare", "--source", "a", "--out", "b", "--rate", "250"], "100"),
    "unknown preset": (["train", "--preset", "huge", "--data", "a", "--run", "b"], "presets are"),
    "preset without a name": (["train", "--data", "a", "--run", "b", "--preset"], "presets are"),
    "absent store": (["train", "--preset", "tiny", "--data", "absent", "--run", "b"], "absent"),
    "absent root": (["prepare", "--source", "absent", "--out", "b"], "absent"),
    "absent record": (["plot", "absent", "--out", "a.png"], "absent"),
    "absent checkpoint": (["convert", "absent.pkl", "b"], "absent.pkl"),
    "no such fold": (["sample", "--run", "a", "--like", "b", "--out", "c", "--folds", "0"], "0"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    args, expected = MISTAKES[case]
    assert cli.main(args) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert streams.err.count("\n") == 1
    assert expected in streams.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError("two\nlines"), 2, "error: two lines\n"),
        (Interrupted("signal SIGUSR1"), 75, "stopped early: signal SIGUSR1\n"),
        (KeyboardInterrupt(), 75, "stopped early: interrupted; the same command goes on\n"),
        (OSError(30, "Read-only file system", "out/x"), 2, "'out/x'; name another path\n"),
        (OSError(28, "No space left on device", "run/x"), 1, "No space left on device: 'run/x'"),
    ],
)
def test_exit_codes(
    raised: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(*, json: bool = False) -> None:
        raise raised

    monkeypatch.setitem(cli.COMMANDS, "doctor", command)
    assert cli.main(["doctor"]) == code
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_an_error_that_cannot_be_printed_keeps_its_exit_code() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-u", "-m", "sssd_hpc", "nonsense"]
        assert subprocess.run(command, stderr=full, cwd=Path(__file__).parents[1]).returncode == 2


@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
def test_a_flipped_bit_in_a_store_stops_what_reads_it(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, store = str(tmp_path / "root"), tmp_path / "store"
    assert cli.main(["simulate", "--out", root, "--records", "10"]) == 0
    assert cli.main(["prepare", "--source", root, "--out", str(store)]) == 0
    data = bytearray((store / "signals.npy").read_bytes())
    data[-1] ^= 1
    (store / "signals.npy").write_bytes(data)
    out = str(tmp_path / "out")
    flags = {
        "train": ["--preset", "tiny", "--data", str(store), "--run", out],
        "sample": ["--run", out, "--like", str(store), "--out", out],
        "evaluate": ["--real", str(store), "--synthetic", root, "--out", out],
    }
    assert cli.main([command, *flags[command]]) == 2
    assert "signals.npy is damaged: its SHA-256 differs" in capsys.readouterr().err
    assert not Path(out).exists()


def test_another_error_keeps_its_traceback() -> None:
    code = (
        "import sys; from sssd_hpc import cli\n"
        "def doctor(): raise RuntimeError('ours')\n"
        "cli.COMMANDS['doctor'] = doctor; sys.exit(cli.main(['doctor']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_the_module_is_the_command() -> None:
    result = run("--version")
    assert result.returncode == 0
    assert result.stdout.strip().count(".") == 2


def test_convert_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(__file__).parent / "data" / "parity" / "small_nle.npz"
    assert cli.main(["convert", str(source), str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "2 blocks, 16 channels, label embedding frozen, 5 label(s), kernel conjugate" in out
    assert "leads I AVF V1" in out
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def test_train_takes_validate_every_by_either_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[int] = []

    def called(settings: config.Config, *given: object) -> None:
        seen.append(settings.train.validate_every)
        raise UserError("enough")

    monkeypatch.setattr("sssd_hpc.ecg.store.Store.open", lambda path, verify: path)
    monkeypatch.setattr("sssd_hpc.train.loop.train", called)
    flags = ["train", "--preset", "tiny", "--data", "a", "--run", str(tmp_path)]
    for more in ([], ["--validate-every", "7"], ["--train.validate-every", "9"]):
        assert cli.main([*flags, *more]) == 2
    assert cli.main([*flags, "--validate-every", "-1"]) == 2
    assert seen == [0, 7, 9]


def test_sample_takes_every_sampler_there_is() -> None:
    kind, absent = typing.get_args(typing.get_type_hints(cli.sample)["sampler"])
    assert typing.get_args(kind) == tuple(DEFAULT_STEPS)
    assert absent is type(None)


def test_sample_reads_eta_and_an_interval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr("sssd_hpc.ecg.store.Store.open", lambda path, verify: path)

    def plan(run: Path, like: Path, **options: object) -> None:
        seen.update(options)
        raise UserError("enough")

    monkeypatch.setattr("sssd_hpc.generate.sampling.plan", plan)
    paths = ["--run", "r", "--like", "s", "--out", str(tmp_path)]
    options = ["--sampler", "dpmpp", "--steps", "9", "--eta", "1", "--guidance", "2"]
    assert cli.main(["sample", *paths, *options, "--guidance-interval", "0.3", "5"]) == 2
    assert (seen["sampler"], seen["steps"], seen["eta"]) == ("dpmpp", 9, 1.0)
    assert (seen["guidance"], seen["guidance_interval"]) == (2.0, (0.3, 5.0))
    assert cli.main(["sample", *paths]) == 2
    assert (seen["sampler"], seen["steps"], seen["eta"]) == (None, None, None)
    assert (seen["guidance"], seen["guidance_interval"]) == (0.0, None)
