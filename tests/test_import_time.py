"""What `import omni` and its public names pull in: nothing heavy before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers", "torchvision", "torchaudio", "accelerate", "av", "numpy", "huggingface_hub")


def loaded_after(code: str) -> set[str]:
    """Top-level packages and torch's compiler, in a new Python that ran `code`."""
    code += "\nimport json, sys; print(json.dumps([n for n in sys.modules if '.' not in n or n == 'torch._dynamo']))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_omni_loads_nothing_heavy() -> None:
    """Nor does the command line before it knows what to do: `omni --help` is there at once."""
    code = "import omni, omni.cli.main; dir(omni); omni.cli.main.build_parser()"
    assert not loaded_after(code) & set(HEAVY)


def test_a_model_needs_torch_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Its code, and loading a folder without tokenizer files: no transformers, no Hub client, no compiler."""
    for path in tiny_checkpoint.iterdir():
        if path.name.startswith("model") or path.name == "config.json":
            (tmp_path / path.name).symlink_to(path)
    code = "from omni import OmniEngine, OmniModel, OmniProcessor, OmniSession\n"
    loaded = loaded_after(code + f"OmniModel.from_pretrained({str(tmp_path)!r}, device='cpu')")
    assert "torch" in loaded
    assert not loaded & {*HEAVY[1:6], "huggingface_hub", "torch._dynamo"}
