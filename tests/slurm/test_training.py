"""Real training by the committed batch script on a real Slurm, under faults.

Every run must end with the checkpoint, bit for bit, of one that nothing happened to. The model has
a few hundred weights; disturbed.py makes the faults that the lab cannot.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sssd_hpc.ecg.prepare import prepare
from sssd_hpc.ecg.simulate import simulate
from sssd_hpc.train.restart import read_history
from tests.slurm_lab.lab import Lab, poll

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "train.sbatch"
TIMEOUT_S = 12
PRESET = f"""\
model: {{num_blocks: 2, channels: 4, d_state: 4, lmax: 1000, label_dim: 4, step_dims: [8, 8, 8]}}
diffusion: {{num_steps: 10, beta_end: 0.3}}
train:
  samples: 32
  batch_size: 4
  learning_rate: 0.01
  checkpoint_every: 8
  checkpoint_gap_s: 0
  log_every: 4
  ema_half_life_samples: 16
  zero_stage: 2
  timeout_s: {TIMEOUT_S}
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what runs share: preset.yaml, store, the disturbed package."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "preset.yaml").write_text(PRESET)
    simulate(folder / "simulated", num_records=20, seed=0)
    prepare(folder / "simulated", folder / "store", labels="NORM")
    package = folder / "path" / "sssd_hpc"
    package.mkdir(parents=True)
    init = f"__path__ += [{str(ROOT / 'sssd_hpc')!r}]\n__version__ = 'disturbed'\n"
    (package / "__init__.py").write_text(init)
    program = Path(__file__).with_name("disturbed.py")
    (package / "__main__.py").write_text(program.read_text())
    return folder


@pytest.fixture(scope="module")
def untouched(study: Path) -> str:
    """The end of a run on two processes of one machine, by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"]
    run = study / "untouched"
    command = [sys.executable, *torchrun, "sssd_hpc", "train", *flags(study, run)]
    environ = {**os.environ, "PYTHONPATH": str(study / "path"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return ending(run)


@pytest.fixture
def train(
    lab: Lab, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, Path]]:
    """Submit a training under faults, by attempt; return the job and its run folder."""
    monkeypatch.setenv("PYTHONPATH", f"{study / 'path'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def submit(
        faults: dict[str, Any] | None = None,
        *more: str,
        options: tuple[str, ...] = (),
        run: str = "",
    ) -> tuple[str, Path]:
        monkeypatch.setenv("DISTURB", json.dumps(faults or {}))
        place = tmp_path / (run or "run")
        return lab.sbatch(*options, SCRIPT, *flags(study, place), *more, cwd=tmp_path), place

    return submit


def flags(study: Path, run: Path) -> list[str]:
    given = ("--preset", study / "preset.yaml", "--data", study / "store", "--run", run)
    return [*map(str, given)]


def ending(run: Path) -> str:
    """The hashes of the last checkpoint, and every line's loss and gradient norm."""
    assert (run / "latest").read_text().strip() == "checkpoints/samples-000000032"
    manifest = (run / "checkpoints" / "samples-000000032" / "MANIFEST.json").read_text()
    assert (run / "export" / "model.safetensors").exists()
    return "\n".join([manifest, *map(str, losses(run))])


def losses(run: Path) -> list[tuple[int, float, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["samples"], row["loss"], row["grad_norm"]) for row in rows]


def logs(run: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((run / "logs").glob("rank-*.log"))}


def crashes(run: Path, job: str) -> list[int]:
    """Return the exit codes of the attempts that crashed.

    A node that was too busy to hear of a step's end is told again after a minute, and on the lab,
    where nothing waits for two, that ends the next attempt's step, by TERM and then KILL.
    """
    codes = [line.exit_code for line in read_history(run, job)]
    return [code for code in codes if code not in (2, 75, 143)]


def wait_at_gate(lab: Lab, job: str, run: Path, ranks: int = 2) -> list[str]:
    """Wait until all ranks stand at the gate; return the job's nodes."""
    poll("the ranks", 60, lambda: len([*run.glob("gate-*")]) == ranks)
    return lab.run("scontrol", "show", "hostnames", lab.job(job)["NodeList"]).stdout.split()


GATE = {"0": {"gate": 12}}


def test_sbatch_submitit_and_torchrun_train_the_same(
    lab: Lab, study: Path, train: Any, untouched: str
) -> None:
    job, run = train()
    launched = run.with_name("launched")
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--", *flags(study, launched)]
    other = lab.run(*command, cwd=run.parent).stdout.split()[3].rstrip(";")
    assert lab.wait(job, "COMPLETED", 60)["Restarts"] == "0"
    assert ending(run) == untouched
    assert lab.wait(other, "COMPLETED", 60)["Restarts"] == "0"
    assert ending(launched) == untouched


def test_a_signal_costs_nothing(lab: Lab, train: Any, untouched: str) -> None:
    job, run = train(GATE)
    wait_at_gate(lab, job, run)
    lab.run("scancel", "--signal=USR1", job)
    assert lab.wait(job, "COMPLETED", 90)["Restarts"] == "1"
    assert [line.exit_code for line in read_history(run, job)] == [75]
    assert ending(run) == untouched


