"""Trains omni-nano from nothing: data, codes, stages, the finished checkpoint, its figures.

    python recipes/nano/run.py                     # everything, in runs/nano; the same command goes on where it was
    python recipes/nano/run.py --list              # the steps, and which are done
    python recipes/nano/run.py --only codes 1_code2wav
    python recipes/nano/run.py --smoke             # a minute on bundled clips: every stage for a few steps

A step is done when what it makes is there; stages of training also go on from their own checkpoints. On two CPU cores
the whole takes some hours; two processes of one thread each are faster than one of two (`--only` names their steps).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from assemble import assemble
from fit_codes import fit_codes
from fit_encoder import fit_encoder
from join_hearing import join_hearing
from make_data import make_data
from make_model import make_model, nano_config
from name_cells import name_cells
from rich.console import Console
from rich.table import Table
from think import encode, think

from omni.training.run.stages import build_run
from omni.training.run.train_config import TrainConfig

HERE = Path(__file__).resolve().parent
STAGES = HERE / "stages"
SMOKE_DATA = HERE / "smoke"
# Steps of each stage, and what else is smaller, in the smoke recipe.
SMOKE = {
    "1_code2wav": ("train.steps=12", "objective.batch_size=3", "eval.every=0"),
    "2_text": ("train.steps=20", "data.max_tokens=384"),
    "3_hearing": ("train.steps=10", "objective.batch_size=8"),
    "4_talker_pairs": ("train.steps=10", "data.max_tokens=384"),
    "5_talker_fours": ("train.steps=6", "data.max_tokens=384"),
    "6_talker": ("train.steps=6", "data.max_tokens=384"),
    "7_talker_in_context": ("train.steps=4", "data.max_tokens=384", "data.bucket=16"),
}
ENCODED = {"questions": 0.2, "sentences": 0.08, "pictures": 0.1, "clips": 0.2}  # manifests, how often to think of each
_BRIEF = ("optimiser.warmup_steps=2", "log.every=1")


@dataclass(frozen=True)
class Step:
    """One step: what it makes, in the work folder, and what makes it there (paths count from that folder)."""

    name: str
    makes: str
    do: Callable[[], object]


def train(stage: str, overrides: Sequence[str] = ()) -> None:
    """A stage of training, from where its last checkpoint is."""
    result = build_run(TrainConfig.from_toml(STAGES / f"{stage}.toml", overrides)).train()
    if result.stopped:  # by a signal, its checkpoint is written
        raise SystemExit(f"{stage} was stopped; the same command goes on from here")


def steps(*, smoke: bool = False, scale: float = 1.0, questions: int = 200) -> list[Step]:
    """All steps in their order."""

    def stage(name: str) -> Step:
        overrides = (*SMOKE[name], *_BRIEF) if smoke else ()
        return Step(name, f"{folder_of(name)}/model/config.json", partial(train, name, overrides))

    def joined(name: str, folder: str, **parts: str) -> Step:
        sources = {part: Path(parts[part]) / "model" for part in parts}
        return Step(name, f"{folder}/config.json", partial(assemble, Path(folder), Path("start"), sources))

    def report() -> None:
        from evaluate import evaluate  # needs PocketSphinx, which nothing else does

        if not Path("model/codec_encoder/mel_codec.json").exists():
            fit_encoder(Path("model"))
        figures = evaluate(Path("model"), Path("codes"), questions, Path("report.partial.json"))
        Path("report.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    def card() -> None:
        from model_card import write_card

        write_card(Path("model"), json.loads(Path("report.json").read_text(encoding="utf-8")))

    def encode_all() -> None:
        for name in ENCODED:
            if not (path := Path(f"encoded/{name}.safetensors")).exists():
                encode(Path("thinking_start"), Path(f"data/{name}.jsonl"), path)
        Path("encoded/done").touch()

    def think_all() -> None:
        files = {Path(f"encoded/{name}.safetensors"): share for name, share in ENCODED.items()}
        think(Path("thinking_start"), Path("thinking/model"), files, *((12, 256) if smoke else (6000,)))

    encoders = joined("encoders", "perceiving_start", thinker="text")
    cells = (Path("perceiving_start"), Path("cells/model"), 192 if smoke else 160_000)
    speaking = joined("speaking", "speaking_start", thinker="text")
    codes = (nano_config()["code2wav_config"], [Path("data/answers.jsonl")], Path("codes"))
    hearing = (Path("hearing/model"), Path("cells/model"), Path("data/sentences.jsonl"), Path("thinking_start"))
    model = joined("model", "model", thinker="thinking", talker="talker_in_context", code2wav="code2wav")
    plan = [
        Step("data", "data/spoken_context.jsonl", partial(make_data, Path("data"), scale)),
        Step("start", "start/config.json", partial(make_model, Path("start"))),
        Step("codes", "codes/mel_codec.json", partial(fit_codes, *codes)),
        stage("1_code2wav"),
        stage("2_text"),
        Step(encoders.name, encoders.makes, partial(encoders.do, fresh_encoders=True)),
        stage("3_hearing"),
        Step("cells", "cells/model/config.json", partial(name_cells, *cells)),
        Step("join", "thinking_start/config.json", partial(join_hearing, *hearing)),
        Step("encode", "encoded/done", encode_all),
        Step("think", "thinking/model/config.json", think_all),
        Step(speaking.name, speaking.makes, partial(speaking.do, fresh_talker=True)),
        stage("4_talker_pairs"),
        stage("5_talker_fours"),
        stage("6_talker"),
        joined("context", "context_start", thinker="thinking", talker="talker"),
        stage("7_talker_in_context"),
        Step(model.name, model.makes, partial(model.do, dtype=torch.bfloat16)),
        Step("report", "report.json", report),
        Step("card", "model/README.md", card),
    ]
    return [step for step in plan if not smoke or step.name not in ("data", "report", "card")]


def folder_of(stage: str) -> str:
    """Where a stage keeps its log, checkpoints and model: its name without the number."""
    return stage.split("_", 1)[1]


def run(plan: Sequence[Step], say: Callable[[str], None]) -> None:
    """Do the steps that are not done, in the current folder."""
    for number, step in enumerate(plan, 1):
        title = f"[{number}/{len(plan)}] {step.name}"
        if Path(step.makes).exists():
            say(f"{title}: done before")
            continue
        say(f"{title} ...")
        start = time.perf_counter()
        step.do()
        say(f"{title}: {time.perf_counter() - start:.0f} s")


def losses(log: Path) -> list[dict[str, float]]:
    """The losses of each logged step."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [row["losses"] | {"seconds": row["seconds"], "step": row["step"]} for row in rows if "losses" in row]


