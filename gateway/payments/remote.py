"""Somebody else's facilitator as the first way to settle our own sales, ours as the second.

    look       it says that it settles here (``/supported``), or it is passed over for a while
    claim      the payment's row and the call that would settle it, in one transaction, before
               anything leaves this machine
    ask        ``/settle``; whatever it answers is a hint where to look, never a proof
    believe    only the Transfer of this very payment in a receipt of our own node
    otherwise  our own engine hands in the same authorization; the token takes it once

So a facilitator that says success for nothing, failure after sending, somebody else's transaction
or nothing at all costs time and some gas: nothing is minted for its word, and nobody is told to pay
again while it may still send what it was given.
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from typing import Any, Final

from chain import sender
from chain.errors import Unavailable
from chain.networks import Asset
from chain.receipts import Receipt
from chain.rpc import Rpc
from chain.schemes.eip3009 import Authorization
from gateway.db import Tx, transact
from gateway.observe import log
from gateway.payments import engine, journal, nonces
from gateway.payments.lane import Begun, Handed, Job
from gateway.payments.methods import METHODS, Spent
from gateway.payments.nonces import Call
from gateway.payments.rails import Rails, Remote
from gateway.settings import Chain
from wallet_auth.keys import checksum
from wallet_auth.strict import json_object

GOOD_FOR_S: Final = 30  # so long a look is believed
REST_S: Final = 15  # so long one that failed is passed over
LOOK_WAIT_S: Final = 3
PASSED_OVER: Final = "passed over"
MAX_ANSWER_BYTES: Final = 64 * 1024
_HASH: Final = re.compile(r"0x[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True)
class Order:
    """What a facilitator is asked to settle."""

    chain: Chain
    asset: Asset
    auth: Authorization = field(repr=False)

    @property
    def spent(self) -> Spent:
        auth = self.auth
        return Spent(self.asset, auth.from_, auth.nonce, auth.to, auth.value_units)


async def usable(rails: Rails, chain: Chain) -> bool:
    """Whether the network's facilitator is to be asked now. Looks at it when that is due."""
    if not chain.facilitator:
        return False
    remote = rails.remotes.setdefault(chain.caip2, Remote())
    loop = asyncio.get_running_loop()
    async with remote.lock:
        if loop.time() < remote.rest_until_s:
            return False
        if loop.time() < remote.good_until_s:
            return True
        if await settles_here(chain):
            remote.good_until_s = loop.time() + GOOD_FOR_S
            return True
        _pass_over(chain, remote, "does not say that it settles here")
        return False


async def settles_here(chain: Chain) -> bool:
    """Whether a facilitator answers now and says that it settles on this network."""
    said = await _call(chain, "GET", "supported", None, LOOK_WAIT_S)
    kinds = said.get("kinds") if said is not None else None
    wanted = {"x402Version": 2, "scheme": "exact", "network": chain.caip2}
    return any(
        isinstance(kind, dict) and wanted.items() <= kind.items()
        for kind in (kinds if isinstance(kinds, list) else [])
    )


def standing(rails: Rails, chain: Chain) -> str:
    """How the network's facilitator is, by the last look or payment of this process: ``ok``,
    ``passed over`` or ``not looked at``. Asks nobody."""
    remote = rails.remotes.get(chain.caip2)
    now_s = asyncio.get_running_loop().time()
    if remote is None or now_s >= max(remote.rest_until_s, remote.good_until_s):
        return "not looked at"
    return PASSED_OVER if now_s < remote.rest_until_s else "ok"


def _pass_over(chain: Chain, remote: Remote, why: str) -> None:
    remote.good_until_s = float("-inf")
    remote.rest_until_s = asyncio.get_running_loop().time() + REST_S
    log.warning("%s: the facilitator %s; payments are settled here meanwhile", chain.name, why)


async def settle(rails: Rails, order: Order, job: Job, method: str) -> Handed | None:
    """Settle a payment that was verified here: by the facilitator, else by ourselves.

    None: somebody has claimed it already. Raises, with nothing claimed or sent, ``Unavailable``
    and ``DatabaseUnavailable``. Afterwards nothing: what is not known yet has no receipt.
    """
    rpc = rails.rpcs[order.chain.caip2]
    from_block = await rpc.block_number()

    async def claim(tx: Tx) -> bool:
        now_ms = await tx.now_ms()
        if not await job.begin(tx, Begun(now_ms, from_block)):
            return False
        await tx.execute(
            "INSERT INTO remote_settlement (payment_id, target, data, at_ms)"
            " VALUES ($1, $2, $3, $4)",
            job.call.payment_id,
            job.call.to,
            job.call.data,
            now_ms,
        )
        return True

    if not await transact(rails.db, claim):
        return None
    told = await ask(rails, order)
    if told is not None:
        receipt = await _receipt(rpc, order, method, told)
        if receipt is not None:
            return Handed(receipt.tx_hash, receipt)
        remote = rails.remotes.setdefault(order.chain.caip2, Remote())
        _pass_over(order.chain, remote, f"named {told}, which did not move this payment")
    own = await ourselves(rails, job)
    return own or Handed(told or "", None)


