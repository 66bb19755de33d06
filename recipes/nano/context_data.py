"""Makes whole conversations with real media and spoken answers: what the Talker learns from last.

    python recipes/nano/context_data.py data [--conversations 800]

Typed, spoken, about pictures, clips and sounds, as `talk` draws them; answers are said by heart. Until here the Talker
has read text alone; here it meets what the Thinker makes of what is heard and seen. A conversation follows from its
number; those that are there are left alone.
"""

from __future__ import annotations

import argparse
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import noises
import numpy as np
import soundfile
import talk
import voice_data
from clip_files import write_rows
from drawing import CLIP_SECONDS, draw_clip, draw_picture
from engines import open_engines
from pictures import write_clip
from scenes import clip_from_talk, from_talk
from speakers import RATE_HZ, draw_speaker, say
from tqdm import tqdm

CONVERSATIONS = 800
VOICE = "heart"
_ENGINES = ("heart", "flite", "espeak", "festival")
_MOST_TURNS = 3
_ALOUD = 0.55


@cache
def _engine(name: str, folder: Path) -> Any:
    return open_engines([name], folder)


def asked(text: str, rng: random.Random, folder: Path) -> np.ndarray:
    """A question in any voice, with some silence around it."""
    engine = rng.choice(_ENGINES)
    samples = say(_engine(engine, folder), text, draw_speaker(rng, engine), rng.uniform(0.9, 1.15)).samples
    return np.pad(samples, (int(rng.uniform(0.05, 0.5) * RATE_HZ), int(rng.uniform(0.1, 0.6) * RATE_HZ)))


class Writer:
    """Writes conversations and their media into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "context").mkdir(parents=True, exist_ok=True)

    def row(self, number: int) -> dict[str, Any]:
        """The row of a conversation."""
        rng = random.Random(f"context {number}")
        drawn = talk.conversation(rng, turns=rng.randint(1, _MOST_TURNS))
        messages: list[dict[str, Any]] = []
        speech = []
        sounding = False
        for place, turn in enumerate(drawn.turns):
            name = f"context/{number}_{place}"
            content = list(self._media(turn, name, rng))
            sounding |= turn.clip is not None and turn.clip.said is not None
            if turn.question and not turn.sound_asks:
                if turn.sound is None and rng.random() < _ALOUD:
                    content.append(self._sound(f"{name}_asked", asked(talk.spoken(turn, rng), rng, self.folder)))
                else:
                    content.append({"type": "text", "text": talk.written(turn, rng)})
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.answer}]
            path = f"{name}_said.flac"
            soundfile.write(self.folder / path, voice_data.said(VOICE, turn.answer), voice_data.RATE_HZ)
            speech.append(path)
        return {"messages": messages, "speech": speech, "speaker": VOICE, "use_audio_in_video": sounding}

    def _media(self, turn: talk.Turn, name: str, rng: random.Random) -> Any:
        if turn.sound is not None:
            said = turn.sound.said
            if said is None:
                count, seed = int(rng.uniform(0.5, 4.0) * RATE_HZ), np.random.default_rng(rng.getrandbits(32))
                samples = noises.make(turn.sound.noise if turn.sound.noise in noises.KINDS else "silence", count, seed)
            else:
                samples = asked(said, rng, self.folder)
            yield self._sound(f"{name}_sound", samples)
        if turn.media == "picture":
            draw_picture(from_talk(turn.picture)).save(self.folder / f"{name}.png")
            yield {"type": "image", "image": f"{name}.png"}
        if turn.media == "clip" and turn.clip is not None:
            track = None if turn.clip.said is None else asked(turn.clip.said, rng, self.folder)
            seconds = CLIP_SECONDS if track is None else max(CLIP_SECONDS, len(track) / RATE_HZ)
            write_clip(self.folder / f"{name}.mp4", draw_clip(clip_from_talk(turn.clip), seconds), track)
            yield {"type": "video", "video": f"{name}.mp4"}

    def _sound(self, name: str, samples: np.ndarray) -> dict[str, Any]:
        soundfile.write(self.folder / f"{name}.wav", samples, RATE_HZ, subtype="PCM_16")
        return {"type": "audio", "audio": f"{name}.wav"}


def make_context(folder: Path, conversations: int = CONVERSATIONS) -> None:
    """Write `context.jsonl` and the media of its rows."""
    writer, rows = Writer(folder), []
    for number in tqdm(range(conversations), "conversations"):
        kept = folder / f"context/{number}.json"
        if not kept.exists():
            kept.write_text(json.dumps(writer.row(number)), encoding="utf-8")
        rows.append(json.loads(kept.read_text(encoding="utf-8")))
    write_rows(folder / "context.jsonl", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS)
    args = parser.parse_args()
    make_context(args.folder, args.conversations)


if __name__ == "__main__":
    main()
