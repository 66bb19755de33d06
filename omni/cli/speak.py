"""`omni speak`: speech for a given text, as a sound file."""

from __future__ import annotations

import argparse
from pathlib import Path

from omni.cli.arguments import (
    MODEL_HELP,
    NANO,
    add_speech_arguments,
    check_sound_path,
    consoles,
    load_model,
    or_nano,
)
from omni.cli.subtitles import check_srt_path, word_entries, write_srt

HELP = "say a text"


def add_arguments(speak: argparse.ArgumentParser) -> None:
    """The arguments of `omni speak`."""
    speak.description = (
        "Writes speech for a given text. Without --model it is spoken by omni-nano, which can say about a hundred "
        "words. Words of the text that a model has not learnt to say are named on stderr before it speaks."
    )
    speak.add_argument("text", help="what to say")
    speak.add_argument("--model", metavar="DIR", help=f"{MODEL_HELP} (default: {NANO}, which is part of omni)")
    add_speech_arguments(speak, None)
    speak.add_argument("--srt", type=Path, metavar="F", help="subtitles to write: when each word is spoken, estimated")
    speak.set_defaults(run=run, misuse=speak.error)


def run(args: argparse.Namespace) -> None:
    """Speak and write the sound. Raises ValueError or OSError for what cannot be done."""
    from omni.generation.speakable import speakable_words, unspeakable_words
    from omni.processing.audio_file import write_sound

    check_sound_path(args.out)
    if args.srt is not None:
        check_srt_path(args.srt, args.out)
    console, progress = consoles()
    or_nano(args, progress)
    model = load_model(args, progress, ("thinker", "talker", "code2wav"))
    if unknown := unspeakable_words(model, args.text):
        known = ", ".join(speakable_words(model) or ())
        warning = f"{args.model} cannot say: {', '.join(unknown)}\nIt can say: {known}"
        progress.print(warning, style="yellow", markup=False, highlight=False, soft_wrap=True)
    max_frames = args.max_frames or 4095
    with progress.status("speaking ..."):
        samples = model.speak(args.text, speaker=args.speaker, max_frames=max_frames, seed=args.seed)
    assert model.code2wav is not None
    sample_rate = int(model.code2wav.sample_rate)  # type: ignore[arg-type]
    write_sound(args.out, samples, sample_rate)
    seconds = len(samples) / sample_rate
    if args.srt is not None:
        frames = (len(samples) + int(model.code2wav.missing_samples)) // int(model.code2wav.hop_length)  # type: ignore[arg-type]
        entries = word_entries(args.text, samples, sample_rate, complete=frames < max_frames)
        write_srt(args.srt, entries)
        console.print(f"subtitles: {len(entries)} words in {args.srt}", highlight=False, soft_wrap=True)
    console.print(f"speech: {seconds:.2f} s at {sample_rate} Hz in {args.out}", highlight=False, soft_wrap=True)
