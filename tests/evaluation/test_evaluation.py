"""Scores of a model on a manifest: what a perfect model gets, what batches and categories change, and the hook."""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from build import GREEDY, seeded, tiny_config, tone, widen, write_rows
from torch import Tensor

from omni import OmniModel
from omni.evaluation.row_metrics import METRICS, Need, Record, Score, chosen_letter, combine
from omni.evaluation.suite import (
    EvalOptions,
    EvalResult,
    check_metrics,
    evaluate_rows,
    evaluation_hook,
    load_transcriber,
    required_parts,
)
from omni.packaged.toy import toy_model, toy_processor
from omni.training.data.manifest import Manifest, Row
from omni.training.run.lora import add_lora

ROOT = Path(__file__).parents[2]
OPTIONS = EvalOptions(batch_size=3, max_new_tokens=6, max_frames=3)
RATE = 16000


@pytest.fixture(scope="module")
def model() -> OmniModel:
    """A random model that is heard, whose greedy text is printable ASCII, which is read back as the same ids."""
    model = widen(toy_model(seed=1), 10)
    with torch.no_grad():
        printable = torch.zeros(len(model.thinker.lm_head.weight), 1)
        printable[33:127] = 1  # the packaged tokenizer's ids of these bytes
        model.thinker.lm_head.weight.mul_(printable)
    return model


def user(number: int, folder: Path) -> list[dict[str, Any]]:
    """Prompts of several lengths, one with sound."""
    if number == 2:
        soundfile.write(folder / "tone.wav", tone(1.0, hz=280), RATE)
        return [{"role": "user", "content": "<audio>what?"}]
    return [{"role": "user", "content": "How? " * (1 + 3 * number)}]


def write(path: Path, rows: list[dict[str, Any]]) -> Manifest:
    return Manifest(write_rows(path, rows))


def own_answers(model: OmniModel, folder: Path, count: int = 5, **arguments: Any) -> list[dict[str, Any]]:
    """Rows whose references are what the model itself says, one by one, with the codes of it."""
    rows = []
    for number in range(count):
        messages = user(number, folder)
        heard = [{"type": "audio", "audio": str(folder / "tone.wav")}, "what?"]
        asked = [{"role": "user", "content": heard}] if number == 2 else messages
        out = model.generate(model.processor(asked), max_new_tokens=6, max_frames=3, text_sampling=GREEDY, **arguments)
        answer = {"role": "assistant", "content": out.text[0]}
        row = {
            "messages": [*messages, answer],
            "codes": out.codes[0].tolist(),
            "category": ["even", "odd"][number % 2],
        }
        rows.append(row | ({"audios": ["tone.wav"]} if number == 2 else {}))
    return rows


