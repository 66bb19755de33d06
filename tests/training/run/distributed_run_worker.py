"""What the processes of test_distributed_run.py do: whole runs, built from a config, alone or with one more process."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import soundfile
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from omni import OmniModel
from omni.evaluation.suite import EvalOptions, evaluation_hook
from omni.layers.moe import Experts
from omni.packaged.toy import toy_processor
from omni.training.data.batches import collate
from omni.training.data.conversation_samples import SampleMaker
from omni.training.data.manifest import Row, Voice
from omni.training.data.samples import TrainingBatch
from omni.training.objectives.losses import Loss
from omni.training.objectives.passes import thinker_pass
from omni.training.objectives.supervised import Supervised, text_losses
from omni.training.parallel.expert_parallel import ParallelExperts
from omni.training.parallel.parallelise import ParallelConfig, make_mesh
from omni.training.parallel.processes import shut_down
from omni.training.run import stages
from omni.training.run.checkpoints import pack
from omni.training.run.distributed_run import DistributedStore
from omni.training.run.stage_table import OBJECTIVES, Setup, Stage, conversations
from omni.training.run.stages import Run, build_run
from omni.training.run.train_config import (
    DataTable,
    EvalTable,
    LogTable,
    LoRATable,
    ModelTable,
    OptimiserTable,
    ParallelTable,
    RunTable,
    SaveTable,
    SourceTable,
    TrainConfig,
)

ROOT = Path(__file__).parents[3]
TINY, DEMO = ROOT / "configs" / "tiny.json", ROOT / "omni" / "packaged" / "toy_data"
PROCESSOR = toy_processor()
STEPS, LONG = 2, 3
SMALL = {"max_pixels": 64 * 64, "min_pixels": 32 * 32, "max_frames": 4}


def spoken(frames: int) -> Voice:
    """Some codes of the tiny model's four codebooks."""
    codes = np.random.default_rng(frames).integers(0, 64, (4, frames))
    return Voice(codes=codes.tolist())


def row(*content: Any, answer: str, voice: Voice | None = None) -> Row:
    """One question of text and media, and its answer."""
    items = [{"type": "text", "text": item} if isinstance(item, str) else item for item in content]
    messages = [{"role": "user", "content": items}, {"role": "assistant", "content": answer}]
    return Row(messages, [voice or Voice()], use_audio_in_video=True)


