"""Values that checkpoints bring beside their weights are followed, named, or refused in words."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from build import ROOT, TOY_DATA, chat, picture_item, sound_item, speckle, tiny_model, write_processor

from omni import OmniInputs, OmniModel, OmniProcessor, SamplingConfig, StreamingConfig
from omni.checkpoint.save import parse_size
from omni.config.model import OmniConfig
from omni.training.run.train_config import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:the conversation does not begin with the system message")
RELEASED_FILES = ("first", "second")


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text()) if path.is_file() else {}
    change(values)
    path.write_text(json.dumps(values))


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


# ---- generation_config.json ----

IGNORED = [
    {"no_repeat_ngram_size": 3},
    {"num_beams": 4, "length_penalty": 0.8},
    {"suppress_tokens": [5, 6]},
    {"begin_suppress_tokens": [5], "bad_words_ids": [[7]]},
    {"typical_p": 0.9, "min_p": 0.05, "max_new_tokens": 40},
    {"thinker_temperature": 0.5, "thinker_do_sample": True},
    {"stop_strings": ["\n\n"]},
    {"stop_strings": "END", "token_healing": True},
]


@pytest.mark.parametrize("values", IGNORED, ids=lambda values: "+".join(values))
def test_values_that_are_not_followed_are_named_once(values, folder: Path) -> None:
    edit(folder / "generation_config.json", lambda v: v.update(values))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        OmniModel.from_pretrained(folder, device="cpu").save_pretrained(folder.parent / "again")
    mine = [str(w.message) for w in said if "generation_config" in str(w.message)]
    assert len(mine) == 1 and all(f"{name} = {value!r}" in mine[0] for name, value in values.items())
    again = json.loads((folder.parent / "again" / "generation_config.json").read_text())
    assert again.items() >= values.items()


def test_neutral_and_followed_values_are_not_named(folder: Path) -> None:
    neutral = {"no_repeat_ngram_size": 0, "num_beams": 1, "suppress_tokens": None, "bad_words_ids": [], "min_p": 0.0}
    followed = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "talker_top_k": 3, "eos_token_id": [258, 257]}
    other = {"pad_token_id": 0, "transformers_version": "5", "_from_model_config": True, "max_length": 20}
    edit(folder / "generation_config.json", lambda v: v.update(neutral | followed | other))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OmniModel.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("eos", ["{}", ["258", "{}"], [258, "{}"]], ids=str)
def test_an_id_to_stop_at_may_be_digits(eos, folder: Path) -> None:
    model = OmniModel.from_pretrained(folder, device="cpu")
    inputs = model.processor(chat("hi"))
    plain = model.generate(inputs, max_new_tokens=6, return_audio=False).replies[0]
    assert len(plain) == 6
    written = [str(one).format(plain[2]) for one in eos] if isinstance(eos, list) else eos.format(plain[2])
    edit(folder / "generation_config.json", lambda v: v.update(eos_token_id=written))
    stopped = OmniModel.from_pretrained(folder, device="cpu")
    out = stopped.generate(inputs, max_new_tokens=6, return_audio=False)
    assert out.replies[0] == plain[: plain.index(plain[2]) + 1] and out.reason == ["stop"]
    model.generation_config = {"eos_token_id": written}
    assert model.generate(inputs, max_new_tokens=6, return_audio=False).replies == out.replies


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": "end"}, "eos_token_id must be token ids, got 'end'"),
        ({"eos_token_id": [258, None]}, "eos_token_id must be token ids"),
        ({"eos_token_id": 10**9}, "eos_token_id 1000000000 lies outside the vocabulary of 640"),
        ({"eos_token_id": -1}, "eos_token_id must be token ids"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"talker_top_k": [1]}, "talker_top_k must be a number"),
        ({"do_sample": "yes"}, "do_sample must be true or false"),
    ],
)
def test_values_that_are_none_are_refused_at_once(values, message, folder: Path) -> None:
    edit(folder / "generation_config.json", lambda v: v.update(values))
    with pytest.raises(ValueError, match=message):
        OmniModel.from_pretrained(folder, device="cpu")


# ---- preprocessor files ----


@pytest.fixture(params=RELEASED_FILES)
def processor_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Processor files in the released layout, of either family."""
    target = tmp_path / "processor"
    if request.param == "second":
        return write_processor(target)
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOY_DATA / name, target)
    OmniProcessor.from_pretrained(TOY_DATA).files.save(target, "{{ messages }}")
    (target / "chat_template.jinja").unlink()
    return target


