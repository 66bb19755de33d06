"""From a checkpoint folder into a model that was built on the meta device.

Only tensors that the model has are read, in the order of the bytes, by several threads, straight into their final
place, dtype and device; experts are stacked on the way. So the peak of memory is the model itself.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from omni.checkpoint.adapters import apply_adapter, check_adapter
from omni.checkpoint.keys import KeyTable, Slot, is_stacked
from omni.checkpoint.placement import (
    Device,
    DeviceMap,
    DiskOffload,
    OnDisk,
    check_device,
    device_of,
    dispatch,
    plan_devices,
)
from omni.checkpoint.reading import DTYPES, FLOATS, ShardReader
from omni.checkpoint.refusals import refuse_quantised
from omni.checkpoint.shards import TensorInfo, read_contents, tensor_files
from omni.config.reading import warn_user
from omni.layers.quantized import DEFAULT_PARTS, Quantizer

_RUN_BYTES = 64 << 20  # what a thread reads before it takes the next piece of work
_MOST_TIMES = 1000  # that a tensor drawn at random may be larger than the file's that does not fit
_THREADS = 8  # at most; beyond, neither page cache nor disk gets faster
Initialise = Callable[[set[str]], None]


class Mismatch(NamedTuple):
    """A tensor whose shape in the file is not the model's."""

    key: str
    found: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """What did not fit, in the file's key names.

    missing: the model needs it and no file has it. unexpected: a file has it for a part that was loaded, and the model
    has no such tensor. Tensors of parts that were not asked for are neither.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()

    def raise_if_any(self, folder: Path) -> None:
        """ValueError that counts and names what did not fit."""
        shapes = [f"{key} {list(found)} (model: {list(expected)})" for key, found, expected in self.mismatched]
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": shapes}
        found = [f"{len(keys)} {kind}: {_few(keys)}" for kind, keys in kinds.items() if keys]
        if found:
            raise ValueError(
                f"the weights in {folder} do not fit this model's config: {'; '.join(found)}; check that config.json "
                "belongs to these files, or pass strict=False to take what fits"
            )


@dataclass
class _Plan:
    """Which tensor of the files goes where; `incomplete` are our names that the files cannot fill."""

    reads: list[tuple[TensorInfo, Slot]] = field(default_factory=list)
    incomplete: set[str] = field(default_factory=set)
    report: LoadReport = LoadReport()

    def runs(self) -> list[list[tuple[TensorInfo, Slot]]]:
        """The reads in the order of the bytes, cut into pieces of work, each from one file."""
        runs: list[list[tuple[TensorInfo, Slot]]] = []
        size = 0
        for info, slot in sorted(self.reads, key=lambda read: (read[0].shard, read[0].start)):
            if not runs or size >= _RUN_BYTES or runs[-1][-1][0].shard != info.shard:
                runs.append([])
                size = 0
            runs[-1].append((info, slot))
            size += info.bytes
        return runs


def load_weights(
    model: nn.Module,
    folder: str | Path,
    *,
    table: KeyTable,
    dtype: torch.dtype | str = "auto",
    config_dtype: str | None = None,
    device: Device | None = None,
    device_map: str | Device | DeviceMap | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    adapter: str | Path | None = None,
    quantize: str | None = None,
    quantize_parts: Sequence[str] = DEFAULT_PARTS,
    strict: bool = True,
    initialise: Initialise | None = None,
    progress: bool | None = None,
) -> LoadReport:
    """Fill every parameter and persistent buffer of `model` from the safetensors files in `folder`.

    dtype: of all floating tensors but those of modules that say `always_float32`; "auto" is `config_dtype`, else that
    of the files' first one. device: None is CUDA if
    present, else the CPU. device_map: accelerate's, instead of `device`; weights it puts on "disk" go to
    `offload_folder`. adapter: a PEFT folder, merged at the end. quantize: the low precision of `quantize_parts` (see
    `Quantizer`), each tensor rounded as soon as it is complete, or at the end where an adapter is merged first.
    strict=False takes what fits; `initialise(names)` then fills the rest, given our names. progress: a bar over bytes;
    None shows it when loading takes over two seconds.
    Raises ValueError or FileNotFoundError for a folder that cannot be read or does not fit; nothing is assigned then.
    """
    folder = Path(folder)
    if adapter is not None:
        check_adapter(adapter)  # before the long work
    if quantize is not None and device_map is not None:
        raise ValueError("quantize= and device_map= do not go together; pass device=, a packed model is small")
    quantizer = None if quantize is None else Quantizer(model, quantize, quantize_parts)
    targets = model.state_dict(keep_vars=True)  # tied tensors under each of their names
    adapter_table, table = table, table.for_files(tensor_files(folder))
    slot_of = cache(table.slot)

    def wanted(key: str) -> bool:
        slot = slot_of(key)
        return slot is not None and slot.name in targets

    files, headers = read_contents(folder, wanted)
    slots = {key: slot_of(key) for key in files}
    _refuse_quantised(folder, slots, targets)
    plan = _plan_reads(targets, slots, headers, table)
    if strict:
        plan.report.raise_if_any(folder)
    elif plan.incomplete and initialise is None:
        raise ValueError(f"{_few(sorted(plan.incomplete))} cannot be read from {folder}; pass initialise= to fill them")
    _check_sizes(plan.report, folder)
    target_dtype = resolve_dtype(dtype, config_dtype, (headers[key] for key in files if wanted(key)))
    if device_map is None:
        device = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
        places: dict[str, Any] = {"": check_device(device)}
    else:
        places = plan_devices(model, device_map, target_dtype)
    offload = DiskOffload(offload_folder, places)
    filler = _Filler(model, targets, target_dtype, places, offload, quantizer if adapter is None else None)
    filler.read(plan, progress)
    if plan.incomplete:
        assert initialise is not None
        filler.make_room(plan.incomplete)
        initialise(set(plan.incomplete))
        _name_drawn(plan, folder, table)
    left = [name for name, t in _tensors(model) if t.device.type == "meta"]
    assert not left, f"{left[0]} has no value: it is neither a parameter nor a persistent buffer"
    if adapter is not None:
        apply_adapter(model, adapter, table=adapter_table)
    if quantizer is not None:
        quantizer.finish()
    dispatch(model)
    return plan.report


def _refuse_quantised(folder: Path, slots: Mapping[str, Slot | None], targets: Mapping[str, Tensor]) -> None:
    """Raise ValueError where what is loaded is quantised."""
    loaded = {name.partition(".")[0] for name in targets}
    of_loaded = {key for key, slot in slots.items() if slot is None or slot.name.partition(".")[0] in loaded}
    strange = [key for key in of_loaded if (slot := slots[key]) is None or slot.name not in targets]
    refuse_quantised(folder, strange, slots.keys() - of_loaded)


def _check_sizes(report: LoadReport, folder: Path) -> None:
    """Raise ValueError for tensors far larger than the files' own, which would fill the memory with random values."""
    for key, found, expected in report.mismatched:
        if math.prod(expected) > _MOST_TIMES * max(1, math.prod(found)):
            raise ValueError(
                f"config.json in {folder} asks for {key} of shape {list(expected)} and the file has {list(found)}; "
                "check that it belongs to these files"
            )


