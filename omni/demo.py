"""The packaged toy: the released architecture at toy width with random weights, and a conversation to put to it.

It shows that every stage runs, and its answer means nothing; tests, benchmarks and examples are built on it. The
command `omni demo` asks a trained model instead (`omni.nano`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from omni.model import OmniModel
    from omni.processing.processor import OmniProcessor

DEMO_DATA = Path(__file__).parent / "demo_data"
CODEC_GAIN = 0.7  # of the codec decoder's random matrices: heard, and not clipped


def demo_processor() -> OmniProcessor:
    """The packaged processor: a byte-level tokenizer of some 500 ids, the released preprocessing."""
    from omni.processing.processor import OmniProcessor

    return OmniProcessor.from_pretrained(DEMO_DATA)


def demo_model(seed: int = 0, processor: OmniProcessor | None = None) -> OmniModel:
    """The packaged tiny model with random weights, the same at each call with one seed, and its processor."""
    import torch

    from omni.config import OmniConfig
    from omni.config_reading import read_json
    from omni.model import OmniModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OmniModel(OmniConfig.from_pretrained(DEMO_DATA))
        assert model.code2wav is not None
        _make_audible(model.code2wav)
    model.generation_config = read_json(DEMO_DATA / "generation_config.json")
    model.processor = processor or demo_processor()
    return model


def _make_audible(codec: torch.nn.Module) -> None:
    """Redraw its matrices wider: at a new model's usual 0.02 the sound is finer than the steps of 16 bits."""
    from torch import nn

    for name, parameter in codec.named_parameters():
        if parameter.dim() > 1:
            std = 1.0 if name.startswith("code_embedding.") else CODEC_GAIN / math.sqrt(parameter[0].numel())
            nn.init.normal_(parameter, std=std)


def demo_messages() -> list[dict[str, Any]]:
    """The packaged conversation: a spoken question about a picture and a video with sound."""
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": DEMO_DATA / "picture.png"},
                {"type": "video", "video": DEMO_DATA / "clip.mp4", "use_audio_in_video": True},
                {"type": "audio", "audio": DEMO_DATA / "question.wav"},
            ],
        }
    ]


def write_sound(path: Path, samples: Tensor, sample_rate: int) -> None:
    """Write samples [n] in the format of the file's name; the old file stays until the new one is complete.

    Raises OSError when it cannot be written.
    """
    import soundfile

    partial = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        soundfile.write(partial, samples.numpy(), sample_rate)
        partial.replace(path)
    except soundfile.LibsndfileError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
