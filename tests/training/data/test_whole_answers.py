"""Answers are learnt whole: reasoning that a template drops is written, and what it loses otherwise is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from build import chat, sound_item, tiny_config, write_processor

from omni.packaged.toy import toy_processor
from omni.processing.processor import OmniProcessor
from omni.processing.template import ChatTokenizer
from omni.training.data.conversation_samples import SampleMaker
from omni.training.data.manifest import Answer, Row, Voice
from omni.training.data.samples import IGNORED, Pair, Sample

CONFIG = tiny_config()
# After the release with reasoning: the last question is looked for among contents that are strings, and reasoning
# stands in answers after it alone.
THINKING = """
{%- set ns = namespace(asked=messages | length - 1, open=true) -%}
{%- for message in messages[::-1] -%}
{%- if ns.open and message.role == 'user' and message.content is string -%}
{%- set ns.open = false -%}{%- set ns.asked = messages | length - 1 - loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set text = namespace(all='') -%}
{%- if message.content is string -%}{%- set text.all = message.content -%}{%- else -%}
{%- for item in message.content -%}
{%- set text.all = text.all + (item.text if item.type == 'text' else '<|audio_start|><|audio_pad|><|audio_end|>') -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' -%}
{%- set reasoning = message.reasoning_content or '' -%}
{%- if not reasoning and '</think>' in text.all -%}
{%- set reasoning = text.all.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set text.all = text.all.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if loop.index0 > ns.asked and (loop.last or reasoning) -%}
{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + text.all.lstrip('\\n') -}}
{%- else -%}{{- text.all -}}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' -}}
{%- endfor -%}
{%- else -%}{{- text.all -}}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
"""


def processor_with(template: str) -> OmniProcessor:
    processor = toy_processor()
    processor.chat = ChatTokenizer(processor.tokenizer, template)
    return processor


@pytest.fixture(scope="module")
def thinking() -> OmniProcessor:
    return processor_with(THINKING)


def row(*messages: dict[str, Any], **options: Any) -> Row:
    return Row(list(messages), [Voice()] * sum(m["role"] == "assistant" for m in messages), **options)


def reply(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def learnt(processor: OmniProcessor, given: Row, **options: Any) -> list[str]:
    sample = SampleMaker(processor, CONFIG, **options)(given)
    assert isinstance(sample, Sample)
    return spans(processor, sample)


def spans(processor: OmniProcessor, sample: Sample) -> list[str]:
    stretches: list[list[int]] = [[]]
    for label in sample.labels.tolist():
        if label != IGNORED:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [processor.decode(ids, skip_special_tokens=False) for ids in stretches if ids]


WHOLE = "<think>\nhm, so\n</think>\n\nBird<|im_end|>"
WRITTEN = [
    reply("<think>\nhm, so\n</think>\n\nBird"),
    reply("<think>hm, so</think>Bird"),
    reply("hm, so\n</think>\n\nBird"),
    reply("Bird", reasoning_content="hm, so"),
    reply("\n\nBird", reasoning_content="\nhm, so\n"),
    reply([{"type": "text", "text": "<think>\nhm, so\n</think>\n\nBird"}]),
    reply([{"type": "text", "text": "\n\nBird"}], reasoning_content="hm, so"),
]


@pytest.mark.parametrize("answer", WRITTEN)
def test_a_sound_question_learns_the_reasoning_that_a_text_question_learns(
    thinking: OmniProcessor, answer: dict[str, Any]
) -> None:
    typed = SampleMaker(thinking, CONFIG)(row(chat("what?", "")[0], answer))
    heard = SampleMaker(thinking, CONFIG)(row(chat([sound_item(0.3)], "")[0], answer))
    assert isinstance(typed, Sample) and isinstance(heard, Sample)
    assert spans(thinking, heard) == spans(thinking, typed) == [WHOLE]
    assert torch.equal(heard.labels[heard.labels != IGNORED], typed.labels[typed.labels != IGNORED])
    assert heard.labels.shape == heard.inputs.input_ids[0].shape == heard.inputs.attention_mask[0].shape
    kept = heard.labels != IGNORED
    assert torch.equal(heard.inputs.input_ids[0][kept], heard.labels[kept])


def test_earlier_answers_that_are_learnt_keep_their_reasoning() -> None:
    """The packaged template drops it too, before the last question."""
    messages = [*chat("one?", "<think>a</think>\n\n1"), *chat("two?", "<think>b</think>\n\n2")]
    processor = toy_processor()
    assert learnt(processor, row(*messages)) == [
        f"<think>\n{thought}\n</think>\n\n{answer}<|im_end|>" for thought, answer in (("a", "1"), ("b", "2"))
    ]
    assert learnt(processor, row(*messages), loss_on="last") == ["<think>\nb\n</think>\n\n2<|im_end|>"]
    text = processor.decode(SampleMaker(processor, CONFIG, loss_on="last")(row(*messages)).inputs.input_ids[0])  # type: ignore[union-attr]
    assert "1" in text and "a\n</think>" not in text  # what is read, not learnt, is as the template has it


def test_an_answer_that_repeats_its_reasoning(thinking: OmniProcessor) -> None:
    given = row(chat([sound_item(0.3)], "")[0], reply("4", reasoning_content="4"))
    assert learnt(thinking, given) == ["<think>\n4\n</think>\n\n4<|im_end|>"]


def test_an_empty_block_gives_way() -> None:
    template = THINKING.replace("message.reasoning_content or ''", "''").replace("'</think>' in text.all", "false")
    template = template.replace("loop.index0 > ns.asked and (loop.last or reasoning)", "true")
    given = row(chat("what?", "")[0], reply("Bird", reasoning_content="hm, so"))
    assert learnt(processor_with(template), given) == [WHOLE]


def test_both_answers_of_a_pair_are_whole(thinking: OmniProcessor) -> None:
    messages = [chat([sound_item(0.3)], "")[0], reply("Bird", reasoning_content="hm, so")]
    given = row(*messages, rejected=Answer("<think>\nno\n</think>\n\nFish", Voice()))
    pair = SampleMaker(thinking, CONFIG)(given)
    assert isinstance(pair, Pair)
    assert spans(thinking, pair.chosen) == [WHOLE]
    assert spans(thinking, pair.rejected) == ["<think>\nno\n</think>\n\nFish<|im_end|>"]


def test_reasoning_is_not_spoken(thinking: OmniProcessor) -> None:
    voices = [Voice(codes=[[1, 2]] * 4)]
    given = replace(row(chat([sound_item(0.3)], "")[0], reply("Bird", reasoning_content="hm")), voices=voices)
    sample = SampleMaker(thinking, CONFIG)(given)
    assert isinstance(sample, Sample) and thinking.decode(sample.speech[0].ids) == "Bird"
    ids = sample.inputs.input_ids[0].tolist()
    assert ids[sample.speech[0].header] == CONFIG.im_start_token_id


def test_calls_follow_the_reasoning(thinking: OmniProcessor) -> None:
    call = {"function": {"name": "look", "arguments": {"at": "the <sky>"}}}
    given = row(chat([sound_item(0.3)], "")[0], reply("", reasoning_content="hm", tool_calls=[call]))
    assert learnt(thinking, given) == [
        '<think>\nhm\n</think>\n\n\n<tool_call>\n{"name": "look", "arguments": {"at": "the <sky>"}}\n</tool_call>'
        "<|im_end|>"
    ]


def test_reasoning_counts_for_the_length(thinking: OmniProcessor) -> None:
    given = row(chat([sound_item(0.3)], "")[0], reply("Bird", reasoning_content="hm " * 50))
    make = SampleMaker(thinking, CONFIG, max_tokens=100)
    with pytest.raises(Exception, match="more than 100 tokens"):
        make(given)


# ---- the same text, written in another way ----


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "\n\nBird"}],
        ["\n\nBird"],
        [{"type": "text", "text": "\n\n"}, {"type": "text", "text": "Bird"}],
        [" \n", "\nBi", "rd"],
    ],
)
def test_items_of_text_are_the_text(content: Any) -> None:
    processor = toy_processor()
    make = SampleMaker(processor, CONFIG)
    expected = make(row(*chat("what?", "\n\nBird")))
    given = make(row(*chat("what?", content)))
    assert isinstance(expected, Sample) and isinstance(given, Sample)
    assert torch.equal(given.inputs.input_ids, expected.inputs.input_ids) and torch.equal(given.labels, expected.labels)


# ---- what a template loses otherwise ----

LOSSES = {
    "cut": ("{{- text.all -}}{%- endif -%}\n{%- for call", "{{- text.all[:3] -}}{%- endif -%}\n{%- for call"),
    "in capitals": (
        "{{- text.all -}}{%- endif -%}\n{%- for call",
        "{{- text.all | upper -}}{%- endif -%}\n{%- for call",
    ),
    "left out": ("{{- text.all -}}{%- endif -%}\n{%- for call", "{%- endif -%}\n{%- for call"),
}


@pytest.mark.parametrize("change", ["cut", "in capitals", "left out"])
def test_a_changed_answer_is_named(change: str) -> None:
    old, new = LOSSES[change]
    processor = processor_with(THINKING.replace(old, str(new)))
    with pytest.raises(ValueError, match=r"the chat template wrote .* for an answer that says 'Birds of a feather'"):
        learnt(processor, row(*chat([sound_item(0.3)], "Birds of a feather")))


@pytest.mark.parametrize("lost", ["name", "arguments"])
def test_a_lost_call_is_named(tmp_path: Path, lost: str) -> None:
    call = {"function": {"name": "look", "arguments": {"at": "sky"}}}
    template = THINKING.replace("call.function.name" if lost == "name" else "(call.function.arguments | tojson)", "''")
    with pytest.raises(ValueError, match="of a tool call out"):
        learnt(processor_with(template), row(chat("q", "")[0], reply("", tool_calls=[call])))
    if lost == "name":  # a released template that knows no tools
        second = OmniProcessor.from_pretrained(write_processor(tmp_path / "files"))
        processor = processor_with(second.chat.template)
        with pytest.raises(ValueError, match="'look' of a tool call out"):
            learnt(processor, row(chat("q", "")[0], reply("", tool_calls=[call])))


def test_templates_that_trim_and_normalise_lose_nothing(thinking: OmniProcessor) -> None:
    template = THINKING.replace(
        "{{- text.all -}}{%- endif -%}\n{%- for call", "{{- text.all | trim -}}{%- endif -%}\n{%- for call"
    )
    given = row(*chat([sound_item(0.3)], "  Bird \n\n of a <|im_end|> kind \n"))
    assert learnt(processor_with(template), given) == ["Bird \n\n of a <|im_end|> kind<|im_end|>"]