def _name_drawn(plan: _Plan, folder: Path, table: KeyTable) -> None:
    """Warn of what was drawn at random: how much, and its names."""
    drawn = sorted(table.to_hub(name) for name in plan.incomplete)
    unfit = [*plan.report.missing, *(key for key, *_ in plan.report.mismatched)]
    warn_user(
        f"{len(drawn)} tensors of the model are drawn at random: {_few(drawn, 20)}; {folder} lacks or has in another "
        f"shape: {_few(unfit, 20)}"
    )


def resolve_dtype(
    dtype: torch.dtype | str, config_dtype: str | None = None, headers: Iterable[TensorInfo] = ()
) -> torch.dtype:
    """A floating dtype from a dtype, its name, or "auto": the config's, else that of the first floating tensor."""
    if dtype == "auto":
        in_files = (FLOATS[info.dtype] for info in headers if info.dtype in FLOATS)
        dtype = config_dtype if config_dtype is not None else next(in_files, torch.float32)
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in FLOATS.values():
        names = ", ".join(str(known).removeprefix("torch.") for known in FLOATS.values())
        raise ValueError(f"dtype {dtype!r} is not one of auto, {names}")
    return found


def _plan_reads(
    targets: Mapping[str, Tensor], slots: Mapping[str, Slot | None], headers: Mapping[str, TensorInfo], table: KeyTable
) -> _Plan:
    """Match the files' keys, each with its slot, with the model's tensors, by header alone."""
    plan = _Plan()
    source: dict[Slot, str] = {}
    unexpected, mismatched = [], []
    loaded = {name.partition(".")[0] for name in targets}
    for key, slot in slots.items():
        if slot is None or slot.name not in targets:
            of_loaded_part = slot is None or slot.name.partition(".")[0] in loaded
            if of_loaded_part and not table.is_derived(key):
                unexpected.append(key)
            continue
        target, info = targets[slot.name], headers[key]
        if slot.piece != "whole" and (target.ndim != 3 or slot.expert >= target.shape[0]):
            unexpected.append(key)
            continue
        if slot in source:
            raise ValueError(f"{info.shard.parent} stores {source[slot]!r} a second time as {key!r}; delete one")
        if info.dtype not in (FLOATS if target.is_floating_point() else DTYPES):
            kind = "a float" if target.is_floating_point() else "a whole number"
            raise ValueError(
                f"{key} in {info.shard} has dtype {info.dtype} where {kind} belongs; quantised weights are not read, "
                "load the unquantised checkpoint (quantize= makes a model small while loading)"
            )
        source[slot] = key
        expected = tuple(slot.of(target).shape)
        if info.shape != expected:
            mismatched.append(Mismatch(key, info.shape, expected))
            plan.incomplete.add(slot.name)
        else:
            plan.reads.append((info, slot))
    missing = _find_missing(targets, source, plan, table)
    plan.report = LoadReport(tuple(missing), tuple(unexpected), tuple(mismatched))
    return plan


