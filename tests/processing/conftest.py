"""Tests that describe what is not there yet: each file names them in PENDING, and they have to fail until it is."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        pending = getattr(getattr(item, "module", None), "PENDING", ())
        if item.name in pending or item.name.split("[")[0] in pending:
            item.add_marker(
                pytest.mark.xfail(strict=True, reason="described first; the reading of media is mended next")
            )
