"""What a message would cost is known before it is paid: text, tool calls, pictures, films; templates are bounded."""

from __future__ import annotations

import time
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import TOY_DATA, chat, tone

from omni import OmniModel, OmniSession
from omni.processing.processor import OmniProcessor
from omni.processing.template import ChatTokenizer

PROCESSOR = OmniProcessor.from_pretrained(TOY_DATA)
POSITIONS = 8192  # of the toy
FRAMES = np.zeros((64, 64, 64, 3), np.uint8)


@pytest.fixture
def without_config(tmp_path: Path) -> OmniProcessor:
    PROCESSOR.save_pretrained(tmp_path)
    return OmniProcessor.from_pretrained(tmp_path)


# ---- text ----


@pytest.mark.parametrize("character", [" ", "a", "\n", "é", "😀", "<|im_end|>"])
@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
def test_a_huge_text_is_refused_before_it_is_tokenised(character: str, role: str) -> None:
    text = character * (3_000_000 // len(character))
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"at least [\d,]+ tokens .*positions for 8,192; shorten.*allow_long=True"):
            PROCESSOR([{"role": role, "content": text}])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30_000_000 and time.process_time() - began < 5


def test_a_long_text_is_taken_up_to_the_last_position() -> None:
    frame = PROCESSOR(chat("")).input_ids.shape[1]
    room = POSITIONS - frame
    assert PROCESSOR(chat("7" * room)).input_ids.shape[1] == POSITIONS
    with pytest.raises(ValueError, match="8,193 tokens"):
        PROCESSOR(chat("7" * (room + 1)))
    with pytest.warns(UserWarning, match="8,193 tokens") as warned:
        assert PROCESSOR(chat("7" * (room + 1)), allow_long=True).input_ids.shape[1] == POSITIONS + 1
    assert warned[0].filename == __file__ and len(warned) == 1
    batch = [chat("7" * room), chat("7" * room)]
    assert PROCESSOR(batch).input_ids.shape == (2, POSITIONS)  # each row has the positions for itself


def test_a_huge_text_for_a_session_or_to_speak(model: OmniModel) -> None:
    session = OmniSession(model)
    began = time.process_time()
    for give in (session.push_text, lambda text: model.speak(text, max_frames=2)):
        for text in (" " * 3_000_000, "abc " * 900_000):
            with pytest.raises(ValueError, match=r"at least [\d,]+ tokens .*shorten it"):
                give(text)
    assert time.process_time() - began < 5
    session.push_text("hi")
    assert list(session.respond(max_new_tokens=1, return_audio=False))


def test_without_a_config_there_is_a_stated_limit(without_config: OmniProcessor) -> None:
    from omni.processing.token_budget import USUAL_POSITIONS

    assert without_config(chat("7" * (POSITIONS + 1))).input_ids.shape[1] > POSITIONS
    with pytest.raises(ValueError, match=rf"config.json does not name the model's positions is {USUAL_POSITIONS:,}"):
        without_config(chat("7" * (USUAL_POSITIONS + 1)))


def test_a_panic_of_the_tokenizer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    class Panicking:
        def encode(self, *_: Any, **__: Any) -> None:
            raise PanicException("called `Result::unwrap()` on an `Err` value")

    monkeypatch.setattr(PROCESSOR.chat.vocabulary, "_tokenizer", lambda mark: Panicking())
    with pytest.raises(ValueError, match="text of 3 characters cannot be tokenised"):
        PROCESSOR.encode_text("abc")


# ---- nesting ----


def nested(depth: int, kind: type = dict) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = {"a": value} if kind is dict else [value]
    return value


@pytest.mark.parametrize("depth", [101, 900, 5000, 100_000])
@pytest.mark.parametrize("kind", [dict, list])
def test_deep_arguments_and_schemas(depth: int, kind: type) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": nested(depth, kind)}}}]}
    with pytest.raises(ValueError, match="JSON cannot express: more than 100"):
        PROCESSOR([*chat("a"), call])
    with pytest.raises(ValueError, match="JSON cannot express: more than 100"):
        PROCESSOR(chat("a"), tools=[{"name": "f", "parameters": nested(depth, kind)}])


def test_arguments_of_a_sane_depth_are_written() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": nested(60)}}]}
    assert PROCESSOR.decode(PROCESSOR([*chat("a"), call]).input_ids[0]).count('{"a": ') == 60


# ---- media ----


@pytest.mark.parametrize(
    "item",
    [
        {"video": FRAMES, "min_pixels": 16384 * 32 * 32},
        {"video": list(FRAMES[:20]), "min_pixels": 4096 * 32 * 32},
        {"image": FRAMES[0], "min_pixels": 16384 * 32 * 32},
        {"video": FRAMES.repeat(12, 0), "max_frames": 768},
    ],
)
def test_pictures_are_refused_before_they_are_enlarged(item: dict[str, Any]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"tokens .* of (video|image) .*positions for 8,192.*max_pixels"):
            PROCESSOR(chat([item]))
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()


