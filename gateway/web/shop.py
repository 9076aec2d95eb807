"""What the pages say: who sells, what can be bought, how a payment stands. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

from gateway import forms
from gateway.errors import Problem
from gateway.money import format_credits, format_usd
from gateway.payments.journal import Payment
from gateway.payments.purchase import amount_of
from gateway.payments.stripe import cents_of
from gateway.settings import Settings
from gateway.web.pages import STRIPE_PAGES

CHECKOUT_MS: Final = 3_600_000  # a Checkout page is open for an hour


@dataclass(frozen=True, slots=True)
class Pack:
    """An amount to choose."""

    usd: str  # without the sign, as the form sends it
    label: str
    credits: str
    by_card: bool


@dataclass(frozen=True, slots=True)
class State:
    """How a payment stands, in the words people know."""

    word: str
    tone: str  # wait, good or bad: the colour and the sign
    text: str
    final: bool


def frame(settings: Settings) -> dict[str, Any]:
    """What every page needs."""
    return {"operator": settings.server.operator or settings.server.authority}


def packs(settings: Settings) -> list[Pack]:
    """The amounts of the config."""
    return [
        Pack(
            format_usd(units)[1:],
            format_usd(units),
            format_credits(units, settings.credits.per_usd),
            _by_card(units),
        )
        for units in settings.credits.packs_units
    ]


def _by_card(units: int) -> bool:
    try:
        cents_of(units)
    except Problem:
        return False
    return True


def terms(settings: Settings) -> dict[str, Any]:
    """What is bought, for the buy page."""
    span = settings.credits.expire_after
    return {
        "packs": packs(settings),
        "one_usd": format_credits(1_000_000, settings.credits.per_usd),
        "expires": None if span is None else span.text,
        "networks": [
            {
                "name": network_name(chain.name),
                "caip2": chain.caip2,
                "symbol": chain.network.usdc.symbol,
                "token": chain.network.usdc.address,
                "test": chain.network.testnet,
            }
            for chain in settings.chains
            if chain.settler_key is not None
        ],
    }


def network_name(name: str) -> str:
    """``base-sepolia`` -> ``Base Sepolia``."""
    return name.replace("-", " ").title()


def snippets(settings: Settings) -> dict[str, str]:
    """Copy-and-paste code with this gateway's own address and smallest pack in it."""
    base = settings.server.public_url
    usd = packs(settings)[0].usd
    network = next((c.caip2 for c in settings.chains if c.settler_key is not None), "")
    body = json.dumps({"amount_usd": usd})
    return {
        "curl": f"curl -i {base}/farebox/v1/credits/purchase \\\n"
        f"  -H 'content-type: application/json' -d '{body}'",
        "python": "import os, httpx\n"
        "from wallet_auth.agent import WalletAuth\n\n"
        'wallet = WalletAuth(os.environ["PRIVATE_KEY"], max_usd_per_payment="'
        f'{usd}")\n'
        "with httpx.Client(auth=wallet) as agent:\n"
        f'    bought = agent.post("{base}/farebox/v1/credits/purchase",\n'
        f'                        json={{"amount_usd": "{usd}"}})\n'
        "    print(bought.json())",
        "typescript": 'import { wrapFetchWithPaymentFromConfig } from "@x402/fetch";\n'
        'import { ExactEvmScheme } from "@x402/evm";\n'
        'import { privateKeyToAccount } from "viem/accounts";\n\n'
        "const account = privateKeyToAccount(process.env.PRIVATE_KEY);\n"
        "const pay = wrapFetchWithPaymentFromConfig(fetch, {\n"
        f'  schemes: [{{ network: "{network}", client: new ExactEvmScheme(account) }}],\n'
        "});\n"
        f'const bought = await pay("{base}/farebox/v1/credits/purchase", {{\n'
        '  method: "POST",\n'
        '  headers: { "content-type": "application/json" },\n'
        f'  body: JSON.stringify({{ amount_usd: "{usd}" }}),\n'
        "});\n"
        "console.log(await bought.json());",
    }


