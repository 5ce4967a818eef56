"""Code blocks of the documents, so that tests run exactly what a reader copies."""

from __future__ import annotations

import re

from tests.support.source_tree import ROOT

_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
_FILE = re.compile(r"\*\*\d+\. `([^`]+)`[^\n]*\*\*.*?```python\n(.*?)```", re.DOTALL)


def code_blocks(page: str) -> list[str]:
    """The Python blocks of a page, in order."""
    return _BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


def files_of(page: str) -> dict[str, str]:
    """Path → contents of the files that a page tells its reader to write: `**1. `path`: why.**`, then a block."""
    return dict(_FILE.findall((ROOT / page).read_text(encoding="utf-8")))