REFUSED = [
    ({"sampling_rate": 24000}, "sampling_rate 24000 is not supported.*write 16000"),
    ({"sampling_rate": 0}, "sampling_rate 0 is not supported"),
    ({"hop_length": 0}, "hop_length must be a whole number from 1"),
    ({"hop_length": 10**6}, "hop_length must be a whole number"),
    ({"hop_length": "160"}, "hop_length must be a whole number"),
    ({"n_fft": -1}, "n_fft must be a whole number"),
    ({"n_fft": 10**12}, "n_fft must be a whole number"),
    ({"feature_size": 0}, "feature_size must be a whole number"),
    ({"feature_size": 10**9}, "feature_size must be a whole number"),
    ({"dither": 0.1}, "dither 0.1 asks for a step"),
    ({"image_mean": [0.5, 0.5]}, "image_mean must be three numbers"),
    ({"image_mean": ["a", "b", "c"]}, "image_mean must be three numbers"),
    ({"image_std": [0.5, 0, 0.5]}, "image_std must be three positive numbers"),
    ({"image_std": [0.5] * 4}, "image_std must be three positive numbers"),
    ({"patch_size": 10**6}, "patch_size must be a whole number from 1 to 256"),
    ({"patch_size": 0}, "patch_size must be a whole number"),
    ({"merge_size": 10**6}, "merge_size must be a whole number"),
    ({"temporal_patch_size": 10**6}, "temporal_patch_size must be a whole number"),
    ({"min_pixels": -5}, "min_pixels must be a whole number"),
    ({"min_pixels": 10**6, "max_pixels": 10**5}, "min_pixels 1000000 exceeds max_pixels 100000"),
    ({"rescale_factor": "big"}, "rescale_factor must be a positive number"),
    ({"resample": 99}, "resample must be one of Pillow's filters, 0, 1, .*'lanczos', got 99"),
    ({"resample": -1}, "resample must be one of"),
    ({"resample": "cubic"}, "resample must be one of"),
    ({"resample": [3]}, "resample must be one of"),
    ({"do_resize": "no"}, "do_resize must be true or false"),
    ({"do_center_crop": True}, "do_center_crop True asks for a step"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda x: json.dumps(x) if isinstance(x, dict) else "")
def test_preprocessor_values_that_cannot_be_followed_are_refused(values, message, processor_folder: Path) -> None:
    edit(processor_folder / "preprocessor_config.json", lambda v: v.update(values))
    with pytest.raises(ValueError, match=message):
        OmniProcessor.from_pretrained(processor_folder)


def test_pictures_that_are_not_to_be_resized_stay_as_they_are(processor_folder: Path) -> None:
    plain = OmniProcessor.from_pretrained(processor_folder)
    side = plain.vision.image_processor.patch_size * plain.vision.merge_size
    edit(processor_folder / "preprocessor_config.json", lambda v: v.update(do_resize=False))
    processor = OmniProcessor.from_pretrained(processor_folder)
    small = [{"role": "user", "content": [picture_item(2 * side, side), "what"]}]
    film = [{"role": "user", "content": [{"type": "video", "video": speckle(4, side, side), "fps": 2.0}, "what"]}]
    assert processor(small).image_grid_thw.tolist() == [[1, 4, 2]]
    assert processor(film).video_grid_thw.tolist() == [[2, 2, 2]]
    wrong = [{"role": "user", "content": [picture_item(side + 1, side), "what"]}]
    with pytest.raises(ValueError, match=rf"{side} x {side + 1} pixels.*do_resize false.*multiples of {side}"):
        processor(wrong)
    wrong_film = [{"role": "user", "content": [{"type": "video", "video": speckle(4, side, side + 1), "fps": 2.0}]}]
    with pytest.raises(ValueError, match=r"a video frame has.*do_resize false"):
        processor(wrong_film)


def test_switches_that_are_followed(processor_folder: Path) -> None:
    """Pictures that are neither scaled nor normalised arrive as bytes; sound is as before."""
    edit(processor_folder / "preprocessor_config.json", lambda v: v.update(do_rescale=False, do_normalize=False))
    processor = OmniProcessor.from_pretrained(processor_folder)
    inputs = processor([{"role": "user", "content": [picture_item(), sound_item(0.2), "what"]}])
    assert inputs.pixel_values.max() > 200 and torch.equal(inputs.pixel_values, inputs.pixel_values.round())


SIMPLE = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
TOOLS = "{{ 'with tools: ' }}" + SIMPLE
TOOL = {"type": "function", "function": {"name": "look", "description": "looks", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "templates",
    [
        {"default": SIMPLE, "tool_use": TOOLS},
        [{"name": "default", "template": SIMPLE}, {"name": "tool_use", "template": TOOLS}],
    ],
    ids=["mapping", "list"],
)
@pytest.mark.parametrize("file", ["chat_template.json", "tokenizer_config.json", "jinja files"])
def test_templates_by_name(file, templates, processor_folder: Path, tmp_path: Path) -> None:
    (processor_folder / "chat_template.json").unlink(missing_ok=True)
    if file == "jinja files":
        (processor_folder / "chat_template.jinja").write_text(SIMPLE)
        (processor_folder / "additional_chat_templates").mkdir()
        (processor_folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)
    elif isinstance(templates, dict) and file == "tokenizer_config.json":
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        edit(processor_folder / file, lambda v: v.update(chat_template=listed))
    else:
        edit(processor_folder / file, lambda v: v.update(chat_template=templates))
    processor = OmniProcessor.from_pretrained(processor_folder)
    processor.save_pretrained(tmp_path / "again")
    for each in (processor, OmniProcessor.from_pretrained(tmp_path / "again")):
        plain, tools = each(chat("hi")), each(chat("hi"), tools=[TOOL])
        assert each.decode(plain.input_ids[0], skip_special_tokens=False).startswith("<|im_start|>user\nhi")
        assert each.decode(tools.input_ids[0], skip_special_tokens=False).startswith("with tools: ")


def test_one_template_by_name_and_none_that_is_default(processor_folder: Path) -> None:
    edit(processor_folder / "chat_template.json", lambda v: v.update(chat_template={"mine": SIMPLE}))
    assert OmniProcessor.from_pretrained(processor_folder).chat.template == SIMPLE
    edit(processor_folder / "chat_template.json", lambda v: v.update(chat_template={"a": SIMPLE, "b": TOOLS}))
    with pytest.raises(ValueError, match=r"one called 'default'; got a, b"):
        OmniProcessor.from_pretrained(processor_folder)


# ---- config.json against the weights and the vocabulary ----


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("thinker_config.text_config.num_experts", 10**9),
        ("thinker_config.text_config.num_hidden_layers", 10**9),
        ("thinker_config.audio_config.encoder_layers", 10**8),
        ("thinker_config.vision_config.depth", 10**8),
        ("talker_config.text_config.num_experts", 10**9),
        ("talker_config.code_predictor_config.num_hidden_layers", 10**9),
        ("code2wav_config.num_hidden_layers", 10**9),
        ("thinker_config.text_config.vocab_size", 10**18),
        ("thinker_config.text_config.vocab_size", 10**10),
        ("thinker_config.text_config.moe_intermediate_size", 10**18),
        ("code2wav_config.decoder_dim", 2**61),
        ("code2wav_config.decoder_dim", 10**40),
        ("code2wav_config.upsample_rates", [10**40, 2]),
        ("thinker_config.vision_config.patch_size", 10**25),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_sizes_without_weights_are_refused_before_anything_is_built(path, value, strict, folder: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        *outer, name = path.split(".")
        for key in outer:
            values = values[key]
        values[name] = value

    edit(folder / "config.json", change)
    with pytest.raises(ValueError, match=r"config\.json") as error:
        OmniModel.from_pretrained(folder, device="cpu", strict=strict)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["im_start", "im_end", "system", "user", "assistant"])
@pytest.mark.parametrize("value", [640, 10**9, -1])
def test_ids_of_the_chat_lie_in_the_vocabulary(name, value, folder: Path) -> None:
    edit(folder / "config.json", lambda v: v.update({f"{name}_token_id": value}))
    with pytest.raises(ValueError, match=f"{name}_token_id {value} lies outside the vocabulary of 640"):
        OmniConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", ["audio", "image", "video", "audio_start", "vision_start"])
def test_ids_of_media_lie_in_the_vocabulary(name, folder: Path) -> None:
    edit(folder / "config.json", lambda v: v["thinker_config"].update({f"{name}_token_id": 640}))
    with pytest.raises(ValueError, match=f"{name}_token_id 640 lies outside the vocabulary of 640"):
        OmniConfig.from_pretrained(folder)


@pytest.mark.parametrize("value", [0, 1])
def test_a_layer_scale_may_be_a_whole_number(value) -> None:
    values = tiny_model("thinker").config.to_dict()
    values["code2wav_config"]["layer_scale_initial_scale"] = value
    model = OmniModel(OmniConfig.from_dict(values), parts=("code2wav",))
    scale = model.code2wav.pre_transformer.layers[0].mlp_layer_scale.scale
    assert scale.is_floating_point() and (scale == value).all()


# ---- values of the wrong kind ----


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("text", [f"x = {deep(5000)}", "x = " + "{a=" * 3000 + "1" + "}" * 3000], ids=["list", "table"])
def test_toml_that_is_nested_too_deep(text, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.toml"):
        TrainConfig.from_toml(path)
    path.write_text("")
    with pytest.raises(ValueError, match=r"override|run\.toml"):
        TrainConfig.from_toml(path, [f"train.steps={deep(5000)}"])


WRONG: dict[str, Callable[[OmniModel], Any]] = {
    "top_k inf": lambda model: SamplingConfig(top_k=float("inf")),
    "top_k nan": lambda model: SamplingConfig(top_k=float("nan")),
    "temperature tensor": lambda model: SamplingConfig(temperature=torch.tensor(0.5)),
    "max_shard_size": lambda model: parse_size("9" * 400 + "GB"),
    "streaming text": lambda model: model.stream(model.processor(chat("hi")), streaming="fast"),
    "streaming dict": lambda model: model.stream(model.processor(chat("hi")), streaming={"text_ahead": 1}),
    "streaming class": lambda model: model.stream(model.processor(chat("hi")), streaming=StreamingConfig),
    "max_new_tokens tensor": lambda model: model.generate(model.processor(chat("hi")), torch.tensor([1, 2])),
    "max_new_tokens float": lambda model: model.generate(model.processor(chat("hi")), 1.5),
    "seed tensor": lambda model: model.generate(model.processor(chat("hi")), 1, seed=torch.tensor([1, 2])),
    "seed array": lambda model: model.generate(model.processor(chat("hi")), 1, seed=np.zeros(2)),
    "chunk_frames": lambda model: StreamingConfig(chunk_frames=4),
    "chunk_frames text": lambda model: StreamingConfig(chunk_frames="12"),
    "silence_s": lambda model: StreamingConfig(silence_s="long"),
    "silence tensor": lambda model: StreamingConfig(silence_s=torch.ones(2)),
    "grid of rank 1": lambda model: OmniInputs([[1]], pixel_values=torch.zeros(4, 6), image_grid_thw=[1, 2, 2]),
    "grid of rank 3": lambda model: OmniInputs([[1]], pixel_values=torch.zeros(4, 6), image_grid_thw=[[[1, 2, 2]]]),
    "grid of rank 0": lambda model: OmniInputs([[1]], pixel_values=torch.zeros(4, 6), image_grid_thw=4),
    "features of rank 0": lambda model: OmniInputs([[1]], input_features=torch.tensor(1.0)),
    "features of rank 1": lambda model: OmniInputs([[1]], input_features=torch.zeros(3)),
    "grid for the encoder": lambda model: model.encode_vision(torch.zeros(4, 6), torch.tensor([1, 2, 2])),
    "device": lambda model: model.processor(chat("hi")).to("cuda:99"),
    "parts": lambda model: OmniModel(model.config, parts=torch.tensor([1, 2])),
    "parts number": lambda model: OmniModel(model.config, parts=[1]),
    "strict": lambda model: OmniModel.from_pretrained(TOY_DATA, strict=torch.tensor([1, 2])),
    "mode": lambda model: model.compile(torch.tensor([1, 2])),
    "mode number": lambda model: model.compile(0),
    "tools": lambda model: model.processor(chat("hi"), tools=torch.tensor([1, 2])),
    "device text": lambda model: model.processor(chat("hi")).to("nowhere"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_values_of_the_wrong_kind_are_named(name, model: OmniModel) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        WRONG[name](model)
    assert "object is not" not in str(error.value) and "not supported between" not in str(error.value)
    assert Path(error.traceback[-1].path).is_relative_to(ROOT / "omni")  # said here, not by another library
