"""The house rules that a program can check: who imports whom, short files, a true tree in the README."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "omni"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 450

# A module may import from its own room and from rooms of a lower level; rooms of one level never import each other.
LEVELS = (
    ("config",),
    ("rope",),
    ("layers",),
    ("encoders", "thinker", "talker", "code2wav"),
    ("processing", "checkpoint"),
    ("parts",),
    ("generation",),
    ("session", "model"),
    ("packaged",),
    ("metrics",),
    ("training",),
    ("evaluation",),
    ("bench", "serve"),
    ("cli",),
)
# The same within training.
TRAINING_LEVELS = (("parallel", "data"), ("objectives",), ("codec",), ("run",))
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def room_of(module: str) -> str:
    """The room of a dotted module name: `omni.layers.norm` -> layers."""
    return module.split(".")[1]


TRAINING_LEVEL = {room: level for level, rooms in enumerate(TRAINING_LEVELS) for room in rooms}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(node: ast.AST) -> Iterator[str]:
    """Names of omni's modules imported anywhere below a node, also those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name.split(".")[0] == "omni")
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import on line {child.lineno}; write it out from omni"
            if child.module == "omni":
                yield from (f"omni.{alias.name}" for alias in child.names)
            elif child.module is not None and child.module.startswith("omni."):
                yield child.module
        yield from imports_of(child)


def allowed(importer: str, imported: str) -> bool:
    return importer == imported or LEVEL[imported] < LEVEL[importer]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_in_one_direction(path: Path) -> None:
    module = module_of(path)
    if module == "omni":
        return  # names its exports as strings; checked below
    importer = room_of(module)
    assert importer in LEVEL, f"{path.name} belongs to no known room; add it to the levels or place it in one"
    wrong = [name for name in imports_of(ast.parse(path.read_text())) if not allowed(importer, room_of(name))]
    assert not wrong, f"{module} ({importer}) must not import {', '.join(wrong)}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "training").glob("*/*.py")), ids=module_of)
def test_rooms_of_training_go_in_one_direction(path: Path) -> None:
    own = path.parent.name
    inner = [
        name.split(".")[2] for name in imports_of(ast.parse(path.read_text())) if name.startswith("omni.training.")
    ]
    wrong = [room for room in inner if room != own and not TRAINING_LEVEL[room] < TRAINING_LEVEL[own]]
    assert not wrong, f"{path.name} ({own}) must not import {', '.join(wrong)}"


def test_the_rule_can_fail() -> None:
    assert not allowed("thinker", "talker") and not allowed("generation", "model") and not allowed("rope", "layers")
    assert allowed("model", "generation") and allowed("layers", "rope") and allowed("thinker", "thinker")
    tree = ast.parse("if TYPE_CHECKING:\n    import omni.model\ndef f():\n    from omni.talker.mtp import MTP\n")
    assert list(imports_of(tree)) == ["omni.model", "omni.talker.mtp"]


def test_files_stay_short() -> None:
    long = {module_of(path): n for path in FILES if (n := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines, split them by idea: {long}"


def test_every_file_says_its_purpose() -> None:
    silent = [module_of(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent, f"no docstring: {silent}"


def test_public_names() -> None:
    import omni

    for name in omni.__all__:
        assert getattr(omni, name).__name__ == name
    assert set(omni.__all__) <= set(dir(omni))
    with pytest.raises(AttributeError, match="OmniModl"):
        omni.OmniModl  # noqa: B018


def listed_files() -> dict[str, str]:
    """Path below omni/ -> description, for each row of the tables in docs/files.md; a heading names their folder."""
    out: dict[str, str] = {}
    folder = ""
    for line in (ROOT / "docs" / "files.md").read_text().splitlines():
        if heading := re.fullmatch(r"## (\S+/)", line):
            folder = heading[1]
            assert folder not in out, f"{folder} is listed twice"
            out[folder] = ""
        elif row := re.fullmatch(r"\| `(\S+)` \| (.+) \|", line):
            assert folder + row[1] not in out, f"{folder + row[1]} is listed twice"
            out[folder + row[1]] = row[2]
    return out


def test_the_list_of_files_is_true() -> None:
    """docs/files.md lists every Python file once, with a description, below a heading for its folder."""
    files = {str(path.relative_to(PACKAGE)) for path in FILES if path.name != "__init__.py"} | {"__init__.py"}
    folders = {f"{path.parent.relative_to(PACKAGE)}/" for path in FILES if path.parent != PACKAGE}
    assert set(listed_files()) == files | folders


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 360
