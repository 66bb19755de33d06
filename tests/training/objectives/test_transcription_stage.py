"""The audio encoder trained alone, through the trainer: manifests, clips learnt by heart, nothing else moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from build import TINY, fixed, tiny_config, write_rows
from torch.nn import functional as F

from omni import OmniModel
from omni.layers.init import initialise
from omni.packaged.toy import TOY_DATA, toy_processor
from omni.training.data.manifest import Manifest
from omni.training.data.mixture import Draw, Mixture
from omni.training.objectives.transcription_stage import (
    ENGLISH,
    CharacterLabels,
    ClipBatch,
    ClipMaker,
    TokenLabels,
    Transcriber,
    TranscriptionObjective,
    clip_batches,
    evaluate_transcriber,
    spelled,
    text_of,
)
from omni.training.run.optimiser import trainable
from omni.training.run.stages import build_run
from omni.training.run.train_config import LogTable, OptimiserTable, RunTable, SaveTable, TrainConfig
from omni.training.run.trainer import Trainer

ROOT = Path(__file__).parents[3]
RATE = 16000
TONES_HZ = {"a": 300, "b": 700, "c": 1500, "d": 3200}
TEXTS = ("ab cd", "dd b", "c a")
LABELS = CharacterLabels(" abcd")


def tiny_model() -> OmniModel:
    with fixed():
        model = OmniModel(tiny_config())
        initialise(model.audio_encoder, lambda name: 0.1)  # as wide as so small an encoder needs
    return model


def transcriber(model: OmniModel, head: Any = "ctc", labels: int = LABELS.size) -> Transcriber:
    options = {"dim": 32, "layers": 1, "heads": 2} if head == "attention" else {}
    with fixed(1):
        return Transcriber(model.audio_encoder, labels, head, **options)


def sound(text: str) -> torch.Tensor:
    """A tone of 0.3 s for each letter, with silence after it; a space is silence."""
    parts = [0.5 * torch.sin(2 * torch.pi * TONES_HZ.get(c, 0) * torch.arange(4800) / RATE) for c in text]
    return torch.cat([F.pad(part, (0, 1600)) for part in parts])


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Three clips, each row in another of the forms that hold a recording and its text."""
    for i, text in enumerate(TEXTS):
        soundfile.write(tmp_path / f"{i}.wav", sound(text).numpy(), RATE)
    rows = [
        {"audio": "0.wav", "text": TEXTS[0].upper() + "!"},
        {
            "messages": [{"role": "user", "content": "<audio>"}, {"role": "assistant", "content": TEXTS[1]}],
            "audios": ["1.wav"],
        },
        {
            "messages": [{"role": "user", "content": "Say c a."}, {"role": "assistant", "content": TEXTS[2]}],
            "speech": "2.wav",
        },
    ]
    return write_rows(tmp_path / "clips.jsonl", rows)


def config(steps: int, folder: Path | None = None, **run: Any) -> TrainConfig:
    return TrainConfig(
        RunTable("transcription", steps=steps, precision="fp32", clip=5.0, **run),
        optimiser=OptimiserTable(lr=3e-3, betas=(0.9, 0.999), weight_decay=0.0, schedule="constant"),
        log=LogTable(None, progress=False),
        save=SaveTable(None if folder is None else str(folder), every=2),
    )


def batches(manifest: Path, model: Transcriber, **options: Any) -> Any:
    return clip_batches(Mixture([Manifest(manifest)], seed=3), LABELS, model, batch_size=3, **options)


@pytest.mark.parametrize("head", ["ctc", "attention"])
def test_three_clips_are_transcribed_without_error_and_nothing_else_changes(
    manifest: Path, tmp_path: Path, head: str
) -> None:
    model = tiny_model()
    module = transcriber(model, head)
    rest = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("audio_encoder")}
    encoder = {n: p.clone() for n, p in model.audio_encoder.named_parameters()}
    data = batches(manifest, module)
    clips = [next(data)]
    trainer = Trainer(module, TranscriptionObjective(module), data, config(400))
    for step in range(400):
        trainer.step()
        if step % 10 == 9 and evaluate_transcriber(module, clips, LABELS)["cer"] == 0:
            break
    assert evaluate_transcriber(module, clips, LABELS) == {"wer": 0.0, "cer": 0.0}
    assert all(torch.equal(p, rest[n]) for n, p in model.named_parameters() if n in rest)
    moved = {n for n, p in model.audio_encoder.named_parameters() if not torch.equal(p, encoder[n])}
    assert {n for n in encoder if not n.endswith("k_proj.bias")} <= moved
    model.save_pretrained(tmp_path / "model")
    again = OmniModel.from_pretrained(tmp_path / "model", device="cpu")
    for clip in clips:
        output = again.audio_encoder(clip.features, clip.lengths)
        assert torch.equal(output.embeds, model.audio_encoder(clip.features, clip.lengths).embeds)


