"""The client half: sign every request, answer a 402 under a spend cap. For httpx and httpx2.

    client = httpx.Client(auth=WalletAuth(private_key, max_usd_per_payment="1"))
    client.post("https://api.example/v1/render", json={…})

The only file of this package with a clock, randomness and HTTP. What a request goes through:

    signed with ERC-8128 ─► not 402: that is the answer
                        └► 402 with PAYMENT-REQUIRED, an offer under the caps
                             ─► the same request, signed anew, with PAYMENT-SIGNATURE ─► the answer
                             └► settlement pending ─► the very same bytes again, a few times
                        └► a refusal that names a cure ─► repeated, or signed anew, a few times

**The paid request is signed too**, by the same wallet and under a request id of its own: credits
always go to the payer, and a bound identity beside the payment makes the answer readable to this
wallet alone and lets a repeat fetch the stored answer. The first request id was refused before
anything was held, so it burnt nothing and is not used again.

**At most one payment a request.** A pending settlement is asked for again by repeating the request
unchanged: the same authorization moves money once, whatever happens. If the connection breaks after
the payment was sent, the exception reaches the caller; what was settled has become credits, and the
next signed request spends those instead of paying.

**Without signatures** (``signs=False``) a request goes out as it is and a 402 is paid by the
payment alone. Such a payment is given a ``Farebox-Credential`` where there is a gateway; the next
requests to that origin bring it, with an ``Idempotency-Key`` so that they may be repeated, until it
is spent.

**What a server says of the time counts for that server** (``origins``), only where it refused a
signature for its time, and within bounds (``recovery``).
"""

from __future__ import annotations

import secrets
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import anyio
import httpx
from coincurve import PrivateKey

from wallet_auth import keys, offers, recovery
from wallet_auth.offers import TOKENS, Payment, Token, usd_units
from wallet_auth.origins import Origins
from wallet_auth.signing import sign_request
from wallet_auth.told import MAX_DELAY_S, facts, pending_delay, receipt_of

__all__ = ["PaymentLimitError", "WalletAuth", "new_request_id", "pay", "sign_request"]

PENDING_TRIES: Final = 6
"""Of at most ten seconds each: all inside the window of the signature they repeat."""
SIGN_TRIES: Final = 2
"""How often a request is signed anew because its refusal asks for that (``recovery``)."""
CREDENTIAL: Final = "farebox-credential"
_OUR_KEYS: Final = "bearer fbx_"
_WINDOW_S: Final = 120
_DEFAULT_CHAIN: Final = 8453

OnEvent = Callable[[str, Mapping[str, Any]], None]
"""``(kind, facts)``; kinds: signed, paying, paid, pending, refused, declined, recovering. No
secrets in it."""

if TYPE_CHECKING:
    _Auth = httpx.Auth
else:

    def _bases() -> tuple[type, ...]:
        """Both clients ask ``isinstance(auth, Auth)`` of their own class; the protocol is one."""
        try:
            import httpx2
        except ImportError:
            return (httpx.Auth,)
        return (httpx.Auth, httpx2.Auth)

    class _Auth(*_bases()):
        """What either client takes for one of its own."""


class PaymentLimitError(ValueError):
    """A payment would pass the cap on all payments of this process."""


def new_request_id() -> str:
    """A UUID version 7 (RFC 9562): begins with the time, so ids sort and stay apart."""
    stamp = time.time_ns() // 1_000_000
    number = (stamp & (1 << 48) - 1) << 80 | secrets.randbits(80)
    number = number & ~(0xF << 76) | 0x7 << 76
    number = number & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=number))


def pay(
    private_key: str | bytes | PrivateKey,
    payment_required: str,
    *,
    max_usd: str = "1",
    networks: Collection[str] | None = None,
    tokens: Mapping[str, Sequence[Token]] = TOKENS,
) -> Payment:
    """Sign a payment for the first acceptable offer of a ``PAYMENT-REQUIRED`` header.

    Nothing is sent: put ``payment.header`` into ``PAYMENT-SIGNATURE`` and repeat the request.
    Raises ``ValueError`` with the reasons if no offer can be accepted.
    """
    challenge = offers.read_header(payment_required)
    offer, reasons = offers.choose(
        challenge, cap_units=usd_units(max_usd), networks=networks, tokens=tokens
    )
    if offer is None:
        raise ValueError("; ".join(reasons) or "there is no offer")
    return offers.authorize(
        keys.private_key(private_key),
        challenge,
        offer,
        now_s=int(time.time()),
        nonce=secrets.token_bytes(32),
    )


