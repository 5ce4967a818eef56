"""One run of a study on a cluster.

The searcher proposes trials, Tune runs them, every event is journalled.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from orchestrator.cluster.connection import connect
from orchestrator.errors import redact
from orchestrator.planning.build import make_promotions, make_scheduler, planned_units, retention_of, settings_of
from orchestrator.planning.estimates import count_trials
from orchestrator.planning.fsr import Hints, lambda_hints
from orchestrator.planning.warm_start import warm_start_of
from orchestrator.ray_internals import (
    actor_failures_as_trial_failures,
    in_memory_tune_storage,
    without_tune_files,
)
from orchestrator.record.changes import check_changes, versions
from orchestrator.record.checkpoints import checkpoint_folder, keep_now, tidy
from orchestrator.record.journal import Journal, fold
from orchestrator.record.kept_files import tidy_kept
from orchestrator.record.records import WARM_START
from orchestrator.running.cluster_watch import ClusterWatch
from orchestrator.running.failure_policy import CircuitBreaker, is_out_of_memory, report_disk_errors
from orchestrator.running.journal_callback import RecordCallback, close_open_trials, withdraw_trials
from orchestrator.running.measure import measure_start, record_fsr, with_layout
from orchestrator.running.progress import Progress
from orchestrator.running.tracking_process import follow
from orchestrator.running.watchdog import Watchdog
from orchestrator.search.searcher import StudySearcher
from orchestrator.search.warm_start import WarmStart
from orchestrator.study_file.yaml_text import write_yaml
from trainables.engine.tune_trainable import TuneTrainable
from trainables.models.backbone import DataConfig, backbone_data_config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from orchestrator.record.records import TrialRecord
    from orchestrator.search.promotion import Promotions
    from orchestrator.search.stages import Stage
    from orchestrator.study_file.schema import StudySpec
    from trainables.data.store import Store
    from trainables.specs.trial_spec import SharedTrialSettings

log = logging.getLogger("luthier")

CHECKPOINT_WAIT_S = 5.0
"""Seconds that Ctrl-C waits for the running trials' checkpoints; a preempted cloud machine gets little more."""