@pytest.mark.parametrize("head", ["ctc", "attention"])
def test_gradients_reach_every_parameter_and_counts_are_those_of_the_losses(manifest: Path, head: str) -> None:
    module = transcriber(tiny_model(), head)
    objective = TranscriptionObjective(module)
    batch = objective.prepare(module, next(batches(manifest, module)))
    losses = objective.losses(module, batch)
    assert objective.counts(batch) == {head: losses[head][1].item()}
    losses[head].total.backward()
    for name, p in module.named_parameters():
        # a bias of the keys shifts all scores of a query alike, which softmax does not see
        assert name.endswith("k_proj.bias") or (p.grad is not None and p.grad.any()), name


def test_only_what_is_chosen_learns_and_a_resumed_run_equals_the_whole_one(manifest: Path, tmp_path: Path) -> None:
    def run(folder: Path, steps: int) -> Transcriber:
        module = transcriber(tiny_model())
        trainable(module, ["*", "!audio_encoder.conv*"])
        trainer = Trainer(module, TranscriptionObjective(module), batches(manifest, module), config(steps, folder))
        trainer.resume()
        trainer.train()
        return module

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    with pytest.warns(UserWarning, match=r"train\.steps 2 -> 4"):
        parts = run(tmp_path / "parts", 4)
    start = dict(transcriber(tiny_model()).named_parameters())
    for (name, p), other in zip(whole.named_parameters(), parts.parameters()):
        assert torch.equal(p, other)
        assert name.endswith("k_proj.bias") or torch.equal(p, start[name]) == name.startswith("audio_encoder.conv")


def test_clips_hold_what_the_row_says(manifest: Path) -> None:
    module = transcriber(tiny_model())
    maker = ClipMaker(LABELS, module)
    clips = [maker(Draw(Manifest(manifest), row)) for row in range(3)]
    assert tuple(clip.text for clip in clips) == TEXTS  # normalised: no capitals, no punctuation
    assert [LABELS.decode(clip.labels) for clip in clips] == list(TEXTS)
    assert [clip.features.shape for clip in clips] == [(128, 40 * len(text)) for text in TEXTS]
    batch = next(batches(manifest, module))
    assert sorted(batch.texts) == sorted(TEXTS) and batch.tokens == sum(batch.lengths) == 40 * sum(map(len, TEXTS))


def test_rows_that_do_not_fit_are_left_out_and_bad_ones_skipped(manifest: Path) -> None:
    rows = [
        {"audio": "0.wav", "text": "ab cd"},
        {"audio": "2.wav", "text": "abcd " * 20},  # more labels than the clip has tokens
        {"audio": "0.wav", "text": "xyz"},
        {"audios": ["0.wav", "1.wav"], "text": "ab"},
        {"audio": "0.wav"},
        {"audio": "0.wav", "text": "!"},
    ]
    write_rows(manifest, rows)
    data = batches(manifest, transcriber(tiny_model()))
    with pytest.warns(UserWarning):
        found = [next(data) for _ in range(4)]
    assert {name.rsplit(":")[-1] for batch in found for name in batch.names} == {"1"}
    reasons = {name.rsplit(":")[-1]: reason for name, reason in data.skipped.items()}
    assert reasons.keys() == {"3", "4", "5"} and data.left_out > 1
    assert "'x'" in reasons["3"] and "has 2" in reasons["4"] and "no text" in reasons["5"]
    long = batches(manifest, transcriber(tiny_model()), max_s=1.0)
    with pytest.raises(ValueError, match=r"none of the last .* rows can be used"), pytest.warns():
        next(long)
    attention = batches(manifest, transcriber(tiny_model(), "attention"))
    with pytest.warns(UserWarning):
        names = {name.rsplit(":")[-1] for _ in range(6) for name in next(attention).names}
    assert names == {"1", "2"}  # a decoder may write any number of labels


