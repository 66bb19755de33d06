"""Several answers to a prompt, the likelihood of their tokens, and what shapes the logits that they are drawn from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from build import BATCH, GREEDY, PLAIN, chat, sound_item
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni import OmniInputs, OmniModel, TextDelta
from omni.generation.graphs import GraphPool

WARM = {"temperature": 1.3, "top_k": 40, "repetition_penalty": 1.2}
END = 258


def log_probs(model: OmniModel, prompt: Tensor, reply: list[int]) -> Tensor:
    """fp32 [n, V] of the reply's tokens, from one pass over prompt int64 [T] and reply."""
    ids = torch.cat((prompt, torch.tensor(reply)))[None]
    with torch.no_grad():
        return model.forward(OmniInputs(input_ids=ids)).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


# ---- likelihoods ----


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("k", [0, 1, 4])
def test_log_probabilities_are_the_models_own(model: OmniModel, sampling: Any, k: int) -> None:
    inputs = model.processor(BATCH)
    out = model.generate(
        inputs, max_new_tokens=6, text_sampling=sampling, seed=4, logprobs=k, min_new_tokens=3, return_audio=False
    )
    for row, (reply, entries) in enumerate(zip(out.replies, out.logprobs)):
        own = log_probs(model, inputs.input_ids[row][inputs.attention_mask[row].bool()], reply)
        assert [entry.token_id for entry in entries] == reply
        for entry, token, all_of_them in zip(entries, reply, own):
            assert entry.logprob == pytest.approx(float(all_of_them[token]), abs=1e-4)
            values = [value for _, value in entry.top]
            assert len(entry.top) == k and values == sorted(values, reverse=True)
            assert values == pytest.approx(all_of_them.topk(k).values.tolist(), abs=1e-4)
            assert all(value == pytest.approx(float(all_of_them[i]), abs=1e-4) for i, value in entry.top)


def test_a_stream_has_the_log_probabilities_of_generate_and_nothing_else_changes(model: OmniModel) -> None:
    inputs, arguments = model.processor(BATCH), {"max_new_tokens": 5, "max_frames": 6, **PLAIN}
    plain, out = model.generate(inputs, **arguments), model.generate(inputs, logprobs=2, **arguments)
    assert plain.logprobs is None and plain.replies == out.replies
    assert all(torch.equal(a, b) for a, b in zip(plain.audio, out.audio))
    events = [event for event in model.stream(inputs, logprobs=2, **arguments) if isinstance(event, TextDelta)]
    for row in range(3):
        got = [entry for event in events if event.row == row for entry in event.logprobs]
        assert [e.token_id for e in got] == out.replies[row] and all(len(e.top) == 2 for e in got)
        assert [e.logprob for e in got] == pytest.approx([e.logprob for e in out.logprobs[row]], abs=1e-5)
        assert all(len(event.logprobs) == len(event.token_ids) for event in events)
    assert all(event.logprobs is None for event in model.stream(inputs, **arguments) if isinstance(event, TextDelta))


def test_the_name_is_public() -> None:
    import omni

    entry = omni.TokenLogprob(3, -0.5, ((3, -0.5),))
    assert (entry.token_id, entry.logprob, entry.top) == (3, -0.5, ((3, -0.5),)) and "TokenLogprob" in omni.__all__


# ---- several answers ----


@given(st.integers(1, 3), st.integers(1, 2), st.sampled_from(["one", "each", "all"]), st.integers(-3, 2**40))
@settings(max_examples=5)
def test_answers_equal_single_runs_with_their_seeds(
    model: OmniModel, n: int, prompts: int, how: str, seed: int
) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 4, "max_frames": 4, "text_sampling": WARM}
    seeds: Any = {"one": seed, "each": [seed + 5 * b for b in range(prompts)]}.get(how, [])
    expected = [s + j for s in ([seed] * prompts if how == "one" else seeds) for j in range(n)]
    if how == "all":
        seeds = expected = [seed + 7 * i for i in range(prompts * n)]
    out = model.generate(model.processor(BATCH[:prompts]), n=n, seed=seeds, **arguments)
    assert len(out.replies) == len(out.text) == len(out.audio) == len(out.sequences) == prompts * n
    for row, own in enumerate(expected):
        alone = model.generate(model.processor(BATCH[row // n]), seed=own, **arguments)
        assert out.replies[row] == alone.replies[0] and torch.equal(out.codes[row], alone.codes[0])
        assert out.text[row] == alone.text[0]


def test_a_prompt_is_read_once_for_all_of_its_answers(model: OmniModel) -> None:
    inputs = model.processor([[{"role": "user", "content": [sound_item(0.4), "what is it?"]}], chat("hi")])
    tokens: list[int] = []
    heard: list[int] = []
    hooks = [
        model.thinker.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[0] * args[0].shape[1])),
        model.audio_encoder.register_forward_pre_hook(lambda *_: heard.append(1)),
    ]
    try:
        out = model.generate(inputs, n=4, seed=1, text_sampling=WARM, max_new_tokens=3, max_frames=3)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(out.replies) == 8 and len({tuple(reply) for reply in out.replies}) > 2
    assert sum(heard) == 1 and sum(tokens) == inputs.input_ids.numel()
    assert out.sequences[:4, : inputs.input_ids.shape[1]].equal(inputs.input_ids[:1].expand(4, -1))


def test_arguments_for_prompts_and_for_answers(model: OmniModel) -> None:
    inputs, arguments = model.processor(BATCH[:2]), {"max_new_tokens": 3, "max_frames": 5, "seed": 3}
    by_prompt = model.generate(inputs, n=2, speaker=["ethan", "aiden"], text_sampling=[GREEDY, WARM], **arguments)
    voices, samplings = ["ethan", "ethan", "aiden", "aiden"], [GREEDY, GREEDY, WARM, WARM]
    by_answer = model.generate(inputs, n=2, speaker=voices, text_sampling=samplings, **arguments)
    assert by_prompt.replies == by_answer.replies
    assert all(torch.equal(a, b) for a, b in zip(by_prompt.codes, by_answer.codes))
    with pytest.raises(ValueError, match=r"speaker is a list of 3.*one value, 2 or 4"):
        model.generate(inputs, n=2, speaker=["ethan"] * 3)
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="n must be a whole number of at least 1"):
            model.generate(inputs, n=wrong)
    for many in (32769, 10**9, 10**30):
        with pytest.raises(ValueError, match=f"n {many} makes {2 * many} answers to 2 prompts .* limit of 65536"):
            model.generate(inputs, n=many)


