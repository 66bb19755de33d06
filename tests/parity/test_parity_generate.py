"""Forward and greedy generation, end to end, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import VARIANTS, Conversation, assert_close, batch, converted_model, reference_model

from omni import OmniInputs, SamplingConfig

GREEDY = SamplingConfig(temperature=0)
GREEDY_CODES = SamplingConfig(temperature=0, repetition_penalty=1.05)


def reference_generate(name: str, inputs: dict[str, torch.Tensor], **changes: Any) -> tuple[torch.Tensor, Any]:
    arguments = {
        "thinker_max_new_tokens": 9,
        "thinker_eos_token_id": 258,
        "talker_max_new_tokens": 9,
        "talker_do_sample": False,
        "thinker_do_sample": False,
        "speaker": "chelsie",
    }
    torch.manual_seed(0)
    return reference_model(name).generate(**inputs, **{**arguments, **changes})


def ours_generate(name: str, inputs: dict[str, torch.Tensor], **changes: Any) -> Any:
    arguments = {
        "max_new_tokens": 9,
        "max_frames": 8,  # N tokens of the reference's Talker give N - 1 frames
        "speaker": "Chelsie",
        "audio_sampling": GREEDY_CODES,
        "residual_sampling": GREEDY,
    }
    return converted_model(name).generate(OmniInputs(**inputs), **{**arguments, **changes})


def captured_codes(name: str, inputs: dict[str, torch.Tensor], **changes: Any) -> tuple[Any, torch.Tensor, Any]:
    """The reference's sequences, the codes it gives to Code2Wav, and its waveforms."""
    model = reference_model(name)
    seen = []
    original = model.code2wav.chunked_decode
    model.code2wav.chunked_decode = lambda codes, **kw: seen.append(codes) or original(codes, **kw)
    try:
        sequences, wave = reference_generate(name, inputs, **changes)
    finally:
        del model.code2wav.chunked_decode
    return sequences, seen[0], wave


LAYOUTS = {
    "text": lambda c: c.user("text").ask(),
    "audio": lambda c: c.user("audio_clip", "text").ask(),
    "image": lambda c: c.system().user("text", "image", "text").ask(),
    "mixed": lambda c: c.user("text", "image", "audio_clip", "video").ask(),
    "turns": lambda c: c.system().user("image", "text").assistant("text").user("audio_clip", "text").ask(),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_hidden_states(name: str) -> None:
    """Thinker logits and the accepted hidden states with all media in one left-padded batch."""
    conversations = [
        Conversation(name, 1).user("text", "image", "audio_clip").ask(),
        Conversation(name, 2).system().user("video", "text").ask(),
    ]
    inputs = batch(conversations)
    with torch.no_grad():
        expected = reference_model(name).thinker(**inputs, output_hidden_states=True)
        ours = converted_model(name).forward(OmniInputs(**inputs))
    layer = converted_model(name).config.talker_config.accept_hidden_layer
    valid = inputs["attention_mask"].bool()
    assert_close(ours.logits[valid], expected.logits[valid])
    assert_close(ours.hidden[valid], expected.hidden_states[layer][valid])
    assert (ours.logits[~valid] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_reply_in_text_and_speech(name: str, layout: str) -> None:
    inputs = batch([LAYOUTS[layout](Conversation(name, 11))])
    ours = ours_generate(name, inputs)
    # the reference never speaks the last token of a reply that the limit cuts: it gets one token more
    cut = ours.reason[0] == "max_new_tokens"
    sequences, codes, wave = captured_codes(name, inputs, thinker_max_new_tokens=10 if cut else 9)
    assert torch.equal(ours.sequences, sequences[:, : ours.sequences.shape[1]])
    assert torch.equal(ours.codes[0], codes[0])
    assert ours.audio[0].shape == wave.flatten().shape
    assert (wave.abs() < 1).float().mean() > 0.5
    assert_close(ours.audio[0], wave.flatten())
