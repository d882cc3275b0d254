"""Checkpoints of the two public codes, recognised by the names and shapes of their tensors.

It executes nothing that a file says: pickles are read by torch's weights-only reader, archives are
measured before they are unpacked, and every tensor is compared with the model before it is used.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from sssd_hpc.config import Config, ModelConfig, dump
from sssd_hpc.ecg.leads import EIGHT, LEADS, SSSD_ECG_EIGHT, SSSD_ECG_TWELVE
from sssd_hpc.ecg.statements import STATEMENTS
from sssd_hpc.errors import UserError
from sssd_hpc.files import atomic_write_text
from sssd_hpc.model.export import check_finite, check_names, save_export
from sssd_hpc.model.sssd import SSSDECG
from sssd_hpc.s4.layer import KernelKind

# Eight times the papers' size; a file that unpacks to more is a mistake or an attack.
MAX_BYTES = 2 << 30

BLOCK = "residual_layer.residual_blocks."
S4_KERNEL = "s4_layer.kernel.kernel."
WEIGHT_NORM = {
    ".weight_g": ".parametrizations.weight.original0",
    ".weight_v": ".parametrizations.weight.original1",
}
# Our name of a part and theirs, in the order in which they are tried.
PARTS = (
    (r"init_conv\.", "init_conv.0.conv."),
    (r"step_embedding\.fc(\d)\.", r"residual_layer.fc_t\1."),
    (r"label_embedding\.fold\.", "label_embedding_conv."),
    (r"skip_conv\.", "final_conv.0.conv."),
    (r"head\.", "final_conv.2.conv."),
    (r"blocks\.(\d+)\.step\.", rf"{BLOCK}\1.fc_t."),
    (r"blocks\.(\d+)\.label\.", rf"{BLOCK}\1.fc_label."),
    (r"blocks\.(\d+)\.conv\.", rf"{BLOCK}\1.conv_layer.conv."),
    (r"blocks\.(\d+)\.(res|skip)\.", rf"{BLOCK}\1.\2_conv."),
    (r"blocks\.(\d+)\.s4_in\.", rf"{BLOCK}\1.S41."),
    (r"blocks\.(\d+)\.s4_out\.", rf"{BLOCK}\1.S42."),
)
S4_PARTS = (
    (r"D$", "s4_layer.D"),
    (r"(C|omega|z|log_dt|B|P|Q|w)$", rf"{S4_KERNEL}\1"),
    (r"output\.", "s4_layer.output_linear."),
    (r"norm\.", "norm_layer."),
)


def load_reference(
    source: Mapping[str, Any] | str | Path,
    kernel: KernelKind = "conjugate",
    nodes: Literal["exact", "checkpoint"] = "exact",
) -> SSSDECG:
    """Build the model that a checkpoint of SSSD-ECG or SSSD-ECG-nle holds, of any size.

    Args:
        source: a state dict of arrays or tensors, an `.npz` whose keys begin with `sd/`, or a
            `.pkl` holding tensors only; a state dict may lie under the key `model_state_dict`.
        kernel: which function the checkpoint was trained with: "conjugate" with the public codes'
            CUDA extension or pykeops, "half" with neither (a sum without conjugate states).
        nodes: "checkpoint" uses its rounded omega and z and the textbook formula, slower and good
            only for comparisons: the kernel moves by 1e-4 or less.

    Returns:
        The model on the CPU, its lead order as the attribute `leads` (None if the count is
        neither 8 nor 12).

    Raises:
        UserError: the file cannot be read safely, or a tensor is missing, unexpected, of the wrong
            shape or not finite; the message names it.
    """
    if kernel not in ("conjugate", "half"):
        raise UserError(f"kernel is {kernel!r}; use 'conjugate' or 'half'")
    if nodes not in ("exact", "checkpoint"):
        raise UserError(f"nodes is {nodes!r}; use 'exact' or 'checkpoint'")
    where = source if isinstance(source, (str, Path)) else "the state dict"
    given = source if isinstance(source, Mapping) else _read_file(Path(source))
    state = _stack_label_tables(where, _tensors(where, given))
    config = _recognise(where, state)
    # Without memory: the sizes come from an untrusted file. Their checkpoints all have nodes.
    with torch.device("meta"):
        wanted = SSSDECG(**config, kernel=kernel, stored_nodes=True).state_dict()
        model = SSSDECG(**config, kernel=kernel, stored_nodes=nodes == "checkpoint")
    theirs = {name: public_name(name, state) for name in wanted}
    check_names(where, state, theirs.values())
    ours = {}
    for name, expected in wanted.items():
        tensor = state[theirs[name]]
        shape = public_shape(name, expected.shape)
        if tensor.shape != shape:
            raise UserError(
                f"{where}: tensor {theirs[name]} has shape {tuple(tensor.shape)}; "
                f"the model needs {tuple(shape)}"
            )
        check_finite(where, theirs[name], tensor)
        ours[name] = tensor.float().reshape(expected.shape).clone()
    model.load_state_dict({name: ours[name] for name in model.state_dict()}, assign=True)
    is_ecg = "embedding.weight" in state
    orders = {8: SSSD_ECG_EIGHT if is_ecg else EIGHT, 12: SSSD_ECG_TWELVE if is_ecg else LEADS}
    model.leads = orders.get(config["num_leads"])
    return model


def convert_reference(
    source: Path,
    out: Path,
    *,
    kernel: KernelKind = "conjugate",
    labels: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """Write a public checkpoint as a run that sampling takes: weights and config.yaml.

    What `config.yaml` cannot say (the order of the leads, the names of the labels, the kernel) is
    in the export's metadata.

    Args:
        source: as in `load_reference`.
        out: folder of the run to make.
        kernel: as in `load_reference`.
        labels: names of the labels in the checkpoint's order. It does not hold them; by default 71
            are all SCP codes sorted, as SSSD-ECG has them, others label_0, label_1, ..

    Returns:
        The export's metadata, `model` (the constructor's arguments) among it.

    Raises:
        UserError: as `load_reference`; a wrong number of names; OUT holds a run already.
    """
    path = out / "export" / "model.safetensors"
    for taken in (path, out / "checkpoints"):
        if taken.exists():
            raise UserError(f"{taken} exists already; name another folder or remove it")
    model = load_reference(source, kernel)
    count = model.config["num_labels"]
    if labels is None:
        official = tuple(sorted(STATEMENTS))
        labels = official if count == len(official) else tuple(f"label_{i}" for i in range(count))
    if len(labels) != count or len(set(labels)) != count:
        raise UserError(
            f"{len(set(labels))} different label names were given; {source} has {count} labels"
        )
    if model.leads is None:
        raise UserError(f"{source} has {model.config['num_leads']} leads; 8 or 12 can be named")
    metadata = {
        "leads": list(model.leads),
        "labels": list(labels),
        "rate_hz": 100,
        "length": model.config["lmax"],
        "diffusion": {"num_steps": 200, "beta_start": 1e-4, "beta_end": 0.02},
        "prediction": "epsilon",
        "scale_mv": 1.0,
        "label_dropout": 0.0,
        "samples_seen": 0,
    }
    shared = {field.name for field in fields(ModelConfig)} & set(model.config)
    settings = ModelConfig(
        leads="twelve" if len(model.leads) == len(LEADS) else "eight",
        **{name: model.config[name] for name in shared},
    )
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / "config.yaml", dump(Config(model=settings)))
    # Last, because its presence says that the run is whole.
    state = model.state_dict()
    save_export(path, model.config, state, state, metadata)
    return {"model": model.config, **metadata}


def _recognise(where: object, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the constructor's arguments that the tensors' names and shapes imply."""

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in state:
            raise UserError(
                f"{where} lacks the tensor {name}; it is no checkpoint of SSSD-ECG or SSSD-ECG-nle"
            )
        if state[name].dim() != dims or 0 in state[name].shape:
            raise UserError(
                f"{where}: tensor {name} has shape {tuple(state[name].shape)}; "
                f"it must have {dims} dimensions, none empty"
            )
        return tuple(state[name].shape)

    if gender := [name for name in state if "gender" in name]:
        raise UserError(f"{where} has a gender embedding ({gender[0]}), which no model here has")
    channels, num_leads, _ = shape("init_conv.0.conv.parametrizations.weight.original1", 3)
    first, waves = shape("residual_layer.fc_t1.weight", 2)
    second, _ = shape("residual_layer.fc_t2.weight", 2)
    _, _, pairs, _ = shape(f"{BLOCK}0.S41.{S4_KERNEL}C", 4)
    num_nodes, _ = shape(f"{BLOCK}0.S41.{S4_KERNEL}omega", 2)
    table = _label_table(state)
    if "label_embedding.table" in state:
        kind, (num_labels, _, label_dim) = "frozen", shape(table, 3)
    else:
        kind, (num_labels, label_dim) = "sum", shape(table, 2)
    blocks = {name[len(BLOCK) :].partition(".")[0] for name in state if name.startswith(BLOCK)}
    return {
        "num_leads": num_leads,
        "num_labels": num_labels,
        "num_blocks": len(blocks),
        "channels": channels,
        "d_state": 2 * pairs,
        "lmax": _length(where, state[f"{BLOCK}0.S41.{S4_KERNEL}omega"], num_nodes),
        "label_embedding": kind,
        "label_dim": label_dim,
        "step_dims": (waves, first, second),
    }