def _find_missing(targets: Mapping[str, Tensor], source: Mapping[Slot, str], plan: _Plan, table: KeyTable) -> list[str]:
    """Keys that the model needs and no file has; a tensor under several names needs one of them."""
    present = {id(targets[slot.name]) for slot in source}
    stacked = {slot.name for slot in source if slot.piece != "whole"}
    missing = []
    for name, target in targets.items():
        if name in stacked:
            if Slot(name) in source:
                raise ValueError(f"the files store {table.to_hub(name)} both stacked and expert by expert; delete one")
            lacking = [key for key, slot in table.separate(name, target.shape[0]) if slot not in source]
        elif id(target) in present:
            continue
        elif is_stacked(name):
            lacking = [key for key, _ in table.separate(name, target.shape[0])]
        else:
            lacking = [table.to_hub(name)]
        if lacking:
            plan.incomplete.add(name)
            missing += lacking
    return missing


class _Filler:
    """Allocates each tensor once, where it will live, fills it piece by piece and puts it in its module."""

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, Tensor],
        dtype: torch.dtype,
        places: Mapping[str, Any],
        offload: DiskOffload,
        quantizer: Quantizer | None,
    ) -> None:
        self.quantizer = quantizer
        self.model, self.targets, self.dtype, self.places, self.offload = model, targets, dtype, places, offload
        self.in_float32 = tuple(
            f"{name}." for name, module in model.named_modules() if getattr(module, "always_float32", False)
        )
        self.names: dict[int, list[str]] = defaultdict(list)  # tied tensors are one object under several names
        for name, target in targets.items():
            self.names[id(target)].append(name)
        self.open: dict[str, Tensor] = {}  # tensors that wait for more pieces
        self.waiting: dict[str, int] = {}
        self.lock = Lock()  # of the two dicts above

    def read(self, plan: _Plan, progress: bool | None) -> None:
        """Carry out the plan."""
        for _, slot in plan.reads:
            self.waiting[slot.name] = self.waiting.get(slot.name, 0) + 1
        total = sum(info.bytes for info, _ in plan.reads)
        quiet = {"delay": 0 if progress else 2, "disable": progress is False}
        bar = tqdm(total=total, desc="loading", unit="B", unit_scale=True, **quiet)
        # packing one weight while others are read would keep several at full precision
        threads = 1 if self.quantizer is not None else max(2, min(_THREADS, os.cpu_count() or 1))
        with bar, ThreadPoolExecutor(threads) as pool:
            try:
                for done in as_completed([pool.submit(self._read_run, run) for run in plan.runs()]):
                    bar.update(done.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _read_run(self, run: list[tuple[TensorInfo, Slot]]) -> int:
        """Read tensors of one file, in their order there; returns their bytes."""
        with ShardReader(run[0][0].shard) as file:
            for info, slot in run:
                self._fill(slot, info, file)
        return sum(info.bytes for info, _ in run)

    def make_room(self, names: Iterable[str]) -> None:
        """Empty tensors for those that no file filled completely."""
        for name in names:
            self.open.pop(name, None)
            self._place(name, self._allocate(name))

    def _fill(self, slot: Slot, info: TensorInfo, file: ShardReader) -> None:
        name = slot.name
        with self.lock:
            if name not in self.open:
                self.open[name] = self._allocate(name)
            whole = self.open[name]
        file.read(info, slot.of(whole))
        with self.lock:
            self.waiting[name] -= 1
            complete = not self.waiting[name]
            if complete:
                del self.open[name]
        if complete:
            self._finish(name, whole)

    def _allocate(self, name: str) -> Tensor:
        target = self.targets[name]
        dtype = target.dtype
        if target.is_floating_point():
            dtype = torch.float32 if name.startswith(self.in_float32) else self.dtype
        place = device_of(name, self.places)
        if place == "disk":
            return self.offload.empty(name, target.shape, dtype)
        try:
            return torch.empty(target.shape, dtype=dtype, device=place)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            size = target.numel() * dtype.itemsize / 2**30
            raise OSError(
                f"no room for {name} ({size:.2f} GiB) on {place}; load fewer parts=, a smaller dtype=, "
                "or spread the model with device_map='auto'"
            ) from error

    def _finish(self, name: str, value: Tensor) -> None:
        """Put a complete tensor into the model, packed where that was asked for."""
        if self.quantizer is None or not self.quantizer.take(name, value):
            self._place(name, value)

    def _place(self, name: str, value: Tensor) -> None:
        """Put a tensor under every name it has."""
        target = self.targets[name]
        if isinstance(target, nn.Parameter):
            value = (OnDisk if device_of(name, self.places) == "disk" else nn.Parameter)(value)
        for alias in self.names[id(target)]:
            module, _, leaf = alias.rpartition(".")
            setattr(self.model.get_submodule(module), leaf, value)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _few(keys: Sequence[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")
