"""Every streaming layer: pieces equal the whole, the future is not heard, clones and rows go their own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from omni.code2wav.conv import (
    CausalConv1d,
    CausalConvTranspose1d,
    ConvNeXtBlock,
    DecoderBlock,
    ResidualUnit,
    StreamingChain,
    StreamingLayer,
    StreamingSnake,
)
from omni.code2wav.window_transformer import WindowState, WindowTransformer
from omni.config.qwen3_omni import Code2WavConfig
from omni.layers.state import State
from omni.training.codec.codec_encoders import CausalDownsample1d

STEPS = 30
WINDOW = Code2WavConfig().replace(
    hidden_size=4, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=6,
    sliding_window=5,
)  # fmt: skip


class ByFrame(StreamingLayer[WindowState]):
    """The transformer, which has frames before channels, among layers of [B, C, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = WindowTransformer(WINDOW)

    def init_state(self, batch_size: int) -> WindowState:
        return self.transformer.init_state(batch_size)

    def forward(self, x: Tensor, state: WindowState | None = None, active: Tensor | None = None) -> Tensor:
        return self.transformer(x.transpose(1, 2), state, active).transpose(1, 2)


MAKERS: dict[str, Callable[[], Any]] = {
    "conv": lambda: CausalConv1d(4, 6, kernel_size=7),
    "dilated": lambda: CausalConv1d(4, 6, kernel_size=3, dilation=4),
    "pointwise": lambda: CausalConv1d(4, 4, kernel_size=1),
    "depthwise": lambda: CausalConv1d(4, 4, kernel_size=7, groups=4),
    "upsample": lambda: CausalConvTranspose1d(4, 6, kernel_size=2, stride=2),
    "overlapping": lambda: CausalConvTranspose1d(4, 6, kernel_size=6, stride=3),
    "causal_overlapping": lambda: CausalConvTranspose1d(4, 6, kernel_size=6, stride=3, trim_start=False),
    "odd_overlap": lambda: CausalConvTranspose1d(4, 6, kernel_size=7, stride=2),
    "snake": lambda: StreamingSnake(4),
    "convnext": lambda: ConvNeXtBlock(4),
    "residual": lambda: ResidualUnit(4, dilation=9),
    "block": lambda: DecoderBlock(4, 2, rate=3, trim_start=True),
    "chain": lambda: StreamingChain([CausalConv1d(4, 4, 3), DecoderBlock(4, 2, 2, trim_start=True)]),
    "downsample": lambda: CausalDownsample1d(4, 6, kernel_size=4, stride=2),
    "transformer": ByFrame,
}
EACH = pytest.mark.parametrize("name", MAKERS)


@torch.no_grad()
def make(name: str) -> nn.Module:
    """Weights that hide nothing."""
    torch.manual_seed(0)
    layer: nn.Module = MAKERS[name]()
    for key, p in layer.named_parameters():
        if p.dim() > 1:
            p.normal_(std=0.6 / p[0].numel() ** 0.5)
        elif key.endswith(("alpha", "beta", "bias")):
            p.normal_(std=0.1)
        else:
            p.normal_(1, 0.1)
    return layer


def signal(seed: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, 4, STEPS, generator=torch.Generator().manual_seed(seed))


def stream(layer: Any, x: Tensor, sizes: list[int], state: State | None = None, active: Tensor | None = None) -> Tensor:
    state = layer.init_state(len(x)) if state is None else state
    return torch.cat([layer(piece, state, active) for piece in x.split(sizes, dim=2)], dim=2)


@EACH
@settings(max_examples=15, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, STEPS // 2), max_size=12).map(sorted))
@torch.no_grad()
def test_pieces_of_any_length_equal_the_whole(name: str, cuts: list[int]) -> None:
    """Empty pieces too, but for the transformer and strided layers, which take at least one; cuts at even steps."""
    layer, x = make(name), signal(1)
    ends = [2 * c for c in (cuts if name not in ("transformer", "downsample") else sorted({*cuts} - {0, STEPS // 2}))]
    sizes = [b - a for a, b in zip([0, *ends], [*ends, STEPS])]
    torch.testing.assert_close(stream(layer, x, sizes), layer(x), atol=1e-6, rtol=0)
    if name != "downsample":  # single steps
        torch.testing.assert_close(stream(layer, x, [1] * STEPS), layer(x), atol=1e-6, rtol=0)


@EACH
@torch.no_grad()
def test_the_future_is_not_heard(name: str) -> None:
    """What 20 of 30 steps give is what the whole begins with: each output was certain when it was given."""
    layer, x = make(name), signal(2)
    whole, prefix = layer(x), layer(x[..., :20])
    rate = whole.shape[2] / STEPS
    assert abs(prefix.shape[2] - 20 * rate) <= 5  # what the start is trimmed by
    torch.testing.assert_close(prefix, whole[..., : prefix.shape[2]], atol=1e-6, rtol=0)
    changed = x.clone()
    changed[..., 20:] += 1
    torch.testing.assert_close(layer(changed)[..., : prefix.shape[2]], prefix, atol=1e-6, rtol=0)
    assert (layer(changed) - whole).abs().max() > 1e-3


@EACH
@torch.no_grad()
def test_a_clone_goes_its_own_way(name: str) -> None:
    layer, x, other = make(name), signal(3), signal(4)
    state: Any = layer.init_state(2)  # type: ignore[operator]
    begun = stream(layer, x[..., :10], [4, 6], state)
    copy = state.clone()
    rest, branch = stream(layer, x[..., 10:], [20], state), stream(layer, other[..., 10:], [2, 18], copy)
    torch.testing.assert_close(torch.cat((begun, rest), 2), layer(x), atol=1e-6, rtol=0)
    joined = torch.cat((x[..., :10], other[..., 10:]), 2)
    torch.testing.assert_close(torch.cat((begun, branch), 2), layer(joined), atol=1e-6, rtol=0)


@EACH
@pytest.mark.parametrize("size", [1, 2, 8])
@torch.no_grad()
def test_a_row_that_stands_still_goes_on_where_it_was(name: str, size: int) -> None:
    if name == "downsample":
        size = 2 * size
    layer, x = make(name), signal(5)
    state: Any = layer.init_state(2)  # type: ignore[operator]
    begun = stream(layer, x[..., :10], [10], state)
    active = torch.tensor([True, False])[:, None, None]
    noise = signal(6)[..., :size]
    moved = layer(torch.cat((x[:1, :, 10 : 10 + size], noise[1:])), state, active)
    last = x[:1, :, 10 + size :]
    ended = layer(torch.cat((last, x[1:, :, 10 : 10 + last.shape[2]])), state)
    whole = layer(x)
    torch.testing.assert_close(torch.cat((begun, moved, ended), 2)[:1], whole[:1], atol=1e-6, rtol=0)
    second = torch.cat((begun, ended), 2)[1:]
    torch.testing.assert_close(second, whole[1:, :, : second.shape[2]], atol=1e-6, rtol=0)


PRODUCTS = [name for name in MAKERS if name not in ("downsample", "transformer", "chain")]


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("few_columns", [0, 10**9])
def test_matrix_products_equal_convolutions(name: str, few_columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients, in both orientations of the product."""
    layer = make(name)
    results = []
    for small, few in ((0, 0), (10**9, few_columns)):
        monkeypatch.setattr("omni.code2wav.conv._SMALL_SIGNAL", small)
        monkeypatch.setattr("omni.code2wav.conv._FEW_COLUMNS", few)
        x = signal(0).requires_grad_()
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)
