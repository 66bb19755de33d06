"""Reading and writing checkpoints in the Hub's layout: safetensors shards, an index, and the released key names."""

from omni.checkpoint.adapters import apply_adapter
from omni.checkpoint.keys import KeyTable
from omni.checkpoint.load import LoadReport, Mismatch, load_weights, resolve_dtype
from omni.checkpoint.save import save_weights
from omni.checkpoint.shards import TensorInfo, read_headers, tensor_files
from omni.config.writing import atomic_folder

__all__ = [
    "KeyTable",
    "LoadReport",
    "Mismatch",
    "TensorInfo",
    "apply_adapter",
    "atomic_folder",
    "load_weights",
    "read_headers",
    "resolve_dtype",
    "save_weights",
    "tensor_files",
]
