"""Chunks and windows drawn for training: the same number, the same draw; rows, batches, runs and resumption."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from build import TINY, TOY_DATA, chat, fixed, tiny_config, tone, write_rows

from omni import OmniModel
from omni.packaged.toy import toy_processor
from omni.training.data.batches import Batches, collate
from omni.training.data.conversation_samples import SampleMaker
from omni.training.data.hearing import AS_RELEASED, HearingDraws
from omni.training.data.manifest import Manifest, Row, Voice
from omni.training.data.mixture import Mixture
from omni.training.objectives.transcription_stage import CharacterLabels, Clip, ClipMaker, Transcriber, join
from omni.training.run.stages import Run, build_run
from omni.training.run.train_config import TrainConfig

BOTH = HearingDraws((0.48, 1.0), (0.96, 8.0), seed=5)
CHUNK, WINDOW = "audio_chunk_s", "audio_window_s"


def test_windows_are_whole_numbers_of_the_chunk_between_least_and_most() -> None:
    drawn = [BOTH.of(number) for number in range(1, 3001)]
    windows: dict[float, Counter[int]] = {0.48: Counter(), 1.0: Counter()}
    for draw in drawn:
        count = draw[WINDOW] / draw[CHUNK]
        assert abs(count - round(count)) < 1e-9
        windows[draw[CHUNK]][round(count)] += 1
    assert set(windows[0.48]) == set(range(2, 17)) and set(windows[1.0]) == set(range(1, 9))
    assert 1350 < sum(windows[0.48].values()) < 1650
    assert min(windows[0.48].values()) > 60 and min(windows[1.0].values()) > 130  # 100 and 188 are expected


def test_a_number_says_what_is_drawn() -> None:
    assert [BOTH.of(n) for n in range(50)] == [HearingDraws((0.48, 1.0), (0.96, 8.0), seed=5).of(n) for n in range(50)]
    assert [BOTH.of(n) for n in range(50)] != [HearingDraws((0.48, 1.0), (0.96, 8.0), seed=6).of(n) for n in range(50)]
    assert BOTH.of(0) == {CHUNK: 0.48, WINDOW: pytest.approx(7.68)}  # of what is held out
    assert AS_RELEASED.of(7) == {} and HearingDraws((0.48,)).of(7) == {CHUNK: 0.48}


def test_what_cannot_be_drawn_is_refused() -> None:
    encoder = OmniModel(tiny_config(), ("thinker",)).audio_encoder
    BOTH.check(encoder)
    with pytest.raises(ValueError, match="name the chunks too"):
        HearingDraws(windows_s=(1.0, 8.0))
    with pytest.raises(ValueError, match=r"no window of \[1.1, 1.9\] s, least and most, is a whole .* of 1 s; widen"):
        HearingDraws((0.48, 1.0), (1.1, 1.9))
    with pytest.raises(ValueError, match=r"audio_chunk_s of 0.5 s is not possible"):
        HearingDraws((0.48, 0.5)).check(encoder)


def test_clips_and_their_batch() -> None:
    """A row is left out whatever chunk is drawn; a batch is heard as its last draw says, held-out ones as number 0."""
    model = OmniModel(tiny_config(), ("thinker",))
    frames = 199  # 26 tokens in chunks of a second, 4 * 6 + 1 in chunks of 0.48 s
    assert HearingDraws((1.0, 0.48)).fewest_tokens(model.audio_encoder, frames) == 25
    assert AS_RELEASED.fewest_tokens(model.audio_encoder, frames) == 26
    clips = [Clip(torch.zeros(128, 20), "a", [0], number=number) for number in (3, 9, 7)]
    batch, held, plain = join(clips, BOTH), join(clips, BOTH, draws=False), join(clips)
    assert (batch.audio_chunk_s, batch.audio_window_s) == (BOTH.of(9)[CHUNK], BOTH.of(9)[WINDOW])
    assert (held.audio_chunk_s, held.audio_window_s) == (BOTH.of(0)[CHUNK], BOTH.of(0)[WINDOW])
    assert plain.audio_chunk_s is None and plain.audio_window_s is None
    with fixed():
        transcriber = Transcriber(model.audio_encoder, 3)
    features = torch.randn(1, 128, frames)
    found = transcriber(features, [frames], 0.48, 0.96)
    expected = model.audio_encoder(features, [frames], window_frames=96, chunk_frames=48)
    assert torch.equal(found.embeds, expected.embeds) and found.lengths == [25]
    assert ClipMaker(CharacterLabels("abc"), transcriber, hearing=BOTH).hearing is BOTH


def manifest(tmp_path: Path, rows: int = 12) -> Path:
    for i in range(rows):
        soundfile.write(tmp_path / f"{i}.wav", tone(0.5 + 0.1 * i), 16000)
    said = [{"messages": chat("<audio>", "ab"), "audios": [f"{i}.wav"]} for i in range(rows)]
    return write_rows(tmp_path / "rows.jsonl", said)


def run_of(objective: str, manifest: Path, **data: Any) -> Run:
    own = {"batch_size": 2} if objective == "transcription" else {}
    values = {
        "model": {"config": str(TINY), "parts": ["thinker"], "processor": str(TOY_DATA)},
        "train": {"objective": objective, "steps": 3, "precision": "fp32", "device": "cpu", "seed": 5},
        "objective": own,
        "data": {"train": [{"manifest": str(manifest)}], "bucket": 6, "max_tokens": 150, **data},
        "log": {"progress": False},
    }
    return build_run(TrainConfig.from_dict(values))


DRAWN: dict[str, Any] = {"audio_chunks_s": [0.48, 1.0], "audio_windows_s": [0.96, 8.0]}


def heard(batch: Any) -> list[Any]:
    """What a batch of either kind says of its chunks and windows."""
    own = getattr(batch, "inputs", batch)
    return [value.tolist() if hasattr(value, "tolist") else value for value in (own.audio_chunk_s, own.audio_window_s)]


@pytest.mark.parametrize("objective", ["transcription", "thinker"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_draws_and_a_resumed_one_goes_on_drawing(objective: str, workers: int, tmp_path: Path) -> None:
    path = manifest(tmp_path)
    whole = run_of(objective, path, **DRAWN, workers=workers).trainer.data
    batches = iter(whole)
    first = [heard(next(batches)) for _ in range(4)]
    state = whole.state_dict()
    rest = [heard(next(batches)) for _ in range(8)]
    resumed = run_of(objective, path, **DRAWN).trainer.data  # reads ahead or not: the same draws
    resumed.load_state_dict(state)
    again = iter(resumed)
    assert [heard(next(again)) for _ in range(8)] == rest
    chunks = {chunk for batch in first + rest for chunk in (batch[0] if isinstance(batch[0], list) else [batch[0]])}
    assert chunks == {0.48, 1.0}


@pytest.mark.parametrize("objective", ["transcription", "thinker"])
def test_a_step_learns_from_both(objective: str, tmp_path: Path) -> None:
    run = run_of(objective, manifest(tmp_path), **DRAWN)
    for _ in range(3):
        result = run.trainer.step()
        assert result.loss > 0 and not result.skipped


def test_rows_of_a_batch_keep_their_chunks(tmp_path: Path) -> None:
    """What each row is drawn, it is laid out and encoded by, beside others as alone."""
    processor, model = toy_processor(), OmniModel(tiny_config(), ("thinker",))
    make = SampleMaker(processor, model.config, hearing=BOTH)
    audio = [{"type": "audio", "audio": tone(2.5)}]
    samples = [make(Row(chat(audio, "b"), [Voice()], number=number)) for number in range(1, 9)]
    counts = [sample.inputs.input_ids[0].tolist().count(processor.tokens.audio) for sample in samples]
    chunks = [BOTH.of(number)[CHUNK] for number in range(1, 9)]
    assert counts == [{0.48: 32, 1.0: 33}[chunk] for chunk in chunks] and set(counts) == {32, 33}
    batch = collate(samples)  # type: ignore[arg-type]
    assert batch.inputs.audio_chunk_s is not None and batch.inputs.audio_chunk_s.tolist() == chunks
    with torch.no_grad():
        together = model(batch.inputs).logits
        for row, sample in enumerate(samples):
            alone = model(sample.inputs).logits[0]
            torch.testing.assert_close(together[row, -sample.tokens :], alone, atol=1e-5, rtol=1e-5)
    plain = SampleMaker(processor, model.config)(Row(chat(audio, "b"), [Voice()]))
    with pytest.raises(ValueError, match="1 of 2 samples with sound say audio_chunk_s; let all of them say it"):
        collate([samples[0], plain])  # type: ignore[list-item]
    text = SampleMaker(processor, model.config)(Row(chat("a", "b"), [Voice()]))
    assert collate([samples[0], text]).inputs.audio_window_s is not None  # type: ignore[list-item]


def test_rows_of_an_evaluation_are_number_0(tmp_path: Path) -> None:
    path = manifest(tmp_path)
    read = Manifest(path)
    make = SampleMaker(toy_processor(), tiny_config(), hearing=BOTH)
    assert {make(read[i]).inputs.audio_chunk_s.item() for i in range(6)} == {0.48}  # type: ignore[union-attr]
    batches = Batches(Mixture([read]), make, max_tokens=500, bucket_size=12)
    drawn = {s.inputs.audio_chunk_s.item() for _ in range(4) for s in next(batches)}  # type: ignore[union-attr]
    assert drawn == {0.48, 1.0}


@pytest.mark.parametrize(
    ("objective", "data", "words"),
    [
        ("transcription", {"audio_chunks_s": [0.5]}, "audio_chunk_s of 0.5 s is not possible"),
        ("thinker", {"audio_chunks_s": [2.0]}, "audio_chunk_s of 2 s is not possible"),
        ("thinker", {"audio_windows_s": [1.0, 8.0]}, "name the chunks too"),
        ("thinker", {"audio_chunks_s": [1.0], "audio_windows_s": [1.2, 1.8]}, "widen data.audio_windows_s"),
        ("thinker", {"audio_chunks_s": [-1]}, r"data.audio_chunks_s\[0\] must be above 0"),
        ("thinker", {"audio_chunks_s": [1.0], "audio_windows_s": [1.0]}, "data.audio_windows_s must have 2 entries"),
    ],
)
def test_settings_that_cannot_be_heard(objective: str, data: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        run_of(objective, manifest(tmp_path, 2), **data)
