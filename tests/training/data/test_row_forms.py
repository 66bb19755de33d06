"""Rows as other trainers and data sets write them: one example of each form, and what becomes of changed ones."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from build import chat, tiny_config, write_rows

from omni.packaged.toy import toy_processor
from omni.training.data.batches import Batches
from omni.training.data.conversation_samples import SampleMaker
from omni.training.data.manifest import Manifest, Row, Voice, read_row
from omni.training.data.mixture import Mixture
from omni.training.data.row_forms import NotUnderstood
from omni.training.data.samples import IGNORED, Pair, Sample

PROCESSOR, CONFIG = toy_processor(), tiny_config()
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


def read(raw: dict[str, Any]) -> Row:
    return read_row(raw, lambda name: f"/d/{name}")


def media(kind: str, name: str) -> dict[str, str]:
    return {"type": kind, kind: f"/d/{name}"}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def learnt(raw: dict[str, Any], **options: Any) -> list[str]:
    """The stretches of a row's text that are learnt."""
    sample = SampleMaker(PROCESSOR, CONFIG, **options)(read(raw))
    sample = sample.chosen if isinstance(sample, Pair) else sample
    stretches: list[list[int]] = [[]]
    for label in sample.labels.tolist():
        if label != IGNORED:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [PROCESSOR.decode(ids) for ids in stretches if ids]


