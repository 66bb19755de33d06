"""The flash-attn package (Dao, 2023) in this library's shapes. It is optional, and loaded by the first call.

The package keeps tokens before heads, [B, T, H, D], takes fp16 and bf16 on CUDA, and aligns causal queries with the
last keys, as here. Its names and arguments: flash_attn 2.7, `flash_attn_interface.py`.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from omni.layers.packing import PackedBlocks

_MAX_HEAD_SIZE = 256


def fits(q: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take such tensors: half precision on CUDA, one dtype, a head width they know."""
    kernel = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0
    return kernel and q.shape[-1] <= _MAX_HEAD_SIZE and all(x.dtype == q.dtype for x in others)


def _library() -> ModuleType:
    try:
        import flash_attn
    except ImportError as error:
        raise ValueError(
            "attention backend 'flash' needs the package flash-attn: pip install 'thinker-talker[flash]', or choose "
            "'sdpa'"
        ) from error
    return flash_attn


def dense(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """q [B, H, T, D], k and v [B, Hkv, S, D] -> [B, H, T, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _library().flash_attn_func(q, k, v, causal=causal).transpose(1, 2)


def cached(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """Attention over a cache, without gradients; shapes as in `cached_attention`."""
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    held = (slots[:, -1] + 1).to(torch.int32)  # the last query of a row sees its last key
    out = _library().flash_attn_with_kvcache(q, keys, values, cache_seqlens=held, causal=True)
    return out.transpose(1, 2)


def packed(q: Tensor, k: Tensor, v: Tensor, blocks: PackedBlocks) -> Tensor:
    """q [N, H, D], k and v [N, Hkv, D] -> [N, H, D]."""
    bounds, longest = blocks.offsets, blocks.longest
    return _library().flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, causal=blocks.causal)
