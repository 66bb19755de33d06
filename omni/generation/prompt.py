"""From `OmniInputs` to what the Thinker reads: media encoded and merged, positions laid out, rows left-aligned.

Shapes: B rows, T tokens of the longest row, D Thinker width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omni.processing.inputs import OmniInputs
from omni.rope.positions import Segment, prompt_positions, reply_position
from omni.thinker.merge import lay_out_taps, merge_embeddings

if TYPE_CHECKING:
    from omni.model import OmniModel


@dataclass
class Prompt:
    """A batch of prompts, each row's tokens first and padding (zeros) after them.

    ids int64 [B, T]; lengths: tokens of each row; embeds [B, T, D]; positions fp32 [3, B, T]; next_position fp32 [B],
    where the reply begins; media bool [B, T], placeholder tokens; taps [n, B, T, D] for DeepStack or None; columns
    int64 [B, T], the place of each token in the inputs as they were given.
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

    def row_ids(self, row: int) -> list[int]:
        """The prompt ids of one row without padding."""
        return self.ids[row, : self.lengths[row]].tolist()


def encode_prompt(model: OmniModel, inputs: OmniInputs) -> Prompt:
    """Encode media and lay out the batch for the Thinker.

    Raises ValueError for media that the model has no encoder for, ids outside the vocabulary, prompts longer than the
    model's positions, or media that do not fit the placeholders.
    """
    model.require("thinker")
    config, device = model.config.thinker_config, model.device
    _check(model, inputs)
    segments = inputs.segments(config, None if model.audio_encoder is None else model.audio_encoder.num_tokens)
    inputs = inputs.to(device)
    ids, lengths, columns = _left_align(inputs)
    valid = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    embeds = model.thinker.embed_tokens(ids) * valid[..., None]
    embeds, taps, media = _merge_media(model, inputs, ids, embeds, valid)
    positions = torch.zeros(3, *ids.shape)
    following = []
    for row, row_segments in enumerate(segments):
        row_positions, _ = prompt_positions(row_segments, config.position_id_per_seconds)
        positions[:, row, : row_positions.shape[1]] = row_positions
        following.append(reply_position(row_positions))
    next_position = torch.tensor(following, dtype=torch.float32, device=device)
    return Prompt(ids, lengths.tolist(), embeds, positions.to(device), next_position, media, taps, segments, columns)


def _check(model: OmniModel, inputs: OmniInputs) -> None:
    """Refuse what this model cannot read."""
    text = model.config.thinker_config.text_config
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
    longest = ids.shape[1] if inputs.attention_mask is None else int(inputs.attention_mask.sum(1).max())
    if longest > text.max_position_embeddings:
        raise ValueError(
            f"the prompt has {longest} tokens, the model has positions for {text.max_position_embeddings}; "
            "shorten it, or lower fps, max_pixels or max_frames of its media"
        )


def _left_align(inputs: OmniInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [B, T], lengths [B], columns [B, T]) with every row's tokens at its beginning."""
    ids = inputs.input_ids
    mask = torch.ones_like(ids) if inputs.attention_mask is None else inputs.attention_mask
    lengths = mask.bool().sum(1)
    columns = mask.bool().int().argsort(dim=1, descending=True, stable=True)[:, : int(lengths.max())]
    valid = torch.arange(columns.shape[1], device=ids.device) < lengths[:, None]
    return ids.gather(1, columns) * valid, lengths, columns


def _merge_media(
    model: OmniModel, inputs: OmniInputs, ids: Tensor, embeds: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Encode all media of the batch and put them in place -> (embeds, taps, media mask)."""
    config = model.config.thinker_config
    masks = {kind: (ids == getattr(config, f"{kind}_token_id")) & valid for kind in ("audio", "image", "video")}
    if inputs.input_features is not None:
        assert inputs.feature_attention_mask is not None
        features = inputs.input_features.to(model.dtype)
        out = model.audio_encoder(features, inputs.feature_attention_mask.sum(1))
        embeds = merge_embeddings(embeds, masks["audio"], out.embeds)
    taps = None
    for kind, pixels, grid in (
        ("image", inputs.pixel_values, inputs.image_grid_thw),
        ("video", inputs.pixel_values_videos, inputs.video_grid_thw),
    ):
        if pixels is None:
            continue
        out = model.vision_encoder(pixels.to(model.dtype), grid)
        embeds = merge_embeddings(embeds, masks[kind], out.embeds)
        if out.taps:
            laid_out = lay_out_taps(list(out.taps), masks[kind])
            taps = laid_out if taps is None else taps + laid_out
    return embeds, taps, masks["audio"] | masks["image"] | masks["video"]
