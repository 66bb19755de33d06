"""Codec training through the trainer: crops of recordings, both objectives, discriminators, exact resume and export."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from build import fixed, seeded, tiny_config
from torch import Tensor

from omni import OmniModel
from omni.packaged.toy import TOY_DATA
from omni.training.codec.codec import Codec
from omni.training.codec.codec_stage import (
    Adversary,
    CodecObjective,
    DecoderObjective,
    decode_with_gradients,
    evaluate_codec,
    evaluate_decoder,
    make_codec,
)
from omni.training.codec.discriminators import Discriminators
from omni.training.data.manifest import Manifest
from omni.training.data.mixture import Mixture
from omni.training.data.recordings import Crops, SoundFolder, crop_batches, open_sounds
from omni.training.data.sound import read_speech
from omni.training.run.train_config import LogTable, OptimiserTable, RunTable, SaveTable, TrainConfig
from omni.training.run.trainer import Trainer

ROOT = Path(__file__).parents[3]
RATE = 24000
HOP = 240
SCALES = ((512, 40), (1024, 60))


def tiny_model() -> OmniModel:
    """The tiny model, its Code2Wav with frames of 10 ms."""
    config = tiny_config()
    assert config.code2wav_config is not None
    sizes = config.code2wav_config.replace(num_hidden_layers=1, upsample_rates=(5, 4, 3))
    with fixed():
        return OmniModel(config.replace(code2wav_config=sizes))


def tiny_codec() -> Codec:
    with fixed(1):
        return make_codec(tiny_model().code2wav, fresh=True)


def voices(seconds: float = 0.25) -> list[Tensor]:
    """A spoken sample at four speeds, pitch included: fp32 [n] at 24 kHz each."""
    samples, rate = soundfile.read(TOY_DATA / "question.wav", dtype="float32")
    spoken = [read_speech((samples, round(rate * speed)), RATE) for speed in (0.8, 1.0, 1.25, 1.5)]
    start, length = int(0.6 * RATE), int(seconds * RATE)  # of the speech, behind a silence
    return [wave[start : start + length] for wave in spoken]


def crops(waves: Tensor, lengths: list[int] | None = None, codes: Tensor | None = None) -> Crops:
    lengths = lengths or [waves.shape[1]] * len(waves)
    return Crops(waves, torch.tensor(lengths), codes, [""] * len(waves))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Recordings whose every sample is different, of 0.5 s, 0.3 s and, too short for a crop, 0.05 s."""
    path = tmp_path / "sounds"
    (path / "below").mkdir(parents=True)
    for name, seconds in (("a.wav", 0.5), ("b.wav", 0.3), ("below/short.wav", 0.05)):
        n = int(seconds * RATE)
        soundfile.write(path / name, torch.linspace(-0.9, 0.9, n).numpy(), RATE, subtype="FLOAT")
    (path / "notes.txt").write_text("no sound")
    return path


def stream(folder: Path, **options: Any) -> Any:
    return crop_batches(Mixture([SoundFolder(folder)], seed=5), RATE, 0.1, batch_size=4, **options)


def same(a: Crops, b: Crops) -> bool:
    return torch.equal(a.waves, b.waves) and torch.equal(a.lengths, b.lengths) and a.names == b.names


# ---- recordings


def test_crops_lie_inside_their_recordings_and_short_ones_are_padded(folder: Path) -> None:
    batches = stream(folder)
    places, names = set(), set()
    for _ in range(12):
        batch = next(batches)
        assert batch.waves.shape == batch.mask.shape == (4, 2400)
        for wave, length, mask, name in zip(batch.waves, batch.lengths.tolist(), batch.mask, batch.names):
            recorded = read_speech(folder / name.split(":")[1], RATE)
            found = int((recorded - wave[0]).abs().argmin())
            assert torch.equal(wave[:length], recorded[found : found + length])
            assert length == min(2400, len(recorded)) and not wave[length:].any()
            assert mask.sum() == length and mask[:length].all()
            places.add(found)
            names.add(name)
    assert len(names) == 3 and len(places) > 20


