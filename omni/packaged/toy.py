"""The packaged toy: the released architecture at toy width with random weights, and a conversation to put to it.

It shows that every stage runs, and its answer means nothing; tests, benchmarks and examples are built on it. The
command `omni demo` asks a trained model instead (`omni.packaged.nano`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from omni.model import OmniModel
    from omni.processing.processor import OmniProcessor

TOY_DATA = Path(__file__).parent / "toy_data"
CODEC_GAIN = 0.7  # of the codec decoder's random matrices: heard, and not clipped


def toy_processor() -> OmniProcessor:
    """The packaged processor: a byte-level tokenizer of some 500 ids, the released preprocessing."""
    from omni.processing.processor import OmniProcessor

    return OmniProcessor.from_pretrained(TOY_DATA)


def toy_model(seed: int = 0, processor: OmniProcessor | None = None) -> OmniModel:
    """The packaged tiny model with random weights, the same at each call with one seed, and its processor."""
    import torch

    from omni.config.model import OmniConfig
    from omni.config.reading import read_json
    from omni.model import OmniModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OmniModel(OmniConfig.from_pretrained(TOY_DATA))
        assert model.code2wav is not None
        _make_audible(model.code2wav)
    model.generation_config = read_json(TOY_DATA / "generation_config.json")
    model.processor = processor or toy_processor()
    return model


def _make_audible(codec: torch.nn.Module) -> None:
    """Redraw its matrices wider: at a new model's usual 0.02 the sound is finer than the steps of 16 bits."""
    from torch import nn

    for name, parameter in codec.named_parameters():
        if parameter.dim() > 1:
            std = 1.0 if name.startswith("code_embedding.") else CODEC_GAIN / math.sqrt(parameter[0].numel())
            nn.init.normal_(parameter, std=std)


def toy_messages() -> list[dict[str, Any]]:
    """The packaged conversation: a spoken question about a picture and a video with sound."""
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": TOY_DATA / "picture.png"},
                {"type": "video", "video": TOY_DATA / "clip.mp4", "use_audio_in_video": True},
                {"type": "audio", "audio": TOY_DATA / "question.wav"},
            ],
        }
    ]
