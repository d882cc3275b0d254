"""Public checkpoints: recognised by shape at any size, and refused in every broken form."""

from __future__ import annotations

import io
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sssd_hpc import config
from sssd_hpc.ecg.leads import EIGHT, LEADS, SSSD_ECG_EIGHT, SSSD_ECG_TWELVE
from sssd_hpc.errors import UserError
from sssd_hpc.model import SSSDECG, convert_reference, load_export, load_reference, reference

from .conftest import SMALL

C = "residual_layer.residual_blocks.1.S42.s4_layer.kernel.kernel.C"


def build(code: str, **changes) -> SSSDECG:
    kind = {"ecg": "sum", "nle": "frozen"}[code]
    model = SSSDECG(**{**SMALL, **changes}, label_embedding=kind)
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("code", ["ecg", "nle"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lmax": 24},
        {"lmax": 1},
        {"lmax": 2},
        {"lmax": 3},
        {"lmax": 999, "num_leads": 12},
        {"lmax": 1000, "num_blocks": 11, "channels": 1},
        {"num_labels": 1, "d_state": 2},
        {"num_labels": 12, "label_dim": 1, "step_dims": (4, 3, 7)},
        {"num_leads": 2},
    ],
    ids=str,
)
def test_any_size_is_recognised_from_the_shapes(code, changes, public_state):
    model = build(code, **changes)
    loaded = load_reference(public_state(model, code))
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    orders = {8: (SSSD_ECG_EIGHT, EIGHT), 12: (SSSD_ECG_TWELVE, LEADS), 2: (None, None)}
    assert loaded.leads == orders[model.config["num_leads"]][code == "nle"]


@pytest.mark.parametrize("spelling", [("ecg", True), ("ecg", False), ("nle", True), ("nle", False)])
def test_both_spellings_of_weight_norm_load(spelling, public_state, batch):
    code, older = spelling
    model = build(code)
    state = public_state(model, code)
    pairs = (
        ("parametrizations.weight.original0", "weight_g"),
        ("parametrizations.weight.original1", "weight_v"),
    )
    for new, old in pairs:
        swap = (new, old) if older else (old, new)
        state = {key.replace(*swap): value for key, value in state.items()}
    x, t, labels = batch
    out = load_reference(state)(x, t, labels.abs())
    assert torch.equal(out, model(x, t, labels.abs()))


def test_nle_with_its_old_label_table_is_the_sum_model(public_state):
    state = public_state(build("ecg"), "ecg")
    state["label_embedding.weight"] = state.pop("embedding.weight")
    model = load_reference(state)
    assert model.config["label_embedding"] == "sum"
    assert model.leads == EIGHT


def test_half_kernel_and_stored_nodes_are_kept_in_the_config(public_state, batch):
    state = public_state(build("ecg"), "ecg")
    x, t, labels = batch
    outs = {}
    for kernel in ("conjugate", "half"):
        for nodes in ("exact", "checkpoint"):
            model = load_reference(state, kernel=kernel, nodes=nodes)
            assert model.config["kernel"] == kernel
            assert model.config["stored_nodes"] == (nodes == "checkpoint")
            outs[kernel, nodes] = model(x, t, labels.abs())
    for kernel in ("conjugate", "half"):
        exact, stored = outs[kernel, "exact"], outs[kernel, "checkpoint"]
        assert (exact - stored).norm() < 1e-3 * exact.norm()
    assert (outs["half", "exact"] - outs["conjugate", "exact"]).norm() > 0.01


