"""P8: a cluster of one machine that has died ends the run with a word of ours."""

from __future__ import annotations

import logging

import pytest

from orchestrator.ray_internals import ended_processes
from orchestrator.running.cluster_watch import ClusterWatch, LostClusterError


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("raylet", -9, "the raylet of Ray was killed by signal 9"),
        ("gcs_server", 1, "the head process of Ray ended with exit code 1"),
    ],
)
def test_p8_a_process_that_the_cluster_needs(
    name: str, code: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(LostClusterError) as error, caplog.at_level(logging.ERROR):
        ClusterWatch(lambda: [(name, code)]).on_step_begin(1, [])
    assert str(error.value) == (
        f"A study on this machine needs its Ray cluster until it ends, but {message}. Everything that was recorded is "
        "kept: run the same command again to continue. If it happens again, look at the memory of this machine (dmesg) "
        "and at Ray's logs."
    )
    at_once = [record.getMessage() for record in caplog.records]
    assert at_once == ([str(error.value)] if name == "gcs_server" else [])  # Ray ends a driver without a head


def test_p8_the_dashboard_and_the_rest_may_go() -> None:
    """The watch raises nothing for them, and does for the head beside them."""
    ended = [("dashboard", -9), ("log_monitor", -9), ("ray_client_server", 1)]
    ClusterWatch(lambda: ended).on_step_begin(1, [])
    with pytest.raises(LostClusterError):
        ClusterWatch(lambda: [*ended, ("gcs_server", -9)]).on_step_begin(1, [])


def test_p8_where_no_cluster_was_started_nothing_is_missed() -> None:
    assert ended_processes() == []
