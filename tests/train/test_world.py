"""Several processes train what one does: any ZeRO stage, any number, any end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sssd_hpc.train.metrics import validations

WORLD = Path(__file__).with_name("world.py")
# Sums in another order: a few units in the last place of float32, grown over eight steps.
ROUNDING = 2e-5
STAGES = [
    {"run": f"stage-{stage}", "world": 2, "settings": {"zero_stage": stage}} for stage in range(4)
]
DAMAGES = ["flipped", "cut", "missing", "outside"]
BROKEN = {"metrics": "metrics.jsonl", "export": "export/model.safetensors", "latest": "latest"}
HOURLY = {"checkpoint_gap_s": 3600, "keep_checkpoints": 9}
VALIDATED = {"validate_every": 8, "keep_checkpoints": 1, "samples": 24}
HALTED: dict[str, Any] = {"settings": {**VALIDATED, "zero_stage": 2}, "records": 50}
CHAIN = [(1, 0, 8), (2, 2, 16), (4, 3, 22), (3, 1, 26), (1, 0, 32)]
PLANS: list[dict[str, Any]] = [
    {"run": "alone", "world": 1},
    *STAGES,
    {"run": "three", "world": 3, "settings": {"samples": 30}},
    {"run": "three-alone", "world": 1, "settings": {"samples": 30}},
    {"run": "pieces", "world": 2, "settings": {"accumulation_steps": 2, "zero_stage": 2}},
    {"run": "bf16-alone", "world": 1, "settings": {"precision": "bf16"}},
    *(
        {
            "run": f"bf16-{stage}",
            "world": 2,
            "settings": {"precision": "bf16", "zero_stage": stage},
        }
        for stage in range(4)
    ),
    {"run": "clipped-alone", "world": 1, "settings": {"grad_clip": 0.01}},
    {"run": "clipped", "world": 2, "settings": {"grad_clip": 0.01, "zero_stage": 3}},
    {
        "run": "checkpointed",
        "world": 2,
        "settings": {"activation_checkpointing": True, "zero_stage": 3},
    },
    *(
        {"run": "chain", "world": world, "settings": {"zero_stage": stage, "samples": samples}}
        for world, stage, samples in CHAIN
    ),
    *(
        {"run": "chain-alone", "world": 1, "settings": {"samples": samples}}
        for _, _, samples in CHAIN
    ),
    {"run": "signalled", "world": 2, "settings": {"zero_stage": 2}, "signal": [1, "SIGUSR1", 12]},
    {"run": "signalled", "world": 2, "settings": {"zero_stage": 2}},
    {"run": "killed", "world": 2, "settings": {"zero_stage": 2}, "signal": [1, "SIGKILL", 12]},
    {"run": "killed", "world": 2, "settings": {"zero_stage": 2}},
    *(
        {"run": name, "world": world, "settings": {**VALIDATED, "zero_stage": stage}, "records": 50}
        for name, world, stage in (("valid-alone", 1, 0), ("valid-2", 2, 2), ("valid-3", 3, 3))
    ),
    {"run": "halted", "world": 2, **HALTED, "halt": [1, "SIGUSR1", 16]},
    {"run": "halted", "world": 2, **HALTED},
    {"run": "spoiled", "world": 2, "settings": {}, "spoil": [1, 12]},
    {"run": "skipped", "world": 2, "settings": {"bad_steps": 1}, "spoil": [1, 12]},
    *(
        {"run": f"slow-{stage}", "world": 2, "settings": {"zero_stage": stage}, "slow": [1, 0.1]}
        for stage in (0, 3)
    ),
    *({"run": f"hasty-{rank}", "world": 2, "settings": HOURLY, "hasty": rank} for rank in range(2)),
    *(
        {"run": f"broken-{kind}", "world": 2, "settings": {}, "break": name}
        for kind, name in BROKEN.items()
    ),
    *(
        {"run": how, "world": 2, "settings": {"zero_stage": 2}, "damage": how, "of": "stage-2"}
        for how in DAMAGES
    ),
]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of all runs and the outcome of each plan."""
    folder = tmp_path_factory.mktemp("worlds")
    done = subprocess.run(
        [sys.executable, str(WORLD), str(folder)],
        input=json.dumps(PLANS),
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout)


