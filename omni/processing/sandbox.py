"""Chat templates in a sandbox: steps are counted, texts bounded, and what users wrote stays apart (`Written`).

A template is code that comes with a checkpoint. It may read the messages and write text; it reaches no attribute of
Python's, its loops and calls are counted, and no string in it grows beyond a multiple of what the messages hold. Names
and filters are those that transformers gives to chat templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sized
from datetime import datetime
from functools import cached_property, partial, wraps
from types import CodeType
from typing import Any, ClassVar

from jinja2 import nodes, pass_context
from jinja2.environment import Template
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from omni.processing.written import Alphabet, Written

MAX_STEPS = 1_000_000  # loop rounds, calls and filters of one prompt; a long text in one of them counts as several
MAX_TEXT = 1_000_000  # characters that a template may write beyond ten times those of the messages
_CHARACTERS_A_STEP = 64
_MAX_WIDTH = 10_000  # of indents and paddings
_WIDE = re.compile(r"[%:][^{}%a-zA-Z]*(\d{6}|\*|\{)")  # a format's width, too large or computed
_NO_METHODS = frozenset(("encode", "translate", "maketrans"))  # of strings: bytes, and growth by a table
_BY_WORDS = ("e", "escape", "forceescape", "striptags", "title", "truncate", "urlencode", "wordcount", "wordwrap")
_PADDED = ("center", "indent", "batch", "slice")


class ChatTemplate:
    """A chat template's source; `render` raises ValueError for whatever its code runs into."""

    def __init__(self, source: str) -> None:
        self.source = source

    @cached_property
    def _code(self) -> CodeType:
        environment = _Environment(Alphabet(), 0)
        tree = _Counting().visit(environment.parse(self.source))
        tree.set_environment(environment)
        return environment.compile(tree)

    def render(self, alphabet: Alphabet, characters: int, values: Mapping[str, Any]) -> str:
        """The text that the template makes of `values`, in which the users' texts are `alphabet`'s.

        characters: how many these are; what the template may write grows with them.
        """
        try:
            environment = _Environment(alphabet, characters)
            template = Template.from_code(environment, self._code, environment.make_globals(None))
            return str(environment.concat(template.root_render_func(template.new_context(dict(values)))))
        except Exception as error:  # whatever the template's own code runs into
            raise ValueError(f"the chat template cannot write these messages: {error}") from error


