"""What a deployment promises whatever is killed, held against what was seen on every side.

Pure: everything observed is in ``Facts``; ``broken`` names each promise that does not hold. The
promises are those of docs/guarantees and of ``farebox ledger verify``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

SHOWN = 5

# Why a hold may end without a charge although the upstream did its work: a gateway died during
# the call, or its database was away when the charge had to be written. The caller was not given
# the answer, and is not charged for it.
OURS = frozenset(("interrupted", "dependency_unavailable", "gateway_error"))


@dataclass(frozen=True, slots=True)
class Told:
    """An answer that a client had whole, to a request on a priced route."""

    request_id: str
    status: int
    replayed: bool
    charged_units: int | None  # None: it began before the charge was made (a long answer)
    digest: bytes  # of the body
    kept: bool  # short enough that a repeat gets it again, and not a mere receipt
    code: str = ""  # of a problem


@dataclass(frozen=True, slots=True)
class Ended:
    """What the ledger says of one hold. ``kind`` "" : it is still open."""

    kind: str
    units: int
    reason: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that was observed, after recovery."""

    begun: Mapping[str, int]  # upstream calls by request id, the upstream's own count
    done: Mapping[str, int]
    told: Sequence[Told]
    bought: Mapping[str, int]  # payment id -> units a client was told were minted
    ledger: Mapping[str, Sequence[Ended]]  # by request id
    lots: Mapping[str, Sequence[int]]  # payment id -> units of each lot minted for it
    on_chain_units: int
    audits: Mapping[str, object]  # of `farebox ledger verify`, by name
    unfinished: Sequence[str]  # holds and payments that did not end by themselves
    faults: Sequence[str] = field(default=())  # answers or log lines that nobody planned


@dataclass(frozen=True, slots=True)
class Broken:
    """A promise that does not hold, and the first places where."""

    promise: str
    places: Sequence[str]

    def __str__(self) -> str:
        return f"{self.promise} ({len(self.places)}): {'; '.join(self.places[:SHOWN])}"


def broken(facts: Facts) -> list[Broken]:
    """Every promise that does not hold."""
    found = []
    for promise, places in _places(facts):
        listed = list(places)
        if listed:
            found.append(Broken(promise, listed))
    return found


def _places(facts: Facts) -> Iterator[tuple[str, Iterator[str]]]:
    yield "farebox ledger verify finds nothing", (f"{k}: {v}" for k, v in facts.audits.items())
    yield "everything that was interrupted ends without a human", iter(facts.unfinished)
    yield "a request id is charged at most once", _charged_once(facts)
    yield "at most one upstream call is started for a request id", _called_once(facts)
    yield "completed upstream calls >= charges", _charged_for_work(facts)
    yield "charges + interrupted >= completed upstream calls", _work_accounted_for(facts)
    yield "every answer a client had whole is in the ledger with that charge", _answers(facts)
    yield "a repeat gets the same answer, and only the first one is charged", _repeats(facts)
    yield "USDC at pay_to = minted", _money(facts)
    yield "every purchase a client was told of is minted, once", _purchases(facts)
    yield "nothing fails in a way that has no name", iter(facts.faults)


def charges(facts: Facts) -> dict[str, int]:
    """Captured units by request id."""
    return {
        request_id: sum(each.units for each in ended if each.kind == "capture")
        for request_id, ended in facts.ledger.items()
        if any(each.kind == "capture" for each in ended)
    }


def uncharged(facts: Facts) -> dict[str, int]:
    """Holds that ended without a charge for a reason of ours, counted by reason."""
    found: dict[str, int] = {}
    for ended in facts.ledger.values():
        for each in ended:
            if each.kind == "void" and each.reason in OURS:
                found[each.reason] = found.get(each.reason, 0) + 1
    return found


def _charged_once(facts: Facts) -> Iterator[str]:
    for request_id, ended in facts.ledger.items():
        if len(ended) > 1:
            yield f"{request_id} has {len(ended)} holds"


def _called_once(facts: Facts) -> Iterator[str]:
    for request_id, times in facts.begun.items():
        if times > 1:
            yield f"{request_id} went up {times} times"
        if request_id not in facts.ledger:
            yield f"{request_id} went up without a hold"


def _charged_for_work(facts: Facts) -> Iterator[str]:
    for request_id in charges(facts):
        if not facts.done.get(request_id):
            yield f"{request_id} is charged, the upstream did not complete it"


def _work_accounted_for(facts: Facts) -> Iterator[str]:
    for request_id in facts.done:
        ended = facts.ledger.get(request_id, ())
        if not any(e.kind == "capture" or e.reason in OURS for e in ended):
            yield f"{request_id} was completed; the ledger says {[*ended] or 'nothing'}"


def _answers(facts: Facts) -> Iterator[str]:
    charged = charges(facts)
    for told in facts.told:
        in_ledger = charged.get(told.request_id, 0)
        if told.replayed:
            if told.charged_units:
                yield f"{told.request_id}: a repeat was told a charge of {told.charged_units}"
            if told.request_id not in facts.ledger:
                yield f"{told.request_id}: a repeat of what the ledger does not know"
        elif told.charged_units is None:
            if told.status < 400 and not in_ledger:
                yield f"{told.request_id}: a whole answer that is not charged"
        elif told.charged_units != in_ledger:
            said = f"told {told.charged_units}, the ledger says {in_ledger}"
            yield f"{told.request_id} ({told.status} {told.code}): {said}"


def _repeats(facts: Facts) -> Iterator[str]:
    first: dict[str, Told] = {}
    for told in facts.told:
        known = first.setdefault(told.request_id, told)
        if known is told:
            continue
        if not (told.replayed or known.replayed):
            yield f"{told.request_id} was answered anew, twice"
        same = told.kept and known.kept and told.status == known.status
        if same and told.digest != known.digest:
            yield f"{told.request_id}: two answers that differ"


def _money(facts: Facts) -> Iterator[str]:
    minted = sum(sum(units) for units in facts.lots.values())
    if minted != facts.on_chain_units:
        yield f"minted {minted}, on chain {facts.on_chain_units}"


def _purchases(facts: Facts) -> Iterator[str]:
    for payment_id, units in facts.lots.items():
        if len(units) > 1:
            yield f"{payment_id} was minted {len(units)} times"
    for payment_id, told in facts.bought.items():
        if sum(facts.lots.get(payment_id, ())) != told:
            yield f"{payment_id}: told {told}, minted {facts.lots.get(payment_id)}"
