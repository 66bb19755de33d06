"""The law of edits: after any sequence of calls the greedy reply equals that of one pass over the same ids and the same
kept embeddings, in an empty row."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import build
import pytest
import torch
from build import noise, speckle
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from test_session_template import first_model, second_model

from omni import AudioChunk, Item, OmniModel, OmniSession, StreamingConfig
from omni.generation.generate import make_turn, run_to_end
from omni.generation.reply import ReplyReader
from omni.generation.rows import Rows
from omni.session.entries import Entry
from omni.talker.layout import PromptEnd

pytestmark = pytest.mark.filterwarnings("ignore:the conversation does not begin")
PLAIN = {**build.PLAIN, "max_new_tokens": 4, "max_frames": 3, "seed": 0}
QUICK = StreamingConfig(audio_window_s=1.0, prefill_tokens=16)
TOOLS = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}]
TEXTS = st.sampled_from(("hi", "\na line", "a longer text of several pieces", " "))


def one_pass(model: OmniModel, entries: list[Entry]) -> tuple[Rows, PromptEnd, PromptEnd]:
    """Both models read everything at once, laid out here from the entries alone -> where their prompts end."""
    rows = Rows(model, 1)
    thinker, talker = model.require("thinker"), model.require("talker")
    embeds, positions, taps, own = [], [], [], []
    ends = [PromptEnd(), PromptEnd()]
    levels = max((len(e.taps) for e in entries if e.taps is not None), default=0)
    talker_positions: list[torch.Tensor] = []
    for entry in entries:
        inside = rows.layout is not None and rows.layout.in_prompt(entry.by_user)
        if not entry.ids:
            ends = [end.moved(entry.length) if i == 0 or inside else end for i, end in enumerate(ends)]
            continue
        count = len(entry.ids)
        text = thinker.embed_tokens(torch.tensor(entry.ids))
        offsets = torch.arange(float(count)).expand(3, -1) if entry.offsets is None else entry.offsets
        embeds.append(text if entry.embeds is None else entry.embeds)
        taps.append(torch.zeros(levels, count, text.shape[1]) if entry.taps is None else entry.taps)
        own.append(torch.full((count,), 0 if not inside else 2 if entry.media else 1))
        for i, kept in enumerate((positions, talker_positions)):
            if i == 0 or inside:
                kept.append(offsets + ends[i].start)
                ends[i] = ends[i].after(kept[-1]).moved(0 if entry.media else count)
    ids = [token for entry in entries for token in entry.ids]
    whole, kinds = torch.cat(embeds), torch.cat(own)
    hidden = rows.prefill_thinker(0, ids, whole, torch.cat(positions, 1), torch.cat(taps, 1) if levels else None)
    rows.text.decoder.next_position[0] = ends[0].highest + 1
    if bool(kinds.any()):
        at = kinds > 0
        vectors = talker.prompt_vectors(whole[at], hidden[at], kinds[at] == 2)
        rows.prefill_talker(0, vectors, torch.cat(talker_positions, 1))
    return rows, ends[0], ends[1]


@torch.no_grad()
def fresh_reply(session: OmniSession) -> tuple[list[int], torch.Tensor]:
    """What the last question of a session is answered with after one pass."""
    reply, model = session._reply, session.model
    assert reply is not None
    before = reply.listed[: reply.listed.index(reply.message)]
    entries = [*session._conversation.beginning, *(e for m in before for e in m.entries), reply.message.entries[0]]
    rows, thinker, talker = one_pass(model, entries)
    request = reply.turn.request
    assert request.prompt_tokens == thinker.tokens and request.prompt_end == talker
    turn = make_turn(request, ReplyReader(session.processor.think_token_ids), session.processor)
    rows.begin(0, turn)
    (sound,) = run_to_end(rows)
    return turn.text.ids, sound


class Edits(RuleBasedStateMachine):
    """A session, to which anything may happen."""

    model: OmniModel
    folder: Path
    streaming: StreamingConfig

    @initialize(system=st.none() | TEXTS, tools=st.booleans(), video_sound=st.booleans())
    def begin(self, system: str | None, tools: bool, video_sound: bool) -> None:
        options: Any = {"streaming": self.streaming, "use_audio_in_video": video_sound}
        self.session = OmniSession(self.model, system=system, tools=TOOLS if tools else None, **options)
        self.time_s, self.calls = 0.0, 0

    def place(self, data: Any, *roles: str) -> str | None:
        found = [i.id for i in self.session.items if i.role in roles and i.status != "in_progress"]
        return data.draw(st.sampled_from(found)) if found else None

    def answer(self, aloud: bool, push: str = "") -> None:
        events = self.session.respond(**PLAIN, return_audio=aloud)
        got: list[Any] = []
        for number, event in enumerate(events):
            got.append(event)
            if push and number == 1:  # input and an edit while it speaks
                self.session.push_text(push)
        if got[-1].reason == "error":  # it has begun a call of a tool by chance, and was taken back
            return
        ids = [i for event in got for i in getattr(event, "token_ids", ())]
        sound = torch.cat([torch.zeros(0), *(e.samples for e in got if isinstance(e, AudioChunk))])
        expected, expected_sound = fresh_reply(self.session)
        assert ids == expected
        torch.testing.assert_close(sound, expected_sound, atol=1e-4, rtol=0)

    @rule(text=TEXTS)
    def push_text(self, text: str) -> None:
        self.session.push_text(text)

    @rule(samples=st.sampled_from((900, 9000, 20000)), rate_hz=st.sampled_from((16000, 8000)))
    def push_audio(self, samples: int, rate_hz: int) -> None:
        self.session.push_audio(noise(samples, samples), rate_hz)

    @rule(seed=st.integers(0, 3))
    def push_image(self, seed: int) -> None:
        self.session.push_image(speckle(32, 32, seed=seed))

    @rule(seed=st.integers(0, 3))
    def push_frame(self, seed: int) -> None:
        self.time_s += 0.5
        self.session.push_video_frame(speckle(32, 32, seed=seed), self.time_s)

    @rule()
    def discard(self) -> None:
        self.session.discard_input()

    @rule(aloud=st.booleans(), push=st.sampled_from(("", "meanwhile")))
    def respond(self, aloud: bool, push: str) -> None:
        self.answer(aloud, push)

    @rule(events=st.integers(0, 4), played_ms=st.none() | st.sampled_from((0, 80, 160)))
    def leave(self, events: int, played_ms: float | None) -> None:
        stream = self.session.respond(**PLAIN)
        for _ in range(events):
            next(stream, None)
        if played_ms is None and events % 2:
            stream.close()
        else:
            self.session.interrupt(played_ms)

    @rule(data=st.data(), played_ms=st.sampled_from((0, 80, 160, 10**6)))
    def truncate(self, data: Any, played_ms: float) -> None:
        if id := self.place(data, "assistant"):
            self.session.truncate(id, played_ms)

    @rule(data=st.data(), role=st.sampled_from(("user", "assistant", "system")), text=TEXTS, seed=st.integers(0, 2))
    def insert(self, data: Any, role: str, text: str, seed: int) -> None:
        picture = {"type": "image", "image": speckle(32, 32, seed=seed)}
        parts = [text, picture] if role == "user" and seed else text
        after = data.draw(st.sampled_from((None, "root", self.place(data, "user", "assistant", "tool"))))
        self.session.insert(Item(role=role, parts=parts), after=after)

    @rule(data=st.data(), text=TEXTS)
    def replace(self, data: Any, text: str) -> None:
        if id := self.place(data, "user"):
            item = next(item for item in self.session.items if item.id == id)
            media = [part for part in item.parts if part["type"] != "text"]
            self.session.replace(id, Item(role="user", parts=[text, *media]))

    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        if id := self.place(data, "user", "assistant", "system"):
            item = next(item for item in self.session.items if item.id == id)
            if not any(part["type"] == "tool_call" for part in item.parts):
                self.session.delete(id)

    @rule(results=st.integers(1, 2))
    def call(self, results: int) -> None:
        self.calls += results
        ids = [f"call_{self.calls - i}" for i in range(results)]
        calls = [{"type": "tool_call", "id": id, "name": "look", "arguments": "{}"} for id in ids]
        self.session.insert(Item(role="assistant", parts=["wait", *calls]))
        for id in ids:
            self.session.push_tool_result(id, "a <tree>")

    @precondition(lambda self: hasattr(self, "session"))
    @rule(drop=st.integers(0, 2))
    def become(self, drop: int) -> None:
        kept = [item for item in self.session.items if item.role not in ("tool",)]
        kept = [i for i in kept if not any(part["type"] == "tool_call" for part in i.parts)]
        self.session.become(kept[drop:])

    @rule()
    def drop_turns(self) -> None:
        turns = sum(item.role == "user" for item in self.session.items)
        if turns > 1:
            self.session.drop_oldest_turns()

    @rule(system=st.none() | TEXTS, tools=st.booleans())
    def configure(self, system: str | None, tools: bool) -> None:
        self.session.configure(system=system, tools=TOOLS if tools else None)

    @rule()
    def fork(self) -> None:
        other = self.session.fork()
        self.session.push_text("the other goes its own way")
        list(self.session.respond(**PLAIN))
        self.session = other

    @rule()
    def save_and_load(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.session.save(self.folder)
        before = [(i.id, i.role, i.status, i.text, len(i.parts)) for i in self.session.items]
        self.session = OmniSession.load(self.folder, self.model)
        assert [(i.id, i.role, i.status, i.text, len(i.parts)) for i in self.session.items] == before

    @rule()
    def aside(self) -> None:
        before = self.session.ids
        list(self.session.respond(**PLAIN, items=[Item(parts="aside")], remember=False))
        assert self.session.ids == before

    def teardown(self) -> None:
        if hasattr(self, "session"):
            self.session.push_text("at last")
            self.answer(aloud=True)


def check(model: OmniModel, folder: Path, streaming: StreamingConfig, sequences: int, steps: int = 10) -> None:
    machine = type("Machine", (Edits,), {"model": model, "folder": folder / "saved", "streaming": streaming})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=sequences, stateful_step_count=steps, phases=[Phase.generate])
    )


@pytest.mark.parametrize("family", ["first", "second"])
def test_any_sequence_of_edits(family: str, tmp_path: Path) -> None:
    _check_family(family, tmp_path, 50, steps=8)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["first", "second"])
def test_many_sequences_of_edits(family: str, tmp_path: Path) -> None:
    _check_family(family, tmp_path, int(os.environ.get("OMNI_EDIT_SEQUENCES", "1000")))


def _check_family(family: str, tmp_path: Path, sequences: int, **options: int) -> None:
    model = (first_model if family == "first" else second_model)(tmp_path / "files")
    check(model, tmp_path, QUICK if family == "first" else StreamingConfig(prefill_tokens=16), sequences, **options)
