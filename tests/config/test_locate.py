"""From what the user wrote to files on this machine: the same for configs, processors, models and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omni import OmniConfig, OmniModel, OmniProcessor
from omni.cli.main import main
from omni.config.locate import CONFIG_FILES, PACKAGED, PROCESSOR_FILES, locate

LOADERS: list[Callable[..., Any]] = [
    OmniConfig.from_pretrained,
    OmniProcessor.from_pretrained,
    OmniModel.from_pretrained,
]
loaders = pytest.mark.parametrize("load", LOADERS, ids=["config", "processor", "model"])


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(tmp_path) == locate(str(tmp_path)) == tmp_path
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    for missing in (
        "./none",
        "/none/here",
        "~/none-such",
        "a/b/c",
        "",
        tmp_path / "none",
        "C:\\models",
        "a b/c",
        "x.json",
    ):
        with pytest.raises(FileNotFoundError, match="does not exist; pass a checkpoint folder or a Hub id"):
            locate(missing)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        OmniConfig.from_pretrained("x.json")
    path = tmp_path / "config.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="is a file; pass the folder"):
        locate(path)
    assert locate(path, files=CONFIG_FILES) == path


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    answer: Any = tmp_path

    def download(name: str, **keywords: Any) -> str:
        asked.update(keywords, name=name)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("org/name", revision="v1", token="t", cache_dir="c", local_files_only=True) == tmp_path
    assert asked["name"] == "org/name" and asked["revision"] == "v1" and asked["local_files_only"]
    pickles = [pattern for pattern in asked["allow_patterns"] if "bin" in pattern or "pt" in pattern]
    assert pickles == ["spk_dict.pt"], "the voices, which are read as tensors only"
    locate("org/name", files=PROCESSOR_FILES)
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])
    answer = FileNotFoundError("not in the cache")
    with pytest.raises(FileNotFoundError, match="'org/name' is no folder here and was not found on the Hub"):
        locate("org/name")
    answer = RuntimeError("401 no access.\nlong trace")
    with pytest.raises(OSError, match=r"401 no access; check the name") as error:
        locate("org/name")
    assert error.value.__cause__ is answer and "\n" not in str(error.value)


@loaders
def test_every_loader_says_the_same(load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, **keywords: Any) -> str:
        asked.append((name, keywords["revision"], keywords["token"], keywords["cache_dir"]))
        raise RuntimeError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(OSError, match="'org/name' could not be downloaded from the Hub: no network; check the name"):
        load("org/name", revision="v1", token="t", cache_dir="c", local_files_only=True)
    assert asked == [("org/name", "v1", "t", "c")]
    with pytest.raises(FileNotFoundError, match="does not exist; pass a checkpoint folder or a Hub id"):
        load(tmp_path / "none")
    with pytest.raises(TypeError, match="pass a checkpoint folder or a Hub id such as org/name, got 3"):
        load(3)
    with pytest.raises(TypeError, match="revison"):
        load("org/name", revison="v1")


def test_the_packaged_checkpoint_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert OmniConfig.from_pretrained("omni-nano") == OmniConfig.from_pretrained(PACKAGED["omni-nano"])
    processor = OmniProcessor.from_pretrained("omni-nano")
    assert processor.files.folder == PACKAGED["omni-nano"] and processor.encode_text("hello")
    assert main(["info", "omni-nano"]) == 0
    assert capsys.readouterr().out.startswith("omni-nano: qwen3_omni_moe, ")


def test_a_config_may_be_a_json_file(tmp_path: Path) -> None:
    values = json.loads((PACKAGED["omni-nano"] / "config.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps(values))
    assert OmniConfig.from_pretrained(str(tmp_path / "mine.json")) == OmniConfig.from_pretrained("omni-nano")
