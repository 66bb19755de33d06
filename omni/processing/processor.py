"""OmniProcessor: conversations with text, audio, images and video -> `OmniInputs`; ids -> text.

Segments decide how many placeholders a medium takes and in which order (`omni.rope.positions`), for the prompt here and
for the positions in the model alike. Every medium is processed alone, so what shares its batch changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni.config.keywords import check_flags, names_keywords
from omni.config.writing import atomic_folder
from omni.encoders.checks import chosen_chunk
from omni.encoders.mel import LogMel
from omni.processing.audio_file import join_clips, load_audio
from omni.processing.call_options import CallOptions, usable
from omni.processing.files import ProcessorFiles, build_tokenizer, choose_templates, load_files
from omni.processing.inputs import OmniInputs, clip
from omni.processing.media_budget import DEFAULT_BUDGET, MediaBudget
from omni.processing.messages import Medium, located, read_conversation, split_batch
from omni.processing.sources import describe, is_source
from omni.processing.template import ChatTokenizer, built_in_template
from omni.processing.token_budget import TokenBudget
from omni.processing.tool_turns import ToolTurns
from omni.processing.video_file import DEFAULT_FPS
from omni.processing.vision import VisionProcessor
from omni.rope.positions import Audio, AudioVideo, Image, MediaTokens, Segment, Video, placeholder_ids


@dataclass
class _Batch:
    """Features of a batch's media in prompt order, collected row by row. chunk_frames: of sound, None for the own."""

    chunk_frames: int | None = None
    mels: list[Tensor] = field(default_factory=list)
    image_pixels: list[Tensor] = field(default_factory=list)
    image_grids: list[list[int]] = field(default_factory=list)
    video_pixels: list[Tensor] = field(default_factory=list)
    video_grids: list[list[int]] = field(default_factory=list)
    video_times: list[Tensor] = field(default_factory=list)
    video_seconds: list[float] = field(default_factory=list)


