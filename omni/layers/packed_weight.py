"""Matrices kept at 8 or 4 bits: packing, unpacking, and products of few tokens with them.

    int8  symmetric, one scale a row (output)
    int4  symmetric, two values a byte, one scale for each group of inputs of a row
    fp8   e4m3, one scale a row

A byte of int4 holds inputs i and i + I/2, so that its halves unpack without being interleaved; on a CPU, where torch
has a kernel for int4, the bytes lie as that kernel wants them instead. Scales are bf16 values: what is rounded is
rounded against the scale that is kept.

Shapes: E matrices, O outputs, I inputs, G inputs a group, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("int8", "int4", "fp8")
_GROUPS = (64, 32, 16)  # inputs a scale; the largest that divides half a row
_FP8_MAX = 448.0
# torch's int8 CPU kernel wins up to this many tokens (width 2048: 0.7 against 6 ms at 4, 6.4 against 7.3 ms at 16), and
# reads beyond the end of rows that are not a multiple of its block
_KERNEL_TOKENS, _KERNEL_BLOCK = 16, 32


def group_size(inputs: int) -> int | None:
    """Inputs that share a scale in int4, None if rows of that length cannot be packed."""
    return next((group for group in _GROUPS if inputs % (2 * group) == 0), None)


class PackedWeight(nn.Module):
    """E matrices [O, I] at low precision. They are constants: training them is refused.

    data: int8 [E, O, I], uint8 [E, O, I] (the bits of fp8) or uint8 [E, O, I / 2] (int4); scale: [E, O], int4
    [E, O, I / G], or [E, I / G, O, 2] (scale, zero) in the CPU kernel's order.
    """

    data: Tensor
    scale: Tensor

    def __init__(self, kind: str, inputs: int, data: Tensor, scale: Tensor, for_cpu_kernel: bool) -> None:
        super().__init__()
        self.kind, self.inputs, self.outputs = kind, inputs, scale.shape[2 if for_cpu_kernel else 1]
        self.for_cpu_kernel = for_cpu_kernel
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.training = False

    @classmethod
    def pack(cls, weight: Tensor, kind: str) -> PackedWeight:
        """Round weight [O, I] or [E, O, I] to `kind`, where it is; one matrix at a time, so memory grows by little.

        Raises ValueError for an unknown kind, no matrix, rows that cannot be grouped, or values that are not finite.
        """
        if kind not in KINDS:
            raise ValueError(f"low precision {kind!r} is not one of {', '.join(KINDS)}")
        if kind == "int4" and group_size(weight.shape[-1]) is None:
            raise ValueError(f"int4 needs rows of a multiple of {2 * _GROUPS[-1]} inputs, got {weight.shape[-1]}")
        matrices = weight.detach().reshape(-1, *weight.shape[-2:])
        for_cpu_kernel = kind == "int4" and _cpu_kernel_takes(matrices)
        data: Tensor | None = None
        scale: Tensor | None = None
        for expert, matrix in enumerate(matrices):
            packed = _pack(matrix.float(), kind, for_cpu_kernel)
            if data is None or scale is None:
                data, scale = (part.new_empty(len(matrices), *part.shape) for part in packed)
            data[expert], scale[expert] = packed
        if data is None or scale is None:
            raise ValueError(
                f"a weight of shape {list(weight.shape)} holds no matrix; pass [O, I], or [E, O, I], E >= 1"
            )
        if not bool(scale.isfinite().all()):
            raise ValueError("the weight holds values that are not finite; it cannot be kept at low precision")
        return cls(kind, weight.shape[-1], data, scale, for_cpu_kernel)

    def train(self, mode: bool = True) -> PackedWeight:
        """Raises ValueError when asked to train."""
        if mode:
            raise ValueError(f"weights at {self.kind} cannot be trained; load the model without quantize=")
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{self.kind}, {len(self.data)} x [{self.outputs}, {self.inputs}]"

    def matmul(self, x: Tensor, expert: int | Tensor = 0) -> Tensor:
        """x [N, I] times the transposed matrix of one expert -> [N, O] in x's dtype; on a CPU computed in bf16."""
        _refuse_gradients(x, self.kind)
        self._check_device(x)
        if x.device.type == "cpu":
            return self._cpu_matmul(x, self.data[expert], self.scale[expert])
        return F.linear(x, self.dense(x.dtype, expert))

    def matmul_rows(self, x: Tensor, experts: Tensor) -> Tensor:
        """Each row of x [N, I] times the matrix of its own expert, int64 [N] -> [N, O]; nothing is read by the host."""
        _refuse_gradients(x, self.kind)
        self._check_device(x)
        if x.device.type == "cpu":
            chosen = zip(x.split(1), self.data[experts], self.scale[experts])
            return torch.cat([self._cpu_matmul(*row) for row in chosen])
        return self.fused_rows(x, experts)

    def fused_rows(self, x: Tensor, experts: Tensor) -> Tensor:
        """The same as one expression, which torch.compile makes one kernel: it gathers, unpacks and adds up, and reads
        the packed bytes alone. Not for the CPU kernel's layout."""
        return (self.dense(x.dtype, experts) * x[:, None]).sum(-1)

    def dense(self, dtype: torch.dtype, expert: int | Tensor = 0) -> Tensor:
        """The matrix of one expert [O, I], or those of several [N, O, I], in a floating dtype.

        Raises ValueError for several in the CPU kernel's layout.
        """
        data, scale = self.data[expert], self.scale[expert]
        if self.for_cpu_kernel:
            if data.ndim != 2:
                raise ValueError(
                    f"the CPU kernel's int4 layout is unpacked one matrix at a time, {len(data)} were asked for; "
                    "pass one expert's number"
                )
            return self._cpu_matmul(torch.eye(self.inputs), data, scale).T.to(dtype)
        if self.kind == "int4":
            return _from_int4(data, scale, dtype)
        values = data.to(dtype) if self.kind == "int8" else _from_fp8(data, dtype)
        return values * scale[..., None].to(dtype)

    def _check_device(self, x: Tensor) -> None:
        if self.for_cpu_kernel and (x.device.type != "cpu" or self.data.device.type != "cpu"):
            raise ValueError("these weights were packed for a CPU; quantise the model on the device it will run on")

    def _cpu_matmul(self, x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
        """One matrix, by torch's kernels for packed weights where there is one; all of it adds up in fp32."""
        tokens, scale = x.to(torch.bfloat16).contiguous(), scale.to(torch.bfloat16)
        if self.for_cpu_kernel:
            y = torch._weight_int4pack_mm_for_cpu(tokens, data, self.inputs // scale.shape[0], scale)
        elif self.kind == "int8" and len(x) < _KERNEL_TOKENS and self.inputs % _KERNEL_BLOCK == 0:
            y = torch._weight_int8pack_mm(tokens, data, scale)
        elif self.kind == "int8":
            y = F.linear(tokens, data.to(torch.bfloat16)) * scale
        elif self.kind == "fp8":
            y = F.linear(tokens, _from_fp8(data, torch.bfloat16)) * scale
        else:
            y = F.linear(tokens, _from_int4(data, scale, torch.bfloat16))
        return y.to(x.dtype)


def _refuse_gradients(x: Tensor, kind: str) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"weights at {kind} give no gradients; load the model without quantize=, or use torch.no_grad")


def _cpu_kernel_takes(matrices: Tensor) -> bool:
    """Whether torch's int4 CPU kernel takes such matrices [E, O, I]: blocks of 64 outputs, groups of at least 32."""
    outputs, inputs = matrices.shape[-2:]
    group = group_size(inputs)
    known = hasattr(torch, "_weight_int4pack_mm_for_cpu")
    return known and matrices.device.type == "cpu" and outputs % 64 == 0 and group is not None and group >= 32


def _pack(matrix: Tensor, kind: str, for_cpu_kernel: bool) -> tuple[Tensor, Tensor]:
    """(data, scale) of one fp32 matrix [O, I]."""
    if kind == "int8":
        scale = _scale(matrix.abs().amax(-1), 127)
        return (matrix / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale
    if kind == "fp8":
        scale = _scale(matrix.abs().amax(-1), _FP8_MAX)
        values = (matrix / scale.float()[:, None]).clamp(-_FP8_MAX, _FP8_MAX)
        return values.to(torch.float8_e4m3fn).view(torch.uint8), scale
    group = group_size(matrix.shape[-1])
    assert group is not None
    groups = matrix.unflatten(-1, (-1, group))
    # the value of largest magnitude becomes -8, whatever its sign: all sixteen levels are used
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    scale = _scale(largest, -8)
    values = (groups / scale.float()[..., None]).round().clamp(-8, 7).flatten(-2).to(torch.int32) + 8  # 0 .. 15
    if for_cpu_kernel:
        data = torch._convert_weight_to_int4pack_for_cpu(values, 1)
        return data, torch.stack((scale.T, torch.zeros_like(scale.T)), dim=-1)
    low, high = values.to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4, scale


def _scale(largest: Tensor, level: float) -> Tensor:
    """The bf16 scale that maps `largest` onto `level`; one where all values are zero."""
    scale = (largest / level).to(torch.bfloat16)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _from_int4(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices [..., O, I] of nibbles [..., O, I / 2] and scales [..., O, I / G]."""
    values = torch.cat(((data & 15).to(torch.int8) - 8, (data >> 4).to(torch.int8) - 8), dim=-1)
    groups = values.unflatten(-1, (scale.shape[-1], -1)).to(dtype) * scale[..., None].to(dtype)
    return groups.flatten(-2)


def _from_fp8(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of e4m3 bits."""
    if bits.device.type != "cpu" or torch.compiler.is_compiling():
        return bits.view(torch.float8_e4m3fn).to(dtype)
    # torch converts fp8 one value at a time on a CPU. Sign, exponent and mantissa moved into bf16's places give the
    # value over 2^120, the difference of the two exponent biases; eight times faster.
    moved = bits.view(torch.int8).to(torch.int16)
    moved = moved.bitwise_left_shift_(4).bitwise_and_(-0x8000 + 0x7F0)
    return moved.view(torch.bfloat16).mul_(2.0**120).to(dtype)
