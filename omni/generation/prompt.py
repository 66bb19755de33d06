"""From `OmniInputs` to what the Thinker reads: media encoded and merged, positions laid out, rows left-aligned.

Shapes: B rows, T tokens of the longest row, D Thinker width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from omni.encoders.contract import chosen_cuts
from omni.parts import ModelParts
from omni.processing.inputs import OmniInputs
from omni.rope.positions import Segment, prompt_positions, reply_position
from omni.thinker.merge import lay_out_taps, merge_embeddings


@dataclass
class Prompt:
    """A batch of prompts, each row's tokens first and padding (zeros) after them.

    ids int64 [B, T]; lengths: tokens of each row; embeds [B, T, D]; positions fp32 [3, B, T]; next_position fp32 [B],
    where the reply begins; media bool [B, T], placeholder tokens; taps [n, B, T, D] for DeepStack or None; columns
    int64 [B, T], the place of each token in the inputs as they were given; reply_start: how many tokens of each row
    come before its reply, None where the inputs do not say.
    """

    ids: Tensor
    lengths: list[int]
    embeds: Tensor
    positions: Tensor
    next_position: Tensor
    media: Tensor
    taps: Tensor | None
    segments: list[list[Segment]]
    columns: Tensor
    reply_start: list[int] | None = None

    def row_ids(self, row: int) -> list[int]:
        """The prompt ids of one row without padding."""
        return self.ids[row, : self.lengths[row]].tolist()


def encode_prompt(
    model: ModelParts, inputs: OmniInputs, *, touch_absent: bool = False, allow_long: bool = False
) -> Prompt:
    """Encode media and lay out the batch for the Thinker.

    touch_absent: an encoder that the batch has nothing for is called too, with a gradient of zero (training).
    allow_long: warn of prompts that reach beyond the model's positions instead of refusing them. Raises ValueError for
    those, for media that the model has no encoder for, ids outside the vocabulary, or media that do not fit the
    placeholders.
    """
    thinker = model.require("thinker")
    config, device = model.config.thinker, model.device
    _check(model, inputs)
    cuts = [chosen_cuts(model.audio_encoder, *own) for own in inputs.audio_cuts()]
    segments = inputs.segments(config, None if model.audio_encoder is None else model.audio_encoder.num_tokens)
    laid_out = [prompt_positions(own, config.position_rule)[0] for own in segments]
    following = [reply_position(own) for own in laid_out]
    check_reach(model, int(inputs.attention_mask.sum(1).max()), math.ceil(max(following)), allow_long)
    inputs = inputs.to(device)
    ids, lengths, columns = _left_align(inputs)
    valid = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    embeds = thinker.embed_tokens(ids) * valid[..., None]
    embeds, taps, media = _merge_media(model, inputs, ids, embeds, valid, cuts, touch_absent)
    positions = torch.zeros(3, *ids.shape)
    for row, own in enumerate(laid_out):
        positions[:, row, : own.shape[1]] = own
    next_position = torch.tensor(following, dtype=torch.float32, device=device)
    starts = None
    if inputs.reply_start is not None:
        starts = ((columns < inputs.reply_start[:, None]) & valid).sum(1).tolist()
    return Prompt(
        ids, lengths.tolist(), embeds, positions.to(device), next_position, media, taps, segments, columns, starts
    )


def check_reach(model: ModelParts, tokens: int, position: int, allow_long: bool) -> None:
    """Refuse a prompt of so many tokens before `position` that is beyond the model's positions, or warn of it.

    Seconds take positions too, so a long film reaches far with few tokens.
    """
    limit = model.config.thinker.text_config.max_position_embeddings
    if max(tokens, position) <= limit:
        return
    what = f"has {tokens} tokens" if tokens > limit else f"reaches position {position}"
    if not allow_long:
        raise ValueError(
            f"the prompt {what}, the model has positions for {limit}; shorten it, lower fps, max_pixels or max_frames "
            "of its media, or pass allow_long=True"
        )
    warn_beyond(f"the prompt {what}", limit)


def warn_beyond(what: str, limit: int) -> None:
    """Warn of positions that the caller has allowed."""
    warnings.warn(f"{what}, beyond the {limit} positions that the model was made for; it may fail there", stacklevel=2)


def _check(model: ModelParts, inputs: OmniInputs) -> None:
    """Refuse what this model cannot read."""
    text = model.config.thinker.text_config
    if inputs.input_features is not None and model.audio_encoder is None:
        raise ValueError("the inputs hold audio, but this model has no audio encoder; remove the audio")
    if (inputs.pixel_values is not None or inputs.pixel_values_videos is not None) and model.vision_encoder is None:
        raise ValueError("the inputs hold pictures or video, but this model has no vision encoder; remove them")
    ids = inputs.input_ids
    if int(ids.min()) < 0 or int(ids.max()) >= text.vocab_size:
        bad = int(ids.max()) if int(ids.max()) >= text.vocab_size else int(ids.min())
        raise ValueError(
            f"token id {bad} lies outside the vocabulary of {text.vocab_size}; was another tokenizer used?"
        )


def _left_align(inputs: OmniInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [B, T], lengths [B], columns [B, T]) with every row's tokens at its beginning."""
    ids = inputs.input_ids
    mask = torch.ones_like(ids) if inputs.attention_mask is None else inputs.attention_mask
    lengths = mask.bool().sum(1)
    columns = mask.bool().int().argsort(dim=1, descending=True, stable=True)[:, : int(lengths.max())]
    valid = torch.arange(columns.shape[1], device=ids.device) < lengths[:, None]
    return ids.gather(1, columns) * valid, lengths, columns