@pytest.mark.parametrize("form", ["npz", "zip-pickle", "old-pickle", "wrapped", "stride-0"])
def test_every_form_of_file_loads(form, tmp_path, public_state):
    model = build("ecg")
    state = public_state(model, "ecg")
    tensors = {name: torch.tensor(value) for name, value in state.items()}
    path = tmp_path / ("model.npz" if form == "npz" else "100.pkl")
    if form == "npz":
        np.savez_compressed(path, **{f"sd/{name}": value for name, value in state.items()}, other=1)
    elif form == "wrapped":
        content = {"model_state_dict": tensors, "optimizer_state_dict": {"lr": 1e-3}}
        torch.save(content, path)
    else:
        if form == "stride-0":
            for name, tensor in tensors.items():
                if name.endswith((".B", ".P", ".Q")):
                    tensors[name] = tensor[:, :1].expand_as(tensor)
        torch.save(tensors, path, _use_new_zipfile_serialization=form != "old-pickle")
    loaded = load_reference(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    loaded.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop(C), f"lacks the tensor {C}"),
        (lambda s: s.pop("init_conv.0.conv.weight_v"), "lacks the tensor init_conv"),
        (lambda s: s.pop("embedding.weight"), "lacks the tensor embedding.weight"),
        (lambda s: s.update(stray=np.zeros(1, np.float32)), "unexpected tensor stray"),
        (lambda s: s.update({"fc_gender.weight": np.zeros(1, np.float32)}), "gender"),
        (lambda s: s.update({C: s[C][:, :-1]}), rf"{C} has shape \(2, 11, 2, 2\)"),
        (lambda s: s.update({C: s[C][..., 0]}), rf"{C} has shape \(2, 12, 2\)"),
        (lambda s: s.update({C: s[C] * np.nan}), f"{C} holds NaN"),
        (lambda s: s.update({C: s[C].astype(np.int64)}), f"{C} is int64"),
        (lambda s: s.update({C: "text"}), f"{C}' is a str"),
        (lambda s: s.update({C.replace("1.S42", "0.S41"): s[C][:0]}), "none empty"),
        (lambda s: s.update({C.replace("1.S42", "7.S42"): s[C]}), "lacks the tensor .*blocks.2."),
        (
            lambda s: s.update(
                {C.replace("1.S42", "0.S41").removesuffix("C") + "omega": np.ones((13, 2), "f4")}
            ),
            "not roots of unity",
        ),
        (
            lambda s: s.update({"final_conv.0.conv.parametrizations.weight.original0": s[C]}),
            "both spellings",
        ),
        (lambda s: s.clear(), "holds no state dict"),
    ],
)
def test_a_wrong_tensor_is_named(change, words, public_state):
    state = public_state(build("ecg"), "ecg")
    change(state)
    with pytest.raises(UserError, match=words):
        load_reference(state)


def test_label_tables_of_different_shape_are_named(public_state):
    state = public_state(build("nle"), "nle")
    state["label_embedding.2.weight"] = np.zeros((3, 5), np.float32)
    with pytest.raises(UserError, match=r"label_embedding\.2\.weight has shape \(3, 5\)"):
        load_reference(state)
    del state["label_embedding.1.weight"]
    with pytest.raises(UserError, match=r"lacks the tensor label_embedding\.1\.weight"):
        load_reference(state)


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["plain", "zip", "old", "in-optimizer"])
def test_a_malicious_pickle_is_refused_before_it_runs(form, tmp_path):
    target, path = tmp_path / "executed", tmp_path / "model.pkl"
    bomb = Bomb(target)
    pickle.loads(pickle.dumps(bomb))
    assert target.exists(), "the bomb must work for the test to mean anything"
    target.unlink()
    content = {"model_state_dict": {"a": torch.zeros(1)}, "optimizer_state_dict": bomb}
    if form == "plain":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(
            content if form == "in-optimizer" else bomb,
            path,
            _use_new_zipfile_serialization=form != "old",
        )
    with pytest.raises(UserError, match="was not unpickled"):
        load_reference(path)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02.", b"garbage" * 100])
@pytest.mark.parametrize("name", ["model.pkl", "model.npz"])
def test_damaged_files_are_refused(content, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        load_reference(path)


def test_missing_files_and_other_kinds_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not a file"):
        load_reference(tmp_path / "absent.pkl")
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UserError, match=r"give a \.npz or a \.pkl"):
        load_reference(tmp_path / "model.onnx")


