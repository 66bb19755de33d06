"""OmniModel: encoders, Thinker, Talker and codec decoder as one module that loads, answers, speaks and saves."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from omni.checkpoint.keys import KeyTable
from omni.checkpoint.load import LoadReport, load_weights
from omni.checkpoint.refusals import check_counts
from omni.checkpoint.save import save_weights
from omni.checkpoint.shards import tensor_files
from omni.code2wav.voices import Voice, find_voices, save_voice_files
from omni.config.keywords import check_flags, names_keywords
from omni.config.locate import locate
from omni.config.model import OmniConfig
from omni.config.reading import warn_user
from omni.config.writing import atomic_folder
from omni.generation import generate as generation
from omni.generation.compilation import compile_steps
from omni.generation.events import Event
from omni.generation.generation_config import read_generation_config
from omni.generation.output import OmniOutput
from omni.generation.prompt import encode_prompt
from omni.generation.steps import Steps
from omni.generation.streaming_config import StreamingConfig
from omni.layers.init import MetaBuild
from omni.layers.quantized import DEFAULT_PARTS
from omni.layers.quantized import quantize as pack_weights
from omni.parts import CHILDREN, PARTS, ModelParts, check_parts
from omni.processing.files import build_tokenizer, load_files
from omni.processing.inputs import OmniInputs
from omni.processing.processor import OmniProcessor
from omni.thinker.thinker import ThinkerOutput

if TYPE_CHECKING:
    from omni.generation.arguments import PerRow
    from omni.generation.text_options import Stop


class OmniModel(ModelParts):
    """A Thinker-Talker model (Qwen3-Omni technical report, section 2).

    Attributes: `audio_encoder`, `vision_encoder`, `thinker`, `talker`, `code2wav`, each None where the variant or
    `parts` leaves it out; `config`; `processor`, attached by `from_pretrained` where tokenizer files are;
    `generation_config`, the values of generation_config.json; `voices`, the recordings by name that some codec decoders
    need.

    `OmniModel(config)` draws random weights (reproducible under `torch.manual_seed`). A keyword replaces a part by
    a module of your own with the same contract: `audio_encoder=Mine(...)`, `code2wav=Mine(...)` and so on
    (`omni.parts.CONTRACTS`, docs/swapping.md).
    """

    load_report: LoadReport | None = None
    steps = Steps()  # how decoding steps are run; `compile` changes it

    @property
    def key_table(self) -> KeyTable:
        """How this family's files name the weights."""
        return KeyTable.of(self.config.family)

    def forward(  # type: ignore[override]
        self, inputs: OmniInputs, with_router_logits: bool = False, allow_long: bool = False
    ) -> ThinkerOutput:
        """One pass of the Thinker over whole prompts: logits [B, T, V] and hidden [B, T, D] as in `ThinkerOutput`.

        B rows of T tokens as in `inputs.input_ids`; entries at padding are zero. allow_long: warn of positions beyond
        the model's instead of refusing them. Differentiable.
        """
        inputs = _as_inputs(inputs)
        check_flags(with_router_logits=with_router_logits, allow_long=allow_long)
        prompt = encode_prompt(self, inputs, allow_long=allow_long)
        assert self.thinker is not None
        out = self.thinker(
            prompt.embeds,
            prompt.positions,
            taps=prompt.taps,
            lengths=prompt.lengths,
            with_router_logits=with_router_logits,
        )
        rows, width = inputs.input_ids.shape
        logits, hidden, *routers = (
            _to_columns(x, prompt.columns, prompt.lengths, width)
            for x in (out.logits, out.hidden, *(r.unflatten(0, (rows, -1)) for r in out.router_logits or ()))
        )
        return ThinkerOutput(logits, hidden, [r.flatten(0, 1) for r in routers] if with_router_logits else None)

    @names_keywords
    def generate(
        self,
        inputs: OmniInputs,
        max_new_tokens: int = 1024,
        text_sampling: PerRow = None,
        return_audio: bool | None = None,
        speaker: PerRow = None,
        max_frames: int = 4095,
        audio_sampling: PerRow = None,
        residual_sampling: PerRow = None,
        seed: PerRow = None,
        stop: Stop = None,
        logprobs: int | None = None,
        n: int = 1,
        min_new_tokens: PerRow = 0,
        logits_processor: PerRow = None,
        allow_long: bool = False,
        speak_prefill: bool = False,
    ) -> OmniOutput:
        """Answer a batch of prompts in text and, if the model can and `return_audio` is not False, in speech.

        max_new_tokens: reply ids at most; max_frames: frames of speech at most (80 ms each in the release, 20 ms in
        Qwen2.5-Omni's).
        text_sampling, audio_sampling (codebook 0), residual_sampling: `SamplingConfig` or a dict of its fields; None
        is what generation_config.json says, else the release's way. speaker: a name of the config, in any case; None is
        the checkpoint's default. seed: makes sampling reproducible; None draws one from torch's global generator.

        stop: a string or strings that end the answer (not a thought) where the first of them is complete; they are cut
        from text and sound. logprobs: report each token's log-probability, and so many of the likeliest ones, as the
        model has them before anything shapes what is drawn. n: answers to each prompt, which is read once; the rows of
        a prompt follow each other, and answer j is drawn with its seed + j. min_new_tokens: ids that come before one
        that ends the reply (0: as generation_config.json says). logits_processor: a function of the ids so far int64
        [n] and the logits fp32 [V] of the next one, which changes these in place or returns others; penalties and
        temperature come after it. allow_long: warn of positions beyond the model's instead of refusing a prompt and
        ending a reply there. speak_prefill: speak the beginning of the reply that the prompt holds, too.

        speaker, samplings, seed, min_new_tokens and logits_processor are one value or a list with one a prompt or one a
        row; stop may be a list of lists. Raises ValueError for impossible requests, and what logits_processor raises.
        """
        arguments = {name: value for name, value in locals().items() if name not in ("self", "inputs")}
        return generation.generate(self, _as_inputs(inputs), **arguments)

    @names_keywords
    def stream(
        self,
        inputs: OmniInputs,
        max_new_tokens: int = 1024,
        text_sampling: PerRow = None,
        return_audio: bool | None = None,
        speaker: PerRow = None,
        max_frames: int = 4095,
        audio_sampling: PerRow = None,
        residual_sampling: PerRow = None,
        seed: PerRow = None,
        stop: Stop = None,
        logprobs: int | None = None,
        n: int = 1,
        min_new_tokens: PerRow = 0,
        logits_processor: PerRow = None,
        allow_long: bool = False,
        speak_prefill: bool = False,
        streaming: StreamingConfig | None = None,
    ) -> Iterator[Event]:
        """As `generate`, but what it says comes as it happens: `TextDelta`, `AudioChunk` and one `TurnEnd` a row.

        The first sound follows the first word of the answer. The prompt is read and the arguments are checked by this
        call; the rest runs while the events are taken, and ends when the iterator is closed. `streaming` sets chunk
        sizes, how far text runs ahead of speech, and whether runaway speech is ended (None: it is not, as in
        `generate`; sessions do it by default). A codec decoder that draws sound by windows gives what its
        schedule of chunks gives, an approximation of `generate`'s sound (`streaming.codec_schedule`).
        """
        if not (streaming is None or isinstance(streaming, StreamingConfig)):
            raise TypeError(f"streaming must be a StreamingConfig or None, got {type(streaming).__name__}")
        arguments = {name: value for name, value in locals().items() if name not in ("self", "inputs")}
        return generation.stream(self, _as_inputs(inputs), **arguments)

    @names_keywords
    def speak(
        self,
        text: str | Sequence[str],
        speaker: PerRow = None,
        max_frames: int = 4095,
        audio_sampling: PerRow = None,
        residual_sampling: PerRow = None,
        seed: PerRow = None,
        control_tokens: bool = False,
    ) -> Any:
        """Speech for a given text: float32 [samples] on the CPU at `code2wav.sample_rate` (a list for a list of texts).

        A Talker that hears a reply by its token embeddings alone needs no Thinker's thoughts; the user's part is empty.
        For one that hears hidden states too, the Thinker reads the text as its own reply to an empty user's turn, after
        the system text that the family's speech needs. control_tokens: special tokens and markup in the text become
        their ids (by default they are text).
        """
        if not isinstance(text, (str, list, tuple)):
            raise TypeError(f"speak takes a text or a list of texts, got {type(text).__name__}")
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            return []
        waves = generation.speak(
            self,
            texts,
            control_tokens=control_tokens,
            speaker=speaker,
            max_frames=max_frames,
            audio_sampling=audio_sampling,
            residual_sampling=residual_sampling,
            seed=seed,
        )
        return waves[0] if isinstance(text, str) else waves

    @names_keywords
    def compile(self, mode: str | None = None, batch_sizes: int | Sequence[int] = 1) -> None:  # type: ignore[override]
        """Make decoding faster: the Thinker's step and the speech frame; ids and codes stay the same.

        mode: "inductor" compiles the steps with torch.compile (on a CPU the default); "graphs" captures them as CUDA
        graphs, a whole speech frame at once (on a GPU the default); "eager" goes back to running them as written.
        batch_sizes: numbers of rows to prepare now, with a progress bar; others are prepared when they first occur.
        torch keeps compiled kernels on disk, so the next process is quicker. Prompts are read as before. Compile again
        after moving the model or replacing a part. Raises ValueError for an unknown mode, or graphs without a GPU.
        """
        compile_steps(self, mode, [batch_sizes] if isinstance(batch_sizes, int) else batch_sizes)

    @names_keywords
    def quantize(self, kind: str, parts: Sequence[str] = DEFAULT_PARTS) -> None:
        """Round decoder weights to "int8", "int4" or "fp8" in place, for decoding only (no training, no saving).

        parts: some of "thinker", "talker", "mtp". Embeddings, norms, routers and heads stay as they are. Raises
        ValueError for an unknown kind or part.
        """
        pack_weights(self, kind, parts)

    @classmethod
    @names_keywords
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        device_map: Any = None,
        parts: Sequence[str] = PARTS,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        adapter: str | Path | None = None,
        strict: bool = True,
        offload_folder: str | Path | None = None,
        quantize: str | None = None,
    ) -> OmniModel:
        """Load a checkpoint in the Hub's layout from a folder or a Hub id.

        dtype: "auto" (as saved) or a torch dtype or its name; device: None is CUDA if present, else the CPU;
        device_map: modules to devices, or a strategy of accelerate's; each computes where its weights are, and those on
        "disk" stay in files of offload_folder, mapped into memory, for the CPU; parts:
        load less and read less; adapter: a PEFT LoRA folder, merged while loading; strict=False accepts missing tensors
        (drawn at random) and unexpected ones, and leaves the account in `load_report`; quantize: "int8", "int4" or
        "fp8", see `quantize` (it takes no device_map). Raises FileNotFoundError, OSError or ValueError, each with the
        remedy.
        """
        parts, everything = check_parts(parts), parts is PARTS
        if not isinstance(strict, bool):
            raise TypeError(f"strict must be True or False, got {strict!r}")
        folder = locate(
            folder_or_hub_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        config = _check_files(folder, OmniConfig.from_pretrained(folder), parts, everything)
        voices = {} if parts == ("thinker",) else find_voices(folder)
        config = _with_speakers(config, _speaker_ids(voices))
        try:
            with MetaBuild():
                model = cls(config, parts)
        except (RuntimeError, OverflowError, TypeError) as error:  # of sizes that no tensor can have
            reason = str(error).partition("\n")[0]
            raise ValueError(f"no model can be built from config.json in {folder}: {reason}") from error
        model.load_report = load_weights(
            model, folder, table=model.key_table, dtype=dtype, device=device, device_map=device_map, strict=strict,
            adapter=adapter, offload_folder=offload_folder, quantize=quantize,
            initialise=model._initialise_only, config_dtype=config.dtype,
        )  # fmt: skip
        resized = model.config is not config
        vocabulary = None if model.thinker is None else model.config.vocabulary
        model.generation_config = read_generation_config(folder, vocabulary)
        model.processor = _attached_processor(folder, Path(adapter) if adapter is not None and resized else None)
        model.config = _with_chat_ids(model.config, model.processor)
        model.voices = voices if model.code2wav is not None else {}
        return model.eval()

    @names_keywords
    def save_pretrained(
        self, folder: str | Path, max_shard_size: str | int = "5GB", experts: Literal["separate", "fused"] = "separate"
    ) -> None:
        """Write the checkpoint in the Hub's layout, atomically: an interrupted save leaves an old folder intact.

        experts: "separate" (one tensor an expert, as released) or "fused". A model loaded without its Talker is saved
        as a variant that answers in text.
        """
        config = self._config_to_save()
        if self.voices and config.talker_config and _speaker_ids(self.voices) == config.talker_config.speaker_id:
            config = _with_speakers(config, type(config.talker_config)().speaker_id)  # they are in the voices' files
        values = {**config.to_dict(), "dtype": str(self.dtype).removeprefix("torch.")}
        with atomic_folder(Path(folder)) as target:
            (target / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            if self.generation_config:
                text = json.dumps(self.generation_config, indent=2) + "\n"
                (target / "generation_config.json").write_text(text, encoding="utf-8")
            if self.processor is not None:
                self.processor.save_pretrained(target)
            save_voice_files(self.voices, target)
            save_weights(self, target, table=self.key_table, max_shard_size=max_shard_size, experts=experts)

    def _config_to_save(self) -> OmniConfig:
        """The config of what is loaded. Raises ValueError where that is not what a checkpoint can hold."""
        if self.config.thinker_config is None:
            for part in self.config.parts:
                self.require(part)
            return self.config
        self.require("thinker")
        if (self.talker is None) != (self.code2wav is None):
            raise ValueError("only one of talker and code2wav is loaded; load both, or neither, before saving")
        return self.config.replace(enable_audio_output=self.talker is not None)


def _check_files(folder: Path, config: OmniConfig, parts: Sequence[str], everything: bool) -> OmniConfig:
    """The config of what can be loaded, from the tensors' names alone. Raises ValueError for sizes without weights.

    everything: no parts were asked for. A config may describe a Talker that the files lack, as where a trainer saved
    the Thinker alone; the model then answers in text.
    """
    keys, there = tensor_files(folder), defaultdict[str, list[str]](list)
    table = KeyTable.of(config.family).for_files(keys)
    for key in keys:
        there[(table.from_hub(key) or "").partition(".")[0]].append(key)
    if everything and config.has_talker and "thinker" in there and not there.keys() & {"talker", "code2wav"}:
        warn_user(f"{folder} holds a Thinker alone: the model answers in text; parts=('thinker',) says so beforehand")
        config = config.replace(enable_audio_output=False)
    wanted = {*parts, *(CHILDREN[:2] if "thinker" in parts else ())}
    for name in wanted & config.parts.keys():
        check_counts(folder, name, config.parts[name], there.get(name, []))
    return config


def _speaker_ids(voices: dict[str, Voice]) -> dict[str, int]:
    """The speakers' ids that a checkpoint keeps beside their recordings."""
    return {name.lower(): voice.bos_token for name, voice in voices.items() if voice.bos_token is not None}


def _with_speakers(config: OmniConfig, ids: dict[str, int] | None) -> OmniConfig:
    talker = config.talker_config
    return config.replace(talker_config=talker.replace(speaker_id=ids)) if ids and talker is not None else config


def _with_chat_ids(config: OmniConfig, processor: OmniProcessor | None) -> OmniConfig:
    """The config with the chat's ids of the tokenizer, where config.json does not give them (a Thinker's own does not)
    and the family's usual ones lie outside the vocabulary."""
    if processor is None or config.thinker_config is None or config.im_end_token_id < config.vocabulary:
        return config
    ids = {name: processor.chat.added_ids.get(f"<|{name}|>") for name in ("im_start", "im_end")}
    for role in ("system", "user", "assistant"):
        written = processor.encode_text(role)
        ids[role] = written[0] if len(written) == 1 else None
    return config.replace(**{f"{name}_token_id": value for name, value in ids.items() if value is not None})


def _as_inputs(inputs: OmniInputs) -> OmniInputs:
    if isinstance(inputs, OmniInputs):
        return inputs
    if hasattr(inputs, "keys"):
        return OmniInputs(**inputs)  # what a transformers processor returned
    raise TypeError(f"expected OmniInputs (what OmniProcessor returns), got {type(inputs).__name__}")


def _to_columns(x: Tensor, columns: Tensor, lengths: list[int], width: int) -> Tensor:
    """Left-aligned rows x [B, T, C] back into the columns of the inputs [B, width, C], zero at padding."""
    valid = torch.arange(x.shape[1], device=x.device) < torch.tensor(lengths, device=x.device)[:, None]
    index = columns.to(x.device)[..., None].expand_as(x)
    return x.new_zeros(x.shape[0], width, x.shape[2]).scatter(1, index, x * valid[..., None])


def _attached_processor(folder: Path, adapter: Path | None = None) -> OmniProcessor | None:
    """The checkpoint's processor, or None where the folder holds no tokenizer.

    adapter: of a vocabulary of its own; if it holds a tokenizer, that one is taken.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
        return None
    if adapter is not None and (adapter / "tokenizer.json").is_file():
        return OmniProcessor(build_tokenizer(adapter), load_files(folder))
    return OmniProcessor.from_pretrained(folder)
