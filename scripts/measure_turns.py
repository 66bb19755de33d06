"""The figures of docs/turns.md: end points in noise, the echo guard, and the Thinker as a judge of the end of a turn.

    python scripts/measure_turns.py        Markdown tables, about five minutes on one thread

Speech: the packaged recordings and omni-nano's own. True edges: the first and last sample over 2 % of the largest.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "session"), str(ROOT / "recipes" / "nano")]

import torch  # noqa: E402
import world  # noqa: E402
from torch import Tensor  # noqa: E402
from turn_sounds import RATE_HZ, echo, edges_ms, in_noise, overheard, recording  # noqa: E402

from omni import OmniModel  # noqa: E402
from omni.encoders.resample import StreamingResampler  # noqa: E402
from omni.packaged.nano import nano_model  # noqa: E402
from omni.session.turn_events import Interrupt, SpeechStarted, SpeechStopped, TurnConfig  # noqa: E402
from omni.session.turns import TurnTaking  # noqa: E402
from omni.session.voice_activity import EnergyDetector, SileroDetector, VoiceDetector  # noqa: E402

FRAME_MS = 32
SENTENCES = 40
BEGINS_MS = 800  # of the reply in the rows about echoes
PAUSE_S, PAUSE_SPREAD = 0.5, 0.6  # median of the pauses within a turn, and the deviation of their logarithm


def questions() -> list[str]:
    """Things to ask omni-nano, of four words and more."""
    rng = random.Random(0)
    return [rng.choice(world.QUESTIONS["repeat"]).format(world.sentence(rng)) for _ in range(SENTENCES)]


def unfinished(texts: list[str]) -> list[str]:
    """The beginnings of longer questions, as many words long as the questions: length alone tells nothing."""
    words = [text.split() for text in texts]
    longer = [(len(w), next((v for v in words[i:] + words[:i] if len(v) > len(w)), None)) for i, w in enumerate(words)]
    return [" ".join(other[:length]) for length, other in longer if other is not None]


def spoken(model: OmniModel, text: str) -> Tensor:
    """In omni-nano's voice at 16 kHz and -20 dB, without the silence around it."""
    sound = StreamingResampler(24_000, RATE_HZ)(model.speak(text, audio_sampling={"temperature": 0}))
    first, last = edges_ms(sound)
    sound = sound[int(first * 16) : int(last * 16)]
    return sound / sound.square().mean().sqrt() * 0.1


def end_points(speech: list[Tensor]) -> Iterator[str]:
    """How near the edges are found, by detector and noise."""
    yield "| detector | noise | begin within a frame, worst | end within a frame, worst | stop - end - 500 ms | wrong |"
    yield "|---|---|---|---|---|---|"
    for name, detector in (("Silero", SileroDetector()), ("levels", EnergyDetector())):
        for label, snr_db in (("none", None), ("20 dB", 20.0), ("10 dB", 10.0)):
            begins, ends, stops, wrong = errors(speech, detector, snr_db)
            yield (
                f"| {name} | {label} | {within(begins)}, {worst(begins)} ms | {within(ends)}, {worst(ends)} ms | "
                f"{min(stops):.0f} .. {max(stops):.0f} ms | {wrong} of {len(speech)} |"
            )


def errors(
    speech: list[Tensor], detector: VoiceDetector, snr_db: float | None
) -> tuple[list[float], list[float], list[float], int]:
    """Found minus true begin, end and stop (less 500 ms), in ms, and how often it was not exactly one turn."""
    begins, ends, stops, wrong = [], [], [], 0
    for number, sound in enumerate(speech):
        lead = RATE_HZ + 37 * number  # anywhere in a frame
        first, last = (edge + lead / 16 for edge in edges_ms(sound))
        events = TurnTaking(detector=detector).push(in_noise(sound, snr_db, lead=lead, seed=number))
        wrong += len(events) != 2
        started = next((event for event in events if isinstance(event, SpeechStarted)), None)
        stopped = [event for event in events if isinstance(event, SpeechStopped)]
        if started and stopped:
            begins.append(started.speech_ms - first)
            ends.append(stopped[-1].speech_end_ms - last)
            stops.append(stopped[-1].at_ms - last - 500)
    return begins, ends, stops, wrong


def within(found: list[float]) -> str:
    return f"{sum(abs(error) <= FRAME_MS for error in found) / len(found):.0%}"


def worst(found: list[float]) -> str:
    return f"{max(found, key=abs):+.0f}"