async def _receipt(rpc: Rpc, order: Order, method: str, tx_hash: str) -> Receipt | None:
    """The receipt of the transaction it named, if that moved this very payment."""
    try:
        receipt = await sender.wait(rpc, tx_hash, order.chain.facilitator_wait_s)
    except Unavailable:
        return None
    if receipt is None:
        return None
    moved = METHODS[method].transfers(order.chain.caip2, receipt, order.spent)
    return receipt if moved else None


async def ourselves(rails: Rails, job: Job) -> Handed | None:
    """Hand a claimed payment in by our own engine. None: it is handed in already, has ended, or
    cannot be handed in now, which its recovery looks into."""

    async def begin(tx: Tx, _at: Begun) -> bool:
        payment = await journal.by_id(tx, job.call.payment_id, lock=True)
        if payment is None or payment.state != "processing":
            return False
        return not await nonces.sent_for(tx, payment.id)

    own = Job(job.chain, job.call, job.payer, job.spends, job.valid_before_s, begin, alone=True)
    try:
        return await engine.settle(rails, own)
    except Exception as error:  # claimed: whatever this is, it must not read as "not sent"
        log.info("payment %s: %s; it is looked at again", job.call.payment_id, error)
        return None


async def call_for(tx: Tx, payment_id: str) -> Call | None:
    """The call that settles a payment which was given to a facilitator."""
    row = await tx.fetchrow(
        "SELECT target, data FROM remote_settlement WHERE payment_id = $1", payment_id
    )
    return None if row is None else Call(payment_id, row["target"], bytes(row["data"]))


# -- over HTTP -------------------------------------------------------------------------------------


async def ask(rails: Rails, order: Order) -> str | None:
    """Have it settled; the hash it names, with success or without. None: nothing to look at."""
    chain = order.chain
    remote = rails.remotes.setdefault(chain.caip2, Remote())
    said = await _call(chain, "POST", "settle", _request(rails, order), chain.facilitator_wait_s)
    if said is None:
        _pass_over(chain, remote, "gave no answer")
        return None
    named = said.get("transaction")
    if isinstance(named, str) and _HASH.fullmatch(named):
        return named.lower()
    _pass_over(chain, remote, f"refused a payment that is good: {str(said)[:200]}")
    return None


def _request(rails: Rails, order: Order) -> dict[str, Any]:
    auth = order.auth
    requirements = {
        "scheme": "exact",
        "network": order.chain.caip2,
        "amount": str(auth.value_units),
        "asset": checksum(order.asset.address),
        "payTo": checksum(auth.to),
        "maxTimeoutSeconds": rails.settings.server.offer_timeout_s,
        "extra": {"name": order.asset.eip712_name, "version": order.asset.eip712_version},
    }
    authorization = {
        "from": checksum(auth.from_),
        "to": checksum(auth.to),
        "value": str(auth.value_units),
        "validAfter": str(auth.valid_after_s),
        "validBefore": str(auth.valid_before_s),
        "nonce": auth.nonce,
    }
    payload = {
        "x402Version": 2,
        "resource": {"url": rails.settings.server.public_url},
        "accepted": requirements,
        "payload": {
            "signature": "0x" + auth.signature.hex(),
            "authorization": authorization,
        },
    }
    return {"x402Version": 2, "paymentPayload": payload, "paymentRequirements": requirements}


async def _call(
    chain: Chain, method: str, what: str, body: dict[str, Any] | None, wait_s: int
) -> dict[str, Any] | None:
    """One question. None for whatever is not a JSON object of reasonable size in time."""
    import aiohttp

    headers = {"Content-Type": "application/json"}
    if chain.facilitator_key is not None:
        headers["Authorization"] = f"Bearer {chain.facilitator_key.get_secret_value()}"
    try:
        async with (
            asyncio.timeout(wait_s),
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http,
            http.request(
                method,
                f"{chain.facilitator}/{what}",
                data=None if body is None else json.dumps(body),
                headers=headers,
                allow_redirects=False,
            ) as response,
        ):
            raw = bytearray()
            async for piece in response.content.iter_chunked(8_192):
                raw += piece
                if len(raw) > MAX_ANSWER_BYTES:
                    return None
            return json_object(bytes(raw))
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        log.info("%s: the facilitator: %s: %s", chain.name, what, type(error).__name__)
        return None
