"""docs/turns.md: its example does what it says, with a session and a player that write down what they are told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from turn_sounds import in_noise, recording

from omni.session.turn_events import TurnConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "turns.md").read_text()


class Told:
    """Writes down calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, args[0] if args else kwargs))


def example() -> tuple[dict[str, Any], Told, Told]:
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code is not None
    session, player = Told(), Told()
    names: dict[str, Any] = {"session": session, "player": player, "answer": session.answer, "play_again": player.again}
    exec(code[1], names)
    return names, session, player


def test_the_session_hears_the_turn_and_answers_once() -> None:
    names, session, _ = example()
    sound = in_noise(recording("request.wav"), 30)
    for piece in sound.split(1600):
        names["listen"](piece, 16000)
    assert [name for name, _ in session.calls if name != "push_audio"] == ["answer"]
    assert session.calls[-1][0] == "answer"
    heard = torch.cat([value for name, value in session.calls if name == "push_audio"])
    begin = next(i for i in range(0, len(sound), 16) if torch.equal(sound[i : i + 64], heard[:64]))
    assert torch.equal(sound[begin : begin + len(heard)], heard)  # without a gap
    assert begin <= 16000 and begin + len(heard) >= 16000 + len(recording("request.wav"))


def test_an_interruption_reaches_the_session_and_one_without_words_the_player() -> None:
    for text, expected in (("wait", ["interrupt", "answer"]), ("", ["discard_input"])):
        names, session, player = example()
        turns = names["turns"]
        turns.push(torch.zeros(16000))
        turns.reply_started()
        turns.reply_sent(torch.zeros(160_000), 16000)
        sound = in_noise(recording("request.wav"), 30, lead=8000)
        for place in range(0, len(sound), 1600):
            names["listen"](sound[place : place + 1600], 16000)
            if turns.speaking and place > 40_000:
                turns.heard(text)
        assert [name for name, _ in session.calls if name != "push_audio"] == expected
        stopped = player.calls[0]
        assert stopped[0] == "stop"
        if text:
            assert 1000 <= dict(session.calls)["interrupt"]["played_ms"] <= 1700
        else:
            assert player.calls[1][0] == "again" and 1000 <= player.calls[1][1]["from_ms"] <= 1700


def test_the_page_is_short_and_names_real_defaults() -> None:
    assert len(PAGE.splitlines()) <= 90
    config = TurnConfig()
    for names, values in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \|", PAGE, re.MULTILINE):
        for name, value in zip(re.findall(r"`(\w+)`", names), values.split(",")):
            if name != "TurnConfig":
                assert str(getattr(config, name)) == value.strip().replace(" ", "")