def echoes(sent: list[Tensor], persons: list[Tensor]) -> Iterator[str]:
    """Interruptions of a reply of some seconds, by its echo alone and by a person who begins 2.4 s after it."""
    yield "| at the microphone | interrupted | after speech of (median, worst) |"
    yield "|---|---|---|"
    rooms = [(delay, gain) for delay in (40, 130, 310, 600) for gain in (0, -12, -24)]
    for label, over_db in (("echo alone", None), ("person 6 dB over it", 6), ("as loud", 0), ("6 dB below", -6)):
        waits: list[float] = []
        for number, (delay_ms, gain_db) in enumerate(rooms):
            heard = echo(sent[number % len(sent)], delay_ms, gain_db, seed=number)
            person = None if over_db is None else persons[number % len(persons)] * 10 ** ((gain_db + over_db) / 20)
            waits += interrupted(heard, sent[number % len(sent)], person, number)
        yield row(label, waits, len(rooms))
    waits = [wait for n, s in enumerate(sent * 3) for wait in interrupted(s * 0, s, persons[n % len(persons)], n)]
    yield row("person, no echo (headphones)", waits, 3 * len(sent))


def interrupted(heard: Tensor, sent: Tensor, person: Tensor | None, seed: int) -> list[float]:
    """[how long somebody had spoken when the reply was interrupted, in ms], or [] if it was not."""
    begins = BEGINS_MS * 16
    microphone = torch.randn(begins + len(heard), generator=torch.Generator().manual_seed(seed)) * 1e-3
    microphone[begins:] += heard
    first = begins + 2400 * 16
    if person is not None:
        end = min(first + len(person), len(microphone))
        microphone[first:end] += person[: end - first]
    events = overheard(TurnTaking(TurnConfig(), SileroDetector()), microphone, sent, BEGINS_MS)
    return [event.at_ms - first / 16 for event in events if isinstance(event, Interrupt)][:1]


def row(label: str, waits: list[float], runs: int) -> str:
    times = f"{median(waits):.0f} ms, {max(waits):.0f} ms" if waits else ""
    return f"| {label} | {len(waits)} of {runs} | {times} |"


def judged(model: OmniModel, whole: list[Tensor], begun: list[Tensor]) -> Iterator[str]:
    """The Thinker's probability of the turn's end after the heard part, against the silence timer."""
    over = torch.tensor([end_probability(model, sound) for sound in whole])
    open_ = torch.tensor([end_probability(model, sound) for sound in begun])
    better = (over[:, None] > open_).float().mean() + (over[:, None] == open_).float().mean() / 2
    yield f"ended above unfinished turns: {better:.2f} (chance 0.50)"
    yield ""
    yield "| turns cut at a pause | timer waits | with the judge |"
    yield "|---|---|---|"
    for share in (0.05, 0.1, 0.2):
        timer = PAUSE_S * math.exp(PAUSE_SPREAD * float(torch.special.ndtri(torch.tensor(1 - share))))
        yield f"| {share:.0%} | {timer:.2f} s | {best_wait(over, open_, share):.2f} s |"


def end_probability(model: OmniModel, sound: Tensor) -> float:
    """P(<|im_end|>) after a user's sound and 0.2 s of silence."""
    heard = torch.cat((sound, torch.zeros(3200))).numpy()
    message = {"role": "user", "content": [{"type": "audio", "audio": (heard, RATE_HZ)}]}
    inputs = model.processor([message], add_generation_prompt=False)
    place = inputs.input_ids[0].tolist().index(model.config.im_end_token_id, 1) - 1
    with torch.no_grad():
        return float(model.forward(inputs).logits[0, place].softmax(-1)[model.config.im_end_token_id])


def best_wait(over: Tensor, open_: Tensor, share: float) -> float:
    """The least mean wait of any rule "t1 seconds of silence from a probability on, else t2 >= t1" that cuts no more.

    Chosen on the figures that it is judged by, to the judge's favour.
    """
    times = torch.linspace(0.2, 4, 77)
    cut = 1 - torch.special.ndtr((times / PAUSE_S).log() / PAUSE_SPREAD)  # of turns with a pause, by the timer
    best = math.inf
    for limit in [*torch.cat((over, open_)).quantile(torch.linspace(0, 1, 21)), torch.tensor(2.0)]:
        early, late = (open_ >= limit).float().mean(), (over >= limit).float().mean()
        allowed = early * cut[:, None] + (1 - early) * cut <= share
        allowed &= times[:, None] <= times
        waits = late * times[:, None] + (1 - late) * times
        best = min(best, float(waits[allowed].min()))
    return best


def main() -> None:
    torch.set_num_threads(1)
    model = nano_model()
    texts = questions()
    whole = [spoken(model, text) for text in texts]
    packaged = [recording(name) for name in ("request.wav", "question.wav")]
    print("\n".join(end_points([*packaged, *whole])), "\n")
    replies = [torch.cat(whole[i : i + 3]) for i in (0, 3, 6, 9)]
    persons = [sound / sound.square().mean().sqrt() * 0.1 for sound in packaged]
    print("\n".join(echoes(replies, persons)), "\n")
    begun = [spoken(model, text) for text in unfinished(texts)]
    print("\n".join(judged(model, whole, begun)))


if __name__ == "__main__":
    main()