@pytest.fixture(scope="module")
def perfect(model: OmniModel, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("perfect")
    return write(folder / "own.jsonl", own_answers(model, folder, audio_sampling=GREEDY, residual_sampling=GREEDY))


def altered(manifest: Manifest, changes: dict[int, dict[str, Any]], name: str) -> Manifest:
    """The same rows with some keys changed, beside the first manifest."""
    rows = [{**manifest.raw(i), **changes.get(i, {})} for i in range(len(manifest))]
    return write(manifest.path.with_name(name), rows)


def answered(manifest: Manifest, place: int, text: str) -> dict[str, Any]:
    *before, answer = manifest.raw(place)["messages"]
    return {"messages": [*before, {**answer, "content": text}]}


# ---- scores ----


def test_a_perfect_model_scores_perfectly(model: OmniModel, perfect: Manifest) -> None:
    result = evaluate_rows(model, perfect, ["wer", "cer", "exact_match", "accuracy", "bleu", "codes"], OPTIONS)
    numbers = result.numbers
    assert (numbers["wer"], numbers["cer"], numbers["exact_match"], numbers["accuracy"]) == (0, 0, 1, 1)
    assert numbers["code_accuracy"] == 1 and all(numbers[f"code_accuracy_{k}"] == 1 for k in range(4))
    assert result.counted["wer"] == result.counted["code_accuracy"] == len(result.records) == 5
    assert [record.name for record in result.records] == [perfect.name(i) for i in range(5)]
    assert [record.answer for record in result.records] == [record.reference for record in result.records]
    assert not result.skipped and not result.missing


def test_a_wrong_answer_and_a_wrong_code_are_seen(model: OmniModel, perfect: Manifest) -> None:
    codes = perfect.raw(3)["codes"]
    codes[2][-1] = (codes[2][-1] + 1) % 16  # nothing comes after it but the last codebook of its frame
    wrong = altered(perfect, {1: answered(perfect, 1, "something else"), 3: {"codes": codes}}, "wrong.jsonl")
    result = evaluate_rows(model, wrong, ["exact_match", "wer", "codes"], OPTIONS)
    assert result.numbers["exact_match"] == 0.8 and result.numbers["wer"] > 0
    scores = [record.scores["exact_match"].mean for record in result.records]
    assert scores == [1, 0, 1, 1, 1]
    frames = sum(len(perfect.raw(i)["codes"][0]) for i in range(5))
    right = evaluate_rows(model, perfect, ["codes"], OPTIONS).numbers
    own = result.records[3].scores["code_accuracy_2"]
    assert own.total == own.items - 1 and frames >= 5
    assert result.records[3].scores["code_accuracy_1"].mean == 1
    assert result.numbers["code_accuracy_2"] < 1 and result.numbers["code_loss"] > right["code_loss"]


def test_loss_is_that_of_the_whole_conversation(model: OmniModel, perfect: Manifest) -> None:
    """Against the model's own logits, row by row; only the last answer counts."""
    first = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Yes."}]
    rows = write(
        perfect.path.with_name("turns.jsonl"), [{"messages": [*first, *perfect.raw(i)["messages"]]} for i in (0, 1)]
    )
    result = evaluate_rows(model, rows, ["loss"], OPTIONS)
    losses = []
    for place in (0, 1):
        ids = model.processor(rows[place].messages, add_generation_prompt=False).input_ids
        prompt = model.processor(rows[place].messages[:-1]).input_ids.shape[1]
        log_probs = model.forward(
            model.processor(rows[place].messages, add_generation_prompt=False)
        ).logits.log_softmax(-1)
        last = int((ids[0] == model.config.im_end_token_id).nonzero()[-1])
        own = log_probs[0, prompt - 1 : last].gather(-1, ids[0, prompt : last + 1, None])
        losses.append(-own.detach().double())
        assert result.records[place].scores["loss"].items == len(own)
        assert result.records[place].scores["loss"].total == pytest.approx(float(losses[-1].sum()), rel=1e-5)
    mean = float(torch.cat(losses).mean())
    assert result.numbers["loss"] == pytest.approx(mean, rel=1e-5)
    assert result.numbers["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)


def same(a: EvalResult, b: EvalResult) -> None:
    assert [record.answer for record in a.records] == [record.answer for record in b.records]
    assert a.numbers.keys() == b.numbers.keys() and a.categories.keys() == b.categories.keys()
    for name, value in a.numbers.items():
        assert b.numbers[name] == pytest.approx(value, rel=1e-4), name


def test_batches_change_nothing(model: OmniModel, perfect: Manifest) -> None:
    mixed = altered(perfect, {1: answered(perfect, 1, "something else"), 4: {"codes": None}}, "mixed.jsonl")
    metrics = ["wer", "loss", "codes", "mel", "length_ratio"]
    results = [
        evaluate_rows(model, mixed, metrics, EvalOptions(batch_size=size, max_new_tokens=6, max_frames=3))
        for size in (1, 2, 5)
    ]
    assert results[0].counted["mel"] == results[0].counted["code_loss"] == 4 and results[0].counted["wer"] == 5
    same(results[0], results[1])
    same(results[0], results[2])
    limited = evaluate_rows(model, mixed, ["wer"], EvalOptions(max_new_tokens=6, limit=2))
    assert [record.name for record in limited.records] == [mixed.name(0), mixed.name(1)]


def test_categories_are_scored_alone(model: OmniModel, perfect: Manifest) -> None:
    wrong = altered(perfect, {1: answered(perfect, 1, "not this"), 4: {"category": None}}, "categories.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the key is known here
        result = evaluate_rows(model, wrong, ["wer", "accuracy"], OPTIONS)
    assert {name: own["accuracy"] for name, own in result.categories.items()} == {"even": 1, "odd": 0.5}
    odd = write(wrong.path.with_name("odd.jsonl"), [wrong.raw(1), wrong.raw(3)])
    assert evaluate_rows(model, odd, ["wer"], OPTIONS).numbers["wer"] == result.categories["odd"]["wer"] > 0
    assert result.records[4].category is None and result.counted["accuracy"] == 5


def test_rates_are_over_all_references_together() -> None:
    records = [Record("a", "x", "", scores={"wer": Score(1, 1)}), Record("b", "x", "", scores={"wer": Score(0, 9)})]
    assert combine(records, ["wer"], "en") == ({"wer": 0.1}, {"wer": 2})
    assert Score(0, 0).mean == 0 and Score(2, 0).mean == math.inf


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("(C)", "C"), ("B. Paris", "B"), ("**D**", "D"), ("A dog", None), ("I'd say so", None),
        ("The answer is (B).", "B"), ("Answer: C", "C"), ("First the answer is A, then the answer is D.", "D"),
        ("The answer is unclear", None), ("", None), ("b", None),
    ],
)  # fmt: skip
def test_the_option_that_an_answer_chooses(answer: str, letter: str | None) -> None:
    assert chosen_letter(answer) == letter


# ---- speech ----


def test_generated_speech_beside_its_reference(model: OmniModel, tmp_path: Path) -> None:
    """Drawn with one seed the same speech comes again, from codes and from a recording of it."""
    rows = own_answers(model, tmp_path, 3, seed=7)
    options = EvalOptions(batch_size=2, max_new_tokens=6, max_frames=3, seed=7)
    result = evaluate_rows(model, write(tmp_path / "codes.jsonl", rows), ["mel", "length_ratio"], options)
    assert result.numbers["mel"] == pytest.approx(0, abs=0.01) and result.numbers["length_ratio"] == 1
    for number, row in enumerate(rows):
        wave = model.code2wav(torch.tensor(row.pop("codes"))[None])[0].detach()
        soundfile.write(tmp_path / f"{number}.wav", wave.numpy(), 24000, subtype="FLOAT")
        row["speech"] = f"{number}.wav"
    recorded = write(tmp_path / "waves.jsonl", rows)
    heard = evaluate_rows(model, recorded, ["mel", "length_ratio"], options)
    assert heard.numbers["mel"] == pytest.approx(0, abs=0.01) and heard.numbers["length_ratio"] == 1
    other = evaluate_rows(model, recorded, ["mel"], EvalOptions(batch_size=2, max_new_tokens=6, max_frames=3, seed=8))
    assert other.numbers["mel"] > 1  # decibels


def test_recordings_through_the_codec(model: OmniModel, tmp_path: Path) -> None:
    """A codec that gives the very codes of a recording loses nothing; one that does not loses something."""
    codes = torch.randint(0, 16, (4, 6), generator=seeded(0))
    wave = model.code2wav(codes[None])[0].detach()
    soundfile.write(tmp_path / "a.wav", wave.numpy(), 24000, subtype="FLOAT")
    messages = [*user(0, tmp_path), {"role": "assistant", "content": "Yes."}]
    silent = {"messages": messages}
    rows = write(tmp_path / "a.jsonl", [{**silent, "speech": "a.wav"}, silent])
    result = evaluate_rows(model, rows, ["codec_mel", "codes"], OPTIONS, codes=lambda source: codes)
    assert result.numbers["codec_mel"] == pytest.approx(0, abs=0.01) and result.counted["codec_mel"] == 1
    worse = evaluate_rows(model, rows, ["codec_mel"], OPTIONS, codes=lambda source: codes.flip(0))
    assert worse.numbers["codec_mel"] > 1
    nothing = evaluate_rows(
        model, write(tmp_path / "b.jsonl", [silent]), ["wer", "codec_mel"], OPTIONS, codes=lambda s: codes
    )
    assert nothing.missing == ("codec_mel",) and "codec_mel" not in nothing.numbers


def test_what_is_heard_is_compared_with_what_was_to_be_said(model: OmniModel, perfect: Manifest) -> None:
    options = replace(OPTIONS, limit=3)
    sounds: dict[bytes, int] = {}

    def numbers(samples: Tensor, sample_rate: int) -> str:
        assert samples.dtype == torch.float32 and samples.dim() == 1 and sample_rate == 24000
        return str(sounds.setdefault(samples.numpy().tobytes(), len(sounds)))

    first = evaluate_rows(model, perfect, ["spoken_wer", "wer"], options, transcribe=numbers)
    assert first.numbers["wer"] == 0 and first.numbers["spoken_wer"] > 0 and len(sounds) == 3
    said = {record.transcript: record.answer for record in first.records}
    assert all(record.frames for record in first.records)

    def hears(samples: Tensor, sample_rate: int) -> str:
        return said[str(sounds[samples.numpy().tobytes()])] or ""

    again = evaluate_rows(model, perfect, ["spoken_wer", "spoken_cer"], options, transcribe=hears)
    assert again.numbers["spoken_wer"] == again.numbers["spoken_cer"] == 0
    with pytest.raises(TypeError, match="must return a text, got NoneType"):
        evaluate_rows(model, perfect, ["spoken_wer"], replace(options, limit=1), transcribe=lambda samples, rate: None)  # type: ignore


# ---- rows that cannot be used ----


def test_bad_rows_are_named_and_passed_over(model: OmniModel, perfect: Manifest) -> None:
    bad = altered(
        perfect,
        {
            0: {"messages": [{"role": "assistant", "content": "hello"}], "codes": None},
            1: {"speaker": "nobody", "codes": None},  # found when the batch runs
            2: {"audios": ["nowhere.wav"]},
        },
        "bad.jsonl",
    )
    with pytest.warns(UserWarning, match="is skipped"):
        result = evaluate_rows(model, bad, ["exact_match", "mel"], OPTIONS)
    assert [record.name for record in result.records] == [bad.name(3), bad.name(4)]
    assert result.numbers["exact_match"] == 1
    reasons = [result.skipped[bad.name(i)] for i in range(3)]
    assert all(re.search(told, reason) for told, reason in zip(("before it", "nobody", "nowhere.wav"), reasons))
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"2 rows are bad, more than skip_limit 1:\n  .*bad.jsonl:1: messages need"),
    ):
        evaluate_rows(model, bad, ["exact_match"], EvalOptions(skip_limit=1, max_new_tokens=2, speaker="Ethan"))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of 1 rows can be used"):
        evaluate_rows(model, bad, ["exact_match"], EvalOptions(limit=1))