CONVERSATIONS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "ms-swift: query and response": ({"query": "q", "response": "a"}, chat("q", "a")),
    "ms-swift: history and system": (
        {"query": "q2", "response": "a2", "history": [["q", "a"]], "system": "Be brief."},
        [SYSTEM, *chat("q", "a", "q2", "a2")],
    ),
    "ms-swift: pictures before the first question": (
        {"query": "q", "response": "a", "images": ["1.png", "2.png"]},
        [user([media("image", "1.png"), media("image", "2.png"), "q"]), chat("", "a")[1]],
    ),
    "ms-swift: a tag where the sound stands": (
        {"query": "hear <audio> now", "response": "a", "audios": ["a.wav"]},
        [user(["hear ", media("audio", "a.wav"), " now"]), chat("", "a")[1]],
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ],
            "id": "7",
        },
        [SYSTEM, *chat("q", "a")],
    ),
    "ms-swift: questions with their answers": (
        {"system": "Be brief.", "conversation": [{"human": "q", "assistant": "a"}, {"human": "q2", "assistant": "a2"}]},
        [SYSTEM, *chat("q", "a", "q2", "a2")],
    ),
    "LLaMA-Factory: video and sound": (
        {
            "conversations": [{"from": "human", "value": "<video><audio>q"}, {"from": "gpt", "value": "a"}],
            "videos": ["v.mp4"],
            "audios": ["a.wav"],
        },
        [user([media("video", "v.mp4"), media("audio", "a.wav"), "q"]), chat("", "a")[1]],
    ),
    "LLaVA: one picture": (
        {
            "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}],
            "image": "1.png",
        },
        [user([media("image", "1.png"), "\nq"]), chat("", "a")[1]],
    ),
    "conversations with roles": ({"conversations": chat("q", "a")}, chat("q", "a")),
    "Alpaca": ({"instruction": "q", "output": "a"}, chat("q", "a")),
    "Alpaca: input, history and system": (
        {"instruction": "do", "input": "this", "output": "a", "system": "Be brief.", "history": [["q", "b"]]},
        [SYSTEM, *chat("q", "b", "do\nthis", "a")],
    ),
    "TRL: prompt and completion": ({"prompt": "q", "completion": "a"}, chat("q", "a")),
    "TRL: both as messages": (
        {"prompt": [SYSTEM, user("q")], "completion": chat("", "a")[1:]},
        [SYSTEM, *chat("q", "a")],
    ),
    "OpenAI: developer": (
        {"messages": [{"role": "developer", "content": "Be brief."}, *chat("q", "a")], "parallel_tool_calls": False},
        [SYSTEM, *chat("q", "a")],
    ),
    "a recording and its text": (
        {"audio": "a.wav", "text": "hello"},
        [user([media("audio", "a.wav")]), {"role": "assistant", "content": [{"type": "text", "text": "hello"}]}],
    ),
    "a recording by another name": (
        {"audio_filepath": "a.wav", "duration": 1.5, "transcription": "hello", "speaker_id": "p225"},
        [user([media("audio", "a.wav")]), {"role": "assistant", "content": [{"type": "text", "text": "hello"}]}],
    ),
    "Common Voice": (
        {"path": "a.mp3", "sentence": "hello", "client_id": "0f", "up_votes": 2, "age": "twenties", "locale": "en"},
        [user([media("audio", "a.mp3")]), {"role": "assistant", "content": [{"type": "text", "text": "hello"}]}],
    ),
    "a picture and its caption": (
        {"image": "1.png", "caption": "a cat"},
        [user([media("image", "1.png")]), {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_a_form_becomes_its_conversation(form: str) -> None:
    raw, messages = CONVERSATIONS[form]
    row = read(raw)
    assert row.messages == messages
    assert row.rejected is None and row.voices == [Voice()] * sum(m["role"] == "assistant" for m in messages)


PAIRS: dict[str, dict[str, Any]] = {
    "ms-swift: rejected_messages": {"messages": chat("q", "good"), "rejected_messages": chat("q", "bad")},
    "ms-swift: their end alone": {"messages": chat("q", "good"), "rejected_messages": chat("", "bad")[1:]},
    "ms-swift: query": {"query": "q", "response": "good", "rejected_response": "bad"},
    "LLaMA-Factory: ShareGPT": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "LLaMA-Factory: Alpaca": {"instruction": "q", "chosen": "good", "rejected": "bad"},
    "OpenAI": {
        "input": {"messages": [user("q")], "tools": [], "parallel_tool_calls": True},
        "preferred_output": chat("", "good")[1:],
        "non_preferred_output": chat("", "bad")[1:],
    },
    "TRL: texts": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "TRL: messages": {"prompt": [user("q")], "chosen": chat("", "good")[1:], "rejected": chat("", "bad")[1:]},
    "TRL: implicit": {"chosen": chat("q", "good"), "rejected": chat("q", "bad"), "score_chosen": 8.0},
    "TRL: implicit texts": {"chosen": "q good", "rejected": "q bad"},
    "UltraFeedback": {"prompt": "q", "prompt_id": "f0", "chosen": chat("q", "good"), "rejected": chat("q", "bad")},
    "Anthropic": {
        "chosen": "\n\nHuman: q\n\nAssistant: good",
        "rejected": "\n\nHuman: q\n\nAssistant: bad",
    },
    "messages and lists": {"messages": [user("q")], "chosen": chat("", "good")[1:], "rejected": chat("", "bad")[1:]},
}  # fmt: skip


@pytest.mark.parametrize("form", PAIRS)
def test_a_form_of_pairs_becomes_two_answers(form: str) -> None:
    row = read(PAIRS[form])
    assert row.messages == chat("q", "good") and row.rejected == ("bad", Voice())
    pair = SampleMaker(PROCESSOR, CONFIG)(row)
    assert isinstance(pair, Pair) and pair.chosen.tokens == pair.rejected.tokens + 1


def test_conversations_may_part_before_their_last_answer() -> None:
    better = [*chat("q", "one"), *chat("and?", "two")]
    worse = [user("q"), {"role": "assistant", "content": "", "tool_calls": CALLS}, {"role": "tool", "content": "3"},
             {"role": "assistant", "content": "no"}]  # fmt: skip
    pair = SampleMaker(PROCESSOR, CONFIG)(read({"chosen": better, "rejected": worse}))
    assert isinstance(pair, Pair)
    said = [
        PROCESSOR.decode(side.inputs.input_ids[0], skip_special_tokens=False) for side in (pair.chosen, pair.rejected)
    ]
    assert "two" in said[0] and "<tool_call>" not in said[0]
    assert '"name": "f"' in said[1] and "<tool_response>\n3" in said[1] and "two" not in said[1]


def test_pairs_share_the_media_of_their_prompt() -> None:
    row = read(
        {
            "messages": chat("<audio>q", "good"),
            "rejected_messages": chat("<audio>q", "bad"),
            "audios": ["a.wav"],
        }
    )
    assert row.messages[0]["content"] == [media("audio", "a.wav"), "q"] and row.rejected == ("bad", Voice())


# ---- roles, calls, losses ----


def test_calls_belong_to_the_answer_before_them() -> None:
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    for role, reply in (("tool_call", "tool_response"), ("tool_call", "tool")):
        messages = [user("q"), {"role": role, "content": call}, {"role": reply, "content": "3"}, *chat("", "a")[1:]]
        row = read({"messages": messages, "tools": json.dumps([TOOL])})
        assert row.messages[1] == {"role": "assistant", "content": "", "tool_calls": CALLS}
        assert row.messages[2:] == [{"role": "tool", "content": "3"}, *chat("", "a")[1:]] and row.tools == [TOOL]
    messages = [*chat("q", "let me see"), *[{"role": "tool_call", "content": call}] * 2]
    assert read({"messages": messages}).messages[1:] == [
        {"role": "assistant", "content": "let me see", "tool_calls": [*CALLS, *CALLS]}
    ]
    shared = [{"from": "human", "value": "q"}, {"from": "function_call", "value": call},
              {"from": "observation", "value": "3"}, {"from": "gpt", "value": "a"}]  # fmt: skip
    assert learnt({"conversations": shared}) == ['<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "a"]


@pytest.mark.parametrize("key", ["loss", "weight"])
def test_an_answer_says_whether_it_is_learnt(key: str) -> None:
    messages = [*chat("q", "one"), *chat("q", "two"), *chat("q", "three")]
    messages[1] = {**messages[1], key: 0}
    messages[3] = {**messages[3], key: 1}
    assert learnt({"messages": messages}) == ["two", "three"]
    assert learnt({"messages": messages}, loss_on="last") == ["two", "three"]  # what a row says goes first
    messages[5] = {**messages[5], key: False}
    assert learnt({"messages": messages}, loss_on="last") == ["two"]
    with pytest.raises(ValueError, match="no answer of the row is learnt"):
        learnt({"messages": [chat("q", "a")[0], {**chat("q", "a")[1], key: 0}]})


def test_an_answer_that_is_not_learnt_is_not_spoken() -> None:
    codes = [[1, 2], [3, 4], [5, 6], [7, 8]]
    messages = [*chat("q", "one"), *chat("q", "two")]
    messages[1] = {**messages[1], "loss": False}
    sample = SampleMaker(PROCESSOR, CONFIG)(read({"messages": messages, "codes": [codes, codes]}))
    assert isinstance(sample, Sample) and [PROCESSOR.decode(turn.ids) for turn in sample.speech] == ["two"]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "assistant", "content": "a", "weight": 0.5}, "weight of message 1 is 0.5"),
        ({"role": "assistant", "content": "a", "loss": "no"}, "loss of message 1 is 'no'"),
        ({"role": "user", "content": "b", "loss": True}, "only answers are learnt"),
        ({"role": "tool_call", "content": "f(x)"}, "tool call of message 1"),
        ({"role": "tool_call", "content": "[1]"}, "tool call of message 1"),
    ],
)
def test_bad_messages_say_what_is_wrong(message: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read({"messages": [user("q"), message, *chat("", "a")[1:]]})


def test_two_answers_in_a_row_stay_two() -> None:
    for raw in (
        {"messages": [*chat("q", "one"), chat("", "two")[1]]},
        {"conversations": [{"from": "human", "value": "q"}, *[{"from": "gpt", "value": t} for t in ("one", "two")]]},
    ):
        assert learnt(raw) == ["one", "two"]


# ---- what is not understood ----

CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt answer": ({"query": "q", "respones": "a"}, "'respones': did you mean 'response'"),
    "a misspelt pair": ({"messages": chat("q", "a"), "rejected_mesages": chat("q", "b")}, "mean 'rejected_messages'"),
    "a pair of another name": ({"messages": chat("q", "a"), "bad_answer": "b"}, "bad_answer"),
    "pictures of another name": ({"messages": chat("q", "a"), "pictures": ["1.png"]}, "pictures"),
    "an answer that is a number": ({"query": "q", "response": "3", "rejected": "4"}, "unknown key 'rejected'"),
    "a picture's address": ({"messages": chat("q", "a"), "image_url": "http://x/1.png"}, "image_url"),
    "the rejected one's pictures": (
        {"messages": chat("q", "a"), "rejected_response": "b", "rejected_images": ["1.png"]},
        "rejected_images",
    ),
    "a row's weight": ({"messages": chat("q", "a"), "weight": 0.1}, "'weight'"),
    "KTO": ({"prompt": "q", "completion": "a", "label": False}, "'label', but no objective learns from single"),
    "KTO of LLaMA-Factory": ({"instruction": "q", "output": "a", "kto_tag": True}, "kto_tag"),
    "boxes": ({"messages": chat("<image>", "a"), "images": ["1.png"], "objects": {"bbox": [[1, 2, 3, 4]]}}, "objects"),
    "a template's options": (
        {"prompt": "q", "completion": "a", "chat_template_kwargs": {"enable_thinking": False}},
        "chat_template_kwargs",
    ),
    "a part of a recording": ({"audio": "a.wav", "text": "a", "offset": 2.5}, "recordings are read whole"),
    "two texts": ({"audio": "a.wav", "text": "a", "normalized_text": "b"}, "text and normalized_text"),
    "an answer's context": ({"instruction": "q", "output": "a", "context": "c"}, "unknown key 'context'"),
    "no answer": ({"prompt": "q"}, "also needs completion"),
    "two forms": ({"messages": chat("q", "a"), "query": "q", "response": "a"}, "at once"),
    "unknown columns": ({"question": "q", "answer": "a"}, "question, answer are of no known form"),
    "another key in input": (
        {"input": {"messages": [user("q")], "tool": []}, "preferred_output": [], "non_preferred_output": []},
        "did you mean 'tools'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGED)
def test_what_would_change_the_learning_is_an_error(change: str, tmp_path: Path) -> None:
    raw, told = CHANGED[change]
    path = write_rows(tmp_path / "a.jsonl", [{"messages": chat("q", "a")}, raw])
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{told}"):
        Manifest(path)[1]


def test_it_ends_a_run_instead_of_being_passed_over(tmp_path: Path) -> None:
    rows = [{"messages": chat("q", "a")}, {"messages": chat("q", "a"), "bad_answer": "b"}]
    for workers in (0, 1):
        batches = Batches(
            Mixture([Manifest(write_rows(tmp_path / "a.jsonl", rows))]),
            SampleMaker(PROCESSOR, CONFIG), max_tokens=500, bucket_size=4, workers=workers,
        )  # fmt: skip
        with pytest.raises(ValueError, match=r"bad_answer.*data\.ignore_columns"):
            next(batches)
        batches.close()


@pytest.mark.parametrize(
    "empty",
    [
        {"prompt": "q", "completion": None},
        {"audio": "a.wav", "text": None},
        {"path": "a.wav", "sentence": None, "up_votes": 2},
        {"image": "1.png", "caption": None},
        {"prompt": "q", "chosen": "a", "rejected": None},
        {"instruction": "q", "input": None, "output": None},
    ],
)
def test_an_empty_cell_costs_its_row(empty: dict[str, Any], tmp_path: Path) -> None:
    manifest = Manifest(write_rows(tmp_path / "a.jsonl", [{"messages": chat("q", "a")}, empty]))
    with pytest.raises(ValueError, match="also needs") as caught:
        manifest[1]
    assert not isinstance(caught.value, NotUnderstood)
    (tmp_path / "a.csv").write_text(f"{','.join(empty)}\n{','.join(str(value or '') for value in empty.values())}\n")
    with pytest.raises(ValueError, match="also needs") as caught:
        Manifest(tmp_path / "a.csv")[0]
    assert not isinstance(caught.value, NotUnderstood)


@pytest.mark.parametrize("begin", [{"offset": 0.0}, {"start": 0}, {"start_time": 0.0}])
def test_a_recording_from_its_beginning(begin: dict[str, Any], tmp_path: Path) -> None:
    row = {"audio_filepath": "a.wav", "text": "hello", "duration": 1.5, **begin}
    manifest = Manifest(write_rows(tmp_path / "a.jsonl", [row]))
    with pytest.warns(UserWarning, match="duration"):
        assert manifest[0].messages[1]["content"] == [{"type": "text", "text": "hello"}]
    (tmp_path / "a.csv").write_text(f"audio_filepath,text,{next(iter(begin))}\na.wav,hello,0.0\n")
    assert Manifest(tmp_path / "a.csv").heard(0)["text"] == "hello"


def test_columns_to_leave_out(tmp_path: Path) -> None:
    rows = [
        {"messages": chat("q", "a"), "bad_answer": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"messages": chat("q", "")[:1], "chosen": "a", "rejected": "b"},
        {"chosen": chat("q", "a"), "rejected": chat("q", "b")},
        {"messages": chat("q", "a"), "label": 1},
    ]
    manifest = Manifest(write_rows(tmp_path / "a.jsonl", rows), ignore=("bad_answer", "rejected", "label"))
    for index in range(len(rows)):
        assert manifest[index].messages == chat("q", "a") and manifest[index].rejected is None


def test_names_numbers_and_empty_values_are_harmless(tmp_path: Path) -> None:
    row = {
        "messages": chat("q", "a"), "id": "7", "prompt_id": "f0", "source": "web", "language": "en", "wer": 0.1,
        "objects": {}, "remark": "", "meta": {"by": "ann"}, "label": None,
    }  # fmt: skip
    manifest = Manifest(write_rows(tmp_path / "a.jsonl", [row, row]))
    with pytest.warns(UserWarning, match="nothing but filters reads id, prompt_id, source, language, wer"):
        assert manifest[0].messages == chat("q", "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manifest[1]
        Manifest(manifest.path, read=list(row))[0]


def test_cells_of_text_hold_lists() -> None:
    for text in (json.dumps(chat("q", "a")), str(chat("q", "a"))):
        assert read({"messages": text}).messages == chat("q", "a")
    assert read({"query": "q2", "response": "a2", "history": '[["q", "a"]]'}).messages == chat("q", "a", "q2", "a2")
    said = '{"name": "Ann"}'  # an answer that is JSON stays one
    assert read({"prompt": "[1, 2]", "completion": said}).messages == chat("[1, 2]", said)
