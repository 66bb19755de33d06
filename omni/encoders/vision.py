"""The vision encoder: patches of images and video frame pairs to Thinker embeddings and DeepStack taps.

A patch is 2 frames x 16 x 16 pixels (an image counts as two equal frames). Patches come in the order of the processor:
item by item, grid step by grid step, and within a step in blocks of merge x merge patches, so that the patches which
become one token are neighbours.
Sources: SigLIP 2 (Tschannen et al., 2025), Qwen3-VL (2025; DeepStack, Meng et al., 2024).

Shapes: N patches of all items (packed), C width, H heads, hd head width, m merge size; a grid is (t, h, w) in patches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from omni.config.encoders import VisionTransformerConfig
from omni.config.qwen3_omni import VisionEncoderConfig
from omni.encoders.checks import Grid, check_patches
from omni.encoders.contract import EncoderOutput, VisionEncoderContract
from omni.layers.attention_backends import packed_attention
from omni.layers.packing import BlockPasses, PackedBlocks
from omni.rope.rotary import AxialRotary, apply_rotary

Tables = tuple[Tensor, Tensor]
_PATCHES_AT_ONCE = 8192  # bounds the memory of the blocks (8 megapixels of pictures, 16 of video)


def merge_order(raster: Tensor, merge: int) -> Tensor:
    """[h, w, …] in rows and columns -> [h * w, …] in the processor's order."""
    return rearrange(raster, "(h mh) (w mw) ... -> (h w mh mw) ...", mh=merge, mw=merge)


def patch_coordinates(height: int, width: int, merge: int, device: torch.device) -> Tensor:
    """(row, column) of each patch of a grid step, int64 [h * w, 2], in the processor's order."""
    rows = torch.arange(height, device=device)[:, None].expand(height, width)
    columns = torch.arange(width, device=device).expand(height, width)
    return merge_order(torch.stack((rows, columns), dim=-1), merge)


class PatchEmbed(nn.Module):
    """Linear embedding of a patch. The checkpoint holds a Conv3d; its kernel spans the patch, so it is one product."""

    def __init__(self, config: VisionTransformerConfig, *, bias: bool = True) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel_size=kernel, stride=kernel, bias=bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [N, channels * frames * side * side] -> [N, C], in the dtype and on the device of the weights."""
        return F.linear(pixels.to(self.proj.weight), self.proj.weight.flatten(1), self.proj.bias)


def rotate_and_attend(q: Tensor, k: Tensor, v: Tensor, tables: Tables, blocks: PackedBlocks) -> Tensor:
    """Attention with rotary positions inside each block: q, k, v [N, H, hd], tables fp32 [N, hd] -> [N, C]."""
    cos, sin = (table[:, None] for table in tables)
    q, k = (apply_rotary(y[:, :, None], cos, sin)[:, :, 0] for y in (q, k))  # as N rows of one token: no transposes
    return packed_attention(q, k, v, blocks).flatten(1)


class VisionAttention(nn.Module):
    """Multi-head self-attention with axial rotary positions, inside each block of a packed row."""

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, tables: Tables, blocks: PackedBlocks) -> Tensor:
        """x [N, C] -> [N, C]; tables fp32 [N, hd]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # each [N, H, hd]
        return self.proj(rotate_and_attend(q, k, v, tables, blocks))


class VisionMLP(nn.Module):
    """Two linear layers around the GELU that the config names."""

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.approximate = "tanh" if config.hidden_act == "gelu_pytorch_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate=self.approximate))


