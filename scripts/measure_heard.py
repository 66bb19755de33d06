"""How exactly a reply is cut: the words that omni keeps, beside the words that a judge hears, for omni-nano.

    python scripts/measure_heard.py --replies 200 --cache /tmp/heard        # makes the table of docs/heard.md

Replies stream as in a session, with chunks handed out one ahead of the player. Every 0.1 s of each is a cut. The judge
is PocketSphinx's forced alignment (`pip install pocketsphinx`, needed by this script alone), and its own error is
measured on words put together at known places by flite (`apt-get install flite`). Replies are cached, so the command
may be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from omni import AudioChunk, OmniModel, StreamingConfig, TextDelta
from omni.encoders.resample import StreamingResampler
from omni.generation.arguments import resolve
from omni.generation.generate import start
from omni.generation.turn import Turn
from omni.session.heard import heard_ids

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "nano"))
import world

RATE_HZ, PAD_S = 16_000, 0.4
Spans = list[tuple[float, float]]  # of words, in milliseconds


class Judge:
    """Forced alignment of a known text: where its words begin and end, or None where it finds no way."""

    def __init__(self) -> None:
        from pocketsphinx import Decoder

        self.decoder = Decoder(lm=None, loglevel="FATAL", samprate=float(RATE_HZ))

    def __call__(self, samples: np.ndarray, rate_hz: int, text: str) -> Spans | None:
        wave = (
            StreamingResampler(rate_hz, RATE_HZ)(torch.from_numpy(samples)).numpy() if rate_hz != RATE_HZ else samples
        )
        quiet = np.zeros(int(PAD_S * RATE_HZ), np.float32)
        wave = np.concatenate([quiet, wave * (0.5 / max(float(np.abs(wave).max()), 1e-3)), quiet])
        wave = wave + np.random.default_rng(0).normal(0, 1e-3, len(wave))  # it takes digital silence badly
        self.decoder.set_align_text(text)
        self.decoder.start_utt()
        self.decoder.process_raw((wave * 32767).astype(np.int16).tobytes(), full_utt=True)
        self.decoder.end_utt()
        if self.decoder.hyp() is None:
            return None
        words = [s for s in self.decoder.seg() if s.word[0] not in "<["]
        if [s.word.split("(")[0] for s in words] != text.split():
            return None
        return [(10 * s.start_frame - 1000 * PAD_S, 10 * (s.end_frame + 1) - 1000 * PAD_S) for s in words]


def misses_sound(spans: Spans, samples: np.ndarray, rate_hz: int) -> bool:
    """Whether the judge has left out 0.15 s or more of loud sound: it was lost, or other words were said."""
    hop = rate_hz // 100
    power = (samples[: len(samples) // hop * hop].reshape(-1, hop) ** 2).mean(1)
    loud = power > power.max() * 10**-2.5
    for begin, end in spans:
        loud[max(0, int(begin / 10) - 3) : int(end / 10) + 3] = False
    return int(loud.sum()) >= 15


def question(index: int) -> str:
    """Something to be repeated: sentences, and words in no order."""
    rng = random.Random(1_000_000 + index)
    said = world.sentence(rng) if index % 4 else world.words(rng, 3, 8)
    while len(said.split()) < 3:
        said = world.words(rng, 4, 8)
    return rng.choice(("repeat after me: ", "say ", "please say ", "repeat ")) + said


def old_rule(turn: Turn, played_ms: float, frame_ms: float) -> int:
    """Tokens in proportion to the frames drawn so far, as omni counted before."""
    spoken = [token for token in turn.text.kept if token not in turn.request.stop_ids]
    frames = min(turn.delivered_frames, int(played_ms / frame_ms + 1e-6))
    return len(spoken) * frames // max(len(turn.speech.codes), 1)


def run_reply(model: OmniModel, judge: Judge, index: int) -> dict[str, Any]:
    """One reply, every other one with codes drawn at random: what was kept at each cut, and the judge's words."""
    assert model.processor is not None and model.code2wav is not None
    codec, sampling = model.code2wav, {"temperature": 0.9, "top_k": 50} if index % 2 else None
    hop, missing, rate = int(codec.hop_length), int(codec.missing_samples), int(codec.sample_rate)
    arguments = {"audio_sampling": sampling, "residual_sampling": sampling, "max_frames": 150, "seed": index}
    asked = resolve(model, 1, max_new_tokens=64, text_sampling=None, return_audio=True, speaker=None, **arguments)
    inputs = model.processor([{"role": "user", "content": question(index)}])
    rows = start(model, inputs, asked, StreamingConfig())
    turn, cuts, sound, sent = rows.turns[0], list[tuple[float, int, int]](), list[np.ndarray](), list[float]()
    assert turn is not None
    while rows.running():
        for event in rows.tick():
            if isinstance(event, TextDelta):
                turn.delivered_ids += len(event.token_ids)
                if event.text.startswith(" ") or (event.text and not sent):
                    sent.append(event.time_ms or 0.0)
            elif isinstance(event, AudioChunk):
                sound.append(event.samples.numpy())
                turn.delivered_frames = (event.start_sample + len(event.samples) + missing) // hop
                while 100 * (len(cuts) + 1) <= event.start_ms + 1000 * len(event.samples) / rate:
                    played = 100.0 * (len(cuts) + 1)
                    kept = model.processor.decode(heard_ids(turn, codec, played))
                    ids = [token for token in turn.text.kept if token not in turn.request.stop_ids]
                    before = model.processor.decode(ids[: old_rule(turn, played, 1000 / codec.frame_rate)])
                    cuts.append((played, len(kept.split()), len(before.split())))
    assert turn.times is not None
    samples, text = np.concatenate(sound), turn.text.answer
    spans = turn.times.word_spans_ms(sound_over=turn.speech.reason == "stop")
    final = {played: len(model.processor.decode(heard_ids(turn, codec, played)).split()) for played, _, _ in cuts}
    judged = judge(samples, rate, text)
    lost = judged is not None and misses_sound(judged, samples, rate)
    return {
        "text": text,
        "judged": judged,
        "lost": lost,
        "spans": spans,
        "sent": sent,
        "cuts": cuts,
        "final": [*final.values()],
    }