class WalletAuth(_Auth):
    """Signs each request with a wallet and pays a 402 within its caps; sync and async.

    ``max_usd_per_payment`` and ``max_total_usd`` are decimal strings; the total counts every
    authorization signed by this object, settled or not, because each could be cashed. Give one
    object to all clients of a process to cap the process. ``networks`` limits where money may
    move (CAIP-2 ids; default: all of ``tokens``), ``tokens`` says which assets are dollars.
    ``chain_id`` goes into the key id; for key wallets it has no meaning.

    A request that already has a ``PAYMENT-SIGNATURE`` is signed and not paid for again. Bodies
    are read into memory: they are signed, and sent again with a payment. Leave redirects off:
    a signature is bound to its address and fails elsewhere.

    Refusals that name a cure which needs nobody's judgement (``recovery``) are cured: the request
    is repeated after the time they say, or signed anew, with a clock set right for that origin if
    that was the reason. ``recover=False`` leaves them to the caller.

    ``signs=False`` sends requests unsigned and pays by the payment alone. A request that brings a
    key of a gateway (``Authorization: Bearer fbx_…``) is sent as it is: neither signed nor paid.
    """

    requires_request_body = True

    def __init__(
        self,
        private_key: str | bytes | PrivateKey,
        *,
        max_usd_per_payment: str = "1",
        max_total_usd: str | None = None,
        networks: Collection[str] | None = None,
        tokens: Mapping[str, Sequence[Token]] = TOKENS,
        chain_id: int | None = None,
        on_event: OnEvent | None = None,
        recover: bool = True,
        signs: bool = True,
    ) -> None:
        self._recover = recover
        self._signs = signs
        self._origins = Origins()
        self._key = keys.private_key(private_key)
        self._cap_units = usd_units(max_usd_per_payment)
        self._total_units = None if max_total_usd is None else usd_units(max_total_usd)
        self._signed_units = 0
        self._lock = threading.Lock()  # one object may serve clients of several threads
        self._networks = None if networks is None else frozenset(networks)
        self._tokens = tokens
        self._chain_id = chain_id or _DEFAULT_CHAIN
        self._on_event = on_event
        self.address = keys.address_of(self._key)

    def __repr__(self) -> str:
        return f"WalletAuth({self.address}, {self.signed_units} of {self._total_units} units)"

    @property
    def signed_units(self) -> int:
        """Micro-USD of all authorizations this object has signed."""
        return self._signed_units

    def sync_auth_flow(
        self, request: httpx.Request
    ) -> Generator[httpx.Request, httpx.Response, None]:
        """What ``httpx.Client`` drives: yields requests, is sent their responses."""
        request.read()
        flow = self._flow(request)
        step = next(flow)
        while True:
            if isinstance(step, int):
                time.sleep(step)
                answer = None
            else:
                answer = yield step
                if answer.status_code >= 400:
                    answer.read()
            try:
                step = flow.send(answer)
            except StopIteration:
                return

    async def async_auth_flow(
        self, request: httpx.Request
    ) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """What ``httpx.AsyncClient`` drives; the same steps, waiting without a thread."""
        await request.aread()
        flow = self._flow(request)
        step = next(flow)
        while True:
            if isinstance(step, int):
                await anyio.sleep(step)
                answer = None
            else:
                answer = yield step
                if answer.status_code >= 400:
                    await answer.aread()
            try:
                step = flow.send(answer)
            except StopIteration:
                return

    def _flow(
        self, request: httpx.Request
    ) -> Generator[httpx.Request | int, httpx.Response | None, None]:
        """The steps without I/O: a request is to be sent, a number is seconds to wait."""
        given = request.headers.copy()
        if given.get("authorization", "").lower().startswith(_OUR_KEYS):
            yield request
            return
        self._prove(request, {})
        response = yield from self._cured(request, given, {})
        if "payment-signature" in given:
            return
        payment = self._answer(response)
        if payment is None:
            return
        paid = {"PAYMENT-SIGNATURE": payment.header}
        request.headers = given.copy()
        self._prove(request, paid)
        response = yield from self._cured(request, given, paid)
        for _ in range(PENDING_TRIES):
            delay_s = pending_delay(response)
            if delay_s is None:
                break
            self._tell("pending", nonce=payment.nonce, delay_s=delay_s)
            yield delay_s
            response = yield request
        self._keep_credential(request, response)
        self._report(payment, response)

    def _cured(
        self, request: httpx.Request, given: httpx.Headers, paid: Mapping[str, str]
    ) -> Generator[httpx.Request | int, httpx.Response | None, httpx.Response | None]:
        """Send a request that proves something; as long as its refusal names a cure, take that."""
        repeats, signatures = PENDING_TRIES, SIGN_TRIES
        while True:
            response = yield request
            step = self._cure(request, response)
            if step is None or (signatures if step.do == "sign" else repeats) == 0:
                return response
            self._tell("recovering", code=step.code, do=step.do)
            if step.do == "repeat":
                repeats -= 1
                yield min(step.after_s, MAX_DELAY_S)
                continue
            signatures -= 1
            self._set_clock(request, step)
            self._forget_credential(request)
            request.headers = given.copy()
            # A payment that belongs to another request is not shown again: it would be refused
            # again, and the credits it bought are there to be spent.
            self._prove(request, {} if step.code == "payment_already_used" else paid)

    def _cure(
        self, request: httpx.Request, response: httpx.Response | None
    ) -> recovery.Advice | None:
        if not self._recover or response is None or response.status_code < 400:
            return None
        if response.status_code == 402:  # paying has rules of its own
            return None
        if _origin(response.request) != _origin(request):  # of whoever we were sent on to
            return None
        kind = response.headers.get("content-type", "")
        asked = _origin(request) + request.url.raw_path.decode("ascii")
        return recovery.advice_of(
            response.status_code, kind, response.content, request.method, asked
        )

    def _set_clock(self, request: httpx.Request, step: recovery.Advice) -> None:
        now_s, origin = int(time.time()), _origin(request)
        skew_s = recovery.skew_s(step, now_s + self._origins.skew_s(origin), now_s)
        if skew_s is not None:
            self._origins.set_skew(origin, skew_s)

    def _prove(self, request: httpx.Request, extra: Mapping[str, str]) -> None:
        """Sign the request, or have it bring what a payment at its origin has left."""
        if self._signs:
            self._sign(request, extra)
            return
        request.headers.update(extra)
        if request.headers.keys() & {"authorization", "payment-signature"}:
            return
        credential = self._origins.credential(_origin(request), time.monotonic())
        if credential:
            request.headers["Authorization"] = f"Bearer {credential}"
            request.headers.setdefault("Idempotency-Key", new_request_id())

    def _keep_credential(self, request: httpx.Request, response: httpx.Response | None) -> None:
        text = "" if response is None else response.headers.get(CREDENTIAL, "")
        if response is None or not text or _origin(response.request) != _origin(request):
            return
        self._origins.keep_credential(_origin(request), text, time.monotonic())

    def _forget_credential(self, request: httpx.Request) -> None:
        shown = request.headers.get("authorization", "").removeprefix("Bearer ")
        self._origins.drop_credential(_origin(request), shown)

    def _sign(self, request: httpx.Request, extra: Mapping[str, str]) -> None:
        request.headers.update(extra)
        request_id = new_request_id()
        target = request.url.raw_path.decode("ascii")
        added = sign_request(
            self._key,
            request.method,
            _origin(request) + target,
            [(n.decode("ascii"), v.decode("latin-1")) for n, v in request.headers.raw],
            request.content,
            now_s=int(time.time()) + self._origins.skew_s(_origin(request)),
            nonce=request_id,
            window_s=_WINDOW_S,
            chain_id=self._chain_id,
        )
        request.headers.update(added)
        self._tell("signed", request_id=request_id, method=request.method, path=request.url.path)

    def _answer(self, response: httpx.Response | None) -> Payment | None:
        """A payment for a 402 that may be paid; ``None`` leaves the 402 to the caller."""
        if response is None or response.status_code != 402:
            return None
        required = response.headers.get("payment-required")
        if required is None:
            return None
        try:
            challenge = offers.read_header(required)
        except ValueError as fault:
            self._tell("declined", reasons=[str(fault)])
            return None
        offer, reasons = offers.choose(
            challenge, cap_units=self._cap_units, networks=self._networks, tokens=self._tokens
        )
        if offer is None:
            self._tell("declined", reasons=reasons)
            return None
        try:
            self._reserve(offer.amount_units)
        except PaymentLimitError as full:
            self._tell("declined", reasons=[str(full)])
            return None
        payment = offers.authorize(
            self._key, challenge, offer, now_s=int(time.time()), nonce=secrets.token_bytes(32)
        )
        self._tell("paying", **facts(payment))
        return payment

    def _reserve(self, amount_units: int) -> None:
        with self._lock:
            after = self._signed_units + amount_units
            if self._total_units is not None and after > self._total_units:
                raise PaymentLimitError(
                    f"{amount_units} micro-USD more would pass the total of {self._total_units}"
                )
            self._signed_units = after

    def _report(self, payment: Payment, response: httpx.Response | None) -> None:
        receipt = receipt_of(response)
        kind = "paid" if receipt.get("success") is True else "refused"
        if kind == "refused" and pending_delay(response) is not None:
            kind = "pending"
        self._tell(kind, **facts(payment), receipt=receipt)

    def _tell(self, kind: str, **facts: Any) -> None:
        if self._on_event is not None:
            self._on_event(kind, facts)


def _origin(request: httpx.Request) -> str:
    """Scheme, host and port, spelled in one way."""
    return f"{request.url.scheme}://{request.url.netloc.decode('ascii')}"
