"""What each objective is made of: the module that learns, its losses, its data.

An objective of your own is one entry of `OBJECTIVES`: a function that makes a `Stage` of a `Setup`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from torch import nn

from omni.code2wav.code2wav import Code2Wav
from omni.code2wav.token2wav import Token2Wav
from omni.config.keywords import nearest
from omni.config.names import import_name
from omni.model import OmniModel
from omni.processing.processor import OmniProcessor
from omni.training.codec.adversary import Adversary
from omni.training.codec.codec import draw_weights
from omni.training.codec.codec_stage import (
    CodecObjective,
    DecoderObjective,
    evaluate_codec,
    evaluate_decoder,
    make_codec,
)
from omni.training.codec.decoding import left_alone
from omni.training.codec.discriminators import Discriminators
from omni.training.data.augmentation import PLAIN, SpeechAugmentation
from omni.training.data.batches import Batches, Collated
from omni.training.data.conversation_samples import SampleMaker
from omni.training.data.hearing import HearingDraws
from omni.training.data.manifest import Manifest
from omni.training.data.mixture import Mixture
from omni.training.data.recordings import crop_batches, open_sounds
from omni.training.data.surroundings import Surroundings, recorded_noise
from omni.training.objectives.distillation import Distillation
from omni.training.objectives.dpo import DPO
from omni.training.objectives.flow_stage import FlowMaker, FlowObjective, evaluate_flow, flow_batches, speakers_of
from omni.training.objectives.gspo import GSPO
from omni.training.objectives.supervised import Supervised
from omni.training.objectives.transcription_stage import (
    CharacterLabels,
    Labels,
    TokenLabels,
    Transcriber,
    TranscriptionObjective,
    clip_batches,
    evaluate_transcriber,
)
from omni.training.run.contracts import Data, Objective, Stateful
from omni.training.run.fit import check_learns, look_at_recordings, look_at_rows
from omni.training.run.objective_losses import ObjectiveLosses, merged
from omni.training.run.objective_options import objective_options
from omni.training.run.recorded_speech import codec_encoder, codes_of, no_codec
from omni.training.run.train_config import FilterTable, TrainConfig

Evaluate = Callable[[nn.Module, int], Mapping[str, float]]


@dataclass
class Setup:
    """What every stage is made from: the config, the model as it will be trained, its processor (None where the
    folder has none), and this process's share of the data as (index, shares)."""

    config: TrainConfig
    model: OmniModel
    processor: OmniProcessor | None
    share: tuple[int, int] = (0, 1)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the objective that are given, checked."""
        return objective_options(self.config)

    @property
    def hearing(self) -> HearingDraws:
        """Chunks and windows of data.audio_chunks_s and data.audio_windows_s. Raises ValueError for those that the
        audio encoder cannot have."""
        table = self.config.data
        draws = HearingDraws(table.audio_chunks_s, table.audio_windows_s, self.config.train.seed)
        if self.model.audio_encoder is not None:
            draws.check(self.model.audio_encoder)
        return draws

    def require_processor(self) -> OmniProcessor:
        """The processor, or a ValueError with the remedy."""
        if self.processor is None:
            raise ValueError(
                "conversations need a tokenizer: start from a checkpoint folder that has one, or name a folder with "
                "model.processor"
            )
        return self.processor

    def mixture(self, read: Callable[..., Manifest] = Manifest, part: str = "train") -> Mixture:
        """The manifests of `part`, train or eval, in their shares, filtered. Raises ValueError where there are none."""
        table = self.config.data
        sources = getattr(table, part)
        if not sources:
            raise ValueError(f"there is no data; set data.{part} = [{{ manifest = '{part}.jsonl' }}]")
        columns = {"ignore": table.ignore_columns, "read": [wanted.key for wanted in table.filters]}
        return Mixture(
            [read(source.manifest, **columns) for source in sources],
            [source.weight for source in sources],
            self.config.train.seed,
            rank=self.share[0],
            world_size=self.share[1],
            keep=partial(keeps, filters=table.filters) if table.filters else None,
        )


@dataclass
class Stage:
    """What the trainer is given. module: holds the parameters that learn; also: further things to save; finish: called
    after training, to put the result into the model; evaluate: scores of the module at a step, on `data.eval`;
    keeps_codes: the finished model decodes the same codes as the one before; left_alone: modules that never learn."""

    module: nn.Module
    objective: Objective
    data: Data
    also: Mapping[str, Stateful] = field(default_factory=dict)
    finish: Callable[[], None] = lambda: None
    evaluate: Evaluate | None = None
    keeps_codes: bool = True
    left_alone: tuple[nn.Module, ...] = ()


class Evaluation:
    """Scores of a module at a step; `rehearse` tries them on little, so that what would fail fails before training."""

    def __init__(self, score: Evaluate, rehearse: Callable[[nn.Module], Any]) -> None:
        self.score, self.rehearse = score, rehearse

    def __call__(self, module: nn.Module, step: int) -> Mapping[str, float]:
        return self.score(module, step)


def keeps(row: Mapping[str, Any], filters: tuple[FilterTable, ...]) -> bool:
    """Whether a manifest's row passes every filter: the quality filter of continued pre-training."""
    for wanted in filters:
        value = row.get(wanted.key)
        if isinstance(value, str):  # a cell of CSV
            try:
                value = float(value)
            except ValueError:
                return False
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not wanted.min <= value <= wanted.max:
            return False
    return True


