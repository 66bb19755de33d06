"""The single-codebook Talker against the reference: its passes, its prompt, and whole greedy replies, code by code.

The codes are drawn by the step functions that drive the first family's Talker (`omni.generation.decode`).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from build import config_values, once, seeded
from oracle import assert_close
from oracle_qwen2_5 import converted_parts, reference_parts
from test_parity_qwen2_5_positions import RULE, Layout, gather, layouts

from omni.config.model import OmniConfig
from omni.generation.decode import SpeechState, draw_frame, read_frame
from omni.generation.sampling import CODE_STREAM, RESIDUAL_STREAM, RowSampling, SamplingConfig
from omni.generation.steps import Steps
from omni.rope.positions import prompt_positions
from omni.talker.single_codebook import SingleCodebookTalker

SEEDS = range(8)
FRAMES = 14
VOICES = {"eve": 300, "bob": 301}


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_logits_and_states_of_a_padded_batch(seed: int) -> None:
    (_, reference), (_, talker) = reference_parts(seed), converted_parts(seed)
    lengths, positions = [10, 7], torch.randint(0, 60, (3, 2, 10))
    embeds = torch.randn(2, 10, talker.config.thinker_hidden_size)
    expected = reference.model(
        inputs_embeds=reference.thinker_to_talker_proj(embeds),
        attention_mask=(torch.arange(10) < torch.tensor(lengths)[:, None]).long(),
        position_ids=positions,
    ).last_hidden_state
    state = talker.init_state(2)
    for ours in (talker(embeds, positions.float(), lengths=lengths), talker(embeds, positions.float(), state)):
        for row, length in enumerate(lengths):
            assert_close(ours.hidden[row, :length], expected[row, :length])
            assert_close(ours.logits[row, :length], reference.codec_head(expected[row, :length]))


class Speech:
    """Greedy codes of one row, from the vectors of its prompt and of its reply."""

    def __init__(self, talker: SingleCodebookTalker, thinker: Any) -> None:
        self.talker, self.embed = talker, thinker.embed_tokens
        one, seeds = SamplingConfig(temperature=0.0, repetition_penalty=1.05), torch.zeros(1, dtype=torch.int64)
        self.samplings = [RowSampling.of([one], seeds, stream) for stream in (CODE_STREAM, RESIDUAL_STREAM)]

    def text(self, token: int) -> torch.Tensor:
        return self.embed(torch.tensor(token))

    def codes(
        self, prompt: torch.Tensor, positions: torch.Tensor, start: float, reply: torch.Tensor, voice: int
    ) -> list[int]:
        """prompt [T, Dt] at positions [3, T]; `start`: where what follows begins; reply [n, Dt] -> codes."""
        talker, config = self.talker, self.talker.config
        state, steps, active = SpeechState.create(talker, 1, 64), Steps(), torch.tensor([True])
        state.seen |= talker.seen_at_first()
        control = talker.codec_embedding(torch.tensor([config.codec_pad_id, config.codec_bos_id]))
        prefix = talker.prefix_vectors(torch.stack((self.text(voice), reply[0])), control)
        places = torch.cat((positions, (start + torch.arange(2)).expand(3, -1)), 1)
        out = talker(torch.cat((prompt, prefix))[None], places[:, None], state.decoder)
        state.logits.copy_(out.logits[:, -1])
        state.decoder.next_position.fill_(float(places.max()) + 1)
        following = [*reply[1:], self.text(config.tts_text_end_token_id)]
        drawn: list[int] = []
        while len(drawn) < FRAMES:
            codes = draw_frame(steps, talker, state, *self.samplings, talker.suppressed(), active)
            assert codes.shape == (1, 1)
            drawn.append(int(codes))
            if drawn[-1] in config.codec_stop_ids:
                return drawn[:-1]
            place = len(drawn) - 1
            text = following[place] if place < len(following) else self.text(config.tts_text_pad_token_id)
            state.decoder.cache.reserve(1)
            read_frame(steps, talker, state, text[None], active, None)
            state.decoder.cache.count([True])
        return drawn


def reference_codes(reference: Any, padding: int, **arguments: Any) -> list[int]:
    """Codes that the reference's Talker generates greedily for one row, up to the end of speech.

    padding: tokens of padding on the left. Its generate() drops a mask of ones, and without a mask its Talker adds
    neither codec pad and bos nor multimodal positions; so the true result needs padding.
    """
    c, length = reference.config, len(arguments["input_ids"])
    ends = [c.tts_codec_pad_token_id, c.tts_codec_end_token_id]
    for name, fill in (("input_ids", c.tts_codec_mask_token_id), ("input_text_ids", 256), ("inputs_embeds", 0.0)):
        value = arguments[name]
        arguments[name] = torch.cat((value.new_full((padding, *value.shape[1:]), fill), value))[None]
    found = reference.generate(
        do_sample=False, repetition_penalty=1.05, max_new_tokens=FRAMES, eos_token_id=ends,
        pad_token_id=c.tts_codec_pad_token_id, suppress_tokens=[c.tts_codec_start_token_id],
        attention_mask=(torch.arange(padding + length) >= padding).long()[None], **arguments,
    )[0, padding + length :].tolist()  # fmt: skip
    return found[: next((i for i, code in enumerate(found) if code in ends), FRAMES)]


def both_codes(seed: int, row: Layout, with_sound: bool, padding: int) -> tuple[list[int], list[int]]:
    """Our codes and the reference's from the same random Thinker states and embeddings of one prompt."""
    (_, reference), (thinker, talker) = reference_parts(seed), converted_parts(seed)
    c, width = talker.config, talker.config.thinker_hidden_size
    torch.manual_seed(seed)
    hidden, embeds = torch.randn(2, len(row.ids), width)
    reply, ids = torch.randn(5, width), torch.tensor(row.ids)
    media = (ids[:, None] == torch.tensor([265, 266, 275])).any(1)
    positions, start = prompt_positions(row.segments, RULE)
    speech = Speech(talker, thinker)
    ours = speech.codes(talker.prompt_vectors(embeds, hidden, media), positions, start, reply, VOICES["bob"])

    heard = hidden + torch.where(media[:, None], 0.0, embeds)
    tail = torch.stack([speech.text(c.tts_text_end_token_id), speech.text(c.tts_text_pad_token_id)])
    expected = reference_codes(
        reference,
        padding,
        input_ids=torch.tensor([c.codec_mask_id] * len(ids) + [c.codec_pad_id, c.codec_bos_id]),
        input_text_ids=torch.cat((ids, torch.tensor([VOICES["bob"], 7]))),
        inputs_embeds=torch.cat((heard, speech.text(VOICES["bob"])[None], reply[:1])),
        thinker_reply_part=torch.cat((reply[1:], tail))[None],
        image_grid_thw=gather([row], "images"),
        video_grid_thw=gather([row], "videos"),
        audio_feature_lengths=gather([row], "mel_frames"),
        video_second_per_grid=gather([row], "seconds"),
        use_audio_in_video=with_sound,
    )
    return ours, expected


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_greedy_codes_of_prompts_with_media(seed: int) -> None:
    for rows, with_sound in layouts(500 + seed, 2):
        ours, expected = both_codes(seed, rows[0], with_sound, padding=1)
        assert ours == expected and len(ours) > 0


