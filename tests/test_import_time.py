"""What `import omni` and its public names pull in: nothing heavy before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from omni.packaged.nano import NANO_DATA

HEAVY = ("torch", "transformers", "torchvision", "torchaudio", "accelerate", "av", "numpy", "huggingface_hub")


def loaded_after(*steps: str) -> list[set[str]]:
    """All modules after each piece of code, in a new Python that runs them in turn."""
    show = "\nimport json, sys; print(); print('modules', json.dumps(list(sys.modules)))"
    code = "\n".join(step + show for step in steps)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("modules [")]
    return [set(json.loads(line.removeprefix("modules "))) for line in lines]


def test_import_omni_loads_nothing_heavy() -> None:
    """Nor does the command line before it knows what to do: `omni --help` is there at once."""
    code = "import omni, omni.cli.main; dir(omni); omni.cli.main.build_parser()"
    (loaded,) = loaded_after(code)
    assert not loaded & set(HEAVY)


def test_a_model_needs_torch_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Its code, and loading a folder without tokenizer files: no transformers, no Hub client, no compiler."""
    for path in tiny_checkpoint.iterdir():
        if path.name.startswith("model") or path.name == "config.json":
            (tmp_path / path.name).symlink_to(path)
    code = "from omni import OmniEngine, OmniModel, OmniProcessor, OmniSession\n"
    (loaded,) = loaded_after(code + f"OmniModel.from_pretrained({str(tmp_path)!r}, device='cpu')")
    assert "torch" in loaded
    assert not loaded & {*HEAVY[1:6], "huggingface_hub", "torch._dynamo"}


def test_a_question_in_text_needs_no_picture_libraries() -> None:
    """Nor the torch compiler, which they import; a picture brings them."""
    ask = "from omni.cli.main import main\nassert main(['chat', '--no-audio', {more}'what is two plus two']) == 0"
    picture = f"'--image', {str(NANO_DATA / 'demo' / 'picture.png')!r}, "
    before, after = loaded_after(ask.format(more=""), ask.format(more=picture))
    assert {"torch", "transformers"} <= before
    assert not before & PICTURES
    assert after >= {"torchvision", QWEN2_VL}


QWEN2_VL = "transformers.models.qwen2_vl.image_processing_qwen2_vl"
PICTURES = {"torchvision", "torchaudio", "av", "sympy", "torch._dynamo", "transformers.models.qwen2_vl", QWEN2_VL}
