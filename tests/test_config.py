"""The configuration: one type system for flags, presets and stored files, and strict about each."""

from __future__ import annotations

from pathlib import Path

import pytest

from sssd_hpc import config
from sssd_hpc.errors import UserError


def test_load_of_dump_is_the_same_tree(tmp_path: Path) -> None:
    tree = config.Config(
        model=config.ModelConfig(leads="twelve", step_dims=(16, 8, 8)),
        diffusion=config.DiffusionConfig(
            beta_end=0.1, scale_mv=1e-3, prediction="velocity", zero_terminal_snr=True
        ),
        train=config.TrainConfig(seed=2**62, learning_rate=1e-5, folds="1,3"),
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(tree))
    assert config.load(path) == tree


@pytest.mark.parametrize("name", config.preset_names())
def test_every_preset_loads(name: str) -> None:
    assert config.load(config.preset_path(name)).model.lmax == 1000


def test_the_paper_presets_have_the_papers_sizes() -> None:
    for name, embedding in (("sssd_ecg", "sum"), ("sssd_ecg_nle", "nle")):
        tree = config.load(config.preset_path(name))
        assert tree.model == config.ModelConfig(label_embedding=embedding)
        assert tree.diffusion == config.DiffusionConfig()
        assert (tree.model.num_blocks, tree.model.channels, tree.model.d_state) == (36, 256, 64)
        assert tree.train.learning_rate == 2e-4


def test_the_command_line_wins_over_the_preset() -> None:
    flags = config.flags(config.read_yaml(config.preset_path("tiny")))
    tree = config.parse(config.Config, [*flags, "--train.samples", "7"], prog="t")
    assert tree.train.samples == 7
    assert tree.model == config.load(config.preset_path("tiny")).model


BAD = {
    "unknown key": ("train: {sede: 1}", "--train.sede"),
    "unknown branch": ("trian: {seed: 1}", "--trian.seed"),
    "wrong type": ("train: {seed: x}", "train.seed"),
    "fraction for an integer": ("train: {seed: 1.5}", "train.seed"),
    "out of range": ("train: {samples: 0}", "train.samples is 0; it must be at least 1"),
    "odd state": ("model: {d_state: 7}", "model.d_state is 7"),
    "not finite": ("diffusion: {scale_mv: .nan}", "diffusion.scale_mv is nan"),
    "pure noise predicted": (
        "diffusion: {zero_terminal_snr: true}",
        "diffusion.prediction is epsilon; it must be velocity with diffusion.zero_terminal_snr",
    ),
    "one step of pure noise": (
        "diffusion: {num_steps: 1, prediction: velocity, zero_terminal_snr: true}",
        "diffusion.num_steps is 1",
    ),
    "not a choice": ("model: {leads: nine}", "'eight', 'twelve'"),
    "too few": ("model: {step_dims: [1, 2]}", "step-dims"),
    "list at the top": ("- 1", "a mapping is needed"),
    "object tag": ("a: !!python/object/apply:os.getcwd []", "python/object"),
    "key twice": ("train: {seed: 1, seed: 2}", "twice"),
    "trailing bracket": ("a: [1,", "line 1"),
    "huge integer": ("train: {samples: 1" + "0" * 5000 + "}", "integer"),
    "a flag of the parser": ("help: 1", "help is not a setting"),
    "a key that is no name": ("'--train.seed 3': 1", "is not a setting"),
    "fold 11": ("train: {folds: 1-11}", "folds 1-10"),
    "the test fold": ("train: {folds: 1-10}", "evaluation judges by folds 9 and 10"),
    "fold text": ("train: {folds: all}", "write them like"),
    "nested where a value stands": ("train: {seed: {a: 1}}", "--train.seed.a"),
    "bomb": ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n? [1]\n: 2", "not"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_clear_line(case: str, tmp_path: Path) -> None:
    text, expected = BAD[case]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        config.load(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_settings_do_not_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSSD_HPC_TRAIN_SEED", "9")
    monkeypatch.setenv("TRAIN_SEED", "9")
    assert config.parse(config.Config, [], prog="t").train.seed == 0


def test_a_preset_that_is_a_path_out_of_the_package_is_not_a_name() -> None:
    with pytest.raises(UserError, match="presets are"):
        config.preset_path("../presets/tiny")


@pytest.mark.parametrize(
    ("text", "folds"), [("1-8", (1, 2, 3, 4, 5, 6, 7, 8)), ("9", (9,)), ("10,1-2", (1, 2, 10))]
)
def test_folds_are_read_as_people_write_them(text: str, folds: tuple[int, ...]) -> None:
    assert config.parse_folds(text) == folds


@pytest.mark.parametrize("text", ["", "0", "11", "a", "8-1", "1--2", "1,,2", "99999999999999"])
def test_folds_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        config.parse_folds(text)
