"""Writes the model card of a finished omni-nano, with its figures, beside its weights.

    python recipes/nano/model_card.py model report.json --strangers strangers.json

`strangers.json` here has the figures of the packaged weights on material that their makers did not use. Other weights
need a file of their own with the same rows; without one the card says that nobody has measured them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from evaluate import TARGETS

STRANGERS = Path(__file__).with_name("strangers.json")
CARD = """\
---
license: apache-2.0
language: en
library_name: omni
pipeline_tag: any-to-any
tags: [speech, omni-modal, synthetic-data]
---

# omni-nano

A complete Thinker-Talker model in the layout of Qwen3-Omni, {megabytes:.0f} MB, trained from nothing by the library's
own stages (`recipes/nano`, `make nano`) on synthetic data alone: no recordings of people, no downloaded weights.

## What it can do

Asked by text or by voice, it answers in text and speech at once, in one synthetic voice (flite's slt, word by word):

- repeat a sentence, or write down one that it hears, from about a hundred words;
- sums, differences and products of numbers in 0..10, with results in 0..20;
- colour, shape, count (0..5) and place of drawn shapes, a digit; "and the other one?" as a second turn. Every picture
  is stretched to a square of 192 pixels; shapes on a picture that is far from square are misread;
- which way a shape moves in a clip of a few seconds, what moves, what was said in the clip's sound;
- say "i don't know" to anything else.

## What it can't

Anything outside that world: it knows no facts, no other words, no photographs, no human voices (it has heard
synthesisers only), no languages but English. It speaks each word by itself, without the melody of a sentence, and
answers in small letters without punctuation; `omni speak` names the words of a text that it cannot say. It is a
demonstration and a test bed, not an assistant.

## On material that its makers did not use

Voices, recordings and conversations that neither training nor the figures further down know anything of. Expect what
you bring to go as it goes here.

{strangers}

## Figures

On material of its own kind: {questions} fresh questions of each skill, from seeds, speeds and words that training has
not seen (`recipes/nano/evaluate.py`). Speech is judged by an independent recogniser (PocketSphinx with the small
world's grammar) beside the original synthetic voice.

{tables}

## How it was trained

Voices: flite and espeak-ng, with rooms, noise, speed and pitch varied; pictures and clips are drawn. Stages, in order:
codes (k-means over mel spectra), Code2Wav on these codes, the Thinker on typed questions, the audio encoder by CTC on
the Thinker's embeddings, the vision encoder on the embeddings of what is drawn, the Thinker on what both say, the
Talker with its residual head on two, four, then up to eight words. See `recipes/nano/README.md`. The encoder in
`codec_encoder`, which turns recordings into codes for training, was fitted last, to the finished model's own speech.
{notes}
"""


def tables(report: dict[str, Any]) -> str:
    """The figures of evaluate.py in Markdown."""
    lines = ["| asked | skill | right | target |", "|---|---|---|---|"]
    for group, skills in report["understanding"].items():
        for skill, share in skills.items():
            target = f"{TARGETS[group]:.0%}" if skill == "all" and group in TARGETS else ""
            name = f"**{skill}**" if skill == "all" else skill
            lines.append(f"| {group} | {name} | {share:.1%} | {target} |")
    lines += ["", "| speech and speed (2 CPU cores) | value |", "|---|---|"]
    for name, value in {**report["speech"], **report["speed"]}.items():
        lines.append(f"| {name} | {value:.3f} |")
    agreement = report["generate, stream and engine agree"]
    lines.append(f"| greedy answers equal in generate, stream and engine | {agreement:.1%} |")
    return "\n".join(lines)


def strangers_table(figures: dict[str, str] | None = None) -> str:
    """The figures on material that the makers did not use, in Markdown. A row without a figure stays, and says so."""
    packaged = json.loads(STRANGERS.read_text(encoding="utf-8"))
    rows = dict.fromkeys(packaged, "not measured") | (figures or {})
    return "\n".join(["| what | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def write_card(model: Path, report: dict[str, Any], notes: str = "", strangers: dict[str, str] | None = None) -> None:
    """Write README.md beside the weights. notes: what else is to be said about this training. strangers: figures of
    these weights on material that their makers did not use, by the rows of strangers.json."""
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    questions, shown = report["questions of each skill"], tables(report)
    others = strangers_table(strangers)
    card = CARD.format(megabytes=size / 1e6, questions=questions, tables=shown, strangers=others, notes=notes)
    (model / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("report", type=Path, help="what evaluate.py --out wrote")
    parser.add_argument("--notes", type=Path, help="a text to be added to how it was trained")
    parser.add_argument("--strangers", type=Path, help="figures on material that the makers did not use")
    args = parser.parse_args()
    notes = "" if args.notes is None else args.notes.read_text(encoding="utf-8")
    strangers = None if args.strangers is None else json.loads(args.strangers.read_text(encoding="utf-8"))
    write_card(args.model, json.loads(args.report.read_text(encoding="utf-8")), notes, strangers)


if __name__ == "__main__":
    main()