@pytest.mark.parametrize("head", ["ctc", "attention"])
def test_an_empty_text_is_nothing_to_hear(manifest: Path, head: str) -> None:
    """The encoder learns to say blanks: noise and silence are rows with the text ""."""
    write_rows(manifest, [{"audio": "0.wav", "text": ""}, {"audio": "1.wav", "text": "dd b"}])
    module = transcriber(tiny_model(), head)
    data = batches(manifest, module)
    clips = [next(data) for _ in range(2)]
    assert {text: labels for clip in clips for text, labels in zip(clip.texts, clip.labels)}[""] == []
    trainer = Trainer(module, TranscriptionObjective(module), data, config(400))
    for step in range(400):
        assert trainer.step().losses[head] < float("inf")
        if step % 10 == 9 and evaluate_transcriber(module, clips, LABELS)["cer"] == 0:
            break
    found: dict[str, list[int]] = {}
    for clip in clips:
        found |= zip(clip.texts, module.transcribe(clip.features, clip.lengths))
    assert found[""] == [] and LABELS.decode(found["dd b"]) == "dd b"


@pytest.mark.parametrize("head", ["ctc", "attention"])
def test_letters_are_learnt_beside_the_labels(manifest: Path, head: str) -> None:
    """Three letters a token at most; what is too short for its letters, or has none, costs the labels nothing."""
    rows = [("0.wav", "ab cd"), ("1.wav", "dd b"), ("2.wav", "")]
    write_rows(manifest, [{"audio": audio, "text": text} for audio, text in rows])
    options = {"dim": 32, "layers": 1, "heads": 2} if head == "attention" else {}
    with fixed(1):
        module = Transcriber(tiny_model().audio_encoder, LABELS.size, head, spelling=3, **options)  # type: ignore[arg-type]
    objective = TranscriptionObjective(module, {"spelling": 0.5})
    assert objective.weights == {head: 1.0, "spelling": 0.5}
    trainer = Trainer(module, objective, batches(manifest, module), config(400))
    assert trainer.step().losses.keys() == {head, "spelling"}
    batch = next(batches(manifest, module))

    def read() -> list[str]:
        logits = module.spelling(module(batch.features, batch.lengths).embeds)  # type: ignore[misc]
        clips = logits.argmax(-1).split([3 * module.audio_encoder.num_tokens(n) for n in batch.lengths])
        merged = [clip.unique_consecutive().tolist() for clip in clips]
        return ["".join(ENGLISH[label] for label in labels if label != len(ENGLISH)) for labels in merged]

    for step in range(399):
        trainer.step()
        if step % 10 == 9 and read() == batch.texts:
            break
    assert read() == batch.texts
    assert spelled("Ab-C é") == [ENGLISH.index(letter) for letter in "abc "]
    tight = ClipBatch(batch.features[:1, :, :8], [8], [[0]], ["ab cd ab cd"])
    losses = objective.losses(module, objective.prepare(module, tight))
    assert losses["spelling"].total == 0 and losses[head].total > 0
    assert objective.counts(tight)["spelling"] == 1
    with pytest.raises(ValueError, match=f"losses are '{head}'"):
        TranscriptionObjective(transcriber(tiny_model(), head), {"spelling": 1.0})