def conversations(setup: Setup, *, speech: bool, pairs: bool | None = None) -> Collated:
    """The manifests' conversations as batches; with `speech`, the answers' recordings as codes; with `pairs`, two
    answers each (None: one or two). A sample of the rows is looked at: raises ValueError where the objective would
    learn nothing of them, or the wrong thing."""
    processor, table, mixture = setup.require_processor(), setup.config.data, setup.mixture()
    learns = sorted({name.split(".")[0] for name, p in setup.model.named_parameters() if p.requires_grad})
    check_learns(learns, setup.config)
    maker = SampleMaker(
        processor,
        setup.model.config,
        (codes_of(setup.config, setup.model) or no_codec) if speech else None,
        max_tokens=table.max_tokens,
        loss_on=table.loss_on,
        speech=speech,
        hearing=setup.hearing,
        pairs=pairs,
    )
    look_at_rows(mixture, maker, setup.config, learns)
    batches = Batches(
        mixture,
        maker,
        max_tokens=table.max_tokens,
        bucket_size=table.bucket,
        seed=setup.config.train.seed,
        skip_limit=table.skip_limit,
        workers=table.workers,
        padded=False,
    )
    pad = processor.tokenizer.pad_token_id
    return Collated(batches, 0 if pad is None else int(pad))


def scores(setup: Setup, data: Collated, objective: Objective) -> Evaluate | None:
    """`eval.metrics` of the model on the manifests of `data.eval`; None where no evaluation is asked for.

    "loss", the only one by default, is that of the objective; that of "thinker" is the cross-entropy of the answers.
    """
    table, sources = setup.config.eval, setup.config.data.eval
    if not table.every:
        return None
    if not sources:
        raise ValueError("eval.every needs data to evaluate on; set data.eval = [{ manifest = 'eval.jsonl' }]")
    scorer, processor, codes = import_name(table.scorer), setup.require_processor(), codes_of(setup.config, setup.model)
    metrics = table.metrics or ("loss",)
    own = setup.config.train.objective != "thinker" and "loss" in metrics and table.scorer == type(table).scorer
    others = tuple(name for name in metrics if not own or name != "loss")
    manifests = setup.mixture(part="eval").manifests

    def hooks(limit: int) -> dict[str, Evaluate]:
        return {
            manifest.path.stem: merged(
                [scorer(processor, manifest, others, limit, codes)] if others else [],
                [ObjectiveLosses(objective, data.batches, manifest, limit, data.pad_token_id)] if own else [],
            )
            for manifest in manifests
        }

    whole = hooks(table.limit)

    def evaluate(module: nn.Module, step: int) -> dict[str, float]:
        found = {name: dict(hook(module, step)) for name, hook in whole.items()}
        if len(found) == 1:
            return dict(next(iter(found.values())))
        return {f"{manifest}/{name}": value for manifest, own in found.items() for name, value in own.items()}

    def rehearse(module: nn.Module) -> None:
        for limit in (1, 8, table.limit):  # the first rows may be bad ones
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # bad rows are named when they are scored
                    for hook in hooks(limit).values():
                        hook(module, 0)
                return
            except ValueError:
                if limit == table.limit:
                    raise

    return Evaluation(evaluate, rehearse)


