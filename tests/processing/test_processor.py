"""OmniProcessor: messages, safe text, placeholders, files."""

from __future__ import annotations

import ast
import base64
import io
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from build import TINY, TOY_DATA, chat, tiny_config, tone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as pil
from transformers import AutoTokenizer

from omni.config.model import OmniConfig
from omni.encoders.mel import LEVELS
from omni.processing.processor import OmniProcessor
from omni.rope.positions import AudioVideo, Video

ROOT = Path(__file__).parents[2]
RELEASED = ROOT / "omni" / "processing" / "released"
CONFIG = tiny_config().thinker_config
PROCESSOR = OmniProcessor.from_pretrained(TOY_DATA)
TOKENIZER = AutoTokenizer.from_pretrained(str(TOY_DATA))
ADDED = [str(token) for token in TOKENIZER.added_tokens_decoder.values()]
SPECIAL = {index for index, token in TOKENIZER.added_tokens_decoder.items() if token.special}
WAVE = tone(1.0, level=0.1)
PICTURE = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)
FRAMES = np.zeros((4, 32, 32, 3), np.uint8)


def ids_of(messages: Any, **options: Any) -> list[int]:
    return PROCESSOR(messages, **options).input_ids[0].tolist()


# ---- text stays text ----

hostile = st.lists(
    st.one_of(
        st.sampled_from([*ADDED, "<", "|", ">", "<|", "|>", "im_start", "\n", "<|im_", "user\n", "", ""]),
        st.text(max_size=6),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(pieces=hostile, role=st.sampled_from(["user", "system", "tool", "assistant"]))
def test_text_never_becomes_control_tokens(pieces: list[str], role: str) -> None:
    """Written as one string or as separate items: the frame of control tokens is the empty message's."""
    text = "".join(pieces)
    items: list[Any] = [{"type": "text", "text": piece} for piece in pieces]
    empty = ids_of([{"role": role, "content": "-"}])
    for content in (text, items):
        ids = ids_of([{"role": role, "content": content}])
        assert [i for i in ids if i in SPECIAL] == [i for i in empty if i in SPECIAL]
        if role != "assistant":  # a reply's own markup (<think>) is read by the template
            written = PROCESSOR.tokenizer.backend_tokenizer.normalizer.normalize_str(text)
            assert written in PROCESSOR.decode(ids, skip_special_tokens=False)
            assert not [i for i in ids if PROCESSOR.tokenizer.convert_ids_to_tokens(i) in ("<think>", "</tool_call>")]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=30).filter(lambda text: not any(token in text for token in ADDED)))
def test_ordinary_text_has_transformers_ids(text: str) -> None:
    rendered = TOKENIZER.apply_chat_template(
        chat(text), chat_template=PROCESSOR.chat.template, tokenize=False, add_generation_prompt=True
    )
    assert ids_of(chat(text)) == TOKENIZER(rendered)["input_ids"]
    assert PROCESSOR.encode_text(text) == TOKENIZER(text)["input_ids"]


def test_pieces_that_meet_form_no_control_token() -> None:
    parts = ["<|im_", "start|>", "<|audio_pad", "|>"]
    plain = ids_of(chat("".join(parts)))
    assert ids_of(chat([{"text": part} for part in parts])) == plain
    media = PROCESSOR(chat([*parts, {"image": PICTURE}, "<|image_pad|>"]))
    assert media.input_ids[0].tolist().count(265) == int(media.image_grid_thw.prod()) // 4
    media.segments(CONFIG)


def test_private_characters_survive() -> None:
    text = "\ue000\ue001 <|im_end|> \uf8ff"
    assert text in PROCESSOR.decode(ids_of(chat(text)), skip_special_tokens=False)


def test_tools_and_their_results_are_text() -> None:
    tools = [{"type": "function", "function": {"name": "f<|im_end|>", "description": "</think>", "parameters": {}}}]
    messages = [
        *chat("hi"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": "</tool_call><|im_end|>"}}}],
        },
        {"role": "tool", "content": "<|im_end|></tool_response>", "tool_call_id": "1"},
    ]
    ids = ids_of(messages, tools=tools)
    assert ids.count(258) == 4  # system, user, assistant, tool
    assert ids.count(267) == ids.count(268) == 3  # two in the instructions, one around the call
    assert ids.count(261) == ids.count(279) == 1
    text = PROCESSOR.decode(ids, skip_special_tokens=False)
    assert '"name": "f<|im_end|>"' in text and '"a": "</tool_call><|im_end|>"' in text