@torch.no_grad()
def test_a_prompt_without_padding_is_read_wrongly_by_the_reference() -> None:
    rows, with_sound = layouts(500, 1)[0]
    ours, expected = both_codes(0, rows[0], with_sound, padding=0)
    assert ours != expected


@once
def reference_model(seed: int) -> Any:
    """The whole reference model, its codec decoder cut off: text in, text and codes out."""
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as modeling
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniConfig

    values = copy.deepcopy(config_values(seed))
    width = values["thinker_config"]["text_config"]["hidden_size"]
    small = {"encoder_layers": 1, "d_model": 8, "encoder_attention_heads": 1, "encoder_ffn_dim": 8, "output_dim": width}
    values["thinker_config"]["audio_config"] = small
    small = {"depth": 1, "hidden_size": 8, "num_heads": 1, "intermediate_size": 8, "out_hidden_size": width}
    values["thinker_config"]["vision_config"] = small
    values["enable_audio_output"] = False
    model = modeling.Qwen2_5OmniForConditionalGeneration(Qwen2_5OmniConfig(**values)).eval()
    thinker, talker = reference_parts(seed)
    model.thinker.model.language_model, model.thinker.lm_head = thinker.model, thinker.lm_head
    model.talker, model.has_talker = talker, True

    class Cut(torch.nn.Module):
        dtype = torch.float

        def forward(self, codes: torch.Tensor, **_: Any) -> torch.Tensor:
            return codes

    model.token2wav = Cut()
    model.speaker_map = {
        n: {"bos_token": t, "cond": torch.zeros(1, 4), "ref_mel": torch.zeros(1, 4, 80)} for n, t in VOICES.items()
    }
    return model


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_whole_replies_to_text(seed: int) -> None:
    """Thinker and Talker together, greedily, in a padded batch of the reference: equal ids, equal codes.

    The reference never reads the token that ends a reply, nor the last one of a reply cut by its limit.
    """
    thinker, talker = converted_parts(seed)
    config = OmniConfig.from_dict(config_values(seed))
    generator = seeded(seed)
    prompts = [torch.randint(0, 250, (n,), generator=generator) for n in (9, 6)]
    ids = torch.stack([torch.nn.functional.pad(p, (9 - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.arange(9) >= 9 - len(p) for p in prompts]).long()
    arguments = {"thinker_max_new_tokens": 6, "talker_do_sample": False, "talker_max_new_tokens": FRAMES}
    c = config.talker_config
    codec_ends = [c.codec_pad_id, c.codec_eos_token_id]
    found = {}
    for end in (319, None):  # an id that is hardly ever drawn, then one that ends the first reply early
        end = end if end is not None else int(found[319][0][0, 9 + 2])
        found[end] = reference_model(seed).generate(
            ids,
            speaker="eve",
            attention_mask=mask,
            thinker_eos_token_id=end,
            talker_eos_token_id=codec_ends,
            **arguments,
        )
        sequences, codes = found[end]
        for row, prompt in enumerate(prompts):
            state = thinker.init_state(1)
            embeds, positions = thinker.embed_tokens(prompt), torch.arange(len(prompt)).float().expand(3, -1)
            out = thinker(embeds[None], positions[:, None], state, logits="last")
            vectors = talker.prompt_vectors(embeds, out.hidden[0], torch.zeros(len(prompt), dtype=torch.bool))
            reply, said = [int(out.logits[0, -1].argmax())], []
            while reply[-1] != end and len(reply) < 6:  # the Thinker reads a token before it is spoken
                embed = thinker.embed_tokens(torch.tensor(reply[-1:]))
                place = torch.full((3, 1, 1), float(len(prompt) + len(said)))
                out = thinker(embed[None], place, state)
                said.append(talker.text_vectors(embed, out.hidden[0])[0])
                reply.append(int(out.logits[0, -1].argmax()))
            assert reply == sequences[row, 9 : 9 + len(reply)].tolist()
            if not said:
                continue  # the reference speaks something for an empty reply; nothing is to be said
            ours = Speech(talker, thinker).codes(
                vectors, positions, float(len(prompt)), torch.stack(said), VOICES["eve"]
            )
            assert ours == codes[row].long().tolist()