def test_ranks_killed_while_they_save(lab: Lab, train: Any, untouched: str) -> None:
    """Each attempt lives to make one checkpoint; the kill comes at a random write of the next."""
    writes = [(rank, random.randint(1, 22 if rank == 0 else 8)) for rank in (0, 1, 0)]
    print("killed at write", writes)
    job, run = train({str(attempt): {"kill": kill} for attempt, kill in enumerate(writes)})
    lab.wait(job, "COMPLETED", 200)
    assert crashes(run, job).count(137) >= 2
    assert ending(run) == untouched
    assert not [*run.rglob(".tmp-*")]


def test_a_node_loses_power(lab: Lab, train: Any, untouched: str) -> None:
    job, run = train(GATE)
    nodes = wait_at_gate(lab, job, run)
    began = time.monotonic()
    lab.power_off(nodes[1])
    (run / "go").touch()
    found = lab.wait(job, "COMPLETED", 120)
    assert nodes[1] not in found["NodeList"]
    assert ending(run) == untouched
    assert time.monotonic() - began < 90


def test_the_first_ranks_link_is_cut(lab: Lab, train: Any, untouched: str) -> None:
    """Nobody can stop what runs on that node: the next attempt must, and does, wait for it."""
    job, run = train(GATE)
    nodes = wait_at_gate(lab, job, run)
    began = time.monotonic()
    lab.cut_link(nodes[0])
    (run / "go").touch()
    found = lab.wait(job, "COMPLETED", 120)
    assert nodes[0] not in found["NodeList"]
    assert ending(run) == untouched
    assert time.monotonic() - began < 90


def test_the_controller_dies(lab: Lab, train: Any, untouched: str) -> None:
    job, run = train(GATE)
    wait_at_gate(lab, job, run)
    lab.kill_controller()
    (run / "go").touch()
    poll("the end of the run", 60, lambda: (run / "latest").read_text().endswith("32\n"))
    lab.start_controller()
    assert lab.wait(job, "COMPLETED", 60)["Restarts"] == "0"
    assert ending(run) == untouched


def test_a_rank_fails_while_the_controller_is_away(lab: Lab, train: Any, untouched: str) -> None:
    job, run = train({"0": {"gate": 12, "at": [1, 12, "raise"]}})
    wait_at_gate(lab, job, run)
    output = Path(lab.job(job)["StdOut"])
    lab.kill_controller()
    (run / "go").touch()
    poll("the script asks to be requeued", 60, lambda: "asking again" in output.read_text())
    lab.start_controller()
    lab.wait(job, "COMPLETED", 120)
    assert crashes(run, job) == [1]
    assert ending(run) == untouched


def test_a_second_job_cannot_train_in_the_same_folder(lab: Lab, train: Any, untouched: str) -> None:
    job, run = train(GATE)
    wait_at_gate(lab, job, run)
    second, _ = train()
    assert lab.wait(second, "FAILED", 60)["ExitCode"] == "2:0"
    assert logs(run)["rank-0.log"].count("another process is training in") == 1
    (run / "go").touch()
    assert lab.wait(job, "COMPLETED", 60)["Restarts"] == "0"
    assert ending(run) == untouched


def test_a_rank_is_killed_before_its_first_step(lab: Lab, train: Any, untouched: str) -> None:
    job, run = train({"0": {"at": [1, 0, "kill"]}})
    lab.wait(job, "COMPLETED", 90)
    assert crashes(run, job) == [137]
    assert ending(run) == untouched


def test_a_drained_node_is_left(lab: Lab, train: Any, untouched: str) -> None:
    job, run = train(GATE)
    nodes = wait_at_gate(lab, job, run)
    lab.run("scontrol", "update", f"NodeName={nodes[0]}", "State=DRAIN", "Reason=test")
    lab.run("scancel", "--signal=USR1", job)
    found = lab.wait(job, "COMPLETED", 90)
    assert nodes[0] not in found["NodeList"]
    assert ending(run) == untouched


@pytest.mark.parametrize("user_signal", [True, False], ids=["user signal", "TERM alone"])
def test_a_higher_partition_takes_the_nodes(
    lab: Lab, train: Any, untouched: str, user_signal: bool
) -> None:
    if not user_signal:
        lab.configure(SlurmctldParameters=None)
    job, run = train(GATE)
    wait_at_gate(lab, job, run)
    taker = ("--nodes=4", "--exclusive", "--partition=high", "--output=/dev/null", "--wrap=true")
    high = lab.sbatch(*taker)
    lab.wait(high, "COMPLETED", 60)
    assert lab.wait(job, "COMPLETED", 90)["Restarts"] == "1"
    assert all("stopped early: SIG" in words for words in logs(run).values())
    assert ending(run) == untouched


