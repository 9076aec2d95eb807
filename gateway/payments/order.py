"""A presented payment held against our own terms. Nothing of what the payer echoed is trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from chain.errors import ChainError, Rejected
from chain.networks import Asset
from chain.rpc import Rpc
from chain.schemes import eip2612, eip3009, exact, permit2, upto
from gateway.errors import Problem
from gateway.payments import offers
from gateway.payments.journal import AuthKey
from gateway.payments.rails import Rails, refused
from gateway.payments.wire import Presented
from gateway.settings import Chain, Settings
from wallet_auth.keys import checksum
from wallet_auth.request import Call


@dataclass(frozen=True, slots=True)
class Gift:
    """Another wallet than the payer is to get the credits, and what the payer signed to say so;
    nothing about it has been checked. ``call``: how a payer that is a contract is asked."""

    recipient: str
    signature: bytes
    call: Call


@dataclass(frozen=True, slots=True)
class CameWith:
    """The request a payment came with. ``purpose``: what its route sells, a call or credits.

    ``content`` identifies it: the same authorization with other content is a conflict.
    ``amount_units`` is what the request itself says is bought; None: any offer for it will do.
    ``gift``: who gets the credits, if that is not the payer. ``door``: of the payment. ``bare``:
    no identity came with it, so it may be given a credential (accounts/credentials.py). ``alias``:
    the payer's own name for the payment (aliases.py).
    """

    asked: offers.Asked
    purpose: str
    content: bytes
    amount_units: int | None = None
    gift: Gift | None = None
    door: str = ""
    bare: bool = False
    alias: str | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """A payment that was checked against our own terms, and what it is for.

    ``given``: the wallet and its chain that get the credits because the payer signed so
    (``sponsor.py``); None: the payer.
    """

    chain: Chain
    asset: Asset
    auth: exact.Authorization
    purpose: str
    price_units: int
    content: bytes
    offer: bytes | None
    given: tuple[str, str] | None = None
    door: str = ""
    bare: bool = False
    alias: str | None = None

    @property
    def key(self) -> AuthKey:
        where = exact.burned_at(self.asset.address, self.auth)
        return AuthKey(self.chain.caip2, where, self.auth.from_, self.auth.nonce)


def exact_of(presented: Presented) -> exact.Authorization:
    """The authorization of what is settled before the work. ``Problem`` for ``upto``."""
    if isinstance(presented.authorization, upto.Authorization):
        raise Problem(
            "invalid_scheme", "The scheme upto is for routes whose 402 offers it, and not for this."
        )
    return presented.authorization


def asset_of(chain: Chain, presented: Presented) -> Asset:
    if presented.asset is None:
        return chain.network.usdc
    asset = chain.network.asset(presented.asset)
    if asset is None:
        raise Problem(
            "invalid_payment_requirements",
            f"The token {presented.asset[:42]} is not accepted on {chain.name}.",
        )
    return asset


def key_of(chain: Chain, presented: Presented) -> AuthKey:
    """What the one-time value of a payment is unique under. Raises ``Problem``."""
    auth = presented.authorization
    where = exact.burned_at(asset_of(chain, presented).address, auth)
    return AuthKey(chain.caip2, where, auth.from_, auth.nonce)


def order_of(rails: Rails, presented: Presented, came: CameWith, now_s: int) -> Order:
    """Hold a payment against our own terms. Nothing of what the payer echoed is trusted."""
    chain = rails.chain_of(presented)
    auth, asset = exact_of(presented), asset_of(chain, presented)
    if isinstance(auth, permit2.Authorization) and not chain.eip2612:
        auth = replace(auth, permit=None)
    opened = None
    if presented.offer is not None:
        opened = offers.unseal(
            rails.keys, presented.offer, came.asked, _candidates(chain, presented), now_s
        )
        terms = opened.terms
    else:
        terms = _matching(rails, chain, presented, came)
    if came.amount_units not in (None, terms.amount_units):
        raise Problem(
            "invalid_exact_evm_payload_authorization_value_mismatch",
            f"The request asks for {came.amount_units} units and pays {terms.amount_units}.",
        )
    try:
        exact.check(
            auth, asset=asset, pay_to=terms.pay_to, amount_units=terms.amount_units, now_s=now_s
        )
    except Rejected as error:
        raise refused(error) from None
    return Order(
        chain=chain,
        asset=asset,
        auth=auth,
        purpose=terms.purpose,
        # The price of the offer holds, and nobody pays more than the price now: a ceiling that was
        # signed for this request has been held against that one.
        price_units=min(opened.price_units, came.asked.price_units)
        if opened is not None
        else came.asked.price_units,
        content=came.content,
        offer=opened.digest if opened is not None else None,
        door=came.door,
        bare=came.bare,
        alias=came.alias,
    )


def refused_order(order: Order, error: ChainError) -> Problem:
    """``refused`` for an order at hand: what its payer can do is told with the order's numbers."""
    if isinstance(error, Rejected) and error.code == permit2.ALLOWANCE_REQUIRED:
        said = ""
        if isinstance(order.auth, permit2.Authorization) and order.auth.permit is not None:
            said = f" ({error.detail})"
        auth = order.auth
        return allowance_required(order.chain, order.asset, auth.from_, auth.value_units, said)
    return refused(error)


