"""Token2Wav while codes arrive: for some chunk schedules, how long the first sound waits and how far the result is from
decoding all codes at once (the reference's way). Prints a Markdown table.

The wait is exact and a property of the config: codes that must have come, as milliseconds of speech. The computing time
of the first sound, measured here, comes on top. The distance is a property of the weights. Without --model they are
random, in the released block structure at a narrow width: the order of the schedules means something, the decibels do
not. With --model the codes are those with which the checkpoint says --text.

    OMP_NUM_THREADS=2 python benchmarks/chunk_schedules.py
    python benchmarks/chunk_schedules.py --model Qwen/Qwen2.5-Omni-7B --text "How far is it to the sea?"
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from omni.config_token2wav import Token2WavConfig
from omni.model import OmniModel
from omni.token2wav.schedule_report import report_schedule
from omni.token2wav.streaming import ChunkSchedule
from omni.token2wav.token2wav import Token2Wav
from omni.token2wav.voices import Voice

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "qwen2_5_omni_7b.json"
NARROW_DIT = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "enc_channels": [32, 32, 32, 32, 96]}
NARROW_VOCODER = {"upsample_initial_channel": 128}
SCHEDULES = {
    "12 codes alone": ChunkSchedule(12, 0, 0),
    "12, 12 before": ChunkSchedule(12, 12, 0),
    "12, 24 before, 12 after": ChunkSchedule(12, 24, 12),
    "the same, vocoder hears 10 frames ahead": ChunkSchedule(12, 24, 12, vocoder_lookahead_frames=10),
    "24, 24 before, 12 after (default)": ChunkSchedule(),
    "48, 48 before, 24 after": ChunkSchedule(48, 48, 24),
}


@torch.no_grad()
def random_model() -> tuple[Token2Wav, Voice]:
    """Weights of unit gain, so that every frame depends on its neighbours, and a random voice."""
    values = json.loads(CONFIG.read_text())["token2wav_config"]
    values["dit_config"].update(NARROW_DIT)
    values["bigvgan_config"].update(NARROW_VOCODER)
    torch.manual_seed(0)
    model = Token2Wav(Token2WavConfig.from_dict(values)).eval()
    for name, p in model.named_parameters():
        gain = 0.5 if "bigvgan" in name else 1.0
        p.copy_(gain * torch.randn_like(p) / p[0].numel() ** 0.5 if p.dim() > 1 else 0.1 * torch.randn_like(p))
    sizes = model.config.dit_config
    return model, Voice(torch.randn(1, sizes.enc_emb_dim), torch.randn(1, 200, sizes.mel_dim))


def spoken_codes(folder: str, text: str) -> tuple[Token2Wav, Voice, Tensor]:
    """A checkpoint's codec decoder and first voice, and the codes with which it answers a text."""
    model = OmniModel.from_pretrained(folder)
    system = {"role": "system", "content": model.processor.speech_system}
    inputs = model.processor([system, {"role": "user", "content": text}])
    out = model.generate(inputs, speaker=next(iter(model.voices)), seed=0)
    return model.code2wav, next(iter(model.voices.values())), out.codes[0][None]


def first_sound_ms(model: Token2Wav, codes: Tensor, voice: Voice, schedule: ChunkSchedule) -> float:
    """Milliseconds of computing from the code that completes the first window until its samples are there."""
    state = model.init_state(1, voice, schedule=schedule)
    for code in codes.split(1, dim=2):
        began = time.perf_counter()
        if model.step(code, state).numel():
            return 1000 * (time.perf_counter() - began)
    raise ValueError("the codes are too few for a sound; ask for a longer text or more --codes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="a Qwen2.5-Omni checkpoint; default: narrow random weights")
    parser.add_argument("--text", default="Count from one to ten.", help="what the checkpoint is asked")
    parser.add_argument("--codes", type=int, default=150, help="codes for random weights, 50 a second (default: 150)")
    args = parser.parse_args()
    if args.model:
        model, voice, codes = spoken_codes(args.model, args.text)
    else:
        model, voice = random_model()
        codes = torch.randint(0, 8192, (1, 1, args.codes), generator=torch.Generator().manual_seed(0))
    print(f"{codes.shape[2]} codes, {codes.shape[2] / model.frame_rate:.1f} s of speech\n")
    titles = ["codes in a window", "codes before the first sound", "wait, ms of speech", "first sound, ms"]
    titles += ["computing it, ms", "mel error, dB rms", "of the mel's spread", "of the samples' rms", "DiT work"]
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for name, schedule in SCHEDULES.items():
        r = report_schedule(model, codes, voice, schedule)
        cells = [name, f"{r.first_codes}", f"{r.wait_ms:.0f}", f"{r.first_audio_ms:.0f}"]
        cells += [f"{first_sound_ms(model, codes, voice, schedule):.0f}", f"{r.mel_rms_db:.2f}"]
        cells += [f"{r.mel_relative:.2f}", f"{r.waveform_relative:.2f}", f"{r.work:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
