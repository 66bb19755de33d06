"""What is measured in a process of its own: loading a checkpoint, and the memory of a training step.

`python -m omni.bench.probe '{"what": "load", ...}'` prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

_MARK = "omni-probe "


def probe(what: str, **arguments: Any) -> dict[str, Any]:
    """Run a probe in a fresh Python -> what it measured. Raises RuntimeError with its last words if it fails."""
    request = json.dumps({"what": what, **arguments})
    return _result([sys.executable, "-W", "ignore", "-m", "omni.bench.probe", request], what)


def import_seconds(code: str) -> float:
    """Seconds that a fresh Python takes for the given statements."""
    timed = f"import time; start = time.perf_counter(); {code}; seconds = time.perf_counter() - start"
    tell = f"import json; print({_MARK!r} + json.dumps({{'seconds': seconds}}))"
    return float(_result([sys.executable, "-W", "ignore", "-c", f"{timed}; {tell}"], code)["seconds"])


def _result(command: list[str], what: str) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"the process that measured {what} failed: {' '.join(done.stderr.split()[-40:])}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(_MARK))
    return found


def _load(side: str, folder: str, dtype: str, device: str, threads: int) -> dict[str, Any]:
    """Seconds and peak memory of loading; the imports and one small operation come before the clock."""
    import torch

    from omni.bench.checkpoint import parameter_bytes
    from omni.bench.sides import peer_class
    from omni.bench.timing import peak_memory, synchronise
    from omni.config.model import OmniConfig
    from omni.model import OmniModel

    torch.set_num_threads(threads)
    place, kind = torch.device(device), getattr(torch, dtype)
    peer = peer_class(OmniConfig.from_pretrained(folder).model_type)
    torch.zeros(1, device=place).add_(1)
    with peak_memory(place) as memory:
        start = time.perf_counter()
        if side == "omni":
            model: Any = OmniModel.from_pretrained(folder, dtype=kind, device=place)
        else:
            model = peer.from_pretrained(folder, dtype=kind).to(place)
        synchronise(place)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": memory.peak, "kept": parameter_bytes(model)}


def _train(
    side: str, part: str, folder: str, dtype: str, device: str, threads: int, lengths: list[int]
) -> dict[str, Any]:
    """Peak memory of training beyond the parameters: gradients, optimizer state and activations of two steps."""
    from pathlib import Path

    import torch

    from omni.bench.sides import Peer
    from omni.bench.timing import peak_memory
    from omni.bench.training_step import training_step
    from omni.config.model import OmniConfig
    from omni.model import OmniModel

    torch.set_num_threads(threads)
    place, kind = torch.device(device), getattr(torch, dtype)
    if side == "omni":
        model: Any = OmniModel.from_pretrained(folder, dtype=kind, device=place)
    else:
        peer = Peer.load(Path(folder), OmniConfig.from_pretrained(folder), place, kind)
        peer.use(experts="grouped_mm")
        model = peer.model
    step = training_step(model, part, lengths)
    with peak_memory(place) as memory:
        step()  # makes the optimizer's state
        step()
    return {"peak": memory.peak}


def main(request: str) -> None:
    """Do what the JSON asks and print the answer."""
    values = json.loads(request)
    what = values.pop("what")
    print(_MARK + json.dumps(_load(**values) if what == "load" else _train(**values)))


if __name__ == "__main__":
    main(sys.argv[1])