def allowance_required(
    chain: Chain, asset: Asset, payer: str, units: int, said: str = "", *, by_permit: bool = True
) -> Problem:
    """The payer has not let Permit2 move the token. Nothing was claimed, so the very same payment
    is good once it has. ``by_permit``: a signed approval would do."""
    do = ""
    if by_permit and chain.eip2612:
        do = f", or sign the approval (EIP-2612, the extension {eip2612.KEY})"
    spender, token = checksum(permit2.PERMIT2), checksum(asset.address)
    return Problem(
        "PERMIT2_ALLOWANCE_REQUIRED",
        f"{checksum(payer)} has not approved Permit2 ({spender}) for {units} units "
        f"of {asset.symbol} ({token}) on {chain.name}{said}; nothing was sent. Approve{do}, "
        "and send the same request again while the payment is good, or pay with an offer that "
        "needs none.",
        members={
            "spender": spender,
            "token": token,
            "amount": str(units),
            "network": chain.caip2,
            "payer": payer,
        },
    )


async def payer_chain_of(rpc: Rpc, order: Order) -> str:
    """Whose account a payer with code is: an EIP-7702 key's own, or the contract's on its chain."""
    return await chain_of_payer(rpc, order.auth.from_)


async def chain_of_payer(rpc: Rpc, payer: str) -> str:
    """The same of any address."""
    kind = await eip3009.account_kind(rpc, payer)
    return "" if kind == "key" else rpc.network.caip2


def _candidates(chain: Chain, presented: Presented) -> list[offers.Terms]:
    """The terms that the echoed offer can stand for: ours in every part but the amount, which
    the token's MAC covers."""
    amount_units = accepted_units(chain, presented)
    return [
        offers.Terms(
            chain,
            asset_of(chain, presented).address,
            chain.pay_to,
            amount_units,
            purpose,
            presented.timeout_s or 0,
            exact.method_of(presented.authorization),
        )
        for purpose in (offers.CALL, offers.CREDITS)
    ]


def accepted_units(chain: Chain, presented: Presented) -> int:
    """The amount of the offer that the payer echoed, which has to pay us. Raises ``Problem``."""
    amount = presented.amount or ""
    if (
        not amount.isascii()
        or not amount.isdigit()
        or len(amount) > 16
        or amount != str(int(amount))
    ):
        raise Problem("invalid_payload", "accepted.amount is not a string of decimal digits.")
    if presented.pay_to != chain.pay_to:
        raise Problem(
            "invalid_exact_evm_payload_recipient_mismatch", "The offer pays somebody else."
        )
    return int(amount)


def _matching(rails: Rails, chain: Chain, presented: Presented, came: CameWith) -> offers.Terms:
    """Without a token (x402 v1): the amount must be one that is on offer for this request now, or
    was while an offer lives, since gas may have risen meanwhile."""
    auth = exact_of(presented)
    how = chain.caip2, exact.method_of(auth)
    for floors in dict.fromkeys((rails.floors, rails.lately)):
        for terms in _on_offer(rails.settings, presented, came, floors):
            paid = terms.amount_units == auth.value_units
            if paid and (terms.chain.caip2, terms.method) == how:
                return terms
    raise Problem(
        "invalid_exact_evm_payload_authorization_value_mismatch",
        f"The payment is for {auth.value_units} units, which is not on offer.",
    )


def _on_offer(
    settings: Settings, presented: Presented, came: CameWith, floors: offers.Floors
) -> Sequence[offers.Terms]:
    if came.purpose == offers.CREDITS:
        return offers.terms_for_credits(settings, exact_of(presented).value_units, floors)
    price_units = came.asked.price_units
    return offers.terms_for_asked(settings, came.asked, price_units, price_units, floors)
