"""Whole Qwen2.5-Omni models, end to end: greedy ids and codes are the reference's, its waveform to 1e-4.

The reference drops an attention mask of ones, and without a mask its Talker reads its prompt wrongly (see
`test_parity_qwen2_5_talker`); so it always gets a padded batch. Pixels go to its Thinker by name, since its Talker
refuses them. It never speaks the last token of a reply that the
limit cuts, omni does: N tokens of ours are N + 1 of the reference's.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from build import once, seeded
from oracle import assert_close
from oracle import randomise as randomise_decoders
from test_parity_qwen2_5_understanding import prompts, whole_values
from test_parity_token2wav import BIGVGAN, DIT, randomise

from omni import OmniConfig, OmniInputs, OmniModel
from omni.checkpoint.keys import KeyTable
from omni.code2wav.ode_sampler import position_noise
from omni.code2wav.voices import Voice
from omni.config.qwen2_5_omni import QWEN2_5_OMNI
from omni.generation.sampling import SOUND_STREAM, stream_seed

KEYS = KeyTable.of(QWEN2_5_OMNI)

SEEDS = range(6)
TOKENS, CODES = 6, 15
ROW_SEEDS = [5, 8]
VOICES = {"Eve": 300, "bob": 301}
GREEDY = {"temperature": 0, "repetition_penalty": 1.05}


def values(seed: int) -> dict[str, Any]:
    """config.json of a complete tiny model, whose codec decodes every codec id."""
    found = whole_values(seed)
    found["token2wav_config"] = {"dit_config": {**DIT, "num_embeds": 95}, "bigvgan_config": BIGVGAN}
    found["talker_config"]["speaker_id"] = {"eve": 300, "bob": 301}
    return found


@once
def reference(seed: int) -> Any:
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniConfig
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniForConditionalGeneration

    config = Qwen2_5OmniConfig(**{**copy.deepcopy(values(seed)), "enable_audio_output": True})
    model = Qwen2_5OmniForConditionalGeneration._from_config(config, attn_implementation="eager").float().eval()
    randomise_decoders(model.thinker, 10 * seed)
    randomise_decoders(model.talker, 10 * seed + 1)
    randomise(model.token2wav, seed)
    model.speaker_map = {
        name: {"bos_token": voice.bos_token, "cond": voice.cond, "ref_mel": voice.ref_mel}
        for name, voice in voices().items()
    }
    return model


@once
def voices() -> dict[str, Voice]:
    rng = seeded(1)
    return {
        name: Voice(torch.randn(1, 6, generator=rng), torch.randn(1, 20, 10, generator=rng), token)
        for name, token in VOICES.items()
    }


@once
def ours(seed: int) -> OmniModel:
    model = OmniModel(OmniConfig.from_dict(values(seed)))
    theirs = reference(seed).state_dict()
    weights = {KEYS.from_hub(key): value for key, value in theirs.items() if not KEYS.is_derived(key)}
    missing, unexpected = model.load_state_dict(weights, strict=False)  # type: ignore[arg-type]
    assert not missing and all("audio_bos_eos_token" in key for key in unexpected)
    model.voices = voices()
    return model


def reference_speech(
    seed: int, inputs: dict[str, torch.Tensor], speaker: str, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Ids [B, T], codes and waveforms of each row, decoded from the noise that omni draws for ROW_SEEDS."""
    model, codes = reference(seed), []

    def noise(shape: list[int], **_: Any) -> torch.Tensor:
        return position_noise([stream_seed(ROW_SEEDS[len(codes) - 1], SOUND_STREAM)], 0, shape[1], shape[2])

    decode = model.token2wav.forward

    def watched(code: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        codes.append(code[0])
        return decode(code, *args, **kwargs) if code.shape[1] else torch.zeros(0)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", noise)
        patch.setattr(model.token2wav, "forward", watched)
        arguments = {
            "speaker": speaker,
            "thinker_max_new_tokens": TOKENS + 1,
            "thinker_eos_token_id": 258,
            "talker_do_sample": False,
            "talker_max_new_tokens": CODES,
            "talker_eos_token_id": [80, 82],
        }
        given = {f"thinker_{key}" if key.startswith("pixel") else key: value for key, value in inputs.items()}
        sequences, waves = model.generate(**given, **{**arguments, **changes})
    return sequences, codes, waves


def check(seed: int, inputs: dict[str, torch.Tensor], speaker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, codes, waves = reference_speech(seed, inputs, speaker, monkeypatch)
    out = ours(seed).generate(
        OmniInputs(**inputs),
        max_new_tokens=TOKENS,
        max_frames=CODES,
        speaker=speaker.upper(),
        audio_sampling=GREEDY,
        seed=ROW_SEEDS,
    )
    length = inputs["input_ids"].shape[1]
    for row, reply in enumerate(out.replies):
        assert reply == sequences[row, length : length + len(reply)].tolist()
        if reply[0] == 258:
            continue  # the reference speaks something for an empty reply
        assert out.codes[row][0].tolist() == codes[row].tolist()
        assert out.audio[row].shape == waves[row].shape
        if waves[row].numel():
            assert_close(out.audio[row], waves[row], 1e-4)
    spoken = [row for row, sound in enumerate(out.audio) if sound.numel()]
    assert spoken and all(out.audio[row].abs().max() > 0.01 for row in spoken)


@pytest.mark.parametrize("seed", SEEDS)
def test_text_codes_and_sound_of_a_batch_with_media(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(seed, prompts(seed), ("Eve", "bob")[seed % 2], monkeypatch)


@pytest.mark.parametrize("seed", SEEDS)
def test_text_codes_and_sound_of_conversations(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier turns and the system text are heard too, and the reply may end by itself."""
    rng = seeded(seed)

    def text(count: int) -> list[int]:
        return torch.randint(30, 250, (count,), generator=rng).tolist()

    def turn(role: int, count: int) -> list[int]:
        return [257, role, 10, *text(count), 258, 10]

    rows = [
        turn(276, 4) + turn(277, 3) + turn(278, 5) + turn(277, 2) + [257, 278, 10],
        [*turn(277, 6), 257, 278, 10, *text(2)],
    ]
    longest = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[256] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }
    check(seed, inputs, "Eve", monkeypatch)


def test_replies_that_end_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token that ends a reply is neither read nor spoken."""
    inputs = prompts(0)
    cut = reference_speech(0, inputs, "Eve", monkeypatch)[0]
    length = inputs["input_ids"].shape[1]
    end = int(cut[0, length + 2])
    sequences, codes, _ = reference_speech(0, inputs, "Eve", monkeypatch, thinker_eos_token_id=end)
    model = ours(0)
    model.generation_config = {"eos_token_id": end}
    try:
        out = model.generate(
            OmniInputs(**inputs), max_new_tokens=TOKENS, max_frames=CODES, speaker="eve", audio_sampling=GREEDY
        )
    finally:
        model.generation_config = {}
    assert out.replies[0][-1] == end and out.reason[0] in ("stop", "max_frames")
    for row, reply in enumerate(out.replies):
        assert reply == sequences[row, length : length + len(reply)].tolist()
        if len(reply) > 1:
            assert out.codes[row][0].tolist() == codes[row].tolist()