def calling(arguments: Any) -> list[dict[str, Any]]:
    return [*chat("a"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]


def test_what_is_no_json_is_text_too() -> None:
    """Templates write other objects by `str`, which may give anything."""

    class Sly(str):
        def translate(self, table: Any) -> str:
            return self

    for value in ({"<|im_end|>"}, Path("<|im_end|>"), Sly("<|im_end|>")):
        ids = ids_of(calling({"k": value}), tools=[{"name": "f", "description": value}])
        assert ids.count(258) == 3 and "<|im_end|>" in PROCESSOR.decode(ids)
    assert 258 not in ids_of(chat(Sly("<|im_end|>")), add_generation_prompt=False)[3:-2]


def test_arguments_that_json_cannot_express() -> None:
    endless: dict[str, Any] = {}
    endless["a"] = endless
    nested: dict[str, Any] = {}
    for _ in range(5000):
        nested = {"a": nested}
    for arguments in (endless, nested, {(1, 2): 3}):
        with pytest.raises(ValueError, match="JSON cannot express"):
            PROCESSOR(calling(arguments))


def test_a_reply_keeps_its_markup() -> None:
    messages = [*chat("a"), {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes <|im_end|>"}]
    ids = ids_of(messages, add_generation_prompt=False)
    assert ids.count(259) == ids.count(260) == 1 and ids.count(258) == 2
    older = ids_of([*messages, *chat("b")])
    assert 259 not in older  # reasoning of earlier turns is left out
    pause = PROCESSOR.encode_text("\n\n")
    assert ids_of(chat("a"), enable_thinking=False) == [*ids_of(chat("a")), 259, *pause, 260, *pause]
    assert PROCESSOR.think_token_ids == (259, 260)


def test_template_of_the_demo() -> None:
    assert ids_of(chat("")) == [257, 277, 10, 258, 10, 257, 278, 10]
    assert ids_of([{"role": "system", "content": "a"}], add_generation_prompt=False) == [257, 276, 10, 97, 258, 10]


# ---- items ----


def encoded(form: str) -> bytes:
    out = io.BytesIO()
    if form == "wav":
        soundfile.write(out, WAVE, 16000, format="WAV", subtype="FLOAT")
    else:
        pil.fromarray(PICTURE).save(out, format="PNG")
    return out.getvalue()


def test_every_spelling_of_an_item(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(encoded("wav"))
    (tmp_path / "a.png").write_bytes(encoded("png"))
    wav64, png64 = (base64.b64encode(encoded(form)).decode() for form in ("wav", "png"))
    audio = PROCESSOR(chat([{"type": "audio", "audio": WAVE}]))
    for item in (
        {"audio": (WAVE, 16000)},
        {"audio": {"array": WAVE, "sampling_rate": 16000}},
        {"audio": WAVE, "sampling_rate": 16000},
        {"type": "audio", "path": str(tmp_path / "a.wav")},
        {"type": "audio_url", "audio_url": {"url": (tmp_path / "a.wav").as_uri()}},
        {"audio_url": f"data:audio/wav;base64,{wav64}"},
        {"type": "input_audio", "input_audio": {"data": wav64, "format": "wav"}},
        {"audio": encoded("wav")},
    ):
        got = PROCESSOR(chat([item]))
        assert torch.equal(got.input_ids, audio.input_ids) and torch.equal(got.input_features, audio.input_features)
    image = PROCESSOR(chat([{"type": "image", "image": PICTURE}]))
    for item in (
        {"image": pil.fromarray(PICTURE)},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png64}", "detail": "low"}},
        {"image_url": (tmp_path / "a.png").as_uri()},
        {"type": "image", "base64": png64},
        {"type": "image", "url": str(tmp_path / "a.png")},
    ):
        assert torch.equal(PROCESSOR(chat([item])).pixel_values, image.pixel_values)


@pytest.mark.parametrize(
    ("messages", "error", "words"),
    [
        ([{"role": "usr", "content": "a"}], ValueError, "'usr'.*'user'"),
        ([{"role": "developer", "content": "a"}], ValueError, "system, user, assistant, tool"),
        ([{"content": "a"}], ValueError, "role None"),
        ([{"role": "user", "contents": "a"}], ValueError, "'contents'.*'content'"),
        ([{"role": "user"}], ValueError, "no content"),
        ([{"role": "user", "content": 5}], TypeError, "string or a list"),
        (chat([{"type": "adio", "audio": WAVE}]), ValueError, "'adio'.*'audio'"),
        (chat([{"imge": PICTURE}]), ValueError, "'imge'.*'image'"),
        (chat([{"type": "image", "imge": PICTURE}]), ValueError, "'imge'.*'image'"),
        (chat([{"type": "video", "video": FRAMES, "max_frame": 3}]), ValueError, "'max_frame'.*'max_frames'"),
        (chat([{"audio": WAVE, "image": PICTURE}]), ValueError, "at once"),
        (chat([{"type": "image", "image": PICTURE, "path": "a.png"}]), ValueError, "image and path"),
        (chat([{"type": "audio"}]), ValueError, "one of the keys"),
        (chat([{"type": "text", "text": 3}]), TypeError, "text must be a string"),
        (chat([{"image": PICTURE, "min_pixels": -1}]), ValueError, "min_pixels"),
        (chat([{"image": PICTURE, "min_pixels": 9000, "max_pixels": 4000}]), ValueError, "exceeds"),
        (chat([{"video": FRAMES, "fps": 0}]), ValueError, "fps"),
        (chat([{"video": FRAMES, "use_audio_in_video": True}]), ValueError, "has no sound"),
        (chat([{"audio": WAVE[:100]}]), ValueError, "too short"),
        (chat([{"type": "input_audio", "input_audio": {"data": "%%"}}]), ValueError, "base64"),
        (chat([{"image": PICTURE, "min_pixels": 10**12}]), ValueError, "exceeds the limit"),
        (chat([{"type": "image", "base64": 5}]), TypeError, "base64 data of the image must be a string"),
        ([{"role": "assistant", "content": "a", "tool_calls": 5}], TypeError, "tool_calls must be a list"),
        ([{"role": "user", "content": "a", "tool_calls": []}], ValueError, "tool_calls"),
        ([], ValueError, "empty"),
        ([[]], ValueError, "conversation 0 is empty"),
        ("hello", TypeError, "list of"),
        (["hello"], TypeError, "conversation 0"),
    ],
)
def test_wrong_messages(messages: Any, error: type[Exception], words: str) -> None:
    started = time.process_time()  # not the clock on the wall, which other processes hold up
    with pytest.raises(error, match=words):
        PROCESSOR(messages)
    assert time.process_time() - started < 1


def test_mel_level() -> None:
    """The causal level of the first second does not know what follows; later seconds, louder, are alike."""
    wave = np.concatenate([1e-5 * WAVE, WAVE])
    clip, causal = (PROCESSOR(chat([{"audio": wave}]), mel_level=level).input_features[0] for level in LEVELS)
    assert torch.equal(clip, PROCESSOR(chat([{"audio": wave}])).input_features[0])
    assert torch.equal(causal, PROCESSOR.log_mel(torch.from_numpy(wave), "causal"))
    assert torch.equal(clip[:, 100:], causal[:, 100:]) and not torch.equal(clip[:, :98], causal[:, :98])


def test_wrong_call_options() -> None:
    with pytest.raises(ValueError, match=r"mel_level.*clip"):
        PROCESSOR(chat("a"), mel_level="loud")
    with pytest.raises(TypeError, match="tool"):
        PROCESSOR(chat("a"), tools=[3])
    for tools in (5, {"name": "f"}):
        with pytest.raises(TypeError, match="tools must be a list"):
            PROCESSOR(chat("a"), tools=tools)
    with pytest.raises(TypeError, match=r"use_audio_in_video.*'yes'"):
        PROCESSOR(chat("a"), use_audio_in_video="yes")
    for nothing_to_hear in ([{"video": FRAMES}], "a"):
        assert PROCESSOR(chat(nothing_to_hear), use_audio_in_video=True).batch_size == 1


# ---- media in prompts ----


def test_a_tiny_picture_is_enlarged() -> None:
    inputs = PROCESSOR(chat([{"image": np.zeros((1, 1, 3), np.uint8)}]))
    assert inputs.image_grid_thw.tolist() == [[1, 4, 4]]


def test_pixel_limits() -> None:
    def grid(**options: Any) -> list[int]:
        item = {"image": np.zeros((256, 256, 3), np.uint8), **options.pop("item", {})}
        return PROCESSOR(chat([item]), **options).image_grid_thw[0].tolist()

    assert grid() == [1, 16, 16]
    assert grid(max_pixels=64 * 64) == [1, 4, 4]
    assert grid(max_pixels=32 * 32) == [1, 2, 2]  # below the default minimum
    assert grid(min_pixels=512 * 512) == [1, 32, 32]
    assert grid(max_pixels=64 * 64, item={"max_pixels": 128 * 128}) == [1, 8, 8]
    frames = PROCESSOR(chat([{"video": FRAMES}]), max_pixels=32 * 32)
    assert frames.video_grid_thw.tolist() == [[2, 2, 2]]


def test_frames_are_paired_and_timed() -> None:
    inputs = PROCESSOR(chat([{"video": FRAMES[[0, 1, 2, 3, 0]], "fps": 4.0, "max_pixels": 1024}, {"video": FRAMES}]))
    assert inputs.video_grid_thw[:, 0].tolist() == [3, 2]
    assert [times.tolist() for times in inputs.video_grid_times] == [[0.0, 0.5, 1.0], [0.0, 1.0]]
    assert inputs.video_second_per_grid.tolist() == [0.5, 1.0]


def small_film(path: Path, sound: bool) -> str:
    import av

    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        track = container.add_stream("pcm_s16le", rate=16000, layout="mono") if sound else None
        for _ in range(20):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(video.encode(None))
        if track is not None:
            frame = av.AudioFrame.from_ndarray((WAVE * 30000).astype(np.int16)[None], format="s16", layout="mono")
            frame.sample_rate = 16000
            container.mux(track.encode(frame))
            container.mux(track.encode(None))
    return str(path)


def test_sound_of_videos(tmp_path: Path) -> None:
    loud, mute = small_film(tmp_path / "a.mkv", sound=True), small_film(tmp_path / "b.mkv", sound=False)
    options = {"max_pixels": 1024}
    both = PROCESSOR(chat([{"video": mute}, {"audio": WAVE}, {"video": loud}]), use_audio_in_video=True, **options)
    kinds = [type(segment) for segment in both.segments(CONFIG)[0]]
    assert kinds.count(AudioVideo) == 1 and kinds.count(Video) == 1
    assert both.input_features.shape[0] == 2
    with_sound = next(s for s in both.segments(CONFIG)[0] if isinstance(s, AudioVideo))
    assert with_sound.audio.length == 13 and with_sound.video.times == pytest.approx((0.0, 1.0))
    assert PROCESSOR(chat([{"video": loud}]), **options).input_features is None
    own = chat([{"video": loud, "use_audio_in_video": True}, {"video": loud}])
    assert PROCESSOR(own, **options).input_features.shape[0] == 1
    off = chat([{"video": loud, "use_audio_in_video": False}, {"video": loud}])
    assert PROCESSOR(off, use_audio_in_video=True, **options).input_features.shape[0] == 1
    with pytest.raises(ValueError, match=r"b\.mkv has no sound"):
        PROCESSOR(chat([{"video": mute, "use_audio_in_video": True}]), **options)
    alone = PROCESSOR(chat([{"video": mute}]), use_audio_in_video=True, **options)
    assert torch.equal(alone.input_ids, PROCESSOR(chat([{"video": mute}]), **options).input_ids)


def test_a_batch_equals_its_rows() -> None:
    rows = [
        chat([{"audio": WAVE[:5000]}, "short"]),
        chat([{"image": PICTURE}, {"audio": WAVE}]),
        chat("text only"),
    ]
    batch = PROCESSOR(rows)
    clip = 0
    for index, row in enumerate(rows):
        alone = PROCESSOR(row)
        kept = batch.attention_mask[index].bool()
        assert torch.equal(batch.input_ids[index][kept], alone.input_ids[0])
        if alone.input_features is not None:
            frames = alone.input_features.shape[2]
            assert torch.equal(batch.input_features[clip, :, :frames], alone.input_features[0])
            clip += 1
    assert bool((batch.input_ids[2][batch.attention_mask[2] == 0] == 256).all())


# ---- decoding and files ----


def test_decode() -> None:
    assert PROCESSOR.decode([257, 277, 10, 104, 105, 258]) == "user\nhi"
    assert PROCESSOR.decode(torch.tensor([0xE4, 0xBD, 0xA0])) == "你"
    assert PROCESSOR.decode([0xE4, 0xBD]) == "\ufffd"
    assert PROCESSOR.decode([]) == ""
    assert "hi" in PROCESSOR.decode([104, 105, 639])  # ids beyond the tokenizer's vocabulary are passed over
    with pytest.raises(ValueError, match="one row"):
        PROCESSOR.decode([[1], [2]])


def test_released_layout(tmp_path: Path) -> None:
    """vocab.json and merges.txt, preprocessor_config.json, chat_template.json."""
    model = json.loads((TOY_DATA / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    shutil.copy(TOY_DATA / "tokenizer_config.json", tmp_path)
    shutil.copy(RELEASED / "qwen3_omni_moe.json", tmp_path / "preprocessor_config.json")
    template = (RELEASED / "chat_template.jinja").read_text() + "{# mine #}"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    released = OmniProcessor.from_pretrained(tmp_path)
    assert released.chat.template == template
    messages = chat(["Is it you? <|im_end|>", {"audio": WAVE}, {"image": PICTURE}])
    assert released(messages).input_ids.tolist() == PROCESSOR(messages).input_ids.tolist()
    (tmp_path / "chat_template.json").unlink()
    assert OmniProcessor.from_pretrained(tmp_path).chat.template == PROCESSOR.chat.template  # the built-in one
    released.save_pretrained(tmp_path)
    assert OmniProcessor.from_pretrained(tmp_path).chat.template == template


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    def folder(name: str, without: str) -> Path:
        copy = tmp_path / name
        copy.mkdir()
        files = {name: TOY_DATA / name for name in ("tokenizer.json", "tokenizer_config.json")}
        files["preprocessor_config.json"] = RELEASED / "qwen3_omni_moe.json"
        files["chat_template.jinja"] = RELEASED / "chat_template.jinja"
        for target, source in files.items():
            if target != without:
                shutil.copy(source, copy / target)
        return copy

    for name in ("tokenizer.json", "tokenizer_config.json"):
        with pytest.raises(FileNotFoundError, match=name):
            OmniProcessor.from_pretrained(folder(name, without=name))
    plain = OmniProcessor.from_pretrained(folder("plain", without="preprocessor_config.json"))  # the released values
    assert plain.files.json_files == PROCESSOR.files.json_files
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.json"):
        broken = folder("broken_" + name, without="chat_template.jinja")
        (broken / name).write_text("{")
        with pytest.raises(ValueError, match=r"tokenizer|preprocessor_config.json|chat_template.json"):
            OmniProcessor.from_pretrained(broken)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        OmniProcessor.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        OmniProcessor.from_pretrained("./nowhere")
    bad = folder("bad", without="")
    values = json.loads((RELEASED / "qwen3_omni_moe.json").read_text())
    (bad / "preprocessor_config.json").write_text(json.dumps({**values, "patch_size": "large"}))
    with pytest.raises(ValueError, match="preprocessor"):
        OmniProcessor.from_pretrained(bad)


def test_the_model_config_sets_the_audio_chunk(tmp_path: Path) -> None:
    shutil.copytree(TOY_DATA, tmp_path / "a")
    config = json.loads(TINY.read_text())
    config["thinker_config"]["audio_config"]["n_window"] = 25
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    read = OmniProcessor.from_pretrained(tmp_path / "a")
    inputs = read(chat([{"audio": WAVE}]))
    segments = inputs.segments(OmniConfig.from_pretrained(tmp_path / "a").thinker_config)[0]
    assert segments[1].length == 2 * 7  # two chunks of 50 mel frames


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    for path in (ROOT / "omni" / "processing").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            heavy = {name.split(".")[0] for name in names} & {"transformers", "av", "soundfile", "torchaudio", "PIL"}
            assert not heavy, (path.name, heavy)
