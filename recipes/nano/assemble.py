"""Puts parts that were trained apart into one checkpoint.

    python recipes/nano/assemble.py FOLDER --config start --thinker thinking/model --code2wav code2wav/model

Parts that are not named have new random weights; so have the encoders with `--fresh-encoders`, drawn by their fan-in:
the config's 0.02 is for wide layers, and at this width a sound would hardly reach the first norm. `--fresh-talker` does
the same for what the Talker reads: text would be 35 times quieter than the codes beside it. `--dtype bfloat16` is what
ships.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import world
from make_model import GENERATION
from pictures import draw_picture

from omni import OmniConfig, OmniModel, OmniProcessor
from omni.training.codec.codec import draw_weights

_HEARD = 20.0  # makes what is heard as large as the position sinusoids that are added to it
_FIRST_PICTURES = 64
PARTS = {"thinker": ("thinker", "audio_encoder", "vision_encoder"), "talker": ("talker",), "code2wav": ("code2wav",)}


def assemble(
    folder: Path,
    config: Path,
    sources: dict[str, Path],
    dtype: torch.dtype = torch.float32,
    *,
    fresh_encoders: bool = False,
    fresh_talker: bool = False,
) -> OmniModel:
    """Write the checkpoint and return the model. sources: part -> checkpoint that has it, fp32."""
    torch.manual_seed(0)
    model = OmniModel(OmniConfig.from_pretrained(config))
    for part, source in sources.items():
        trained = OmniModel.from_pretrained(source, parts=[part], dtype="float32", device="cpu")
        for name in PARTS[part]:
            getattr(model, name).load_state_dict(getattr(trained, name).state_dict())
    if fresh_encoders:
        draw_weights(model.audio_encoder)
        with torch.no_grad():
            model.audio_encoder.conv_out.weight.mul_(_HEARD)
        open_eyes(model, OmniProcessor.from_pretrained(config))
    if fresh_talker:
        _raise_text(model)
    model = model.to(dtype)
    model.processor = OmniProcessor.from_pretrained(config)
    model.generation_config = dict(GENERATION)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def open_eyes(model: OmniModel, processor: OmniProcessor) -> None:
    """Draw the vision encoder and set it to some pictures: what they have in common becomes zero, and what differs as
    large as the embeddings of text. Otherwise the plain ground is most of what it sees, and the Thinker sees no more.
    """
    eyes = model.vision_encoder
    draw_weights(eyes)
    rngs = [random.Random(f"first picture {number}") for number in range(_FIRST_PICTURES)]
    shown = [draw_picture(world.SKILLS[rng.choice(world.PICTURE_SKILLS)](rng).picture) for rng in rngs]
    inputs = processor([[{"role": "user", "content": [{"type": "image", "image": picture}]}] for picture in shown])
    pixels = inputs.pixel_values
    patches = eyes.patch_embed(pixels)
    size = model.thinker.embed_tokens.weight.square().mean().sqrt()
    eyes.patch_embed.proj.weight.div_(patches.std(0).mean())
    eyes.patch_embed.proj.bias.sub_(eyes.patch_embed(pixels).mean(0))
    seen = eyes(pixels, inputs.image_grid_thw)
    for merger, tokens in zip((eyes.merger, *eyes.merger_list), (seen.embeds, *seen.taps)):
        factor = size / tokens.std(0).mean()
        merger.mlp[-1].weight.mul_(factor)
        merger.mlp[-1].bias.copy_((merger.mlp[-1].bias - tokens.mean(0)) * factor)


@torch.no_grad()
def _raise_text(model: OmniModel) -> None:
    """Make the Talker's text as large as the codes that it is added to."""
    talker, config = model.talker, model.config.talker_config.code_predictor_config
    codes = torch.randint(0, config.vocab_size, (512, config.num_code_groups))
    spoken = talker.codec_embedding(codes[:, 0]) + talker.mtp.embed_residual(codes[:, 1:]).sum(1)
    draw_weights(talker.text_projection)
    text = talker.text_projection(model.thinker.embed_tokens.weight)
    talker.text_projection.linear_fc2.weight.mul_(spoken.square().mean().sqrt() / text.square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, required=True, help="folder of make_model.py")
    for part in PARTS:
        parser.add_argument(f"--{part}", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--fresh-encoders", action="store_true")
    parser.add_argument("--fresh-talker", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    sources = {part: path for part in PARTS if (path := getattr(args, part)) is not None}
    dtype = getattr(torch, args.dtype)
    fresh = {"fresh_encoders": args.fresh_encoders, "fresh_talker": args.fresh_talker}
    assemble(args.folder, args.config, sources, dtype, **fresh)


if __name__ == "__main__":
    main()
