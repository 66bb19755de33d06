"""Manifests: rows of JSONL, tar and Parquet files, checked and with their media in place; mixtures of them."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import tarfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from omni.training.data.manifest import Manifest, Row, Voice, read_row
from omni.training.data.mixture import Draw, Mixture, shuffled


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def turn(user: Any = "hi", answer: Any = "hello") -> list[dict[str, Any]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def read(**raw: Any) -> Row:
    return read_row({"messages": turn(), **raw}, lambda name: f"/data/{name}")


# ---- files ----


def test_rows_come_by_line_whatever_lies_between(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"messages": turn("héllo 你好"), "id": i} for i in range(3)]
    text = "\ufeff" + json.dumps(rows[0], ensure_ascii=False) + "\r\n\n   \n" + "\n".join(map(json.dumps, rows[1:]))
    path.write_bytes(text.encode())
    manifest = Manifest(path)
    assert [manifest.raw(i) for i in (2, 0, 1)] == [rows[2], rows[0], rows[1]]
    assert [manifest.name(i) for i in range(len(manifest))] == [f"{path}:{line}" for line in (1, 4, 5)]


def test_a_large_manifest_keeps_only_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[{"messages": turn("x" * 5000)} for _ in range(200)])
    store = vars(Manifest(path).store)
    held = sum(len(value) * value.itemsize for key, value in store.items() if key != "path")
    assert held <= 200 * 16 and set(store) == {"path", "starts", "lines"}


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        Manifest(tmp_path / "nowhere.jsonl")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"\.jsonl, \.tar, \.parquet"):
        Manifest(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match="no rows"):
        Manifest(tmp_path / "a.jsonl")
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b no tar at all" * 100)
    with pytest.raises(ValueError, match="tar"):
        Manifest(tmp_path / "a.tar")


def test_a_broken_line_spoils_no_other(tmp_path: Path) -> None:
    manifest = Manifest(write(tmp_path / "a.jsonl", '{"messages": [', [1], {"messages": turn()}))
    with pytest.raises(ValueError, match="JSON"):
        manifest[0]
    with pytest.raises(ValueError, match="object, got list"):
        manifest[1]
    assert manifest[2].messages == turn()
    with pytest.raises(IndexError):
        manifest[3]


def test_misspelt_keys_are_errors_and_others_one_warning(tmp_path: Path) -> None:
    rows = [{"messages": turn(), "wer": 0.1, "source": "web"}, {"messages": turn(), "wer": 0.2}]
    manifest = Manifest(write(tmp_path / "a.jsonl", *rows, {"messages": turn(), "image": ["a.png"]}))
    with pytest.warns(UserWarning, match=r"a\.jsonl:1: nothing but filters reads wer, source"):
        manifest[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manifest[1]
    with pytest.raises(ValueError, match="'image'; did you mean 'images'"):
        manifest[2]


def test_tar_members_stand_for_media(tmp_path: Path) -> None:
    row = {"messages": turn("<audio>?"), "audios": ["question.wav"], "speech": "b.wav", "codes": None}
    members = {
        "x/a.json": json.dumps(row), "x/a.question.wav": "sound", "y/b.json": json.dumps(row), "y/b.b.wav": "voice",
        "y/c.wav": "alone",
    }  # fmt: skip
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    manifest = Manifest(tmp_path / "s.tar")
    assert [manifest.name(i) for i in range(3)] == [f"{tmp_path / 's.tar'}:{key}" for key in ("x/a", "y/b", "y/c")]
    assert manifest[0].messages[0]["content"][0] == {"type": "audio", "audio": b"sound"}
    assert manifest[0].voices == [Voice(speech=str(tmp_path / "b.wav"))]
    assert manifest[1].voices == [Voice(speech=b"voice")]
    with pytest.raises(ValueError, match=r"no \.json member, only wav"):
        manifest[2]


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is an optional package")
def test_parquet_rows_equal_json_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"messages": turn("<image>"), "images": [{"bytes": b"png", "path": None}], "speech": None},
        {"messages": turn("<image>"), "images": [{"bytes": None, "path": "a.png"}], "speech": ["a.wav"]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    manifest = Manifest(tmp_path / "a.parquet")
    assert len(manifest) == 2 and manifest.name(1) == f"{tmp_path / 'a.parquet'}:1"
    assert manifest[0].messages[0]["content"] == [{"type": "image", "image": b"png"}]
    assert manifest[1].messages[0]["content"] == [{"type": "image", "image": str(tmp_path / "a.png")}]
    assert [manifest[i].voices for i in range(2)] == [[Voice()], [Voice(speech=str(tmp_path / "a.wav"))]]


def test_parquet_without_datasets_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match="pip install datasets"):
        Manifest(tmp_path / "a.parquet")


# ---- media ----


def test_tags_are_replaced_in_order_across_messages() -> None:
    messages = [*turn("<image>a<audio><image>"), {"role": "user", "content": "<image>"}, *turn("b")[1:]]
    given = [messages[0]["content"], messages[2]["content"]]
    row = read(messages=messages, images=["1.png", "2.png", "3.png"], audios="a.wav")
    assert row.messages[0]["content"] == [
        {"type": "image", "image": "/data/1.png"}, "a", {"type": "audio", "audio": "/data/a.wav"},
        {"type": "image", "image": "/data/2.png"},
    ]  # fmt: skip
    assert row.messages[2]["content"] == [{"type": "image", "image": "/data/3.png"}]
    assert [messages[0]["content"], messages[2]["content"]] == given  # what was read stays as it was


def test_paths_are_relative_to_the_manifest_and_addresses_stay(tmp_path: Path) -> None:
    places = ["a.wav", "../b.wav", "/c.wav", "https://x/d.wav", "data:audio/wav;base64,AA", "file:///e.wav", "~/f.wav"]
    items = [{"type": "audio", "audio": place} for place in places]
    items += [{"type": "audio_url", "audio_url": {"url": "g.wav"}}, {"type": "text", "text": "a.wav"}]
    row = Manifest(write(tmp_path / "a.jsonl", {"messages": turn(items)}))[0]
    content = row.messages[0]["content"]
    whole = [str(tmp_path / "a.wav"), str(tmp_path / "../b.wav"), *places[2:]]
    assert [item["audio"] for item in content[:7]] == whole
    assert content[7:] == [{"type": "audio_url", "audio_url": {"url": str(tmp_path / "g.wav")}}, items[-1]]


def test_items_without_a_source_take_from_the_lists() -> None:
    content = [{"type": "image"}, {"type": "text", "text": "<image>"}, {"type": "video", "video": "own.mp4"}]
    row = read(messages=turn(content), images=["a.png"])
    assert row.messages[0]["content"] == [
        {"type": "image", "image": "/data/a.png"}, content[1], {"type": "video", "video": "/data/own.mp4"},
    ]  # fmt: skip


def test_frames_and_arrays_are_media_too() -> None:
    sound = {"array": [0.0, 0.1], "sampling_rate": 16000}
    row = read(messages=turn("<video><audio>"), videos=[["1.png", "2.png"]], audios=[sound])
    assert [item[item["type"]] for item in row.messages[0]["content"]] == [["/data/1.png", "/data/2.png"], sound]


@pytest.mark.parametrize(("text", "images", "told"), [("<image>", [], "1 <image>.* 0 "), ("", ["a"], "0 <image>.* 1 ")])
def test_tags_and_media_must_agree(text: str, images: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=f"{told}entries of images.*type': 'text'"):
        read(messages=turn(text), images=images)


# ---- answers ----


def test_speech_belongs_to_answers() -> None:
    messages = turn() + turn()
    assert read(messages=messages, speech="a.wav").voices == [Voice(), Voice("/data/a.wav")]
    row = read(messages=messages, speech=["a.wav", None], speaker="Ethan")
    assert row.voices == [Voice("/data/a.wav", None, "Ethan"), Voice(None, None, "Ethan")]
    assert read(messages=messages, speaker=["A", None], speech=[None, "b"]).voices[0] == Voice(None, None, "A")
    codes = [[1, 2], [3, 4]]
    assert read(messages=messages, codes=codes).voices == [Voice(), Voice(codes=codes)]
    assert read(messages=messages, codes=[codes, "b.safetensors"]).voices == [
        Voice(codes=codes),
        Voice(codes="/data/b.safetensors"),
    ]


def test_preferences_in_every_spelling() -> None:
    prompt = turn()[:1]
    asked = {"messages": prompt, "chosen": "yes", "rejected": "no"}
    for raw in (
        asked,
        {"messages": turn("hi", "yes"), "rejected": "no"},
        {"messages": turn("hi", "yes"), "rejected_response": "no"},
        {"messages": prompt, "chosen": {"role": "assistant", "content": "yes"}, "rejected": {"content": "no"}},
    ):
        row = read(**raw)
        assert row.messages == turn("hi", "yes") and row.voices == [Voice()]
        assert row.rejected is not None and row.rejected == ("no", Voice())
    spoken = read(messages=turn("hi", "yes"), speech="a.wav", rejected={"speech": "b.wav"})
    assert spoken.voices == [Voice("/data/a.wav")] and spoken.rejected == ("yes", Voice("/data/b.wav"))
    spoken = read(messages=turn() + prompt, speech=["x"], chosen={"content": "c", "codes": [[1]]}, rejected="d")
    assert spoken.voices == [Voice("/data/x"), Voice(codes=[[1]])]


def test_options_of_trainers() -> None:
    row = read(system="Be brief.", tools='[{"name": "f"}]', use_audio_in_video=True)
    assert row.messages == [{"role": "system", "content": "Be brief."}, *turn()]
    assert row.tools == [{"name": "f"}] and row.use_audio_in_video is True
    assert read(tools="").tools is None


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"messages": []}, "needs messages"),
        ({"messages": "hi"}, "needs messages"),
        ({"messages": ["hi"]}, "message 0"),
        ({"messages": turn()[:1]}, "no assistant message"),
        ({"messages": turn()[:1], "rejected": "no"}, "no assistant message"),
        ({"messages": turn() + turn()[:1], "rejected": "no"}, "answer to compare"),
        ({"chosen": "a", "rejected": "b"}, "leave one of them out"),
        ({"messages": turn()[:1], "chosen": "a"}, "without rejected"),
        ({"messages": turn()[:1], "chosen": {"speech": "a"}, "rejected": "b"}, "chosen has no content"),
        ({"rejected": {"contents": "b"}}, "did you mean 'content'"),
        ({"rejected": {"role": "user", "content": "b"}}, "its role is 'user'"),
        ({"rejected": {"role": "assistant"}}, "neither content nor speech"),
        ({"rejected": 3}, "rejected must be a text"),
        ({"rejected": "a", "rejected_response": "a"}, "mean the same"),
        ({"speech": ["a", "b"]}, "2 entries for 1 assistant"),
        ({"speech": 3}, "speech must be"),
        ({"speech": "a", "codes": [[1]]}, "both speech and codes"),
        ({"codes": 3}, "codes must be"),
        ({"speaker": 3}, "speaker must be"),
        ({"images": 3}, "images must be a list"),
        ({"system": 3}, "system must be a string"),
        ({"tools": 3}, "tools must be a list"),
        ({"tools": "["}, "tools cannot be read as JSON"),
        ({"use_audio_in_video": "yes"}, "true or false"),
    ],
)
def test_bad_rows_say_what_is_wrong(raw: dict[str, Any], told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        read(**raw)


# ---- mixtures ----


def numbered(tmp_path: Path, count: int, name: str = "a") -> Manifest:
    return Manifest(write(tmp_path / f"{name}.jsonl", *[{"messages": turn("?", str(i))} for i in range(count)]))


def read_ahead(mixture: Mixture, count: int) -> list[Draw]:
    return [next(mixture) for _ in range(count)]


def test_ratios_over_ten_thousand_draws(tmp_path: Path) -> None:
    files = [numbered(tmp_path, count, name) for count, name in ((7, "a"), (50, "b"), (11, "c"))]
    weights = [8, 1, 1]  # R43's mix
    drawn = Counter(draw.manifest.path.stem for draw in read_ahead(Mixture(files, weights, seed=1), 10_000))
    for name, weight in zip("abc", weights):
        share = weight / 10
        assert abs(drawn[name] - 10_000 * share) < 4 * (10_000 * share * (1 - share)) ** 0.5
    by_rows = Counter(draw.manifest.path.stem for draw in read_ahead(Mixture(files, seed=1), 10_000))
    assert abs(by_rows["b"] / 10_000 - 50 / 68) < 0.02
    assert all(draw.manifest is files[1] for draw in read_ahead(Mixture(files, [0, 1, 0]), 100))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 100, 1000])
def test_shuffling_is_a_permutation_that_its_key_changes(count: int) -> None:
    orders = [[shuffled(place, count, key) for place in range(count)] for key in range(3)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count < 10 or (orders[0] != orders[1] != orders[2] and orders[0] != sorted(orders[0]))


def test_shuffling_sends_a_place_everywhere_alike() -> None:
    landed = Counter(shuffled(0, 5, key) for key in range(2000))
    assert len(landed) == 5 and all(abs(times - 400) < 90 for times in landed.values())


def test_every_row_once_an_epoch_whatever_the_processes(tmp_path: Path) -> None:
    for world_size in (1, 2, 3):
        file = numbered(tmp_path, 12)
        ranks = [Mixture([file], rank=rank, world_size=world_size) for rank in range(world_size)]
        epochs = []
        for _ in range(2):
            epochs.append([draw.row for mixture in ranks for draw in read_ahead(mixture, 12 // world_size)])
            assert sorted(epochs[-1]) == list(range(12))
        assert epochs[0] != epochs[1]


def test_a_mixture_resumes_anywhere(tmp_path: Path) -> None:
    files = [numbered(tmp_path, 5, "a"), numbered(tmp_path, 9, "b")]

    def keep(raw: dict[str, Any]) -> bool:
        return not raw["messages"][1]["content"].endswith("3")

    whole = read_ahead(Mixture(files, [1, 3], seed=4, rank=1, world_size=2, keep=keep), 60)
    assert all(draw.row != 3 for draw in whole)
    for stop in (0, 1, 17, 40):
        first = Mixture(files, [1, 3], seed=4, rank=1, world_size=2, keep=keep)
        read_ahead(first, stop)
        state = json.loads(json.dumps(first.state_dict()))
        second = Mixture(files, [1, 3], seed=4, rank=1, world_size=2, keep=keep)
        second.load_state_dict(state)
        assert read_ahead(second, 60 - stop) == whole[stop:]
    assert sum(second.dropped) > 0
    other = Mixture([files[1], files[0]], [1, 3], seed=4, rank=1, world_size=2)
    with pytest.raises(ValueError, match="has rows"):
        other.load_state_dict(state)


def test_a_filter_keeps_shares_and_counts(tmp_path: Path) -> None:
    files = [
        Manifest(write(tmp_path / "q.jsonl", *[{"messages": turn("a", "b"), "wer": i / 10} for i in range(10)])),
        numbered(tmp_path, 10),
    ]
    mixture = Mixture(files, [1, 1], keep=lambda raw: raw.get("wer", 0) < 0.25)
    draws = read_ahead(mixture, 2000)
    noisy = [draw for draw in draws if draw.manifest is files[0]]
    assert {draw.row for draw in noisy} == {0, 1, 2} and abs(len(noisy) - 1000) < 100
    assert mixture.dropped[1] == 0 and abs(mixture.dropped[0] / len(noisy) - 7 / 3) < 0.1
    with pytest.raises(ValueError, match=r"keep turned down \d+ rows of a\.jsonl"):
        read_ahead(Mixture(files[1:], keep=lambda raw: False), 1)


def test_mixtures_that_make_no_sense(tmp_path: Path) -> None:
    file = numbered(tmp_path, 2)
    for weights in ([1.0, 2.0], [-1.0], [0.0], [float("nan")], []):
        with pytest.raises(ValueError, match="weight"):
            Mixture([file], weights)
    with pytest.raises(ValueError, match="rank"):
        Mixture([file], rank=2, world_size=2)
