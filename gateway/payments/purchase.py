"""Buying credits by name: how much was asked for, and what a finished purchase says."""

from __future__ import annotations

from typing import Any

from gateway.errors import Problem
from gateway.money import UNITS_PER_USD, format_credits, format_usd, parse_usd
from gateway.payments.journal import Payment
from gateway.settings import Settings

MAX_PURCHASE_UNITS = 100_000 * 1_000_000


def amount_of(settings: Settings, asked: dict[str, Any]) -> int:
    """Units of ``{"amount_usd": "1"}`` or ``{"credits": 500}``. Raises ``Problem``.

    An amount in dollars is whatever can be settled; a number of credits is also a multiple of
    ``pack_multiple``, and a wrong one is answered with the nearest, upwards, that can be bought.
    """
    usd, count = asked.get("amount_usd"), asked.get("credits")
    if (usd is None) == (count is None):
        raise Problem(
            "invalid_request", 'Say how much: {"amount_usd": "1"} or {"credits": 500}, one of them.'
        )
    if usd is not None:
        return _dollars(settings, usd)
    if isinstance(count, bool) or not isinstance(count, int):
        raise Problem("invalid_request", "credits is a whole number.")
    return _credits(settings, count)


def _credits(settings: Settings, count: int) -> int:
    step, units_each = settings.credits.pack_multiple, UNITS_PER_USD // settings.credits.per_usd
    least = -(-_smallest_units(settings) // (units_each * step)) * step
    most = MAX_PURCHASE_UNITS // (units_each * step) * step
    if count % step or not least <= count <= most:
        suggested = max(least, min(most, -(-count // step) * step))
        raise Problem(
            "invalid_amount",
            f"Credits are sold in multiples of {step}, from {least} to {most} at once.",
            members={"suggested_credits": suggested, "pack_multiple": step},
        )
    return count * units_each


def _dollars(settings: Settings, usd: object) -> int:
    if not isinstance(usd, str):
        raise Problem("invalid_request", 'amount_usd is text, such as "1" or "2.50".')
    try:
        units = parse_usd(usd)
    except ValueError as error:
        raise Problem("invalid_amount", f"amount_usd: {error}.") from None
    return _bounded(settings, units)


def _smallest_units(settings: Settings) -> int:
    """The smallest amount that some network settles here; without one, the smallest pack."""
    floors = [c.min_onchain_units for c in settings.chains if c.settler_key is not None]
    return min(floors, default=settings.credits.packs_units[0])


def _bounded(settings: Settings, units: int) -> int:
    smallest = _smallest_units(settings)
    if not smallest <= units <= MAX_PURCHASE_UNITS:
        raise Problem(
            "invalid_amount",
            f"An amount from {format_usd(smallest)} to {format_usd(MAX_PURCHASE_UNITS)} can be "
            "bought at once.",
            members={"packs_usd": [format_usd(p) for p in settings.credits.packs_units]},
        )
    return units


def shown(settings: Settings, payment: Payment, minted_units: int | None) -> dict[str, Any]:
    """A payment as its owner sees it."""
    per_usd = settings.credits.per_usd
    view: dict[str, Any] = {
        "payment_id": payment.id,
        "state": payment.state,
        "provider": payment.provider,
        "amount_usd": format_usd(payment.amount_units),
        "amount_units": payment.amount_units,
        "credits": format_credits(payment.amount_units, per_usd),
        "created_at_ms": payment.created_at_ms,
        "updated_at_ms": payment.updated_at_ms,
        "error": payment.error_code,
    }
    if payment.provider in ("x402", "deposits"):
        view |= {"network": payment.network, "transaction": payment.tx_hash}
    if minted_units is not None:
        view |= {
            "minted": format_credits(minted_units, per_usd),
            "minted_units": minted_units,
            "expires_at_ms": payment.expires_ms,
        }
    return view
