"""A checkpoint that brings the encoder of its codec: omni-nano's own, found without a path, kept by what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from build import chat, tone, write_rows

from omni import OmniModel
from omni.cli.main import main
from omni.metrics.scores import mel_distance
from omni.packaged.nano import NANO_DATA
from omni.training.run.stages import build_run
from omni.training.run.train_config import TrainConfig

SAID = "two three", "the old dog"


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nano says to two texts, as a manifest with recordings."""
    folder = tmp_path_factory.mktemp("spoken")
    nano = OmniModel.from_pretrained("omni-nano", dtype="float32", device="cpu")
    rows = []
    for i, (text, wave) in enumerate(zip(SAID, nano.speak(list(SAID)))):
        soundfile.write(folder / f"{i}.wav", wave.numpy(), 24000)
        rows.append({"messages": chat(f"Read: {text}", text), "speech": f"{i}.wav", "speaker": "slt"})
    write_rows(folder / "rows.jsonl", rows)
    return folder


def config_of(
    folder: Path, checkpoint: str = "omni-nano", codec: dict[str, Any] | None = None, **save: Any
) -> TrainConfig:
    values: dict[str, Any] = {
        "model": {"checkpoint": checkpoint},
        "train": {"objective": "talker", "steps": 1, "parameters": ["talker.mtp.lm_head.*"], "device": "cpu"},
        "data": {"train": [{"manifest": str(folder / "rows.jsonl")}], "bucket": 2},
        "log": {"progress": False},
        "save": save,
    }
    if codec is not None:
        values["data"]["codec"] = codec
    return TrainConfig.from_dict(values)


def test_the_encoder_is_small() -> None:
    size = sum(path.stat().st_size for path in (NANO_DATA / "codec_encoder").iterdir())
    assert 0 < size <= 1_000_000


def test_its_codes_are_those_that_nano_sounds(spoken: Path) -> None:
    """Speech of nano's own voice, as codes and back: as near as the codec brings a recording of that voice."""
    from omni.training.codec.speech_codes import load_codec_encoder, own_encoder
    from omni.training.data.sound import read_speech

    found = own_encoder("omni-nano")
    assert found is not None and found[0] == "mel"
    nano = OmniModel.from_pretrained("omni-nano", dtype="float32", device="cpu")
    encoder = load_codec_encoder(*found, code2wav=nano.code2wav)
    assert (encoder.num_codebooks, encoder.codebook_size, encoder.sample_rate) == (8, 256, 24000)
    for i in range(len(SAID)):
        wave = read_speech(str(spoken / f"{i}.wav"), 24000)
        with torch.no_grad():
            again = nano.code2wav(encoder(wave)[None])[0]
        assert mel_distance(again, wave, 24000).decibels < 5
        noise = mel_distance(torch.randn_like(wave) * wave.std(), wave, 24000).decibels
        assert noise > 10


@pytest.mark.parametrize("codec", [None, {"kind": "mel"}, {"cache": "kept"}], ids=["none", "kind", "cache"])
def test_recordings_become_codes_without_a_path(
    spoken: Path, codec: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = build_run(config_of(spoken, codec=codec))
    result = run.trainer.step()
    assert result.losses["codebook_0"] < 3 and not run.stage.data.batches.skipped  # type: ignore[attr-defined]
    kept = tmp_path / "kept" if codec and "cache" in codec else spoken / "codes"
    assert len(list(kept.rglob("*.safetensors"))) == 2


def test_another_kind_than_the_checkpoints_own_is_asked_for_its_folder(spoken: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.codec\.kind = 'omni' needs the folder of an encoder"):
        build_run(config_of(spoken, codec={"kind": "omni"}))


def test_what_is_trained_keeps_the_encoder(spoken: Path, tmp_path: Path) -> None:
    """So a second voice can be made from the first one's model."""
    first, second = tmp_path / "first", tmp_path / "second"
    build_run(config_of(spoken, export=str(first))).train()
    build_run(config_of(spoken, str(first), {"kind": "mel"}, export=str(second))).train()
    for name in ("mel_codec.json", "mel_codec.safetensors"):
        shipped = (NANO_DATA / "codec_encoder" / name).read_bytes()
        assert (first / "codec_encoder" / name).read_bytes() == shipped
        assert (second / "codec_encoder" / name).read_bytes() == shipped


def test_an_evaluation_finds_it_too(spoken: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    command = ["eval", str(spoken / "rows.jsonl"), "--model", "omni-nano", "--metrics", "codec_mel"]
    assert main([*command, "--codec", "mel", "--limit", "1", "--out", str(out), "--device", "cpu"]) == 0
    numbers = json.loads(out.read_text().splitlines()[-1])
    assert "codec_mel" in json.dumps(numbers)


def test_a_recording_of_anything_has_codes(tmp_path: Path) -> None:
    """Tones and noise are no speech, but no row is blamed for that."""
    rows = []
    for i, hz in enumerate((110, 3000)):
        soundfile.write(tmp_path / f"{i}.wav", tone(0.7, hz), 16000)
        rows.append({"messages": chat("Read: two", "two"), "speech": f"{i}.wav"})
    write_rows(tmp_path / "rows.jsonl", rows)
    run = build_run(config_of(tmp_path, codec={"kind": "mel"}))
    assert run.trainer.step().tokens > 0


def test_an_encoder_is_made_from_what_the_decoder_says() -> None:
    """Where the codebooks are lost: the sounds of some codes tell most of the codes of others."""
    from omni.training.codec.mel_codec import MelCodec
    from omni.training.data.sound import read_speech

    nano = OmniModel.from_pretrained("omni-nano", dtype="float32", device="cpu")
    shipped = MelCodec.load(NANO_DATA / "codec_encoder")
    samples, rate = soundfile.read(NANO_DATA / "demo" / "request.wav", dtype="float32")
    said = [shipped.encode(read_speech((samples, round(rate * speed)), 24000)) for speed in (0.7, 0.8, 0.9, 1.1, 1.2)]
    said += [shipped.encode(torch.from_numpy(tone(3, hz, 24000))) for hz in (150, 400)]
    with pytest.raises(ValueError, match="frames cannot settle 320 values"):
        MelCodec.of_decoder(nano.code2wav, said[:1])
    codec = MelCodec.of_decoder(nano.code2wav, [*said, *(codes.flip(1) for codes in said)])
    held = shipped.encode(read_speech((samples, rate), 24000))
    with torch.no_grad():
        heard = codec.encode(nano.code2wav(held[None])[0])[:, : held.shape[1]]
    assert float((heard[0] == held[0, : heard.shape[1]]).float().mean()) > 0.5


def test_codebooks_that_were_fitted_anew_are_warned_of(spoken: Path, tmp_path: Path) -> None:
    """They are other codes than those that the model's Code2Wav sounds, however good they are."""
    from omni.training.codec.mel_codec import MelCodec

    codec = MelCodec.load(NANO_DATA / "codec_encoder")
    codec.save(tmp_path / "same")
    build_run(config_of(spoken, codec={"kind": "mel", "path": str(tmp_path / "same")}))
    codec.books.copy_(codec.books.flip(1))
    codec.save(tmp_path / "anew")
    with pytest.warns(UserWarning, match=r"another codec encoder than the one that omni-nano brings"):
        build_run(config_of(spoken, codec={"kind": "mel", "path": str(tmp_path / "anew")}))
