"""The study file's section `failures`: how often a trial is tried again, what a hang is, when a study gives up."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.study_file.section import Section


class FailuresSpec(Section):
    """What happens to trials that die, hang or fail."""

    retries: Annotated[int, Field(ge=0)] = 2
    """How often a trial whose process or machine died, or that hung, is tried again from its last checkpoint within one
    run. A process that Ray ended because its machine ran out of memory costs no retry, once per unit: its neighbour may
    have taken the memory. Errors of the trial itself are not tried again: they would happen again."""
    stall_factor: Annotated[float, Field(gt=1)] | None = 3.0
    """A trial hangs if a unit takes longer than this many times the median of its own units of the same kind (or the
    slowest such unit of another trial of its entry, where it has done none), and longer than its slowest unit of any
    kind. Doubled at each retry for that. null = hung trials are waited for."""
    stall_floor: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that any unit may take, however fast the others were."""
    stall_first: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds that a unit may take whose kind nobody has done yet: the first one, which loads the network, and the
    first that ends with an evaluation."""
    stop_after: Annotated[int, Field(ge=1)] | None = 5
    """Trials that failed for good and for one reason after which the study is stopped, if they are many enough
    (`stop_share`). Counted within one run. null = it goes on whatever fails."""
    stop_share: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of all trials started that these failures must be. The default lets a study of two strategies go on of
    which one always fails."""