def outcomes(worlds: tuple[Path, list[dict[str, Any]]], run: str) -> list[dict[str, Any]]:
    return [found for plan, found in zip(PLANS, worlds[1], strict=True) if plan["run"] == run]


def tensors(run: Path) -> dict[str, Tensor]:
    """Return all tensors of the newest checkpoint, of however many files."""
    found: dict[str, Tensor] = {}
    for file in (run / (run / "latest").read_text().strip()).glob("*.safetensors"):
        stem = file.stem.partition("-")[0]
        found |= {f"{stem}/{name}": tensor for name, tensor in load_file(file).items()}
    return found


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def validated(run: Path) -> dict[int, dict[str, Any]]:
    found = validations(run / "metrics.jsonl")
    for row in found.values():
        del row["seconds"]
    return found


def assert_close(run: Path, other: Path, bound: float = ROUNDING) -> None:
    ours, theirs = tensors(run), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        scale = theirs[name].double().norm()
        assert (tensor.double() - theirs[name].double()).norm() <= bound * scale, name
    assert losses(run) == pytest.approx(losses(other), rel=bound)


def test_every_rank_of_every_plan_ends_as_it_should(worlds: Any) -> None:
    expected = {"signalled": [[75, 75], [0, 0]], "halted": [[75, 75], [0, 0]], "spoiled": [[2, 2]]}
    expected |= {f"broken-{kind}": [[2, 2]] for kind in BROKEN}
    for run in {plan["run"] for plan in PLANS} - {"killed"}:
        found = outcomes(worlds, run)
        default = [[0] * len(one["codes"]) for one in found]
        assert [one["codes"] for one in found] == expected.get(run, default), found


@pytest.mark.parametrize(
    "run", ["stage-0", "stage-1", "stage-2", "stage-3", "pieces", "checkpointed"]
)
def test_two_ranks_train_what_one_does(worlds: Any, run: str) -> None:
    assert_close(worlds[0] / run, worlds[0] / "alone")


def test_two_ranks_in_bfloat16_train_what_one_does_to_its_rounding(worlds: Any) -> None:
    ours, theirs = worlds[0] / "bf16-0", worlds[0] / "bf16-alone"
    assert {tensor.dtype for tensor in tensors(ours).values()} == {torch.float32}
    # Half a unit in the last place of bfloat16.
    assert losses(ours) == pytest.approx(losses(theirs), rel=2**-9)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_is_the_same_at_every_stage(worlds: Any, stage: int) -> None:
    """What is sent stays float32."""
    assert_close(worlds[0] / f"bf16-{stage}", worlds[0] / "bf16-0")


def test_clipping_is_by_the_norm_of_the_whole_gradient(worlds: Any) -> None:
    assert_close(worlds[0] / "clipped", worlds[0] / "clipped-alone")


def test_a_last_batch_with_fewer_records_than_ranks_ends_well(worlds: Any) -> None:
    assert_close(worlds[0] / "three", worlds[0] / "three-alone")


