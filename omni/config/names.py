"""Things of a module by name, `package.module:Name` as in an entry point, imported when they are first needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_name(name: str) -> Any:
    """What `package.module:Name` stands for. Raises ValueError where the form is another or nothing has that name."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"{name!r} has no form module:name, for example my_package.my_module:MyClass")
    try:
        found = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ImportError as error:
        raise ValueError(f"{name!r} cannot be imported: {error}; is its folder in PYTHONPATH?") from error
    except AttributeError as error:
        raise ValueError(f"module {module!r} has no {attribute!r}") from error
    return found