def _length(where: object, omega: Tensor, num_nodes: int) -> int:
    """Return the L whose nodes exp(-2 pi i j / L), j = 0..L/2, these are: even L ends at -1."""
    even, odd = 2 * num_nodes - 2, 2 * num_nodes - 1
    length = even if even and abs(float(omega[-1, 1])) < math.pi / (2 * odd) else odd
    angle = 2 * math.pi / length * torch.arange(num_nodes, dtype=torch.float64)
    exact = torch.stack([angle.cos(), -angle.sin()], dim=1)
    if omega.shape != exact.shape or not bool((omega.double() - exact).abs().max() < 1e-3):
        raise UserError(f"{where}: the nodes {S4_KERNEL}omega are not roots of unity")
    return length


def _label_table(state: Mapping[str, Any]) -> str:
    """Return the name that the label table has: SSSD-ECG's, nle's old or (stacked) new one."""
    names = ("label_embedding.table", "label_embedding.weight", "embedding.weight")
    return next((name for name in names if name in state), "embedding.weight")


def public_name(name: str, state: Mapping[str, Any]) -> str:
    """Return what the public code whose state dict this is calls our tensor `name`.

    Weight norm is in its newer spelling; nle's label tables are one, label_embedding.table.
    """
    if name == "label_embedding.table":
        return _label_table(state)
    for ours, theirs in PARTS:
        head = re.match(ours, name)
        if head is None:
            continue
        tail = name[head.end() :]
        if ".s4_" in head.group():
            for our_tail, their_tail in S4_PARTS:
                tail, found = re.subn("^" + our_tail, their_tail, tail)
                if found:
                    break
        return head.expand(theirs) + tail
    raise AssertionError(f"{name} has no public name")


