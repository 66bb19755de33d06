"""How fast this checkout decodes: first sound, pieces of sound, text tokens, for random weights at configs/bench.json.

    python scripts/speed.py        one line of JSON, medians in milliseconds, on one thread

Two checkouts are compared by running it in each of them in turn, and taking the ratio of the medians.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from omni import AudioChunk, OmniConfig, OmniInputs, OmniModel  # noqa: E402

GREEDY = {
    "text_sampling": {"temperature": 0},
    "audio_sampling": {"temperature": 0, "repetition_penalty": 1.3},
    "residual_sampling": {"temperature": 0},
}


def model_and_prompt() -> tuple[OmniModel, OmniInputs]:
    """A model far enough from uniform that its reply does not end at once, and a user's turn of thirty tokens."""
    torch.manual_seed(0)
    c = OmniConfig.from_pretrained(ROOT / "configs" / "bench.json")
    model = OmniModel(c)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith("code2wav"):
            parameter.data.mul_(5)
    opened = [c.im_start_token_id, c.user_token_id, 10, *range(30, 60), c.im_end_token_id, 10]
    ids = torch.tensor([[*opened, c.im_start_token_id, c.assistant_token_id, 10]])
    return model, OmniInputs(input_ids=ids, attention_mask=torch.ones_like(ids))


def sounds(model: OmniModel, prompt: OmniInputs, frames: int) -> tuple[float, list[float]]:
    """Seconds to the first piece of sound, and between the pieces."""
    start = time.perf_counter()
    marks = [
        time.perf_counter()
        for event in model.stream(prompt, 40, max_frames=frames, **GREEDY)
        if isinstance(event, AudioChunk)
    ]
    return marks[0] - start, [later - earlier for earlier, later in pairwise(marks)]


def seconds_per_token(model: OmniModel, prompt: OmniInputs, tokens: int) -> float:
    """Of a reply in text alone, its prompt included."""
    start = time.perf_counter()
    out = model.generate(prompt, tokens, return_audio=False, **GREEDY)
    return (time.perf_counter() - start) / len(out.replies[0])


def main() -> None:
    torch.set_num_threads(1)
    model, prompt = model_and_prompt()
    sounds(model, prompt, 8)  # the first steps of a process are slow
    runs = [sounds(model, prompt, 40) for _ in range(4)]
    seconds_per_token(model, prompt, 8)
    found = {
        "first_sound": median(first for first, _ in runs),
        "piece": median(gap for _, gaps in runs for gap in gaps),
        "token": median(seconds_per_token(model, prompt, 48) for _ in range(3)),
    }
    print(json.dumps({f"{name}_ms": round(1000 * value, 2) for name, value in found.items()}))


if __name__ == "__main__":
    main()
