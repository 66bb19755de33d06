"""Spreading a big model over devices; nothing else in the library knows about it.

accelerate plans which module goes where, and is imported where it is used: most loads need none of it.
"""

from __future__ import annotations

import inspect
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Device = str | int | torch.device
DeviceMap = Mapping[str, Device]
_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def check_device(device: Device) -> torch.device:
    """The device, after one byte was put there; ValueError if this machine does not have it."""
    try:
        found = torch.device(device)
        torch.empty(1, dtype=torch.uint8, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not available here; 'cpu' always is") from error
    if found.type == "meta":
        raise ValueError("device 'meta' holds no values, so nothing can be loaded there; pass 'cpu' or a real device")
    return found


def plan_devices(
    model: nn.Module, device_map: str | Device | DeviceMap, dtype: torch.dtype
) -> dict[str, str | int | torch.device]:
    """A device for every module, from a strategy's name, one device, or a mapping from module names.

    The model may be on the meta device. Modules that say `keep_together` stay in one piece: layers with a residual
    path, and parts whose steps do not pass through every module's `forward`. A device may be "disk", for weights that
    are read when used. Raises ValueError for unknown devices or modules left without one.
    """
    if isinstance(device_map, str) and device_map in _STRATEGIES:
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        memory, whole = None, _kept_together(model)
        if device_map != "sequential":
            low_zero = device_map == "balanced_low_0"
            memory = get_balanced_memory(model, dtype=dtype, no_split_module_classes=whole, low_zero=low_zero)
        return dict(infer_auto_device_map(model, memory, no_split_module_classes=whole, dtype=dtype))
    if not isinstance(device_map, Mapping):
        if isinstance(device_map, str) and not device_map.startswith(("cpu", "cuda", "mps", "xpu", "npu", "meta")):
            raise ValueError(f"device_map {device_map!r} is neither a device nor one of {', '.join(_STRATEGIES)}")
        device_map = {"": device_map}
    for device in set(device_map.values()) - {"disk"}:
        check_device(device)
    known = {"", *dict(model.named_modules()), *model.state_dict()}
    if strange := [name for name in device_map if name not in known]:
        raise ValueError(f"device_map names {strange[0]!r}, which this model does not have; '' stands for all of it")
    bare = [name for name, _ in model.named_parameters() if device_of(name, device_map) is None]
    if bare:
        raise ValueError(
            f"device_map places {len(bare)} tensors nowhere ({bare[0]}, ...); name their modules, or '' for the rest"
        )
    return dict(_disjoint(model, "", device_map))


def _kept_together(model: nn.Module) -> list[str]:
    """The names of the classes whose modules say `keep_together`, as accelerate asks for them."""
    return sorted({type(module).__name__ for module in model.modules() if getattr(module, "keep_together", False)})


def _disjoint(module: nn.Module, name: str, device_map: DeviceMap) -> Iterator[tuple[str, Any]]:
    """The map with each module at one level only; accelerate does not expect a module inside another one's entry."""
    if not any(key != name and (not name or key.startswith(f"{name}.")) for key in device_map):
        if any(True for _ in module.parameters()):
            yield name, device_of(name, device_map)
        return
    prefix = f"{name}." if name else ""
    for key, _ in module.named_parameters(recurse=False):
        yield prefix + key, device_of(prefix + key, device_map)
    for key, child in module.named_children():
        yield from _disjoint(child, prefix + key, device_map)


def device_of(name: str, device_map: Mapping[str, Any]) -> Any:
    """The device of the most specific module in the map that holds tensor `name`, None if there is none."""
    while True:
        if name in device_map:
            return device_map[name]
        if not name:
            return None
        name = name.rpartition(".")[0]


class OnDisk(nn.Parameter):
    """A weight in a mapped file. It says `is_meta`, so that nothing merges into it, packs it or saves it."""

    is_meta = True


class DiskOffload:
    """Weights that rest in files of a folder, mapped into memory: read when used, dropped when memory is short."""

    def __init__(self, folder: str | os.PathLike[str] | None, device_map: Mapping[str, Any]) -> None:
        if "disk" not in device_map.values():
            return
        if folder is None:
            raise ValueError("device_map puts weights on disk; pass offload_folder, the folder that may hold them")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def empty(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor that lies in a file of its own. Raises OSError where the disk has no room for it."""
        values = math.prod(shape)
        if not values:
            return torch.empty(shape, dtype=dtype)
        path = self.folder / f"{name}.bin"
        path.unlink(missing_ok=True)  # a model that was loaded before may still read the old file
        with path.open("xb") as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk would end the process at the first write
                os.posix_fallocate(file.fileno(), 0, values * dtype.itemsize)
            else:
                file.truncate(values * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=values, dtype=dtype).view(shape)


def dispatch(model: nn.Module) -> None:
    """Let the modules of a model whose weights lie on several devices be called with tensors of its first device.

    A module computes where its weights are (those on disk: on the CPU). Whoever calls one from outside hands over and
    gets back tensors of the model's device. States and all other objects stay as they are, the caller's own: what a
    module writes into them has to reach the caller, so they are no business of hooks that copy.
    """
    home = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    home = getattr(model, "device", home)
    if all(tensor.device == home for tensor in _tensors(model)):
        return
    for module in model.modules():
        devices = {tensor.device for tensor in _tensors(module)}
        if module is model or len(devices) != 1:
            continue
        for name in _public_methods(type(module)):
            setattr(module, name, _aligned(getattr(module, name), devices.copy().pop(), home))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _public_methods(cls: type[nn.Module]) -> list[str]:
    """`forward` and the methods that a class has beyond those of every module."""
    own = [name for name in dir(cls) if name[0] != "_" and not hasattr(nn.Module, name)]
    return ["forward", *(name for name in own if inspect.isfunction(inspect.getattr_static(cls, name)))]


_inside = threading.local()  # `device`: of the module whose method runs in this thread, if any


def _aligned(method: Callable[..., Any], device: torch.device, home: torch.device) -> Callable[..., Any]:
    """The method, called from outside with its tensors on `device`, its results brought `home`."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        before = getattr(_inside, "device", None)
        if before == device:
            return method(*args, **kwargs)
        _inside.device = device
        try:
            result = method(*_moved(args, device), **{key: _moved(value, device) for key, value in kwargs.items()})
        finally:
            _inside.device = before
        return _moved(result, home)

    return call


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors, also in tuples (and in lists of tensors alone), on a device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        items = [_moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list) and value and all(isinstance(item, Tensor) for item in value):
        return [item.to(device) for item in value]
    return value
