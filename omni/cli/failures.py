"""What is said of a failure: one line, with what a command offers to one who has too little memory."""

from __future__ import annotations

_PLACES = "--device auto uses all devices"
_LESS_MEMORY = {  # what each command offers to one who has too little
    "chat": f"--no-audio loads less, {_PLACES}",
    "speak": f"{_PLACES}, --quantize int8 halves the weights",
    "eval": f"a smaller --batch takes less, {_PLACES}",
    "train": "lower data.max_tokens (objective.batch_size where there is one) and raise train.accumulate instead, set "
    "train.activation_checkpointing = true, model.dtype = 'bfloat16' for frozen weights, or spread the run over more "
    "GPUs (docs/training.md)",
}


def one_line(error: Exception, command: str) -> str:
    """An error's message in one line; an unforeseen kind is named, with the way to see more."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename2 or error.filename}: {error.strerror}"  # of a move the place that it goes to
    if isinstance(error, (ValueError, TypeError, OSError)) and text:
        return text
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({text or 'no details'}); {_LESS_MEMORY.get(command, 'a smaller model needs less')}"
    return f"{type(error).__name__}: {text} (unexpected; OMNI_DEBUG=1 shows where)"