def checkout_origins(settings: Settings) -> tuple[str, ...]:
    """Where a form on the buy page may lead."""
    if not settings.stripe.enabled:
        return ()
    if not settings.stripe.api_base:
        return (STRIPE_PAGES,)
    parts = urlsplit(settings.stripe.api_base)
    return (f"{parts.scheme}://{parts.netloc}",)


@dataclass(frozen=True, slots=True)
class Order:
    """A filled-in buy form: what was typed, and what it means or why it means nothing."""

    amount: str  # the chosen pack, "other" or ""
    other: str
    wallet: str
    units: int = 0
    address: str = ""  # lower case, if the wallet is one
    amount_fault: str = ""
    wallet_fault: str = ""

    @property
    def ok(self) -> bool:
        return not (self.amount_fault or self.wallet_fault)


def read_order(settings: Settings, form: dict[str, str]) -> Order:
    """Judge a form of the buy page; faults are texts for the person who typed."""
    amount, other = form.get("amount", "")[:20], form.get("other", "").strip()[:20]
    wallet = form.get("wallet", "").strip()[:100]
    units, amount_fault = 0, ""
    try:
        units = amount_of(settings, {"amount_usd": other if amount == "other" else amount})
        cents_of(units)
    except Problem as problem:
        amount_fault = _sentence(problem.detail)
        if amount in {"", "other"} and not other:
            amount_fault = "Choose an amount."
    address, wallet_fault = "", ""
    try:
        address = forms.address(wallet)
    except ValueError as error:
        wallet_fault = f"The wallet address {error}." if wallet else "Enter a wallet address."
    return Order(amount, other, wallet, units, address, amount_fault, wallet_fault)


def _sentence(detail: str) -> str:
    return detail[:1].upper() + detail[1:].rstrip(".") + "."


def prefilled(settings: Settings, query: dict[str, str]) -> Order:
    """The empty form, or what a link chose: ``?wallet=0x…&usd=5``. Faults are not shown yet."""
    usd = query.get("usd", "").strip().lstrip("$")[:20]
    known = [pack.usd for pack in packs(settings) if pack.by_card]
    if usd in known:
        amount, other = usd, ""
    elif usd:
        amount, other = "other", usd
    else:
        amount, other = next(iter(known), "other"), ""
    return Order(amount, other, query.get("wallet", "").strip()[:100])


_STATES: Final[dict[str, State]] = {
    "created": State("Waiting", "wait", "We are waiting for your payment.", final=False),
    "processing": State(
        "Processing",
        "wait",
        "Your bank is moving the money. The credits come as soon as it has arrived; this can "
        "take some days, and you can close this page.",
        final=False,
    ),
    "succeeded": State("Paid", "good", "The credits are in the wallet's account.", final=True),
    "failed": State("Failed", "bad", "The payment did not go through.", final=True),
    "refunded": State("Refunded", "bad", "The money went back to you.", final=True),
    "disputed": State("Disputed", "bad", "The payment is disputed with the bank.", final=True),
    "reversed": State("Reversed", "bad", "The payment was undone by the chain.", final=True),
}
_EXPIRED: Final = State(
    "Expired", "bad", "The time to pay is over. Nothing was charged.", final=True
)


def state_of(payment: Payment) -> State:
    """The words for a payment's state."""
    if payment.state == "failed" and payment.error_code == "expired":
        return _EXPIRED
    return _STATES[payment.state]


def payment_facts(settings: Settings, payment: Payment, now_ms: int) -> dict[str, Any]:
    """What the page of a payment shows."""
    state = state_of(payment)
    open_page = payment.state == "created" and now_ms < payment.created_at_ms + CHECKOUT_MS
    again = {"usd": format_usd(payment.amount_units)[1:]}
    if payment.recipient:
        again["wallet"] = payment.recipient
    explorer = None
    if payment.tx_hash and payment.network:
        chain = next((c for c in settings.chains if c.caip2 == payment.network), None)
        explorer = chain and chain.network.explorer_tx.replace("{tx}", payment.tx_hash)
    return {
        "payment": payment,
        "state": state,
        "credits": format_credits(payment.amount_units, settings.credits.per_usd),
        "pay_url": payment.external_url if open_page else None,
        "again_url": f"/farebox/buy?{urlencode(again)}",
        "explorer": explorer,
    }
