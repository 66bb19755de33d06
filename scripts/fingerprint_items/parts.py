"""Items on the model's parts, each alone: whole, in pieces, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from omni import OmniInputs
from omni.code2wav.chunk_schedule import ChunkSchedule, first_audio
from omni.code2wav.code2wav import Code2Wav
from omni.code2wav.ode_sampler import ODEConfig, position_noise, time_grid
from omni.talker.layout import turn_layout

from .inputs import conversations
from .models import build, draw, draw_ids, processor_of, tiny
from .registry import complaint, cut, each_family, item

FAST = ODEConfig(num_steps=3, solver="euler")


@each_family("part.audio_encoder")
def audio_encoder(family: str) -> Any:
    """Clips side by side, with an attention window where there is a choice, and streamed in odd pieces."""
    encoder, features = tiny(family).audio_encoder, draw(4, 128, 1000, seed=1)
    windows: list[int | None] = [None, 200] if family == "qwen3" else [None]
    out: list[Any] = [encoder.num_tokens(frames) for frames in range(1, 400, 3)]
    for window in windows:
        whole = encoder(features, [1000, 3, 137, 400], window)
        out.append((whole.embeds, whole.lengths, len(whole.taps)))
        for frames in (950, 100, 40):
            state = encoder.init_state(window)
            pieces = cut(features[0, :, :frames], (1, 99, 13, 250))
            out.append([encoder.step(piece, state) for piece in pieces])
            if frames == 950:  # a copy goes on for itself
                other = state.clone()
                out.append((encoder.step(features[1, :, :60], other), encoder.finish(other)))
            out.append(encoder.finish(state))
    with torch.enable_grad():
        return out, encoder(features[:2], [500, 220]).embeds, complaint(lambda: encoder.window_frames(0.7))


@each_family("part.vision_encoder")
def vision_encoder(family: str) -> Any:
    encoder = tiny(family).vision_encoder
    grids = torch.tensor([[1, 4, 6], [3, 8, 4], [1, 2, 2], [2, 10, 14]])
    size = 3 * 2 * encoder.config.patch_size**2
    pixels = draw(int(grids.prod(1).sum()), size, seed=2)
    whole, empty = encoder(pixels, grids), encoder(pixels[:0], grids[:0])
    with torch.enable_grad():
        graded = encoder(pixels, grids).embeds
    counts = [encoder.num_tokens(*grid) for grid in grids.tolist()]
    return whole.embeds, whole.lengths, list(whole.taps), empty.embeds, graded, counts


@each_family("part.thinker_forward")
def thinker_forward(family: str) -> Any:
    """Logits, hidden states and routers' logits of a padded batch with media."""
    given, options = conversations()["batch"]
    inputs: OmniInputs = processor_of(family)(given, **options)
    out = tiny(family)(inputs, with_router_logits=True)
    return out.logits, out.hidden, out.router_logits


@each_family("part.thinker_steps")
def thinker_steps(family: str) -> Any:
    """Prefill in two pieces, then steps in which rows stand still."""
    thinker = tiny(family).thinker
    state, out = thinker.init_state(2, capacity=8), []
    embeds = thinker.embed_tokens(draw_ids(600, 2, 12, seed=3))
    positions = torch.arange(12.0).expand(3, 2, -1)
    for piece in (slice(0, 7), slice(7, 12)):
        got = thinker(embeds[:, piece], positions[:, :, piece], state, logits="last")
        out.append((got.logits, got.hidden, got.final))
    state.next_position.fill_(12)
    for number, active in enumerate(([True, True], [True, False], [False, True], [True, True])):
        logits = thinker.step(draw_ids(600, 2, seed=number), state, active)
        out.append(logits[torch.tensor(active)])
    return out, state.cache.lengths, state.next_position


