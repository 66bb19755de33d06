"""Codes of recorded speech: codec encoders by name, the cache, whole folders and manifests."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from build import seeded
from torch import Tensor
from transformers import MimiConfig, MimiModel

from omni.code2wav.code2wav import Code2Wav
from omni.config.qwen3_omni import Code2WavConfig
from omni.training.codec.codec import Codec
from omni.training.codec.speech_codes import (
    SpeechEncoder,
    cached_codes,
    encode_files,
    encode_folder,
    encode_manifest,
    load_codec_encoder,
)
from omni.training.data.sound import read_speech

RATE = 24000


class CountingEncoder:
    """Codes that follow from the samples, and how often they were asked for."""

    def __init__(self, fingerprint: str = "counting-1") -> None:
        self.calls = 0
        self.encoder = SpeechEncoder(self.encode, RATE, 2, 50, fingerprint)

    def encode(self, samples: Tensor) -> Tensor:
        self.calls += 1
        assert samples.dtype == torch.float32 and samples.dim() == 1
        frames = samples.abs()[: len(samples) // 100 * 100].view(-1, 100).mean(1)
        return torch.stack([(frames * 49).long(), (frames * 490).long() % 50])


def write_wav(path: Path, seconds: float = 0.1, rate: int = RATE, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * rate)), rate)
    return path


@pytest.fixture(scope="module")
def mimi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MimiModel]:
    """A small random Mimi and the folder that it is saved in."""
    torch.manual_seed(0)
    config = MimiConfig(
        hidden_size=16, num_filters=4, codebook_size=32, codebook_dim=8, num_quantizers=6, upsample_groups=16,
        vector_quantization_hidden_dimension=8, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=2, upsampling_ratios=[8, 6, 5, 4],
    )  # fmt: skip
    model = MimiModel(config).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("embed_sum"):  # codebooks are buffers, zero in a new model
                buffer.normal_()
    folder = tmp_path_factory.mktemp("mimi")
    model.save_pretrained(folder)
    return folder, model


def test_mimi_gives_its_own_first_codebooks(mimi: tuple[Path, MimiModel]) -> None:
    folder, model = mimi
    samples = 0.3 * torch.randn(5000, generator=seeded(1))
    with torch.no_grad():
        expected = model.encode(samples[None, None]).audio_codes[0]
    assert len(expected.unique()) > 3
    for books in (None, 4, 1):
        encoder = load_codec_encoder("mimi", folder, num_codebooks=books)
        codes = encoder(samples)
        assert codes.dtype == torch.int64 and torch.equal(codes, expected[:books])
        assert (encoder.sample_rate, encoder.codebook_size) == (24000, 32)
    same, fewer = (load_codec_encoder("mimi", folder, num_codebooks=books).fingerprint for books in (1, 2))
    assert same == encoder.fingerprint != fewer


def test_mimi_must_fit_the_models_code2wav(mimi: tuple[Path, MimiModel]) -> None:
    folder, _ = mimi
    sizes = {"num_quantizers": 3, "codebook_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "decoder_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}
    config = Code2WavConfig.from_dict(sizes | heads)
    assert load_codec_encoder("mimi", folder, code2wav=Code2Wav(config)).num_codebooks == 3
    with pytest.raises(ValueError, match=r"32 codes a codebook .* 16 at"):
        load_codec_encoder("mimi", folder, code2wav=Code2Wav(config.replace(codebook_size=16)))
    with pytest.raises(ValueError, match="has 6 codebooks, 7 were asked for"):
        load_codec_encoder("mimi", folder, num_codebooks=7)
    with pytest.raises(ValueError, match="not one of mel, mimi, omni"):
        load_codec_encoder("mimmi", folder)
    with pytest.raises(FileNotFoundError, match="no Mimi model"):
        load_codec_encoder("mimi", folder / "elsewhere")


def test_a_codec_trained_here_encodes_by_name(tmp_path: Path) -> None:
    sizes = {"num_quantizers": 3, "codebook_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "decoder_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}
    codec = Codec(Code2Wav(Code2WavConfig.from_dict(sizes | heads)))
    codec.save(tmp_path)
    samples = 0.3 * torch.randn(4000)
    encoder = load_codec_encoder("omni", tmp_path)
    assert torch.equal(encoder(samples), codec.encode(samples[None])[0])
    assert load_codec_encoder("omni", tmp_path, code2wav=codec.code2wav).fingerprint == encoder.fingerprint
    codec.save(tmp_path / "alone", decoder=False)  # the sound of the codes is left out, they are the same ones
    alone = [load_codec_encoder("omni", tmp_path / "alone").fingerprint for _ in range(2)]
    assert alone == [encoder.fingerprint] * 2
    with torch.no_grad():
        codec.encoder.to_latents.weight.mul_(2)
    codec.save(tmp_path / "other")
    assert load_codec_encoder("omni", tmp_path / "other").fingerprint != encoder.fingerprint
    with torch.no_grad():
        codec.code2wav.code_embedding.weight.add_(1)
    codec.save(tmp_path / "table")
    assert load_codec_encoder("omni", tmp_path / "table").fingerprint not in (encoder.fingerprint, *alone)
    with pytest.raises(ValueError, match="code table"):
        load_codec_encoder("omni", tmp_path, code2wav=codec.code2wav)
    with pytest.raises(ValueError, match="pass the folder"):
        load_codec_encoder("omni")


def test_recordings_come_at_the_codecs_rate(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", rate=16000)
    samples = read_speech(path, RATE)
    assert samples.shape == (2400,) and samples.dtype == torch.float32
    exact = write_wav(tmp_path / "b.wav")
    array, rate = soundfile.read(exact, dtype="float32")
    assert torch.equal(read_speech(exact, RATE), torch.from_numpy(array))  # nothing above 8 kHz is lost
    for same in ((array, rate), {"array": array, "sampling_rate": rate}, {"path": str(exact)}, exact.read_bytes()):
        torch.testing.assert_close(read_speech(same, RATE), torch.from_numpy(array))
    for bad, error in (((array, 10), ValueError), ({"array": array}, ValueError), (3, TypeError)):
        with pytest.raises(error):
            read_speech(bad, RATE)
    with pytest.raises(FileNotFoundError, match="missing"):
        read_speech(tmp_path / "missing.wav", RATE)


def test_the_cache_answers_for_the_encoder(tmp_path: Path) -> None:
    counting, cache = CountingEncoder(), tmp_path / "cache"
    path = write_wav(tmp_path / "a.wav")
    fresh = cached_codes(path, counting.encoder, cache)
    assert torch.equal(fresh, counting.encode(read_speech(path, RATE)))
    counting.calls = 0
    copy = tmp_path / "copy.wav"
    copy.write_bytes(path.read_bytes())
    for same in (path, str(path), copy, path.read_bytes(), {"path": path}):
        found = cached_codes(same, counting.encoder, cache)
        assert torch.equal(found, fresh) and found.dtype == torch.int64
    assert counting.calls == 0
    write_wav(path, seed=1)  # same name, other sound
    assert not torch.equal(cached_codes(path, counting.encoder, cache), fresh) and counting.calls == 1
    other = CountingEncoder("counting-2")
    assert torch.equal(cached_codes(copy, other.encoder, cache), fresh) and other.calls == 1
    samples = read_speech(copy, RATE).numpy()
    for rate in (24000, 48000, 24000, 48000):
        cached_codes((samples, rate), counting.encoder, cache)
    assert counting.calls == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_entries_are_made_anew_with_a_warning(tmp_path: Path, damage: str) -> None:
    counting, cache = CountingEncoder(), tmp_path / "cache"
    path = write_wav(tmp_path / "a.wav")
    fresh = cached_codes(path, counting.encoder, cache)
    (entry,) = cache.rglob("*.safetensors")
    data = entry.read_bytes()
    entry.write_bytes(
        {"cut": data[:-3], "flipped": data[:-4] + bytes([data[-4] ^ 1]) + data[-3:], "empty": b""}[damage]
    )
    with pytest.warns(UserWarning, match="made anew"):
        assert torch.equal(cached_codes(path, counting.encoder, cache), fresh)
    assert counting.calls == 2 and entry.read_bytes() == data
    assert [p.name for p in cache.rglob("*") if p.is_file()] == [entry.name]


def test_many_at_once_share_a_cache(tmp_path: Path) -> None:
    counting, path = CountingEncoder(), write_wav(tmp_path / "a.wav")
    expected, found = counting.encode(read_speech(path, RATE)), []
    work = [
        threading.Thread(target=lambda: found.append(cached_codes(path, counting.encoder, tmp_path / "cache")))
        for _ in range(8)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(found) == 8 and all(torch.equal(codes, expected) for codes in found)
    assert len([p for p in (tmp_path / "cache").rglob("*") if p.is_file()]) == 1


def test_what_an_encoder_gives_is_checked() -> None:
    def encoder(codes: Tensor) -> SpeechEncoder:
        return SpeechEncoder(lambda _: codes, RATE, 2, 10, "fixed")

    wave = torch.zeros(100)
    good = torch.tensor([[0, 9], [3, 4]], dtype=torch.int32)
    assert encoder(good)(wave).dtype == torch.int64
    for bad in (good[:1], good.float(), good[None]):
        with pytest.raises(ValueError, match="integer codes"):
            encoder(bad)(wave)
    for bad in (good + 1, good - 1):
        with pytest.raises(ValueError, match=r"fit into 0\.\.9"):
            encoder(bad)(wave)


def test_folders_are_encoded_once(tmp_path: Path) -> None:
    counting = CountingEncoder()
    for i in range(3):
        write_wav(tmp_path / "data" / f"{i % 2}" / f"{i}.wav", seed=i)
    (tmp_path / "data" / "notes.txt").write_text("not a sound")
    (tmp_path / "data" / "broken.wav").write_bytes(b"RIFF")
    report = encode_folder(tmp_path / "data", counting.encoder, tmp_path / "cache", progress=False)
    assert (report.encoded, report.found, report.frames) == (3, 0, 72)
    ((name, reason),) = report.failed
    assert name.endswith("broken.wav") and reason
    again = encode_folder(tmp_path / "data", counting.encoder, tmp_path / "cache", progress=False)
    assert (again.encoded, again.found, counting.calls) == (0, 3, 3)
    with pytest.raises(ValueError, match=r"1 recordings cannot be read, the limit is 0.*broken\.wav"):
        encode_folder(tmp_path / "data", counting.encoder, tmp_path / "cache", max_failures=0, progress=False)
    for folder in (tmp_path / "nowhere", tmp_path / "cache"):
        with pytest.raises(FileNotFoundError):
            encode_folder(folder, counting.encoder, tmp_path / "cache")


def test_manifests_are_encoded_answer_by_answer(tmp_path: Path) -> None:
    counting = CountingEncoder()
    for i in range(5):
        write_wav(tmp_path / "wavs" / f"{i}.wav", seed=i)
    rows = [
        {"messages": [], "speech": "wavs/0.wav"},
        {"messages": [], "speech": ["wavs/1.wav", None, "wavs/0.wav"]},
        {"chosen": {"content": "", "speech": "wavs/2.wav"}, "rejected": {"speech": str(tmp_path / "wavs/3.wav")}},
        {"messages": [], "chosen": "text", "speech": None},
        {"messages": [], "speech": "wavs/missing.wav"},
    ]  # fmt: skip
    manifest = tmp_path / "data.jsonl"
    manifest.write_text("\n".join([*map(json.dumps, rows), "", "{", "[1]"]))
    report = encode_manifest(manifest, counting.encoder, tmp_path / "cache", progress=False)
    assert (report.encoded, report.found, counting.calls) == (4, 0, 4)
    names = [name for name, _ in report.failed]
    assert names[:2] == [f"{manifest}:7", f"{manifest}:8"] and names[2].endswith("missing.wav")
    assert cached_codes(tmp_path / "wavs" / "3.wav", counting.encoder, tmp_path / "cache").shape == (2, 24)
    assert counting.calls == 4
    with pytest.raises(FileNotFoundError, match="does not exist"):
        encode_manifest(tmp_path / "no.jsonl", counting.encoder, tmp_path / "cache")


def test_progress_is_shown_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counting, path = CountingEncoder(), write_wav(tmp_path / "a.wav")
    encode_files([path], counting.encoder, tmp_path / "cache")
    assert capsys.readouterr().err == ""  # a moment's work
    encode_files([path], counting.encoder, tmp_path / "cache", progress=True)
    assert "speech codes" in capsys.readouterr().err