def _on_fixed_batches(setup: Setup, batches: Callable[[], Iterator[Any]], score: Callable[..., Any]) -> Evaluate | None:
    """A score of the module on the first batches of `data.eval`, always the same ones."""
    table = setup.config.eval
    if not table.every:
        return None
    source = batches()
    held = [next(source) for _ in range(table.limit or 4)]
    return Evaluation(lambda module, step: score(module, held), lambda module: score(module, held[:1]))


def _supervised(setup: Setup, *, text: bool, speech: bool) -> Stage:
    objective = _with_options(
        partial(Supervised, setup.model, text=text, speech=speech, given=setup.config.loss),
        setup.options,
        ("detach", "residual_weight", "residual_share") if speech else (),
    )
    data = conversations(setup, speech=speech, pairs=False)
    return Stage(setup.model, objective, data, evaluate=scores(setup, data, objective))


def _on_conversations(
    setup: Setup, make: Callable[..., Objective], *, speech: bool, known: tuple[str, ...], pairs: bool = False
) -> Stage:
    """An objective over the manifests' conversations."""
    objective = _with_options(partial(make, setup.model, given=setup.config.loss), setup.options, known)
    data = conversations(setup, speech=speech, pairs=pairs)
    return Stage(setup.model, objective, data, evaluate=scores(setup, data, objective))


def _dpo(setup: Setup) -> Stage:
    speech = bool(setup.options.get("speech"))
    of_speech = ("residual_weight", "detach") if speech else ()
    known = ("text", "speech", "beta", "label_smoothing", "reference", *of_speech)
    return _on_conversations(setup, DPO, speech=speech, known=known, pairs=True)


def _distillation(setup: Setup) -> Stage:
    if "teacher" not in setup.options:
        raise ValueError("distillation needs a teacher; set objective.teacher to its folder or Hub id")
    of_answers = ("max_new_tokens", "sampling") if setup.options.get("on_policy") else ()
    known = ("teacher", "on_policy", "top_k", "temperature", "direction", *of_answers)
    return _on_conversations(setup, Distillation, speech=False, known=known)


def _gspo(setup: Setup) -> Stage:
    if "rewards" not in setup.options:
        raise ValueError("gspo needs rewards; set objective.rewards, for example to ['exact_answer']")
    known = (
        "rewards", "group_size", "clip_low", "clip_high", "kl_weight", "max_new_tokens", "sampling", "audio",
    )  # fmt: skip
    return _on_conversations(setup, GSPO, speech=False, known=known)


