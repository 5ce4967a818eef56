"""The driver side of Luthier: study files, search, records and reports.

The public interface is `luthier` (`from luthier import Study`); this package may change with any release. `Study` here
is the same class, for the project's own tests and benchmarks, loaded on first use so that `import orchestrator` (and
`luthier --help`) stays fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.study import Study

__all__ = ["Study"]


def __getattr__(name: str) -> Any:
    if name == "Study":
        from orchestrator.study import Study

        return Study
    raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")
