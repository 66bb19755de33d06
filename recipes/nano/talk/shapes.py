"""What can be drawn: shapes, colours, places, grounds. Names only, no pixels."""

from __future__ import annotations

SHAPES = ("circle", "square", "triangle", "star", "diamond", "pentagon", "heart", "cross")
OTHER_SHAPES = ("arrow", "moon", "bolt", "spiral")  # drawn, and not known by name
SHAPE_PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "brown", "black", "white", "grey")
PLACES = (  # of the cells 0..8 of a 3 x 3 grid
    "top left", "at the top", "top right", "on the left", "in the middle", "on the right", "bottom left",
    "at the bottom", "bottom right",
)  # fmt: skip
DIRECTIONS = ("to the left", "to the right", "up", "down")
GROUNDS = ("plain", "white", "black", "grey", "gradient", "noisy", "photo")  # plain: a light tint, as of paper
_HIDDEN = {  # colours that cannot be told from a ground
    "plain": {"white"}, "white": {"white"}, "black": {"black"}, "grey": {"grey"}, "gradient": {"white", "grey",
    "black"}, "noisy": {"white", "grey"}, "photo": {"brown", "grey"},
}  # fmt: skip


def colors_on(ground: str) -> tuple[str, ...]:
    """The colours that can be seen on a ground."""
    return tuple(color for color in COLORS if color not in _HIDDEN[ground])
