"""Flow matching as a stage: the diffusion transformer of Token2Wav learns to turn codes and a voice into a mel.

    flow   mean squared error of the velocity over mel frames (`omni.training.objectives.flow_matching`)

A row names a recording, its speaker, and its codes or a codec that makes them:

    {"audio": "a.wav", "speaker": "ann", "codes": [[…]], "speaker_embedding": […]}

The voice comes from another recording of the same speaker, drawn anew each time, so that the model cannot find in it
what is said (Qwen2.5-Omni, section 3.3: timbre disentangling). Its `speaker_embedding` (a list, or a .safetensors file
with one tensor) is that recording's; without one it is that of the model's voice of this name, else zeros.

Shapes: B rows, T codes, N = repeats * T mel frames, R frames of the reference mel, M mel bins, E speaker embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from omni.code2wav.token2wav import Token2Wav
from omni.code2wav.voices import Voice
from omni.training.data.conversation_samples import SkipRow, read_codes
from omni.training.data.mixture import Draw, Mixture, random_number
from omni.training.data.recordings import DrawnBatches, sounds_of
from omni.training.data.sound import read_speech
from omni.training.objectives.flow_matching import DROP_RATE, FlowBatch, FlowDraw, draw_flow, flow_matching_loss
from omni.training.objectives.losses import Loss
from omni.training.objectives.voice_mel import VoiceMel

_KEYS = ("audio", "speech")
_WHERE, _WHO, _FROM = 5, 6, 7  # what a random number is for, beside those of `omni.training.data.recordings`


@dataclass(frozen=True)
class FlowItem:
    """One crop: codes int64 [T], mel [N, M]; speaker [E] and reference_mel [R, M] of another recording. note: what of
    the recording is not in it."""

    codes: Tensor
    mel: Tensor
    speaker: Tensor
    reference_mel: Tensor
    note: ClassVar[str] = ""


class PartItem(FlowItem):
    """A crop of a recording that is longer."""

    note: ClassVar[str] = "a crop of a longer recording"


@dataclass(frozen=True)
class FlowWork:
    """A batch, and what chance has decided for it (None before `FlowObjective.prepare`)."""

    batch: FlowBatch
    draw: FlowDraw | None = None

    @property
    def tokens(self) -> int:
        """Codes of all rows."""
        lengths = self.batch.lengths
        return self.batch.codes.numel() if lengths is None else int(lengths.sum())


def join_items(items: Sequence[FlowItem], repeats: int) -> FlowWork:
    """Crops side by side, the shorter ones padded."""
    longest = max(len(item.codes) for item in items)
    batch = FlowBatch(
        torch.stack([F.pad(item.mel, (0, 0, 0, repeats * longest - len(item.mel))) for item in items]),
        torch.stack([F.pad(item.codes, (0, longest - len(item.codes))) for item in items]),
        torch.stack([item.speaker for item in items]),
        torch.stack([item.reference_mel for item in items]),
        torch.tensor([len(item.codes) for item in items]),
    )
    return FlowWork(batch)


def speakers_of(mixture: Mixture) -> dict[str, list[Draw]]:
    """The rows of each speaker in all manifests. Rows that cannot be read are left to be named when they are drawn."""
    found: dict[str, list[Draw]] = {}
    rows = (Draw(manifest, row) for manifest in mixture.manifests for row in range(len(manifest)))
    for draw in tqdm(rows, "speakers", len(mixture), unit="row", delay=2, leave=False):
        try:
            raw = draw.manifest.raw(draw.row)
        except (ValueError, OSError):
            continue
        if isinstance(raw.get("speaker"), str) and (mixture.keep is None or mixture.keep(raw)):
            found.setdefault(raw["speaker"].lower(), []).append(draw)
    return found


class FlowMaker:
    """Makes the crop of a row, and draws the recording that its voice comes from.

    voices: the model's, for rows without an embedding. codes: encodes a recording to int64 [1, T]; None: rows hold
    codes. crop_s: longest crop in seconds; reference_s: length of the reference, of which a shorter recording is
    repeated.
    """

    def __init__(
        self,
        code2wav: Token2Wav,
        speakers: Mapping[str, Sequence[Draw]],
        *,
        voices: Mapping[str, Voice] | None = None,
        codes: Callable[[Any], Tensor] | None = None,
        crop_s: float = 4.0,
        reference_s: float = 3.0,
        n_fft: int = 1024,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        """Raises ValueError for crops or references without a frame."""
        sizes = code2wav.config.dit_config
        self.mel = VoiceMel(sizes.mel_dim, code2wav.bigvgan.hop_length, code2wav.sample_rate, n_fft)
        self.repeats, self.width, self.limit = sizes.repeats, sizes.enc_emb_dim, sizes.num_embeds
        self.crop = int(crop_s * code2wav.frame_rate)
        self.reference = int(reference_s * code2wav.sample_rate / self.mel.hop_length)
        if self.crop < 1 or self.reference < 1:
            raise ValueError(f"crop_s {crop_s} and reference_s {reference_s} must each last a frame")
        self.speakers, self.codes, self.seed, self.rank = speakers, codes, seed, rank
        self.voices = {name.lower(): voice for name, voice in (voices or {}).items()}

    def __call__(self, draw: Draw, number: int) -> FlowItem:
        """The crop of draw `number`. Raises ValueError, TypeError or OSError for a bad row, SkipRow for a speaker with
        a single recording."""
        raw = draw.manifest.raw(draw.row)
        speaker = raw.get("speaker")
        if not isinstance(speaker, str) or not speaker:
            raise ValueError("the row names no speaker, so it has no voice; give it one under the key 'speaker'")
        others = [other for other in self.speakers.get(speaker.lower(), ()) if other != draw]
        if not others:
            kind = "it is the only recording of its speaker"
            raise SkipRow(f"it is the only recording of {speaker!r}, whose voice must come from another one", kind)
        sound = _recording(draw)
        mel, codes = self.mel(read_speech(sound, self.mel.sample_rate)), self._codes(raw, draw, sound)
        length = min(len(codes), len(mel) // self.repeats)
        if not length:
            raise ValueError("the recording is shorter than one code")
        if abs(len(codes) - len(mel) // self.repeats) > self._slack(len(codes)):
            raise ValueError(
                f"{len(codes)} codes do not belong to a recording of {len(mel)} mel frames, which has "
                f"{len(mel) // self.repeats}; use the codec that the model decodes"
            )
        start = self._random(number, _WHERE) % (length - min(length, self.crop) + 1)
        count = min(length - start, self.crop)
        other = others[self._random(number, _WHO) % len(others)]
        voice_mel = self.mel(read_speech(_recording(other), self.mel.sample_rate))
        return (FlowItem if count == length else PartItem)(
            codes[start : start + count].clone(),
            mel[start * self.repeats : (start + count) * self.repeats].clone(),
            self._embedding(other, speaker),
            self._cut_reference(voice_mel, number),
        )

    @staticmethod
    def _slack(codes: int) -> int:
        """Codes by which encoders may differ at a recording's end."""
        return 2 + codes // 100

    def _random(self, number: int, use: int) -> int:
        return random_number(self.seed, self.rank, number, use)

    def _codes(self, raw: Mapping[str, Any], draw: Draw, sound: Any) -> Tensor:
        given = raw.get("codes")
        if given is not None:
            codes = read_codes(draw.manifest.store.locate(draw.row)(given) if isinstance(given, str) else given)
        elif self.codes is not None:
            codes = self.codes(sound)
        else:
            raise ValueError("the row has no codes and there is no codec; write them into it, or name data.codec")
        if codes.dim() != 2 or len(codes) != 1 or codes.is_floating_point():
            raise ValueError(f"codes must be integers [1, n], got {codes.dtype} {list(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) <= self.limit:
            raise ValueError(f"codes {int(codes.min())} .. {int(codes.max())} do not lie in 0..{self.limit}")
        return codes[0].long()

    def _embedding(self, draw: Draw, speaker: str) -> Tensor:
        """fp32 [E] of the recording that the voice comes from."""
        given = draw.manifest.raw(draw.row).get("speaker_embedding")
        if given is None:
            voice = self.voices.get(speaker.lower())
            return torch.zeros(self.width) if voice is None else voice.cond[0]
        value = read_codes(draw.manifest.store.locate(draw.row)(given) if isinstance(given, str) else given)
        value = value.float().flatten()
        if value.shape != (self.width,) or not bool(torch.isfinite(value).all()):
            raise ValueError(f"speaker_embedding of {draw.name} must be {self.width} numbers, got {list(value.shape)}")
        return value

    def _cut_reference(self, mel: Tensor, number: int) -> Tensor:
        """[R, M] from a random place of a recording's mel."""
        start = self._random(number, _FROM) % (max(0, len(mel) - self.reference) + 1)
        repeats = -(-self.reference // len(mel))
        return mel[start:].repeat(repeats, 1)[: self.reference] if start == 0 else mel[start : start + self.reference]


def _recording(draw: Draw) -> Any:
    sounds = sounds_of(draw, _KEYS)
    if len(sounds) != 1:
        raise ValueError(f"the row must name one recording under one of {', '.join(_KEYS)}, it names {len(sounds)}")
    return sounds[0]


def flow_batches(
    mixture: Mixture, make: FlowMaker, *, batch_size: int = 16, skip_limit: int = 100, workers: int = 0
) -> DrawnBatches[FlowItem, FlowWork]:
    """Endless batches of crops, see `FlowMaker` and `DrawnBatches`."""

    def join(items: list[FlowItem]) -> FlowWork:
        return join_items(items, make.repeats)

    return DrawnBatches(mixture, make, join, batch_size=batch_size, skip_limit=skip_limit, workers=workers)


class FlowObjective:
    """Trains a DiT; the trainer's model is any module with a `dit`. drop_rate: of rows without a condition.

    It computes in fp32 whatever the run's precision, as Token2Wav does. Noise and times come from torch's generator,
    which a checkpoint keeps.
    """

    def __init__(self, given: Mapping[str, float] | None = None, *, drop_rate: float = DROP_RATE) -> None:
        """Raises ValueError for a weight of a loss that is not there, and a rate outside 0 .. 1."""
        unknown = sorted(set(given or {}) - {"flow"})
        if unknown:
            raise ValueError(f"[loss] has {unknown}, but this objective's losses are ['flow']")
        if not 0 <= drop_rate <= 1:
            raise ValueError(f"drop_rate {drop_rate} must lie in 0 .. 1")
        self.weights, self.drop_rate = {"flow": 1.0, **(given or {})}, drop_rate

    def prepare(self, model: Any, work: FlowWork) -> FlowWork:
        """Bring a batch to the model's device and draw its times, noise and dropped rows."""
        batch = to_device(work.batch, model.dit.input_proj.weight.device)
        return FlowWork(batch, draw_flow(batch.mel, drop_rate=self.drop_rate))

    def counts(self, work: FlowWork) -> dict[str, float]:
        """Codes."""
        return {"flow": float(work.tokens)}

    def losses(self, model: Any, work: FlowWork) -> dict[str, Loss]:
        """The mean over all frames, as a sum over codes."""
        assert work.draw is not None, "prepare comes first"
        with torch.autocast(work.batch.mel.device.type, enabled=False):
            mean = flow_matching_loss(model.dit, work.batch, work.draw)
        return {"flow": Loss(mean * work.tokens, mean.new_tensor(float(work.tokens)).detach())}


def to_device(batch: FlowBatch, device: torch.device) -> FlowBatch:
    """The same on a device."""
    return replace(batch, **{k: v.to(device) for k, v in vars(batch).items() if v is not None})


@torch.no_grad()
def evaluate_flow(module: nn.Module, works: Iterable[FlowWork]) -> dict[str, float]:
    """ "flow" over held batches, always with the same times and noise, no row without its condition."""
    dit: Any = module.dit
    total = codes = 0.0
    for number, work in enumerate(works):
        draw = draw_flow(work.batch.mel, torch.Generator().manual_seed(number), drop_rate=0.0)
        device = dit.input_proj.weight.device
        moved = FlowDraw(*(value.to(device) for value in vars(draw).values()))
        with torch.autocast(device.type, enabled=False):
            total += float(flow_matching_loss(dit, to_device(work.batch, device), moved)) * work.tokens
        codes += work.tokens
    return {"flow": total / codes}
