"""From a config file to a run: model, what learns, objective, data, processes, and the finished model's folder.

A stage is a preset of all of these; the published ones are the files `configs/train_*.toml`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from omni.checkpoint.load import resolve_dtype
from omni.checkpoint.placement import check_device
from omni.checkpoint.shards import read_headers
from omni.config.keywords import nearest
from omni.config.locate import locate
from omni.config.model import OmniConfig
from omni.model import OmniModel
from omni.processing.processor import OmniProcessor
from omni.training.codec.speech_codes import keep_encoder
from omni.training.parallel.processes import init_from_env, is_main, process_count
from omni.training.run.checks import check_parts, check_writable
from omni.training.run.contracts import TrainResult
from omni.training.run.distributed_run import spread, store_of
from omni.training.run.fit import check_settings
from omni.training.run.lora import LoRABase, add_lora, merge_lora
from omni.training.run.objective_options import objective_options
from omni.training.run.optimiser import trainable
from omni.training.run.speakers import SpeakerEmbedding, add_speaker, merge_speakers, speaker_parameters
from omni.training.run.stage_table import OBJECTIVES, OWN_MODULE, Evaluate, Setup, Stage
from omni.training.run.train_config import TrainConfig
from omni.training.run.trainer import Trainer


@dataclass
class Run:
    """A run that is ready to start. model: as it is trained; `train` runs it, resumes it where its folder holds a
    checkpoint, and writes the finished model."""

    setup: Setup
    stage: Stage
    trainer: Trainer

    def train(self, *, resume: bool = True) -> TrainResult:
        """Train to the end, or to a signal. A run that was ended early is exported only when it is taken up again.

        Raises ValueError where low-rank updates would go on beside weights that hold them already.
        """
        if resume and self.trainer.store is not None:
            self.trainer.resume()
        merged = bool(getattr(self.trainer.also.get("lora_base"), "changed", False))
        if merged and self.trainer.steps_done < self.setup.config.train.steps:
            raise ValueError(
                f"the weights in {self.setup.config.model.checkpoint} are not those that this run began with (it may "
                "have exported its result there), so its low-rank updates do not belong to them; begin a new run with "
                "another save.folder, or put the old checkpoint back"
            )
        result = self.trainer.train()
        export = self.setup.config.save.export
        if export is not None and not result.stopped and not merged:
            self.export(export)
        return result

    def export(self, folder: str | Path) -> None:
        """Write the model in the Hub's layout, with the averaged parameters if there are any. The run ends with this:
        low-rank updates and new voices are merged into the model's own weights."""
        ema = self.trainer.ema
        with ema.applied() if ema is not None else nullcontext():
            self.stage.finish()
            finish_model(self.setup.model)
            save(self.setup.model, folder, dtype_to_save(self.setup))
        checkpoint = self.setup.config.model.checkpoint
        if checkpoint is not None and self.stage.keeps_codes and is_main():
            keep_encoder(checkpoint, folder)


def finish_model(model: OmniModel) -> None:
    """Merge what training put beside the weights: low-rank updates and rows of voices."""
    if any("lora_" in name for name, _ in model.named_parameters()):
        merge_lora(model)
    if model.talker is not None and isinstance(model.talker.codec_embedding, SpeakerEmbedding):
        merge_speakers(model)


def dtype_to_save(setup: Setup) -> torch.dtype | None:
    """The type of the finished model's weights: that of the checkpoint which the run started from, or what `save.dtype`
    says; None: as they are."""
    wanted, checkpoint = setup.config.save.dtype, setup.config.model.checkpoint
    if wanted != "checkpoint":
        return resolve_dtype(wanted)
    if checkpoint is None:
        return None
    written = setup.model.config.dtype
    return resolve_dtype("auto", written, () if written else read_headers(locate(checkpoint)).values())


