"""One safetensors file a run: EMA and raw weights, and in its metadata all that sampling must know.

No pickle, and nothing is believed: names, dtypes and shapes are compared with the model that the
metadata describes before a tensor is read, and every weight must be finite. safetensors itself
refuses headers over 100 MB, overlapping offsets and offsets past the end of the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sssd_hpc import files
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.model import checkpoint as checkpoints
from sssd_hpc.model.sssd import SSSDECG

FORMAT_VERSION = 1
METADATA_KEY = "sssd_hpc"
REQUIRED = (
    *("leads", "labels", "rate_hz", "length"),
    *("diffusion", "prediction", "scale_mv", "label_dropout", "samples_seen"),
)


def save_export(
    path: Path,
    model_config: Mapping[str, Any],
    raw: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Write both sets of weights, whole or not at all.

    Args:
        path: the file, conventionally RUN/export/model.safetensors; its folder is made.
        model_config: the model's constructor arguments (`SSSDECG.config`).
        raw: state dict of the model.
        ema: state dict of its exponential moving average, buffers included.
        metadata: what sampling must know, JSON values: leads, labels (names in order), rate_hz,
            length (samples), diffusion (arguments of the schedule), prediction (epsilon or
            velocity), scale_mv, label_dropout (share of records trained without labels, which
            guidance needs), samples_seen; of a distilled model also distilled_steps, the DDIM
            steps that it samples in.
    """
    missing = [name for name in REQUIRED if name not in metadata]
    assert not missing, f"export metadata lacks {missing}"
    text = json.dumps(
        {"format_version": FORMAT_VERSION, "model": dict(model_config), **metadata},
        allow_nan=False,
    )
    # Cloned, because safetensors refuses memory that two names share (buffers of raw and EMA).
    tensors = {
        f"{group}/{name}": tensor.detach().cpu().contiguous().clone()
        for group, state in (("raw", raw), ("ema", ema))
        for name, tensor in state.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_file(path) as temp:
        save_file(tensors, temp, metadata={METADATA_KEY: text})


def load_export(
    path: Path, weights: Literal["ema", "raw"] = "ema"
) -> tuple[SSSDECG, dict[str, Any]]:
    """Read a model and its metadata.

    Returns:
        The model on the CPU in evaluation mode, its `leads` set, and the metadata of `save_export`
        with `model` (the constructor's arguments) and `format_version`.

    Raises:
        UserError: no safetensors file of ours, or a tensor is missing, unexpected, of another dtype
            or shape than the model's, or not finite; the message names the tensor.
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"weights is {weights!r}; use 'ema' or 'raw'")
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            metadata = _read_metadata(path, stream.metadata() or {})
            names = list(stream.keys())
            model = _empty_model(path, metadata, len(names))
            state = _read_state(path, stream, names, f"{weights}/", model.state_dict())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error
    model.load_state_dict(state, assign=True)
    model.leads = tuple(metadata["leads"])
    return model.eval(), metadata


def export_path(run: Path, checkpoint: str | None = None) -> Path:
    """Return the export of a run: its last weights, or those of a checkpoint.

    A checkpoint is named `latest` (the newest), `best` (the one in RUN/best) or by its folder,
    `samples-000004000`. Its export is made of it and lies beside that of the run.

    Raises:
        UserError: there is none; or the checkpoint is damaged.
    """
    path = run / "export" / "model.safetensors"
    if not path.is_file():
        raise UserError(
            f"{run} has no export/model.safetensors; train it first, or let its training finish"
        )
    return path if checkpoint is None else _export_checkpoint(run, checkpoint, path)


def _export_checkpoint(run: Path, name: str, exported: Path) -> Path:
    """Write a checkpoint's weights beside the export of its run, which describes the network."""
    there = checkpoints.names(run / "checkpoints")
    if not there:
        raise UserError(f"{run} has no checkpoints; leave out --checkpoint for its export")
    chosen = there[0] if name == "latest" else name
    if name == "best":
        try:
            chosen = (run / "best").read_text(encoding="utf-8").strip().removeprefix("checkpoints/")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{run} has no best checkpoint: train it with --validate-every, or name one of "
                f"{', '.join(there)}"
            ) from error
    path = run / "export" / f"{chosen}.safetensors"
    if chosen not in there:
        if checkpoints.FOLDER.fullmatch(chosen) and path.is_file():
            # Removed since, as a set that is gone on with may find.
            return path
        raise UserError(
            f"--checkpoint is {name!r}; {run} has best, latest, {', '.join(there)} "
            "(train.keep_checkpoints 0 keeps all)"
        )
    found = checkpoints.read(run / "checkpoints" / chosen)
    try:
        with safe_open(exported, framework="pt", device="cpu") as stream:
            metadata = _read_metadata(exported, stream.metadata() or {})
        raw, averaged = found.tensors["model"], found.tensors["ema"]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{exported} is not a whole safetensors file: {error}") from error
    except KeyError as error:
        raise UserError(f"{run / 'checkpoints' / chosen} holds no {error} weights") from error
    del metadata["format_version"]
    metadata["samples_seen"] = found.samples
    save_export(path, metadata.pop("model"), raw, {**raw, **averaged}, metadata)
    return path