class OmniProcessor:
    """Everything between a conversation and the model's inputs.

    Attributes: `tokenizer` (transformers), `chat` (template and safe tokenisation), `vision`, `log_mel`,
    `position_rule` (order and positions of media), `speech_system` (the system text that the family's speech needs, or
    None), `media_budget` (what one medium may cost while it is decoded, where a call says nothing else).
    """

    def __init__(self, tokenizer: Any, files: ProcessorFiles) -> None:
        self.tokenizer = tokenizer
        self.files = files
        usual, tools = files.chat_template, files.tool_template
        if usual is None and tokenizer.chat_template:
            usual, tools = choose_templates(tokenizer.chat_template, f"the tokenizer of {files.folder}")
        family = files.family
        self.chat = ChatTokenizer(tokenizer, usual or built_in_template(family.tokens))
        self.tool_chat = self.chat if tools is None else ChatTokenizer(tokenizer, tools)
        self._tool_turns = ToolTurns(self.chat, self.tool_chat, family.tokens)
        self.vision = VisionProcessor(files.image_settings, files.video_settings, family.frame_pixels)
        audio = files.audio_settings
        self.log_mel = LogMel(
            sample_rate=audio.get("sampling_rate", 16000),
            n_fft=audio.get("n_fft", 400),
            hop_length=audio.get("hop_length", 160),
            num_mels=audio.get("feature_size", 128),
            chunk_frames=2 * files.n_window,
            end=family.clip_end,
        )
        own = self.log_mel.chunk_frames
        self.audio_tokens: Callable[..., int] = family.token_counter(own)
        self.chunk_frames: Callable[[float], int] = partial(chosen_chunk, own_frames=own, step_frames=family.chunk_step)
        self.position_rule = files.position_rule
        self.speech_system = family.speech_system
        self.media_budget = DEFAULT_BUDGET
        self._warned = False
        self.tokens = MediaTokens(
            audio=self._token_id("audio_token"),
            image=self._token_id("image_token"),
            video=self._token_id("video_token"),
            audio_start=self._token_id("audio_bos_token"),
            vision_start=self._token_id("vision_bos_token"),
        )
        self.audio_end_id = self._token_id("audio_eos_token")
        self.vision_end_id = self._token_id("vision_eos_token")

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> OmniProcessor:
        """Load from a checkpoint folder or a Hub id; both released and transformers 5 layouts are read.

        Raises FileNotFoundError naming the missing files, ValueError for malformed ones, OSError for the Hub.
        """
        files = load_files(
            folder_or_hub_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return cls(build_tokenizer(files.folder), files)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer, template and preprocessor files, which transformers and `from_pretrained` read.

        All or none of them are written. Raises OSError.
        """
        with atomic_folder(folder) as fresh:
            self.tokenizer.save_pretrained(str(fresh))
            self.files.save(fresh, self.chat.template, None if self.tool_chat is self.chat else self.tool_chat.template)

    @names_keywords
    def __call__(
        self,
        messages: Any,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        enable_thinking: bool | None = None,
        control_tokens: bool = False,
        allow_long: bool = False,
        use_audio_in_video: bool | None = None,
        fps: float | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        total_pixels: int | None = None,
        max_frames: int | None = None,
        mel_level: str = "clip",
        audio_chunk_s: float | None = None,
        audio_window_s: float | None = None,
        device: torch.device | str | None = None,
        media_budget: MediaBudget | None = None,
    ) -> OmniInputs:
        """One conversation -> a batch of 1; a list of conversations -> a left-padded batch.

        A conversation is a list of messages `{"role", "content"}`; content is a string or a list of items such as
        `{"type": "audio", "audio": path, address, bytes or array}` (also image, video and the OpenAI spellings).

        Args:
            add_generation_prompt: end with the header of the assistant's reply.
            continue_final_message: end with the text of the last message, which is the assistant's, for the model to go
                on from there; `OmniInputs.reply_start` tells where the reply begins.
            tools: JSON schemas or documented functions, for the template.
            enable_thinking: passed to the template when set; False asks for a reply without reasoning.
            control_tokens: special tokens and the markup of reasoning and tool calls become their ids where messages
                hold them; by default they are text, and other added tokens become their ids.
            allow_long: warn where a conversation has more tokens than the model has positions, instead of refusing it
                (without config.json: more than `omni.processing.token_budget.USUAL_POSITIONS`).
            use_audio_in_video: True uses the sound of every video that has one; an item may set it for itself, and True
                there needs a sound.
            fps: frames taken from each second of a video file (default 2), and the rate of frame lists and arrays.
            min_pixels, max_pixels: size limits for every image and video frame.
            total_pixels: most pixels of one video, each temporal patch's frames counted once; long videos get smaller
                frames (default: 128000 * 0.9 tokens, Qwen's own recipe: 117964800 pixels where a token has 32 x 32).
            max_frames: most frames taken from one video (default 768).
            mel_level: the reference level of the log-mel features: "clip" takes each clip's loudest value, "causal" the
                loudest up to the end of each chunk (a second), as sessions do.
            audio_chunk_s, audio_window_s: chunks into which the audio encoder is to cut sound, and its attention window
                (None: the checkpoint's), as in `StreamingConfig`; `OmniInputs` take them to the model.
            device: where features are computed from decoded sound and pictures, and where the inputs lie (None: CPU).
            media_budget: what one medium may cost while it is decoded (None: the attribute `media_budget`).

        Raises ValueError, TypeError, FileNotFoundError or OSError naming the message or medium and the remedy.
        """
        check_flags(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            allow_long=allow_long,
        )
        options = CallOptions(
            use_audio_in_video,
            fps,
            min_pixels,
            max_pixels,
            total_pixels,
            max_frames,
            mel_level,
            audio_chunk_s,
            audio_window_s,
            usable(device),
            self.media_budget if media_budget is None else media_budget,
        )
        template_options: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final": continue_final_message,
            "control_tokens": control_tokens,
        }
        if enable_thinking is not None:
            template_options["enable_thinking"] = enable_thinking
        batch = _Batch(None if audio_chunk_s is None else self.chunk_frames(audio_chunk_s))
        rows = []
        given = split_batch(messages)
        for number, row in enumerate(given):
            with located(f"conversation {number}" if len(given) > 1 else ""):
                conversation = read_conversation(row)
                first = conversation.messages[0]
                self.check_speech_system(first["content"] if first["role"] == "system" else None)
                chat = self.tool_chat if isinstance(tools, Sequence) and tools else self.chat
                budget = TokenBudget(self.files.positions, allow_long)
                check = partial(budget.check_text, encode=partial(self.encode_text, control_tokens=True))
                ids = chat.encode_chat(conversation.messages, tools, check=check, **template_options)
                budget.spend(len(ids), "text")
                rows.append(self._expand(ids, conversation.media, options, batch, budget))
        inputs = self._pack(rows, batch, options)
        if continue_final_message:
            width = inputs.input_ids.shape[1]
            inputs.reply_start = torch.tensor([width - len(row) + self.chat.reply_start(row) for row in rows])
        return inputs.to(options.device)

    def begin_reply(self, text: str = "") -> tuple[list[int], list[int]]:
        """Ids that open the assistant's turn, and those that begin its reply, which a model is to go on with.

        A reply begins with `text`; without one with what the chat template gives every reply, such as `<think>`. Both
        lists are empty where the template opens no turn for a reply.
        """
        messages = [{"role": "user", "content": ""}]
        if text:
            messages.append({"role": "assistant", "content": text})
        ids = self.chat.encode_chat(messages, add_generation_prompt=not text, continue_final=bool(text))
        opens = self.chat.added_ids.get("<|im_start|>")
        begin = len(ids) - 1 - ids[::-1].index(opens) if opens in ids else len(ids)  # type: ignore[arg-type]
        if not text and not self.decode(ids[begin + 1 :], skip_special_tokens=False).startswith("assistant"):
            return [], []
        start = self.chat.reply_start(ids)
        return ids[begin:start], ids[start:]

    def check_speech_system(self, system: Any) -> None:
        """Warn once where a conversation does not begin with the system text that the family's speech needs.

        system: the conversation's system message, None without one.
        """
        if self._warned or self.speech_system in (None, system):
            return
        self._warned = True
        warnings.warn(
            "the conversation does not begin with the system message that this model was taught to speak with, so its "
            "speech may fail (its text does not): begin with {'role': 'system', 'content': processor.speech_system}",
            stacklevel=4,
        )

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        """Text of one row of ids; invalid bytes become U+FFFD, control tokens are left out unless asked for."""
        row = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if row and isinstance(row[0], (list, tuple, Tensor)):
            raise ValueError(f"decode takes one row of ids, got {len(row)} rows; decode them one by one")
        return self.tokenizer.decode(row, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def encode_text(self, text: str, control_tokens: bool = False) -> list[int]:
        """Ids of a text. Added tokens in it become their ids; those that control the chat only if `control_tokens`."""
        return self.chat.encode_text(text, control_tokens)

    def beginning_ids(self, system: str | None, turn_start_id: int, tools: Sequence[Any] | None = None) -> list[int]:
        """What the chat template writes before the first user's turn, which begins with `turn_start_id`.

        system: text of the system message, None without one. tools: JSON schemas or documented functions, which the
        template for tools describes (the built-in one where the checkpoint has none). Raises ValueError or TypeError.
        """
        return self._tool_turns.beginning(system, turn_start_id, tools)

    def tool_results_ids(self, outputs: Sequence[str]) -> list[int]:
        """Ids of the whole turn, its closing line break included, that holds the texts of consecutive tool messages."""
        return self._tool_turns.results(outputs)

    def assistant_ids(self, content: str, tool_calls: Sequence[Any]) -> list[int]:
        """Ids of an assistant's message between its header and `<|im_end|>`; calls are dicts with name and arguments (a
        dict, or JSON text, which is kept as it is)."""
        return self._tool_turns.assistant(content, tool_calls)

    @property
    def think_token_ids(self) -> tuple[int, int] | None:
        """Ids of `<think>` and `</think>`, which enclose a reply's reasoning, if the tokenizer has them."""
        added = self.chat.added_ids
        return (added["<think>"], added["</think>"]) if "<think>" in added and "</think>" in added else None

    def _token_id(self, name: str) -> int:
        token = str(getattr(self.tokenizer, name, None) or self.files.family.tokens[name])
        if token not in self.chat.added_ids:
            raise ValueError(
                f"the tokenizer has no {name} {token!r}; these are not the files of an Omni checkpoint "
                f"({self.files.family.processor_class})"
            )
        return self.chat.added_ids[token]

    def _expand(
        self, ids: list[int], media: list[Medium], options: CallOptions, batch: _Batch, budget: TokenBudget
    ) -> list[int]:
        """Replace each placeholder of the template by its medium's tokens; features go to `batch`."""
        kinds = {self.tokens.audio: "audio", self.tokens.image: "image", self.tokens.video: "video"}
        queues = {kind: iter([item for item in media if item.kind == kind]) for kind in kinds.values()}
        written = [kinds[token] for token in ids if token in kinds]
        for kind in queues:
            given = sum(item.kind == kind for item in media)
            if given != written.count(kind):
                raise ValueError(
                    f"the chat template wrote {written.count(kind)} {kind} placeholder(s) for {given} {kind} item(s); "
                    f"it may not support {kind} in this role"
                )
        expanded: list[int] = []
        for token in ids:
            if token in kinds:
                medium = next(queues[kinds[token]])
                with located(medium.where):
                    expanded.extend(self._medium_ids(medium, options, batch, budget))
            else:
                expanded.append(token)
        return expanded

    def _medium_ids(self, medium: Medium, options: CallOptions, batch: _Batch, budget: TokenBudget) -> list[int]:
        """Process one medium and return the ids that stand for it; its tokens are counted before they are made."""
        merge, name = self.vision.merge_size, f"{medium.kind} {describe(medium.source)}"
        check = partial(budget.check, name=name)
        segment: Segment
        if medium.kind == "audio":
            own = medium.options
            part = own.get("audio_start", 0.0), own.get("audio_end")
            rate = own.get("sampling_rate")
            samples = load_audio(medium.source, rate, options.device, options.media_budget, *part)
            tokens = partial(self._clip_tokens, chunk_frames=batch.chunk_frames)
            if tokens(samples.numel()) == 0:
                least = next((n for n in range(1, self.log_mel.sample_rate) if tokens(n)), None)
                if least is None:
                    raise ValueError("the audio encoder's num_tokens gives no token for any clip of up to a second")
                raise ValueError(
                    f"audio {describe(medium.source)} is too short: {samples.numel()} samples at 16 kHz; at least "
                    f"{least} ({1000 * least / self.log_mel.sample_rate:.3g} ms) are needed"
                )
            check(tokens(samples.numel()))
            segment = self._add_clip(samples, options, batch)
        elif medium.kind == "image":
            limits = options.budget(medium.options)
            pixels, grid = self.vision.image(medium.source, limits, options.device, options.media_budget, check)
            batch.image_pixels.append(pixels)
            batch.image_grids.append(grid)
            segment = Image(grid[1] // merge, grid[2] // merge)
        else:
            segment = self._add_video(medium, options, batch, check)
        ids = placeholder_ids(segment, self.tokens, self.position_rule)
        budget.spend(len(ids), name)
        return [self.tokens.audio_start, *ids, self.audio_end_id] if isinstance(segment, AudioVideo) else ids

    def _clip_tokens(self, samples: int, chunk_frames: int | None) -> int:
        """Audio tokens of a clip; none for what is shorter than one mel frame."""
        frames = self.log_mel.num_frames(samples)
        return 0 if samples < self.log_mel.hop_length else clip(self.audio_tokens, frames, chunk_frames).length

    def _add_clip(self, samples: Tensor, options: CallOptions, batch: _Batch) -> Audio:
        mel = self.log_mel.in_chunks(batch.chunk_frames)(samples.to(options.device), options.mel_level)
        batch.mels.append(mel)
        return clip(self.audio_tokens, mel.shape[1], batch.chunk_frames, self.log_mel.chunk_frames)

    def _add_video(
        self, medium: Medium, options: CallOptions, batch: _Batch, check: Callable[[int], None]
    ) -> Video | AudioVideo:
        own = medium.options.get("use_audio_in_video")
        if own is not None and not isinstance(own, bool):
            raise TypeError(f"use_audio_in_video of a video item must be True or False, got {own!r}")
        want_sound = bool(options.use_audio_in_video) if own is None else own
        if "nframes" in medium.options and "fps" in medium.options and is_source(medium.source):
            raise ValueError("a video item has nframes or fps, not both: each says how many frames are taken")
        settings = {"fps": options.fps, "max_frames": options.max_frames, **medium.options}
        budget = options.budget(medium.options)
        film = self.vision.video(
            medium.source, settings, budget, want_sound, options.device, options.media_budget, check
        )
        batch.video_pixels.append(film.pixels)
        batch.video_grids.append(film.grid)
        batch.video_times.append(torch.tensor(film.grid_times_s, dtype=torch.float64))
        steps = len(film.grid_times_s) - 1
        fallback = self.vision.temporal_patch_size / (settings["fps"] or DEFAULT_FPS)
        span = film.grid_times_s[-1] - film.grid_times_s[0]
        batch.video_seconds.append(span / steps if span > 0 else fallback)
        merge = self.vision.merge_size
        video = Video(tuple(film.grid_times_s), film.grid[1] // merge, film.grid[2] // merge)
        if film.sound is None or self._clip_tokens(film.sound.numel(), batch.chunk_frames) == 0:
            if own:
                raise ValueError(f"video {film.name} has no sound, but use_audio_in_video is set for it; leave it out")
            return video
        return AudioVideo(video, self._add_clip(film.sound, options, batch))

    def _pack(self, rows: list[list[int]], batch: _Batch, options: CallOptions) -> OmniInputs:
        """Rows padded on the left, and the media side by side."""
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(rows), width), 0 if pad is None else pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, width - len(tokens) :] = torch.tensor(tokens, dtype=torch.int64)
            mask[row, width - len(tokens) :] = 1
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if batch.mels:
            inputs["input_features"], inputs["feature_attention_mask"] = join_clips(batch.mels)
            inputs |= {"audio_chunk_s": options.audio_chunk_s, "audio_window_s": options.audio_window_s}
        if batch.image_grids:
            inputs["pixel_values"] = _join(batch.image_pixels)
            inputs["image_grid_thw"] = torch.tensor(batch.image_grids)
        if batch.video_grids:
            inputs["pixel_values_videos"] = _join(batch.video_pixels)
            inputs["video_grid_thw"] = torch.tensor(batch.video_grids)
            inputs["video_second_per_grid"] = torch.tensor(batch.video_seconds)
            inputs["video_grid_times"] = batch.video_times
        return OmniInputs(**inputs)


def _join(pixels: Sequence[Tensor]) -> Tensor:
    """Patches of several media, one after the other; those of a single one are not copied."""
    return pixels[0] if len(pixels) == 1 else torch.cat(list(pixels))
