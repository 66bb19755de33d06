"""Flow matching as a stage: mels, pairing of voices, learning, evaluation, going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from build import SIZES, TINY, config_values, make_token2wav, make_voice, seeded, tone, write_rows

from omni.encoders.mel import mel_filter_bank
from omni.training.data.conversation_samples import SkipRow
from omni.training.data.manifest import Manifest
from omni.training.data.mixture import Mixture
from omni.training.objectives.flow_stage import FlowMaker, FlowObjective, evaluate_flow, flow_batches, speakers_of
from omni.training.objectives.voice_mel import VoiceMel
from omni.training.run.stages import Run, build_run
from omni.training.run.train_config import TrainConfig

RATE, HOP, N_FFT = 24000, 6, 64  # of the tiny vocoder: two mel frames of 6 samples a code
CODES = 60  # in each recording


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two speakers with three recordings each, told apart by their pitch, and one with a single recording."""
    folder = tmp_path_factory.mktemp("voices")
    rng = np.random.default_rng(0)
    rows = []
    for number, speaker in enumerate(("ann", "ann", "ann", "Ben", "ben", "ben", "carl")):
        pitch = {"a": 300, "b": 2500, "c": 900}[speaker[0].lower()] * (1 + 0.1 * rng.random())
        soundfile.write(folder / f"{number}.wav", tone(2 * HOP * CODES / RATE, pitch, RATE), RATE)
        codes = rng.integers(0, 20, (1, CODES)).tolist()
        embedding = [float(number), 1.0, -1.0]
        rows.append({"audio": f"{number}.wav", "speaker": speaker, "codes": codes, "speaker_embedding": embedding})
    return write_rows(folder / "voices.jsonl", rows)


def maker(manifest: Path, **options: Any) -> tuple[Mixture, FlowMaker]:
    mixture = Mixture([Manifest(manifest)])
    chosen = {"crop_s": 0.01, "reference_s": 0.004, "n_fft": N_FFT, **options}
    return mixture, FlowMaker(make_token2wav(), speakers_of(mixture), **chosen)


def test_a_mel_frame_is_the_log_amplitude_of_its_window() -> None:
    mel, wave = VoiceMel(5, HOP, RATE, N_FFT), torch.randn(600, generator=seeded(0))
    found = mel(wave)
    assert found.shape == (100, 5) and mel(wave[:599]).shape == (99, 5)
    start = 40 * HOP - (N_FFT - HOP) // 2  # frame 40, far from both ends
    window = wave[start : start + N_FFT] * torch.hann_window(N_FFT)
    expected = torch.fft.rfft(window).abs() @ mel_filter_bank(5, N_FFT, RATE).T
    torch.testing.assert_close(found[40], expected.log(), atol=1e-4, rtol=1e-4)
    assert bool((mel(torch.zeros(60)) < -9).all()), "silence"
    with pytest.raises(ValueError, match="too short"):
        mel(wave[:5])
    with pytest.raises(ValueError, match="hop"):
        VoiceMel(5, 7, RATE, N_FFT)


def test_voices_come_from_other_recordings_of_the_speaker(manifest: Path) -> None:
    """Never the row's own, never another speaker's; and each other one is drawn."""
    mixture, make = maker(manifest)
    drawn: dict[int, set[int]] = {}
    for number in range(200):
        draw = next(mixture)
        if draw.row < 6:
            drawn.setdefault(draw.row, set()).add(int(make(draw, number).speaker[0]))
    for row, others in drawn.items():
        own = {0, 1, 2} if row < 3 else {3, 4, 5}
        assert others == own - {row}, "names are one speaker in any case"
    with pytest.raises(SkipRow, match="only recording of 'carl'"):
        make(next(d for d in mixture if d.row == 6), 0)


def test_crops_line_up_with_their_codes(manifest: Path) -> None:
    mixture, make = maker(manifest)
    draw = next(d for d in mixture if d.row == 1)
    item, again = make(draw, 3), make(draw, 3)
    assert all(torch.equal(a, b) for a, b in zip(vars(item).values(), vars(again).values()))
    whole = torch.tensor(draw.manifest.raw(1)["codes"][0])
    wave, _ = soundfile.read(manifest.parent / "1.wav", dtype="float32")
    mel = VoiceMel(5, HOP, RATE, N_FFT)(torch.from_numpy(wave))
    starts = [i for i in range(CODES - 19) if torch.equal(whole[i : i + 20], item.codes)]
    assert len(item.codes) == 20 and any(torch.allclose(mel[2 * i : 2 * i + 40], item.mel) for i in starts)
    assert item.reference_mel.shape == (16, 5)
    _, longer = maker(manifest, reference_s=0.1)
    reference = longer(draw, 3).reference_mel  # 400 frames of a recording of 120: it is repeated
    assert reference.shape == (400, 5) and torch.equal(reference[:120], reference[120:240])