@dataclass(frozen=True)
class StudyRun:
    """One run of a study: specification, folder, data and shared settings."""

    spec: StudySpec
    folder: Path
    store: Store
    task: SharedTrialSettings
    """`make_task` of the study; the memory layout is decided on the cluster."""
    stages: Callable[[SharedTrialSettings], Sequence[Stage]]
    """What runs after the search, given the settings of its trials."""
    search: bool = True
    """Whether trials are searched; False = the stages alone."""
    progress: bool = True
    allow_change: Collection[str] = ()
    """Keys that may differ from the last run (`orchestrator.record.changes`)."""

    def run(self) -> None:
        """Run or continue the study until its trials are done.

        After Ctrl-C it can be continued.

        Raises:
            JournalError: another process runs this study; nothing was written.
            ChangedStudyError: the study in the folder is another one; nothing was written.
            DiskError: the folder's disk is full or fails.
        """
        with report_disk_errors(self.folder), contextlib.ExitStack() as opened:
            # The journal's lock admits one driver, so it comes before anything that writes.
            journal = opened.enter_context(Journal(self.folder / "journal.jsonl"))
            changed = check_changes(journal.events(), self._facts(), self.allow_change)
            hints = lambda_hints(self.spec, self.folder, self.store.digest) if self.search else Hints()
            warm_start = warm_start_of(self.spec, journal.events()) if self.search else WarmStart()
            # After the check: a refused run leaves the copy of the study that the folder holds.
            (self.folder / "study.yaml").write_text(write_yaml(plain_spec(self.spec)))
            cluster = opened.enter_context(connect(nice=self.spec.resources.nice or 0))
            if not cluster.started:
                _explain_niceness(self.spec.resources.nice)
            request = cluster.trial_resources(self.spec.resources.cpus, self.spec.resources.gpus)
            cluster.check_shared(self.folder, self.task.store)
            concurrent = cluster.concurrency(self.spec.resources.concurrent, request["cpu"], request["gpu"])
            close_open_trials(journal)  # left open by a driver that crashed
            tidy(self.folder, fold(journal.events()))
            for record in tidy_kept(self.folder, fold(journal.events()), retention_of(self.spec)):
                journal.append("weights_discarded", trial_id=record.trial_id, why="superseded")
            with self._followed(journal) as progress, self._ending(journal):
                resources = {**request, "concurrent": concurrent}
                changes = {change.key: [change.was, change.now] for change in changed}
                journal.append("study_started", **self._facts(), resources=resources, changed=changes, **hints.fields())
                if warm_start.studies and not warm_start.is_last_of(journal.events()):
                    journal.append(WARM_START, **warm_start.fields())
                if self.search:
                    measure_start(self.spec, self.task, journal, request)
                task = with_layout(self.spec, self.task, journal, request)
                # One state of the rungs for searcher, scheduler and journal.
                promotions = make_promotions(self.spec, fold(journal.events()))
                restarted = any(not change.harmless for change in changed)
                searcher = self._searcher(task, journal, hints, warm_start, restarted, promotions)
                self._tune(task, journal, searcher, promotions, progress, request, concurrent)
                if self.search:  # the stages alone ask for none of the search's trials
                    withdraw_trials(journal, self.folder)
                record_fsr(journal)

    def _tune(
        self,
        task: SharedTrialSettings,
        journal: Journal,
        searcher: StudySearcher,
        promotions: Promotions | None,
        progress: Progress | None,
        request: dict[str, float],
        concurrent: int,
    ) -> None:
        history = fold(journal.events())
        limits = self.spec.failures
        watchdog = Watchdog(limits, asdict(task), history)
        errors: dict[str, str] = {}
        retention = retention_of(self.spec)
        callback = RecordCallback(journal, progress, self.folder, watchdog.verdicts, errors, retention, promotions)
        breaker = CircuitBreaker(limits.stop_after, limits.stop_share)
        journal.subscribe(breaker.event)
        tuner = tune.Tuner(
            tune.with_resources(TuneTrainable, request),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=make_scheduler(self.spec, history, promotions),
                # No limit for Tune: the searcher ends the run.
                num_samples=-1,
                max_concurrent_trials=concurrent,
                # A process keeps opened data and pretrained weights for its next trial.
                reuse_actors=True,
                trial_dirname_creator=_trial_folder,
            ),
            run_config=tune.RunConfig(
                name="ray",
                **in_memory_tune_storage(),
                callbacks=[callback, watchdog, ClusterWatch()],
                stop=breaker,
                failure_config=tune.FailureConfig(max_failures=limits.retries),
                # Trials write checkpoints of their own; Tune's would be a second copy.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False, checkpoint_frequency=0),
                verbose=0,
            ),
        )
        try:
            with actor_failures_as_trial_failures(is_out_of_memory), without_tune_files(errors):
                tuner.fit()
        except KeyboardInterrupt:
            running = [record.number for record in fold(journal.events()) if record.state == "running"]
            # Actors are still alive here, and write what they trained since their last checkpoint.
            keep_now(self.folder, running, CHECKPOINT_WAIT_S)
            raise
        finally:
            searcher.close()
            for problem in callback.problems:
                log.error("The journal of this run is incomplete: %s", problem)
        # A Stopper that ends a run is no error for Tune: `fit` returns as if the study were complete.
        breaker.check()

    def _searcher(
        self,
        task: SharedTrialSettings,
        journal: Journal,
        hints: Hints,
        warm_start: WarmStart,
        changed: bool,
        promotions: Promotions | None,
    ) -> StudySearcher:
        spec = self.spec
        return StudySearcher(
            settings_of(spec, task, hints.values, warm_start),
            url=f"sqlite:///{self.folder}/optuna.db",
            study_name=spec.name,
            stages=self.stages(task),
            journal=journal,
            searching=self.search,
            promotions=promotions,
            checkpoints=functools.partial(checkpoint_folder, self.folder),
            kept=self._keys,
            changed=changed,
        )

    def _keys(self, record: TrialRecord) -> dict[str, Any]:
        """Keys of a trial's config beside its specification and its checkpoints."""
        return {**retention_of(self.spec).paths(self.folder, record), "_nice": self.spec.resources.nice}

    def _facts(self) -> dict[str, Any]:
        """What identifies the study: recorded in the journal, and compared by later runs."""
        return {
            "study": self.spec.name,
            "spec": plain_spec(self.spec),
            "backbone": self.task.model.name,
            "dataset": self.spec.data.source,
            "dataset_digest": self.store.digest,
            "images_left_out": len(self.store.manifest.get("quarantine") or ()),
            "images_leaked": (self.store.manifest.get("duplicates") or {}).get("leaks_groups", 0),
            "copies": (self.store.manifest.get("request") or {}).get("copies", "apart"),
            "view": asdict(self._view()),
            "classes": len(self.store.classes),
            "classes_present": {s: len(c) for s, c in (self.store.manifest.get("class_counts") or {}).items()},
            "seed": self.spec.search.seed,
            "epochs": self.task.epochs,
            "versions": versions(),
        }

    def _view(self) -> DataConfig:
        return backbone_data_config(self.task.model, self.task.image_size, self.task.view)

    @contextlib.contextmanager
    def _followed(self, journal: Journal) -> Iterator[Progress | None]:
        """Run MLflow's delivery and the progress display for the length of a block."""
        display = None
        if self.progress:
            trials = count_trials(self.spec).total if self.search else None
            display = Progress(trials=trials, epochs=self.task.epochs, units=planned_units(self.task))
            journal.subscribe(display.event)
        with follow(self.spec, journal), display or contextlib.nullcontext():
            yield display

    @contextlib.contextmanager
    def _ending(self, journal: Journal) -> Iterator[None]:
        """Record how the block ended."""
        try:
            yield
        except KeyboardInterrupt:
            journal.append("study_finished", state="interrupted")
            raise
        except BaseException:
            journal.append("study_finished", state="failed")
            raise
        journal.append("study_finished", state="complete")


def plain_spec(spec: StudySpec) -> dict[str, Any]:
    """A study's fields as JSON values, without passwords: their files are passed on."""
    fields: dict[str, Any] = spec.model_dump(mode="json")
    if spec.tracking.uri:
        fields["tracking"]["uri"] = redact(spec.tracking.uri)
    return fields


def _explain_niceness(nice: int | None) -> None:
    """Log what `resources.nice` can do in a cluster that was started elsewhere."""
    if nice is not None:
        log.warning(
            "resources.nice is %d, but the cluster was started elsewhere, with a niceness of its workers of its own "
            "(15, unless RAY_worker_niceness was set there): trials raise theirs to %d, and cannot lower it.",
            nice,
            nice,
        )


def _trial_folder(trial: Any) -> str:
    return f"trial-{trial.config['_number']:04d}-{trial.config['label'] or trial.config['strategy']}"
