"""The vision encoder of Qwen2.5-Omni: patches of images and video frame pairs to Thinker embeddings.

A patch is 2 frames x 14 x 14 pixels, in the processor's order (see `omni/encoders/vision.py`). Most layers attend
inside windows of 112 x 112 pixels, 4 x 4 tokens (released config); windows at the right and lower edges may be smaller.
A few layers attend to the whole grid step. Patches are brought into window order once, before the layers, and their
tokens back into the processor's order after the merger. There are no learned positions and no DeepStack taps.
Source: Qwen2.5-VL (Bai et al., 2025).

Shapes: N patches of all items (packed), C width, H heads, hd head width, m merge size; a grid is (t, h, w) in patches.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn

from omni.config.qwen2_5_omni import WindowVisionEncoderConfig
from omni.encoders.checks import Grid, check_patches
from omni.encoders.contract import EncoderOutput, VisionEncoderContract
from omni.encoders.vision import (
    PatchEmbed,
    PatchMerger,
    Tables,
    VisionBlock,
    for_each_size,
    patch_coordinates,
    rotate_and_attend,
)
from omni.layers.norm import RMSNorm
from omni.layers.packing import BlockPasses, PackedBlocks
from omni.layers.swiglu import SwiGLU
from omni.rope.rotary import AxialRotary

_PATCHES_AT_ONCE = 8192  # bounds the memory of the blocks (6.4 megapixels of pictures, 12.8 of video)


def window_order(rows: int, columns: int, side: int) -> tuple[Tensor, list[int]]:
    """(the tokens of a grid step window by window, int64 [rows * columns] on the CPU; the tokens of each window).

    Tokens are numbered row by row. Larger windows come first: windows of equal size are then neighbours and share a
    call of attention.
    """
    raster = torch.arange(rows * columns, device="cpu").unflatten(0, (rows, columns))
    windows = [window.flatten() for band in raster.split(side) for window in band.split(side, dim=1)]
    windows.sort(key=len, reverse=True)
    return torch.cat(windows), [len(window) for window in windows]


class WindowVisionAttention(nn.Module):
    """Multi-head self-attention with axial rotary positions, inside each block of a packed row."""

    def __init__(self, config: WindowVisionEncoderConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q = nn.Linear(config.hidden_size, config.hidden_size)
        self.k = nn.Linear(config.hidden_size, config.hidden_size)
        self.v = nn.Linear(config.hidden_size, config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, tables: Tables, blocks: PackedBlocks) -> Tensor:
        """x [N, C] -> [N, C]; tables fp32 [N, hd]."""
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q, self.k, self.v))  # each [N, H, hd]
        return self.proj(rotate_and_attend(q, k, v, tables, blocks))


class WindowVisionEncoder(VisionEncoderContract):
    """Pixel patches of images and videos -> packed Thinker embeddings."""

    def __init__(self, config: WindowVisionEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config, bias=False)
        self.rotary = AxialRotary(config.hidden_size // config.num_heads, config.theta)
        self.blocks = nn.ModuleList([self._block(config) for _ in range(config.depth)])
        self.merger = PatchMerger(config, config.out_hidden_size, norm_joined=False, norm=RMSNorm)

    @staticmethod
    def _block(config: WindowVisionEncoderConfig) -> VisionBlock:
        mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True)
        return VisionBlock(config.hidden_size, WindowVisionAttention(config), mlp, norm=RMSNorm)

    def num_tokens(self, t: int, h: int, w: int) -> int:
        """Tokens of an image (t = 1) or video of t x h x w patches."""
        return t * h * w // self.config.spatial_merge_size**2

    def forward(self, pixels: Tensor, grid_thw: Tensor) -> EncoderOutput:
        """pixels [N, channels * 2 * 14 * 14], grid_thw int64 [items, 3] -> embeds [N / m^2, D_out], no taps.

        A patch attends to the patches of its own grid step only, in most layers to those of its window.
        Raises ValueError where pixel rows and grids do not fit.
        """
        grids = self._check(pixels, grid_thw)
        lengths = [self.num_tokens(*grid) for grid in grids]
        if not grids:
            none = self.patch_embed.proj.weight.new_zeros(0, self.config.out_hidden_size)
            return EncoderOutput(none, [], [])
        steps = [(h, w) for t, h, w in grids for _ in range(t)]
        sizes = [h * w for h, w in steps]
        passes = BlockPasses(sizes, None if torch.is_grad_enabled() else _PATCHES_AT_ONCE)
        parts = []
        for numbers in passes:
            x = torch.cat([self.patch_embed(run) for run in passes.runs(pixels, numbers)])
            tables = for_each_size(steps, numbers, self._rotary_tables)  # fp32 [N, 2, hd]
            parts.append(self._transform(x, tables, [steps[i] for i in numbers]))
        return EncoderOutput(passes.join(parts, self.config.spatial_merge_size**2), lengths, [])

    def _transform(self, x: Tensor, tables: Tensor, steps: list[tuple[int, int]]) -> Tensor:
        """Embedded patches x [N, C] and rotary tables [N, 2, hd] of some grid steps -> embeds [N / m^2, D_out]."""
        merged = self.config.spatial_merge_size**2
        order, windows = self._windows(steps)
        order = order.to(x.device)
        x, tables = (y.unflatten(0, (-1, merged))[order].flatten(0, 1) for y in (x, tables))
        cos, sin = tables.unbind(1)
        within_steps = PackedBlocks([h * w for h, w in steps], x.device)
        within_windows = PackedBlocks([tokens * merged for tokens in windows], x.device)
        for i, block in enumerate(self.blocks):
            full = i in self.config.fullatt_block_indexes
            x = block(x, (cos, sin), within_steps if full else within_windows)
        return self.merger(x)[order.argsort()]

    def _windows(self, steps: list[tuple[int, int]]) -> tuple[Tensor, list[int]]:
        """(the tokens of all the grid steps, window by window within a step; the tokens of each window)."""
        merge = self.config.spatial_merge_size
        made = {(h, w): window_order(h // merge, w // merge, self.config.window_tokens) for h, w in set(steps)}
        starts = accumulate((len(made[step][0]) for step in steps), initial=0)
        order = torch.cat([made[step][0] + start for step, start in zip(steps, starts)])
        return order, [tokens for step in steps for tokens in made[step][1]]

    def _rotary_tables(self, height: int, width: int) -> Tensor:
        """(cos, sin) of a grid step: fp32 [h * w, 2, hd]."""
        device = self.patch_embed.proj.weight.device
        return torch.stack(self.rotary(patch_coordinates(height, width, self.config.spatial_merge_size, device)), dim=1)

    def _check(self, pixels: Tensor, grid_thw: Tensor) -> list[Grid]:
        """The grids as numbers, after checking them against the pixel rows."""
        return check_patches(pixels, grid_thw, self.config)