def judge_error(judge: Judge, voice: str, sentences: int) -> np.ndarray:
    """The judge's errors (begins, ends) in milliseconds, on words of flite put together at known places [n, 2]."""
    errors = []
    for index in range(sentences):
        text = world.sentence(random.Random(9_000_000 + index))
        pieces, spans, at = [np.zeros(960, np.float32)], list[tuple[float, float]](), 960
        for word in text.split():
            with tempfile.NamedTemporaryFile(suffix=".wav") as file:
                subprocess.run(["flite", "-voice", voice, "-t", word, "-o", file.name], check=True, capture_output=True)
                wave, rate = soundfile.read(file.name, dtype="float32")
            loud = np.flatnonzero(np.abs(wave) > 0.01)
            wave = wave[loud[0] : loud[-1] + 1]
            spans.append((1000 * at / rate, 1000 * (at + len(wave)) / rate))
            pieces += [wave, np.zeros(480, np.float32)]
            at += len(wave) + 480
        found = judge(np.concatenate(pieces), rate, text)
        if found is not None:
            errors.append(np.array(found) - np.array(spans))
    return np.concatenate(errors)


def rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(values, float)))))


def print_row(name: str, kept: list[int], heard: list[int]) -> None:
    errors = np.array(kept) - np.array(heard)
    shares = f"{np.mean(errors == 0):.0%} | {np.mean(errors > 0):.1%} | {errors.max():+d}"
    print(f"| {name} | {errors.mean():+.2f} | {rms(errors):.2f} | {shares} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", type=int, default=200, help="replies that the judge can follow (default: 200)")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/measure_heard"), help="where replies are kept")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    judge, model, replies, index, left_out = Judge(), None, list[dict[str, Any]](), 0, 0
    while len(replies) < args.replies:
        path = args.cache / f"{index:04d}.json"
        if not path.exists():
            model = model or OmniModel.from_pretrained("omni-nano", dtype="float32", device="cpu")
            path.write_text(json.dumps(run_reply(model, judge, index)), encoding="utf-8")
        reply, index = json.loads(path.read_text(encoding="utf-8")), index + 1
        usable = reply["judged"] is not None and not reply["lost"]
        left_out += not usable
        replies += [reply] if usable else []
    heard = [sum(end <= cut[0] for _, end in r["judged"]) for r in replies for cut in r["cuts"]]
    print(f"{len(replies)} replies, {len(heard)} cuts; {left_out} more replies could not be judged\n")
    print("| rule | mean | rms | exact | too many | worst |\n|---|---|---|---|---|---|")
    print_row("tokens in proportion to frames drawn (before)", [c[2] for r in replies for c in r["cuts"]], heard)
    print_row("while streaming", [c[1] for r in replies for c in r["cuts"]], heard)
    print_row("after the reply", [kept for r in replies for kept in r["final"]], heard)
    errors = np.concatenate([np.array(r["spans"]) - np.array(r["judged"]) for r in replies])
    early = np.concatenate(
        [np.array(r["sent"]) - np.array(r["judged"])[:, 0] for r in replies if len(r["sent"]) == len(r["judged"])]
    )
    print(
        f"\nwords: begin rms {rms(errors[:, 0]):.0f} ms, end rms {rms(errors[:, 1]):.0f} ms after the reply;", end=" "
    )
    print(f"begin as sent with the text: rms {rms(early):.0f} ms")
    for voice in ("slt", "rms", "kal16"):
        own = judge_error(judge, voice, 40)
        print(f"judge, {voice}: {len(own)} words, begin rms {rms(own[:, 0]):.0f} ms, end rms {rms(own[:, 1]):.0f} ms")


if __name__ == "__main__":
    main()
