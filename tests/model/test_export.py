"""The export: a round trip, and every way in which its file can lie."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sssd_hpc.errors import UserError
from sssd_hpc.model import load_export, save_export

METADATA = {
    "leads": ["I", "AVF", "V1", "V2", "V3", "V4", "V5", "V6"],
    "labels": ["AFIB", "NORM", "PVC"],
    "rate_hz": 100,
    "length": 25,
    "diffusion": {"num_steps": 200, "beta_start": 1e-4, "beta_end": 0.02},
    "prediction": "epsilon",
    "label_dropout": 0.1,
    "scale_mv": 1.0,
    "samples_seen": 4000,
}
WEIGHT = "ema/blocks.0.s4_in.C"


@pytest.fixture
def export(tmp_path, small_model) -> Path:
    path = tmp_path / "export" / "model.safetensors"
    raw = small_model.state_dict()
    ema = {name: tensor + 1 if name == "head.bias" else tensor for name, tensor in raw.items()}
    save_export(path, small_model.config, raw, ema, METADATA)
    return path


def rewrite(path: Path, tensors=None, metadata=None) -> None:
    """Change the file's tensors or its metadata by a function each."""
    with open(path, "rb") as stream:
        size = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(size))["__metadata__"]
    state = load_file(path)
    described = json.loads(header["sssd_hpc"])
    if tensors:
        tensors(state)
    if metadata:
        metadata(described)
    save_file(state, path, metadata={"sssd_hpc": json.dumps(described)})


def test_both_sets_of_weights_and_the_metadata_return(export, small_model, batch):
    raw, metadata = load_export(export, "raw")
    ema, _ = load_export(export)
    assert torch.equal(raw(*batch), small_model(*batch))
    assert torch.equal(ema.head.bias, small_model.head.bias + 1)
    assert ema.leads == tuple(METADATA["leads"])
    assert not ema.training
    assert {name: metadata[name] for name in METADATA} == METADATA
    assert metadata["model"]["channels"] == 6
    assert [entry.name for entry in export.parent.iterdir()] == ["model.safetensors"]


def test_a_loaded_model_trains_and_owns_its_memory(export, batch):
    model, _ = load_export(export)
    export.write_bytes(b"\0" * export.stat().st_size)
    model(*batch).square().mean().backward()
    assert model.head.weight.grad is not None


def test_a_failed_save_keeps_the_old_file(export, small_model):
    before = export.read_bytes()
    state = small_model.state_dict()
    with pytest.raises(ValueError, match="JSON"):
        save_export(
            export, small_model.config, state, state, {**METADATA, "scale_mv": float("nan")}
        )
    assert export.read_bytes() == before
    assert len(list(export.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop(WEIGHT), "lacks the tensor blocks.0.s4_in.C"),
        (lambda s: s.update({"ema/stray": torch.zeros(1)}), "unexpected tensor stray"),
        (lambda s: s.update({"other/stray": torch.zeros(1)}), "unexpected tensor other/stray"),
        (
            lambda s: s.update({WEIGHT: torch.zeros(2, 12, 2, 3)}),
            rf"{WEIGHT} is F32 \(2, 12, 2, 3\)",
        ),
        (lambda s: s.update({WEIGHT: s[WEIGHT].half()}), f"{WEIGHT} is F16"),
        (lambda s: s.update({WEIGHT: s[WEIGHT].double()}), f"{WEIGHT} is F64"),
        (lambda s: s[WEIGHT].fill_(float("nan")), f"{WEIGHT} holds NaN"),
        (lambda s: s[WEIGHT][0, 0, 0].fill_(float("inf")), f"{WEIGHT} holds NaN or inf"),
    ],
    ids=["missing", "extra", "stray", "shape", "half", "double", "nan", "inf"],
)
def test_a_wrong_tensor_is_named(export, change, words):
    rewrite(export, tensors=change)
    with pytest.raises(UserError, match=words):
        load_export(export)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format_version=2), "format version 2"),
        (lambda m: m.pop("labels"), "lacks labels"),
        (lambda m: m.update(leads=["I"]), "must name 8 leads"),
        (lambda m: m.update(labels=[1, 2, 3]), "must name 3 labels"),
        (lambda m: m.update(model=3), "describes no model"),
        (lambda m: m["model"].update(num_blocks=10**9), "num_blocks is 1000000000"),
        (lambda m: m["model"].update(d_state=10**9), "d_state is 1000000000"),
        (lambda m: m["model"].update(channels=10**6), "needs F32"),
        (lambda m: m["model"].update(channels=10**30), "cannot be built"),
        (lambda m: m["model"].update(lmax=10**15), "lmax is 1000000000000000"),
        (lambda m: m["model"].update(channels="many"), "cannot be built"),
        (lambda m: m["model"].update(kernel="slow"), "cannot be built"),
        (lambda m: m["model"].update(step_dims=[8, 4]), "cannot be built"),
        (lambda m: m["model"].update(stranger=1), "cannot be built"),
        (lambda m: m["model"].pop("channels"), "cannot be built"),
    ],
)
def test_a_lying_description_is_refused_without_memory(export, change, words):
    rewrite(export, metadata=change)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=words):
            load_export(export)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def file_of(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def entry(begin: int, end: int, shape: list[int]) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04not safetensors",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        file_of(b"{" * 100_000),
        file_of(json.dumps({"ema/a": entry(0, 2**50, [2**48])}).encode(), bytes(16)),
        file_of(
            json.dumps({"ema/a": entry(0, 16, [4]), "ema/b": entry(8, 24, [4])}).encode(),
            bytes(24),
        ),
        file_of(json.dumps({"ema/a": entry(0, 16, [5])}).encode(), bytes(16)),
        file_of(json.dumps({"ema/a": entry(0, 16, [2**62, 4])}).encode(), bytes(16)),
    ],
    ids=[
        "empty",
        "pickle",
        "huge-header",
        "large-header",
        "deep",
        "past-end",
        "overlap",
        "shape",
        "overflow",
    ],
)
def test_a_broken_file_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load_export(path)


def test_a_truncated_file_is_refused(export):
    content = export.read_bytes()
    export.write_bytes(content[:-1])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load_export(export)


def test_files_of_others_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not an exported model"):
        load_export(path)
    save_file({"a": torch.zeros(2)}, path, metadata={"sssd_hpc": "[" * 5000})
    with pytest.raises(UserError, match="not JSON"):
        load_export(path)
    with pytest.raises(UserError, match="missing"):
        load_export(tmp_path / "missing.safetensors")
