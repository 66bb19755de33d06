"""The vision encoder: patch order, positions, attention inside a grid step, taps, bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from build import draw, fixed
from torch import nn
from torch.nn import functional as F

from omni.config.qwen3_omni import VisionEncoderConfig
from omni.encoders.vision import VisionEncoder, patch_coordinates

RELEASED = Path(__file__).parents[2] / "configs" / "qwen3_omni_30b_a3b.json"
SIZES = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "out_hidden_size": 12,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 1],
}
PATCH = 3 * 2 * 4 * 4


def make_encoder(**changes: Any) -> VisionEncoder:
    with fixed():
        return draw(VisionEncoder(VisionEncoderConfig.from_dict({**SIZES, **changes})))


def patches(*grids: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(sum(t * h * w for t, h, w in grids), PATCH)


def test_patches_come_in_merge_blocks() -> None:
    assert patch_coordinates(2, 4, 2, torch.device("cpu")).tolist() == [
        [0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3],
    ]  # fmt: skip
    raster = patch_coordinates(2, 3, 1, torch.device("cpu"))
    assert raster.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


@pytest.mark.parametrize("merge", [1, 2])
def test_token_count(merge: int) -> None:
    encoder = make_encoder(spatial_merge_size=merge)
    grids = [(1, 4, 6), (3, 2, 2), (2, 8, 4)]
    out = encoder(patches(*grids), torch.tensor(grids))
    assert out.lengths == [t * h * w // merge**2 for t, h, w in grids]
    assert out.lengths == [encoder.num_tokens(*grid) for grid in grids]
    assert [x.shape for x in (out.embeds, *out.taps)] == [(sum(out.lengths), 12)] * 3


@torch.no_grad()
def test_an_item_does_not_feel_its_neighbours() -> None:
    encoder = make_encoder()
    grids = [(1, 4, 6), (3, 2, 4), (1, 2, 2), (1, 6, 4)]
    pixels = patches(*grids)
    out = encoder(pixels, torch.tensor(grids))
    rows = pixels.split([t * h * w for t, h, w in grids])
    alone = [encoder(x, torch.tensor([grid])) for x, grid in zip(rows, grids)]
    torch.testing.assert_close(out.embeds, torch.cat([a.embeds for a in alone]), atol=1e-5, rtol=0)
    for i, tap in enumerate(out.taps):
        torch.testing.assert_close(tap, torch.cat([a.taps[i] for a in alone]), atol=1e-5, rtol=0)


@torch.no_grad()
def test_attention_stays_within_a_grid_step() -> None:
    encoder = make_encoder()
    grid = torch.tensor([[3, 4, 4]])
    pixels = patches((3, 4, 4))
    before = encoder(pixels, grid).embeds.split(4)
    pixels[16:17] += 1  # one patch of the second step
    after = encoder(pixels, grid).embeds.split(4)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert (before[1] - after[1]).abs().amax(1).min() > 1e-4


def test_an_image_is_two_equal_frames() -> None:
    """So its patches can be embedded by the sum of the two temporal halves of the kernel."""
    encoder = make_encoder()
    frame = torch.randn(5, 3, 1, 4, 4)
    pixels = frame.expand(-1, -1, 2, -1, -1).flatten(1)
    weight = encoder.patch_embed.proj.weight.sum(2).flatten(1)
    expected = F.linear(frame.flatten(1), weight, encoder.patch_embed.proj.bias)
    torch.testing.assert_close(encoder.patch_embed(pixels), expected, atol=1e-5, rtol=1e-5)
    assert torch.allclose(
        encoder.patch_embed(pixels), encoder.patch_embed.proj(pixels.unflatten(1, (3, 2, 4, 4))).flatten(1), atol=1e-5
    )


@pytest.mark.parametrize("grid", [(1, 6, 6), (1, 4, 10), (2, 2, 14), (1, 2, 2)])
def test_learned_positions_are_resampled_corner_on_corner(grid: tuple[int, int, int]) -> None:
    encoder = make_encoder()
    _, height, width = grid
    coordinates = patch_coordinates(height, width, 2, torch.device("cpu"))
    ours = encoder._learned_positions(height, width)
    table = encoder.pos_embed.weight.T.reshape(1, 16, 6, 6)
    resampled = F.interpolate(table, size=(height, width), mode="bilinear", align_corners=True)[0]
    torch.testing.assert_close(ours, resampled[:, coordinates[:, 0], coordinates[:, 1]].T, atol=1e-5, rtol=0)


def test_one_row_of_patches() -> None:
    encoder = make_encoder(spatial_merge_size=1)
    out = encoder(patches((1, 1, 5), (1, 1, 1)), torch.tensor([[1, 1, 5], [1, 1, 1]]))
    assert out.lengths == [5, 1] and torch.isfinite(out.embeds).all()


@torch.no_grad()
def test_a_tap_is_taken_after_its_block() -> None:
    encoder = make_encoder(deepstack_visual_indexes=[0])
    grid = torch.tensor([[1, 4, 4]])
    pixels = patches((1, 4, 4))
    tap = encoder(pixels, grid).taps[0]
    for p in encoder.blocks[1].parameters():
        nn.init.zeros_(p)
    assert torch.equal(encoder(pixels, grid).taps[0], tap)
    for p in encoder.blocks[0].parameters():
        nn.init.zeros_(p)
    assert not torch.allclose(encoder(pixels, grid).taps[0], tap)


def test_no_taps_and_no_items() -> None:
    encoder = make_encoder(deepstack_visual_indexes=[])
    assert encoder(patches((1, 2, 2)), torch.tensor([[1, 2, 2]])).taps == []
    none = make_encoder()(torch.zeros(0, PATCH), torch.zeros(0, 3, dtype=torch.int64))
    assert none.embeds.shape == (0, 12) and [t.shape for t in none.taps] == [(0, 12)] * 2 and none.lengths == []


def test_gradient_reaches_every_parameter() -> None:
    encoder = make_encoder()
    out = encoder(patches((1, 4, 4), (2, 2, 6)), torch.tensor([[1, 4, 4], [2, 2, 6]]))
    sum(x.square().sum() for x in (out.embeds, *out.taps)).backward()
    assert [n for n, p in encoder.named_parameters() if not p.grad.abs().sum() > 0] == []


@torch.no_grad()
def test_bf16_stays_near_fp32() -> None:
    encoder = make_encoder()
    pixels, grid = patches((2, 4, 6)), torch.tensor([[2, 4, 6]])
    exact = encoder(pixels, grid)
    rough = encoder.to(torch.bfloat16)(pixels, grid)
    for a, b in zip((exact.embeds, *exact.taps), (rough.embeds, *rough.taps)):
        assert b.dtype == torch.bfloat16
        assert (b.float() - a).norm() < 0.03 * a.norm()  # measured 0.5 %


def test_released_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Embedding, "reset_parameters", lambda self: None)  # 5 s of imports on meta
    config = VisionEncoderConfig.from_dict(json.loads(RELEASED.read_text())["thinker_config"]["vision_config"])
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    assert sum(p.numel() for p in encoder.parameters()) == 538_631_408


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
def test_bad_input(pixels: torch.Tensor, grids: list[list[int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_encoder()(pixels, torch.tensor(grids))
