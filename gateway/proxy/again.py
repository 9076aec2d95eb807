"""Running a call again whose gateway died in the middle of it, on routes that allow it."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from gateway import ledger
from gateway.proxy.replies import interrupted

MOST_RUNS: Final = 5
"""How often one call is started at most. Every start but the first needs a gateway to die."""


async def run_again(
    writer: ledger.Writer, step: ledger.Hold, outcome: ledger.Outcome
) -> ledger.Outcome:
    """The next run of a call, if all before it were interrupted; else ``outcome`` as it is.

    Each run has a guard of its own: the first one's, with its number behind the scheme. It is
    asked for only when the run before it is known to be interrupted, which is final. So of any
    number of repeats on any number of nodes one gets the hold, because the guard is unique; the
    others are told that it runs. After a capture, or any other end, there is no next run.
    """
    if not isinstance(outcome, ledger.Repeated):
        return outcome
    first = outcome.hold  # found by its own id or by an alias; the runs after it have no alias
    for number in range(2, MOST_RUNS + 1):
        if not (isinstance(outcome, ledger.Repeated) and interrupted(outcome.close)):
            break
        guard = ledger.Guard(first.principal, f"{first.scheme}#{number}", first.request_id)
        outcome = await writer.submit(replace(step, guard=guard))
    return outcome
