"""Codec training as objectives for the trainer: the whole codec, or Code2Wav alone on codes of another encoder.

    mel, stft, harmonic   distance of spectra of the decoded and the recorded wave; not computed at weight 0
    pitch, voicing, envelope   what a source and a filter are told                       (Code2Wav with a source_filter)
    commitment, codebook  the quantiser's two losses                                     (whole codec)
    adversarial, feature  what discriminators make of the decoded wave                   (with an adversary)
    discriminator, perplexity   only reported: the discriminators' own loss; codes in use, in effect

The trainer prepares all micro-batches of a step before it takes their losses. The first `prepare` of a step is where
codebooks start and dead codes restart, so nothing moves under a gradient. The discriminators learn in between: each
`prepare` adds their gradient on its micro-batch, and the step's first `losses` moves them, once, by the mean over all
micro-batches of all processes. This is the usual order, discriminators first, for the price of decoding once more.

Shapes: B rows, n samples, K codebooks of `size` codes, F frames, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from omni.code2wav.code2wav import Code2Wav
from omni.config.keywords import nearest
from omni.metrics.scores import mel_distance
from omni.training.codec.adversary import Adversary
from omni.training.codec.codec import (
    Codec,
    CodecOutput,
    CodeUsage,
    ResidualQuantiser,
    code_shares,
)
from omni.training.codec.codec_encoders import ENCODERS, CodecEncoder, ControlsEncoder, draw_weights
from omni.training.codec.codec_losses import (
    MEL_SCALES,
    harmonic_loss,
    multi_scale_mel_loss,
    multi_scale_stft_loss,
)
from omni.training.codec.decoding import TOLD, Decoded, decoded
from omni.training.data.recordings import Crops
from omni.training.objectives.losses import Loss
from omni.training.parallel.processes import process_count

SPECTRA = {"mel": 5.0, "stft": 1.0, "harmonic": 0.0}
QUANTISER = {"commitment": 0.25, "codebook": 1.0}
ADVERSARIAL = {"adversarial": 1.0, "feature": 2.0}  # Kong et al., 2020
_LATENTS_KEPT = 200  # batches


def make_codec(
    code2wav: Code2Wav, *, encoder: str = CodecEncoder.kind, width: int | None = None, fresh: bool = False
) -> Codec:
    """A codec to train around a model's Code2Wav, with a new encoder of random weights.

    encoder: "waves" (`CodecEncoder`) or "controls" (`ControlsEncoder`); width: theirs. fresh: Code2Wav is new too, and
    its weights are drawn for training from nothing (`draw_weights`). Raises ValueError for another encoder.
    """
    if encoder not in ENCODERS:
        raise ValueError(
            f"objective.encoder = {encoder!r} is none of {', '.join(ENCODERS)}; {nearest(encoder, ENCODERS)}"
        )
    if fresh:
        draw_weights(code2wav)
    made = ControlsEncoder(code2wav, width) if encoder == ControlsEncoder.kind else CodecEncoder(code2wav.config, width)
    return Codec(code2wav, made.to(code2wav.code_embedding.weight))


class WaveObjective(ABC):
    """What both objectives share: spectral and adversarial losses of decoded waves, and their place in a step."""

    def __init__(
        self,
        code2wav: Code2Wav,
        weights: Mapping[str, float],
        given: Mapping[str, float] | None,
        adversary: Adversary | None,
        start_adversarial_step: int,
        mel_scales: Sequence[Sequence[int]],
        floor_db: float,
    ) -> None:
        known = {**SPECTRA, **weights, **(ADVERSARIAL if adversary is not None else {})}
        known |= TOLD if code2wav.sounding is not None else {}
        for name in given or {}:
            if name not in known:
                hint = "pass an adversary for it" if name in ADVERSARIAL else nearest(name, known)
                raise ValueError(f"[loss] has {name!r}, which is none of this objective's losses; {hint}")
        weighted = {**known, **(given or {})}
        self.weights = {name: weight for name, weight in weighted.items() if weight or name not in SPECTRA}
        self.adversary, self.start_adversarial_step = adversary, start_adversarial_step
        self.sample_rate, self.device = code2wav.sample_rate, code2wav.code_embedding.weight.device
        self.mel_scales = [(int(window), int(bins)) for window, bins in mel_scales]
        self.floor = 10 ** (floor_db / 20)
        self.steps = 0  # that have begun
        self._preparing = False
        if adversary is not None:
            adversary.to(self.device)

    @property
    def heard(self) -> bool:
        """Whether any loss looks at the decoded wave in this step."""
        return self.judged or any(name in self.weights for name in SPECTRA)

    @property
    def judged(self) -> bool:
        """Whether the discriminators take part in this step."""
        return self.adversary is not None and self.steps > self.start_adversarial_step

    def prepare(self, model: Any, batch: Crops) -> Crops:
        """The batch on the model's device; what has to happen before a step, see above."""
        batch = batch.to(self.device)
        if not self._preparing:
            self._preparing = True
            self.steps += 1
            self.begin_step(model, batch)
        if self.adversary is not None and self.judged:
            self.adversary.collect(*self.compare(model, batch)[:2])
        return batch

    def losses(self, model: Any, batch: Crops) -> dict[str, Loss]:
        """All losses of one batch, gradients attached."""
        if self._preparing:
            self._preparing = False
            if self.adversary is not None and self.judged:
                self.adversary.update()
        wave, recorded, own = self.compare(model, batch)
        losses = dict(own)
        if "mel" in self.weights:
            losses["mel"] = multi_scale_mel_loss(wave, recorded, self.sample_rate, self.mel_scales, self.floor)
        if "stft" in self.weights:
            losses["stft"] = multi_scale_stft_loss(wave, recorded, floor=self.floor)
        if "harmonic" in self.weights:
            losses["harmonic"] = harmonic_loss(wave, recorded, self.sample_rate, floor=self.floor)
        if self.adversary is not None and self.judged:
            losses |= self.adversary.losses(wave, recorded)
        elif self.adversary is not None:
            rows = torch.tensor(float(len(wave)), device=wave.device)
            losses |= dict.fromkeys((*ADVERSARIAL, "discriminator"), Loss(torch.zeros_like(rows), rows))
        return losses

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model's parameters."""
        return {"steps": self.steps, "adversary": None if self.adversary is None else self.adversary.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` stands. Raises ValueError where one of them has discriminators and the other has none."""
        if (state["adversary"] is None) != (self.adversary is None):
            raise ValueError(
                "the checkpoint and this run are not both adversarial; resume with the same adversarial and feature "
                "weights, or begin a new run from the exported model"
            )
        if self.adversary is not None:
            self.adversary.load_state_dict(state["adversary"])
        self.steps, self._preparing = state["steps"], False

    @abstractmethod
    def begin_step(self, model: Any, batch: Crops) -> None:
        """Called once a step, without gradients, on its first batch."""

    @abstractmethod
    def counts(self, batch: Crops) -> dict[str, float]:
        """Items of each loss."""

    @abstractmethod
    def compare(self, model: Any, batch: Crops) -> tuple[Tensor, Tensor, dict[str, Loss]]:
        """Decoded and recorded waves [B, m], and further losses."""


class CodecObjective(WaveObjective):
    """Trains the parameters of a `Codec` that require gradients; the trainer's model is the codec.

    given: weights of losses other than the defaults above. adversary: takes part after `start_adversarial_step` steps.
    mel_scales: (window, mel bins) each. floor_db: level, relative to full scale, below which spectra count as silent.
    initialise: set the codebooks by k-means, on the first batch or those before `quantise_from`, in which Code2Wav
    reads latents as they are; False for a codec that is trained already.
    restart_every: steps between restarts of codes that fell out of use, 0 for none. Where the code table is frozen
    neither happens. seed: of both; of several processes the first one decides.
    It is saved with the run: `Trainer(also={"codec": objective})`.
    """

    def __init__(
        self,
        codec: Codec,
        given: Mapping[str, float] | None = None,
        *,
        adversary: Adversary | None = None,
        start_adversarial_step: int = 0,
        mel_scales: Sequence[Sequence[int]] = MEL_SCALES,
        floor_db: float = -100.0,
        initialise: bool = True,
        quantise_from: int = 0,
        restart_every: int = 100,
        restart_below: float = 0.05,
        usage_decay: float = 0.99,
        seed: int = 0,
    ) -> None:
        """Raises ValueError for a weight of a loss that is not there."""
        super().__init__(codec.code2wav, QUANTISER, given, adversary, start_adversarial_step, mel_scales, floor_db)
        self.hop_length, self.lookahead = codec.encoder.hop_length, codec.code2wav.lookahead
        self.restart_every, self.restart_below = restart_every, restart_below
        self.usage = CodeUsage.start(codec, usage_decay)
        self.generator = torch.Generator().manual_seed(seed)
        self._initialise, self.quantise_from = initialise, quantise_from if initialise else 0
        self._latents: list[Tensor] = []  # of the last batches before that, for the codebooks

    def counts(self, batch: Crops) -> dict[str, float]:
        """Rows, and frames for the quantiser's losses."""
        rows, samples = batch.waves.shape
        frames = rows * -(-samples // self.hop_length)
        return {name: float(frames if name in QUANTISER else rows) for name in self.weights}

    def begin_step(self, model: Codec, batch: Crops) -> None:
        """Start the codebooks, or give codes that are not used another place."""
        table = model.code2wav.code_embedding.weight
        if self.steps <= self.quantise_from:
            return
        first, due = self._initialise, self.restart_every and (self.steps - 1) % self.restart_every == 0
        self._initialise = False
        if not table.requires_grad or not (first or (due and self.steps > 1)):
            return
        if process_count() == 1 or dist.get_rank() == 0:
            latents = _spoken(model.encoder(batch.waves), batch.lengths, self.hop_length)
            if first:
                latents = torch.cat((*self._latents, latents), dim=2)
                self._latents = []
                model.quantiser.initialise_codebooks(latents, generator=self.generator)
            else:
                model.quantiser.restart_dead_codes(latents, self.usage, self.restart_below, self.generator)
        if process_count() > 1:
            dist.broadcast(table.detach(), src=0)

    def compare(self, model: Codec, batch: Crops) -> tuple[Tensor, Tensor, dict[str, Loss]]:
        """Waves through the codec and as they were; the silence behind a recording's end is coded like any sound."""
        quantised = self.steps > self.quantise_from
        out: CodecOutput = model(batch.waves, quantised=quantised, heard=self.heard)
        if out.wave.shape[1] == 0:
            raise ValueError(
                f"crops of {batch.waves.shape[1]} samples give none: {self.lookahead} are lost to the lookahead; make "
                "crop_s larger"
            )
        if torch.is_grad_enabled() and quantised:
            self.usage.update(out.codes)
        elif torch.is_grad_enabled():
            latents = _spoken(out.latents, batch.lengths, self.hop_length)
            self._latents = [*self._latents, latents][-_LATENTS_KEPT:]
        once, zero = torch.ones((), device=out.wave.device), torch.zeros((), device=out.wave.device)
        own = {
            "commitment": out.commitment if quantised else Loss(zero, out.commitment.count),
            "codebook": out.codebook if quantised else Loss(zero, out.codebook.count),
            "perplexity": Loss(out.perplexity.mean() if quantised else zero, once),
            **out.losses,
        }
        return out.wave, batch.waves[:, : out.wave.shape[1]].to(out.wave), own

    def state_dict(self) -> dict[str, Any]:
        """Also how codes were used, and the generator's state."""
        return {
            **super().state_dict(),
            "initialise": self._initialise,
            "latents": list(self._latents),
            "shares": self.usage.shares,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` stands."""
        super().load_state_dict(state)
        self._initialise = state["initialise"]
        self._latents = [latents.to(self.device) for latents in state.get("latents", [])]
        self.usage.shares.copy_(state["shares"])
        self.generator.set_state(state["generator"].cpu())


def _spoken(latents: Tensor, lengths: Tensor, hop_length: int) -> Tensor:
    """Latents [B, D, F] of recordings of so many samples, joined [1, D, N]: silence behind an end gets no codes."""
    frames = (lengths + hop_length - 1) // hop_length
    heard = torch.arange(latents.shape[2], device=latents.device) < frames[:, None]
    return latents.transpose(1, 2)[heard].t()[None]


class DecoderObjective(WaveObjective):
    """Trains Code2Wav to decode given codes, such as Mimi's; the trainer's model is any module with a `code2wav`.

    Batches are crops with codes. Code2Wav's whole context lies before a frame, so what stands behind a recording's end
    changes only the `lookahead` samples before it; neither these nor the silence count. Arguments as in
    `CodecObjective`.
    """

    def __init__(
        self,
        code2wav: Code2Wav,
        given: Mapping[str, float] | None = None,
        *,
        adversary: Adversary | None = None,
        start_adversarial_step: int = 0,
        mel_scales: Sequence[Sequence[int]] = MEL_SCALES,
        floor_db: float = -100.0,
    ) -> None:
        """Raises ValueError for a weight of a loss that is not there."""
        super().__init__(code2wav, {}, given, adversary, start_adversarial_step, mel_scales, floor_db)
        self.config = code2wav.config

    def prepare(self, model: Any, batch: Crops) -> Crops:
        """Also checks the codes, which a lookup on a GPU would not. Raises ValueError for codes that do not fit."""
        books, size = self.config.num_quantizers, self.config.codebook_size
        if batch.codes is None:
            raise ValueError("the crops have no codes; give crop_batches codes= and hop_length=")
        if batch.codes.shape[1] != books or not 0 <= int(batch.codes.min()) <= int(batch.codes.max()) < size:
            raise ValueError(
                f"the crops have {batch.codes.shape[1]} codebooks of codes {int(batch.codes.min())} .. "
                f"{int(batch.codes.max())}, Code2Wav has {books} of 0 .. {size - 1}; use the codec's own encoder"
            )
        return super().prepare(model, batch)

    def begin_step(self, model: Any, batch: Crops) -> None:
        """Nothing moves beside what the optimiser does."""

    def counts(self, batch: Crops) -> dict[str, float]:
        """Rows."""
        return dict.fromkeys(self.weights, float(len(batch.waves)))

    def compare(self, model: Any, batch: Crops) -> tuple[Tensor, Tensor, dict[str, Loss]]:
        """Decoded and recorded waves, both silent where nothing is to be compared."""
        assert batch.codes is not None
        embeds = ResidualQuantiser(model.code2wav).embed(batch.codes)
        wave, losses = _limited(decoded(model.code2wav, embeds, batch.waves, heard=self.heard))
        if wave.shape[1] == 0:
            raise ValueError(f"crops of {batch.codes.shape[2]} frame(s) give no sample; make crop_s larger")
        ends = batch.lengths - torch.where(batch.lengths < batch.waves.shape[1], model.code2wav.lookahead, 0)
        heard = torch.arange(wave.shape[1], device=wave.device) < ends[:, None]
        return wave * heard, batch.waves[:, : wave.shape[1]].to(wave) * heard, losses


def decode_with_gradients(code2wav: Code2Wav, codes: Tensor) -> Tensor:
    """`code2wav(codes)`, codes int64 [B, K, F] -> [B, m], with gradients also where samples are clipped."""
    with torch.autocast(codes.device.type, enabled=False):
        return _limited(Decoded(code2wav.decode_embeddings(ResidualQuantiser(code2wav).embed(codes)), {})).wave


def _limited(sound: Decoded) -> Decoded:
    loud = sound.wave
    return sound._replace(wave=loud.detach().clamp(-1, 1) + (loud - loud.detach()))  # exactly the clipped wave


@torch.no_grad()
def evaluate_codec(codec: Codec, batches: Sequence[Crops]) -> dict[str, float]:
    """How well crops survive the codec: "mel_db", mean mel distance in decibels (`mel_distance`), and "perplexity",
    codes in use of a codebook, in effect, averaged over codebooks. Silence behind a recording's end does not count."""
    distances, codes = [], []
    device = codec.code2wav.code_embedding.weight.device
    for batch in batches:
        for wave, length in zip(batch.waves.to(device), batch.lengths.tolist()):
            code = codec.encode(wave[None, :length])
            distances.append(_decibels(codec.decode(code)[0], wave[:length], codec.sample_rate))
            codes.append(code)
    shares = code_shares(torch.cat(codes, dim=2), codec.code2wav.config.codebook_size)
    return {
        "mel_db": sum(distances) / len(distances),
        "perplexity": float(torch.special.entr(shares).sum(1).exp().mean()),
    }


@torch.no_grad()
def evaluate_decoder(code2wav: Code2Wav, batches: Sequence[Crops]) -> dict[str, float]:
    """ "mel_db" as in `evaluate_codec`, of what Code2Wav makes of given codes."""
    distances, device = [], code2wav.code_embedding.weight.device
    for batch in batches:
        assert batch.codes is not None, "crops with codes"
        for wave, length, codes in zip(batch.waves, batch.lengths.tolist(), batch.codes):
            frames = -(-length // code2wav.hop_length)
            decoded = code2wav(codes[None, :, :frames].to(device))[0]
            distances.append(_decibels(decoded, wave[:length], code2wav.sample_rate))
    return {"mel_db": sum(distances) / len(distances)}


def _decibels(wave: Tensor, recorded: Tensor, sample_rate: int) -> float:
    return mel_distance(wave.float(), recorded.float(), sample_rate).decibels