@each_family("part.talker")
def talker(family: str) -> Any:
    """Forward, steps in which rows stand still, and what the Talker hears."""
    talker = tiny(family).talker
    width = talker.text_vectors(draw(1, 32), draw(1, 32)).shape[-1]
    embeds, positions = draw(2, 9, width, seed=4), torch.arange(9.0).expand(3, 2, -1)
    whole = talker(embeds, positions, with_router_logits=True)
    state = talker.init_state(2)
    out: list[Any] = [talker(embeds, positions, state, lengths=[9, 6]).logits[:, :6]]
    state.next_position.copy_(torch.tensor([9, 6]))
    for number, active in enumerate(([True, True], [False, True], [True, True])):
        logits, hidden = talker.step(draw(2, width, seed=number), state, active)
        out += [logits[torch.tensor(active)], hidden[torch.tensor(active)]]
    media = torch.tensor([True, False, False, True])
    codes = draw_ids(20, 3, talker.config.num_code_groups, seed=5)
    config = tiny(family).config
    layout = turn_layout(config.replace(tts_pad_token_id=271, tts_bos_token_id=272))
    prefix_ids = layout.opening([257, 278, 10], 300)
    text = torch.cat((draw(len(prefix_ids), width, seed=6), draw(width, seed=7)[None]))[list(layout.prefix_texts)]
    prefix = talker.prefix_vectors(text, talker.codec_embedding(torch.tensor(layout.prefix_codes(90))))
    heard = talker.prompt_vectors(draw(4, 32, seed=8), draw(4, 32, seed=9), media)
    spans = layout.spans([257, 277, 5, 258, 257, 278, 6, 257, 277, 7])
    flags = (talker.suppressed(), talker.seen_at_first(), talker.embed_frames(codes))
    return whole.logits, whole.hidden, whole.router_logits, out, prefix_ids, prefix, heard, spans, flags


@item("part.mtp")
def mtp() -> Any:
    """Teacher-forced, and frame by frame with the likeliest codes."""
    mtp = tiny("qwen3").talker.mtp
    hidden, first = draw(5, 32, seed=1), draw(5, 32, seed=2)
    codes, total = mtp.generate(hidden, first, lambda logits, _: logits.argmax(-1))
    again = mtp.generate(hidden[:2], first[:2], lambda logits, _: logits.argmax(-1), step=type(mtp).code_logits)
    return mtp(hidden, first, draw_ids(60, 5, 3)), codes, total, again, mtp.embed_residual(codes)


