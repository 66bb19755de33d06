"""`omni eval`: its arguments, the tables that it prints and the file that it writes."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni.cli.arguments import count_value
from omni.config.writing import check_can_write

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from omni.evaluation.suite import EvalOptions, EvalResult
    from omni.model import OmniModel

DESCRIPTION = """\
Scores a checkpoint on a manifest of conversations (files and forms as for training, docs/training.md). The last
assistant message of a row is the reference, everything before it the prompt. Text answers are greedy; speech is drawn
the release's way from a fixed seed. Rows with a key "category" are also scored category by category.

metrics:
  wer, cer           word and character error rate of the answer's text
  exact_match        share of answers equal to the reference, case and punctuation aside
  accuracy           the same; where the reference is a letter, whether the answer chooses that option
  bleu               BLEU-4 of the corpus, 0 .. 100
  loss               the reference's text read teacher-forced: mean loss in nats, perplexity
  codes              the reference's codes read teacher-forced: accuracy of each codebook, mean loss
  mel                the answer's speech beside the reference's: decibels between mel spectra
  length_ratio       its length over the reference's
  codec_mel          recordings beside what the codec makes of them, in decibels (needs --codec)
  spoken_wer, spoken_cer   what is heard in the speech against the answer's own text (needs --transcriber)
"""
EXAMPLES = """\
examples:
  omni eval questions.jsonl --model ./checkpoint --metrics accuracy
  omni eval speech.jsonl --model ./checkpoint --metrics wer,loss --limit 200 --out results.jsonl
  omni eval voice.jsonl --model ./checkpoint --metrics codes,mel --codec mimi
  omni eval voice.jsonl --model ./checkpoint --metrics spoken_wer --transcriber my_asr:transcribe
