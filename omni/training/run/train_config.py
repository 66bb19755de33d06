"""A training run as one TOML file: one frozen dataclass a table, read strictly.

Unknown keys, wrong types and values out of range are errors that name the table, the key and the remedy. Paths are
those of the shell that starts the run: relative ones count from the current folder, in the file and on the command
line alike; `~` is the home folder.

No shapes: nothing here is a tensor.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omni.config.keywords import nearest

T = TypeVar("T")
_BARE = re.compile(r"[A-Za-z0-9_.~/:@+-]+")  # an unquoted word on the command line: a name, a path, a device


def _number(
    default: Any, *, low: float = -math.inf, above: float = -math.inf, high: float = math.inf, below: float = math.inf
) -> Any:
    """A number in [low, high], and strictly between `above` and `below`."""
    return field(default=default, metadata={"range": (low, above, high, below)})


def _path(default: str | None = None) -> Any:
    return field(default=default, metadata={"path": True})


@dataclass(frozen=True)
class ModelTable:
    """[model]: a checkpoint to start from (folder or Hub id), or a config.json for a new model with random weights.

    dtype: of the loaded parameters; those that are trained are kept in float32 whatever it is (`trainable`), so that
    "bfloat16" halves the memory of the frozen ones. parts as in `OmniModel.from_pretrained`. processor: a folder with
    tokenizer files, where the checkpoint has none.
    """

    checkpoint: str | None = _path()
    config: str | None = _path()
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    parts: tuple[Literal["thinker", "talker", "code2wav"], ...] = ("thinker", "talker", "code2wav")
    processor: str | None = _path()


@dataclass(frozen=True)
class RunTable:
    """[train]: what is trained and for how long.

    objective: name of the objective. steps: updates of the parameters; accumulate: micro-batches of each process a
    step. parameters: patterns over parameter names, later ones win, "!" takes out. precision: of the forward pass;
    "bf16" is autocast over float32 parameters. clip: largest gradient norm, 0 for none. ema_decay: of the moving
    average of the parameters, 0 for none. skip_limit: steps without a finite loss and gradient in a row before the
    run ends. device: "auto" or a torch device; threads: of the CPU, 0 leaves torch's choice.
    """

    objective: str
    steps: int = _number(1000, low=1)
    accumulate: int = _number(1, low=1)
    parameters: tuple[str, ...] = ("*",)
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: bool = False
    clip: float = _number(1.0, low=0)
    ema_decay: float = _number(0.0, low=0, below=1)
    seed: int = _number(0, low=0)
    skip_limit: int = _number(10, low=0)
    device: str = "auto"
    threads: int = _number(0, low=0)


@dataclass(frozen=True)
class GroupTable:
    """[[optimiser.group]]: parameters that match `pattern` learn lr_scale times as fast, with a decay of their own."""

    pattern: str
    lr_scale: float = _number(1.0, low=0)
    weight_decay: float | None = _number(None, low=0)


@dataclass(frozen=True)
class OptimiserTable:
    """[optimiser]: AdamW (Loshchilov and Hutter, 2019) and its learning-rate curve, see `omni.training.run.optimiser`.

    weight_decay is for matrices; norms, biases and embeddings have none. min_lr_ratio: where the curve ends.
    """

    lr: float = _number(1e-5, above=0)
    betas: tuple[float, float] = field(default=(0.9, 0.95), metadata={"range": (0.0, -math.inf, math.inf, 1.0)})
    eps: float = _number(1e-8, above=0)
    weight_decay: float = _number(0.01, low=0)
    warmup_steps: int = _number(0, low=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: float = _number(0.0, low=0, high=1)
    group: tuple[GroupTable, ...] = ()


@dataclass(frozen=True)
class SourceTable:
    """One manifest and how often it is drawn, relative to the others."""

    manifest: str = _path(dataclasses.MISSING)  # type: ignore[arg-type]
    weight: float = _number(1.0, above=0)


@dataclass(frozen=True)
class FilterTable:
    """Rows are kept where the number under `key` of the manifest lies in [min, max]; rows without the key are not."""

    key: str
    min: float = -math.inf
    max: float = math.inf


@dataclass(frozen=True)
class CodecTable:
    """[data.codec]: what turns speech into codes, and the folder that keeps them.

    kind: "mimi", "omni" or "mel"; path: its folder. Without a path it is the encoder that the checkpoint brings, if it
    brings one (of that kind); a path without a kind is Mimi's.
    """

    kind: str | None = None
    path: str | None = _path()
    cache: str | None = _path()


@dataclass(frozen=True)
class DataTable:
    """[data]: max_tokens: Thinker tokens and frames of one micro-batch; bucket: samples read at a time;
    loss_on: which assistant turns are learned, where rows do not say it; skip_limit: bad rows before the run ends;
    ignore_columns: columns of rows that are not read. audio_chunks_s, audio_windows_s: chunks of which each row (of
    `transcription`: each batch) is heard in one, and the least and the most seconds of the attention window, which is a
    random whole number of chunks; see `HearingDraws`."""

    train: tuple[SourceTable, ...] = ()
    eval: tuple[SourceTable, ...] = ()
    max_tokens: int = _number(8192, low=1)
    bucket: int = _number(256, low=1)
    workers: int = _number(0, low=0)
    loss_on: Literal["assistant", "last"] = "assistant"
    skip_limit: int = _number(100, low=0)
    filters: tuple[FilterTable, ...] = ()
    ignore_columns: tuple[str, ...] = ()
    audio_chunks_s: tuple[float, ...] = _number((), above=0)
    audio_windows_s: tuple[float, float] | None = _number(None, above=0)
    codec: CodecTable = field(default_factory=CodecTable)


@dataclass(frozen=True)
class LoRATable:
    """[lora]: low-rank updates (Hu et al., 2021) of the modules that match the patterns; absent: none."""

    patterns: tuple[str, ...]
    rank: int = _number(16, low=1)
    alpha: float = _number(32.0, above=0)
    dropout: float = _number(0.0, low=0, below=1)
    experts: bool = True


@dataclass(frozen=True)
class SpeakerTable:
    """[speaker]: a new voice that starts as `like`; row_only: nothing but its row of the codec embedding learns."""

    add: str
    like: str | None = None
    row_only: bool = True


@dataclass(frozen=True)
class LogTable:
    """[log]: folder of log.jsonl and of TensorBoard's files, None for no log; every: steps between its lines.

    tensorboard: absent, it is written where it is installed; true asks for it. progress: a bar in a terminal; where
    there is none, a line on stderr every `print_every_s` seconds (0: none).
    """

    folder: str | None = _path()
    every: int = _number(1, low=1)
    tensorboard: bool | None = None
    progress: bool = True
    print_every_s: float = _number(60.0, low=0)


@dataclass(frozen=True)
class SaveTable:
    """[save]: folder of the checkpoints, None for none; every: steps between them, 0 for one at the end; keep: the
    newest that stay; export: folder of the finished model in the Hub's layout; dtype: of its weights, by default that
    of the checkpoint that the run started from."""

    folder: str | None = _path()
    every: int = _number(500, low=0)
    keep: int = _number(3, low=1)
    export: str | None = _path()
    dtype: Literal["checkpoint", "float32", "bfloat16"] = "checkpoint"


@dataclass(frozen=True)
class EvalTable:
    """[eval]: every: steps between evaluations, 0 for none; limit: rows, 0 for all; metrics: names.

    scorer, "module:function", makes of (processor, manifest, metrics, limit, codes) a function of (model, step) that
    returns scores by name; it is imported when an evaluation is asked for.
    """

    every: int = _number(0, low=0)
    limit: int = _number(0, low=0)
    metrics: tuple[str, ...] = ()
    scorer: str = "omni.evaluation.suite:evaluation_hook"


@dataclass(frozen=True)
class ParallelTable:
    """[parallel]: sizes of the device mesh; data = 0: what the others leave. shard: FSDP over the data dimension."""

    data: int = _number(0, low=0)
    shard: bool = True
    expert: int = _number(1, low=1)
    tensor: int = _number(1, low=1)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run. `loss`: weights by name; `objective`: options of the objective, which checks
    them. Only [train] objective has no default."""

    train: RunTable
    model: ModelTable = field(default_factory=ModelTable)
    optimiser: OptimiserTable = field(default_factory=OptimiserTable)
    objective: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict, metadata={"range": (0.0, -math.inf, math.inf, math.inf)})
    data: DataTable = field(default_factory=DataTable)
    lora: LoRATable | None = None
    speaker: SpeakerTable | None = None
    log: LogTable = field(default_factory=LogTable)
    save: SaveTable = field(default_factory=SaveTable)
    eval: EvalTable = field(default_factory=EvalTable)
    parallel: ParallelTable = field(default_factory=ParallelTable)

    @classmethod
    def from_toml(cls, path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
        """Read a file, then set what `overrides` ("table.key=value", values in TOML) say.

        An override's value may also be a bare word or path. Raises FileNotFoundError for no such file, ValueError for
        anything in it that is wrong.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; pass the TOML file of a training run")
        toml = _toml()
        try:
            values = toml.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of tables in tables without end
            raise ValueError(f"{path} is not valid TOML: {error}") from error
        try:
            for override in overrides:
                override_key(values, override)
            return cls.from_dict(values)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from nested tables; ValueError names the table and key that is wrong."""
        config = read_table(cls, values, "")
        m, t, o = config.model, config.train, config.optimiser
        if (m.checkpoint is None) == (m.config is None):
            raise ValueError("[model] takes one of checkpoint (weights to start from) and config (a new model)")
        if o.warmup_steps > t.steps:
            raise ValueError(
                f"optimiser.warmup_steps = {o.warmup_steps} is more than train.steps = {t.steps}; "
                "shorten the warm-up or train longer"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Nested tables of plain values, without those that are None: `from_dict` of it is this config."""
        return _plain(self)


def override_key(values: dict[str, Any], override: str) -> None:
    """Set "table.key=value" in nested tables; ValueError for what has no such form."""
    name, equals, text = override.partition("=")
    *tables, key = name.strip().split(".")
    if not equals or not key or not all(tables):
        raise ValueError(f"override {override!r} has no form table.key=value, for example optimiser.lr=1e-4")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ValueError(f"override {override!r}: {table} is not a table; set the whole of it")
    try:
        values[key] = _toml().loads(f"value = {text}")["value"]
    except (ValueError, RecursionError) as error:
        if not _BARE.fullmatch(text.strip()):
            raise ValueError(f"override {override!r}: {text!r} is not a TOML value ({error}); quote text") from error
        values[key] = text.strip()


def _toml() -> Any:
    """The TOML reader: part of Python 3.11, on 3.10 its back-port."""
    for name in ("tomllib", "tomli"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ValueError("reading TOML takes Python 3.11, or on 3.10: pip install tomli")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: _plain(item) for name, item in pairs if item is not None}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def read_table(kind: type[T], values: Any, where: str) -> T:
    """One dataclass from one table. Raises ValueError that names the table, the key and what it may be."""
    if not isinstance(values, Mapping):
        raise ValueError(f"[{where}] must be a table, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    kept = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else key
        if key not in fields:
            raise ValueError(f"unknown key {path!r}; {nearest(key, fields)}")
        kept[key] = _check(hints[key], value, path, fields[key].metadata)
    for name, f in fields.items():
        if name not in kept and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where + '.' if where else ''}{name} is missing; it has no default")
    return kind(**kept)


def _check(kind: Any, value: Any, path: str, limits: Mapping[str, Any]) -> Any:
    """A value of the type that the field declares, within its limits."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):  # X | None; TOML cannot write None
        return _check(next(arg for arg in args if arg is not type(None)), value, path, limits)
    if origin is Literal:
        if value not in args or not isinstance(value, str):
            hint = nearest(value, args) if isinstance(value, str) else f"it must be one of {', '.join(args)}"
            raise ValueError(f"{path} = {value!r} is not known; {hint}")
        return value
    if origin is tuple:
        return _check_list(args, value, path, limits)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{path} must be a table, got {value!r}")
        return {key: _check(args[1], item, f"{path}.{key}", limits) for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return read_table(kind, value, path)  # type: ignore[arg-type]
    if kind is Any:
        return value
    return _check_scalar(kind, value, path, limits)


def _check_list(kinds: tuple[Any, ...], value: Any, path: str, limits: Mapping[str, Any]) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{path} must be a list, got {value!r}")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    elif len(value) != len(kinds):
        raise ValueError(f"{path} must have {len(kinds)} entries, got {value!r}")
    return tuple(_check(kind, item, f"{path}[{i}]", limits) for i, (kind, item) in enumerate(zip(kinds, value)))


def _check_scalar(kind: Any, value: Any, path: str, limits: Mapping[str, Any]) -> Any:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)  # 1e4 steps
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{path} must be {names[kind]}, got {value!r}")
    if kind is str:
        return str(Path(value).expanduser()) if limits.get("path") and value.startswith("~") else value
    if "range" in limits:
        low, above, high, below = limits["range"]
        if not (low <= value <= high and above < value < below):
            bounds = [(low, "at least"), (above, "above"), (high, "at most"), (below, "below")]
            rule = " and ".join(f"{word} {bound:g}" for bound, word in bounds if math.isfinite(bound)) or "finite"
            raise ValueError(f"{path} must be {rule}, got {value!r}")
    return value
