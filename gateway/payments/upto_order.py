"""A payment by ``upto`` against the offer of ours that it answers: what ``order.py`` is for those
that are settled before the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from chain.errors import Rejected
from chain.networks import Asset
from chain.schemes import permit2, upto
from gateway.errors import Problem
from gateway.payments import gas, offers
from gateway.payments.journal import AuthKey
from gateway.payments.order import CameWith, accepted_units, asset_of
from gateway.payments.rails import Rails, refused
from gateway.payments.wire import Presented
from gateway.settings import Chain

SPARE_S: Final = 60
"""How far a client's clock may be ahead."""
SETTLE_S: Final = 600
"""After the longest that a call may take, so much must be left to settle it."""


@dataclass(frozen=True, slots=True)
class Order:
    """A payment that answers our offer for the request it came with."""

    chain: Chain
    asset: Asset
    auth: upto.Authorization
    content: bytes
    offer: bytes
    most_units: int
    """What the call may come to: the price of the offer, or that of now if it is lower."""

    @property
    def key(self) -> AuthKey:
        return AuthKey(self.chain.caip2, permit2.PERMIT2, self.auth.from_, self.auth.nonce)


def order_of(rails: Rails, presented: Presented, came: CameWith, now_s: int, work_s: int) -> Order:
    """Hold a payment against the offer it answers. ``work_s``: the longest that the call may take.
    Raises ``Problem``."""
    auth = presented.authorization
    chain = rails.chain_of(presented)
    if not isinstance(auth, upto.Authorization) or not came.asked.upto:
        raise Problem("invalid_scheme", "The scheme upto is for routes whose 402 offers it.")
    asset = asset_of(chain, presented)
    units = accepted_units(chain, presented)
    terms = offers.by_upto(chain, asset.address, units, auth.facilitator)
    if presented.timeout_s != terms.timeout_s or presented.offer is None:
        raise Problem(
            "invalid_payment_requirements",
            "This payment does not answer an offer made for this request.",
        )
    ours = {account.address for account in gas.accounts(chain)}
    try:
        upto.check(auth, asset=asset, pay_to=chain.pay_to, facilitators=ours, now_s=now_s)
        upto.check_most(auth, units)
    except Rejected as error:
        raise refused(error) from None
    opened = offers.unseal(rails.keys, presented.offer, came.asked, [terms], now_s)
    if auth.valid_before_s > now_s + offers.UPTO_S + SPARE_S:
        # What is not settled counts as a risk until it cannot be any more.
        raise Problem(
            "invalid_payment_requirements",
            f"The payment is good for longer than the {offers.UPTO_S} s of the offer.",
        )
    if auth.valid_before_s < now_s + work_s + SETTLE_S:
        raise Problem(
            "permit2_deadline_expired",
            f"The payment is settled after the call: its deadline has to be {work_s + SETTLE_S} s "
            "ahead at least.",
        )
    most_units = min(units, opened.price_units, came.asked.price_units)
    return Order(chain, asset, auth, came.content, opened.digest, most_units)
