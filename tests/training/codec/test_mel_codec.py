"""A codec encoder fitted to recordings: codes, their meaning in Code2Wav's table, its folder, its place in a stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
import torch
from build import TINY, fixed, seeded, tiny_config

from omni.code2wav.code2wav import Code2Wav
from omni.packaged.toy import TOY_DATA
from omni.training.codec.mel_codec import MelCodec
from omni.training.codec.speech_codes import load_codec_encoder
from omni.training.data.sound import read_speech
from omni.training.run.stages import build_run
from omni.training.run.train_config import TrainConfig

ROOT = Path(__file__).parents[3]
RATE, HOP = 24000, 1920


def spoken(speed: float = 1.0) -> torch.Tensor:
    """The packaged question at 24 kHz, pitch following its speed."""
    samples, rate = soundfile.read(TOY_DATA / "question.wav", dtype="float32")
    return read_speech((samples, round(rate * speed)), RATE)


def code2wav_of(books: int = 4) -> Code2Wav:
    config = tiny_config().code2wav_config
    assert config is not None and config.num_quantizers == books
    with fixed():
        return Code2Wav(config)


@pytest.fixture(scope="module")
def fitted() -> MelCodec:
    codec = MelCodec(num_codebooks=4, codebook_size=64, width=32)
    recordings = [spoken(speed) for speed in (0.8, 0.9, 1.0, 1.1, 1.2)]
    left = codec.fit(recordings, generator=seeded(0))
    assert (left[1:] < left[:-1]).all() and left[-1] < 0.2
    return codec


def test_codes_cover_every_frame_and_do_not_see_ahead(fitted: MelCodec) -> None:
    wave = spoken()
    codes = fitted.encode(wave)
    assert codes.shape == (4, -(-len(wave) // HOP)) and codes.dtype == torch.int64
    assert int(codes.min()) >= 0 and int(codes.max()) < 64 and len(codes[0].unique()) > 8
    changed = wave.clone()
    changed[10 * HOP :] = torch.randn(len(wave) - 10 * HOP)
    assert torch.equal(fitted.encode(changed)[:, :10], codes[:, :10])


def test_codes_hardly_depend_on_phase(fitted: MelCodec) -> None:
    """The same spectrum upside down has the same codes, unlike a waveform's."""
    assert torch.equal(fitted.encode(-spoken()), fitted.encode(spoken()))


def test_each_codebook_brings_the_patch_nearer(fitted: MelCodec) -> None:
    wave = spoken(1.05)  # not among the recordings that it was fitted to
    codes = fitted.encode(wave)
    patches = (fitted.patches(wave) - fitted.mean) @ fitted.components
    found, errors = torch.zeros_like(patches), []
    for book, chosen in zip(fitted.books, codes):
        found = found + book[chosen]
        errors.append(float((patches - found).square().sum() / patches.square().sum()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.3


def test_fitting_is_repeatable() -> None:
    a, b = MelCodec(2, 16, 8), MelCodec(2, 16, 8)
    for codec in (a, b):
        codec.fit([spoken()], generator=seeded(3))
    assert torch.equal(a.books, b.books) and torch.equal(a.encode(spoken()), b.encode(spoken()))


def test_the_mean_that_code2wav_reads_is_the_patch(fitted: MelCodec) -> None:
    code2wav = code2wav_of()
    fitted.start_table(code2wav)
    codes = fitted.encode(spoken())
    offsets = 64 * torch.arange(4)[:, None]
    read = code2wav.code_embedding.weight[codes + offsets].mean(0)
    patch = sum(book[chosen] for book, chosen in zip(fitted.books, codes))
    torch.testing.assert_close(read * fitted.books[0].std(), patch, atol=1e-4, rtol=1e-4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="number of codebooks"):
        MelCodec(3, 64, 32).start_table(code2wav)


def test_its_folder_and_its_name(fitted: MelCodec, tmp_path: Path) -> None:
    fitted.save(tmp_path / "codes")
    encoder = load_codec_encoder("mel", tmp_path / "codes", code2wav=code2wav_of())
    assert torch.equal(encoder(spoken()), fitted.encode(spoken())) and encoder.fingerprint.startswith("mel-4-")
    with pytest.raises(FileNotFoundError, match=r"mel_codec\.json"):
        MelCodec.load(tmp_path)
    with pytest.raises(ValueError, match="no default"):
        load_codec_encoder("mel")
    settings = json.loads((tmp_path / "codes" / "mel_codec.json").read_text())
    (tmp_path / "codes" / "mel_codec.json").write_text(json.dumps({**settings, "width": 31}))
    with pytest.raises(ValueError, match="fit it again"):
        MelCodec.load(tmp_path / "codes")


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="evenly"):
        MelCodec(2, 16, 8, hop_length=1921)
    with pytest.raises(ValueError, match="width"):
        MelCodec(2, 16, 321)
    with pytest.raises(ValueError, match="more recordings"):
        MelCodec(2, 512, 8).fit([spoken()])


def test_code2wav_learns_to_decode_them(fitted: MelCodec, tmp_path: Path) -> None:
    """The codec stage with `decoder_only` and `fresh`: the table starts as the codebooks, the loss falls."""
    fitted.save(tmp_path / "codes")
    soundfile.write(tmp_path / "spoken.wav", spoken().numpy(), RATE)
    manifest = tmp_path / "recordings.jsonl"
    manifest.write_text(json.dumps({"audio": "spoken.wav"}) + "\n")
    values = {
        "model": {"config": str(TINY), "parts": ["code2wav"]},
        "train": {"objective": "codec", "steps": 25, "precision": "fp32", "device": "cpu"},
        "objective": {
            "decoder_only": True, "fresh": True, "crop_s": 0.32, "batch_size": 2, "mel_scales": [[512, 40]],
            "floor_db": -80.0,
        },
        "optimiser": {"lr": 3e-3},
        "data": {
            "train": [{"manifest": str(manifest)}],
            "codec": {"kind": "mel", "path": str(tmp_path / "codes"), "cache": str(tmp_path / "cache")},
        },
        "log": {"progress": False},
    }  # fmt: skip
    run = build_run(TrainConfig.from_dict(values))
    started = code2wav_of()
    fitted.start_table(started)
    table = run.setup.model.code2wav.code_embedding.weight  # type: ignore[union-attr]
    torch.testing.assert_close(table, started.code_embedding.weight)
    losses = [run.trainer.step().losses["mel"] for _ in range(25)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
