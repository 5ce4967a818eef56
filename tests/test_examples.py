"""The study files that people copy are valid, and can be planned without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier import Study
from orchestrator.study_file.load import load_study
from orchestrator.study_file.yaml_text import read_yaml
from tests.support.images import write_plain_images

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))


def test_every_example_is_listed() -> None:
    text = (EXAMPLES / "README.md").read_text()
    assert len(FILES) == 6
    assert [file.name for file in FILES if f"[{file.name}]({file.name})" not in text] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_is_valid(file: Path) -> None:
    spec = load_study(file)
    assert spec.search.trials >= len(spec.strategies)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_can_be_planned(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With images in place of the folders that only exist at the reader's, and machines of its own size."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    fields = read_yaml(file).data | {"storage": str(tmp_path / "studies"), "tracking": {}}
    if "root" in fields["data"]:
        domains = [*fields["data"]["id"], *fields["data"]["ood"]]
        images = {f"{domain}/{label}": 9 for domain in domains for label in ("a", "b")}
        fields["data"]["root"] = str(write_plain_images(tmp_path / "images", images))
    planned = Study(**fields).plan().to_dict()
    assert [entry["label"] for entry in planned["entries"]] == [entry.label for entry in load_study(file).strategies]
    assert planned["search_trials"] == fields["search"]["trials"]
    assert not (tmp_path / "studies").exists()