def test_sounds_and_several_media_count_together() -> None:
    minutes = tone(300.0)
    one = PROCESSOR(chat([{"audio": minutes}])).input_ids.shape[1]
    with pytest.raises(ValueError, match=r"tokens .* of audio"):
        PROCESSOR(chat([{"audio": minutes}] * (POSITIONS // one + 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PROCESSOR([chat([{"audio": minutes}]) for _ in range(3)])


# ---- templates ----


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for a in range(9999) recursive %}{{ loop(range(9999)) if loop.depth < 9 }}{% endfor %}",
        "{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ [1] * 10**10 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 9999999999) }}",
        "{{ 'x'.ljust(9999999999) }}",
        "{{ 'x' | center(9999999999) }}",
        "{{ 'x' | indent(9999999999) }}",
        "{{ [1] | batch(9999999999, 0) | list }}",
        "{{ [1] | tojson(indent=9999999999) }}",
        "{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = n.x.replace('x', 'xx') %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = [n.x, n.x] | join %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = [n.x] * 2 %}{% endfor %}{{ n.x | tojson }}",
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else '' }}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_templates_that_loop_or_grow(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni.processing.sandbox.MAX_STEPS", 3_000)
    processor = OmniProcessor.from_pretrained(TOY_DATA)
    processor.chat = ChatTokenizer(processor.tokenizer, template)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="the chat template cannot write these messages"):
            processor(chat("a"))
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("print_it", ["{{ n.x }}", "{{ 'x' ~ n.x }}", "{{ '{}'.format(n.x) }}", "{{ n.x | pprint }}"])
@pytest.mark.parametrize(
    "double",
    [
        "[n.x, n.x]",
        "(n.x, n.x)",
        "{'a': n.x, 'b': n.x}",
        "[n.x] * 2",
        "dict(a=n.x, b=n.x)",
        "[n.x] | batch(2, n.x) | list",
        "[{'a': n.x, 'b': n.x}.items()]",
    ],
)
def test_lists_that_hold_each_other_are_not_printed_for_ever(double: str, print_it: str) -> None:
    processor = OmniProcessor.from_pretrained(TOY_DATA)
    many = "{% set n = namespace(x=1) %}{% for a in range(50) %}{% set n.x = " + double + " %}{% endfor %}"
    processor.chat = ChatTokenizer(processor.tokenizer, many + print_it)
    with pytest.raises(ValueError, match="it writes more than the limit"):
        processor(chat("a"))
    processor.chat = ChatTokenizer(processor.tokenizer, many.replace("50", "3") + print_it)
    assert processor(chat("a")).input_ids.numel() > 0


def test_variables_that_hold_each_other_are_not_printed_for_ever() -> None:
    template = "{% set n = namespace(x=1) %}{% for a in range(50) %}{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}"
    processor = OmniProcessor.from_pretrained(TOY_DATA)
    processor.chat = ChatTokenizer(processor.tokenizer, template + "{{ n.x }}")
    assert processor.decode(processor(chat("a")).input_ids[0]) == "<namespace>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ range(10**9) | list }}",
        "{{ lipsum(n=99999) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content.encode() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for",
        "{{ nothing.at.all }}",
        "{{ 1 // 0 }}",
    ],
)
def test_templates_that_reach_out_or_fail(template: str) -> None:
    processor = OmniProcessor.from_pretrained(TOY_DATA)
    processor.chat = ChatTokenizer(processor.tokenizer, template)
    with pytest.raises(ValueError, match="the chat template cannot write these messages"):
        processor(chat("a"))


def test_templates_have_what_transformers_gives_them() -> None:
    template = (
        "{% generation %}{{ eos_token }}{% endgeneration %}{% for m in messages %}{% if loop.index > 1 %}"
        "{% break %}{% endif %}{{ dict(a=1) | tojson }}{% endfor %}{{ strftime_now('%Y') | length }}"
        "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ bos_token is defined }}\n"
        "{% if true %}\n  x\n{% endif %}\n"
    )
    processor = OmniProcessor.from_pretrained(TOY_DATA)
    processor.chat = ChatTokenizer(processor.tokenizer, template)
    ids = processor(chat("a", "b")).input_ids[0]
    want = processor.tokenizer.apply_chat_template(
        chat("a", "b"), chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert processor.decode(ids, skip_special_tokens=False) == want
    assert '{"a": 1}' in want


def test_a_misspelt_option_names_the_nearest() -> None:
    with pytest.raises(
        TypeError, match=r"OmniProcessor has no argument 'add_generation_promt'.*'add_generation_prompt'"
    ):
        PROCESSOR(chat("a"), add_generation_promt=False)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"no argument 'max_pixel'.*'max_pixels'"):
        PROCESSOR(chat("a"), max_pixel=5)  # type: ignore[call-arg]
