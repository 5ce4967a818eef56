"""A trial's process makes way for others where it is told to, and never takes it from them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os
import threading
from trainables.engine.niceness import raise_niceness

os.nice({own})
raise_niceness({nice})
inherited = []
thread = threading.Thread(target=lambda: inherited.append(os.getpriority(os.PRIO_PROCESS, 0)))
thread.start()
thread.join()
print(os.getpriority(os.PRIO_PROCESS, 0) - {before}, inherited[0] - {before})
"""


@pytest.mark.parametrize(("own", "above", "expected"), [(0, 3, 3), (2, 0, 2), (2, 4, 4), (0, 0, 0)])
def test_niceness_is_raised_and_never_lowered(own: int, above: int, expected: int) -> None:
    before = int(subprocess.check_output([sys.executable, "-c", "import os; print(os.nice(0))"]))
    if before + 4 > 19:
        pytest.skip("the tests themselves run at the highest niceness")
    script = SCRIPT.format(own=own, nice=before + above, before=before)
    printed = subprocess.check_output([sys.executable, "-c", script], text=True, cwd=Path(__file__).parents[3])
    assert printed.split() == [str(expected)] * 2
