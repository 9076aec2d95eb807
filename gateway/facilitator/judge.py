"""Whether a payment is good for what its seller wants, now. Writes and sends nothing."""

from __future__ import annotations

from dataclasses import dataclass

from chain.errors import Rejected
from chain.networks import Asset
from chain.schemes import eip3009, erc6492, exact, permit2, upto
from chain.schemes.exact import Permission
from gateway.facilitator import wire
from gateway.facilitator.wire import UPTO, Asked, Wanted
from gateway.payments import gas
from gateway.payments.journal import AuthKey
from gateway.payments.rails import Rails
from gateway.settings import Chain


@dataclass(frozen=True, slots=True)
class Order:
    """A payment held against what its seller wants. The chain has not been asked yet.

    ``units``: what is to be moved; by ``upto`` that may be less than what is permitted, and 0.
    """

    chain: Chain
    asset: Asset
    auth: Permission
    units: int

    @property
    def method(self) -> str:
        """The row of ``payments/methods.py`` that knows how its transfer is told."""
        return exact.method_of(self.auth)

    @property
    def key(self) -> AuthKey:
        """What its one-time value is unique under."""
        where = exact.burned_at(self.asset.address, self.auth)
        return AuthKey(self.chain.caip2, where, self.auth.from_, self.auth.nonce)

    @property
    def call(self) -> tuple[str, bytes]:
        """Receiver and calldata of what settles it."""
        if isinstance(self.auth, upto.Authorization):
            return upto.PROXY, upto.settle_calldata(self.auth, self.units)
        return exact.call_of(self.asset, self.auth)


def order_of(rails: Rails, asked: Asked, now_s: int, *, settling: bool) -> Order:
    """Everything that can be judged without the chain. ``settling``: the amount is what a call
    came to, else the most that it may. ``Rejected`` with the reason."""
    wanted = wire.wanted(asked)
    method = _method(wanted)
    chain = _chain(rails, asked.version, wanted.network)
    # Its money would be minted as credits here as well: one payment, bought twice.
    if any(wanted.pay_to == ours.pay_to for ours in rails.settings.chains):
        raise Rejected(
            "invalid_payment_requirements",
            "payTo is this deployment's own: it settles its sales itself",
        )
    asset = chain.network.asset(wanted.asset)
    if asset is None:
        raise Rejected("invalid_payment_requirements", f"the token {wanted.asset} is not known")
    if wanted.scheme == UPTO:
        return _upto(chain, asset, asked, wanted, now_s, settling=settling)
    if method == "permit2":
        by_permit2 = permit2.parse(asked.payload, asked.extensions)
        permit2.check(
            by_permit2,
            asset=asset,
            pay_to=wanted.pay_to,
            amount_units=wanted.amount_units,
            now_s=now_s,
        )
        return Order(chain, asset, by_permit2, by_permit2.value_units)
    if wanted.token != (asset.eip712_name, asset.eip712_version):
        raise Rejected(
            "invalid_payment_requirements",
            f"extra should have name {asset.eip712_name!r} and version {asset.eip712_version!r}",
        )
    auth = eip3009.parse(asked.payload)
    eip3009.check(auth, pay_to=wanted.pay_to, amount_units=wanted.amount_units, now_s=now_s)
    return Order(chain, asset, auth, auth.value_units)


def _upto(
    chain: Chain, asset: Asset, asked: Asked, wanted: Wanted, now_s: int, *, settling: bool
) -> Order:
    auth = upto.parse(asked.payload)
    ours = [account.address for account in gas.accounts(chain)]
    upto.check(auth, asset=asset, pay_to=wanted.pay_to, facilitators=ours, now_s=now_s)
    if settling:
        upto.check_actual(auth, wanted.amount_units)
    elif wanted.amount_units == 0:
        raise Rejected("invalid_payment_requirements", "a maximum of nothing")
    else:
        upto.check_most(auth, wanted.amount_units)
    return Order(chain, asset, auth, wanted.amount_units)


def _method(wanted: Wanted) -> str:
    methods = {"exact": ("eip3009", "permit2"), UPTO: ("permit2",)}.get(wanted.scheme)
    if methods is None:
        raise Rejected("unsupported_scheme", f"{wanted.scheme[:40]!r} is not settled here")
    method = wanted.extra.get("assetTransferMethod", methods[0])
    if method not in methods:
        raise Rejected(
            "unsupported_scheme", f"assetTransferMethod should be {' or '.join(methods)}"
        )
    return str(method)


def _chain(rails: Rails, version: int, network: str) -> Chain:
    for chain in rails.settings.chains:
        name = chain.caip2 if version == 2 else chain.network.v1_name
        if name == network and chain.settler_key is not None:
            return chain
    raise Rejected("invalid_network", f"{network[:60]!r} is not settled here")


async def look(rails: Rails, order: Order, now_s: int) -> tuple[str, Permission]:
    """Ask the chain whether it would move the money now: how it is signed (``erc6492.verify``), and
    the form in which it should be settled (``permit2.settable``).

    ``Rejected`` with the reason, ``Unavailable`` if the chain cannot be asked.
    """
    rpc = rails.rpcs[order.chain.caip2]
    if isinstance(order.auth, upto.Authorization):
        return await upto.verify(rpc, order.asset, order.auth, order.units), order.auth
    if isinstance(order.auth, permit2.Authorization):
        return await permit2.settable(rpc, order.asset, order.auth)
    factories = frozenset(rails.settings.facilitator.erc6492_factories)
    kind = await erc6492.verify(rpc, order.asset, order.auth, now_s, factories)
    return kind, order.auth