def test_rows_need_no_manifest(model: OmniModel, perfect: Manifest) -> None:
    rows: list[Row] = [perfect[i] for i in range(2)]
    result = evaluate_rows(model, rows, ["exact_match"], OPTIONS)
    assert result.numbers == {"exact_match": 1} and result.categories == {}


def test_the_reference_is_the_last_answers_text(model: OmniModel, tmp_path: Path) -> None:
    """Reasoning, media and what follows the answer are no part of it."""
    ask = {"role": "user", "content": "a"}
    pieces = [{"type": "text", "text": "one "}, {"type": "audio"}, {"type": "text", "text": "two"}]
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE, dtype=np.float32), RATE)
    rows = write(
        tmp_path / "texts.jsonl",
        [
            {"messages": [ask, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes "}]},
            {"messages": [ask, {"role": "assistant", "content": pieces}, ask], "audios": ["a.wav"]},
            {"messages": [ask], "chosen": "good", "rejected": "bad"},
        ],
    )
    result = evaluate_rows(model, rows, ["wer", "loss"], OPTIONS)
    assert [record.reference for record in result.records] == ["yes", "one two", "good"]
    assert not result.skipped and all("loss" in record.scores for record in result.records)


# ---- what cannot be asked ----


def test_metrics_say_what_they_lack(model: OmniModel, perfect: Manifest) -> None:
    with pytest.raises(ValueError, match="unknown metric 'were'; did you mean 'wer'"):
        evaluate_rows(model, perfect, ["were"])
    with pytest.raises(ValueError, match="metrics must be a list"):
        evaluate_rows(model, perfect, [])
    with pytest.raises(ValueError, match="'spoken_wer' needs a transcriber"):
        evaluate_rows(model, perfect, ["wer", "spoken_wer"])
    with pytest.raises(ValueError, match="'codec_mel' needs the codec"):
        evaluation_hook(toy_processor(), perfect, ["codec_mel"])
    with pytest.raises(ValueError, match="unknown speaker 'nobody'"):
        evaluate_rows(model, perfect, ["mel"], EvalOptions(speaker="nobody"))
    mute = OmniModel(tiny_config(), ("thinker",))
    with pytest.raises(ValueError, match="no processor"):
        evaluate_rows(mute, perfect, ["wer"])
    with pytest.raises(ValueError, match="talker was not loaded"):
        evaluate_rows(mute, perfect, ["codes"], processor=toy_processor())
    for wrong in ({"batch_size": 0}, {"limit": -1}, {"language": "English please"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EvalOptions(**wrong)  # type: ignore[arg-type]


def test_parts_that_metrics_need() -> None:
    assert required_parts(["wer", "loss"]) == ("thinker",)
    assert required_parts(["codes"]) == ("thinker", "talker")
    assert required_parts(["codec_mel"]) == ("thinker", "code2wav")
    assert required_parts(list(METRICS)) == ("thinker", "talker", "code2wav")
    assert check_metrics(["wer"], transcribe=None, codes=None) == {Need.ANSWER}


def test_transcribers_are_found_by_name() -> None:
    assert load_transcriber("json:dumps") is json.dumps
    for name, told in (
        ("json", "no form module:name"),
        ("json:dmps", "has no 'dmps'"),
        ("nojson:a", "PYTHONPATH"),
    ):
        with pytest.raises(ValueError, match=told):
            load_transcriber(name)
    with pytest.raises(ValueError, match="not a function but str"):
        load_transcriber("json:__name__")


# ---- the hook of the trainer ----


def test_the_hook_scores_the_model_in_training(perfect: Manifest, model: OmniModel) -> None:
    """It changes nothing in the model, and a low-rank update of zero changes nothing in the scores."""
    hook = evaluation_hook(toy_processor(), perfect, ["accuracy", "codes"], limit=3, options=OPTIONS)
    expected = evaluate_rows(model, perfect, ["accuracy", "codes"], EvalOptions(3, 6, 3, limit=3))
    trained = toy_model(seed=1)
    trained.load_state_dict(model.state_dict())
    add_lora(trained, ["thinker.layers.*", "talker.layers.*"], rank=2)
    trained.processor = None
    trained.thinker.train()
    modes = [module.training for module in trained.modules()]
    generator = torch.get_rng_state()
    numbers = hook(trained, 10)
    assert torch.equal(generator, torch.get_rng_state()) and trained.processor is None
    assert modes == [module.training for module in trained.modules()]
    assert all(p.grad is None for p in trained.parameters())
    assert numbers["accuracy"] == numbers["accuracy/even"] == numbers["accuracy/odd"] == 1
    assert {name: value for name, value in numbers.items() if "/" not in name} == pytest.approx(expected.numbers)
    with pytest.raises(TypeError, match="OmniModel, got Linear"):
        hook(torch.nn.Linear(1, 1), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hook_runs_as_training_does(perfect: Manifest, dtype: torch.dtype) -> None:
    """Under autocast, with parameters of either type."""
    hook = evaluation_hook(toy_processor(), perfect, ["wer", "loss", "codes", "mel"], limit=2, options=OPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        numbers = hook(toy_model(seed=1).to(dtype), 1)
    assert all(math.isfinite(value) for value in numbers.values())
    assert {"wer", "perplexity", "code_accuracy_3", "mel"} <= numbers.keys()