def save(model: OmniModel, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """`save_pretrained`, by all processes together where there are several. dtype: of the files' floating weights."""
    from omni.training.run.distributed_checkpoint import export, stored_as

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        export(model, folder, dtype=dtype)
    else:
        with stored_as(model, dtype):
            model.save_pretrained(folder)


def build_run(config: TrainConfig, evaluate: Evaluate | None = None) -> Run:
    """Everything that a config file describes, ready to train. evaluate: in place of the stage's own scores.

    Raises ValueError, FileNotFoundError or OSError.
    """
    if config.train.objective not in OBJECTIVES:
        wrong = config.train.objective
        raise ValueError(f"train.objective = {wrong!r} is not known; {nearest(wrong, OBJECTIVES)}")
    options = objective_options(config)
    check_settings(config)
    parts = config.model.parts
    whole = "thinker" in parts and ("talker" in parts) == ("code2wav" in parts)
    if config.save.export is not None and not whole:  # saving would fail in the end
        raise ValueError(
            f"save.export writes a checkpoint, and {', '.join(parts)} make none; let model.parts be all parts, or the "
            "thinker alone, or leave save.export out"
        )
    check_parts(config, options)
    check_writable(config, options)
    init_from_env()  # before anything is put on a device
    torch.manual_seed(config.train.seed)  # what is added to the model is alike on all processes
    model = load_model(config)
    own_module = config.train.objective in OWN_MODULE
    if own_module:
        model.requires_grad_(False)
    else:
        choose_parameters(model, config)
    ranks, share = spread(model, config, whole=own_module)
    setup = Setup(config, model, model.processor, share)
    stage = OBJECTIVES[config.train.objective](setup)
    if own_module:
        trainable(stage.module, config.train.parameters)
        for part in stage.left_alone:
            part.requires_grad_(False)
    trainer = Trainer(
        stage.module,
        stage.objective,
        stage.data,
        config,
        evaluate or stage.evaluate,
        ranks,
        store_of(config),
        also=stage.also if config.lora is None else {**stage.also, "lora_base": LoRABase(model)},
    )
    return Run(setup, stage, trainer)


def load_model(config: TrainConfig) -> OmniModel:
    """The model that a run starts from: a checkpoint, or random weights drawn with the run's seed."""
    table = config.model
    device = None if config.train.device == "auto" else config.train.device
    if device is None and process_count() > 1:
        device = "cpu"  # `spread` puts each process's part on its GPU
    if table.checkpoint is not None:
        model = OmniModel.from_pretrained(table.checkpoint, dtype=table.dtype, device=device, parts=table.parts)
    else:
        assert table.config is not None
        torch.manual_seed(config.train.seed)
        dtype = torch.bfloat16 if table.dtype == "bfloat16" else torch.float32
        place = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = OmniModel(OmniConfig.from_pretrained(table.config), table.parts).to(place, dtype)
    if table.processor is not None:
        model.processor = OmniProcessor.from_pretrained(table.processor)
    return model


def choose_parameters(model: OmniModel, config: TrainConfig) -> None:
    """Add the new voice and low-rank updates that the config asks for, and let learn what it names.

    With [lora], or a voice of which the row alone learns, `train.parameters` left at its default adds nothing.
    """
    chosen, default = config.train.parameters, type(config.train).parameters
    special: list[nn.Parameter] = []
    if config.speaker is not None:
        add_speaker(model, config.speaker.add, config.speaker.like)
    if config.lora is not None:
        table = config.lora
        names = set(add_lora(model, table.patterns, table.rank, table.alpha, table.dropout, table.experts))
        special += [p for name, p in model.named_parameters() if name in names]
    row_only = config.speaker is not None and config.speaker.row_only
    if row_only:
        assert config.speaker is not None
        special += speaker_parameters(model, config.speaker.add)
    if special and chosen == default:
        model.requires_grad_(False)
    else:
        trainable(model, chosen)
        if row_only:  # the rest of the table never learns beside it
            model.require("talker").codec_embedding.weight.requires_grad_(False)
    for parameter in special:
        parameter.requires_grad_(True)