def check_store(metadata: Mapping[str, Any], store: Store, run: Path) -> None:
    """Check that the model of a run was trained on such records as a store holds.

    Raises:
        UserError: labels, rate or length differ.
    """
    pairs = (
        ("labels", tuple(metadata["labels"]), tuple(store.label_names)),
        ("rate in Hz", metadata["rate_hz"], store.rate_hz),
        ("length in samples", metadata["length"], store.length),
    )
    for what, trained, given in pairs:
        if trained != given:
            raise UserError(
                f"the model in {run} was trained with {what} {_short(trained)}, the store "
                f"{store.path} has {_short(given)}; prepare a store as the model's own was prepared"
            )


def check_names(path: object, given: Iterable[str], wanted: Iterable[str]) -> None:
    """Compare tensor names.

    Raises:
        UserError: one is missing or one too many; the first of them is named.
    """
    given, wanted = set(given), set(wanted)
    if missing := sorted(wanted - given):
        raise UserError(f"{path} lacks the tensor {missing[0]} ({len(missing)} missing in all)")
    if extra := sorted(given - wanted):
        raise UserError(f"{path} has an unexpected tensor {extra[0]} ({len(extra)} in all)")


def check_finite(path: object, name: str, tensor: Tensor) -> None:
    """Raise UserError if a weight is NaN or infinite."""
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{path}: tensor {name} holds NaN or infinite values; it cannot be used")


def _short(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    names = ",".join(value[:8])
    return f"{names} and {len(value) - 8} more" if len(value) > 8 else names


def _read_metadata(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    if METADATA_KEY not in header:
        raise UserError(f"{path} has no {METADATA_KEY!r} metadata; it is not an exported model")
    try:
        metadata = json.loads(header[METADATA_KEY])
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: its metadata is not JSON: {error}") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("model"), dict):
        raise UserError(f"{path}: its metadata describes no model")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {metadata.get('format_version')}; "
            f"this version reads {FORMAT_VERSION}"
        )
    missing = [name for name in REQUIRED if name not in metadata]
    if missing:
        raise UserError(f"{path}: its metadata lacks {', '.join(missing)}")
    for name in ("leads", "labels"):
        count, value = metadata["model"].get(f"num_{name}"), metadata[name]
        is_names = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if not is_names or len(value) != count:
            raise UserError(f"{path}: its metadata must name {count} {name}")
    return metadata


def _empty_model(path: Path, metadata: dict[str, Any], num_tensors: int) -> SSSDECG:
    """Build the described model without memory: its shapes come from an untrusted file."""
    config = dict(metadata["model"])
    try:
        config["step_dims"] = tuple(config["step_dims"])
        if config["num_blocks"] > num_tensors:
            raise UserError(f"model.num_blocks is {config['num_blocks']}, more than the tensors")
        with torch.device("meta"):
            return SSSDECG(**config)
    except (UserError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path} describes a model that cannot be built: {error}") from error


def _read_state(
    path: Path, stream: Any, names: list[str], prefix: str, wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    given = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if stray := [name for name in names if not name.startswith(("ema/", "raw/"))]:
        raise UserError(f"{path} has an unexpected tensor {stray[0]}")
    check_names(path, given, wanted)
    state = {}
    for name, expected in wanted.items():
        part = stream.get_slice(prefix + name)
        shape, dtype = tuple(part.get_shape()), part.get_dtype()
        if shape != expected.shape or dtype != "F32":
            raise UserError(
                f"{path}: tensor {prefix}{name} is {dtype} {shape}; "
                f"the model needs F32 {tuple(expected.shape)}"
            )
        # Cloned off the memory map, so that the file may change afterwards.
        state[name] = stream.get_tensor(prefix + name).clone()
        check_finite(path, prefix + name, state[name])
    return state