def test_several_answers_stream_row_by_row(model: OmniModel) -> None:
    inputs, arguments = model.processor(BATCH[:2]), {"max_new_tokens": 4, "max_frames": 3, "seed": 3, "n": 2}
    whole = model.generate(inputs, text_sampling=WARM, **arguments)
    events = list(model.stream(inputs, text_sampling=WARM, **arguments))
    for row in range(4):
        mine = [event.token_ids for event in events if event.row == row and isinstance(event, TextDelta)]
        assert [token for ids in mine for token in ids] == whole.replies[row]


def test_without_a_seed_the_answers_to_a_prompt_differ(model: OmniModel) -> None:
    torch.manual_seed(3)
    first = model.generate(model.processor(chat("x")), n=4, text_sampling=WARM, max_new_tokens=6, return_audio=False)
    torch.manual_seed(3)
    again = model.generate(model.processor(chat("x")), n=4, text_sampling=WARM, max_new_tokens=6, return_audio=False)
    assert first.replies == again.replies and len({tuple(reply) for reply in first.replies}) > 1


# ---- a least length ----


def ends_at_once(_: Tensor, logits: Tensor) -> None:
    logits[END] = 1e3


def test_a_reply_has_its_least_length(model: OmniModel) -> None:
    inputs = model.processor(BATCH[:2])
    for least in (0, 1, 5):
        for sampling in (GREEDY, WARM):
            out = model.generate(
                inputs, max_new_tokens=9, min_new_tokens=least, logits_processor=ends_at_once, text_sampling=sampling,
                return_audio=False, seed=2,
            )  # fmt: skip
            assert [len(reply) for reply in out.replies] == [least + 1] * 2 and out.reason == ["stop"] * 2
            assert all(END not in reply[:-1] for reply in out.replies)
    own = model.generate(
        inputs, max_new_tokens=9, min_new_tokens=[2, 4], logits_processor=ends_at_once, return_audio=False
    )
    assert [len(reply) for reply in own.replies] == [3, 5]
    with pytest.raises(ValueError, match="min_new_tokens 10 is more than max_new_tokens 9"):
        model.generate(inputs, max_new_tokens=9, min_new_tokens=10)


def test_generation_config_may_say_the_least_length(model: OmniModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "generation_config", {"min_new_tokens": 3, "eos_token_id": [END, 256]})
    inputs, arguments = model.processor(chat("x")), {"logits_processor": ends_at_once, "return_audio": False}
    assert len(model.generate(inputs, max_new_tokens=9, **arguments).replies[0]) == 4
    assert len(model.generate(inputs, max_new_tokens=9, min_new_tokens=1, **arguments).replies[0]) == 2
    assert len(model.generate(inputs, max_new_tokens=2, **arguments).replies[0]) == 2  # a limit of the call wins
    monkeypatch.setattr(model, "generation_config", {"min_new_tokens": "3"})
    with pytest.raises(ValueError, match="min_new_tokens must be a whole number of at least 0, got '3'"):
        model.generate(inputs, **arguments)


# ---- a function of the logits ----


