"""What single parts of a request cost in CPU, without a server: ``python -m tests.bench.parts``.

One JSON line each: microseconds of this process, the best of some rounds. To be compared on one
machine only, before and after a change.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Coroutine, Iterator
from itertools import cycle
from typing import Any

from gateway.middleware import problem_answer
from gateway.payments import challenge, offers
from gateway.proxy import unpaid
from tests.bench.requests import BODY, PATH, new_wallets
from tests.gateway.payments.parts import KEYS, settings_for
from wallet_auth import SignedRequest, check_body, keys, lines_of, verify
from wallet_auth.signing import sign_request

NOW_S = 1_900_000_000
URL = "http://127.0.0.1:8402"
REQUESTS = 1_000
WALLETS = 50


def figures(times: int, rounds: int) -> Iterator[tuple[str, float]]:
    """``(part, microseconds)`` for each part."""
    requests = _requests()
    signers = [_done(verify(request, NOW_S, None)) for request in requests]
    found = cycle(requests)
    yield "verify", _us(lambda: _done(verify(next(found), NOW_S, None)), times, rounds)
    digest = keys.keccak256(b"a request")
    signatures = cycle(
        [keys.sign_digest(keys.private_key(secret), digest) for secret in new_wallets(WALLETS)]
    )
    yield "of it recover", _us(lambda: keys.recover(digest, next(signatures)), times, rounds)
    yield "check_body", _us(lambda: check_body(signers[0], BODY), times, rounds)
    settings, asked = settings_for(), offers.Asked("POST", PATH.encode(), 2_000)

    def raised() -> object:
        return problem_answer(challenge.for_call(settings, KEYS, asked, NOW_S), "0" * 16)

    def put_together() -> object:
        return unpaid.answer(settings, KEYS, asked, NOW_S, "0" * 16)

    yield "402", _us(put_together, times, rounds)
    yield "402 as a problem", _us(raised, times, rounds)


def _requests() -> list[SignedRequest]:
    wallets = [keys.private_key(secret) for secret in new_wallets(WALLETS)]
    sent = [
        ("host", "127.0.0.1:8402"),
        ("user-agent", "bench"),
        ("accept", "*/*"),
        ("accept-encoding", "gzip"),
        ("connection", "keep-alive"),
        ("content-type", "application/json"),
        ("content-length", str(len(BODY))),
    ]
    made = []
    for number in range(REQUESTS):
        nonce, wallet = f"{number:032x}", wallets[number % WALLETS]
        added = sign_request(wallet, "POST", URL + PATH, sent, BODY, now_s=NOW_S, nonce=nonce)
        fields = [(n.lower().encode(), v.encode()) for n, v in (*sent, *added.items())]
        made.append(
            SignedRequest("POST", PATH.encode(), "127.0.0.1:8402", "http", index=lines_of(fields))
        )
    return made


def _done(waiting: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine gives that waits for nothing."""
    try:
        waiting.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


def _us(part: Callable[[], object], times: int, rounds: int) -> float:
    def round_s() -> float:
        begin_s = time.process_time()
        for _ in range(times):
            part()
        return (time.process_time() - begin_s) / times

    return round(min(round_s() for _ in range(rounds)) * 1e6, 1)


def main() -> None:
    """Print the figures."""
    for part, microseconds in figures(20_000, 5):
        print(json.dumps({"part": part, "us": microseconds}), flush=True)


if __name__ == "__main__":
    main()
