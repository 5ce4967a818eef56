"""Idempotent registration of a study's chosen model: a logged model, and a version of a registered model.

Both carry tags by which a later delivery finds them: one per chosen trial and its weights, whatever was interrupted.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from orchestrator.tracking.model_export import ExportedModel
from orchestrator.tracking.run_update import UID_DIGITS, ModelRequest
from trainables.specs.short_hash import short_hash

STUDY_TAG = "luthier.study_uid"
MODEL_TAG = "luthier.model_uid"
END_TAG = "luthier.study_end"
"""The end of the study for which the version was chosen; written last, so a version that has it is complete."""
ALIAS = "chosen"
"""Alias of the version that the study chose last: `models:/<name>@chosen`."""


class ModelRegistry:
    """Models of one study on a server. Every method may raise what the client raises, and may then be called again.

    Args:
        client: an `MlflowClient`.
        experiment_id: of the study's experiment.
        study_uid: tag value of the study.
    """

    def __init__(self, client: Any, experiment_id: str, study_uid: str) -> None:
        self.create_in_doubt = False
        """A model or version was created without a response; the server may still do it."""
        self._client = client
        self._experiment_id = experiment_id
        self._study_uid = study_uid

    def has(self, request: ModelRequest) -> bool:
        """Whether the model of a request is registered, complete."""
        return bool(self._versions(f"name = '{request.name}' and tags.`{END_TAG}` = '{request.end}'"))

    def register(self, request: ModelRequest, model: ExportedModel, run_id: str | None) -> bool:
        """Register an exported model.

        Args:
            run_id: of the trial's run.

        Returns:
            Whether the server lacked this version.
        """
        uid = short_hash([self._study_uid, model.trial, request.weights.get(model.trial)], UID_DIGITS)
        logged = self._logged_model(uid, model, run_id)
        versions = self._versions(f"name = '{request.name}' and tags.`{MODEL_TAG}` = '{uid}'")
        version = (
            min(versions, key=_number) if versions else self._new_version(request.name, uid, model, logged, run_id)
        )
        self._client.set_registered_model_alias(request.name, ALIAS, version.version)
        self._client.set_model_version_tag(request.name, version.version, END_TAG, request.end)
        return not versions

    def drop_duplicates(self) -> None:
        """Delete what was created twice because the first response was lost."""
        models = defaultdict(list)
        for logged in self._logged_models(f"tags.`{STUDY_TAG}` = '{self._study_uid}'"):
            models[logged.tags.get(MODEL_TAG)].append(logged)
        for same in models.values():
            for duplicate in sorted(same, key=_completeness)[1:]:
                self._client.delete_logged_model(duplicate.model_id)
        versions = defaultdict(list)
        for version in self._versions(f"tags.`{STUDY_TAG}` = '{self._study_uid}'"):
            versions[version.name, version.tags.get(MODEL_TAG)].append(version)
        for same in versions.values():
            for duplicate in sorted(same, key=_number)[1:]:
                self._client.delete_model_version(duplicate.name, duplicate.version)

    def _logged_model(self, uid: str, model: ExportedModel, run_id: str | None) -> Any:
        """The logged model of an exported one, created and filled if there is none."""
        same = self._logged_models(f"tags.`{MODEL_TAG}` = '{uid}'")
        if same:
            logged = min(same, key=_completeness)
        else:
            tags = {STUDY_TAG: self._study_uid, MODEL_TAG: uid, "trial": str(model.trial), "label": model.label}
            self.create_in_doubt = True  # stays set if no response comes
            logged = self._client.create_logged_model(
                self._experiment_id, f"{model.trial:04d}-{_name_of(model.label)}", run_id, tags, dict(model.params)
            )
            self.create_in_doubt = False
        if not _is_ready(logged):
            self._client.log_model_artifacts(logged.model_id, str(model.folder))
            self._client.finalize_logged_model(logged.model_id, "READY")
        return logged

    def _new_version(self, name: str, uid: str, model: ExportedModel, logged: Any, run_id: str | None) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags = {STUDY_TAG: self._study_uid, MODEL_TAG: uid, "trial": str(model.trial), "label": model.label}
        self.create_in_doubt = True
        # By its location: MLflow's client would look up `models:/<id>` on the server that its process has as default.
        version = self._client.create_model_version(
            name,
            logged.artifact_location,
            run_id,
            tags,
            description=model.reason,
            await_creation_for=0,
            model_id=logged.model_id,
        )
        self.create_in_doubt = False
        return version

    def _logged_models(self, condition: str) -> list[Any]:
        models: list[Any] = []
        token = None
        while True:
            page = self._client.search_logged_models([self._experiment_id], condition, page_token=token)
            models += page
            token = page.token
            if not token:
                return models

    def _versions(self, condition: str) -> list[Any]:
        return list(self._client.search_model_versions(condition))


def _is_ready(logged: Any) -> bool:
    return str(getattr(logged.status, "value", logged.status)) == "READY"


def _completeness(logged: Any) -> tuple[bool, int, str]:
    """Sort key: complete ones first, then the oldest."""
    return not _is_ready(logged), int(logged.creation_timestamp), str(logged.model_id)


def _number(version: Any) -> int:
    return int(version.version)


def _name_of(label: str) -> str:
    """A label without the characters that the name of a logged model must not have."""
    return "".join("_" if character in "/:.%\"'" else character for character in label)
