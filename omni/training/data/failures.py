"""What ends a run, told apart from what costs a row: a full disk is no row's fault, an unreadable film is.

No shapes: nothing here is a tensor.
"""

from __future__ import annotations


class RunError(Exception):
    """Whoever passes over bad rows lets this through: the next row would meet it too."""


class RunOSError(RunError, OSError):
    """Of a disk or folder that all rows share."""


class RunValueError(RunError, ValueError):
    """Of a setting that all rows share."""


def reason(error: Exception) -> str:
    """Why a row cannot be used: the message of an error meant for users; one of another kind is named with its type."""
    if isinstance(error, (ValueError, TypeError, OSError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
