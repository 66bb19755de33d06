"""Where the reference is wrong or limited: ours is right, and the difference is written down here."""

from __future__ import annotations

import pytest
import torch
from build import seeded
from oracle import Conversation, assert_close, batch, converted_model, reference_model
from test_parity_generate import GREEDY, captured_codes, ours_generate, reference_generate

from omni import OmniInputs, SamplingConfig
from omni.generation.prompt import encode_prompt


@pytest.mark.parametrize("name", ["tiny", "one_tap", "odd_depth", "many_codes"])
@pytest.mark.parametrize("items", [("av",), ("text", "av", "image"), ("audio_clip", "av", "text", "av")])
def test_sound_of_videos_in_the_talker(name: str, items: tuple[str, ...]) -> None:
    """The reference forgets `use_audio_in_video` on the way to its Talker; told again, it agrees with ours."""
    inputs = batch([Conversation(name, 3).user(*items).ask()])
    ours = ours_generate(name, inputs)
    arguments = {"use_audio_in_video": True, "thinker_max_new_tokens": 10, "talker_use_audio_in_video": True}
    sequences, codes, wave = captured_codes(name, inputs, **arguments)
    assert ours.reason == ["max_new_tokens"]
    assert torch.equal(ours.sequences, sequences[:, :-1])
    assert torch.equal(ours.codes[0], codes[0])
    assert_close(ours.audio[0], wave.flatten())


def test_reference_misplaces_the_sound_of_videos_in_its_talker() -> None:
    model = reference_model()
    conversation = Conversation("tiny", 3).user("av").ask()
    inputs = batch([conversation])
    seen = []
    original = model.talker.get_rope_index
    model.talker.get_rope_index = lambda *a, **k: seen.append(original(*a, **k)) or seen[-1]
    try:
        for told in ({}, {"talker_use_audio_in_video": True}):
            reference_generate("tiny", inputs, use_audio_in_video=True, **told)
    finally:
        del model.talker.get_rope_index
    forgotten, told_positions = seen[0][0], seen[-1][0]
    assert not torch.equal(forgotten, told_positions)


def test_picture_and_sound_together_crash_the_reference_as_shipped() -> None:
    model = reference_model()
    inputs = batch([Conversation("tiny", 1).user("image", "audio_clip").ask()])
    lent = model.talker.config.__dict__.pop("audio_config")
    try:
        with pytest.raises(AttributeError, match="audio_config"):
            reference_generate("tiny", inputs)
    finally:
        model.talker.config.audio_config = lent
    assert ours_generate("tiny", inputs).audio[0].numel() > 0


def test_the_last_token_of_a_cut_reply_is_spoken() -> None:
    inputs = batch([Conversation("tiny", 5).user("text").ask()])
    ours = ours_generate("tiny", inputs, max_new_tokens=4)
    _, same_limit, _ = captured_codes("tiny", inputs, thinker_max_new_tokens=4)
    _, one_more, _ = captured_codes("tiny", inputs, thinker_max_new_tokens=5)
    assert torch.equal(ours.codes[0], one_more[0])
    assert not torch.equal(ours.codes[0], same_limit[0])


def stopping_pair() -> tuple[list[Conversation], int]:
    """Two prompts of unequal length and a stop id that ends the second one's reply early and not the first one's."""
    conversations = [
        Conversation("tiny", 21).user("text", "text", "text").ask(),
        Conversation("tiny", 7).user("text").ask(),
    ]
    replies = [
        ours_generate("tiny", batch([c]), return_audio=False, max_new_tokens=10).replies[0] for c in conversations
    ]
    stop = next(t for i, t in enumerate(replies[1]) if 2 <= i <= 5 and t not in replies[1][:i] and t not in replies[0])
    return conversations, stop


def test_batches_of_the_reference_change_their_rows() -> None:
    """Its end marker comes one entry late in rows that end early, and padding lifts codes out of the penalty."""
    conversations, stop = stopping_pair()
    together = batch(conversations)
    arguments = {"thinker_eos_token_id": stop, "thinker_max_new_tokens": 8, "talker_max_new_tokens": 20}
    _, codes, _ = captured_codes("tiny", together, **arguments)
    _, alone, _ = captured_codes("tiny", batch(conversations[1:]), **arguments)
    shared = min(codes.shape[2], alone.shape[2])
    assert not torch.equal(codes[1, :, :shared], alone[0, :, :shared])

    model = converted_model("tiny")
    model.generation_config = {"eos_token_id": stop}
    try:
        ours = ours_generate("tiny", together, max_new_tokens=8, max_frames=19)
    finally:
        model.generation_config = {}
    assert ours.replies[1][-1] == stop
    assert torch.equal(ours.codes[1][:, :shared], alone[0, :, :shared])