def test_a_rank_that_fails_ends_the_job_and_is_named(lab: Lab, train: Any, untouched: str) -> None:
    """Two at a time: each fault strikes rank 1 at 12 samples, after the checkpoint at 8."""
    faults = {what: {"*": {"at": [1, 12, what]}} for what in ("raise", "memory", "nan", "full")}
    faults["hang"] = {"0": {"at": [1, 12, "hang"]}}
    apart = ("--exclusive",)
    jobs = {what: train(fault, run=what, options=apart) for what, fault in faults.items()}
    said = {
        "raise": (1, "ValueError: the cause"),
        "memory": (1, "MemoryError: the cause"),
        "nan": (0, "error: the loss is nan after 12 samples"),
        # Rank 1 itself cannot write its log any more.
        "full": (0, "error: rank 1: checkpoint"),
    }
    for what, (rank, words) in said.items():
        job, run = jobs[what]
        found = lab.wait(job, "FAILED", 120)
        again = what in ("raise", "memory")
        ends = crashes(run, job)
        assert len(ends) == (3 if again else 0)
        assert found["ExitCode"] == ("1:0" if again else "2:0")
        assert words in logs(run)[f"rank-{rank}.log"]
        assert sum(log.count(words) for log in logs(run).values()) <= max(len(ends), 1)
        assert (run / "latest").read_text() == "checkpoints/samples-000000008\n"
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["samples-000000008"]
    job, run = jobs["hang"]
    lab.wait(job, "COMPLETED", 120)
    assert crashes(run, job) == [1]
    assert ending(run) == untouched
    assert sum(log.count("no word from rank 1 on ") for log in logs(run).values()) == 1


def test_a_folder_turns_read_only(lab: Lab, train: Any) -> None:
    job, run = train({"*": {"gate": 12}})
    nodes = wait_at_gate(lab, job, run)
    place = str(run / "checkpoints")
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"'
    for node in nodes:
        lab.run("bash", "-c", script, place, node=node)
    try:
        (run / "go").touch()
        assert lab.wait(job, "FAILED", 60)["Restarts"] == "0"
    finally:
        for node in nodes:
            lab.run("umount", place, node=node)
    assert "Read-only file system" in logs(run)["rank-0.log"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["samples-000000008"]


@pytest.mark.parametrize("full", ["checkpoints", "."])
def test_the_disk_is_full(
    lab: Lab, train: Any, study: Path, untouched: str, tmp_path: Path, full: str
) -> None:
    """A node's own small file system, under the checkpoints or under all of the run."""
    node, run = lab.nodes[0], tmp_path / "run"
    place = run / full
    place.mkdir(parents=True)

    def there(*command: str) -> subprocess.CompletedProcess[str]:
        return lab.run(*command, node=node, check=False)

    # The script wants a gigabyte free before it starts.
    assert there("mount", "-t", "tmpfs", "-o", "size=1100m", "tmpfs", str(place)).returncode == 0
    try:
        one = ("--nodes=1", "--ntasks-per-node=2", f"--nodelist={node}")
        job, _ = train({"*": {"gate": 12}}, options=one)
        gates = [str(run / f"gate-{rank}") for rank in range(2)]
        poll("the ranks", 60, lambda: there("ls", *gates).returncode == 0)
        there("dd", "if=/dev/zero", f"of={place / 'filling'}", "bs=1M")
        there("dd", "if=/dev/zero", f"of={place / 'rest'}", "bs=4k")
        there("touch", str(run / "go"))
        found = lab.wait(job, "FAILED", 60)
        assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0")
        if full == "checkpoints":
            assert "No space left on device" in logs(run)["rank-0.log"]
        else:
            # The logs are on that disk, too: the batch script's own is not.
            assert "No space left on device" in lab.output(job)
        there("rm", str(place / "filling"), str(place / "rest"))
        job, _ = train(options=one)
        lab.wait(job, "COMPLETED", 60)
        there("cp", "-r", str(place), str(tmp_path / "copy"))
    finally:
        there("umount", str(place))
    newest = tmp_path / "copy" / ("" if full == "checkpoints" else "checkpoints")
    manifest = (newest / "samples-000000032" / "MANIFEST.json").read_text()
    assert untouched.startswith(manifest)


def test_four_nodes_at_every_stage(lab: Lab, train: Any, study: Path, untouched: str) -> None:
    for stage in range(4):
        job, run = train(
            {}, "--train.zero-stage", str(stage), options=("--nodes=4",), run=f"stage-{stage}"
        )
        assert lab.wait(job, "COMPLETED", 90)["Restarts"] == "0"
        for ours, theirs in zip(losses(run), losses(study / "untouched"), strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5)


def test_the_number_of_nodes_changes(lab: Lab, train: Any, study: Path, untouched: str) -> None:
    for nodes, samples in ((1, 8), (2, 12), (4, 16), (3, 24), (1, 32)):
        job, run = train({}, "--train.samples", str(samples), options=(f"--nodes={nodes}",))
        lab.wait(job, "COMPLETED", 60)
    taken = " ".join(path.read_text() for path in run.glob("taken-*.txt"))
    assert sorted(map(int, taken.split())) == [*range(32)]
    for ours, theirs in zip(losses(run), losses(study / "untouched"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