def _codec(setup: Setup) -> Stage:
    """The whole codec on crops of recordings; with `decoder_only`, Code2Wav on the codes of data.codec.

    Of two ways to sound the source and filter learns; with `convolutions` these, from what the other has learnt.
    """
    code2wav, table = setup.model.require("code2wav"), setup.config.data
    if not isinstance(code2wav, Code2Wav):
        raise ValueError(f"codec trains Code2Wav, and this model's codec decoder is a {type(code2wav).__name__}")
    options = setup.options
    decoder_only, fresh = options.pop("decoder_only", False), options.pop("fresh", False)
    code2wav.by_convolutions = options.pop("convolutions", False)
    width, crop_s, batch_size = options.pop("width", None), options.pop("crop_s", 1.0), options.pop("batch_size", 16)
    folder, adversary = options.pop("encoder_folder", None), None
    if any(setup.config.loss.get(name) for name in ("adversarial", "feature")):
        views = ("width", "periods", "scales", "windows", "levels")
        judges = {name: options.pop(f"judge_{name}") for name in views if f"judge_{name}" in options}
        adversary = Adversary(Discriminators(**judges), options.pop("judge_lr", 1e-4))
    known = ["start_adversarial_step", "mel_scales", "floor_db"]
    known += [] if decoder_only else ["initialise", "quantise_from", "restart_every", "restart_below", "usage_decay"]
    codec = None
    if not decoder_only:
        codec = make_codec(code2wav, encoder=options.pop("encoder", "waves"), width=width, fresh=fresh)
    make: Callable[..., Any]
    if codec is None:
        if fresh:
            draw_weights(code2wav)
            given = codec_encoder(setup.config, setup.model)
            if given is not None and given.start_table is not None:
                given.start_table(code2wav)
        make = partial(DecoderObjective, code2wav)
    else:
        make = partial(CodecObjective, codec, seed=setup.config.train.seed)
    objective = _with_options(partial(make, setup.config.loss, adversary=adversary), options, tuple(known))
    codes = codes_of(setup.config, setup.model) if decoder_only else None

    def crops(part: str, workers: int = 0) -> Any:
        return crop_batches(
            setup.mixture(open_sounds, part), code2wav.sample_rate, crop_s, batch_size=batch_size, codes=codes,
            hop_length=code2wav.hop_length, skip_limit=table.skip_limit, workers=workers,
        )  # fmt: skip

    def score(module: Any, held: Any) -> dict[str, float]:
        return evaluate_decoder(module.code2wav, held) if decoder_only else evaluate_codec(module, held)

    evaluate = _on_fixed_batches(setup, lambda: iter(crops("eval")), score)

    def finish() -> None:
        if folder is not None and codec is not None:
            codec.save(folder)

    module = nn.ModuleDict({"code2wav": code2wav}) if codec is None else codec
    train = crops("train", table.workers)
    look_at_recordings(train)
    still = left_alone(code2wav)
    return Stage(module, objective, train, {"codec": objective}, finish, evaluate, codec is None, still)


def _flow_matching(setup: Setup) -> Stage:
    """The diffusion transformer of Token2Wav on recordings; the vocoder stays."""
    code2wav, table = setup.model.require("code2wav"), setup.config.data
    if not isinstance(code2wav, Token2Wav):
        raise ValueError("flow_matching trains a diffusion transformer, and this model's codec decoder has none")
    options, codes = setup.options, codes_of(setup.config, setup.model)
    batch_size = options.pop("batch_size", 16)
    made = {name: options.pop(name) for name in ("crop_s", "reference_s", "n_fft") if name in options}
    objective = _with_options(partial(FlowObjective, setup.config.loss), options, ("drop_rate",))

    def batches(part: str, workers: int = 0) -> Any:
        mixture = setup.mixture(part=part)
        make = FlowMaker(
            code2wav, speakers_of(mixture), voices=setup.model.voices, codes=codes, **made,
            seed=mixture.seed, rank=mixture.rank,
        )  # fmt: skip
        return flow_batches(mixture, make, batch_size=batch_size, skip_limit=table.skip_limit, workers=workers)

    evaluate = _on_fixed_batches(setup, lambda: iter(batches("eval")), evaluate_flow)
    module, train = nn.ModuleDict({"dit": code2wav.dit}), batches("train", table.workers)
    look_at_recordings(train)
    return Stage(module, objective, train, evaluate=evaluate)


