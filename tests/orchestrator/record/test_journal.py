"""The journal keeps every acknowledged event, whatever happens to its writer."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.record.journal import Journal, JournalError, JournalWriteError, fold, read_from
from orchestrator.record.records import study_header, unfinished


def suggest(journal: Journal, trial_id: str = "a", number: int = 0, **fields: Any) -> None:
    defaults = {"strategy": "daft", "label": "daft", "hparams": {"lr_head": 0.1}, "seed": 0, "role": "search"}
    defaults |= {"held_out": None, "config_hash": f"hash{number}", "search_values": {"daft.lr_head": 0.1}}
    journal.append("trial_suggested", **(defaults | {"trial_id": trial_id, "number": number} | fields))


def test_events_are_read_as_they_were_written(tmp_path: Path) -> None:
    with Journal(tmp_path / "deep" / "journal.jsonl") as journal:
        first = journal.append("study_started", study="pets", spec={"ids": ("a", "b")}, path=tmp_path)
        second = journal.append("result", trial_id="t", unit=np.int64(3), metrics={"val/acc": np.float32(0.5)})
    events = Journal.read(journal.path)
    assert events == [first, second]
    assert [event["seq"] for event in events] == [0, 1]
    assert events[0]["spec"] == {"ids": ["a", "b"]}
    assert events[0]["path"] == str(tmp_path)
    assert (events[1]["unit"], events[1]["metrics"]) == (3, {"val/acc": 0.5})


def test_a_journal_of_another_format_is_refused_and_one_without_is_of_the_first(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl") as journal:
        assert journal.append("study_started", study="pets")["format"] == 1
    event = {"seq": 0, "time": 0.0, "kind": "study_started", "study": "pets"}
    journal.path.write_text(json.dumps(event) + "\n")
    assert Journal.read(journal.path) == [event]
    journal.path.write_text(json.dumps(event | {"format": 2}) + "\n")
    for open_it in (Journal, Journal.read):
        with pytest.raises(JournalError) as caught:
            open_it(journal.path)
        assert str(caught.value) == (
            f"This Luthier reads journals of format 1, but {journal.path} has format 2. Use the Luthier that wrote it, "
            "or a newer one."
        )


def test_lines_are_strict_json_and_numbers_that_are_not_finite_come_back_as_nan(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        suggest(journal)
        journal.append("result", trial_id="a", unit=1, metrics={"train/loss": math.nan, "val/acc": math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in journal.path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    (record,) = fold(journal.events())
    assert math.isnan(record.metrics["train/loss"])
    assert record.metric("val/acc") is None


@given(share=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_a_file_cut_anywhere_keeps_its_whole_lines_and_can_be_continued(
    share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "journal.jsonl"
    with Journal(path) as journal:
        for number in range(4):
            journal.append("note", text="ü" * number)
    whole = path.read_bytes()
    cut = round(share * len(whole))
    path.write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    assert [event["seq"] for event in Journal.read(path)] == list(range(kept))
    with Journal(path) as journal:
        journal.append("note", text="after")
    assert [event["seq"] for event in Journal.read(path)] == list(range(kept + 1))
    assert path.read_bytes().startswith(b"".join(whole.splitlines(keepends=True)[:kept]))


def test_a_last_line_of_rubbish_is_dropped(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.append("note")
    with open(journal.path, "ab") as file:
        file.write(b"\0" * 100 + b"\n")
    assert len(Journal.read(journal.path)) == 1
    with Journal(tmp_path / "j") as journal:
        assert journal.append("note")["seq"] == 1
    assert len(Journal.read(journal.path)) == 2


def test_a_damaged_line_inside_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        for _ in range(3):
            journal.append("note")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"seq": 1}\n' + lines[2])
    message = (
        f"Every line of a journal is one JSON event, but the one at byte {len(lines[0])} of {path} is damaged "
        "(not an event). Restore the file from a copy, or cut it off before that line."
    )
    with pytest.raises(JournalError, match=f"^{re.escape(message)}$"):
        Journal.read(path)


def test_s6_no_flipped_bit_of_a_journal_is_believed(tmp_path: Path) -> None:
    """A digit of an accuracy, a letter of a key: as good JSON as the right ones. What follows the last whole line may
    be cut off as torn: one event, or two where the newline between them is another byte."""
    with Journal(tmp_path / "j") as journal:
        suggest(journal)
        journal.append("result", trial_id="a", unit=1, metrics={"val/acc": 0.8125})
        journal.append("trial_finished", trial_id="a", state="complete")
    content = journal.path.read_bytes()
    whole = journal.events()
    believed = []
    refused = 0
    for bit in range(0, 8 * len(content), 3):  # two or three of every byte
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        journal.path.write_bytes(changed)
        try:
            recovered = Journal.read(journal.path)
        except JournalError:
            refused += 1
            continue
        common = [
            {k: v for k, v in event.items() if k in right} for event, right in zip(recovered, whole, strict=False)
        ]
        if common != whole[: len(common)] or len(common) < len(whole) - 2:
            believed.append((bit, recovered))
    assert believed == []
    assert refused > len(content)


def test_a_journal_of_before_lines_had_checksums_is_read(tmp_path: Path) -> None:
    (tmp_path / "j").write_text('{"seq": 0, "time": 1.0, "kind": "note", "text": "é"}\n')
    with Journal(tmp_path / "j") as journal:
        journal.append("note", text="ü")
    assert [event["text"] for event in Journal.read(journal.path)] == ["é", "ü"]
    assert re.search(rb', "crc": "[0-9a-f]{8}"}\n$', journal.path.read_bytes())


def test_p10_two_writers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    message = (
        f"A study is written by one process at a time, but another one holds {path}. "
        "Wait until it ends, or use another name or storage for this study."
    )
    with Journal(path) as journal:
        with pytest.raises(JournalError, match=f"^{re.escape(message)}$"):
            Journal(path)
        journal.append("note")
    with Journal(path) as journal:
        assert journal.append("note")["seq"] == 1


def test_every_acknowledged_event_survives_sigkill_of_the_writer(tmp_path: Path) -> None:
    program = (
        "import sys; from orchestrator.record.journal import Journal\n"
        "journal = Journal(sys.argv[1])\n"
        "while True: print(journal.append('note', text='x' * 3000)['seq'], flush=True)\n"
    )
    path = tmp_path / "j"
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        acknowledged = [int(writer.stdout.readline()) for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]
    numbers = [event["seq"] for event in Journal.read(path)]
    assert numbers[: len(acknowledged)] == acknowledged
    with Journal(path) as journal:  # its lock died with it
        assert journal.append("note")["seq"] == len(Journal.read(path)) - 1


def test_s1_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.append("note")
        before = journal.path.read_bytes()
        real = os.write

        def half(descriptor: int, data: Any) -> int:
            if len(data) < 10:
                raise OSError(28, "No space left on device")
            return real(descriptor, bytes(data)[: len(data) // 2])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half)
            with pytest.raises(JournalWriteError, match="No space left") as error:
                journal.append("note", text="x" * 100)
            assert error.value.errno == 28
        assert journal.path.read_bytes() == before
        assert journal.append("note")["seq"] == 1
    assert [event["seq"] for event in Journal.read(journal.path)] == [0, 1]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_s4_an_event_that_the_disk_refuses_once_is_written_all_the_same(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, call)
    refused = []

    def once(*arguments: Any) -> Any:
        if not refused:
            refused.append(arguments)
            raise OSError(5, "Input/output error")
        return real(*arguments)

    with Journal(tmp_path / "j") as journal:
        journal.append("note")
        monkeypatch.setattr(os, call, once)
        journal.append("note", text="followed")
        journal.append("note")
    assert refused
    assert [event["seq"] for event in Journal.read(journal.path)] == [0, 1, 2]


def test_a_pickled_journal_is_its_path(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        suggest(journal)
        journal.subscribe(print)
        copy = pickle.loads(pickle.dumps(journal))  # noqa: S301  # what Tune does to its callbacks
    assert copy.append("note")["seq"] == 1
    assert copy.knows("a")
    copy.close()


def test_threads_append_and_read_at_the_same_time(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        writers = [threading.Thread(target=lambda: [journal.append("note") for _ in range(40)]) for _ in range(4)]
        for writer in writers:
            writer.start()
        offset = 0
        seen = []
        while any(writer.is_alive() for writer in writers) or len(seen) < 160:
            events, offset = read_from(journal.path, offset)
            seen += [event["seq"] for event in events]
            assert seen == list(range(len(seen)))
        for writer in writers:
            writer.join()
    assert len(seen) == 160


def test_listeners_receive_every_event_and_cannot_stop_it(tmp_path: Path) -> None:
    received: list[int] = []

    def broken(event: dict[str, Any]) -> None:
        raise RuntimeError("no")

    def listen(event: dict[str, Any]) -> None:
        received.append(event["seq"])

    with Journal(tmp_path / "j") as journal:
        for listener in (broken, listen, listen):
            journal.subscribe(listener)
        journal.append("note")
        journal.append("note")
    assert received == [0, 1]


def test_fold_tells_the_state_of_every_trial(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        for number, trial_id in enumerate("dcba"):
            suggest(journal, trial_id, number)
        for trial_id in "dcb":
            journal.append("trial_started", trial_id=trial_id, node=None, pid=None)
            journal.append("result", trial_id=trial_id, unit=1, metrics={"val/acc": 0.5, "cost/x": 1}, node="n1")
        journal.append("result", trial_id="d", unit=2, metrics={"val/acc": 0.75})
        journal.append("checkpoint", trial_id="d", unit=2, path="/ckpt")  # only in journals of earlier versions
        journal.append("trial_finished", trial_id="d", state="complete")
        journal.append("trial_failed", trial_id="c", reason="nan", error="NonFiniteError: loss")
        journal.append("something_new", trial_id="d")
        journal.append("result", trial_id="unknown", unit=1, metrics={})
    done, failed, running, waiting = fold(journal.events())
    assert [r.state for r in (done, failed, running, waiting)] == ["complete", "failed", "running", "suggested"]
    assert (done.trial_id, done.number, done.unit, done.node) == ("d", 0, 2, "n1")
    assert done.metrics == {"val/acc": 0.75, "cost/x": 1.0}
    assert done.history == ({"unit": 1.0, "val/acc": 0.5, "cost/x": 1.0}, {"unit": 2.0, "val/acc": 0.75})
    assert (failed.reason, failed.error) == ("nan", "NonFiniteError: loss")
    assert [record.number for record in unfinished(journal.events())] == [2, 3]
    assert done.search_values == {"daft.lr_head": 0.1}


def test_units_that_are_repeated_after_a_restart_count_once(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        suggest(journal)
        journal.append("trial_started", trial_id="a")
        for unit in (1, 2, 3):
            journal.append("result", trial_id="a", unit=unit, metrics={"val/acc": unit / 10, "only/3": unit == 3})
        journal.append("trial_retried", trial_id="a", reason="infra", error="")
        journal.append("trial_started", trial_id="a")
        journal.append("result", trial_id="a", unit=2, metrics={"val/acc": 0.25})
    (record,) = fold(journal.events())
    assert [past["val/acc"] for past in record.history] == [0.1, 0.25]
    assert record.metrics == {"val/acc": 0.25, "only/3": 0.0}
    assert record.attempts == 2


def test_a_resumed_trial_is_the_same_trial_under_its_new_id(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        suggest(journal, "old", 5)
        journal.append("trial_started", trial_id="old")
        journal.append("result", trial_id="old", unit=1, metrics={"val/acc": 0.1})
        journal.append("trial_failed", trial_id="old", reason="interrupted", error="")
        assert [record.trial_id for record in unfinished(journal.events())] == ["old"]
        suggest(journal, "new", 5)
        suggest(journal, "other", 5, seed=1)
        journal.append("trial_started", trial_id="new")
        journal.append("result", trial_id="new", unit=2, metrics={"val/acc": 0.2})
        journal.append("trial_finished", trial_id="new", state="complete")
    resumed, other = fold(journal.events())
    assert (resumed.trial_id, resumed.state, resumed.reason, resumed.unit) == ("new", "complete", None, 2)
    assert other.trial_id == "other"
    assert [record.trial_id for record in unfinished(journal.events())] == ["other"]


def test_the_header_is_that_of_the_latest_start(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        assert study_header(journal.events()) == {}
        first = journal.append("study_started", study="pets", dataset_digest="old")
        journal.append("study_finished", state="interrupted")
        assert study_header(journal.events())["state"] == "interrupted"
        journal.append("study_started", study="pets", dataset_digest="new")
        header = study_header(journal.events())
    assert (header["state"], header["dataset_digest"]) == ("running", "new")
    assert header["first_started"] == first["time"]
