"""The configuration of a run: a frozen tree of plain values, its presets and its YAML form.

One type system: tyro parses the command line from these classes; a preset or a stored `config.yaml`
is flattened to the same flags and placed before the user's own, so the precedence is
default < preset < command line and an unknown key is refused the same way everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
import yaml

from sssd_hpc.errors import UserError

T = TypeVar("T")


def _check(holds: bool, field: str, given: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"{field} is {given}; it must be {allowed}")


def parse_shard(text: str) -> tuple[int, int]:
    """Return shard K of N of "K/N", K from 0.

    Raises:
        UserError: it is not that.
    """
    match = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if number >= count:
        raise UserError(f"--shard is {text!r:.40}; it must be K/N with K in 0 .. N-1, as in 0/16")
    return number, count


def parse_folds(text: str) -> tuple[int, ...]:
    """Return the folds named by text such as `1-8` or `1,3,9-10`, ascending.

    Raises:
        UserError: the text names no fold or one outside 1-10.
    """
    folds: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.strip().isdecimal() and (not last or last.strip().isdecimal())):
            raise UserError(f"folds are {text!r}; write them like 1-8 or 1,3,9-10")
        folds.update(range(int(first[:4]), int((last or first)[:4]) + 1))
    if not folds or min(folds) < 1 or max(folds) > 10:
        raise UserError(f"folds are {text!r}; PTB-XL has the folds 1-10")
    return tuple(sorted(folds))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network (SSSD-ECG, SSSD-ECG-nle); defaults are the paper's sizes."""

    leads: Literal["eight", "twelve"] = "eight"
    """eight: the independent leads I, AVF, V1-V6, the others follow by identity; twelve: all."""
    label_embedding: Literal["nle", "sum", "frozen"] = "nle"
    """nle: rows absent, present, unknown per label; sum: SSSD-ECG; frozen: the public nle code."""
    num_blocks: int = 36
    """Residual blocks, two S4 layers each."""
    channels: int = 256
    """Residual and skip channels; the S4 layers work on twice as many features."""
    d_state: int = 64
    """State size N of each S4 feature; even (conjugate pairs)."""
    lmax: int = 1000
    """Longest signal in samples that the S4 kernels are built for."""
    label_dim: int = 128
    """Width of the label embedding."""
    step_dims: tuple[int, int, int] = (128, 512, 512)
    """Widths of the diffusion-step embedding: sinusoids, first and second linear layer."""

    def __post_init__(self) -> None:
        for name in ("num_blocks", "channels", "lmax", "label_dim"):
            value = getattr(self, name)
            _check(value >= 1, f"model.{name}", value, "at least 1")
        _check(
            self.d_state >= 2 and self.d_state % 2 == 0, "model.d_state", self.d_state, "even, >= 2"
        )
        _check(
            min(self.step_dims) >= 1 and self.step_dims[0] % 2 == 0,
            "model.step_dims",
            self.step_dims,
            "positive, the first even",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The linear noise schedule (Ho et al., arXiv 2006.11239); defaults are the paper's."""

    num_steps: int = 200
    """Diffusion steps T."""
    beta_start: float = 1e-4
    """Noise variance added by the first step."""
    beta_end: float = 0.02
    """Noise variance added by the last step."""
    prediction: Literal["epsilon", "velocity"] = "epsilon"
    """What the network predicts: the noise (the paper), or v, sound where little signal is left."""
    zero_terminal_snr: bool = False
    """Rescale the schedule to end in pure noise, where sampling starts (arXiv 2305.08891); velocity
    only. The paper's schedule leaves 36 % of the signal's amplitude."""
    distilled_steps: int = 0
    """DDIM steps that a student samples in, set by --distill-from; 0: no student."""
    scale_mv: float = 1.0
    """Millivolts per model unit; 1.0 is the paper (signals in mV, not normalised)."""

    def __post_init__(self) -> None:
        _check(self.num_steps >= 1, "diffusion.num_steps", self.num_steps, "at least 1")
        _check(
            0 < self.beta_start <= self.beta_end < 1,
            "diffusion.beta_start, beta_end",
            (self.beta_start, self.beta_end),
            "in (0, 1) and ascending",
        )
        _check(
            not self.zero_terminal_snr or self.prediction == "velocity",
            "diffusion.prediction",
            self.prediction,
            "velocity with diffusion.zero_terminal_snr: in pure noise, the noise is the input and "
            "says nothing of the signal",
        )
        _check(
            not self.zero_terminal_snr or self.num_steps >= 2,
            "diffusion.num_steps",
            self.num_steps,
            "at least 2 with diffusion.zero_terminal_snr",
        )
        _check(
            self.distilled_steps >= 0,
            "diffusion.distilled_steps",
            self.distilled_steps,
            "at least 1 for a student, else 0",
        )
        _check(
            math.isfinite(self.scale_mv) and self.scale_mv > 0,
            "diffusion.scale_mv",
            self.scale_mv,
            "positive and finite",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation; everything that counts progress counts samples seen."""

    samples: int = 1_000_000
    """Records to see in all."""
    batch_size: int = 8
    """Records a step."""
    learning_rate: float = 2e-4
    """AdamW's learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """constant: the paper; cosine: down to zero at the end."""
    warmup_samples: int = 0
    """Samples over which the learning rate rises linearly from zero."""
    kernel_rate: float = 1.0
    """Learning rate of the S4 kernels' C as a multiple of the others'; S4's own code takes less."""
    weight_decay: float = 0.0
    """AdamW's weight decay; biases, gains and kernels have none."""
    grad_clip: float = 0.0
    """Largest gradient norm; 0 does not clip."""
    ema_half_life_samples: int = 50_000
    """Samples after which an old weight counts half in the exponential moving average."""
    label_dropout: float = 0.1
    """Share of records trained with every label unknown, for guidance (nle embedding only)."""
    checkpoint_every: int = 4000
    """Samples between checkpoints, as in the paper's convergence analysis, where that is not sooner
    than train.checkpoint_gap_s after the last."""
    checkpoint_gap_s: float = 60.0
    """Least seconds from one checkpoint to the next: fast training passes over those that would
    come sooner; 0 makes all of them."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept, and the best; older ones are removed. 0 keeps all of them."""
    validate_every: int = 0
    """Samples between validations on fold 9, each of a checkpoint, and one at the end; 0: none."""
    log_every: int = 400
    """Samples between lines of metrics.jsonl."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """On a GPU tf32 lets tensor cores round operands of float32 products and convolutions; bf16
    also runs linear layers under autocast, over float32 weights. S4 kernels stay float32."""
    activation_checkpointing: bool = False
    """Compute each block's activations again in backward: a third more time, less memory."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed's ZeRO spreads over the processes: 0 nothing, 1 the optimizer's state, 2 also
    gradients, 3 also weights."""
    accumulation_steps: int = 1
    """Pieces that each process takes its share of a batch in: less memory, the same step."""
    bad_steps: int = 0
    """Steps in a row that are skipped where the loss is not finite, before training stops."""
    tensorboard: bool = False
    """Also write metrics.jsonl's numbers as TensorBoard curves to RUN/tensorboard."""
    timeout_s: int = 600
    """Seconds after which a process that does not answer the others is taken for dead."""
    seed: int = 0
    """Seed of the weights, the order of records and the noise."""
    folds: str = "1-8"
    """Folds to train on, for example 1-8 or 1,3,5."""
    allow_leakage: bool = False
    """Let `folds` hold 9 or 10, which then judge no more what was trained."""

    def __post_init__(self) -> None:
        for name in (
            "samples",
            "batch_size",
            "checkpoint_every",
            "log_every",
            "accumulation_steps",
            "timeout_s",
        ):
            value = getattr(self, name)
            _check(value >= 1, f"train.{name}", value, "at least 1")
        for name in ("keep_checkpoints", "validate_every", "bad_steps"):
            value = getattr(self, name)
            _check(value >= 0, f"train.{name}", value, "zero or more")
        _check(
            self.bad_steps == 0 or self.accumulation_steps == 1,
            "train.bad_steps",
            self.bad_steps,
            "0 where train.accumulation_steps is over 1: earlier pieces cannot be taken back",
        )
        for name in ("learning_rate", "kernel_rate", "ema_half_life_samples"):
            value = getattr(self, name)
            _check(math.isfinite(value) and value > 0, f"train.{name}", value, "positive")
        for name in ("warmup_samples", "weight_decay", "grad_clip", "checkpoint_gap_s"):
            value = getattr(self, name)
            _check(math.isfinite(value) and value >= 0, f"train.{name}", value, "zero or more")
        _check(0 <= self.label_dropout < 1, "train.label_dropout", self.label_dropout, "in [0, 1)")
        _check(0 <= self.seed < 1 << 63, "train.seed", self.seed, "in 0 .. 2^63 - 1")
        judging = set(parse_folds(self.folds)) & {9, 10}
        _check(
            self.allow_leakage or not judging,
            "train.folds",
            repr(self.folds),
            "within 1-8, since evaluation judges by folds 9 and 10 (or --train.allow-leakage)",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All that decides what a run computes, besides its data."""

    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig = TrainConfig()


def preset_names() -> list[str]:
    """Return the names of the presets that the package ships."""
    folder = resources.files("sssd_hpc") / "presets"
    return sorted(
        entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def preset_path(name: str) -> Path:
    """Return the YAML file of a preset by name, or of a path ending in `.yaml`.

    Raises:
        UserError: no such preset or file.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"--preset {name} is not a file")
        return Path(name)
    if name not in preset_names():
        close = difflib.get_close_matches(name, preset_names(), 1)
        hint = f"; perhaps you meant {close[0]}" if close else ""
        raise UserError(
            f"--preset is {name!r}; presets are {', '.join(preset_names())} or a .yaml file{hint}"
        )
    return Path(str(resources.files("sssd_hpc") / "presets" / f"{name}.yaml"))


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read a YAML mapping with the safe loader.

    Raises:
        UserError: no file, a syntax error (with its line), an object tag, no mapping, a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not plain YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}; a mapping is needed")
    return value


def for_student(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a teacher's settings as its student takes them: with a tenth of the learning rate.

    The student starts where its teacher ended; a rate that trains from nothing throws it far off
    (docs/log.md). A student's own student keeps the rate, which is one tenth already.
    """
    train, diffusion = tree.get("train"), tree.get("diffusion")
    taught = isinstance(diffusion, Mapping) and diffusion.get("distilled_steps")
    rate = train.get("learning_rate") if isinstance(train, Mapping) else None
    if taught or not isinstance(train, Mapping) or not isinstance(rate, float):
        return tree
    return {**tree, "train": {**train, "learning_rate": rate / 10}}


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, refusing a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def flags(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Flatten a mapping to the command line's flags: {"train": {"seed": 1}} -> --train.seed 1.

    Raises:
        UserError: a key that cannot be a setting's name.
    """
    result: list[str] = []
    for key, value in tree.items():
        if not re.fullmatch("[a-z][a-z0-9_]*", str(key)) or key == "help":
            raise UserError(f"{prefix}{key!s:.80} is not a setting")
        name = f"{prefix}{key}".replace("_", "-")
        if isinstance(value, Mapping):
            result += flags(value, f"{name}.")
        elif isinstance(value, bool):
            switch, _, last = name.rpartition(".")
            result.append(f"--{name}" if value else f"--{switch}.no-{last}".replace("--.", "--"))
        elif isinstance(value, Sequence) and not isinstance(value, str):
            result += [f"--{name}", *(str(item) for item in value)]
        else:
            result += [f"--{name}", str(value)]
    return result


def as_dict(config: Config) -> dict[str, Any]:
    """Return the tree as plain dictionaries, tuples as lists."""
    plain: dict[str, Any] = yaml.safe_load(dump(config))
    return plain


def dump(config: Config) -> str:
    """Return the tree as YAML; `load` of it gives an equal tree."""
    tree = dataclasses.asdict(config)
    tree["model"]["step_dims"] = list(tree["model"]["step_dims"])
    return yaml.safe_dump(tree, sort_keys=False)


def load(path: Path) -> Config:
    """Read a tree that `dump` wrote.

    Raises:
        UserError: the file is not such a tree; the message names the key.
    """
    tree = read_yaml(path)
    try:
        return parse(Config, flags(tree), prog=str(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse(kind: Callable[..., T], args: Sequence[str], *, prog: str) -> T:
    """Call or build `kind` from command line flags; `--help` prints and raises SystemExit(0).

    Raises:
        UserError: the flags do not fit; one line made of tyro's message.
    """
    message = io.StringIO()
    with contextlib.redirect_stderr(message):
        try:
            call = tyro.cli(_deferred(kind), args=list(args), prog=prog)
        except SystemExit as error:
            if not error.code:
                raise
            raise UserError(_one_line(message.getvalue())) from error
    return call()


def _deferred(kind: Callable[..., T]) -> Callable[..., Callable[[], T]]:
    """Wrap `kind` so that parsing yields the call instead of its result."""

    @functools.wraps(kind)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], T]:
        return lambda: kind(*args, **kwargs)

    return bind


def _one_line(box: str) -> str:
    """Return the message of tyro's error box, and the flag that it suggests, as one line."""
    paragraphs: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip(" \u2502")
        if re.fullmatch("[-\u2500]{5,}|[\u256d\u2570].*", text):
            paragraphs.append([])
        elif text:
            paragraphs[-1].append(text)
    filled = [paragraph for paragraph in paragraphs if paragraph]
    if "\u256d" not in box:
        # Without box characters the title is a paragraph of its own.
        filled = filled[1:]
    message = re.sub(r"^Error parsing [\w.]+: (?=[a-z_]+\.)", "", " ".join(filled[0]))
    for paragraph in filled[1:]:
        if paragraph[0].startswith("Perhaps you meant") and len(paragraph) > 1:
            message += f"; perhaps you meant {paragraph[1].split()[0]}"
    return re.sub(r"\[/?bold\]", "", message)