def _transcription(setup: Setup) -> Stage:
    """The audio encoder with a head of its own, which is left behind."""
    setup.model.require("thinker")
    if setup.model.audio_encoder is None:
        raise ValueError("this model has no audio encoder to train")
    options = setup.options
    language, max_s = options.pop("language", "en") or None, options.pop("max_s", 30.0)  # "": texts as they are
    batch_size, head = options.pop("batch_size", 16), options.pop("head", "ctc")
    alphabet, kind = options.pop("alphabet", None), options.pop("labels", "characters")
    labels: Labels = CharacterLabels() if alphabet is None else CharacterLabels(alphabet)
    if kind == "tokens":
        labels = TokenLabels(setup.require_processor())
    make = partial(Transcriber, setup.model.audio_encoder, labels.size, head)
    known: tuple[str, ...] = ("dim", "layers", "heads", "spelling")
    if head == "embeddings":
        make, known = partial(make, **_embeddings(setup, kind, options.pop("blank", None))), ("scale", "spelling")
    heard_as = {"train": _augmentation(options, setup.config.train.seed), "eval": PLAIN}
    transcriber = _with_options(make, options, known)
    table, hearing = setup.config.data, setup.hearing

    def clips(part: str, workers: int = 0) -> Any:
        return clip_batches(
            setup.mixture(part=part), labels, transcriber, language=language, max_s=max_s, batch_size=batch_size,
            skip_limit=table.skip_limit, workers=workers, augmentation=heard_as[part], hearing=hearing,
            draws=part == "train",
        )  # fmt: skip

    score = partial(evaluate_transcriber, labels=labels, language=language or "en")
    evaluate = _on_fixed_batches(setup, lambda: iter(clips("eval")), score)
    objective, train = TranscriptionObjective(transcriber, setup.config.loss), clips("train", table.workers)
    look_at_recordings(train)
    return Stage(transcriber, objective, train, evaluate=evaluate)


def _augmentation(options: dict[str, Any], seed: int) -> SpeechAugmentation:
    """What happens to recordings before they are heard; takes its options out of the others."""
    changes = {name: options.pop(name) for name in ("speeds", "frequency_masks", "time_masks") if name in options}
    around = {field.name: options.pop(field.name) for field in fields(Surroundings) if field.name in options}
    if "noises" in around:
        around["noises"] = recorded_noise(around["noises"])
    return SpeechAugmentation(**changes, surroundings=Surroundings(**around), seed=seed)


def _embeddings(setup: Setup, kind: str, blank: str | None) -> dict[str, Any]:
    """What an `EmbeddingHead` compares with: the Thinker's embeddings of the tokenizer's ids."""
    if kind != "tokens" or blank is None:
        raise ValueError(
            "objective.head = 'embeddings' compares with the Thinker's embeddings; set objective.labels = 'tokens' and "
            "objective.blank to a text of one token that stands for no word"
        )
    processor = setup.require_processor()
    ids = processor.encode_text(blank)
    if len(ids) != 1:
        raise ValueError(f"objective.blank = {blank!r} is {len(ids)} tokens; choose a text of one")
    embeddings = setup.model.require("thinker").embed_tokens.weight[: len(processor.tokenizer)]
    return {"embeddings": embeddings, "blank": ids[0]}


def _with_options(make: Callable[..., Any], options: dict[str, Any], known: tuple[str, ...]) -> Any:
    """`make(**options)`; ValueError for an option that it does not have."""
    for name in options:
        if name not in known:
            hint = nearest(name, known) if known else "this objective has no options"
            raise ValueError(f"unknown key 'objective.{name}', or one without effect here; {hint}")
    return make(**options)


OBJECTIVES: dict[str, Callable[[Setup], Stage]] = {
    "thinker": partial(_supervised, text=True, speech=False),
    "talker": partial(_supervised, text=False, speech=True),
    "joint": partial(_supervised, text=True, speech=True),
    "dpo": _dpo,
    "distillation": _distillation,
    "gspo": _gspo,
    "codec": _codec,
    "flow_matching": _flow_matching,
    "transcription": _transcription,
}
# what learns is not the model but a module made around a part of it
OWN_MODULE = ("codec", "flow_matching", "transcription")