def test_a_reply_that_stops_is_spoken_without_its_stop_id() -> None:
    conversations, stop = stopping_pair()
    inputs = batch(conversations[1:])
    model = converted_model("tiny")
    model.generation_config = {"eos_token_id": [stop]}
    try:
        ours = ours_generate("tiny", inputs, max_new_tokens=30)
    finally:
        model.generation_config = {}
    sequences, codes, wave = captured_codes("tiny", inputs, thinker_eos_token_id=stop, thinker_max_new_tokens=30)
    assert ours.reason == ["max_frames"] and torch.equal(ours.sequences, sequences)
    assert torch.equal(ours.codes[0], codes[0])
    assert_close(ours.audio[0], wave.flatten())


def test_seams_of_chunked_decoding() -> None:
    """The reference decodes 300 frames at a time and loses 555 samples at each seam; ours loses them once."""
    codes = torch.randint(0, 64, (1, 4, 310), generator=seeded(0))
    with torch.no_grad():
        chunked = reference_model().code2wav.chunked_decode(codes, 300, 25).flatten()
        whole = reference_model().code2wav(codes).flatten()
        ours = converted_model().code2wav(codes)[0]
    assert whole.numel() - chunked.numel() == 555
    assert_close(ours, whole)


def test_a_prompt_without_a_user_turn_crashes_only_the_reference() -> None:
    inputs = batch([Conversation("tiny", 2).system().ask()])
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        reference_generate("tiny", inputs)
    assert ours_generate("tiny", inputs).codes[0].shape[1] > 0


def test_one_token_and_one_frame_crash_only_the_reference() -> None:
    inputs = batch([Conversation("tiny", 2).user("text").ask()])
    for arguments in ({"thinker_max_new_tokens": 1}, {"talker_max_new_tokens": 1}):
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            reference_generate("tiny", inputs, **arguments)
    assert ours_generate("tiny", inputs, max_new_tokens=1).codes[0].shape[1] > 0
    assert ours_generate("tiny", inputs, max_frames=1).codes[0].shape[1] == 1


def test_residual_sampling_is_an_argument_here() -> None:
    inputs = OmniInputs(**batch([Conversation("tiny", 2).user("text").ask()]))
    arguments = {"max_new_tokens": 3, "max_frames": 6, "audio_sampling": GREEDY, "seed": 0}
    wild = SamplingConfig(temperature=5.0)
    a, b = (converted_model().generate(inputs, residual_sampling=r, **arguments).codes[0] for r in (GREEDY, wild))
    assert torch.equal(a[0, :1], b[0, :1]) and not torch.equal(a, b)


@torch.no_grad()
def test_interleaved_conversations_mix_in_the_reference() -> None:
    """Its Thinker keeps the position offset of the last prompt on the module; here it lies in each row's state."""
    reference, ours = reference_model().thinker, converted_model()
    prompts = [
        batch([Conversation("tiny", seed).user(item, "text").ask()]) for seed, item in ((1, "image"), (9, "video"))
    ]
    token = torch.tensor([[65]])

    def step(cache: object) -> torch.Tensor:
        return reference(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]

    alone = step(reference(**prompts[0], use_cache=True).past_key_values)
    cache = reference(**prompts[0], use_cache=True).past_key_values
    reference(**prompts[1], use_cache=True)  # another conversation begins
    mixed = step(cache)
    assert (mixed - alone).abs().max() > 1e-3

    states = []
    for inputs in prompts:
        prompt = encode_prompt(ours, OmniInputs(**inputs))
        state = ours.thinker.init_state(1)
        ours.thinker(prompt.embeds, prompt.positions, state, taps=prompt.taps)
        state.next_position = prompt.next_position
        states.append(state)
    assert_close(ours.thinker.step(token[0], states[0]), alone)
