"""Redaction of secrets.

Secrets are credentials in URLs, and values of environment variables that are named like secrets. Every text of a
failure that is printed, logged or stored is redacted: libraries quote URLs and environments in their messages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

MIN_SECRET_LENGTH = 8
"""Shorter values of secret variables stay: `true` is no secret, and occurs everywhere."""

_URL_CREDENTIALS = re.compile(r"(?<=//)[^/\s'\"@]*:[^/\s'\"]*(?=@)|(?<=//)[^/\s'\"@:]+(?=@)")
_QUERY_SECRET = re.compile(r"(?i)(?<=[?&])(password|passwd|pwd|token|secret|[a-z_]*key)=[^&\s'\"]+")
_SECRET_NAME = re.compile(r"(?i)token|secret|passw(or)?d|passphrase|credential|(^|_)(api)?keys?(_|$)")
_LOCATION_NAME = re.compile(r"(?i)_(path|file|dir|id|url|mode|name)$")


def redact(text: str, environ: Mapping[str, str] | None = None) -> str:
    """Replace credentials in URLs and values of secret environment variables by `***`.

    Args:
        text: any text.
        environ: environment variables; None = those of the process.

    Example:
        >>> redact("GET http://me:hunter2@host/x?token=abc failed", {})
        'GET http://***@host/x?token=*** failed'
        >>> redact("login as s3cr3t-value", {"MLFLOW_TRACKING_PASSWORD": "s3cr3t-value"})
        'login as ***'
    """
    text = _QUERY_SECRET.sub(r"\1=***", _URL_CREDENTIALS.sub("***", text))
    if len(text) < MIN_SECRET_LENGTH:
        return text
    variables = os.environ if environ is None else environ
    secrets = {
        value
        for name, value in variables.items()
        if len(value) >= MIN_SECRET_LENGTH and value in text and is_secret(name)
    }
    for secret in sorted(secrets, key=len, reverse=True):  # longest first: one may be part of another
        text = text.replace(secret, "***")
    return text


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name holds a secret.

    The location of a secret is none.

    Example:
        >>> is_secret("AWS_SECRET_ACCESS_KEY"), is_secret("SSH_KEY_FILE")
        (True, False)
    """
    return _SECRET_NAME.search(name) is not None and _LOCATION_NAME.search(name) is None