def bought(work: Path) -> Table:
    """What each stage bought: its losses at the start and the end, means over a tenth of the log."""
    table = Table("stage", "loss", "first", "last", "steps", title="what each stage bought")
    for name in sorted([path.stem for path in STAGES.glob("[0-9]_*.toml")] + ["3_cells", "3_thinking"]):
        log = work / folder_of(name) / "log.jsonl"
        if not log.exists():
            continue
        rows = losses(log)
        share = max(1, len(rows) // 10)
        for loss in rows[0]:
            if loss in ("seconds", "step", "perplexity") or loss.endswith("balance"):
                continue
            first, last = (sum(row[loss] for row in part) / share for part in (rows[:share], rows[-share:]))
            table.add_row(name, loss, f"{first:.3f}", f"{last:.3f}", f"{rows[-1]['step']:.0f}")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of everything (default runs/nano, or runs/nano_smoke)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of every stage, on bundled clips")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of rows of data (default 1)")
    parser.add_argument("--questions", type=int, default=200, help="of each skill in the report (default 200)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="some steps, in the order of --list")
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    args = parser.parse_args()
    console = Console(stderr=True)
    work = args.work or Path("runs/nano_smoke" if args.smoke else "runs/nano")
    plan = steps(smoke=args.smoke, scale=args.scale, questions=args.questions)
    names = [step.name for step in plan]
    for name in args.only or ():
        if name not in names:
            parser.error(f"no step {name!r}; the steps are {', '.join(names)}")
    plan = [step for step in plan if not args.only or step.name in args.only]
    if args.list:
        for step in plan:
            print(f"{step.name:18}{'done' if (work / step.makes).exists() else ''}")
        return 0
    work.mkdir(parents=True, exist_ok=True)
    if args.smoke and not (work / "data").exists():
        (work / "data").symlink_to(SMOKE_DATA, target_is_directory=True)
    os.chdir(work)
    try:
        run(plan, lambda text: console.print(text, highlight=False, markup=False))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        console.print(f"omni-nano: error: {error}\nThe same command goes on from here.", markup=False, highlight=False)
        return 1
    Console(width=100).print(bought(Path()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