def tone() -> dict[str, Any]:
    wave = np.sin(2 * np.pi * 440 * np.arange(16000 // 2) / 16000).astype(np.float32)
    return {"type": "audio", "audio": wave, "sampling_rate": 16000}


def picture() -> dict[str, Any]:
    return {"type": "image", "image": np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)}


def micro_batches() -> list[list[Row]]:
    """Two for each step, what the first and the second process read: no sort of media is in both."""
    clip = {"type": "video", "video": str(DEMO / "clip.mp4")}
    return [
        [row("Name a river.", answer="The Rhine."), row("And?", answer="The Elbe, it is long.")],
        [row(clip, "What happens?", answer="A ball.", voice=spoken(5)), row("Hi", answer="Hello", voice=spoken(3))],
        [row(picture(), "Well?", answer="Noise."), row("Sing.", answer="La.")],
        [row(tone(), answer="A tone.", voice=spoken(4))],
    ]


class Listed:
    """Micro-batches share, share + shares, … of a list, again and again."""

    def __init__(self, batches: list[TrainingBatch], share: tuple[int, int]) -> None:
        self.batches, self.share, self.place = batches, share, 0

    def __iter__(self) -> Iterator[TrainingBatch]:
        while True:
            self.place += 1
            yield self.batches[((self.place - 1) * self.share[1] + self.share[0]) % len(self.batches)]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def batches_of(setup: Setup) -> list[TrainingBatch]:
    make = SampleMaker(PROCESSOR, setup.model.config, options=SMALL)
    return [collate([make(one) for one in rows]) for rows in micro_batches()]


def mixed(setup: Setup, *, text: bool, speech: bool) -> Stage:
    """Thinker or Talker or both on the list above."""
    return Stage(setup.model, Supervised(setup.model, text, speech), Listed(batches_of(setup), setup.share))


class Noisy(Supervised):
    """A loss with random numbers in it, unlike on each process."""

    def losses(self, model: Any, batch: TrainingBatch) -> dict[str, Loss]:
        noise = 1 + 0.1 * torch.rand(()) + 0.1 * float(np.random.rand())
        found = super().losses(model, batch)
        return {**found, "text": Loss(found["text"].total * noise, found["text"].count)}


def noisy(setup: Setup) -> Stage:
    """Thinker and Talker on the manifest, each process with rows of its own."""
    return Stage(setup.model, Noisy(setup.model, text=True, speech=True), conversations(setup, speech=True))


OBJECTIVES.update(
    mixed_both=partial(mixed, text=True, speech=True),
    mixed_thinker=partial(mixed, text=True, speech=False),
    mixed_talker=partial(mixed, text=False, speech=True),
    noisy=noisy,
)

# what [train], [parallel] and [lora] of each run are, beside the defaults of `mixed_config`
RUNS: dict[str, dict[str, Any]] = {
    "all": {"objective": "mixed_both", "ema_decay": 0.9},
    "without_encoders": {
        "objective": "mixed_both", "parameters": ("*", "!audio_encoder.*", "!vision_encoder.*"),
        "activation_checkpointing": True,
    },
    "encoders_alone": {"objective": "mixed_thinker", "parameters": ("audio_encoder.*", "vision_encoder.*")},
    "talker_alone": {"objective": "mixed_talker", "parameters": ("talker.*",)},
    "lora": {"objective": "mixed_thinker", "lora": LoRATable(("thinker.layers.*",), rank=2)},
    "experts_shared": {"objective": "mixed_both", "parallel": ParallelTable(expert=2)},
    "layers_cut": {"objective": "mixed_both", "parallel": ParallelTable(tensor=2)},
}  # fmt: skip
LEARNT = ("thinker.layers.1.*", "talker.layers.*", "audio_encoder.proj2.*")  # by the long run, which saves often
SAVED = ("all", "experts_shared")  # those that write a checkpoint at their end
if importlib.util.find_spec("peft") is None:
    del RUNS["lora"]


def mixed_config(name: str, folder: Path, processes: int) -> TrainConfig:
    """A run of `RUNS`; each step reads two micro-batches, however many processes there are to share them."""
    keys = dict(RUNS[name])
    tables = {table: keys.pop(table) for table in ("lora", "parallel") if table in keys}
    shares = 1 if name == "layers_cut" else processes
    if processes == 1:
        tables.pop("parallel", None)
    return TrainConfig(
        RunTable(steps=STEPS, accumulate=2 // shares, precision="fp32", clip=0.5, device="cpu", **keys),
        ModelTable(config=str(TINY), processor=str(DEMO)),
        OptimiserTable(lr=1e-3, weight_decay=0.1),
        log=LogTable(str(folder), tensorboard=False, progress=False),
        save=SaveTable(
            str(folder / "checkpoints") if name in SAVED else None, every=0, export=str(folder / "exported")
        ),
        eval=EvalTable(every=1),
        **tables,
    )


@contextmanager
def wide_models() -> Iterator[None]:
    """Runs begin from a model in fp64, with weights large enough that routing and logits differ between tokens."""

    def load(config: TrainConfig) -> OmniModel:
        model = plain(config).double()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() > 1 and not name.startswith("code2wav"):
                    p.mul_(5)
        return model

    plain = stages.load_model
    with mock.patch.object(stages, "load_model", load):
        yield


def run_mixed(name: str, folder: Path, processes: int) -> Run:
    """One run of `RUNS` to its end, with an evaluation after every step."""
    seen: list[TrainingBatch] = []

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        text = text_losses(run.setup.model, thinker_pass(run.setup.model, seen[0]))["text"]
        return {"text": (text.total / text.count).item()}

    with wide_models():
        run = build_run(mixed_config(name, folder, processes), evaluate)
    assert isinstance(run.stage.data, Listed)
    seen.append(run.stage.data.batches[1])
    entered = {"audio_encoder": 0, "vision_encoder": 0}

    def count(part: str, *_: Any) -> None:
        entered[part] += 1

    hooks = [getattr(run.setup.model, part).register_forward_hook(partial(count, part)) for part in entered]
    run.train()
    for hook in hooks:
        hook.remove()
    passes = STEPS * (run.trainer.config.train.accumulate + 1)
    assert run.trainer.ranks.gather(entered) == [dict.fromkeys(entered, passes)] * processes
    return run


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor


def check_store(run: Run) -> None:
    """The checkpoint at the end of a run fills the state in place with what it was, bit for bit."""
    store = run.trainer.store
    assert isinstance(store, DistributedStore) and store.steps() == [STEPS]
    state, tensors = run.trainer.state(), dict[str, Tensor]()
    pack(state, "", tensors)
    live = {name: local(tensor) for name, tensor in tensors.items() if "/ranks/" not in name}
    before = {name: tensor.clone() for name, tensor in live.items()}
    with torch.no_grad():
        for tensor in live.values():
            tensor.zero_()
    found = store.latest(state)
    assert found is not None and found[0] == STEPS
    assert found[1]["parameters"].keys() == state["parameters"].keys()
    wrong = [name for name, tensor in live.items() if not torch.equal(tensor, before[name])]
    assert not wrong, wrong[:3]


def write_manifest(folder: Path) -> Path:
    """Twelve rows: text, speech, sounds and pictures."""
    soundfile.write(folder / "tone.wav", tone()["audio"], 16000)
    Image.fromarray(picture()["image"]).save(folder / "noise.png")
    rows: list[dict[str, Any]] = []
    for i in range(12):
        media = ["<audio>", "<image>", "", ""][i % 4]
        answer = {"role": "assistant", "content": f"Answer {i}" + "!" * i}
        one: dict[str, Any] = {"messages": [{"role": "user", "content": f"{media}Question {i}?"}, answer]}
        one |= {"audios": ["tone.wav"]} if i % 4 == 0 else {"images": ["noise.png"]} if i % 4 == 1 else {}
        one |= {"codes": spoken(3 + i).codes} if i % 3 else {}
        rows.append(one)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def run_noisy(folder: Path) -> Run:
    """A run on the manifest beside the folder, begun or resumed, to its end."""
    config = TrainConfig(
        RunTable("noisy", LONG, parameters=LEARNT, precision="fp32", device="cpu", ema_decay=0.9),
        ModelTable(config=str(TINY), processor=str(DEMO)),
        OptimiserTable(lr=1e-2, warmup_steps=1),
        data=DataTable((SourceTable(str(folder.parent / "rows.jsonl")),), max_tokens=150, bucket=4),
        log=LogTable(str(folder), tensorboard=False, progress=False),
        save=SaveTable(str(folder / "checkpoints"), every=1, keep=2, export=str(folder / "exported")),
    )
    run = build_run(config)
    run.train()
    return run


def together(folder: Path) -> None:
    """Every run that is compared with one process alone, and the one that nobody kills."""
    for name in RUNS:
        run = run_mixed(name, folder / "two" / name, 2)
        if name in SAVED:
            check_store(run)
    run = run_noisy(folder / "whole")
    assert run.trainer.store is not None and run.trainer.store.steps() == [LONG - 1, LONG]  # keep = 2
    refuse_another_model(run, folder)


def refuse_another_model(run: Run, folder: Path) -> None:
    """Checkpoints that do not belong to a run are refused by all processes, in words."""
    store, state = run.trainer.store, run.trainer.state()
    assert isinstance(store, DistributedStore)
    name = "talker.layers.0.input_layernorm.weight"
    cases = [({**state, "parameters": {**state["parameters"], name: torch.zeros(7)}}, "is of another model")]
    for wrong, message in cases:
        try:
            store.latest(wrong)
            raise AssertionError("a parameter of another shape was filled")
        except ValueError as error:
            assert message in str(error) and name in str(error)
    config = replace(run.setup.config, parallel=ParallelTable(data=3))
    try:
        build_run(config)
        raise AssertionError("three shares cannot be made of two processes")
    except ValueError as error:
        assert "2 processes" in str(error)


def killed(folder: Path) -> None:
    """The run, whose processes are killed in their second save when the tensors are written, and nothing else is."""
    import torch.distributed.checkpoint as dcp

    whole, calls = dcp.save, []

    def cut_short(*args: Any, **kwargs: Any) -> None:
        whole(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    dcp.save = cut_short
    run_noisy(folder / "broken")


def resumed(folder: Path) -> None:
    run_noisy(folder / "broken")


def short_answers(processor: Any, manifest: Any, metrics: Any, limit: int, codes: Any) -> Any:
    """The scorer of a run, whose answers are cut short."""
    return evaluation_hook(processor, manifest, metrics, limit, codes, options=EvalOptions(max_new_tokens=4))


def answering(folder: Path) -> None:
    """Runs that score their own answers while FSDP spreads the model, one of them with experts shared in bfloat16."""
    manifest = SourceTable(str(folder / "rows.jsonl"))
    for name, expert, metrics in (("spread", 1, ("accuracy", "loss")), ("half", 2, ("accuracy",))):
        config = TrainConfig(
            RunTable("thinker", 2, parameters=LEARNT[:1], precision="bf16", device="cpu"),
            ModelTable(config=str(TINY), processor=str(DEMO)),
            data=DataTable((manifest,), (manifest,), max_tokens=150, bucket=4),
            log=LogTable(str(folder / name), tensorboard=False, progress=False),
            save=SaveTable(str(folder / name / "checkpoints") if expert == 1 else None),
            eval=EvalTable(1, 2, metrics, "distributed_run_worker:short_answers"),
            parallel=ParallelTable(expert=expert),
        )
        build_run(config).train()
    shared_experts_in_half()


def shared_experts_in_half() -> None:
    """Experts shared by the processes compute in autocast's type, as whole ones do, and learn in fp32."""
    torch.manual_seed(0)
    whole = Experts(4, 16, 8)
    whole.initialise(0.3)
    shared = ParallelExperts(whole, make_mesh(ParallelConfig(expert=2), "cpu")["expert"])
    torch.manual_seed(dist.get_rank())
    x, ids = torch.randn(5 + dist.get_rank(), 16), torch.randint(0, 4, (5 + dist.get_rank(), 2))
    for backend in ("loop", "grouped", None):
        with torch.autocast("cpu", torch.bfloat16):
            found = shared(x, ids, torch.full(ids.shape, 0.5), backend=backend)
            expected = whole(x, ids, torch.full(ids.shape, 0.5), backend=backend)
        assert found.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
        found.float().square().sum().backward()
    grad = shared.gate_up_proj.grad
    assert grad is not None and grad.dtype == torch.float32 and bool(grad.to_local().isfinite().all())


def start(scenario: Callable[[Path], None], rank: int, world: int, folder: Path) -> None:
    """One process of a scenario, as a launcher would start it but that the group meets at a file."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES="")
    dist.init_process_group("gloo", init_method=f"file://{folder}/{scenario.__name__}", rank=rank, world_size=world)
    scenario(folder)
    shut_down()
