"""An independent judge of speech: PocketSphinx's own acoustic model, with the small world's answers as grammar."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import world
from voices import to_rate

from omni.metrics.scores import word_error_rate

_RATE_HZ = 16_000


def grammar() -> str:
    """JSGF of every answer that the model is to give: closed ones, and sentences to be repeated."""
    closed = sorted({answer for answer in world.all_answers() if answer not in world.NUMBERS})
    rules = {
        "number": world.NUMBERS,
        "adjective": world.ADJECTIVES,
        "animal": world.ANIMALS,
        "noun": (*world.ANIMALS, *world.THINGS, *world.SHAPES),
        "verb": world.VERBS,
        "place": [f"{preposition} the {thing}" for preposition in world.PREPOSITIONS for thing in world.THINGS],
        "time": world.TIMES,
        "determiner": world.DETERMINERS,
    }
    lines = [f"<{name}> = {' | '.join(words)};" for name, words in rules.items()]
    lines.append(
        "<sentence> = <determiner> [<adjective>] <animal> <verb> <determiner> [<adjective>] <noun> [<place>] [<time>];"
    )
    lines.append("<numbers> = <number> [<number>] [<number>] [<number>];")
    lines.append(f"public <answer> = {' | '.join(closed)} | <numbers> | <sentence>;")
    return "#JSGF V1.0;\ngrammar nano;\n" + "\n".join(lines) + "\n"


class Recogniser:
    """Writes down what it hears. Raises ModuleNotFoundError where pocketsphinx is not installed."""

    def __init__(self) -> None:
        from pocketsphinx import Config, Decoder

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "nano.gram"
            path.write_text(grammar(), encoding="utf-8")
            config = Config(jsgf=str(path), loglevel="FATAL", samprate=float(_RATE_HZ), bestpath=False)
            self._decoder = Decoder(config)

    def __call__(self, samples: np.ndarray, rate_hz: int) -> str:
        """Samples [n] in -1 .. 1 -> words, "" where it hears none of the answers."""
        heard = to_rate(np.asarray(samples, np.float32), rate_hz, _RATE_HZ)
        silence = np.zeros(_RATE_HZ // 5, np.float32)
        heard = np.concatenate([silence, heard * (0.5 / max(float(np.abs(heard).max()), 1e-3)), silence])
        self._decoder.start_utt()
        self._decoder.process_raw((heard * 32767).astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return "" if found is None else found.hypstr


def word_accuracy(pairs: list[tuple[str, str]]) -> float:
    """1 - word error rate over (said, recognised) pairs."""
    return 1 - word_error_rate([said for said, _ in pairs], [found for _, found in pairs], language=None)
