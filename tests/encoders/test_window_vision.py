"""The vision encoder with window attention: windows, independent steps and items, bad input, its config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from build import draw, fixed, seeded
from torch import Tensor

from omni.config.qwen2_5_omni import WindowVisionEncoderConfig
from omni.encoders import vision, window_vision
from omni.encoders.vision import patch_coordinates
from omni.encoders.window_vision import WindowVisionEncoder, window_order
from omni.layers.init import initialise
from omni.layers.packing import PackedBlocks

SIZES = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "window_size": 16,  # 2 x 2 tokens, 4 x 4 patches
    "out_hidden_size": 12,
    "fullatt_block_indexes": [1],
}
PATCH = 3 * 2 * 4 * 4
GRIDS = [(1, 4, 6), (3, 2, 2), (1, 10, 14), (2, 4, 6), (1, 6, 4)]
# 7B; 3B differs in out_hidden_size
RELEASED = {
    "depth": 32,
    "embed_dim": 1280,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_act": "silu",
    "hidden_size": 1280,
    "in_channels": 3,
    "in_chans": 3,
    "init_std": 0.02,
    "initializer_range": 0.02,
    "intermediate_size": 3420,
    "model_type": "qwen2_5_omni_vision_encoder",
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "tokens_per_second": 25,
    "window_size": 112,
}


def make_encoder(**changes: Any) -> WindowVisionEncoder:
    with fixed():
        return draw(WindowVisionEncoder(WindowVisionEncoderConfig.from_dict({**SIZES, **changes})))


def patches(*grids: tuple[int, int, int], seed: int = 0) -> Tensor:
    rows = sum(t * h * w for t, h, w in grids)
    return torch.randn(rows, PATCH, generator=seeded(seed))


def assert_near(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# ---- windows ----


def test_window_order() -> None:
    order, windows = window_order(3, 5, 2)
    assert windows == [4, 4, 2, 2, 2, 1]  # larger ones first
    assert order.tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    assert window_order(2, 2, 4)[1] == [4] and window_order(4, 8, 4)[1] == [16, 16]
    for rows, columns, side in ((1, 1, 4), (7, 9, 4), (9, 3, 1)):
        order, windows = window_order(rows, columns, side)
        assert order.sort().values.tolist() == list(range(rows * columns)) and sum(windows) == rows * columns


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 10), (2, 14)])
def test_a_window_layer_sees_its_window_only(height: int, width: int) -> None:
    encoder = make_encoder(fullatt_block_indexes=[])
    grid = torch.tensor([[1, height, width]])
    pixels = patches((1, height, width))
    before = encoder(pixels, grid).embeds
    window = patch_coordinates(height, width, 2, torch.device("cpu"))[::4] // 4  # of each token
    changed = pixels.clone()
    changed[0] += 1  # in the first window
    moved = (encoder(changed, grid).embeds - before).abs().amax(1)
    inside = (window == 0).all(1)
    assert moved[inside].min() > 1e-4 and moved[~inside].max() < 1e-5


@torch.no_grad()
def test_a_full_layer_sees_the_whole_step() -> None:
    encoder = make_encoder()
    grid, pixels = torch.tensor([[1, 8, 12]]), patches((1, 8, 12))
    before = encoder(pixels, grid).embeds
    pixels[0] += 1
    assert (encoder(pixels, grid).embeds - before).abs().amax(1).min() > 1e-4


@torch.no_grad()
def test_one_window_equals_full_attention() -> None:
    windows, full = make_encoder(fullatt_block_indexes=[]), make_encoder(fullatt_block_indexes=[0, 1])
    grid, pixels = torch.tensor([[2, 4, 4]]), patches((2, 4, 4))
    assert_near(windows(pixels, grid).embeds, full(pixels, grid).embeds)


@torch.no_grad()
def test_equal_windows_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    attend = vision.packed_attention

    def count(q: Tensor, k: Tensor, v: Tensor, blocks: PackedBlocks) -> Any:
        runs.append(len(blocks.runs))
        return attend(q, k, v, blocks)

    monkeypatch.setattr(vision, "packed_attention", count)
    make_encoder()(patches((1, 10, 14)), torch.tensor([[1, 10, 14]]))
    assert runs == [3, 1]  # 6 whole windows, 5 of two tokens at the edges, one corner; the whole step


# ---- steps and items are independent ----


@pytest.mark.parametrize("merge", [1, 2])
def test_token_count(merge: int) -> None:
    encoder = make_encoder(spatial_merge_size=merge)
    out = encoder(patches(*GRIDS), torch.tensor(GRIDS))
    assert out.lengths == [t * h * w // merge**2 for t, h, w in GRIDS]
    assert out.lengths == [encoder.num_tokens(*grid) for grid in GRIDS]
    assert out.embeds.shape == (sum(out.lengths), 12) and out.taps == []


@torch.no_grad()
def test_an_item_does_not_feel_its_neighbours() -> None:
    encoder, pixels = make_encoder(), patches(*GRIDS)
    rows = pixels.split([t * h * w for t, h, w in GRIDS])
    alone = [encoder(x, torch.tensor([grid])).embeds for x, grid in zip(rows, GRIDS)]
    assert_near(encoder(pixels, torch.tensor(GRIDS)).embeds, torch.cat(alone))


@torch.no_grad()
@pytest.mark.parametrize("grid", [(5, 6, 10), (3, 2, 2)])
def test_a_video_grid_step_by_grid_step(grid: tuple[int, int, int]) -> None:
    """Frames attend to their own grid step only, so that a step can be encoded as soon as its frames are there."""
    encoder, pixels = make_encoder(), patches(grid)
    _, height, width = grid
    whole = encoder(pixels, torch.tensor([grid])).embeds
    for count in (1, 2):
        groups = pixels.split(count * height * width)
        parts = [encoder(x, torch.tensor([[len(x) // (height * width), height, width]])).embeds for x in groups]
        assert_near(torch.cat(parts), whole)


def test_one_row_of_patches_and_no_items() -> None:
    encoder = make_encoder(spatial_merge_size=1)
    out = encoder(patches((1, 1, 5), (1, 1, 1)), torch.tensor([[1, 1, 5], [1, 1, 1]]))
    assert out.lengths == [5, 1] and torch.isfinite(out.embeds).all()
    none = encoder(torch.zeros(0, PATCH), torch.zeros(0, 3, dtype=torch.int64))
    assert none.embeds.shape == (0, 12) and none.lengths == [] and none.taps == []


# ---- cost ----


@torch.no_grad()
def test_blocks_run_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, pixels, grids = make_encoder(), patches(*GRIDS), torch.tensor(GRIDS)
    whole, rows = encoder(pixels, grids).embeds, []
    encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for limit, most in ((160, 160), (1, 140)):  # never less than one grid step
        rows.clear()
        monkeypatch.setattr(window_vision, "_PATCHES_AT_ONCE", limit)
        assert_near(encoder(pixels, grids).embeds, whole)
        assert max(rows) <= most and sum(rows) == len(pixels) and len(rows) > 1
    rows.clear()
    with torch.enable_grad():
        encoder(pixels, grids)
    assert rows == [len(pixels)]  # one pass: every rank of a sharded model calls every layer equally often


# ---- parameters and dtypes ----


def test_gradient_reaches_every_parameter() -> None:
    encoder = make_encoder()
    encoder(patches(*GRIDS), torch.tensor(GRIDS)).embeds.square().sum().backward()
    # A key bias shifts the scores of a query by what rotary positions make of it, so that it does have a gradient.
    assert [n for n, p in encoder.named_parameters() if not p.grad.abs().sum() > 0] == []


def test_every_parameter_is_initialised() -> None:
    encoder = WindowVisionEncoder(WindowVisionEncoderConfig.from_dict(SIZES))
    with torch.no_grad():
        for p in encoder.parameters():
            p.fill_(float("nan"))
    initialise(encoder, lambda name: 0.02)
    assert all(torch.isfinite(p).all() for p in encoder.parameters())
    assert encoder.blocks[0].norm1.weight.eq(1).all() and encoder.blocks[0].mlp.up_proj.bias.eq(0).all()


@torch.no_grad()
def test_bf16_stays_near_fp32() -> None:
    encoder, pixels, grid = make_encoder(), patches((2, 6, 10)), torch.tensor([[2, 6, 10]])
    exact = encoder(pixels, grid).embeds
    rough = encoder.to(torch.bfloat16)(pixels, grid).embeds
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(("width", "parameters"), [(3584, 676_550_144), (2048, 668_684_288)])
def test_released_size(width: int, parameters: int) -> None:
    with torch.device("meta"):
        encoder = WindowVisionEncoder(WindowVisionEncoderConfig.from_dict({**RELEASED, "out_hidden_size": width}))
    assert sum(p.numel() for p in encoder.parameters()) == parameters


# ---- what is refused ----


@pytest.mark.parametrize(
    ("pixels", "grids", "words"),
    [
        (torch.zeros(4, 95), [[1, 2, 2]], "patches \\[N, 96\\], got shape \\[4, 95\\]"),
        (torch.zeros(4, PATCH), [[2, 2]], "grid_thw must be \\[items, 3\\]"),
        (torch.zeros(5, PATCH), [[1, 2, 2]], "describe 4 patches, but there are 5 pixel rows"),
        (torch.zeros(6, PATCH), [[1, 2, 3]], "\\(1, 2, 3\\); .* multiples of 2"),
        (torch.zeros(0, PATCH), [[0, 2, 2]], "must be positive"),
    ],
)
def test_bad_input(pixels: Tensor, grids: list[list[int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_encoder()(pixels, torch.tensor(grids))


def test_released_config_is_written_back_as_it_was_read(recwarn: pytest.WarningsRecorder) -> None:
    config = WindowVisionEncoderConfig.from_dict(RELEASED)
    assert config.to_dict() == RELEASED and config.window_tokens == 4 and config.theta == 10000
    assert WindowVisionEncoderConfig.from_dict(config.to_dict()) == config
    assert not recwarn.list


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window_sizes": 112}, "did you mean 'window_size'"),
        ({"window_size": 27}, "window_size 27 is smaller than one token .* = 28 pixels"),
        ({"fullatt_block_indexes": [7, -1]}, "must not be negative"),
        ({"fullatt_block_indexes": 7}, "must be a list of integers"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"num_heads": 3}, "must be a multiple of 4"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta must be a positive number"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
    ],
)
def test_bad_config(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WindowVisionEncoderConfig.from_dict({**RELEASED, **changes}, "thinker_config.vision_config")