@pytest.mark.filterwarnings("ignore:.*is skipped")
def test_crops_resume_exactly_with_any_number_of_workers(folder: Path) -> None:
    (folder / "bad.wav").write_bytes(b"RIFF, but nothing else")
    with pytest.warns(UserWarning, match=r"bad\.wav is skipped"):
        whole = stream(folder)
        expected = [next(whole) for _ in range(8)]
    assert list(whole.skipped) == [f"{folder}:bad.wav"]
    for workers in (0, 2):
        first = stream(folder, workers=workers)
        assert all(same(next(first), batch) for batch in expected[:5])
        state = json.loads(json.dumps(first.state_dict()))
        first.close()
        second = stream(folder, workers=workers)
        next(second)
        second.load_state_dict(state)
        assert all(same(next(second), batch) for batch in expected[5:])
        assert second.state_dict()["mixture"] == whole.state_dict()["mixture"]
        second.close()


def test_bad_recordings_are_counted_to_a_limit(folder: Path) -> None:
    for i in range(3):
        (folder / f"bad{i}.wav").write_bytes(b"RIFF, but nothing else")
    with pytest.raises(ValueError, match=r"2 rows are bad, more than skip_limit 1:\n.*bad\d\.wav"), pytest.warns():
        batches = stream(folder, skip_limit=1)
        for _ in range(20):
            next(batches)
    for file in folder.rglob("*.wav"):
        if not file.name.startswith("bad"):
            file.unlink()
    with pytest.raises(ValueError, match="none of the last 1003 rows can be used"), pytest.warns():
        next(stream(folder))


def test_recordings_are_found_wherever_a_row_names_them(folder: Path) -> None:
    spoken = {"role": "user", "content": [{"type": "audio", "audio": "b.wav"}, {"type": "text", "text": "What?"}]}
    rows = [
        {"audio": "a.wav"},
        {"audios": ["a.wav"], "messages": [{"role": "user", "content": "<audio>"}]},
        {"speech": [None, "a.wav"]},
        {"messages": [spoken]},
        {"text": "no sound"},
    ]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    batches = crop_batches(Mixture([open_sounds(path)], seed=1), RATE, 0.5, batch_size=4)
    with pytest.warns(UserWarning, match="names no recording"):
        lengths = {name: n for batch in (next(batches), next(batches)) for name, n in zip(batch.names, batch.lengths)}
    assert {int(name.split(":")[1]): int(n) for name, n in lengths.items()} == {1: 12000, 2: 12000, 3: 12000, 4: 7200}
    assert isinstance(open_sounds(path), Manifest) and isinstance(open_sounds(folder), SoundFolder)
    with pytest.raises(FileNotFoundError, match="holds no audio file"):
        (folder / "empty").mkdir()
        open_sounds(folder / "empty")