def test_the_stage_puts_recordings_into_surroundings(manifest: Path, tmp_path: Path) -> None:
    """Options of [objective] reach what is trained on, and leave what is evaluated alone."""
    soundfile.write(tmp_path / "hum.wav", sound("a").numpy(), RATE)
    noises = write_rows(tmp_path / "noises.jsonl", [{"audio": "hum.wav"}])
    shares = dict.fromkeys(("room", "telephone", "overload", "equaliser"), 0.5)
    spans = {"noise_db": [0, 10], "room_s": [0.1, 0.2], "gain_db": [-40, 0], "silence_s": [0.5, 0.5]}
    around = {"noise": 1.0, "noises": [str(noises)], **shares, **spans}

    def build(**objective: Any) -> Any:
        values = {
            "model": {"config": str(TINY), "parts": ["thinker"]},
            "train": {"objective": "transcription", "steps": 1, "precision": "fp32", "device": "cpu"},
            "objective": {"batch_size": 3, **objective},
            "data": {"train": [{"manifest": str(manifest)}], "eval": [{"manifest": str(manifest)}]},
            "eval": {"every": 1},
            "log": {"progress": False},
        }
        return build_run(TrainConfig.from_dict(values))

    plain, changed = build(), build(**around)
    before, after = next(iter(plain.stage.data)), next(iter(changed.stage.data))
    assert after.texts == before.texts
    assert after.lengths == [length + 100 for length in before.lengths]  # a second of silence
    assert not torch.equal(after.features[:, :, 50:90], before.features[:, :, :40])
    assert plain.stage.evaluate(plain.stage.module, 0).keys() == changed.stage.evaluate(changed.stage.module, 0).keys()
    with pytest.raises(ValueError, match=r"objective\.noise must be at least 0 and at most 1"):
        build(noise=2.0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build(noise=1.0, noises=[str(tmp_path / "nowhere.jsonl")])


def test_labels_turn_text_into_numbers_and_back() -> None:
    labels = CharacterLabels.of(["ba", "c a"])
    assert (labels.alphabet, labels.size, labels.encode("a b")) == (" abc", 4, [1, 0, 2])
    assert labels.decode([3, 0, 1]) == "c a"
    with pytest.raises(ValueError, match=r"'z' of the text 'az' is not in the alphabet"):
        labels.encode("az")
    with pytest.raises(ValueError, match="no character"):
        CharacterLabels.of([""])
    tokens = TokenLabels(toy_processor())
    ids = tokens.encode("hello there")
    assert tokens.decode(ids) == "hello there" and max(ids) < tokens.size
    assert text_of({"messages": [{"role": "assistant", "content": [{"type": "text", "text": "hi"}]}]}) == "hi"


def test_heads_and_weights_that_are_not_there_are_named() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="did you mean 'ctc'"):
        Transcriber(model.audio_encoder, 3, "ctcc")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no options, got dim"):
        Transcriber(model.audio_encoder, 3, "ctc", dim=4)
    with pytest.raises(ValueError, match="losses are 'ctc'"):
        TranscriptionObjective(transcriber(model), {"attention": 1.0})
    half = transcriber(tiny_model().bfloat16())
    features, lengths = torch.zeros(1, 128, 100), [100]
    assert half.transcribe(features, lengths)[0] is not None and half.head.proj.weight.dtype == torch.float32


def test_the_stage_spells_characters_or_tokens(manifest: Path) -> None:
    """objective.labels: a label for each character, or for each id of the model's tokenizer; language "": no rules."""

    def build(**objective: str) -> Any:
        values = {
            "model": {"config": str(TINY), "parts": ["thinker"], "processor": str(TOY_DATA)},
            "train": {"objective": "transcription", "steps": 1, "precision": "fp32", "device": "cpu"},
            "objective": {"batch_size": 1, "max_s": 5.0, **objective},
            "data": {"train": [{"manifest": str(manifest)}]},
            "log": {"progress": False},
        }
        return build_run(TrainConfig.from_dict(values))

    processor = toy_processor()
    assert build().stage.module.head.blank == CharacterLabels().size
    run = build(labels="tokens", language="")
    assert run.stage.module.head.blank == len(processor.tokenizer)
    batch = next(iter(run.stage.data))
    assert processor.decode(batch.labels[0]) == batch.texts[0]
    assert run.trainer.step().losses["ctc"] > 0
    with pytest.raises(ValueError, match="did you mean 'tokens'"):
        build(labels="token")
    tied = build(head="embeddings", labels="tokens", blank="~", language="")
    assert [name for name, _ in tied.stage.module.head.named_parameters()] == ["scale", "prior"]
    assert tied.trainer.step().losses["ctc"] > 0
    with pytest.raises(ValueError, match="a text of one token"):
        build(head="embeddings", labels="tokens")
    with pytest.raises(ValueError, match="is 2 tokens"):
        build(head="embeddings", labels="tokens", blank="~~")
