"""Spreading a big model over devices with accelerate; nothing else in the library knows about it.

accelerate is imported where it is used: most loads need none of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
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


class DiskOffload:
    """Writes the weights that stay on disk into a folder that accelerate reads from; made when first needed."""

    def __init__(self, folder: str | os.PathLike[str] | None, device_map: Mapping[str, Any]) -> None:
        self.index: dict[str, Any] = {}
        if "disk" not in device_map.values():
            return
        if folder is None:
            raise ValueError("device_map puts weights on disk; pass offload_folder, the folder that may hold them")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, value: Tensor) -> None:
        """Put one finished tensor on disk."""
        from accelerate.utils import offload_weight

        offload_weight(value, name, str(self.folder), self.index)


def dispatch(model: nn.Module, device_map: dict[str, Any], offload: DiskOffload) -> None:
    """Attach accelerate's hooks, which bring inputs to each module's device, if there is more than one device."""
    if len(set(device_map.values())) < 2 and not offload.index:
        return
    from accelerate import dispatch_model
    from accelerate.utils import save_offload_index

    if offload.index:
        save_offload_index(offload.index, str(offload.folder))
    dispatch_model(model, device_map, offload_dir=offload.folder if offload.index else None)
