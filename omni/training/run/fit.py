"""Whether objective, settings and rows fit each other, found out before the first step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from omni.training.data.conversation_samples import SampleMaker, SkipRow, learnt_answers
from omni.training.data.failures import RunError, reason
from omni.training.data.manifest import Row, Voice
from omni.training.data.mixture import Draw, Mixture
from omni.training.data.recordings import DrawnBatches
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
    "data.audio_chunks_s": (*_CONVERSATIONS, "transcription"),
    "data.audio_windows_s": (*_CONVERSATIONS, "transcription"),
    "data.codec": (*_SPOKEN, "dpo", "codec", "flow_matching"),
    "eval.metrics": _CONVERSATIONS,
    "eval.scorer": _CONVERSATIONS,
}
_KNOWN = (*_CONVERSATIONS, "codec", "flow_matching", "transcription")
# parts of the model that hear and see -> the kinds of media that reach them
_ENCODERS = {"audio_encoder": ("audio", "video"), "vision_encoder": ("image", "video")}


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


def check_learns(learns: Collection[str], config: TrainConfig) -> None:
    """Raises ValueError where the objective's losses reach none of the parts of the model that learn."""
    objective, options = config.train.objective, config.objective
    reached = {"talker"} if objective in _SPOKEN or (objective == "dpo" and options.get("speech")) else set()
    if objective != "talker" and not (objective == "dpo" and options.get("text") is False):
        reached |= {"thinker", *_ENCODERS}
    if options.get("detach") is False:
        reached |= {"thinker", *_ENCODERS}
    if objective in _CONVERSATIONS and not reached & set(learns):
        raise ValueError(
            f"objective {objective!r} would teach nothing: it reaches {', '.join(sorted(reached))}, and what learns by "
            f"train.parameters or lora.patterns is of {', '.join(sorted(learns))}; choose parameters that it reaches"
        )


def look_at_rows(mixture: Mixture, make: SampleMaker, config: TrainConfig, learns: Collection[str] = ()) -> None:
    """Look at a sample of the rows of each manifest, and make what is read of one.

    learns: the parts of the model that learn. Raises NotUnderstood where the rows are no pairs for an objective of
    pairs, or pairs for another one; where a Talker's objective finds no speech, that of a new voice no answer in it, or
    an encoder that learns alone nothing to hear or see; and ValueError where no row can be used.
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
    kinds = tuple(kind for part in learns for kind in _ENCODERS.get(part, ()))
    lone = bool(learns) and _ENCODERS.keys() >= set(learns)
    if rows and lone and not any(_shows(row, kinds) for row in itertools.chain(rows, _all(mixture))):
        raise NotUnderstood(
            f"nothing but {' and '.join(learns)} learns, and no row of {_named(mixture)} holds {' or '.join(kinds)}; "
            "give it such rows, or let more learn with train.parameters"
        )
    if not make.speech or not rows:
        return
    wanted = None if config.speaker is None else config.speaker.add.lower()
    if any(_speaks(row, make, wanted) for row in itertools.chain(rows, _all(mixture))):
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


def _shows(row: Row, kinds: tuple[str, ...]) -> bool:
    """Whether a message of a row holds a medium of one of these kinds, in any of the forms of an item."""
    items = [item for message in row.messages for item in _items(message.get("content")) if isinstance(item, Mapping)]
    return any(kind in str(name) for item in items for name in (*item, item.get("type")) for kind in kinds)


def _items(content: Any) -> Sequence[Any]:
    return content if isinstance(content, (list, tuple)) else ()


def look_at_recordings(batches: DrawnBatches[Any, Any]) -> None:
    """Make what is read of one row, for objectives that hear recordings and know no conversation.

    Raises ValueError where no row of a sample of each manifest's can be used.
    """
    bad = []
    for number, draw in enumerate(_spread(batches.mixture), 1):
        try:
            batches.make(draw, number)
            return
        except RunError:
            raise
        except SkipRow:
            return
        except Exception as error:  # whatever a decoder makes of a damaged file, as where the row is drawn
            bad.append(f"{draw.name}: {reason(error)}")
    if bad:
        raise ValueError(f"none of {len(bad)} rows that were looked at can be used; the first is {bad[0]}")


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