def npy(shape: str, body: bytes, descr: str = "'<f4'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


def array_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (npy("(1000000000000,)", b"\0" * 16), "which its size denies"),
        (npy("(-4,)", b"\0" * 16), "cannot be read"),
        (npy("(4,)", b"\0" * 12), "which its size denies"),
        (array_bytes(np.array([{}], dtype=object)), "Python objects"),
        (npy("(__import__('os').abort(),)", b""), "cannot be read"),
        (b"\x93NUMPY\x09\x00", "array format"),
        (b"", "cannot be read"),
    ],
    ids=["huge-shape", "negative", "short", "objects", "code", "version", "empty"],
)
def test_a_lying_npz_is_refused_without_memory(member, words, tmp_path):
    path = tmp_path / "model.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sd/a.npy", member)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=words):
            load_reference(path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_zip_bombs_are_refused_from_their_declared_sizes(tmp_path):
    npz, pkl = tmp_path / "model.npz", tmp_path / "model.pkl"
    block = npy("(262144,)", bytes(1 << 20))
    with zipfile.ZipFile(npz, "w", zipfile.ZIP_DEFLATED) as archive:
        for index in range(64):
            archive.writestr(f"sd/{index}.npy", block)
    # Patched in the central directory: as if each of the 64 members held 64 MiB.
    data = npz.read_bytes()
    claim, size = len(block).to_bytes(4, "little"), (64 << 20).to_bytes(4, "little")
    npz.write_bytes(data.replace(claim, size))
    torch.save({"a": torch.zeros(1 << 18)}, tmp_path / "plain.pkl")
    with (
        zipfile.ZipFile(tmp_path / "plain.pkl") as plain,
        zipfile.ZipFile(pkl, "w", zipfile.ZIP_DEFLATED) as squeezed,
    ):
        for member in plain.infolist():
            squeezed.writestr(member.filename, plain.read(member))
    with pytest.raises(UserError, match="more than 2 GiB"):
        load_reference(npz)
    with pytest.raises(UserError, match="compressed or damaged"):
        load_reference(pkl)


def test_a_view_larger_than_its_memory_is_refused(public_state):
    state = {name: torch.tensor(value) for name, value in public_state(build("ecg"), "ecg").items()}
    state[C] = torch.zeros(1).expand(1 << 40)
    with pytest.raises(UserError, match="more than 2 GiB"):
        load_reference(state)


@pytest.mark.parametrize("num_labels", [3, 71])
def test_convert_writes_an_export_that_loads(num_labels, tmp_path, public_state, batch):
    model = build("ecg", num_labels=num_labels)
    source = tmp_path / "100.npz"
    np.savez(source, **{f"sd/{name}": v for name, v in public_state(model, "ecg").items()})
    metadata = convert_reference(source, tmp_path / "run", kernel="half")
    settings = config.load(tmp_path / "run" / "config.yaml").model
    assert settings.num_blocks == metadata["model"]["num_blocks"]
    assert settings.step_dims == tuple(metadata["model"]["step_dims"])
    loaded, stored = load_export(tmp_path / "run" / "export" / "model.safetensors")
    assert stored["labels"] == metadata["labels"]
    assert stored["labels"][:2] == (["label_0", "label_1"] if num_labels == 3 else ["1AVB", "2AVB"])
    assert stored["model"]["kernel"] == "half"
    assert loaded.leads == SSSD_ECG_EIGHT
    x, t, _ = batch
    labels = torch.zeros(2, num_labels, dtype=torch.int64)
    assert torch.equal(loaded(x, t, labels), load_reference(source, "half")(x, t, labels))
    with pytest.raises(UserError, match="exists already"):
        convert_reference(source, tmp_path / "run")


def test_convert_killed_midway_can_be_repeated_and_spares_a_run_in_training(
    tmp_path, public_state, monkeypatch
):
    source = tmp_path / "100.npz"
    np.savez(source, **{f"sd/{name}": v for name, v in public_state(build("nle"), "nle").items()})

    def killed(*_):
        raise KeyboardInterrupt

    for writer in ("atomic_write_text", "save_export"):
        with monkeypatch.context() as patch:
            patch.setattr(reference, writer, killed)
            with pytest.raises(KeyboardInterrupt):
                convert_reference(source, tmp_path / "run")
    convert_reference(source, tmp_path / "run")
    assert load_export(tmp_path / "run" / "export" / "model.safetensors")
    assert config.load(tmp_path / "run" / "config.yaml")
    (tmp_path / "training" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="checkpoints exists already"):
        convert_reference(source, tmp_path / "training")
    assert not (tmp_path / "training" / "config.yaml").exists()


def test_convert_takes_names_and_refuses_a_wrong_number(tmp_path, public_state):
    source = tmp_path / "100.npz"
    np.savez(source, **{f"sd/{name}": v for name, v in public_state(build("nle"), "nle").items()})
    with pytest.raises(UserError, match=r"2 different label names were given; .* has 3"):
        convert_reference(source, tmp_path / "run", labels=("A", "B"))
    metadata = convert_reference(source, tmp_path / "run", labels=("A", "B", "C"))
    assert metadata["labels"] == ["A", "B", "C"]
    assert metadata["leads"] == list(EIGHT)