def test_a_function_may_change_the_logits(model: OmniModel) -> None:
    inputs, seen = model.processor(BATCH[:2]), []
    arguments: dict[str, Any] = {"max_new_tokens": 4, "return_audio": False}
    lengths = inputs.attention_mask.sum(1).tolist()
    plain = model.generate(inputs, **arguments)

    def watch(ids: Tensor, logits: Tensor) -> None:
        assert ids.dtype == torch.int64 and ids.dim() == 1 and logits.dtype == torch.float32 and logits.dim() == 1
        seen.append(ids.tolist())

    assert model.generate(inputs, logits_processor=watch, **arguments).replies == plain.replies
    for row, length in enumerate(lengths):
        prompt = inputs.input_ids[row, -length:].tolist()
        mine = sorted((ids for ids in seen if ids[:length] == prompt and len(ids) < length + 4), key=len)
        assert mine == [[*prompt, *plain.replies[row][:i]] for i in range(4)]

    def forbid(ids: Tensor, logits: Tensor) -> Tensor:
        return logits.index_fill(0, torch.tensor(plain.replies[0]), -math.inf)

    changed = model.generate(inputs, logits_processor=forbid, logprobs=1, **arguments)
    assert not {*changed.replies[0], *changed.replies[1]} & {*plain.replies[0]}
    own = log_probs(model, inputs.input_ids[0, -lengths[0] :], changed.replies[0])
    assert changed.logprobs[0][0].logprob == pytest.approx(float(own[0, changed.replies[0][0]]), abs=1e-4)
    assert changed.logprobs[0][0].top[0][0] == plain.replies[0][0]  # the model's own, before the function


def test_each_row_may_have_a_function_of_its_own(model: OmniModel) -> None:
    def only(token: int) -> Any:
        def force(_: Tensor, logits: Tensor) -> None:
            logits[token] = math.inf

        return force

    inputs = model.processor(BATCH)
    for sampling in (GREEDY, WARM):
        out = model.generate(
            inputs, max_new_tokens=2, logits_processor=[only(70), None, only(71)], text_sampling=sampling, seed=1,
            return_audio=False,
        )  # fmt: skip
        alone = model.generate(
            model.processor(BATCH[1]), max_new_tokens=2, text_sampling=sampling, seed=1, return_audio=False
        )
        assert [out.replies[0], out.replies[2]] == [[70, 70], [71, 71]] and out.replies[1] == alone.replies[0]


class Oops(Exception):
    pass


def test_what_goes_wrong_in_a_function_of_the_logits(model: OmniModel) -> None:
    def fail(ids: Tensor, logits: Tensor) -> Tensor:
        raise Oops("mine")

    wrong: list[tuple[Any, type[Exception], str]] = [
        (fail, Oops, "mine"),
        (lambda ids, logits: logits[:-1], ValueError, r"logits_processor returned \[639\].*\[640\]"),
        (lambda ids, logits: logits[None], ValueError, r"\[1, 640\]"),
        (lambda ids, logits: [0.0] * 640, TypeError, "logits_processor must return a tensor or None, got list"),
        (lambda ids, logits: logits * math.nan, ValueError, "NaN"),
        (lambda ids, logits: torch.full_like(logits, -math.inf), ValueError, "nothing to draw"),
        (3, TypeError, "logits_processor must be a function"),
    ]
    for function, kind, message in wrong:
        with pytest.raises(kind, match=message):
            model.generate(model.processor(chat("x")), max_new_tokens=2, logits_processor=function)
        with pytest.raises(kind, match=message):
            list(model.stream(model.processor(chat("x")), max_new_tokens=2, logits_processor=function))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 641}, r"logprobs 641.*640"),
        ({"logprobs": 1.0}, "logprobs"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_new_tokens": [1, 2]}, "list of 2 for a batch of 1"),
    ],
)
def test_impossible_options(model: OmniModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(model.processor(chat("x")), **arguments)


# ---- all of it together ----


def test_a_batch_of_mixed_options_equals_its_rows_also_captured(model: OmniModel) -> None:
    def shy(ids: Tensor, logits: Tensor) -> None:
        logits[: len(ids)] -= 3.0

    options: list[dict[str, Any]] = [
        {"stop": ["e", "a"], "min_new_tokens": 2, "logits_processor": None, "text_sampling": WARM},
        {"stop": None, "min_new_tokens": 0, "logits_processor": shy, "text_sampling": GREEDY},
        {"stop": ["\n"], "min_new_tokens": 6, "logits_processor": ends_at_once, "text_sampling": WARM},
    ]
    same: dict[str, Any] = {"max_new_tokens": 8, "max_frames": 8, "logprobs": 1, "seed": 3}
    together = {name: [row[name] for row in options] for name in options[0]}
    inputs = model.processor(BATCH)
    out = model.generate(inputs, **together, **same)
    model.graphs = GraphPool(capture=lambda step: step)
    try:
        captured = model.generate(inputs, **together, **same)
    finally:
        model.graphs = None
    for row, own in enumerate(options):
        alone = model.generate(model.processor(BATCH[row]), **own, **same)
        for other in (out, captured):
            assert alone.replies[0] == other.replies[row] and alone.text[0] == other.text[row]
            assert alone.reason[0] == other.reason[row] and torch.equal(alone.codes[0], other.codes[row])
            values = [[entry.logprob for entry in entries] for entries in (alone.logprobs[0], other.logprobs[row])]
            assert values[0] == pytest.approx(values[1], abs=1e-4)