class VisionBlock(nn.Module):
    """Pre-norm transformer layer of width C around the attention and the MLP of a family."""

    def __init__(
        self, width: int, attn: nn.Module, mlp: nn.Module, *, norm: Callable[..., nn.Module] = nn.LayerNorm
    ) -> None:
        super().__init__()
        self.norm1 = norm(width, eps=1e-6)
        self.norm2 = norm(width, eps=1e-6)
        self.attn = attn
        self.mlp = mlp

    def forward(self, x: Tensor, tables: Tables, blocks: PackedBlocks) -> Tensor:
        """x [N, C] -> [N, C]."""
        x = x + self.attn(self.norm1(x), tables, blocks)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """m * m neighbouring patches [N, C] -> one token [N / m^2, D_out]; normalised before or after they are joined."""

    def __init__(
        self,
        config: VisionTransformerConfig,
        width: int,
        *,
        norm_joined: bool,
        norm: Callable[..., nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.norm_joined = norm_joined
        self.joined = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = norm(self.joined if norm_joined else config.hidden_size, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(self.joined, self.joined), nn.GELU(), nn.Linear(self.joined, width))

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_joined:
            return self.mlp(self.ln_q(x.reshape(-1, self.joined)))
        return self.mlp(self.ln_q(x).reshape(-1, self.joined))


def for_each_size(steps: list[tuple[int, int]], numbers: list[int], make: Callable[[int, int], Tensor]) -> Tensor:
    """What `make` gives for the size of each of some grid steps [rows, …], made once a size."""
    made = {size: make(*size) for size in {steps[i] for i in numbers}}
    return torch.cat([made[steps[i]] for i in numbers])


class VisionEncoder(VisionEncoderContract):
    """Pixel patches of images and videos -> packed Thinker embeddings and one tap per DeepStack index."""

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.rotary = AxialRotary(config.hidden_size // config.num_heads, config.theta)
        self.blocks = nn.ModuleList(
            [VisionBlock(config.hidden_size, VisionAttention(config), VisionMLP(config)) for _ in range(config.depth)]
        )
        self.merger = PatchMerger(config, config.out_hidden_size, norm_joined=False)
        taps = config.deepstack_visual_indexes
        self.merger_list = nn.ModuleList([PatchMerger(config, config.out_hidden_size, norm_joined=True) for _ in taps])

    def num_tokens(self, t: int, h: int, w: int) -> int:
        """Tokens of an image (t = 1) or video of t x h x w patches."""
        return t * h * w // self.config.spatial_merge_size**2

    def forward(self, pixels: Tensor, grid_thw: Tensor) -> EncoderOutput:
        """pixels [N, channels * 2 * 16 * 16], grid_thw int64 [items, 3] -> embeds and taps [N / m^2, D_out].

        A tap is taken after its block (0-based). A patch attends to the patches of its own grid step only.
        Raises ValueError where pixel rows and grids do not fit.
        """
        grids = self._check(pixels, grid_thw)
        lengths = [self.num_tokens(*grid) for grid in grids]
        if not grids:
            none = self.pos_embed.weight.new_zeros(0, self.config.out_hidden_size)
            return EncoderOutput(none, [], [none for _ in self.merger_list])
        steps = [(h, w) for t, h, w in grids for _ in range(t)]
        sizes = [h * w for h, w in steps]
        passes = BlockPasses(sizes, None if torch.is_grad_enabled() else _PATCHES_AT_ONCE)
        outs = []
        for numbers in passes:
            x = torch.cat([self.patch_embed(run) for run in passes.runs(pixels, numbers)])
            x = x + for_each_size(steps, numbers, self._learned_positions)
            cos, sin = for_each_size(steps, numbers, self._rotary_tables).unbind(1)  # each fp32 [N, hd]
            outs.append(self._transform(x, (cos, sin), PackedBlocks([sizes[i] for i in numbers], x.device)))
        merged = self.config.spatial_merge_size**2
        embeds, *taps = (passes.join(parts, merged) for parts in zip(*outs))
        return EncoderOutput(embeds, lengths, taps)

    def _transform(self, x: Tensor, tables: Tables, blocks: PackedBlocks) -> list[Tensor]:
        """Embedded patches x [N, C] -> embeds and taps [N / m^2, D_out]."""
        tap_of = {block: i for i, block in enumerate(self.config.deepstack_visual_indexes)}
        taps = []
        for i, block in enumerate(self.blocks):
            x = block(x, tables, blocks)
            if i in tap_of:
                taps.append(self.merger_list[tap_of[i]](x))
        return [self.merger(x), *taps]

    def _rotary_tables(self, height: int, width: int) -> Tensor:
        """(cos, sin) of a grid step: fp32 [h * w, 2, hd]."""
        coordinates = patch_coordinates(height, width, self.config.spatial_merge_size, self.pos_embed.weight.device)
        return torch.stack(self.rotary(coordinates), dim=1)

    def _learned_positions(self, height: int, width: int) -> Tensor:
        """The learned square of positions, resampled bilinearly (corner on corner) to a grid step: [h * w, C]."""
        weight = self.pos_embed.weight
        side = int(self.config.num_position_embeddings**0.5)
        square = rearrange(weight.float(), "(h w) c -> 1 c h w", h=side)  # channels last in memory
        resampled = F.interpolate(square, size=(height, width), mode="bilinear", align_corners=True)
        return merge_order(rearrange(resampled, "1 c h w -> h w c"), self.config.spatial_merge_size).to(weight.dtype)

    def _check(self, pixels: Tensor, grid_thw: Tensor) -> list[Grid]:
        """The grids as numbers, after checking them against the pixel rows."""
        return check_patches(pixels, grid_thw, self.config)
