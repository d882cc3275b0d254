from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sssd_hpc.errors import UserError
from sssd_hpc.model.checkpoint import Checkpoint, read
from sssd_hpc.train import checkpoint
from sssd_hpc.train.checkpoint import load_newest, save
from sssd_hpc.train.ranks import Group


def make(samples: int) -> Checkpoint:
    """Return a checkpoint whose values are known from its count of samples."""
    weight = torch.full((4, 500), float(samples))
    return Checkpoint(
        samples=samples,
        tensors={"model": {"weight": weight, "scalar": torch.tensor(1.5)}, "ema": {"w": -weight}},
        state={"tally": {"loss": samples / 3}},
    )


def save_all(run: Path, *counts: int, keep: int = 9) -> None:
    for samples in counts:
        save(run, make(samples), group=Group(), keep=keep)


def folder(run: Path, samples: int) -> Path:
    return run / "checkpoints" / f"samples-{samples:09d}"


def names(run: Path) -> list[str]:
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


def loaded(run: Path) -> int:
    """Return the newest whole checkpoint's count, having checked its contents."""
    found = load_newest(run)
    assert found is not None
    expected = make(found.samples)
    for stem, tensors in expected.tensors.items():
        assert tensors.keys() == found.tensors[stem].keys()
        assert all(torch.equal(t, found.tensors[stem][name]) for name, t in tensors.items())
    assert found.state == expected.state
    return found.samples


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    save_all(tmp_path, 4, 8)
    assert loaded(tmp_path) == 8
    assert read(folder(tmp_path, 4)).samples == 4


def test_the_manifest_says_what_the_contract_says(tmp_path: Path) -> None:
    save(tmp_path, make(8), group=Group(), keep=1)
    manifest = json.loads((folder(tmp_path, 8) / "MANIFEST.json").read_text())
    assert manifest["samples"] == 8
    assert manifest["world_size"] == 1
    assert set(manifest["sha256"]) == {"model.safetensors", "ema.safetensors", "state.json"}
    assert (tmp_path / "latest").read_text() == "checkpoints/samples-000000008\n"


def test_nothing_is_found_where_nothing_was_saved(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "absent") is None
    (tmp_path / "checkpoints").mkdir()
    assert load_newest(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save_all(tmp_path, 4, 8, 12, keep=2)
    assert names(tmp_path) == ["samples-000000008", "samples-000000012"]
    save_all(tmp_path, 16, keep=1)
    assert names(tmp_path) == ["samples-000000016"]


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "model.safetensors").write_bytes(data)


def truncate(path: Path) -> None:
    data = (path / "ema.safetensors").read_bytes()
    (path / "ema.safetensors").write_bytes(data[:-1])


def remove_a_file(path: Path) -> None:
    (path / "model.safetensors").unlink()


def remove_the_manifest(path: Path) -> None:
    (path / "MANIFEST.json").unlink()