def code2wav_pieces(codec: Code2Wav, codes: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Samples of codes that come in pieces."""
    state = codec.init_state(codes.shape[0])
    return [codec.step(piece, state) for piece in cut(codes, sizes)]


@item("part.code2wav")
def code2wav() -> Any:
    codec, codes = tiny("qwen3").code2wav, draw_ids(64, 2, 4, 23, seed=1)
    chunks = [code2wav_pieces(codec, codes, sizes) for sizes in ((1,), (1, 1, 2, 4, 8), (5,), (23,))]
    return codec(codes), chunks, codec(codes[:, :, :0]), codec.lookahead, codec.hop_length, codec.sample_rate


@item("part.code2wav_long")
def code2wav_long() -> Any:
    return tiny("qwen3").code2wav(draw_ids(64, 1, 4, 261, seed=2))


@item("part.code2wav_causal")
def code2wav_causal() -> Any:
    """The variant without look-ahead."""
    made = tiny("qwen3").code2wav
    codec = Code2Wav(made.config, strict_causal=True).eval()
    codec.load_state_dict(made.state_dict())
    codes = draw_ids(64, 1, 4, 11, seed=3)
    return codec(codes), code2wav_pieces(codec, codes, (1, 2, 3)), codec.lookahead


@item("part.code2wav_rows")
def code2wav_rows() -> Any:
    """Rows that stand still, that join later, and copies that go on."""
    codec, codes = tiny("qwen3").code2wav, draw_ids(64, 3, 4, 16, seed=4)
    state, out = codec.init_state(3), []
    codec.step(codes[:, :, :1], state)
    for frame in range(1, 14):
        active = torch.tensor([frame % 2 == 0, frame % 3 > 0, True])
        out.append(codec.step(codes[:, :, frame : frame + 1], state, active)[active])
        if frame == 6:
            one = codec.init_state(1)
            codec.step(codes[:1, :, :2], one)
            state.write_row(1, one)
    alone, copied = state.read_row(2), state.clone()
    out += [codec.step(codes[2:, :, 14:], alone), codec.step(codes[:, :, 14:], copied)]
    return out, codec.step(codes[:, :, 13:], state)


@item("part.code2wav_gradient")
def code2wav_gradient() -> Any:
    codec = build("qwen3").code2wav
    with torch.enable_grad():
        codec(draw_ids(64, 1, 4, 9, seed=5)).square().mean().backward()
    return {name: weight.grad for name, weight in codec.named_parameters()}


@item("part.token2wav")
def token2wav() -> Any:
    """At once, with several settings of the ODE and several voices."""
    model = tiny("qwen2_5")
    codec, voices = model.code2wav, list(model.voices.values())
    codes = draw_ids(21, 2, 1, 13, seed=1)
    odes = (FAST, ODEConfig(2), ODEConfig(4, 0.0, None, "midpoint"), ODEConfig(3, 1.5, -0.5))
    out = [codec(codes, voices, seed=[1, 2], ode=ode) for ode in odes]
    lengths = torch.tensor([13, 6])
    out.append(codec.sample_mel(codes[:, 0], voices[0], seed=3, ode=FAST, lengths=lengths, first_code=8))
    out.append(codec(codes[0, 0], voices[1], seed=4))
    return out, codec.embed_voice(voices, 2), codec.lookahead, codec.hop_length, codec.frame_rate


@item("part.token2wav_steps")
def token2wav_steps() -> Any:
    """Windows of several schedules, codes in several pieces, and the same decoded at once."""
    model, out = tiny("qwen2_5"), []
    codec, voices = model.code2wav, list(model.voices.values())
    codes = draw_ids(21, 2, 1, 27, seed=2)
    schedules = (None, ChunkSchedule(4, 2, 2), ChunkSchedule(2, 2, 0, 1), codec.whole_schedule())
    for schedule in schedules:
        for sizes in ((1,), (3, 8, 1), (27,)):
            state = codec.init_state(2, voices, seed=[5, 6], schedule=schedule, ode=FAST)
            pieces = [codec.step(piece, state) for piece in cut(codes, sizes)]
            other = state.clone()
            out.append((pieces, codec.finish(state), codec.step(codes[:, :, :3], other, last=True)))
        out.append(codec.decode_chunked(codes, voices[0], schedule, seed=7, ode=FAST))
    usual = ChunkSchedule.usual(codec.config)
    delays = [tuple(first_audio(codec.config, s or usual)) for s in schedules]
    return out, delays, list(codec.stream(cut(codes, (5,)), voices, ode=FAST))


@item("part.bigvgan")
def bigvgan() -> Any:
    vocoder = tiny("qwen2_5").code2wav.bigvgan
    mel, out = draw(2, 40, 5, seed=1) - 2, []
    for lookahead in (None, 3, 0):
        state = vocoder.init_state(2, lookahead)
        pieces = cut(mel, (1, 7, 2, 15), dim=1)
        out.append([vocoder.step(piece, state, last=i + 1 == len(pieces)) for i, piece in enumerate(pieces)])
    return vocoder(mel), out, list(vocoder.reach), vocoder(draw(1, 530, 5, seed=2)), vocoder(mel[:, :0])


@item("part.dit")
def dit() -> Any:
    """The velocity with and without padding, its condition, the noise and the times."""
    dit = tiny("qwen2_5").code2wav.dit
    reference = dit.encode_reference(draw(2, 9, 5, seed=1))
    condition = dit.condition(draw_ids(21, 2, 11, seed=2), draw(2, 3, seed=3), reference)
    noisy, times = draw(2, 22, 5, seed=4), torch.tensor([0.2, 0.7])
    padded = dit(noisy, times[:1], condition, torch.tensor([22, 10]))
    noise = position_noise([1, 2**63], 5, 12, 5)
    return reference, condition, dit(noisy, times, condition), padded, noise, time_grid(5, -1.0), time_grid(4, None)
