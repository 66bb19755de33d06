"""docs/map.md names places that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = re.findall(r"\| `([\w/]+\.py)(?::([\w.]+))?` \|$", (ROOT / "docs" / "map.md").read_text(), re.MULTILINE)


def test_about_forty_ideas() -> None:
    rows = [line for line in (ROOT / "docs" / "map.md").read_text().splitlines() if line.startswith("| ")]
    assert 35 <= len(PLACES) <= 60
    assert len(rows) - 1 == len(PLACES), "each row ends with one place"


@pytest.mark.parametrize("file, name", PLACES, ids=[":".join(place) for place in PLACES])
def test_the_place_exists(file: str, name: str) -> None:
    found: list[ast.stmt] = ast.parse((ROOT / "omni" / file).read_text()).body
    for part in name.split(".") if name else ():
        node = next((n for n in found if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == part), None)
        assert node is not None, f"{file} defines no {name}"
        found = node.body
