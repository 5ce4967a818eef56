"""A sampler for each entry, which learns from that entry's trials alone.

One sampler over all entries splits the few trials of a search into good and bad ones of all strategies together: it
learns which strategy scores, and little about any strategy's rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

import search_spaces
from orchestrator.search.sampling import make_sampler
from orchestrator.search.stages import Entry
from orchestrator.search.warm_start import EARLIER, normal_scores, sampled, spread

if TYPE_CHECKING:
    from orchestrator.search.warm_start import EarlierTrial

STARTUP = 3
"""Trials of an entry before its sampler learns: its default point and two random ones."""
_INFORMATIVE = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


def entry_parameters(
    study: optuna.Study, entry: Entry, sampler: str, seed: int, earlier: Sequence[EarlierTrial] = ()
) -> dict[str, Any]:
    """Optuna's parameters of a new trial of one entry, as the study's own trials have them.

    Proposed by an Optuna study in memory that holds the entry's trials: a function of these and of the seed, so that a
    resumed search proposes the same.

    Args:
        study: all trials of the search; its parameter `strategy` is the label.
        entry: whose trial it is.
        sampler: one of `orchestrator.search.sampling.SAMPLERS`.
        seed: of this proposal.
        earlier: trials of earlier studies (`orchestrator.search.warm_start`), for one objective.
    """
    entry_study = optuna.create_study(directions=study.directions, sampler=make_sampler(sampler, seed, STARTUP))
    trials = _trials_of(study.get_trials(deepcopy=False), entry)
    entry_study.add_trials(with_earlier(trials, entry, earlier))
    trial = entry_study.ask()
    search_spaces.suggest(trial, entry.strategy, entry.label, entry.fixed, entry.task)
    return {"strategy": entry.label, **trial.params}


def with_earlier(
    trials: Sequence[FrozenTrial], entry: Entry, earlier: Sequence[EarlierTrial], prefix: str | None = None
) -> list[FrozenTrial]:
    """An entry's trials for its sampler, filled up to `EARLIER` with those of earlier studies.

    Where there are any, the objectives of both are normal scores among their own kind. With `EARLIER` or more trials of
    its own the entry has them as they are.

    Args:
        trials: of the present study.
        entry: whose trials they are.
        earlier: those that the entry could not propose any more are left out.
        prefix: of the parameters' names; None = the label and a dot.
    """
    taken = []
    before = f"{entry.label}." if prefix is None else prefix
    for past in spread(earlier, max(0, EARLIER - len(trials))):
        choice = sampled(entry, past.hparams)
        if choice is not None:
            params = {f"{before}{key}": value for key, value in choice.values.items()}
            distributions = {f"{before}{key}": space for key, space in choice.distributions.items()}
            taken.append(create_trial(value=past.score, params=params, distributions=distributions))
    if not taken:
        return list(trials)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    scores = dict(zip(map(id, complete), normal_scores([trial.value or 0.0 for trial in complete]), strict=True))
    # Pruned trials keep their values: Optuna ranks them among each other only.
    return [*taken, *(_with_value(trial, scores[id(trial)]) if id(trial) in scores else trial for trial in trials)]


def _with_value(trial: FrozenTrial, value: float) -> FrozenTrial:
    return create_trial(
        value=value,
        params=trial.params,
        distributions=trial.distributions,
        intermediate_values=trial.intermediate_values,
    )


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