def public_shape(name: str, shape: torch.Size) -> tuple[int, ...]:
    """Return the public shape of our tensor: S4's parts have other single dimensions there."""
    if re.search(r"s4_(in|out)\.[BPQD]$", name):
        return (1, *shape)
    if name.endswith(".output.weight"):
        return tuple(shape[:2])
    if name.endswith(".output.bias"):
        return (*shape, 1)
    return tuple(shape)


def _stack_label_tables(where: object, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gather nle's label_embedding.0.weight, .. into one label_embedding.table (N, 2, dim)."""
    pattern = re.compile(r"label_embedding\.(\d+)\.weight")
    tables = {name: tensor for name, tensor in state.items() if pattern.fullmatch(name)}
    if not tables:
        return state
    names = [f"label_embedding.{i}.weight" for i in range(len(tables))]
    check_names(where, tables, names)
    for name in names:
        if tables[name].dim() != 2 or tables[name].shape != tables[names[0]].shape:
            raise UserError(
                f"{where}: tensor {name} has shape {tuple(tables[name].shape)}; each label's table "
                "must be (2, label_dim) alike"
            )
        check_finite(where, name, tables[name])
    rest = {name: tensor for name, tensor in state.items() if name not in tables}
    return {**rest, "label_embedding.table": torch.stack([tables[name] for name in names])}


def _tensors(where: object, given: object) -> dict[str, Tensor]:
    """Return named real tensors with the newer spelling of weight norm."""
    if isinstance(given, Mapping) and isinstance(given.get("model_state_dict"), Mapping):
        given = given["model_state_dict"]
    if not isinstance(given, Mapping) or not given:
        raise UserError(f"{where} holds no state dict but {type(given).__name__}")
    state: dict[str, Tensor] = {}
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, (Tensor, np.ndarray)):
            raise UserError(f"{where}: entry {name!r} is a {type(value).__name__}, not a tensor")
        floating = value.dtype in (torch.float32, torch.float64, np.float32, np.float64)
        if not floating or (isinstance(value, Tensor) and value.layout != torch.strided):
            raise UserError(f"{where}: tensor {name} is {value.dtype}; it must be float32")
        tensor = torch.tensor(value) if isinstance(value, np.ndarray) else value.detach().cpu()
        for old, new in WEIGHT_NORM.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        if name in state:
            raise UserError(f"{where} holds the tensor {name} in both spellings of weight norm")
        state[name] = tensor
    # Views may be larger than their memory (the public B, P and w are), so this comes first.
    if sum(tensor.numel() for tensor in state.values()) * 4 > MAX_BYTES:
        raise UserError(f"{where} would unpack to more than {MAX_BYTES >> 30} GiB")
    return state


def _read_file(path: Path) -> object:
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix in (".pkl", ".pt", ".pth"):
        return _read_pickle(path)
    raise UserError(f"{path}: give a .npz or a .pkl checkpoint")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays under sd/, each proven to be as large as its header says before it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if m.filename.startswith("sd/")]
            if sum(member.file_size for member in members) > MAX_BYTES:
                raise UserError(f"{path} would unpack to more than {MAX_BYTES >> 30} GiB")
            return {
                member.filename.removeprefix("sd/").removesuffix(".npy"): _read_npy(archive, member)
                for member in members
            }
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as .npz: {error}") from error
    except (ValueError, SyntaxError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read as .npz: {error}") from error


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as stream:
        version = npy.read_magic(stream)
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        if version not in read_header:
            raise ValueError(f"{member.filename} has array format {version}")
        shape, fortran, dtype = read_header[version](stream)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds Python objects")
        num_bytes = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or num_bytes != member.file_size - stream.tell():
            raise ValueError(f"{member.filename} claims the shape {shape}, which its size denies")
        array = np.frombuffer(stream.read(num_bytes), dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def _read_pickle(path: Path) -> object:
    """Read tensors, refusing every other object before it is made."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
            # torch stores its records uncompressed.
            if unpacked > path.stat().st_size:
                raise UserError(f"{path} is compressed or damaged; torch.save does not compress")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # hostile bytes raise anything
        first_line = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{path} holds something other than tensors, or is damaged, and was not unpickled: "
            f"{first_line}"
        ) from error
