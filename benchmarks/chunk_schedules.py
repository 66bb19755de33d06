"""Token2Wav while codes arrive: for some chunk schedules, how long the first sound waits and how far the result is from
decoding all codes at once (the reference's way). Prints a Markdown table.

The wait is exact and a property of the config: codes that must have come, as milliseconds of speech. The computing time
of the first sound, measured here, comes on top. The distance is a property of the weights, so it needs trained ones.
Without --model a narrow diffusion transformer in the released block structure learns, for some minutes, the speech of
omni-nano, with clusters of its mel as codes; the vocoder stays random, so its samples are not compared. With --model
the codes are those with which the checkpoint answers --text.

    OMP_NUM_THREADS=2 python benchmarks/chunk_schedules.py
    python benchmarks/chunk_schedules.py --model Qwen/Qwen2.5-Omni-7B --text "How far is it to the sea?"
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import trange

from omni.code2wav.chunk_schedule import ChunkSchedule
from omni.code2wav.schedule_report import report_schedule
from omni.code2wav.token2wav import Token2Wav
from omni.code2wav.voices import Voice
from omni.config.token2wav import Token2WavConfig
from omni.layers.init import initialise
from omni.model import OmniModel
from omni.training.codec.codec import k_means, nearest_codes
from omni.training.objectives.flow_matching import FlowBatch, draw_flow, flow_matching_loss
from omni.training.objectives.voice_mel import VoiceMel

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "qwen2_5_omni_7b.json"
LAYERS = {
    "num_hidden_layers": 8,
    "look_ahead_layers": [4],
    "look_backward_layers": [0, 7],
}  # released: 22, 10, 0 and 20
NARROW_DIT = {"hidden_size": 192, "num_attention_heads": 3, "emb_dim": 128, "enc_channels": [32, 32, 32, 32, 96]}
NARROW_VOCODER = {"upsample_initial_channel": 128}
CLUSTERS = 256
CROP, ROWS = 72, 8  # codes of a crop, six blocks; crops of a batch
WORDS = (("the", "my", "your"), ("old", "big", "small", "red"), ("king", "dog", "bird", "fish"))
WORDS += (("sees", "follows", "likes"), ("the", "my", "your"), ("blue", "green"), ("house", "tree", "ball"))
SCHEDULES = {
    "12 codes alone": ChunkSchedule(12, 0, 0),
    "12, 12 before": ChunkSchedule(12, 12, 0),
    "12, 24 before, 12 after": ChunkSchedule(12, 24, 12),
    "the same, vocoder hears 10 frames ahead": ChunkSchedule(12, 24, 12, vocoder_lookahead_frames=10),
    "24, 24 before, 12 after (default)": ChunkSchedule(),
    "48, 48 before, 24 after": ChunkSchedule(48, 48, 24),
}


def sentences(count: int) -> list[str]:
    """Different sentences of omni-nano's words."""
    every = [" ".join(words) for words in itertools.product(*WORDS)]
    return random.Random(0).sample(every, count)


def trained_model(steps: int) -> tuple[Token2Wav, Voice, Tensor]:
    """A narrow model after so many steps, its only voice, and the codes of a sentence that it has not learnt."""
    values = json.loads(CONFIG.read_text())["token2wav_config"]
    values["dit_config"].update({**NARROW_DIT, **LAYERS, "num_embeds": CLUSTERS})
    values["bigvgan_config"].update(NARROW_VOCODER)
    torch.manual_seed(0)
    model = Token2Wav(Token2WavConfig.from_dict(values))
    initialise(model, lambda _: 0.02)
    sizes = model.config.dit_config

    nano, front_end = OmniModel.from_pretrained("omni-nano", dtype="float32"), VoiceMel(80, 240, 24000)
    mels = [front_end(torch.as_tensor(wave)) for wave in nano.speak(sentences(40), seed=0)]
    mels = [mel[: len(mel) // sizes.repeats * sizes.repeats] for mel in mels]
    pairs = [mel.unflatten(0, (-1, sizes.repeats)).flatten(1) for mel in mels]
    book = k_means(torch.cat(pairs), CLUSTERS, 20, None)
    codes = [nearest_codes(pair, book) for pair in pairs]
    voice = Voice(torch.zeros(1, sizes.enc_emb_dim), mels[0][None])

    optimizer = torch.optim.AdamW(model.dit.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    learnt = [i for i in range(1, len(codes) - 1) if len(codes[i]) > CROP]
    progress = trange(steps, desc="learning to draw speech")
    for _ in progress:
        drawn = [(i, random.randrange(len(codes[i]) - CROP + 1)) for i in random.choices(learnt, k=ROWS)]
        batch = FlowBatch(
            torch.stack([mels[i][a * sizes.repeats : (a + CROP) * sizes.repeats] for i, a in drawn]),
            torch.stack([codes[i][a : a + CROP] for i, a in drawn]),
            voice.cond.expand(ROWS, -1),
            voice.ref_mel.expand(ROWS, -1, -1),
        )
        loss = flow_matching_loss(model.dit, batch, draw_flow(batch.mel))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.dit.parameters(), 1.0)
        optimizer.step()
        rate.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval(), voice, codes[-1][None, None]


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
    return float("nan")  # the speech is over before the first window


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="a Qwen2.5-Omni checkpoint (default: a narrow model)")
    parser.add_argument("--text", default="Count from one to ten.", help="what the checkpoint is asked")
    parser.add_argument("--steps", type=int, default=1500, help="of training the narrow model (default: 1500)")
    args = parser.parse_args()
    random.seed(0)
    model, voice, codes = spoken_codes(args.model, args.text) if args.model else trained_model(args.steps)
    print(f"{codes.shape[2]} codes, {codes.shape[2] / model.frame_rate:.1f} s of speech\n")
    titles = ["codes in a window", "codes before the first sound", "wait, ms of speech", "first sound, ms"]
    titles += ["computing it, ms", "DiT work", "mel error, dB rms", "of the mel's spread"]
    titles += ["of the samples' rms"] if args.model else []
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for name, schedule in SCHEDULES.items():
        r = report_schedule(model, codes, voice, schedule)
        cells = [name, f"{r.first_codes}", f"{r.wait_ms:.0f}", f"{r.first_audio_ms:.0f}"]
        cells += [f"{first_sound_ms(model, codes, voice, schedule):.0f}", f"{r.work:.2f}"]
        cells += [f"{r.mel_rms_db:.2f}", f"{r.mel_relative:.3f}"]
        cells += [f"{r.waveform_relative:.2f}"] if args.model else []
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