def test_rows_that_say_too_little_are_named(manifest: Path, tmp_path: Path) -> None:
    row = json.loads(manifest.read_text().splitlines()[0])
    row["audio"] = str(manifest.parent / "0.wav")
    bad = [
        ({**row, "speaker": None}, "names no speaker"),
        ({**row, "codes": None}, "no codes and there is no codec"),
        ({**row, "codes": [[1] * 10]}, "do not belong to a recording"),
        ({**row, "codes": [[21] * CODES]}, "do not lie in 0..20"),
        ({**row, "codes": [[1] * CODES] * 2}, r"integers \[1, n\]"),
        ({**row, "audio": None}, "names 0"),
    ]
    for number, (content, message) in enumerate(bad):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(content) + "\n" + json.dumps(row) + "\n")
        mixture, make = maker(path)
        with pytest.raises(ValueError, match=message):
            make(next(d for d in mixture if d.row == 0), 0)


def test_an_embedding_is_the_recording_s_else_the_voice_s(manifest: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in manifest.read_text().splitlines()[:2]]
    for number, row in enumerate(rows):
        row["audio"] = str(manifest.parent / f"{number}.wav")
        del row["speaker_embedding"]
    path = tmp_path / "plain.jsonl"
    write_rows(path, rows)
    voice = make_voice()
    mixture, make = maker(path, voices={"Ann": voice})
    assert torch.equal(make(next(mixture), 0).speaker, voice.cond[0])
    mixture, make = maker(path)
    assert not make(next(mixture), 0).speaker.any()


def test_codes_of_a_codec_are_asked_for(manifest: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in manifest.read_text().splitlines()[:2]]
    path = tmp_path / "plain.jsonl"
    for number, row in enumerate(rows):
        row["audio"] = str(manifest.parent / f"{number}.wav")
        del row["codes"]
    write_rows(path, rows)
    mixture, make = maker(path, codes=lambda sound: torch.full((1, CODES + 1), 7))
    assert set(make(next(mixture), 0).codes.tolist()) == {7}


def make_run(manifest: Path, tmp_path: Path, **changes: Any) -> Run:
    values = config_values(0)
    values["token2wav_config"] = SIZES
    config = tmp_path / "config.json"
    config.write_text(json.dumps(values))
    settings: dict[str, Any] = {
        "model": {"config": str(config), "parts": ("code2wav",)},
        "train": {"objective": "flow_matching", "steps": 120, "precision": "bf16", "device": "cpu"},
        "optimiser": {"lr": 4e-3, "schedule": "constant"},
        "objective": {"batch_size": 8, "crop_s": 0.01, "reference_s": 0.004, "n_fft": N_FFT, "drop_rate": 0.1},
        "data": {"train": ({"manifest": str(manifest)},)},
        "log": {"progress": False},
    }
    for table, own in changes.items():
        settings[table] = {**settings.get(table, {}), **own}
    return build_run(TrainConfig.from_dict(settings))


@pytest.mark.filterwarnings("ignore:.*is left out")
def test_the_stage_learns_the_transformer_and_nothing_else(manifest: Path, tmp_path: Path) -> None:
    run = make_run(manifest, tmp_path)
    model = run.setup.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    held = [next(iter(run.stage.data)) for _ in range(4)]
    first = evaluate_flow(run.stage.module, held)["flow"]
    assert evaluate_flow(run.stage.module, held)["flow"] == first, "the same draws each time"
    losses = [run.trainer.step().losses["flow"] for _ in range(120)]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20]), (losses[:5], losses[-5:])
    assert evaluate_flow(run.stage.module, held)["flow"] < 0.5 * first
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("code2wav.dit.") for name in changed)


@pytest.mark.filterwarnings("ignore:.*is left out")
def test_an_interrupted_run_goes_on_where_it_was(manifest: Path, tmp_path: Path) -> None:
    whole = make_run(manifest, tmp_path)
    expected = [whole.trainer.step().loss for _ in range(4)][2:]
    saves = {"save": {"folder": str(tmp_path / "saves"), "every": 0}}
    first = make_run(manifest, tmp_path, **saves)
    for _ in range(2):
        first.trainer.step()
    first.trainer.save()
    torch.manual_seed(99)
    second = make_run(manifest, tmp_path, **saves)
    assert second.trainer.resume() == 2
    assert [second.trainer.step().loss for _ in range(2)] == expected


def test_models_and_settings_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="flow"):
        FlowObjective({"mel": 1.0})
    with pytest.raises(ValueError, match="drop_rate"):
        FlowObjective(drop_rate=2.0)
    values = {
        "model": {"config": str(TINY), "parts": ("code2wav",)},
        "train": {"objective": "flow_matching", "device": "cpu"},
        "data": {"train": ({"manifest": "absent.jsonl"},)},
    }
    with pytest.raises(ValueError, match="has none"):
        build_run(TrainConfig.from_dict(values))


def test_batches_are_padded_to_their_longest(manifest: Path) -> None:
    mixture, make = maker(manifest, crop_s=1.0)
    with pytest.warns(UserWarning, match="left out"):
        works = [next(iter(flow_batches(mixture, make, batch_size=5))) for _ in range(3)]
    for work in works:
        assert work.batch.mel.shape == (5, 2 * CODES, 5) and work.tokens == 5 * CODES