def test_a_run_goes_on_with_any_number_of_ranks_and_any_stage(worlds: Any) -> None:
    """Batches are cut where a phase ends, so the twin's are cut there, too."""
    rows = (worlds[0] / "chain" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["samples"] == 32
    assert_close(worlds[0] / "chain", worlds[0] / "chain-alone")


def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on_bit_for_bit(worlds: Any) -> None:
    stopped = outcomes(worlds, "signalled")[0]
    for words in stopped["said"]:
        assert words.startswith("stopped early: SIGUSR1 came after 16 samples")
    ours, theirs = tensors(worlds[0] / "signalled"), tensors(worlds[0] / "stage-2")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("run", ["valid-2", "valid-3"])
def test_several_ranks_validate_as_one_does(worlds: Any, run: str) -> None:
    assert losses(worlds[0] / run) == pytest.approx(losses(worlds[0] / "valid-alone"), rel=ROUNDING)
    ours, theirs = validated(worlds[0] / run), validated(worlds[0] / "valid-alone")
    assert list(ours) == list(theirs) == [8, 16, 24]
    for samples, row in ours.items():
        assert row["records"] == 5
        assert row["roc_auc"] == theirs[samples]["roc_auc"]
        # A distance of squares: twice the rounding of what is compared, and as much again.
        assert row["frechet"] == pytest.approx(theirs[samples]["frechet"], rel=4 * ROUNDING)
    best = (worlds[0] / run / "best").read_text()
    assert best == (worlds[0] / "valid-alone" / "best").read_text()


def test_a_signal_to_one_rank_in_a_validation_stops_all_and_it_is_done_again(worlds: Any) -> None:
    for words in outcomes(worlds, "halted")[0]["said"]:
        assert words.startswith("stopped early: SIGUSR1 came after 16 samples, saved")
    assert validated(worlds[0] / "halted") == validated(worlds[0] / "valid-2")


def test_a_killed_rank_takes_the_others_down_and_the_run_goes_on_bit_for_bit(worlds: Any) -> None:
    dead, again = outcomes(worlds, "killed")
    assert dead["codes"][1] == -9
    assert dead["codes"][0] == 1
    assert dead["seconds"] < 30
    assert dead["said"][0].startswith("lost: rank 0 lost the others")
    assert again["codes"] == [0, 0]
    ours, theirs = tensors(worlds[0] / "killed"), tensors(worlds[0] / "stage-2")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_the_last_checkpoint(
    worlds: Any,
) -> None:
    for words in outcomes(worlds, "spoiled")[0]["said"]:
        assert "loss is nan after 12 samples" in words
    assert (worlds[0] / "spoiled" / "latest").read_text().strip().endswith("samples-000000008")


def test_a_bad_step_may_be_skipped_and_is_counted(worlds: Any) -> None:
    rows = (worlds[0] / "skipped" / "metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(row).get("skipped", 0) for row in rows) == 1
    step = tensors(worlds[0] / "skipped")["optimizer/step/head.weight"]
    assert float(step) == 7


@pytest.mark.parametrize(("rank", "expected"), [(0, [8, 16, 24, 32]), (1, [8, 32])])
def test_the_first_ranks_clock_keeps_the_gap_between_checkpoints(
    worlds: Any, rank: int, expected: list[int]
) -> None:
    """The first checkpoint and that at the end are made in any case."""
    made = sorted((worlds[0] / f"hasty-{rank}" / "checkpoints").iterdir())
    assert [path.name for path in made] == [f"samples-{samples:09d}" for samples in expected]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_slow_rank_is_named(worlds: Any, stage: int) -> None:
    first, second = outcomes(worlds, f"slow-{stage}")[0]["said"]
    assert first.startswith("rank 1 on ")
    assert first.count("is slow") == 1
    assert second == ""


@pytest.mark.parametrize(("kind", "name"), BROKEN.items())
def test_what_rank_0_alone_cannot_write_ends_every_rank_with_the_same_words(
    worlds: Any, kind: str, name: str
) -> None:
    first, second = outcomes(worlds, f"broken-{kind}")[0]["said"]
    assert first == second
    assert name in first
    assert "same command again" in first
    places = [path.name for path in (worlds[0] / f"broken-{kind}" / "checkpoints").iterdir()]
    assert "samples-000000008" in places


def test_the_last_attempts_ranks_left_their_heartbeats(worlds: Any) -> None:
    for run, ranks in (("chain", [0]), ("three", [0, 1, 2]), ("spoiled", [0, 1])):
        beats = sorted((worlds[0] / run / "heartbeats").iterdir())
        told = [json.loads(path.read_text()) for path in beats]
        assert [beat["rank"] for beat in told] == ranks
        phase = "failed" if run == "spoiled" else "done"
        assert {beat["phase"] for beat in told} == {phase}
        assert all("loss is nan" in beat.get("error", "loss is nan") for beat in told)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_said_and_the_one_before_used(worlds: Any, how: str) -> None:
    first, second = outcomes(worlds, how)[0]["said"]
    assert first.count("checkpoints/samples-000000032 is damaged and passed over") == 1
    assert "damaged" not in second
    ours, theirs = tensors(worlds[0] / how), tensors(worlds[0] / "stage-2")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    if how == "outside":
        assert len([*(worlds[0] / "elsewhere").iterdir()]) == 8
