"""Runs: requests that a caller groups under a name of its own, to see together what they cost.

The name comes in ``Farebox-Run``. A signature that covers the field fixes it: nobody between the
caller and the gateway can file the call elsewhere. Uncovered, or beside a payment alone, it is a
label and no proof; nothing but the grouping follows from it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from gateway.errors import Problem
from gateway.fields import values

# What stands in a path without being encoded, so that GET v1/runs/{run} finds every run.
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:~-]{0,127}")


def run_of(headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """The run a request belongs to. Raises ``Problem("invalid_request")`` for a bad name."""
    found = values(headers, b"farebox-run")
    if not found:
        return None
    name = found[0].decode("latin-1").strip(" \t")
    if len(found) > 1 or not NAME.fullmatch(name):
        raise Problem(
            "invalid_request",
            "Farebox-Run is one name of 1 to 128 characters: letters, digits and . _ : ~ -, the "
            "first one a letter or digit.",
        )
    return name
