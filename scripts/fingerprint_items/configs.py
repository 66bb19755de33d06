"""Items on configs, weights, checkpoints and the command line."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from omni import OmniConfig, OmniModel
from omni.cli.main import main

from .models import CONFIGS, DEMO, NANO, build, chat, nano, second_values, tiny, tiny_config
from .registry import by_key, complaint, each_family, item

# ---- configs and weights


def _register_configs() -> None:
    for path in sorted(CONFIGS.glob("*.json")):

        def read_and_written(path: Path = path) -> Any:
            config = OmniConfig.from_pretrained(path)
            again = OmniConfig.from_dict(config.to_dict()).to_dict()
            return json.dumps(config.to_dict()), json.dumps(again)

        item(f"config.file.{path.stem}")(read_and_written)


_register_configs()


@item("config.tiny.qwen2_5")
def second_config() -> Any:
    config = OmniConfig.from_dict(second_values())
    return json.dumps(config.to_dict()), json.dumps(OmniConfig.from_dict(config.to_dict()).to_dict())


@item("config.errors")
def config_errors() -> Any:
    """The complaints about configs in which one value was changed."""
    changes: list[tuple[str, Any]] = [
        ("thinker_config.text_config.num_attention_heads", 3),
        ("thinker_config.audio_config.n_window", 0),
        ("thinker_config.vision_config.num_heads", 5),
        ("talker_config.text_config.hidden_size", "wide"),
        ("talker_config.hidden_size", 31),
        ("token2wav_config.dit_config.block_size", -1),
        ("code2wav_config.num_quantizers", 7),
        ("model_type", "other"),
        ("thinker_config", None),
    ]
    said = []
    for source in (json.loads((CONFIGS / "tiny.json").read_text(encoding="utf-8")), second_values()):
        for place, value in changes:
            values = json.loads(json.dumps(source))
            *path, name = place.split(".")
            where = values
            if path and path[0] not in values:
                continue  # of the other family
            for part in path:
                where = where.setdefault(part, {})
            where[name] = value
            said.append(complaint(lambda values=values: OmniConfig.from_dict(values).to_dict()))
    return said


@each_family("weights.shapes")
def shapes(family: str) -> Any:
    with torch.device("meta"):
        model = OmniModel(tiny_config(family))
    return {name: list(weight.shape) for name, weight in model.named_parameters()}


@each_family("weights.keys")
def keys(family: str) -> Any:
    """Names in the Hub's files, with the way back: those of experts one by one."""
    with torch.device("meta"):
        model = OmniModel(tiny_config(family))
    table, found = model.key_table, []
    for name, weight in model.named_parameters():
        hub = [table.to_hub(name)]
        if ".experts." in name:
            hub = [key for key, _ in table.separate(name, len(weight))]
        slots = [table.slot(key) for key in hub]
        found.append((name, [(key, s and (s.name, s.expert, s.piece)) for key, s in zip(hub, slots)]))
    return found


@each_family("weights.initial")
def initial_weights(family: str) -> Any:
    torch.manual_seed(7)
    model = OmniModel(tiny_config(family))
    return by_key(model, dict(model.named_parameters())), by_key(model, dict(model.named_buffers()))


# ---- checkpoints and the command line


def checkpoint_content(folder: Path) -> Any:
    """Every file: tensors of weight files, bytes of the others."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                found[name] = (file.metadata(), {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        elif path.suffix == ".pt":
            found[name] = torch.load(path, weights_only=True)
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


@each_family("checkpoint")
def checkpoint(family: str) -> Any:
    """What is written, also in small shards with fused experts, and what the loaded model says."""
    out: list[Any] = []
    for options in ({}, {"max_shard_size": "40KB", "experts": "fused"}):
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "saved"
            tiny(family).save_pretrained(target, **options)
            loaded = OmniModel.from_pretrained(target, device="cpu")
            half = OmniModel.from_pretrained(target, device="cpu", dtype="bfloat16", parts=("thinker",))
            reply = loaded.generate(loaded.processor(chat("hello")), 6, max_frames=4, seed=1)
            out += [checkpoint_content(target), loaded.config.to_dict(), reply.replies, reply.codes, reply.audio]
            out.append(by_key(half, dict(half.named_parameters())))
    return out


@each_family("quantized")
def quantized(family: str) -> Any:
    """Decoding with rounded weights."""
    out = []
    for kind in ("int8", "int4"):
        model = build(family)
        model.quantize(kind)
        reply = model.generate(model.processor(chat("hello")), 6, max_frames=4, seed=1)
        out.append((reply.replies, reply.codes, reply.audio))
    return out


def printed(*arguments: str) -> tuple[int, str]:
    """Exit code and stdout of a command line."""
    caught = io.StringIO()
    with contextlib.redirect_stdout(caught), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(arguments)
        except SystemExit as error:
            code = int(error.code or 0)
    return code, caught.getvalue()


@item("cli.info")
def cli_info() -> Any:
    """Of every config file, both packaged models and nothing; paths are left out of what is printed."""
    places = {path.name: path for path in sorted(CONFIGS.glob("*.json"))} | {"nano": NANO, "toy": DEMO}
    found = {name: printed("info", str(path)) for name, path in places.items()}
    return {name: (code, text.replace(str(places[name]), name)) for name, (code, text) in found.items()}


@item("cli.help")
def cli_help() -> Any:
    return [
        printed(*command, "--help")
        for command in ((), *((c,) for c in ["demo", "chat", "speak", "info", "train", "eval"]))
    ]


@item("cli.chat")
def cli_chat() -> Any:
    return printed("chat", "--no-audio", "what is two plus two")


@item("nano.weights")
def nano_weights() -> Any:
    return by_key(nano(), dict(nano().named_parameters())), nano().config.to_dict(), nano().generation_config
