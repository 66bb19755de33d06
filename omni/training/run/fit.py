"""Whether objective, settings and rows fit each other, found out before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from omni.training.data.conversation_samples import SampleMaker, SkipRow, learnt_answers
from omni.training.data.manifest import Row, Voice
from omni.training.data.mixture import Draw, Mixture
from omni.training.data.row_forms import NotUnderstood
from omni.training.run.train_config import TrainConfig

_LOOK = 32  # rows of each manifest that are looked at

_SPOKEN = ("talker", "joint")
_CONVERSATIONS = ("thinker", *_SPOKEN, "dpo", "distillation", "gspo")
# settings -> the objectives that read them ("dpo" only with objective.speech, "codec" only with decoder_only)
_READ_BY = {
    "lora": _CONVERSATIONS,
    "speaker": (*_SPOKEN, "dpo"),
    "data.loss_on": _CONVERSATIONS,
    "data.codec": (*_SPOKEN, "dpo", "codec", "flow_matching"),
    "eval.metrics": _CONVERSATIONS,
    "eval.scorer": _CONVERSATIONS,
}
_KNOWN = (*_CONVERSATIONS, "codec", "flow_matching", "transcription")


def check_settings(config: TrainConfig) -> None:
    """Raises ValueError for a setting that the run's objective would not look at. One's own may look at any."""
    objective, options = config.train.objective, config.objective
    if objective not in _KNOWN:
        return
    for name, readers in _READ_BY.items():
        *tables, key = name.split(".")
        table: Any = getattr(config, tables[0]) if tables else config
        field = next(field for field in dataclasses.fields(table) if field.name == key)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if getattr(table, key) == default:
            continue
        read = objective in readers
        if name in ("speaker", "data.codec"):
            read = read and (objective != "dpo" or bool(options.get("speech")))
            read = read and (objective != "codec" or bool(options.get("decoder_only")))
        if name == "data.codec" and config.eval.every and objective in _CONVERSATIONS:
            read = True  # for metrics of codes
        if not read:
            raise ValueError(
                f"{name} has no effect on objective {objective!r} (it is read by {', '.join(readers)}); leave it out"
            )
    if options.get("labels") == "tokens" and "alphabet" in options:
        raise ValueError("objective.alphabet has no effect with objective.labels = 'tokens'; leave it out")


def look_at_rows(mixture: Mixture, make: SampleMaker, config: TrainConfig) -> None:
    """Look at a sample of the rows of each manifest, and make what is read of one.

    Raises NotUnderstood where the rows are no pairs for an objective of pairs, or pairs for another one; where a
    Talker's objective finds no speech, or that of a new voice no answer in it; and ValueError where no row can be used.
    """
    objective, usable, bad = config.train.objective, False, []
    rows: list[Row] = []
    for draw in _spread(mixture):
        try:
            row = draw.read()
            rows.append(row)
            make.check(row)
            if not usable:
                make(row)
                usable = True
        except NotUnderstood:
            raise
        except SkipRow:
            usable = True
        except (ValueError, TypeError, OSError) as error:
            bad.append(f"{draw.name}: {error}")
    if bad and not usable:
        raise ValueError(f"none of {len(bad)} rows that were looked at can be used; the first is {bad[0]}")
    if not make.speech or not rows:
        return
    wanted = None if config.speaker is None else config.speaker.add.lower()
    if any(_speaks(row, make, wanted) for row in (*rows, *_all(mixture))):
        return
    if not any(_speaks(row, make, None) for row in rows):
        raise NotUnderstood(
            f"objective {objective!r} learns from speech, and no answer that is learnt in {_named(mixture)} has any; "
            "give rows 'speech' or 'codes', or use an objective of text"
        )
    raise NotUnderstood(
        f"speaker.add = {wanted!r} learns from answers of that voice, and no spoken one in {_named(mixture)} has it; "
        f"write 'speaker': '{wanted}' into the rows"
    )


def _speaks(row: Row, make: SampleMaker, speaker: str | None) -> bool:
    """Whether a learnt answer of a row is spoken, by `speaker` if one is named."""

    def spoken(voice: Voice) -> bool:
        named = speaker is None or (voice.speaker or "").lower() == speaker
        return named and not (voice.speech is None and voice.codes is None)

    try:
        learnt = learnt_answers(len(row.voices), row.learn, make.loss_on)
    except ValueError:
        return False
    return any(own and spoken(voice) for own, voice in zip(learnt, row.voices))


def _spread(mixture: Mixture) -> Iterator[Draw]:
    """Rows of all manifests, evenly spread, that filters let through."""
    for manifest in mixture.manifests:
        count = min(len(manifest), _LOOK)
        draws = (Draw(manifest, i * len(manifest) // count) for i in range(count))
        yield from (draw for draw in draws if mixture.keeps(draw))


def _all(mixture: Mixture) -> Iterator[Row]:
    """Every row that can be read; only for sets in whose sample something was not found."""
    for manifest in mixture.manifests:
        for number in range(len(manifest)):
            draw = Draw(manifest, number)
            try:
                if mixture.keeps(draw):
                    yield draw.read()
            except (ValueError, TypeError, OSError):
                continue


def _named(mixture: Mixture) -> str:
    return ", ".join(str(manifest.path) for manifest in mixture.manifests)
