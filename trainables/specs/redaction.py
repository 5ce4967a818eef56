"""Secrets out of texts: passwords and tokens inside URLs, and the values of environment variables that are named like
secrets. Whatever is shown, logged or kept of a failure goes through here: nobody knows what a library quotes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

SHORTEST = 8
"""Characters from which on a variable's value is taken for a secret: `true` is none, and would be everywhere."""

_CREDENTIALS = re.compile(r"(?<=//)[^/\s'\"@]*:[^/\s'\"]*(?=@)|(?<=//)[^/\s'\"@:]+(?=@)")
_QUERY_SECRET = re.compile(r"(?i)(?<=[?&])(password|passwd|pwd|token|secret|[a-z_]*key)=[^&\s'\"]+")
_NAMES = re.compile(r"(?i)token|secret|passw(or)?d|passphrase|credential|(^|_)(api)?keys?(_|$)")
_PLACES = re.compile(r"(?i)_(path|file|dir|id|url|mode|name)$")


def redact(text: str, environ: Mapping[str, str] | None = None) -> str:
    """The text with user names, passwords and tokens inside URLs, and the values of secret variables, replaced by
    `***`.

    Args:
        environ: default: that of the process.
    """
    text = _QUERY_SECRET.sub(r"\1=***", _CREDENTIALS.sub("***", text))
    if len(text) < SHORTEST:
        return text
    environ = os.environ if environ is None else environ
    found = {v for k, v in environ.items() if len(v) >= SHORTEST and v in text and is_secret(k)}
    for value in sorted(found, key=len, reverse=True):  # one may be part of another
        text = text.replace(value, "***")
    return text


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name holds a secret, and not the place of one."""
    return _NAMES.search(name) is not None and _PLACES.search(name) is None
