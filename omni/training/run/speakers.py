"""New voices: a row of the Talker's codec embedding each, learnt while every other row stays as it is.

A voice is a control id of the codec vocabulary (`talker_config.speaker_id`), whose embedding stands in the Talker's
prompt. The released vocabulary has some 1000 control ids that nothing uses (3072 ids, of which 2048 are codes).

Shapes: V codec vocabulary, D Talker width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni.config.qwen3_omni import TalkerConfig
from omni.model import OmniModel
from omni.talker.contract import TalkerContract

MEAN = "mean"  # in place of a voice to start from


class SpeakerEmbedding(nn.Embedding):
    """A codec embedding of which some rows are parameters of their own: `rows`, by codec id, [D] each.

    The table itself takes no gradient, so no optimizer touches it: neither weight decay nor momentum can move another
    row. `merge_speakers` puts the rows back into the table.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.weight = embedding.weight
        self.weight.requires_grad_(False)
        self.rows = nn.ParameterDict()
        self.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> [..., D]. A row that the ids do not name gets a gradient of zero, never none."""
        out = F.embedding(ids, self.weight)
        for speaker, row in self.rows.items():
            out = torch.where((ids == int(speaker))[..., None], row.to(out.dtype), out)
        return out


def add_speaker(model: OmniModel, name: str, like: str | None = None) -> int:
    """Give the model a further voice and return its codec id.

    The name goes, in lower case, into the config, from where `speaker=`, saved checkpoints and transformers take it.
    like: where the voice starts: a voice of the model, "mean" for the mean of all voices, None for random values at
    the config's `initializer_range`. The id is the first free control id after all named ones; the vocabulary keeps its
    size. Raises ValueError for a name that is taken, empty or "mean", a voice to start from that does not exist, a
    model without its Talker, and a vocabulary without a free id.
    """
    talker, config = _talker(model)
    voices = _voices(config)
    key = _new_name(name, voices)
    if like is not None and not isinstance(like, str):
        raise TypeError(f"like is the name of a voice, {MEAN!r} or None, got {type(like).__name__}")
    start = like.lower() if like is not None else None
    if start is not None and start not in voices and not (start == MEAN and voices):
        raise ValueError(f"no voice {like!r} to start from; there are {_listed(voices)}, or None for random values")
    speaker = _free_id(config)
    with torch.no_grad():
        if start is None:
            row = torch.randn(talker.codec_embedding.embedding_dim) * config.text_config.initializer_range
        else:
            ids = list(voices.values()) if start == MEAN else [voices[start]]
            table = talker.codec_embedding(torch.tensor(ids, device=talker.codec_embedding.weight.device))
            row = table.double().mean(0) if len(ids) > 1 else table[0]
        talker.codec_embedding.weight[speaker] = row.to(talker.codec_embedding.weight)
    changed = config.replace(speaker_id={**(config.speaker_id or {}), key: speaker})
    model.config = model.config.replace(talker_config=changed)
    talker.config = changed
    return speaker


def speaker_parameters(model: OmniModel, names: str | Sequence[str]) -> list[nn.Parameter]:
    """Make the rows of some voices parameters of their own, in fp32 at least, and return them.

    They are `talker.codec_embedding.rows.<id>` among the model's parameters. The rest of the table is frozen and stays
    bit-equal under any optimizer. The model computes what it did before; `merge_speakers` ends this state. Raises
    ValueError for an unknown voice and a model without its Talker.
    """
    talker, config = _talker(model)
    voices = _voices(config)
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if not isinstance(name, str) or name.lower() not in voices:
            raise ValueError(f"unknown speaker {name!r}; this model has {_listed(voices)}; add_speaker makes a new one")
    if not isinstance(talker.codec_embedding, SpeakerEmbedding):
        talker.codec_embedding = SpeakerEmbedding(talker.codec_embedding)
    embedding = talker.codec_embedding
    assert isinstance(embedding, SpeakerEmbedding)
    found = []
    for name in wanted:
        speaker = voices[name.lower()]
        if str(speaker) not in embedding.rows:
            row = embedding.weight[speaker].detach()
            wide = torch.promote_types(row.dtype, torch.float32)
            embedding.rows[str(speaker)] = nn.Parameter(row.to(wide, copy=True))
        found.append(embedding.rows[str(speaker)])
    return found


@torch.no_grad()
def merge_speakers(model: OmniModel) -> None:
    """Write the trained rows into the codec embedding and put the plain one back, in place; it stays frozen.

    The model then saves as any other. ValueError if no voice is being trained.
    """
    talker, _ = _talker(model)
    trained = talker.codec_embedding
    if not isinstance(trained, SpeakerEmbedding):
        raise ValueError("no voice of this model is being trained; speaker_parameters makes one trainable")
    for speaker, row in trained.rows.items():
        trained.weight[int(speaker)] = row.to(trained.weight.dtype)
    with torch.device("meta"):
        plain = nn.Embedding(trained.num_embeddings, trained.embedding_dim)
    plain.weight = trained.weight
    talker.codec_embedding = plain.train(trained.training)


def _talker(model: OmniModel) -> tuple[TalkerContract, TalkerConfig]:
    talker = model.require("talker")
    if not model.config.talker_config.voice_rows:
        raise ValueError(
            "a voice of this model is a recording beside the checkpoint (model.voices), not a row of the Talker's "
            "codec embedding; add a Voice there instead"
        )
    return talker, model.config.talker_config


def _voices(config: TalkerConfig) -> dict[str, int]:
    """Codec ids by lower-case name."""
    return {name.lower(): speaker for name, speaker in (config.speaker_id or {}).items()}


def _listed(voices: dict[str, int]) -> str:
    return ", ".join(sorted(voices)) or "none"


def _new_name(name: str, voices: dict[str, int]) -> str:
    """The name in lower case, after checking it."""
    if not isinstance(name, str):
        raise TypeError(f"a speaker's name is a string, got {type(name).__name__}")
    key = name.lower()
    if not key or key != key.strip() or not key.isprintable() or key == MEAN:
        raise ValueError(
            f"speaker name {name!r} cannot be used; it needs visible characters, no spaces around them, and must not "
            f"be {MEAN!r}; names taken: {_listed(voices)}"
        )
    if key in voices:
        raise ValueError(f"speaker {name!r} exists; names taken: {_listed(voices)} (case makes no difference)")
    return key


def _free_id(config: TalkerConfig) -> int:
    """The first control id after all that have a meaning, then any free one below."""
    c, vocab = config, config.text_config.vocab_size
    control = (
        c.codec_pad_id, c.codec_bos_id, c.codec_eos_token_id, c.codec_nothink_id, c.codec_think_bos_id,
        c.codec_think_eos_id,
    )  # fmt: skip
    used = {*control, *_voices(config).values()}
    after = max(used) + 1
    free = [i for i in (*range(after, vocab), *range(after - 1, c.num_codes - 1, -1)) if i not in used]
    if not free:
        raise ValueError(
            f"all {vocab - c.num_codes} control ids of the codec vocabulary are taken; no room for a voice"
        )
    return free[0]
