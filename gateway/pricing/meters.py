"""What an upstream says of its usage: in its JSON, or in its own word beside the answer.

Counts are whole numbers without a sign. Whatever else stands where one should is no count: it is
told to the caller of these functions, who counts the oddity, and nothing is charged by it.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from gateway.money import parse_usd
from gateway.pricing.quote import Reads, Usage
from gateway.pricing.rates import countable

MALFORMED: Final = "meter_malformed"
FOREIGN: Final = "meter_foreign"
ABOVE: Final = "meter_above_hold"
_STATED: Final = re.compile(r"([^;]{1,400}?)[ \t]*;[ \t]*t=([A-Za-z0-9_-]{1,64})")
_COUNT: Final = re.compile(r"([a-z][a-z0-9_]{0,39})=([0-9]{1,15})")


class OddStatement(ValueError):  # noqa: N818  (what it is)
    """A statement that is not believed. ``kind`` says which oddity it is."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


def counts_in(value: object, reads: Reads) -> tuple[dict[str, int], bool]:
    """The counts that stand in an answer's JSON, and whether something stood there that is none.

    A list counts as many as it has.
    """
    counts: dict[str, int] = {}
    odd = False
    for meter, places in reads.places:
        for place in places:
            found = _at(value, place)
            if isinstance(found, list):
                found = len(found)
            if found is None:
                continue
            if countable(found):
                counts[meter] = found
                break
            odd = True
    return counts, odd


def _at(value: Any, place: Iterable[str]) -> Any:
    for name in place:
        if isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, list) and name.isascii() and name.isdigit() and len(name) < 10:
            value = value[int(name)] if int(name) < len(value) else None
        else:
            return None
    return value


def markers(reads: Reads) -> tuple[bytes, ...]:
    """What JSON holds that has one of the counts: the last name of each place, in quotes."""
    last = (place[-1] for _, places in reads.places for place in places)
    # The last name of a list's place is a number, which stands nowhere.
    return tuple({b'"%b"' % name.encode() for name in last if not name.isdigit()})


def stated(
    usages: Sequence[bytes], amounts: Sequence[bytes], token: str, reads: Reads
) -> Usage | None:
    """What ``Farebox-Usage`` and ``Farebox-Amount`` say, given once and with this call's ``t``.

    None: nothing is said. Raises ``OddStatement``.
    """
    every = (*usages, *amounts)
    if not every:
        return None
    found = _STATED.fullmatch(every[0].decode("latin-1").strip(" \t")) if len(every) == 1 else None
    if found is None:
        raise OddStatement(MALFORMED)
    if not hmac.compare_digest(found.group(2), token):
        raise OddStatement(FOREIGN)
    text = found.group(1)
    if amounts:
        try:
            return Usage(amount_units=parse_usd(text))
        except ValueError:
            raise OddStatement(MALFORMED) from None
    counts: dict[str, int] = {}
    for part in re.split(r"[ \t]*,[ \t]*", text):
        pair = _COUNT.fullmatch(part)
        if pair is None or pair.group(1) in counts or pair.group(1) not in reads.meters:
            raise OddStatement(MALFORMED)
        counts[pair.group(1)] = int(pair.group(2))
    return Usage(tuple(counts.items()))
