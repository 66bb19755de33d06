"""Makes what `omni demo` shows omni-nano, in its folder `demo`: a request, a picture with a question, a clip.

    python recipes/nano/make_demo_media.py

Needs flite and espeak-ng; the files are part of the package.
"""

from __future__ import annotations

import random

import soundfile
from pictures import CLIP_SECONDS, draw_clip, draw_picture, write_clip
from voices import RATE_HZ, Manner, speak, surround
from world import Clip, Item, Picture

from omni.packaged.nano import NANO_DATA, QUESTIONS

FOLDER = NANO_DATA / "demo"
SHOWN = Picture((Item("circle", "red", 0), Item("square", "blue", 2), Item("star", "purple", 7)), seed=5)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    request, question, direction = (entry.asked for entry in QUESTIONS)
    for text, name, speaker in ((request, "request.wav", "awb"), (question, "question.wav", "american")):
        sound = surround(speak(text, Manner(speaker)), random.Random(name))
        soundfile.write(FOLDER / name, sound, RATE_HZ, subtype="PCM_16")
    draw_picture(SHOWN).save(FOLDER / "picture.png", optimize=True)
    sound = surround(speak(direction, Manner("slt")), random.Random("clip"))
    clip = Clip("circle", "orange", "to the left", seed=3, said=direction)
    write_clip(FOLDER / "clip.mp4", draw_clip(clip, max(CLIP_SECONDS, len(sound) / RATE_HZ)), sound)


if __name__ == "__main__":
    main()
