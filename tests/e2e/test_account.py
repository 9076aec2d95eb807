"""What an account's owner can read: balance, statement, lots, what became of a call."""

from __future__ import annotations

from typing import Any

import httpx

from anvil.devnet import Devnet
from gateway.db import Database
from gateway.ledger import Freeze, Reverse, Step, Unfreeze, apply
from tests.e2e.stage import CHEAP_UNITS, PRICE_UNITS, Gateway
from tests.e2e.wallet import Wallet, buy, new_wallet, offers, problem

CREDITS = "/farebox/v1/credits"


async def read(
    http: httpx.AsyncClient, gateway: Gateway, wallet: Wallet, path: str
) -> httpx.Response:
    return await http.get(path, headers=wallet.sign("GET", gateway.url + path))


async def test_a_balance_and_its_statement(
    gateway: Gateway, wallet: Wallet, cheap: str, target: str
) -> None:
    async with gateway.client() as http:
        empty = (await read(http, gateway, wallet, f"{CREDITS}/balance")).json()
        assert (empty["total_units"], empty["recent"], empty["next_expiry"]) == (0, [], None)
        await buy(http, wallet)
        for path in (cheap, cheap, target):
            assert (await read(http, gateway, wallet, path)).status_code == 200
        assert (await read(http, gateway, wallet, "/500")).status_code == 502
        spent = 2 * CHEAP_UNITS + PRICE_UNITS
        shown = (await read(http, gateway, wallet, f"{CREDITS}/balance")).json()
        assert shown["wallet"] == wallet.address
        assert shown["available_units"] == shown["total_units"] == 1_000_000 - spent
        assert shown["available"] == "98.6"
        assert shown["held_units"] == shown["debt_units"] == 0
        assert shown["lifetime_added_units"] == 1_000_000
        assert shown["lifetime_spent_units"] == spent
        assert 363 <= shown["next_expiry"]["days"] <= 366  # twelve months
        signed = [line["amount_units"] for line in shown["recent"]]
        assert signed == [0, -PRICE_UNITS, -CHEAP_UNITS, -CHEAP_UNITS, 1_000_000]
        # The same by pages of two, without a gap or a double.
        lines: list[dict[str, Any]] = []
        path = f"{CREDITS}/transactions?limit=2"
        for _ in range(4):
            page = (await read(http, gateway, wallet, path)).json()
            lines += page["transactions"]
            if page["next_cursor"] is None:
                break
            path = f"{CREDITS}/transactions?limit=2&cursor={page['next_cursor']}"
        assert [line["amount_units"] for line in lines] == signed
        assert lines[-1]["balance_units"] == 1_000_000
        assert lines[0]["balance_units"] == 1_000_000 - spent
        assert len({line["id"] for line in lines}) == 5
        for odd in ("limit=0", "limit=1001", "limit=x", "limit=1e1", "cursor=-1", "limit=+1"):
            answer = await read(http, gateway, wallet, f"{CREDITS}/transactions?{odd}")
            problem(answer, "invalid_request")


async def test_lots_say_where_credits_came_from(
    gateway: Gateway, wallet: Wallet, cheap: str
) -> None:
    """A pack expires as its operator says; what a call left of its own payment never does."""
    async with gateway.client() as http:
        header = {"PAYMENT-SIGNATURE": wallet.pay(offers(await http.get(cheap))[0])}
        assert (await http.get(cheap, headers=header)).status_code == 200
        await buy(http, wallet)
        lots = (await read(http, gateway, wallet, f"{CREDITS}/lots")).json()["lots"]
    assert sorted(lot["minted_units"] for lot in lots) == [PRICE_UNITS, 1_000_000]
    change = next(lot for lot in lots if lot["minted_units"] == PRICE_UNITS)
    pack = next(lot for lot in lots if lot["minted_units"] == 1_000_000)
    assert change["expires_at_ms"] is None
    assert pack["expires_at_ms"] is not None
    assert {lot["payer"] for lot in lots} == {wallet.address}
    assert {lot["source"] for lot in lots} == {"x402"}


async def test_a_lot_says_what_others_claim_of_it(
    gateway: Gateway, wallet: Wallet, target: str
) -> None:
    names = ("remaining_units", "reversed_units", "frozen_units", "short_units", "state")
    async with gateway.client() as http:
        await buy(http, wallet)
        assert (await read(http, gateway, wallet, target)).status_code == 200

        async def shown() -> list[Any]:
            (lot,) = (await read(http, gateway, wallet, f"{CREDITS}/lots")).json()["lots"]
            return [lot[name] for name in names]

        (lot,) = (await read(http, gateway, wallet, f"{CREDITS}/lots")).json()["lots"]
        assert await shown() == [990_000, 0, 0, 0, "live"]
        await _apply(gateway, Reverse(lot["id"], 400_000, "a part went back"))
        assert await shown() == [590_000, 400_000, 0, 0, "live"]
        await _apply(gateway, Freeze(lot["id"], "in dispute"))
        assert await shown() == [0, 400_000, 600_000, PRICE_UNITS, "frozen"]
        balance = (await read(http, gateway, wallet, f"{CREDITS}/balance")).json()
        assert balance["debt_units"] == PRICE_UNITS
        await _apply(gateway, Unfreeze(lot["id"]))
        assert await shown() == [590_000, 400_000, 0, 0, "live"]


async def _apply(gateway: Gateway, step: Step) -> None:
    """What a webhook does, beside the running gateway."""
    db = await Database.connect(gateway.database)
    try:
        async with db.write() as tx:
            await apply(tx, [step], await tx.now_ms())
    finally:
        await db.close()


async def test_what_became_of_a_call_is_for_its_owner(
    gateway: Gateway, wallet: Wallet, target: str, chain_session: Devnet
) -> None:
    async with gateway.client() as http:
        await buy(http, wallet)
        answer = await read(http, gateway, wallet, target)
        path = f"/farebox/v1/requests/{answer.headers['farebox-request-id']}"
        mine = await read(http, gateway, wallet, path)
        assert mine.status_code == 200, mine.text
        assert str(PRICE_UNITS) in mine.text and target in mine.text
        stranger = new_wallet(chain_session, 0)
        problem(await read(http, gateway, stranger, path), "not_found")
        problem(await http.get(path), "identity_required")
