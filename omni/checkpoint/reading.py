"""Reading tensors out of safetensors files, straight into memory that is already where they will live.

Plain reads, not a memory map: where the files are in the page cache a map costs two page faults for every page (the
file's and the new weight's), reads only one, and several threads can read at once.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from omni.checkpoint.shards import TensorInfo

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {
    **FLOATS,
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
_STAGING_BYTES = 4 << 20


class ShardReader:
    """One safetensors file, open while in a `with` block; every thread needs its own.

    A tensor of the file's own dtype on the CPU is read in place. Any other passes through a small staging buffer
    (page-locked for a GPU), piece by piece, so that it is converted and moved without a second copy of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._staging: Tensor | None = None

    def __enter__(self) -> ShardReader:
        self._file = self.path.open("rb", buffering=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, info: TensorInfo, target: Tensor) -> None:
        """Fill `target`, contiguous and of the tensor's shape, on any device; OSError or ValueError if that fails."""
        assert target.is_contiguous() and target.shape == info.shape, "the target must have room for the tensor"
        dtype = DTYPES[info.dtype]
        flat = target.view(-1)
        self._file.seek(info.start)
        if flat.device.type == "cpu" and flat.dtype == dtype:
            self._read_bytes(flat)
            return
        if self._staging is None:
            self._staging = torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=flat.is_cuda)
        staging = self._staging.view(dtype)
        for start in range(0, len(flat), len(staging)):
            piece = staging[: len(flat) - start]
            self._read_bytes(piece)
            flat[start : start + len(piece)].copy_(piece)

    def _read_bytes(self, flat: Tensor) -> None:
        """Fill a one-dimensional CPU tensor with the next bytes of the file."""
        left = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        while len(left):
            count = self._file.readinto(left)  # at most 2 GiB a call on Linux
            if not count:
                raise ValueError(f"{self.path} ends early: it became shorter; download or save the checkpoint again")
            left = left[count:]
