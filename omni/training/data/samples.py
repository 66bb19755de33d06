"""What training reads: one conversation as tensors, its labels, and the speech of its spoken turns.

Shapes: T tokens of a conversation, K codebooks, n frames of a turn's speech.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from omni.processing.inputs import OmniInputs

IGNORED = -100  # the label of a token that no loss looks at, PyTorch's own default


@dataclass
class SpokenTurn:
    """One assistant turn that is spoken.

    header: where the turn's `<|im_start|>` stands among the conversation's ids; the Talker's prompt is taken from what
    comes before its reply. ids: what is spoken: the reply's ids without reasoning and without the end id. codes int64
    [K, n], without an end frame. speaker: a name of the config, None for the default.
    """

    header: int
    ids: list[int]
    codes: Tensor
    speaker: str | None = None


@dataclass
class Sample:
    """One conversation. inputs: a batch of one without padding, replies included, on the CPU; labels int64 [T]: the
    token itself where it is to be predicted from those before it, `IGNORED` elsewhere; name: where it comes from, for
    messages ("data.jsonl:17")."""

    inputs: OmniInputs
    labels: Tensor
    speech: list[SpokenTurn] = field(default_factory=list)
    name: str = ""

    @property
    def tokens(self) -> int:
        """Tokens that the Thinker reads."""
        return self.inputs.input_ids.shape[1]

    @property
    def frames(self) -> int:
        """Frames that the Talker writes."""
        return sum(turn.codes.shape[1] for turn in self.speech)


@dataclass
class Pair:
    """Two answers to one prompt: `chosen` is to become likelier than `rejected`."""

    chosen: Sample
    rejected: Sample
    name: str = ""

    @property
    def tokens(self) -> int:
        """Tokens that the Thinker reads for both."""
        return self.chosen.tokens + self.rejected.tokens

    @property
    def frames(self) -> int:
        """Frames that the Talker writes for both."""
        return self.chosen.frames + self.rejected.frames


@dataclass
class TrainingBatch:
    """Conversations side by side: `inputs` a padded batch of B rows (as the processor makes it), labels of each row
    without padding, the spoken turns as (row, turn). paired: the first half are chosen answers, the second the rejected
    ones to the same prompts."""

    inputs: OmniInputs
    labels: list[Tensor]
    speech: list[tuple[int, SpokenTurn]]
    names: list[str]
    paired: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of all rows, padding left out."""
        return sum(len(labels) for labels in self.labels)