class _Counting(NodeTransformer):
    """Counts every round of a loop, and joins texts and makes lists where their size is watched."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._step(node), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(self._step(node), node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "joined", [], [], None, None, lineno=node.lineno)

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load" or all(isinstance(n, nodes.Const) for n in node.iter_child_nodes()):
            return node
        return nodes.Filter(node, "sized", [], [], None, None, lineno=node.lineno)

    visit_Tuple = visit_Dict = visit_List

    def _step(self, node: nodes.Node) -> nodes.Expr:
        return nodes.Filter(nodes.Const(True, lineno=node.lineno), "step", [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """`{% generation %}` marks replies for other tools; its content is written as it is."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """A template's variables; they may hold each other, so what it prints holds none of them."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of one prompt."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, alphabet: Alphabet, characters: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self._alphabet = alphabet
        self._room = MAX_TEXT + 10 * characters
        self._steps = MAX_STEPS + characters
        self.concat = self._join  # type: ignore[method-assign, assignment]
        own = {"tojson": self._to_json, "join": self._join_filter, "replace": _replace, "joined": self._join}
        self.filters = {name: self._watched(name, f) for name, f in {**self.filters, **own}.items()}
        self.filters["step"], self.filters["sized"] = self._step, self._sized
        self._sizes: dict[int, tuple[int, Any]] = {}
        self.globals.pop("lipsum")
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def _spend(self, characters: int = 0) -> None:
        self._steps -= 1 + characters // _CHARACTERS_A_STEP
        if self._steps < 0:
            raise TemplateError(f"it takes more than {MAX_STEPS:,} steps; it may loop for ever")

    @pass_context
    def _step(self, context: Any, value: Any) -> Any:
        """Count a round; not done while compiling, as it asks for the context."""
        self._spend()
        return value

    def _allow(self, size: Any) -> None:
        """Raise before something of so many characters or items is made."""
        if size > self._room:
            raise TemplateError(f"it writes more than the limit of {self._room:,} characters")
        self._spend(int(size))

    @pass_context
    def _sized(self, context: Any, value: Any) -> Any:
        """A list or dict that the template has made of others, refused where it holds too much."""
        return self._adopt(value)

    def _size(self, value: Any) -> int:
        """Characters and items in a value, counted as often as they would be printed; known lists are not read again,
        as no template can change one."""
        if isinstance(value, (str, range)) or not isinstance(value, Collection):
            return len(value) if isinstance(value, str) else 1
        if id(value) not in self._sizes:
            parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
            self._sizes[id(value)] = 1 + sum(map(self._size, parts)), value  # kept, and so is its id
        return self._sizes[id(value)][0]

    def _adopt(self, value: Any) -> Any:
        """A result, `Written` where a user's characters are in it."""
        if isinstance(value, (str, list, tuple)):
            self._allow(len(value))
        if not isinstance(value, str) and self._size(value) > self._room:
            self._allow(self._room + 1)
        return self._alphabet.adopt(value) if type(value) is str else value

    def _join(self, parts: Iterable[Any]) -> Any:
        """Texts in a row; what the output, a macro's result and `~` are made of."""
        texts, size = [], 0
        for part in parts:
            texts.append(str(part))
            size += len(texts[-1])
            if size > self._room:
                break
        self._allow(size)
        return self._alphabet.adopt("".join(texts))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr in _NO_METHODS)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`+`, `*`, `**` and `%`, refused where the result would be too large."""
        sizes = [len(x) if isinstance(x, Sized) else None for x in (left, right)]
        if operator == "%" and isinstance(left, str):
            self._check_format(left, right if isinstance(right, tuple) else (right,))
        elif operator == "*" and any(size is not None for size in sizes):
            times = right if sizes[0] is not None else left
            self._allow(max(size or 0 for size in sizes) * (times if isinstance(times, int) else 1))
        elif operator == "+" and None not in sizes:
            self._allow(sum(size or 0 for size in sizes))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
            self._allow(0 if bits < _MAX_WIDTH else self._room + 1)
        self._spend()
        return self._adopt(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        """A method, macro or function, refused where a string would grow too large."""
        bound = getattr(obj, "__wrapped__", obj)  # `str.format` comes wrapped
        text, name = getattr(bound, "__self__", None), getattr(bound, "__name__", "")
        if isinstance(text, str):
            if name == "join" and args:
                args = (list(args[0]), *args[1:])
            self._check_method(text, name, [*args, *options.values()])
        self._spend(len(text) if isinstance(text, Sized) else 0)
        return self._adopt(super().call(context, obj, *args, **options))

    def _check_method(self, text: str, name: str, values: list[Any]) -> None:
        numbers = [value for value in values if isinstance(value, int)]
        if name in ("center", "ljust", "rjust", "zfill"):
            self._allow(max(numbers, default=0))
        elif name == "expandtabs":
            self._allow(len(text) + text.count("\t") * max(numbers, default=8))
        elif name == "replace" and len(values) > 1:
            self._allow(len(text) + text.count(values[0]) * len(values[1]))
        elif name == "join" and values:
            self._allow(sum(map(len, values[0])) + len(text) * len(values[0]))
        elif name in ("format", "format_map"):
            self._check_format(text, values)

    def _check_format(self, form: str, values: Iterable[Any]) -> None:
        if _WIDE.search(form):
            raise TemplateError(f"the width in the format {form[:80]!r} is too large, or computed")
        longest = max((len(str(value)) for value in values), default=0)
        self._allow(len(form) + longest * max(form.count("{"), form.count("%")))

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose rounds and results are counted."""
        first = int(getattr(function, "jinja_pass_arg", None) is not None)

        @wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            value, values = args[first], [*args[first + 1 :], *options.values()]
            if name in _PADDED and any(isinstance(v, int) and v > _MAX_WIDTH for v in values):
                raise TemplateError(f"the width of {name} is more than {_MAX_WIDTH:,}")
            if name == "indent":
                width = max((len(v) if isinstance(v, str) else int(v) for v in values), default=4)
                self._allow(len(str(value)) + width * (1 + str.count(str(value), "\n")))
            if name == "format":
                self._check_format(str(value), values)
            if name == "replace":
                self._check_method(value if isinstance(value, str) else str(value), name, values)
            self._spend(len(value) if isinstance(value, str) else 0)
            for _ in range(0 if isinstance(value, str) or not isinstance(value, Sized) else len(value)):
                self._spend()
            if name in _BY_WORDS and isinstance(value, Written):  # these look at characters by other means
                result = function(*args[:first], self._alphabet.restore(value), *args[first + 1 :], **options)
                return self._alphabet.write(result) if isinstance(result, str) else result
            return self._adopt(function(*args, **options))

        return run

    def _join_filter(self, value: Iterable[Any], d: str = "", attribute: Any = None) -> Any:
        """`join`, whose parts are added up before they are joined."""
        items = value if attribute is None else (self.getattr(item, attribute) for item in value)
        parts: list[Any] = []
        for item in items:
            parts += [d, item] if parts else [item]
            self._spend()
        return self._join(parts)

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as transformers writes it for chat templates; the users' characters are escaped, then theirs again."""
        if (len(indent) if isinstance(indent, str) else indent or 0) > _MAX_WIDTH:
            raise TemplateError(f"the indent of tojson is more than {_MAX_WIDTH:,}")
        ready = self._json_ready(value, partial(json.dumps, ensure_ascii=ensure_ascii), sort_keys)
        pieces, size = [], 0
        for piece in json.JSONEncoder(ensure_ascii=False, indent=indent, separators=separators).iterencode(ready):
            pieces.append(piece)
            size += len(piece)
            self._allow(size if size > self._room else 0)
        text = "".join(pieces)
        if ensure_ascii:
            text = re.sub(
                r"[^\x00-\x7f]", lambda m: m[0] if self._alphabet.holds(m[0]) else json.dumps(m[0])[1:-1], text
            )
        return text

    def _json_ready(self, value: Any, quote: Callable[[str], str], sort_keys: bool) -> Any:
        """The same structure with the users' texts as they stand inside JSON's quotation marks."""
        if isinstance(value, Written):
            self._spend(len(value))
            return str(self._alphabet.write(quote(self._alphabet.restore(value))[1:-1]))
        self._spend()
        if isinstance(value, Mapping):
            items = sorted(value.items()) if sort_keys else value.items()
            return {self._json_ready(key, quote, sort_keys): self._json_ready(v, quote, sort_keys) for key, v in items}
        if isinstance(value, (list, tuple)):
            return [self._json_ready(item, quote, sort_keys) for item in value]
        return value


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> Any:
    """The filter `replace`, by the text's own method."""
    text, old, new = (part if isinstance(part, str) else str(part) for part in (text, old, new))
    return text.replace(old, new, -1 if count is None else count)


def _raise_exception(message: Any) -> None:
    """What templates call to refuse messages."""
    raise TemplateError(str(message))