@pytest.mark.parametrize("missing", [0, 1])
def test_crops_with_codes_begin_at_a_frame(folder: Path, missing: int) -> None:
    def codes(source: Any) -> Tensor:
        frames = -(-len(read_speech(source, RATE)) // HOP) - missing
        return torch.arange(frames)[None] + torch.tensor([[0], [1000]])

    batches = stream(folder, codes=codes, hop_length=HOP)
    for _ in range(6):
        batch = next(batches)
        assert batch.codes is not None and batch.codes.shape == (4, 2, 10)
        for wave, length, code, name in zip(batch.waves, batch.lengths.tolist(), batch.codes, batch.names):
            recorded = read_speech(folder / name.split(":")[1], RATE)
            start = int((recorded - wave[0]).abs().argmin())
            frames = -(-length // HOP)
            assert start % HOP == 0 and torch.equal(code[0, :frames], torch.arange(frames) + start // HOP)
            assert torch.equal(wave[:length], recorded[start : start + length]) and not wave[length:].any()
    wrong = stream(folder, codes=lambda source: torch.zeros(2, 3, dtype=torch.int64), hop_length=HOP, skip_limit=0)
    with pytest.raises(ValueError, match="frames of 240"):
        next(wrong)


# ---- the objectives


def config(steps: int, folder: Path | None = None, every: int = 0, lr: float = 3e-3, **run: Any) -> TrainConfig:
    return TrainConfig(
        RunTable("codec", steps=steps, precision="fp32", clip=5.0, **run),
        optimiser=OptimiserTable(lr=lr, betas=(0.8, 0.99), weight_decay=0.0, schedule="constant"),
        log=LogTable(None, progress=False),
        save=SaveTable(None if folder is None else str(folder), every=every),
    )


class Given:
    """The batches of a list, again and again."""

    def __init__(self, batches: list[Crops]) -> None:
        self.batches, self.place = batches, 0

    def __iter__(self) -> Any:
        while True:
            self.place += 1
            yield self.batches[(self.place - 1) % len(self.batches)]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def adversary(lr: float = 1e-3) -> Adversary:
    with fixed(7):
        return Adversary(Discriminators(width=4, periods=(3,), scales=(2,), windows=(128,)), lr)


@pytest.mark.parametrize("samples", [2400, 2500])
def test_counts_are_those_of_the_losses(samples: int) -> None:
    codec = tiny_codec()
    waves = torch.stack(voices())[:3, :samples]
    objective = CodecObjective(codec, adversary=adversary(), mel_scales=SCALES)
    batch = objective.prepare(codec, crops(waves, [samples, 900, 1]))
    losses = objective.losses(codec, batch)
    assert objective.counts(batch) == {name: losses[name][1].item() for name in objective.weights}
    decoder = DecoderObjective(codec.code2wav, mel_scales=SCALES)
    batch = crops(waves[:, :2400], [2400, 900, 1], codec.encode(waves[:, :2400]))
    losses = decoder.losses(codec, decoder.prepare(codec, batch))
    assert decoder.counts(batch) == {name: losses[name][1].item() for name in decoder.weights}


def test_every_parameter_learns_and_the_discriminators_do_not_from_the_codec() -> None:
    codec = tiny_codec()
    objective = CodecObjective(codec, adversary=adversary(), mel_scales=SCALES)
    batch = objective.prepare(codec, crops(torch.stack(voices())[:3]))  # more frames than codes
    losses = objective.losses(codec, batch)
    sum(losses[name].total * weight for name, weight in objective.weights.items()).backward()  # type: ignore[union-attr]
    assert [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert objective.adversary is not None
    assert all(p.grad is None and not p.requires_grad for p in objective.adversary.judges.parameters())
    before = {name: p.detach().clone() for name, p in objective.adversary.judges.named_parameters()}
    objective.losses(codec, objective.prepare(codec, batch))
    assert all(not torch.equal(p, before[name]) for name, p in objective.adversary.judges.named_parameters())


def test_discriminators_take_one_step_however_the_batch_is_cut() -> None:
    """With plain gradient descent in place of Adam, which makes as much of a small gradient as of a large one."""
    waves = torch.stack(voices(0.1))
    results = []
    for parts in ([waves], [waves[:1], waves[1:]]):
        codec, judged = tiny_codec(), adversary()
        judged.optimizer = torch.optim.SGD(judged.judges.parameters(), lr=0.1)  # type: ignore[assignment]
        before = [p.detach().clone() for p in judged.judges.parameters()]
        objective = CodecObjective(codec, adversary=judged, mel_scales=SCALES, initialise=False)
        settings = config(2, lr=1e-9, accumulate=len(parts))
        Trainer(codec, objective, Given([crops(part) for part in parts]), settings).train()
        results.append([p.detach() - was for p, was in zip(judged.judges.parameters(), before)])
    for one, many in zip(*results):
        assert one.any()
        torch.testing.assert_close(one, many, rtol=1e-3, atol=1e-6)


def test_a_late_adversary_is_silent_until_its_step() -> None:
    codec = tiny_codec()
    objective = CodecObjective(codec, adversary=adversary(), start_adversarial_step=2, mel_scales=SCALES)
    data = Given([crops(torch.stack(voices(0.1)))])
    trainer = Trainer(codec, objective, data, config(3))
    results = [trainer.step() for _ in range(3)]
    assert [r.losses["adversarial"] > 0 for r in results] == [False, False, True]
    assert all(r.losses.keys() == results[0].losses.keys() for r in results)


def test_what_is_frozen_stays_bit_equal() -> None:
    codec = tiny_codec()
    codec.encoder.requires_grad_(False)
    codec.code2wav.code_embedding.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in codec.named_parameters()}
    objective = CodecObjective(codec, mel_scales=SCALES, restart_every=1, restart_below=10.0)
    Trainer(codec, objective, Given([crops(torch.stack(voices(0.1)))]), config(2)).train()
    for name, p in codec.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad), name


def run(folder: Path, waves: Tensor, steps: int) -> tuple[Trainer, CodecObjective]:
    """Start, or go on with, an adversarial run that restarts codes in every other step, two micro-batches a step."""
    codec = tiny_codec()
    objective = CodecObjective(
        codec, adversary=adversary(), start_adversarial_step=1, mel_scales=SCALES, restart_every=2, usage_decay=0.5,
        restart_below=0.5,
    )  # fmt: skip
    data = Given([crops(waves[:2]), crops(waves[2:])])
    settings = config(steps, folder, every=2, accumulate=2)
    trainer = Trainer(codec, objective, data, settings, also={"codec": objective})
    trainer.resume()
    trainer.train()
    return trainer, objective


def test_an_interrupted_run_equals_the_whole_one(tmp_path: Path) -> None:
    waves = torch.stack(voices(0.05))
    whole, judged = run(tmp_path / "whole", waves, 4)
    run(tmp_path / "parts", waves, 2)
    with pytest.warns(UserWarning, match=r"train\.steps 2 -> 4"):
        parts, judged_too = run(tmp_path / "parts", waves, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters.values(), parts.parameters.values()))
    assert judged.adversary is not None and judged_too.adversary is not None
    assert all(map(torch.equal, judged.adversary.judges.parameters(), judged_too.adversary.judges.parameters()))
    assert torch.equal(judged.usage.shares, judged_too.usage.shares)
    codec = tiny_codec()
    other = CodecObjective(codec, mel_scales=SCALES)
    with pytest.raises(ValueError, match="not both adversarial"):
        other.load_state_dict(judged.state_dict())


@pytest.mark.parametrize(
    ("count", "seconds", "steps", "lr", "part"),
    [(3, 0.1, 40, 4e-3, 0.35), pytest.param(4, 0.25, 200, 2e-3, 0.15, marks=pytest.mark.slow)],
)
def test_a_codec_overfits_spoken_samples_and_is_exported(
    tmp_path: Path, count: int, seconds: float, steps: int, lr: float, part: float
) -> None:
    """From random weights on spoken samples: the mel loss falls to a small part, and the saved model then has it."""
    model = tiny_model()
    torch.manual_seed(1)
    codec = make_codec(model.code2wav, fresh=True)
    folder = tmp_path / "sounds"
    folder.mkdir()
    waves = torch.stack(voices(seconds))[:count]
    for i, wave in enumerate(waves):
        soundfile.write(folder / f"{i}.wav", wave.numpy(), RATE, subtype="FLOAT")
    data = crop_batches(Mixture([SoundFolder(folder)], seed=0), RATE, seconds, batch_size=count)
    objective = CodecObjective(codec, {"stft": 0.0}, mel_scales=SCALES[:1], restart_every=5, usage_decay=0.7)
    before = evaluate_codec(codec, [crops(waves)])
    trainer = Trainer(codec, objective, data, config(steps, lr=lr), also={"codec": objective})
    losses = [trainer.step().losses["mel"] for _ in range(steps)]
    after = evaluate_codec(codec, [crops(waves)])
    assert losses[-1] < part * losses[0]
    assert after["mel_db"] < 1.3 * part * before["mel_db"] and after["perplexity"] > 8
    model.save_pretrained(tmp_path / "model")
    again = OmniModel.from_pretrained(tmp_path / "model", device="cpu")
    codes = codec.encode(waves)
    assert torch.equal(again.code2wav(codes), codec.decode(codes))


# ---- Code2Wav alone


def test_code2wav_learns_to_decode_given_codes() -> None:
    model = tiny_model()
    waves = torch.stack(voices(0.1))
    codes = torch.randint(64, (4, 4, 10), generator=seeded(0))
    model.requires_grad_(False)
    model.code2wav = make_codec(model.code2wav, fresh=True).code2wav.requires_grad_(True)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    objective = DecoderObjective(model.code2wav, {"stft": 0.0}, mel_scales=SCALES[:1])
    batch = crops(waves, codes=codes)
    before = evaluate_decoder(model.code2wav, [batch])
    Trainer(model, objective, Given([batch]), config(30)).train()
    after = evaluate_decoder(model.code2wav, [batch])
    assert after["mel_db"] < 0.5 * before["mel_db"]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_given_codes_are_decoded_as_code2wav_does_with_gradients_everywhere() -> None:
    codec = tiny_codec().double()
    codes = torch.randint(64, (2, 4, 5), generator=seeded(0))
    assert torch.equal(decode_with_gradients(codec.code2wav, codes), codec.code2wav(codes))
    with torch.no_grad():
        codec.code2wav.decoder[-1].conv.bias.fill_(3.0)
    wave = decode_with_gradients(codec.code2wav, codes)
    assert wave.max() == 1
    wave.sum().backward()
    assert codec.code2wav.decoder[-1].conv.bias.grad.item() == wave.numel()


def test_samples_are_never_rounded_to_bf16() -> None:
    """Under autocast the decoder computes as without it, of codes that are given and of those of an encoder."""
    codec = tiny_codec()
    codes = torch.randint(64, (2, 4, 5), generator=seeded(0))
    wave = torch.randn(2, 4000, generator=seeded(1)) * 0.1
    plain = decode_with_gradients(codec.code2wav, codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decode_with_gradients(codec.code2wav, codes), plain)
        out = codec(wave)
    assert out.wave.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(out.wave, codec.decode(out.codes)[:, : wave.shape[1]], rtol=0, atol=1e-5)


def test_what_lies_behind_a_recording_does_not_count() -> None:
    codec = tiny_codec()
    waves = torch.stack(voices(0.1))[:2]
    codes = torch.randint(64, (2, 4, 10), generator=seeded(0))
    objective = DecoderObjective(codec.code2wav, mel_scales=SCALES)
    results = []
    for code in (0, 63):
        other = codes.clone()
        other[1, :, 4:] = code
        batch = crops(waves.clone(), [2400, 4 * HOP], other)
        batch.waves[1, 4 * HOP :] = 0
        results.append({name: loss.total.item() for name, loss in objective.losses(codec, batch).items()})
    assert results[0] == results[1] and all(math.isfinite(x) for x in results[0].values())


def test_codes_and_weights_that_do_not_fit_are_named() -> None:
    codec = tiny_codec()
    objective = DecoderObjective(codec.code2wav)
    waves = torch.zeros(1, 2400)
    for codes in (torch.zeros(1, 3, 10, dtype=torch.int64), torch.full((1, 4, 10), 64)):
        with pytest.raises(ValueError, match=r"Code2Wav has 4 of 0 \.\. 63"):
            objective.prepare(codec, crops(waves, codes=codes))
    with pytest.raises(ValueError, match="have no codes"):
        objective.prepare(codec, crops(waves))
    with pytest.raises(ValueError, match="pass an adversary"):
        CodecObjective(codec, {"feature": 1.0})
    with pytest.raises(ValueError, match="did you mean 'commitment'"):
        CodecObjective(codec, {"comitment": 1.0})
    with pytest.raises(ValueError, match="above 0"):
        adversary(lr=0.0)
