"""A sampler for each entry, which learns from that entry's trials alone.

One sampler over all entries splits the few trials of a search into good and bad ones of all strategies together: it
learns which strategy scores, and little about any strategy's rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

import search_spaces
from orchestrator.search.sampling import make_sampler
from orchestrator.search.stages import Entry

STARTUP = 3
"""Trials of an entry before its sampler learns: its default point and two random ones."""
_INFORMATIVE = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


def entry_parameters(study: optuna.Study, entry: Entry, sampler: str, seed: int) -> dict[str, Any]:
    """Optuna's parameters of a new trial of one entry, as the study's own trials have them.

    Proposed by an Optuna study in memory that holds the entry's trials: a function of these and of the seed, so that a
    resumed search proposes the same.

    Args:
        study: all trials of the search; its parameter `strategy` is the label.
        entry: whose trial it is.
        sampler: one of `orchestrator.search.sampling.SAMPLERS`.
        seed: of this proposal.
    """
    own = optuna.create_study(directions=study.directions, sampler=make_sampler(sampler, seed, STARTUP))
    own.add_trials(_trials_of(study.get_trials(deepcopy=False), entry))
    trial = own.ask()
    search_spaces.suggest(trial, entry.strategy, entry.label, entry.fixed, entry.task)
    return {"strategy": entry.label, **trial.params}


def _trials_of(trials: Sequence[FrozenTrial], entry: Entry) -> list[FrozenTrial]:
    copies = []
    for trial in trials:
        if trial.params.get("strategy") != entry.label or trial.state not in _INFORMATIVE:
            continue
        names = [name for name in trial.params if name.startswith(f"{entry.label}.")]
        copies.append(
            create_trial(
                state=trial.state,
                values=trial.values,
                params={name: trial.params[name] for name in names},
                distributions={name: trial.distributions[name] for name in names},
                intermediate_values=trial.intermediate_values,
            )
        )
    return copies
