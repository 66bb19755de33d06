"""`omni speak --srt`: an entry for each word."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from omni.cli.main import main
from omni.cli.subtitles import Entry, srt, word_entries, write_srt


def test_the_format_of_a_file(tmp_path: Path) -> None:
    entries = [Entry(0, 999.6, "Yes,"), Entry(1000, 61_001, "é 你"), Entry(3_599_999.4, 36_000_000, "end")]
    assert srt(entries) == (
        "1\n00:00:00,000 --> 00:00:01,000\nYes,\n\n"
        "2\n00:00:01,000 --> 00:01:01,001\né 你\n\n"
        "3\n00:59:59,999 --> 10:00:00,000\nend\n"
    )
    assert srt([]) == ""
    path = tmp_path / "a.srt"
    path.write_text("old")
    write_srt(path, entries)
    assert path.read_bytes() == srt(entries).encode() and list(tmp_path.iterdir()) == [path]


def test_a_spoken_text_has_an_entry_for_each_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, sound, path = "the old king follows your blue fish", tmp_path / "a.wav", tmp_path / "a.srt"
    assert main(["speak", text, "--out", str(sound), "--srt", str(path)]) == 0
    assert "7 words" in capsys.readouterr().out
    blocks = path.read_text(encoding="utf-8").rstrip("\n").split("\n\n")
    pattern = re.compile(r"(\d+)\n(\d\d):(\d\d):(\d\d),(\d\d\d) --> (\d\d):(\d\d):(\d\d),(\d\d\d)\n(\S+)")
    found = [pattern.fullmatch(block) for block in blocks]
    assert [match and match[10] for match in found] == text.split()
    spans = [(int(m[4]) * 1000 + int(m[5]), int(m[8]) * 1000 + int(m[9])) for m in found if m]
    assert all(begin < end for begin, end in spans)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    judged = [(0, 170), (170, 490), (490, 860), (860, 1540), (1540, 1940), (1940, 2330), (2330, 2660)]  # PocketSphinx
    errors = torch.tensor(spans) - torch.tensor(judged)
    assert errors.float().square().mean().sqrt() < 100


def test_speech_that_was_cut_has_no_entries_beyond_it() -> None:
    entries = word_entries("one two three four five six\n\n--> seven", torch.zeros(4800), 24000, complete=True)
    assert all(0 <= e.begin_ms < e.end_ms <= 200 for e in entries)
    assert len(word_entries("one two three four five", torch.randn(4800) / 10, 24000, complete=False)) < 5


@pytest.mark.parametrize(
    ("name", "says"),
    [("a.txt", "must end in .srt"), ("no/a.srt", "does not exist"), ("folder.srt", "is a folder")],
)
def test_a_wrong_path_fails_before_any_work(
    name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.srt").mkdir()
    argv = ["speak", "hi", "--model", str(tmp_path / "none"), "--out", str(tmp_path / "a.wav")]
    assert main([*argv, "--srt", str(tmp_path / name)]) == 1
    assert says in capsys.readouterr().err