"""
HELP = "score a checkpoint on a manifest"
_PER_CODEBOOK = "code_accuracy_"


def _names(text: str) -> list[str]:
    names = [name.strip().lower().replace("-", "_") for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of names with commas between, such as wer,accuracy")
    return list(dict.fromkeys(names))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `omni eval`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("manifest", type=Path, metavar="MANIFEST", help="the conversations: .jsonl, .tar, .parquet, …")
    add("--model", required=True, metavar="DIR", help="checkpoint folder or Hub id")
    add("--adapter", type=Path, metavar="DIR", help="LoRA adapter, merged into the checkpoint while it loads")
    add("--metrics", type=_names, default=["wer", "accuracy"], metavar="A,B", help="default: wer,accuracy")
    add("--limit", type=count_value, metavar="N", help="only the first N rows")
    add("--batch", type=count_value, default=8, metavar="B", help="rows answered side by side (default: 8)")
    add("--max-new-tokens", type=count_value, default=256, metavar="N", help="of an answer's text (default: 256)")
    add("--max-frames", type=count_value, default=1500, metavar="N", help="of an answer's speech (default: 1500)")
    add("--speaker", metavar="S", help="voice of the answers (default: the row's, else the checkpoint's)")
    add("--language", default="en", metavar="L", help="whose rules texts are compared by, such as zh (default: en)")
    add("--seed", type=int, default=0, metavar="N", help="of the drawn codes (default: 0)")
    add("--codec", metavar="KIND", help="encoder of recorded speech: mimi, omni or mel")
    add(
        "--codec-path",
        type=Path,
        metavar="DIR",
        help="its folder (default: the checkpoint's own, or Mimi's on the Hub)",
    )
    add("--codec-cache", type=Path, metavar="DIR", help="folder that keeps the codes of recordings")
    add("--transcriber", metavar="M:F", help="module:function, (samples, rate in Hz) -> text, found from here too")
    add("--skip-limit", type=int, default=100, metavar="N", help="bad rows before it is an error (default: 100)")
    add("--ignore-columns", type=lambda text: text.split(","), default=[], metavar="A,B", help="of the rows, not read")
    add("--out", type=Path, metavar="F", help="JSON lines: one for each row, then one with all numbers")
    add("--dtype", default="auto", metavar="T", help="such as bfloat16 (default: as saved)")
    add("--device", metavar="D", help="cpu, cuda:1, or auto for all (default: cuda, else cpu)")
    parser.set_defaults(run=run, misuse=parser.error)


def run(args: argparse.Namespace) -> int:
    """Score, print and write. Raises ValueError or OSError for what cannot be done, before the model loads if it can
    be known then."""
    from rich.console import Console

    from omni.evaluation.suite import EvalOptions, check_metrics, evaluate_rows
    from omni.training.data.manifest import Manifest

    options = EvalOptions(
        batch_size=args.batch, max_new_tokens=args.max_new_tokens, max_frames=args.max_frames, limit=args.limit or 0,
        speaker=args.speaker, language=args.language, seed=args.seed, skip_limit=args.skip_limit,
    )  # fmt: skip
    _check_codec(args)
    transcribe = _transcriber(args.transcriber)
    check_metrics(args.metrics, transcribe=transcribe, codes=args.codec)
    _check_out(args.out)
    rows = Manifest(args.manifest, ignore=args.ignore_columns)
    out = Console() if sys.stdout.isatty() else Console(width=160)  # a pipe has no width of its own
    progress = Console(stderr=True)
    with progress.status(f"loading {args.model} ..."):
        model = _load(args)
        codes = _encoder(args, model)
    result = evaluate_rows(model, rows, args.metrics, options, transcribe=transcribe, codes=codes)
    for table in tables(result):
        out.print(table)
    for name in result.missing:
        progress.print(f"{name}: no row has the speech that it compares", markup=False, highlight=False)
    skipped = f", {len(result.skipped)} skipped" if result.skipped else ""
    progress.print(f"{len(result.records)} rows scored{skipped}", highlight=False)
    if args.out is not None:
        write_results(args.out, result, {"model": args.model, "manifest": str(args.manifest), **_settings(options)})
        progress.print(f"rows and numbers in {args.out}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _check_codec(args: argparse.Namespace) -> None:
    """Fail before anything loads. Misuse where options do not go together."""
    from omni.training.codec.speech_codes import CODEC_ENCODERS

    if args.codec is None and (args.codec_path or args.codec_cache):
        args.misuse("--codec-path and --codec-cache belong to --codec")
    if args.codec is not None and args.codec not in CODEC_ENCODERS:
        args.misuse(f"--codec {args.codec} is not one of {', '.join(sorted(CODEC_ENCODERS))}")


def _check_out(path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"folder {path.parent} does not exist; create it or choose another --out")
    if path is not None and path.is_dir():
        raise ValueError(f"--out {path} is a folder; name a file in it, such as {path / 'results.jsonl'}")
    if path is not None:
        check_can_write(path)


def _transcriber(name: str | None) -> Callable[[Tensor, int], str] | None:
    from omni.evaluation.suite import load_transcriber

    if name is None:
        return None
    if os.getcwd() not in sys.path:  # as `python -m` does; an installed command does not
        sys.path.append(os.getcwd())
    return load_transcriber(name)


def _load(args: argparse.Namespace) -> OmniModel:
    """The parts of the checkpoint that the metrics need. Raises ValueError before its weights are read if it has not
    got them."""
    from omni.config.locate import locate
    from omni.config.model import OmniConfig
    from omni.evaluation.suite import required_parts
    from omni.model import OmniModel

    folder, parts = locate(args.model), required_parts(args.metrics)
    if len(parts) > 1 and not OmniConfig.from_pretrained(folder).has_talker:
        raise ValueError(f"{args.model} answers in text only; leave the metrics of speech out of --metrics")
    placement: dict[str, Any] = {"device_map": "auto"} if args.device == "auto" else {"device": args.device}
    return OmniModel.from_pretrained(folder, dtype=args.dtype, parts=parts, adapter=args.adapter, **placement)


def _encoder(args: argparse.Namespace, model: OmniModel) -> Callable[[Any], Tensor] | None:
    """What turns recordings into codes, by way of the cache if there is one."""
    if args.codec is None:
        return None
    from omni.code2wav.code2wav import Code2Wav
    from omni.training.codec.speech_codes import cached_codes, find_encoder, load_codec_encoder
    from omni.training.data.sound import read_speech

    books = None if model.config.talker_config is None else model.config.talker_config.num_code_groups
    code2wav = model.code2wav if isinstance(model.code2wav, Code2Wav) else None
    kind, path = find_encoder(args.codec, args.codec_path, args.model) or (args.codec, None)
    encoder = load_codec_encoder(kind, path, code2wav=code2wav, num_codebooks=books, device=model.device)
    if args.codec_cache is not None:
        return lambda source: cached_codes(source, encoder, args.codec_cache)
    return lambda source: encoder(read_speech(source, encoder.sample_rate))


def tables(result: EvalResult) -> list[Table]:
    """Numbers over all rows, and one line a category where there are any."""
    from rich.markup import escape
    from rich.table import Table

    whole = Table(box=None, pad_edge=False, header_style="bold")
    whole.add_column("metric")
    for column in ("value", "rows"):
        whole.add_column(column, justify="right")
    for name, value in result.numbers.items():
        whole.add_row(name, f"{value:.4f}", str(result.counted[name]))
    if not result.categories:
        return [whole]
    names = [name for name in result.numbers if not name.startswith(_PER_CODEBOOK)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("category")
    for column in ("rows", *names):
        table.add_column(column, justify="right")
    for category, numbers in result.categories.items():
        rows = sum(record.category == category for record in result.records)
        values = (f"{numbers[name]:.4f}" if name in numbers else "" for name in names)
        table.add_row(escape(category), str(rows), *values)
    return [whole, table]


def write_results(path: Path, result: EvalResult, about: dict[str, Any]) -> None:
    """One JSON line a row (its texts, and `scores` by name), then one with `numbers`, `categories`, `skipped` and what
    the run was `about`. The old file stays until the new one is complete. Raises OSError where it cannot be written.
    """
    lines: list[dict[str, Any]] = []
    for record in result.records:
        values = {key: value for key, value in vars(record).items() if value is not None and key != "scores"}
        lines.append({**values, "scores": {name: score.mean for name, score in record.scores.items()}})
    whole = {"rows": len(result.records), "numbers": result.numbers, "categories": result.categories}
    lines.append({**whole, "skipped": result.skipped, **about})
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(_finite(line), ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """Infinite numbers, which JSON has not, become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _settings(options: EvalOptions) -> dict[str, Any]:
    return {key: value for key, value in vars(options).items() if key != "progress"}
