"""One run of a study on a cluster: Tune runs the trials, the searcher proposes them, the journal hears everything."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import redact
from orchestrator.planning.build import entries_of, make_scheduler, metric_of, planned_units, stages_of
from orchestrator.planning.estimates import count_trials
from orchestrator.planning.fsr import Hints, lambda_hints
from orchestrator.record.changes import check_changes, versions
from orchestrator.record.checkpoints import checkpoint_folder, keep_now, tidy
from orchestrator.running.failure_policy import disk_explained
from orchestrator.running.measure import record_fsr
from orchestrator.study_file.yaml_text import write_yaml

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.record.journal import Journal
    from orchestrator.running.progress import Progress
    from orchestrator.search.searcher import StudySearcher
    from orchestrator.search.stages import Stage
    from orchestrator.study_file.schema import StudySpec
    from trainables.data.store import Store
    from trainables.specs.trial_spec import Task

log = logging.getLogger("luthier")

KEEPING_SECONDS = 5.0
"""How long Ctrl-C waits for the running trials' checkpoints; a cloud gives little more time before it takes a
machine."""


@dataclass(frozen=True)
class Drive:
    """What one run needs: the study, its folder, its data and what all trials share."""

    spec: StudySpec
    folder: Path
    store: Store
    task: Task
    progress: bool = True
    stages: Sequence[Stage] | None = None
    """Run these alone, without the search; None = the whole study."""
    allow_change: Collection[str] = ()
    """Keys that may differ from the last run (`orchestrator.record.changes`)."""

    def run(self) -> None:
        """Run or continue the study until its trials are done; Ctrl-C leaves a study that can be continued.

        Raises:
            JournalError: another process runs this study; nothing was touched.
            ChangedStudyError: it is not the study that was run last; nothing was touched.
            DiskError: the folder's disk is full or fails.
        """
        from orchestrator.cluster.connection import connect
        from orchestrator.record.journal import Journal, fold
        from orchestrator.running.journal_callback import close_open_trials
        from orchestrator.running.measure import measure_start

        with disk_explained(self.folder), contextlib.ExitStack() as opened:
            journal = opened.enter_context(Journal(self.folder / "journal.jsonl"))  # one driver: before all else
            changed = check_changes(journal.events(), self._facts(), self.allow_change)
            hints = lambda_hints(self.spec, self.folder, self.store.digest) if self.stages is None else Hints()
            (self.folder / "study.yaml").write_text(write_yaml(plain_spec(self.spec)))
            cluster = opened.enter_context(connect())
            request = cluster.trial_resources(self.spec.resources.cpus, self.spec.resources.gpus)
            cluster.check_shared(self.folder, self.task.store)
            concurrent = cluster.concurrency(self.spec.resources.concurrent, request["cpu"], request["gpu"])
            close_open_trials(journal)  # of a driver that died without a word
            tidy(self.folder, fold(journal.events()))
            with self._followed(journal) as progress, self._ending(journal):
                resources = {**request, "concurrent": concurrent}
                told = {change.key: [change.was, change.now] for change in changed}
                journal.append("study_started", **self._facts(), resources=resources, changed=told, **hints.fields())
                if self.stages is None:
                    measure_start(self.spec, self.task, journal, request)
                searcher = self._searcher(journal, hints, any(not change.harmless for change in changed))
                self._tune(journal, searcher, progress, request, concurrent)
                record_fsr(journal)

    def _tune(
        self,
        journal: Journal,
        searcher: StudySearcher,
        progress: Progress | None,
        request: dict[str, float],
        concurrent: int,
    ) -> None:
        from ray import tune

        from orchestrator.record.journal import fold
        from orchestrator.running.failure_policy import FailureGate
        from orchestrator.running.journal_callback import RecordCallback
        from orchestrator.running.ray_internals import (
            HeadWatch,
            lost_actors_are_failed_attempts,
            nowhere,
            tune_keeps_no_files,
        )
        from orchestrator.running.watchdog import Watchdog
        from trainables.engine.tune_trainable import Trial

        known, limits = fold(journal.events()), self.spec.failures
        watchdog = Watchdog(limits, asdict(self.task), known)
        errors: dict[str, str] = {}
        callback = RecordCallback(journal, progress, self.folder, watchdog.verdicts, errors)
        gate = FailureGate(limits.stop_after, limits.stop_share)
        journal.subscribe(gate.event)
        tuner = tune.Tuner(
            tune.with_resources(Trial, request),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=make_scheduler(self.spec, known),
                num_samples=-1,
                max_concurrent_trials=concurrent,
                reuse_actors=True,
                trial_dirname_creator=_trial_folder,
            ),
            run_config=tune.RunConfig(
                name="ray",
                **nowhere(),
                callbacks=[callback, watchdog, HeadWatch()],
                stop=gate,
                failure_config=tune.FailureConfig(max_failures=limits.retries),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False, checkpoint_frequency=0),
                verbose=0,
            ),
        )
        try:
            with lost_actors_are_failed_attempts(), tune_keeps_no_files(errors):
                tuner.fit()
        except KeyboardInterrupt:
            running = [record.number for record in fold(journal.events()) if record.state == "running"]
            keep_now(self.folder, running, KEEPING_SECONDS)
            raise
        finally:
            searcher.close()
            for problem in callback.problems:
                log.error("The journal of this run is incomplete: %s", problem)
        gate.check()

    def _searcher(self, journal: Journal, hints: Hints, changed: bool) -> StudySearcher:
        from orchestrator.search.searcher import StudySearcher

        spec = self.spec
        return StudySearcher(
            entries=entries_of(spec),
            task=self.task,
            url=f"sqlite:///{self.folder}/optuna.db",
            study_name=spec.name,
            trials=spec.search.trials,
            sampler=spec.search.sampler,
            seed=spec.search.seed,
            metric=metric_of(spec),
            stages=stages_of(spec, self.task, self.store) if self.stages is None else self.stages,
            journal=journal,
            hints=hints.values,
            searching=self.stages is None,
            checkpoints=functools.partial(checkpoint_folder, self.folder),
            changed=changed,
        )

    def _facts(self) -> dict[str, Any]:
        """What the study is, for the journal and for later runs to be compared with."""
        return {
            "study": self.spec.name,
            "spec": plain_spec(self.spec),
            "backbone": self.task.model.name,
            "dataset": self.spec.data.source,
            "dataset_digest": self.store.digest,
            "images_left_out": len(self.store.manifest.get("quarantine") or ()),
            "images_leaked": (self.store.manifest.get("duplicates") or {}).get("leaks_groups", 0),
            "classes": len(self.store.classes),
            "classes_present": {s: len(c) for s, c in (self.store.manifest.get("class_counts") or {}).items()},
            "seed": self.spec.search.seed,
            "epochs": self.task.epochs,
            "versions": versions(),
        }

    @contextlib.contextmanager
    def _followed(self, journal: Journal) -> Iterator[Progress | None]:
        """MLflow and the progress display, as long as the study runs."""
        from orchestrator.running.progress import Progress
        from orchestrator.running.tracking_process import follow

        shown = None
        if self.progress:
            counts, units = count_trials(self.spec), planned_units(self.task)
            trials = counts.total if self.stages is None else None
            shown = Progress(trials=trials, epochs=self.task.epochs, units=units)
            journal.subscribe(shown.event)
        with follow(self.spec, journal), shown or contextlib.nullcontext():
            yield shown

    @contextlib.contextmanager
    def _ending(self, journal: Journal) -> Iterator[None]:
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
    """A study's fields as JSON values, without passwords: they end up in files that people pass on."""
    fields: dict[str, Any] = spec.model_dump(mode="json")
    if spec.tracking.uri:
        fields["tracking"]["uri"] = redact(spec.tracking.uri)
    return fields


def _trial_folder(trial: Any) -> str:
    return f"trial-{trial.config['_number']:04d}-{trial.config['label'] or trial.config['strategy']}"
