"""Parts that fail inside an engine: the session whose call it was stands as before it, and the engine goes on."""

from __future__ import annotations

from typing import Any

import pytest
from build import noise
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test
from test_session_faults import PLAIN, QUICK, Broken, Faults, assert_same_reply, fault
from test_session_template import first_model

from omni import OmniEngine, OmniSession
from omni.generation.rows import Rows
from omni.session.row_reader import RowReader

pytestmark = pytest.mark.filterwarnings("ignore:the conversation does not begin")


def assert_alike(one: OmniSession, other: OmniSession) -> None:
    """They hold the same, as far as callers see it."""
    assert one.ids == other.ids and one.responding == other.responding
    shown = [[(item.role, item.status, item.text) for item in session.items] for session in (one, other)]
    assert shown[0] == shown[1]


class EngineFaults(Faults):
    """A session of an engine whose parts fail at times, and its twin outside of it, where they do not."""

    failures = (Broken, RuntimeError)  # a cut of the engine's thread would be its end

    @initialize(video_sound=st.booleans())
    def begin(self, video_sound: bool) -> None:
        options: Any = {"use_audio_in_video": video_sound}
        self.engine = OmniEngine(self.model, max_sessions=2, streaming=self.streaming)
        self.session = self.engine.session(**options)
        self.twin = OmniSession(self.model, streaming=self.streaming, **options)
        self.time_s = 0.0

    def check_alike(self) -> None:
        assert_alike(self.session, self.twin)

    leave: Any = None  # the engine is ahead of its reader, so that another part of the reply has been heard

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            with self.engine:
                assert_same_reply(self.session, self.twin)


def test_whatever_fails_in_an_engine(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = first_model(tmp_path_factory.mktemp("files") / "own")
    machine = type("Machine", (EngineFaults,), {"model": made, "streaming": QUICK})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=10, stateful_step_count=12, phases=[Phase.generate])
    )


@pytest.mark.parametrize("part", [(Rows, "prefill_thinker"), (Rows, "begin"), (RowReader, "end_reply")])
def test_what_fails_on_the_way_of_a_reply_reaches_its_reader(part: Any, tmp_path: Any) -> None:
    with OmniEngine(first_model(tmp_path / "own"), max_sessions=2, streaming=QUICK) as engine:
        session, other = engine.session(), engine.session()
        twin = OmniSession(engine.model, streaming=QUICK)
        for one in (session, other, twin):
            one.push_text("hello")
        before = session.ids
        with fault(*part):
            events = session.respond(**PLAIN)
            with pytest.raises((Broken, RuntimeError), match="the part is broken"):
                list(events)
        assert session.ids == before and not session.responding
        session.push_text("!")
        twin.push_text("!")
        assert_same_reply(session, twin)
        assert list(other.respond(**PLAIN))


def test_reading_in_advance_that_fails_is_made_up_for(tmp_path: Any) -> None:
    with OmniEngine(first_model(tmp_path / "own"), max_sessions=1, streaming=QUICK) as engine:
        session, twin = engine.session(), OmniSession(engine.model, streaming=QUICK)
        with fault(Rows, "prefill_thinker", 2) as calls:
            session.push_text("several pieces, " * 12)
            session.push_audio(noise(20000))  # what comes before it is decided
            assert session._ahead is not None and session._ahead.wait(lambda: True)
        assert len(calls) == 2
        twin.push_text("several pieces, " * 12)
        twin.push_audio(noise(20000))
        assert_same_reply(session, twin)