def cut_the_manifest(path: Path) -> None:
    text = (path / "MANIFEST.json").read_text()
    (path / "MANIFEST.json").write_text(text[: len(text) // 2])


def swap_two_files(path: Path) -> None:
    (path / "model.safetensors").rename(path / "swap")
    (path / "ema.safetensors").rename(path / "model.safetensors")
    (path / "swap").rename(path / "ema.safetensors")


def change_the_state(path: Path) -> None:
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace("tally", "telly"))


def count_another_number(path: Path) -> None:
    text = (path / "MANIFEST.json").read_text()
    (path / "MANIFEST.json").write_text(text.replace('"samples": 8', '"samples": 9'))


def lead_out_of_the_folder(path: Path) -> None:
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["sha256"]["../../outside.safetensors"] = "0" * 64
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


def be_a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def link_a_file(path: Path) -> None:
    (path / "model.safetensors").rename(path / "moved")
    (path / "model.safetensors").symlink_to("moved")


def be_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


def another_format(path: Path) -> None:
    (path / "MANIFEST.json").write_text('{"format_version": 2}')


def no_mapping(path: Path) -> None:
    (path / "MANIFEST.json").write_text('{"format_version": 1, "samples": 8, "sha256": [1]}')


def forget_the_state(path: Path) -> None:
    manifest = json.loads((path / "MANIFEST.json").read_text())
    del manifest["sha256"]["state.json"]
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


DAMAGES: list[Callable[[Path], None]] = [
    flip_a_bit,
    truncate,
    remove_a_file,
    remove_the_manifest,
    cut_the_manifest,
    swap_two_files,
    change_the_state,
    count_another_number,
    lead_out_of_the_folder,
    be_a_link,
    link_a_file,
    be_a_file,
    another_format,
    no_mapping,
    forget_the_state,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_aloud_and_passed_over(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    save_all(tmp_path, 4, 8)
    damage(folder(tmp_path, 8))
    with caplog.at_level(logging.WARNING):
        assert loaded(tmp_path) == 4
    assert f"{folder(tmp_path, 8)} is damaged and passed over" in caplog.text
    # Training then comes to the same count again and replaces it.
    save_all(tmp_path, 8)
    assert loaded(tmp_path) == 8


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_where_no_checkpoint_is_whole_nothing_starts_over(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    save_all(tmp_path, 8)
    damage(folder(tmp_path, 8))
    with pytest.raises(UserError, match="none of the checkpoints"):
        load_newest(tmp_path)


def test_lost_checkpoints_are_an_error_while_latest_remembers_them(tmp_path: Path) -> None:
    save_all(tmp_path, 8)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="none is there"):
        load_newest(tmp_path)


@pytest.mark.parametrize("pointer", [None, "checkpoints/samples-000000999\n", "../../etc\n", "\0"])
def test_latest_is_never_followed(tmp_path: Path, pointer: str | None) -> None:
    save_all(tmp_path, 4, 8)
    (tmp_path / "latest").unlink()
    if pointer is not None:
        (tmp_path / "latest").write_text(pointer)
    assert loaded(tmp_path) == 8


def test_damaged_checkpoints_do_not_count_as_kept_ones(tmp_path: Path) -> None:
    save_all(tmp_path, 4, 8, 12)
    flip_a_bit(folder(tmp_path, 8))
    flip_a_bit(folder(tmp_path, 12))
    assert loaded(tmp_path) == 4
    save_all(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["samples-000000006"]
    assert loaded(tmp_path) == 6


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    save_all(tmp_path, 4)
    (tmp_path / "checkpoints" / ".tmp-samples-000000008-1-aa").mkdir()
    (tmp_path / ".tmp-latest-1-aa").write_text("")
    assert loaded(tmp_path) == 4
    assert names(tmp_path) == ["samples-000000004"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoints", "latest"]


@pytest.mark.parametrize("limit", [10, 300, 8000])
def test_a_full_disk_leaves_the_old_checkpoints_and_no_remains(tmp_path: Path, limit: int) -> None:
    save_all(tmp_path, 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=r"samples-000000008 cannot be written: .*intact"):
            save_all(tmp_path, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["samples-000000004"]
    assert loaded(tmp_path) == 4


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ENOSPC, errno.EIO])
def test_a_refusing_disk_leaves_the_old_checkpoints_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    save_all(tmp_path, 4)

    def refuse(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(checkpoint.files, "fsync_path", refuse)
    words = f"{os.strerror(number)}.*older checkpoints are intact"
    # Another attempt on another node may do better with a failing disk, not with a full one.
    with pytest.raises(OSError if number == errno.EIO else UserError, match=words):
        save_all(tmp_path, 8)
    assert names(tmp_path) == ["samples-000000004"]


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    save_all(tmp_path, 8)
    suffixes = {entry.suffix for entry in folder(tmp_path, 8).iterdir()}
    assert suffixes == {".safetensors", ".json"}