def _no_audio(model: ModelParts) -> Tensor | float:
    """Zero, with a gradient of zero for the audio encoder."""
    config = model.config.thinker.audio_config
    if model.audio_encoder is None or config is None:
        return 0.0
    silence = torch.zeros(1, config.num_mel_bins, 1)
    return 0 * model.encode_audio(silence, torch.ones(1, dtype=torch.int64)).embeds.sum()


def _no_vision(model: ModelParts) -> Tensor | float:
    """Zero, with a gradient of zero for the vision encoder."""
    config = model.config.thinker.vision_config
    if model.vision_encoder is None or config is None:
        return 0.0
    side, values = config.spatial_merge_size, config.in_channels * config.temporal_patch_size * config.patch_size**2
    out = model.encode_vision(torch.zeros(side * side, values), torch.tensor([[1, side, side]]))
    return 0 * sum(x.sum() for x in (out.embeds, *out.taps))


def _merge_media(
    model: ModelParts,
    inputs: OmniInputs,
    ids: Tensor,
    embeds: Tensor,
    valid: Tensor,
    cuts: Sequence[Mapping[str, int]],
    touch_absent: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Encode all media of the batch, clips cut by `cuts`, and put them in place -> (embeds, taps, media mask).

    Audio comes before vision and each encoder is called once at most, with touch_absent exactly once: processes that
    share their weights then meet in the same calls, whatever they read.
    """
    config = model.config.thinker
    masks = {kind: (ids == getattr(config, f"{kind}_token_id")) & valid for kind in ("audio", "image", "video")}
    if inputs.input_features is not None:
        assert inputs.feature_attention_mask is not None
        out = model.encode_audio(inputs.input_features, inputs.feature_attention_mask.sum(1), cuts)
        embeds = merge_embeddings(embeds, masks["audio"], out.embeds)
    elif touch_absent:
        embeds = embeds + _no_audio(model)
    taps = None
    seen = {
        "image": (inputs.pixel_values, inputs.image_grid_thw),
        "video": (inputs.pixel_values_videos, inputs.video_grid_thw),
    }
    given = {kind: (pixels, grid) for kind, (pixels, grid) in seen.items() if pixels is not None and grid is not None}
    if given:
        pixels, grids = (torch.cat(both) for both in zip(*given.values()))
        out = model.encode_vision(pixels, grids)
        items = iter(out.lengths)
        counts = [sum(islice(items, len(grid))) for _, grid in given.values()]
        for kind, own, *own_taps in zip(given, *(x.split(counts) for x in (out.embeds, *out.taps))):
            embeds = merge_embeddings(embeds, masks[kind], own)
            if own_taps:
                laid_out = lay_out_taps(own_taps, masks[kind])
                taps = laid_out if taps is None else taps + laid_out
    elif touch_absent:
        embeds = embeds + _no_vision(model)
    return embeds, taps, masks["audio"] | masks["image"] | masks["video"]
