"""Authentication at Ray clusters: finding this machine's token, and probing what an address requires.

A Ray cluster runs any code that it is sent, so one without authentication that is reachable over a network is open to
remote code execution (CVE-2023-48022); Luthier does not use such clusters. Ray itself takes 20 s to report a wrong
token and two minutes for a dead address; the probes here send one request without Ray and take milliseconds.
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
"""`open` = no token required; `missing` = a token is required and there is none here."""

INSECURE = "LUTHIER_INSECURE_CLUSTER"
"""Environment variable: 1 = use even a network cluster without authentication."""

_WAY_OUT = (
    "Copy ~/.ray/auth_token of the cluster's head node to this machine's ~/.ray/auth_token, or set RAY_AUTH_TOKEN "
    "or RAY_AUTH_TOKEN_PATH."
)


class ClusterError(ValueError):
    """A cluster that cannot or must not be used."""


def find_token(environ: Mapping[str, str] | None = None) -> str | None:
    """This machine's cluster token, in Ray's order: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.

    Raises:
        ClusterError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    environ = os.environ if environ is None else environ
    if environ.get("RAY_AUTH_TOKEN"):
        return environ["RAY_AUTH_TOKEN"].strip()
    path = environ.get("RAY_AUTH_TOKEN_PATH")
    if path:
        return _read_token(path)
    file = token_file()
    return (file.read_text().strip() or None) if file.is_file() else None


def _read_token(path: str) -> str:
    problem = "it is empty"
    try:
        token = Path(path).expanduser().read_text().strip()
        if token:
            return token
    except OSError as error:
        problem = str(error.strerror)
    raise ClusterError(
        f"RAY_AUTH_TOKEN_PATH must name a file with a token, but got {path!r} ({problem}). "
        "Correct the path, or unset it to use ~/.ray/auth_token."
    )


def token_file() -> Path:
    """The file where Ray keeps this user's token."""
    return Path.home() / ".ray" / "auth_token"


def ensure_token() -> str:
    """This machine's token, created at first use.

    In a file that only its owner can read (Ray writes mode 0644).

    Raises:
        ClusterError: there is no token yet, and the file cannot be written.
    """
    file = token_file()
    token = find_token()
    if token is None:
        token = secrets.token_hex(32)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # The mode at creation: a `chmod` afterwards would leave the token readable for a moment.
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
                handle.write(token)
        except OSError as error:
            raise ClusterError(
                f"A local cluster keeps its token in {file}, but that cannot be written ({error.strerror}). "
                "Set RAY_AUTH_TOKEN to a secret of your own."
            ) from error
    if file.is_file() and file.stat().st_uid == os.getuid() and stat.S_IMODE(file.stat().st_mode) & 0o077:
        # A token that Ray has created here is readable by everybody.
        file.chmod(0o600)
    return token


def refresh_ray_auth() -> None:
    """Drop the RAY_AUTH_MODE and token that an imported Ray has cached."""
    if "ray" in sys.modules:
        from orchestrator.ray_internals import refresh_authentication

        refresh_authentication()


def is_loopback(host: str) -> bool:
    """Whether a host name or address is a loopback address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def probe_gcs(address: str, token: str | None, timeout_s: float = 5.0) -> Access:
    """Probe the head of a cluster (`host:6379`) with one request.

    First without the token, then with it.
    """
    import grpc  # type: ignore[import-untyped]

    from orchestrator.ray_internals import CHECK_ALIVE

    def status_of(metadata: list[tuple[str, str]]) -> grpc.StatusCode:
        try:
            check_alive(b"", timeout=timeout_s, metadata=metadata, wait_for_ready=False)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    # HTTP proxies do not apply to cluster traffic; Ray disables them in the same way.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        check_alive = channel.unary_unary(CHECK_ALIVE)
        # Without the token first: only a refusal shows that the cluster asks for one at all.
        status = status_of([])
        if status == grpc.StatusCode.OK:
            return "open"
        if status != grpc.StatusCode.UNAUTHENTICATED:
            return "unreachable"
        if token is None:
            return "missing"
        return "accepted" if status_of([("authorization", f"Bearer {token}")]) == grpc.StatusCode.OK else "wrong"


def probe_dashboard(url: str, token: str | None, timeout_s: float = 10.0) -> Access:
    """Probe a Ray dashboard (`http://host:8265`) by its job list.

    First without the token, then with it.
    """

    def status_of(headers: dict[str, str]) -> int:
        """HTTP status; 0 = no answer."""
        request = urllib.request.Request(f"{url}/api/jobs/", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code
        except (OSError, ValueError):
            return 0

    # Without the token first: only a refusal shows that the cluster asks for one at all.
    status = status_of({})
    if status == 200:
        return "open"
    if status not in (401, 403):
        return "unreachable"
    if token is None:
        return "missing"
    return "accepted" if status_of({"Authorization": f"Bearer {token}"}) == 200 else "wrong"


def check_access(address: str, host: str, access: Access, insecure: bool = False) -> None:
    """Raise a user-facing error unless the cluster may be used.

    Args:
        address: as the user wrote it, for the message.
        host: its host part.
        access: result of a probe.
        insecure: allow a network cluster without authentication (so does LUTHIER_INSECURE_CLUSTER=1).

    Raises:
        ClusterError: unreachable, no token, wrong token, or a network cluster without authentication.
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
