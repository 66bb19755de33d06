"""What of the data is not used is counted by reason, what changed since a checkpoint is noticed, and remainders of
buckets are shared."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from build import chat, tiny_config, tone, write_rows

from omni.packaged.toy import toy_processor
from omni.training.data.batches import Batches, pack, size
from omni.training.data.conversation_samples import SampleMaker, SkipRow
from omni.training.data.manifest import Manifest, Row, Voice
from omni.training.data.mixture import Mixture
from omni.training.data.recordings import crop_batches, open_sounds
from omni.training.data.samples import Sample
from omni.training.run.train_config import TrainConfig

MAKE = SampleMaker(toy_processor(), tiny_config(), max_tokens=60)


def sample(letters: int) -> Sample:
    made = MAKE(Row(chat("q", "x" * letters), [Voice()]))
    assert isinstance(made, Sample)
    return made


def mixed(path: Path, **options: Any) -> Batches:
    """Rows that are too long, for the processor or for a batch, bad, turned down, or good: two of each, four good."""
    rows = [{"messages": chat("q", "x" * (100 if i < 2 else 42 if i < 4 else i))} for i in range(8)]
    rows += [{"messages": []}] * 2 + [{"messages": chat("q", "a"), "wer": 0.9}] * 2
    manifest = Manifest(write_rows(path / "a.jsonl", rows))
    return Batches(
        Mixture([manifest], keep=lambda row: row.get("wer", 0) < 0.5), MAKE, max_tokens=50, bucket_size=10, **options
    )


COUNTED = {
    "drawn": 10,
    "filtered": 2,
    "left_out": {"more than 60 tokens": 2, "more than 50 tokens and frames, the most of a batch": 2},
    "bad": 2,
}


@pytest.mark.parametrize("letters", [200, 400])
def test_rows_beyond_the_models_positions_are_not_helped_by_a_setting(tmp_path: Path, letters: int) -> None:
    config = tiny_config()
    short = config.thinker.text_config.replace(max_position_embeddings=100)
    config = config.replace(thinker_config=config.thinker.replace(text_config=short))
    manifest = Manifest(write_rows(tmp_path / "a.jsonl", [{"messages": chat("q", "x" * letters)}] * 3))
    batches = Batches(Mixture([manifest]), SampleMaker(toy_processor(), config), max_tokens=10_000, bucket_size=2)
    refused = pytest.raises(ValueError, match=r"longer than the model's positions.*shorten them")
    with pytest.warns(UserWarning, match="more than 100 tokens, for which the model has positions"), refused as told:
        next(batches)
    assert "max_tokens" not in str(told.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_every_reason_is_counted_and_named_once(tmp_path: Path, workers: int) -> None:
    batches = mixed(tmp_path, workers=workers)
    with pytest.warns(UserWarning) as told:
        next(batches)
    counts = batches.counts()
    if workers:  # filters are passed one bucket ahead
        assert counts.pop("drawn") == 20 and counts.pop("filtered") >= 2
    assert counts == {key: value for key, value in COUNTED.items() if key in counts}
    said = sorted(str(warning.message).split(": ", 1)[1][:12] for warning in told)
    assert len(told) == 4 and sum(text.startswith("more than") for text in said) == 2
    batches.close()


def test_counts_go_on_where_a_run_goes_on(tmp_path: Path) -> None:
    first = mixed(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        states = []
        for _ in range(5):
            next(first)
            states.append((json.loads(json.dumps(first.state_dict())), first.counts()))
        for state, counts in states:
            again = mixed(tmp_path)
            again.load_state_dict(state)
            assert again.counts() == counts


def test_a_set_without_losses_has_no_counts(tmp_path: Path) -> None:
    manifest = Manifest(write_rows(tmp_path / "a.jsonl", [{"messages": chat("q", "a")}]))
    batches = Batches(Mixture([manifest]), MAKE, max_tokens=50, bucket_size=4)
    next(batches)
    assert batches.counts() == {}


def test_recordings_that_are_heard_in_part_are_counted(tmp_path: Path) -> None:
    for name, seconds in (("long", 0.5), ("short", 0.05)):
        soundfile.write(tmp_path / f"{name}.wav", tone(seconds), 16000)
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    batches = crop_batches(Mixture([open_sounds(tmp_path)]), 16000, 0.1, batch_size=4)
    with pytest.warns(UserWarning, match=r"bad\.wav is skipped"):
        next(batches)
    assert batches.counts() == {"drawn": 5, "cut": {"a crop of a longer recording": 2}, "bad": 1}
    again = crop_batches(Mixture([open_sounds(tmp_path)]), 16000, 0.1, batch_size=4)
    again.load_state_dict(batches.state_dict())
    assert again.counts() == batches.counts()


# ---- what changed since ----

ROWS = [{"messages": chat(f"question {i}", f"answer {i}")} for i in range(6)]


def saved(path: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    """A manifest of one kind, written over the one before it."""
    if suffix == "json":
        path.joinpath("a.json").write_text(json.dumps(rows))
    elif suffix == "csv":
        lines = [f"{row['messages'][0]['content']},{row['messages'][1]['content']}" for row in rows]
        path.joinpath("a.csv").write_text("\n".join(["query,response", *lines]))
    else:
        write_rows(path / f"a.{suffix}", rows)
    return path / f"a.{suffix}"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("change", ["reordered", "changed", "none"])
def test_a_manifest_that_changed_is_noticed(tmp_path: Path, suffix: str, change: str) -> None:
    first = Mixture([Manifest(saved(tmp_path, suffix, ROWS))], seed=1)
    next(first)
    state = json.loads(json.dumps(first.state_dict()))
    rows = list(ROWS)
    if change == "reordered":
        rows = [rows[1], rows[0], *rows[2:]]
    if change == "changed":  # as long as before
        rows[3] = {"messages": chat("question 3", "answer 7")}
    second = Mixture([Manifest(saved(tmp_path, suffix, rows))], seed=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        second.load_state_dict(state)
    assert [f"a.{suffix} were changed or reordered" in str(w.message) for w in told] == [True] * (change != "none")
    assert second.state_dict() == {**state, "contents": second.state_dict()["contents"]}


def test_a_checkpoint_of_an_earlier_version_is_taken(tmp_path: Path) -> None:
    mixture = Mixture([Manifest(saved(tmp_path, "jsonl", ROWS))])
    state = {key: value for key, value in mixture.state_dict().items() if key != "contents"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixture.load_state_dict(state)


# ---- remainders ----


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("count", [9, 17, 25, 26, 65])
def test_no_row_is_left_alone(count: int, padded: bool) -> None:
    samples = [sample(4)] * count
    most = 8 * samples[0].tokens
    batches = pack(samples, most, padded=padded)
    assert sum(map(len, batches)) == count and len(batches) == -(-count // 8)
    assert min(map(len, batches)) >= 4 and all(size(batch, padded=padded) <= most for batch in batches)


def test_only_a_small_remainder_moves_rows() -> None:
    samples = [sample(4 + i % 3) for i in range(19)]
    most = 8 * max(made.tokens for made in samples)
    batches = pack(samples, most, padded=False)
    assert [made for batch in batches for made in batch] == samples  # in their order
    lengths = list(map(len, batches))
    assert lengths[0] == 8 and sorted(lengths[1:]) == [5, 6]
    assert pack(samples[:16], most, padded=False) == [samples[:8], samples[8:16]]
    long = [sample(40), sample(3)]
    assert pack(long, long[0].tokens + 1, padded=False) == [[long[0]], [long[1]]]  # nothing to share


def test_a_bucket_with_one_row_over_makes_no_batch_of_it(tmp_path: Path) -> None:
    manifest = Manifest(write_rows(tmp_path / "a.jsonl", [{"messages": chat("q", "abcd")}] * 9))
    batches = Batches(Mixture([manifest]), MAKE, max_tokens=8 * sample(4).tokens, bucket_size=9, padded=False)
    assert sorted(len(next(batches)) for _ in range(4)) == [4, 4, 5, 5]


def test_the_published_updates_on_new_rows_replay_old_ones() -> None:
    """On new rows alone a model forgets."""
    root = Path(__file__).parents[3]
    config = TrainConfig.from_toml(root / "configs" / "train_thinker_lora.toml")
    shares = {Path(source.manifest).stem: source.weight for source in config.data.train}
    assert shares.keys() == {"train", "replay"} and 0.1 < shares["replay"] / sum(shares.values()) < 0.5
    assert "**Replay.**" in (root / "docs" / "training.md").read_text(encoding="utf-8")


def test_a_row_whose_film_is_too_long_is_left_out_and_not_bad(tmp_path: Path) -> None:
    film = {"type": "video", "video": [np.zeros((64, 64, 3), np.uint8)] * 40, "fps": 2.0}
    maker = SampleMaker(toy_processor(), tiny_config(), max_tokens=60)
    maker.processor.files.model["text_config"] = {"max_position_embeddings": 30}
    with pytest.raises(SkipRow):
        maker(Row([{"role": "user", "content": [film]}, {"role": "assistant", "content": "a"}], [Voice()]))
