"""What a user says and shows, piece by piece: the input half of a session."""

from __future__ import annotations

from typing import Any

from omni.processing.audio_file import read_piece
from omni.processing.token_budget import TokenBudget
from omni.processing.vision import PixelBudget
from omni.session import options
from omni.session.attached import Attached
from omni.session.undo import whole
from omni.talker.layout import PromptEnd


class Input(Attached):
    """Pushes go into the user's open turn; what of it is decided is read at once, or once a reply has ended."""

    @whole
    def push_text(self, text: str, control_tokens: bool = False) -> None:
        """Add text to the user's turn. Consecutive texts are one text.

        control_tokens: special tokens and the markup of reasoning and tool calls in it become their ids; by default
        they are text, and other added tokens become their ids.
        """
        if not isinstance(text, str):
            raise TypeError(f"push_text takes a string, got {type(text).__name__}")
        positions = self._conversation.limit
        TokenBudget(positions, allow_long=None).check_text(text, self.processor.encode_text, short=32)  # else: respond
        pieces = self.processor.chat.pieces(text, control_tokens)  # what is no text is refused here
        before = self._conversation.end
        turn = self._user_turn()
        self._check_room(before)  # of the text itself it is the reply that must have room
        turn.add_text(text, pieces)
        self._read_ahead()

    @whole
    def push_audio(self, samples: Any, sample_rate: int = 16000) -> None:
        """Add sound: samples [n], [channels, n] or [n, channels] at any rate. Consecutive calls are one clip.

        Floats in -1 .. 1, or integers, which are PCM. A piece may be empty. Raises TypeError or ValueError.
        """
        wave = read_piece(samples)
        sample_rate = options.whole_rate(sample_rate)
        before = self._conversation.end
        self._user_turn().add_sound(wave, sample_rate)
        self._added(before)

    @whole
    def push_image(self, image: Any, *, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        """Add a picture: a path, address, bytes, array or PIL image. Its size is kept within the limits (None: the
        checkpoint's)."""
        self.model.require("vision_encoder")
        limits = PixelBudget(min_pixels, max_pixels)
        pixels, grid = self.processor.vision.image(image, limits, media_budget=self.processor.media_budget)
        before = self._conversation.end
        self._user_turn().add_picture(pixels, grid)
        self._added(before)

    @whole
    def push_video_frame(self, frame: Any, time_s: float) -> None:
        """Add a frame of the open video (or begin one): a picture, and its time in seconds, which must grow."""
        self.model.require("vision_encoder")
        picture = self.processor.vision.frame(frame, self.processor.media_budget)
        time_s = options.seconds(time_s)
        before = self._conversation.end
        self._user_turn().add_frame(time_s, picture, with_sound=self.use_audio_in_video)
        self._added(before)

    @whole
    def discard_input(self) -> bool:
        """Forget the clip or video that is open, as if nothing of it had been pushed; False if none is."""
        turn = self._conversation.open
        if turn is None or not turn.discard_medium():
            return False
        if turn.empty:
            self._conversation.open = None
        self._read_ahead()
        return True

    def _added(self, before: PromptEnd) -> None:
        """Something was added to the list: there must be room, and what is decided is read."""
        self._check_room(before)
        self._read_ahead()
