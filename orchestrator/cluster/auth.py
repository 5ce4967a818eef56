"""Who may talk to a Ray cluster: finding this machine's token, and asking an address what it demands.

A Ray cluster runs whatever code it is sent. One that asks for no token, reachable over a network, belongs to anybody
(CVE-2023-48022); Luthier does not send studies there. Ray itself takes 20 s to tell a wrong token and two minutes to
tell a dead address; the probes here ask one question without Ray and have the answer in milliseconds.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import stat
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

Access = Literal["open", "accepted", "missing", "wrong", "unreachable"]
"""`open` = no token asked; `accepted`; `missing` = a token is asked and we have none; `wrong`; `unreachable`."""

INSECURE = "LUTHIER_INSECURE_CLUSTER"
"""Set to 1: use even a network cluster that asks for no token."""

_WAY_OUT = (
    "Copy ~/.ray/auth_token of the cluster's head node to this machine's ~/.ray/auth_token, or set RAY_AUTH_TOKEN "
    "or RAY_AUTH_TOKEN_PATH."
)


class ClusterError(ValueError):
    """A cluster that cannot or must not be used, with the way out."""


def find_token(environ: Mapping[str, str] | None = None) -> str | None:
    """This machine's cluster token, in Ray's order: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.

    Raises:
        ClusterError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    environ = os.environ if environ is None else environ
    if environ.get("RAY_AUTH_TOKEN"):
        return environ["RAY_AUTH_TOKEN"].strip()
    named = environ.get("RAY_AUTH_TOKEN_PATH")
    if named:
        return _token_of(named)
    file = token_file()
    return (file.read_text().strip() or None) if file.is_file() else None


def _token_of(named: str) -> str:
    try:
        token, problem = Path(named).expanduser().read_text().strip(), "it is empty"
    except OSError as error:
        token, problem = "", str(error.strerror)
    if token:
        return token
    raise ClusterError(
        f"RAY_AUTH_TOKEN_PATH must name a file with a token, but got {named!r} ({problem}). "
        "Correct the path, or unset it to use ~/.ray/auth_token."
    )


def token_file() -> Path:
    """Where Ray keeps the token of this user."""
    return Path.home() / ".ray" / "auth_token"


def ensure_token() -> str:
    """The token of this machine, made at first use; the file is readable by its owner alone (Ray writes 0644).

    Raises:
        ClusterError: there is no token yet and none can be written.
    """
    file = token_file()
    found = find_token()
    if found is None:
        found = secrets.token_hex(32)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
                handle.write(found)
        except OSError as error:
            raise ClusterError(
                f"A local cluster keeps its token in {file}, but that cannot be written ({error.strerror}). "
                "Set RAY_AUTH_TOKEN to a secret of your own."
            ) from error
    if file.is_file() and file.stat().st_uid == os.getuid() and stat.S_IMODE(file.stat().st_mode) & 0o077:
        file.chmod(0o600)
    return found


def refresh_ray_auth() -> None:
    """Make a Ray that is already imported see RAY_AUTH_MODE and the token as they are now (it caches both)."""
    if "ray" in sys.modules:
        from orchestrator.ray_internals import refresh_authentication

        refresh_authentication()


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def probe_gcs(address: str, token: str | None, timeout_s: float = 5.0) -> Access:
    """Ask the head of a cluster (`host:6379`) one question, first without the token, then with it."""
    import grpc  # type: ignore[import-untyped]

    from orchestrator.ray_internals import CHECK_ALIVE

    def ask(metadata: list[tuple[str, str]]) -> grpc.StatusCode:
        try:
            question(b"", timeout=timeout_s, metadata=metadata, wait_for_ready=False)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    # A proxy for the web is not on the way to the cluster; Ray switches it off in the same way.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        question = channel.unary_unary(CHECK_ALIVE)
        answer = ask([])
        if answer == grpc.StatusCode.OK:
            return "open"
        if answer != grpc.StatusCode.UNAUTHENTICATED:
            return "unreachable"
        if token is None:
            return "missing"
        return "accepted" if ask([("authorization", f"Bearer {token}")]) == grpc.StatusCode.OK else "wrong"


def probe_dashboard(url: str, token: str | None, timeout_s: float = 10.0) -> Access:
    """Ask a Ray dashboard (`http://host:8265`) for its job list, first without the token, then with it."""

    def ask(headers: dict[str, str]) -> int:
        request = urllib.request.Request(f"{url}/api/jobs/", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code
        except (OSError, ValueError):
            return 0

    answer = ask({})
    if answer == 200:
        return "open"
    if answer not in (401, 403):
        return "unreachable"
    if token is None:
        return "missing"
    return "accepted" if ask({"Authorization": f"Bearer {token}"}) == 200 else "wrong"


def check_access(address: str, host: str, access: Access, insecure: bool = False) -> None:
    """Turn what a probe found into an error for people, or into nothing when the cluster may be used.

    Args:
        address: as the user wrote it, for the message.
        host: its host part.
        insecure: use even a cluster that everybody on its network may use (so does LUTHIER_INSECURE_CLUSTER=1).

    Raises:
        ClusterError: unreachable, no token, wrong token, or open to everybody on a network.
    """
    if access == "unreachable":
        raise ClusterError(
            f"No Ray cluster answers at {address}. Check the address, that the cluster is up (`ray status` on its "
            "head node), and that an SSH tunnel to it is open if it needs one."
        )
    if access == "missing":
        raise ClusterError(f"The cluster at {address} asks for a token, but none was found here. {_WAY_OUT}")
    if access == "wrong":
        raise ClusterError(f"The cluster at {address} refuses this machine's token. {_WAY_OUT}")
    if access == "open" and not (insecure or is_loopback(host) or os.environ.get(INSECURE) == "1"):
        raise ClusterError(
            f"The cluster at {address} asks for no token: anybody who reaches it can run code on it and read your "
            "data. Restart it with token authentication (`ray get-auth-token --generate`, RAY_AUTH_MODE=token before "
            f"`ray start`; see docs/cluster.md), or set {INSECURE}=1 if its network is yours alone."
        )
