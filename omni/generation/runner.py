"""The states of B rows on the device and the steps that move them. What a step is for is decided by the host (`Rows`).

Shapes: B rows, b of them in a step, V text vocabulary, K codebooks, Di width of the Talker's inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni.code2wav.contract import CodecState
from omni.generation.decode import SpeechState, TextState, draw_frame, draw_token, read_frame, read_token
from omni.generation.sampling import RowSampling
from omni.generation.stage_times import StageTimes
from omni.generation.steps import codec_step
from omni.layers.cache import KVCache
from omni.parts import ModelParts
from omni.talker.layout import turn_layout


class Frame(NamedTuple):
    """One speech frame of b rows: codes int64 [b, K]; code 0 on the host; samples [b, n] where the runner decodes."""

    codes: Tensor
    first: list[int]
    wave: Tensor | None = None


class Runner:
    """Runs the model's steps as `model.steps` says, on states that it keeps."""

    decodes_sound = False  # whether `frame` decodes what it draws, for rows that have called `adopt_sound`

    def __init__(self, model: ModelParts, rows: int, capacity: int) -> None:
        self.model = model
        self.steps = model.steps
        self.times = StageTimes(model.device)
        talker = model.talker
        self.layout = None if talker is None else turn_layout(model.config)
        keep_hidden = self.layout is not None and self.layout.text_by_hidden
        thinker, device = model.require("thinker"), model.device
        self.text = TextState.create(thinker, rows, capacity, keep_hidden=keep_hidden, device=device)
        self.speech = None if talker is None else SpeechState.create(talker, rows, capacity, device)
        self.banned = None if talker is None else _banned(model)
        self.seen_at_first = None if talker is None else talker.seen_at_first()
        self._ids = torch.zeros(rows, dtype=torch.int64, device=model.device)  # drawn last

    def draw_token(self, sampling: RowSampling, active: Sequence[bool]) -> list[int]:
        """The next token of the active rows, one number for each of the first b rows."""
        width = self.width(active)
        drawn: list[int] = self._draw_token(sampling, self._mask(active, width)).tolist()
        return drawn

    def read_token(self, active: Sequence[bool]) -> None:
        """The Thinker reads what was drawn."""
        width, cache = self.width(active), self.text.decoder.cache
        span = self.span(cache)
        self._read_token(self._mask(active, width), span)
        cache.count(active)

    def frame(
        self,
        following: Sequence[int] | Sequence[Tensor],
        reads: Sequence[bool],
        draws: Sequence[bool],
        sounds: Sequence[bool],
        samplings: tuple[RowSampling, RowSampling],
    ) -> Frame | None:
        """Rows of `reads` read the pending frame and the text `following`; rows of `draws` draw the next one.

        Text is one id a row or, where text enters by hidden states too, one vector [Di] a row.
        Rows of `sounds` have given their codec state to the runner (`adopt_sound`). None if nothing is drawn.
        """
        assert self.speech is not None
        if any(reads):
            with self.times.stage("talker"):
                width, cache = self.width(reads), self.speech.decoder.cache
                span = self.span(cache)
                self._read_frame(self.text_vectors(following[:width]), self._mask(reads, width), span)
                cache.count(reads)
        if not any(draws):
            return None
        with self.times.stage("residual_codes"):
            codes = self._draw_frame(samplings, self._mask(draws, self.width(draws)))
            return Frame(codes, codes[:, 0].tolist())

    # the steps on the first b rows, as functions of masks bool [b]: also what `GraphRunner` captures

    def _draw_token(self, sampling: RowSampling, active: Tensor) -> Tensor:
        width = len(active)
        self._ids[:width] = draw_token(self.steps, self.text.rows(0, width), sampling.rows(0, width), active)
        return self._ids[:width]

    def _read_token(self, active: Tensor, span: int | None) -> None:
        width = len(active)
        read_token(self.steps, self.model.require("thinker"), self.text.rows(0, width), self._ids[:width], active, span)

    def _read_frame(self, text: Tensor, active: Tensor, span: int | None) -> None:
        assert self.speech is not None
        read_frame(self.steps, self.model.require("talker"), self.speech.rows(0, len(active)), text, active, span)

    def _draw_frame(self, samplings: tuple[RowSampling, RowSampling], active: Tensor) -> Tensor:
        assert self.speech is not None and self.banned is not None
        state = self.speech.rows(0, len(active))
        first, residual = (sampling.rows(0, len(active)) for sampling in samplings)
        return draw_frame(self.steps, self.model.require("talker"), state, first, residual, self.banned, active)

    def decode(self, codes: Tensor, state: Any) -> Tensor:
        """Codes int64 [b, K, n] -> samples [b, m]; updates the codec's state."""
        codec = self.model.code2wav
        started = isinstance(state, CodecState) and state.started
        one_more = codes.shape[2] == 1 and started  # the shape that steps are compiled for
        wave: Tensor = (self.steps.codec if one_more else codec_step)(codec, codes.contiguous(), state)
        if not isinstance(wave, Tensor) or wave.dim() != 2 or len(wave) != len(codes):
            got = list(wave.shape) if isinstance(wave, Tensor) else type(wave).__name__
            raise ValueError(f"{type(codec).__name__}.step must return samples [{len(codes)}, m], got {got}")
        return wave

    def project_text(self, ids: Sequence[int]) -> Tensor:
        """Token ids -> their vectors on the Talker's text side [n, Di], from their embeddings alone."""
        table = self.model.require("thinker").embed_tokens
        embeds = table(torch.tensor(list(ids), dtype=torch.int64, device=self.model.device))
        return self.model.require("talker").text_vectors(embeds)

    def text_vectors(self, texts: Sequence[int] | Sequence[Tensor]) -> Tensor:
        """Ids, or vectors [Di], in one tensor of vectors [n, Di]."""
        if isinstance(texts[0], Tensor):
            return torch.stack(list(texts))  # type: ignore[arg-type]
        return self.project_text(texts)  # type: ignore[arg-type]

    def reply_vectors(self, rows: int) -> Tensor:
        """The vectors of the reply tokens that the first b rows have read last [b, Di]."""
        embeds = self.model.require("thinker").embed_tokens(self._ids[:rows])
        return self.model.require("talker").text_vectors(embeds, self.text.hidden[:rows])

    def adopt_sound(self, row: int, state: CodecState) -> None:
        """Take over the codec state of one row, after its first chunk."""
        assert self.decodes_sound, "this runner leaves codec states to the turns"

    def span(self, cache: KVCache) -> int | None:
        """Make room for one more token of each row; slots that the step will look at, None for those filled."""
        cache.reserve(1)
        return min(cache.capacity, -(-(cache.longest + 1) // 64) * 64) if self.steps.static else None

    def width(self, active: Sequence[bool]) -> int:
        """Rows to compute: up to the last active one, or all where each number of rows is compiled for itself."""
        if self.steps.static:
            return len(active)
        return max(row for row, is_active in enumerate(active) if is_active) + 1

    def _mask(self, active: Sequence[bool], width: int) -> Tensor:
        return torch.tensor(active[:width], device=self.model.device)


def _banned(model: ModelParts) -> Tensor:
    """bool [C]: codec ids that are never drawn: those the Talker suppresses, and those that no codec could decode."""
    talker = model.require("talker")
    banned = talker.suppressed()
    codec = model.config.code2wav_config
    if codec is not None:
        ids = torch.arange(len(banned), device=banned.device)
        banned = banned | (ids >= codec.num_codes)
        banned[list(talker.config.codec_stop_ids)] = False
    return banned
