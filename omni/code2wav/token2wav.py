"""Token2Wav: speech codes and a voice to a waveform, in one call or while the codes arrive.

The DiT turns noise into a mel that fits codes and voice (36 evaluations of a doubled batch, released settings), BigVGAN
turns the mel into samples. A code lasts two mel frames of 10 ms: 480 samples of 24 kHz (released config).

Shapes: B rows, T codes, N = repeats * T mel frames, M mel bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from omni.code2wav.bigvgan import BigVGAN
from omni.code2wav.chunk_schedule import ChunkSchedule, Token2WavState, VoiceEmbedding, Window
from omni.code2wav.contract import SAMPLE_RATE_HZ, CodecDecoder
from omni.code2wav.dit import DiT
from omni.code2wav.ode_sampler import ODEConfig, position_noise, sample_mel
from omni.code2wav.voices import Voice
from omni.config.token2wav import Token2WavConfig

AnyVoice = Voice | Sequence[Voice] | VoiceEmbedding  # one for all rows, one a row, or encoded before


class Token2Wav(CodecDecoder):
    """The codec decoder of the Qwen2.5-Omni family.

    It computes in fp32, as the release does, and keeps its parameters so: `to(dtype)` moves it to another device but
    not to another floating dtype, and autocast is switched off inside.
    """

    always_float32 = True  # for the loading of checkpoints
    needs_voice = True
    missing_samples = 0  # the vocoder's first samples come late, but they come
    sample_rate = SAMPLE_RATE_HZ
    num_codebooks = 1

    def __init__(self, config: Token2WavConfig) -> None:
        super().__init__()
        self.config = config
        self.dit = DiT(config.dit_config)
        self.bigvgan = BigVGAN(config.bigvgan_config)
        self.hop_length = config.hop_length
        # of the vocoder; what the mel waits for is the schedule's
        self.lookahead = (self.bigvgan.reach[1] + 1) * self.bigvgan.hop_length - 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def in_fp32(t: Tensor) -> Tensor:
            new = fn(t)
            return t.to(new.device, torch.float32) if new.is_floating_point() and new.dtype != torch.float32 else new

        return super()._apply(in_fp32, recurse)

    def whole_schedule(self) -> ChunkSchedule:
        """All codes in one window, which is not an approximation, as far as positions reach (released: 327 s)."""
        sizes = self.config.dit_config
        blocks = sizes.max_position_embeddings // sizes.block_size
        return ChunkSchedule(max(1, blocks) * sizes.block_codes, left_codes=0, lookahead_codes=0)

    @torch.no_grad()
    def embed_voice(self, voice: AnyVoice, rows: int = 1) -> VoiceEmbedding:
        """Encode a voice, or one a row, for `rows` rows; keep the result to use a voice again without encoding it.

        Raises ValueError for another width than the model's and for a wrong number of voices.
        """
        if isinstance(voice, VoiceEmbedding):
            return _spread(voice, rows)
        if isinstance(voice, Voice):
            return _spread(self._embed_one(voice), rows)
        ones = {id(v): self._embed_one(v) for v in voice}  # each voice once
        each = [ones[id(v)] for v in voice]
        if len(each) != rows:
            raise ValueError(f"{len(each)} voices for {rows} rows of codes; pass one voice, or one a row")
        return VoiceEmbedding(
            *(torch.cat([getattr(v, name) for v in each]) for name in ("speaker", "reference", "null"))
        )

    def _embed_one(self, voice: Voice) -> VoiceEmbedding:
        sizes = self.config.dit_config
        for name, width in (("cond", sizes.enc_emb_dim), ("ref_mel", sizes.mel_dim)):
            if getattr(voice, name).shape[-1] != width:
                raise ValueError(
                    f"the voice's {name} is {getattr(voice, name).shape[-1]} wide, this model's is {width}; "
                    "the voice belongs to another model"
                )
        weight = self.dit.input_proj.weight
        speaker, mel = voice.cond.to(weight.device), voice.ref_mel.to(weight.device)
        with torch.autocast(weight.device.type, enabled=False):
            both = self.dit.encode_reference(torch.cat((mel, torch.zeros_like(mel))))
        return VoiceEmbedding(speaker, both[:1], both[1:])

    @torch.no_grad()
    def sample_mel(
        self,
        codes: Tensor,
        voice: AnyVoice,
        *,
        noise: Tensor | None = None,
        seed: int | Sequence[int] = 0,
        ode: ODEConfig | None = None,
        lengths: Tensor | None = None,
        first_code: int = 0,
    ) -> Tensor:
        """codes int64 [B, T] -> log-amplitude mel fp32 [B, N, M].

        noise [B, N, M], or drawn by `position_noise` from one seed or one a row, where the codes are taken for those
        from `first_code` of a longer signal on. `lengths` int64 [B]: the codes of each row, the rest is padding.
        """
        self._check(codes[:, None])
        rows, frames = codes.shape[0], codes.shape[1] * self.config.dit_config.repeats
        limit = self.config.dit_config.max_position_embeddings
        if frames > limit:
            raise ValueError(
                f"{codes.shape[1]} codes are {frames} mel frames, more than max_position_embeddings {limit}; "
                "decode them in chunks (decode_chunked or step)"
            )
        weight, bins, repeats = (
            self.dit.input_proj.weight,
            self.config.dit_config.mel_dim,
            self.config.dit_config.repeats,
        )
        if noise is None:
            start = first_code * repeats
            noise = position_noise(_seeds(seed, rows), start, start + frames, bins, weight.device)
        if noise.shape != (rows, frames, bins):
            raise ValueError(f"noise must have shape {[rows, frames, bins]}, got {list(noise.shape)}")
        if frames == 0:
            return noise.float()
        embedded = self.embed_voice(voice, rows)
        with torch.autocast(weight.device.type, enabled=False):
            condition = self.dit.condition(codes, embedded.speaker, embedded.reference)
            null = self.dit.condition(torch.zeros_like(codes), torch.zeros_like(embedded.speaker), embedded.null)
            counts = None if lengths is None else lengths * repeats
            return sample_mel(self.dit, noise.to(weight), condition, null, ode or ODEConfig(), counts)

    @torch.no_grad()
    def forward(
        self,
        codes: Tensor,
        voice: AnyVoice,
        *,
        noise: Tensor | None = None,
        seed: int | Sequence[int] = 0,
        ode: ODEConfig | None = None,
    ) -> Tensor:
        """codes int64 [B, 1, T] -> samples fp32 [B, hop_length * T] in -1 .. 1; or one clip, [T] -> [hop_length * T].

        For noise, seed and ode see `sample_mel`. Raises ValueError for codes out of range and for too many of them,
        TypeError for codes that are not integers.
        """
        if codes.dim() == 1:
            return self(codes[None, None], voice, noise=noise, seed=seed, ode=ode)[0]
        self._check(codes)
        return self.vocode(self.sample_mel(codes[:, 0], voice, noise=noise, seed=seed, ode=ode))

    def vocode(self, mel: Tensor) -> Tensor:
        """mel [B, N, M] -> samples [B, hop_length of the vocoder * N], fp32."""
        with torch.autocast(mel.device.type, enabled=False):
            return self.bigvgan(mel.float())

    def init_state(
        self,
        batch_size: int,
        voice: AnyVoice,
        *,
        seed: int | Sequence[int] = 0,
        schedule: ChunkSchedule | Literal["whole"] | None = None,
        ode: ODEConfig | None = None,
    ) -> Token2WavState:
        """The state before the first code. Raises ValueError for a schedule that does not fit the model's blocks.

        schedule: how codes are cut; "whole": `whole_schedule`; None: `ChunkSchedule.usual`.
        """
        if schedule == "whole":
            schedule = self.whole_schedule()
        schedule = schedule or ChunkSchedule.usual(self.config)
        schedule.check(self.config)
        embedded = self.embed_voice(voice, batch_size)
        return Token2WavState(
            voice=embedded,
            codes=torch.zeros(batch_size, 0, dtype=torch.int64, device=embedded.speaker.device),
            vocoder=self.bigvgan.init_state(batch_size, schedule.vocoder_lookahead_frames),
            seeds=_seeds(seed, batch_size),
            schedule=schedule,
            ode=ode or ODEConfig(),
        )

    @torch.no_grad()
    def step(self, codes: Tensor, state: Token2WavState, *, last: bool = False) -> Tensor:
        """The next n >= 0 codes int64 [B, 1, n] -> the samples that they complete, fp32 [B, m]; m is often 0.

        Updates `state` in place. `last` says that no more will come and gives the rest. All calls joined are
        `decode_chunked` of all codes, however they were cut.
        """
        self._check(codes)
        if state.ended:
            raise ValueError("these codes have ended; make a fresh state for the next turn")
        if codes.shape[0] != state.codes.shape[0]:
            raise ValueError(f"step needs codes of {state.codes.shape[0]} rows, got shape {list(codes.shape)}")
        state.codes = torch.cat((state.codes, codes[:, 0]), dim=1)
        state.ended = last
        pieces = []
        while (window := state.schedule.next_window(state.done, state.received, ended=last)) is not None:
            mel = self._mel_of_window(
                state.codes[:, window.start - state.first : window.stop - state.first], window, state
            )
            state.done = window.last
            forget = max(0, state.done - state.schedule.left_codes - state.first)
            state.codes, state.first = state.codes[:, forget:], state.first + forget
            pieces.append(self._vocode_step(mel, state, last=last and state.done == state.received))
        if last and not state.vocoder.finished:
            pieces.append(self._vocode_step(state.vocoder.mel[:, :0], state, last=True))
        return torch.cat(pieces, dim=1) if pieces else state.vocoder.mel.new_zeros(codes.shape[0], 0)

    def finish(self, state: Token2WavState) -> Tensor:
        """The samples that are left once all codes have come [B, m]."""
        return self.step(state.codes[:, None, :0], state, last=True)

    def stream(self, pieces: Iterable[Tensor], voice: AnyVoice, **arguments: Any) -> Iterator[Tensor]:
        """Samples [B, m] as soon as they are certain, of codes [B, 1, n] that come in pieces.

        `arguments` are those of `init_state`.
        """
        state: Token2WavState | None = None
        for codes in pieces:
            state = state or self.init_state(codes.shape[0], voice, **arguments)
            samples = self.step(codes, state)
            if samples.shape[1]:
                yield samples
        if state is not None:
            yield self.finish(state)

    @torch.no_grad()
    def decode_chunked(
        self,
        codes: Tensor,
        voice: AnyVoice,
        schedule: ChunkSchedule | None = None,
        *,
        seed: int | Sequence[int] = 0,
        ode: ODEConfig | None = None,
    ) -> Tensor:
        """What streaming gives, of codes that are all there: int64 [B, 1, T] -> fp32 [B, hop_length * T]."""
        schedule = schedule or ChunkSchedule.usual(self.config)
        return self.vocode_chunked(self.sample_mel_chunked(codes, voice, schedule, seed=seed, ode=ode), schedule)

    @torch.no_grad()
    def vocode_chunked(self, mel: Tensor, schedule: ChunkSchedule) -> Tensor:
        """`vocode` as streaming does it: with the schedule's look-ahead, chunk by chunk where that is not exact."""
        if schedule.vocoder_lookahead_frames is None:
            return self.vocode(mel)
        vocoder = self.bigvgan.init_state(mel.shape[0], schedule.vocoder_lookahead_frames)
        chunks = list(mel.split(schedule.chunk_codes * self.config.dit_config.repeats, dim=1)) if mel.shape[1] else []
        out = [self.bigvgan.step(chunk, vocoder, last=i + 1 == len(chunks)) for i, chunk in enumerate(chunks)]
        return torch.cat(out, dim=1) if out else mel.new_zeros(mel.shape[0], 0)

    @torch.no_grad()
    def sample_mel_chunked(
        self,
        codes: Tensor,
        voice: AnyVoice,
        schedule: ChunkSchedule,
        *,
        seed: int | Sequence[int] = 0,
        ode: ODEConfig | None = None,
    ) -> Tensor:
        """The mel [B, N, M] of codes [B, 1, T], window by window."""
        self._check(codes)
        state = self.init_state(codes.shape[0], voice, seed=seed, schedule=schedule, ode=ode)
        windows = list(schedule.windows(codes.shape[2]))
        mels = [self._mel_of_window(codes[:, 0, w.start : w.stop], w, state) for w in windows]
        return torch.cat([state.vocoder.mel, *mels], dim=1)

    def _mel_of_window(self, codes: Tensor, window: Window, state: Token2WavState) -> Tensor:
        """The kept part of a window's mel; codes [B, stop - start]."""
        mel = self.sample_mel(codes, state.voice, seed=state.seeds, ode=state.ode, first_code=window.start)
        repeats = self.config.dit_config.repeats
        return mel[:, (window.first - window.start) * repeats : (window.last - window.start) * repeats]

    def _vocode_step(self, mel: Tensor, state: Token2WavState, *, last: bool) -> Tensor:
        with torch.autocast(mel.device.type, enabled=False):
            return self.bigvgan.step(mel, state.vocoder, last)

    def _check(self, codes: Tensor) -> None:
        """Raise for codes of a wrong shape, kind or range; the range costs one wait for the device."""
        if codes.dim() != 3 or codes.shape[1] != 1:
            raise ValueError(f"codes must have shape [rows, 1 codebook, codes], got {list(codes.shape)}")
        if codes.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"codes must be int64, got {codes.dtype}")
        limit = self.config.dit_config.num_embeds  # the table has one entry more
        outside = (codes < 0) | (codes > limit)
        if outside.any():
            row, _, place = outside.nonzero()[0].tolist()
            raise ValueError(
                f"code {codes[row, 0, place].item()} at row {row}, position {place} lies outside 0..{limit}; "
                "control codes such as the end code must be removed before decoding"
            )


def _seeds(seed: int | Sequence[int], rows: int) -> list[int]:
    """One seed a row: a single one serves all rows."""
    seeds = [seed] * rows if isinstance(seed, int) else list(seed)
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} rows of codes; pass one seed, or one a row")
    return seeds


def _spread(voice: VoiceEmbedding, rows: int) -> VoiceEmbedding:
    """One voice for all rows; voices that already are one a row stay."""
    have = voice.speaker.shape[0]
    if have == rows:
        return voice
    if have != 1:
        raise ValueError(f"{have} voices for {rows} rows of codes; pass one voice, or one a row")
    return VoiceEmbedding(*(value.expand(rows, -1) for value in (voice.speaker, voice.reference, voice.null)))
