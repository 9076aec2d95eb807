"""Who may ask, what is settled once, and what is said of what is not known."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from anvil.devnet import Devnet
from chain.schemes import eip3009
from gateway import work
from gateway.db import Database
from tests.fixtures_chain import USDC, FaultyNode, payment
from tests.gateway.facilitator.parts import (
    API_KEY,
    SELLER,
    Facilitator,
    asking,
    opened,
    paying,
    requirements,
)
from tests.gateway.payments.parts import PAY_TO


def test_the_fixtures_are_compiled_from_their_sources() -> None:
    """Rebuilding needs npm's solc; that nothing is missing can be seen without."""
    folder = Path(__file__).parents[3] / "contracts" / "fixtures"
    compiled = json.loads((folder / "compiled.json").read_text())
    sources = "".join(path.read_text() for path in folder.glob("*.sol"))
    for name in compiled.keys() - {"solc"}:
        assert f"contract {name} " in sources


# -- who may ask -----------------------------------------------------------------------------------


async def test_it_is_off_unless_it_is_switched_on(chain_net: Devnet, sqlite_url: str) -> None:
    async with opened(chain_net, sqlite_url, api_key="") as ours:
        for method, what in (("GET", "supported"), ("POST", "verify"), ("POST", "settle")):
            answer = await ours.http.request(method, f"/farebox/x402/{what}", json={})
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "Bearer nonsense")],
        [("authorization", f"Bearer {API_KEY}x")],
        [("authorization", API_KEY)],
        [("authorization", f"Bearer {API_KEY}"), ("authorization", "Bearer other")],
    ],
)
async def test_without_its_key_nothing_is_said(
    chain_net: Devnet, sqlite_url: str, headers: list[tuple[str, str]]
) -> None:
    async with opened(chain_net, sqlite_url) as ours:
        del ours.http.headers["authorization"]
        asked = paying(chain_net.accounts[0])
        for what in ("verify", "settle"):
            answer = await ours.http.post(f"/farebox/x402/{what}", json=asked, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (401, "api_key_required")
        answer = await ours.http.get("/farebox/x402/supported", headers=headers)
        assert answer.status_code == (401 if headers else 200)
        assert await ours.rows() == []


async def test_what_is_supported(chain_net: Devnet, sqlite_url: str) -> None:
    async with opened(chain_net, sqlite_url) as ours:
        answer = await ours.http.get("/farebox/x402/supported")
    assert answer.json() == {
        "kinds": [
            {"x402Version": 2, "scheme": "exact", "network": "eip155:84532"},
            {"x402Version": 1, "scheme": "exact", "network": "base-sepolia"},
        ],
        "extensions": ["eip2612GasSponsoring"],
        "signers": {"eip155:*": [chain_net.settler.address]},
    }


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b"not json",
        b'{"paymentPayload": {}, "paymentPayload": {}, "paymentRequirements": {}}',
        b'{"x402Version": 2, "paymentPayload": [], "paymentRequirements": {}}',
        b'{"x402Version": 2, "paymentPayload": {"x402Version": 2}}',
        b'{"x402Version": 2, "paymentPayload": {"x402Version": "2"}, "paymentRequirements": {}}',
        b'{"x402Version": 2, "paymentPayload": {"x402Version": true}, "paymentRequirements": {}}',
        b'{"x402Version": 2, "paymentPayload": {}, "paymentRequirements": {"a": NaN}}',
    ],
)
async def test_only_what_is_malformed_is_400(
    chain_net: Devnet, sqlite_url: str, body: bytes
) -> None:
    async with opened(chain_net, sqlite_url) as ours:
        for what in ("verify", "settle"):
            answer = await ours.http.post(f"/farebox/x402/{what}", content=body)
            assert (answer.status_code, answer.json()["code"]) == (400, "invalid_payload")


async def refused(ours: Facilitator, asked: dict[str, Any], reason: str) -> None:
    sent = ours.sent()
    assert (await ours.ask("verify", asked))["invalidReason"] == reason
    told = await ours.ask("settle", asked)
    assert (told["success"], told["errorReason"], told["transaction"]) == (False, reason, "")
    assert ours.sent() == sent


async def test_our_own_address_is_nobody_elses_sale(chain_net: Devnet, sqlite_url: str) -> None:
    for spelled in (PAY_TO, PAY_TO.replace("ab", "AB")):
        asked = asking(payment(chain_net.accounts[0], PAY_TO, 10_000), requirements(pay_to=spelled))
        async with opened(chain_net, sqlite_url) as ours:
            await refused(ours, asked, "invalid_payment_requirements")
            assert await ours.rows() == []


async def test_other_schemes_are_refused(chain_net: Devnet, sqlite_url: str) -> None:
    payer = chain_net.accounts[0]
    other = requirements()["extra"] | {"assetTransferMethod": "erc7710"}
    async with opened(chain_net, sqlite_url) as ours:
        for wanted in (requirements(scheme="batch-settlement"), requirements(extra=other)):
            asked = asking(payment(payer, SELLER, 10_000), wanted)
            await refused(ours, asked, "unsupported_scheme")


# -- once ------------------------------------------------------------------------------------------


async def test_asked_twice_at_once_on_two_nodes(chain_net: Devnet, postgres_url: str) -> None:
    """One transaction, and everybody hears the same success."""
    asked = paying(chain_net.accounts[0])
    async with (
        opened(chain_net, postgres_url) as one,
        opened(chain_net, postgres_url) as two,
    ):
        before, sent = chain_net.balance_units(SELLER), one.sent()
        told = await asyncio.gather(*(node.ask("settle", asked) for node in (one, two) * 3))
        assert told[0]["success"] is True, told[0]
        assert all(each == told[0] for each in told)
        assert one.sent() == sent + 1
        assert chain_net.balance_units(SELLER) == before + 10_000
        assert len(await one.rows()) == 1


async def test_many_at_once_on_two_nodes(chain_net: Devnet, postgres_url: str) -> None:
    asked = [paying(chain_net.accounts[n % 8]) for n in range(12)]
    async with (
        opened(chain_net, postgres_url, settle_wait_s=15) as one,
        opened(chain_net, postgres_url, settle_wait_s=15) as two,
    ):
        before = chain_net.balance_units(SELLER)
        told = await asyncio.gather(
            *((one, two)[n % 2].ask("settle", each) for n, each in enumerate(asked))
        )
        assert all(each["success"] for each in told), told
        assert len({each["transaction"] for each in told}) == 12
        assert chain_net.balance_units(SELLER) == before + 120_000


async def test_a_settled_payment_is_not_verified_again(chain_net: Devnet, db_url: str) -> None:
    """A seller that verifies first does not serve twice; one that asks to settle hears the same,
    for a while."""
    asked = paying(chain_net.accounts[0])
    async with opened(chain_net, db_url, repeat_s=60) as ours:
        told = await ours.ask("settle", asked)
        assert told["success"] is True
        verdict = await ours.ask("verify", asked)
        assert verdict["invalidReason"] == "invalid_transaction_state"
        sent = ours.sent()
        assert await ours.ask("settle", asked) == told
        async with ours.node.db.write() as tx:
            await tx.execute("UPDATE payment SET updated_at_ms = updated_at_ms - 61000")
        late = await ours.ask("settle", asked)
        assert (late["success"], late["errorReason"]) == (False, "invalid_transaction_state")
        assert told["transaction"] in late["errorMessage"]
        assert ours.sent() == sent


async def test_other_byte_forms_are_the_same_payment(chain_net: Devnet, sqlite_url: str) -> None:
    """v as 0 or 1, upper-case hex: one payment, whatever its spelling."""
    payload = payment(chain_net.accounts[0], SELLER, 10_000)
    v = int(payload["signature"][-2:], 16)
    parity = payload | {"signature": payload["signature"][:-2] + f"{v - 27:02x}"}
    loud = payload | {"signature": "0x" + payload["signature"][2:].upper()}
    async with opened(chain_net, sqlite_url) as ours:
        told = [await ours.ask("settle", asking(each)) for each in (parity, loud, payload)]
        assert all(each["success"] for each in told)
        assert len({each["transaction"] for each in told}) == 1
        assert len(await ours.rows()) == 1


async def test_used_by_a_stranger_before_it_came_here(chain_net: Devnet, sqlite_url: str) -> None:
    payload = payment(chain_net.accounts[0], SELLER, 10_000)
    data = eip3009.transfer_calldata(eip3009.parse(payload))
    chain_net.send(chain_net.operator.address, USDC.address, "0x" + data.hex())
    async with opened(chain_net, sqlite_url) as ours:
        await refused(ours, asking(payload), "invalid_transaction_state")


async def test_v1_is_answered_with_its_own_network_name(chain_net: Devnet, sqlite_url: str) -> None:
    wanted = requirements(network="base-sepolia") | {"maxAmountRequired": "10000"}
    del wanted["amount"]
    asked = asking(payment(chain_net.accounts[0], SELLER, 10_000), wanted, version=1)
    async with opened(chain_net, sqlite_url) as ours:
        assert (await ours.ask("settle", asked))["network"] == "base-sepolia"


# -- what is not known -----------------------------------------------------------------------------


async def test_in_no_block_yet_is_pending_with_its_hash(chain_net: Devnet, sqlite_url: str) -> None:
    asked = paying(chain_net.accounts[0])
    async with opened(chain_net, sqlite_url, settle_wait_s=1) as ours:
        sent = ours.sent()
        chain_net.rpc("evm_setAutomine", False)
        try:
            told = await ours.ask("settle", asked)
            again = await ours.ask("settle", asked)
        finally:
            chain_net.rpc("evm_setAutomine", True)
        assert (told["success"], told["errorReason"]) == (False, "settlement_pending")
        assert again == told
        assert ours.sent() == sent + 1
        assert chain_net.rpc("eth_getTransactionByHash", told["transaction"]) is not None
        chain_net.mine()
        await work.finish_payments(ours.node)
        done = await ours.ask("settle", asked)
        assert (done["success"], done["transaction"]) == (True, told["transaction"])


async def test_an_answer_lost_on_the_way_is_no_failure(
    chain_net: Devnet, sqlite_url: str, faulty_node: FaultyNode
) -> None:
    """The node takes the transaction and does not say so."""
    asked = paying(chain_net.accounts[0])
    faulty_node.fault("eth_sendRawTransaction", "lose")
    async with opened(chain_net, sqlite_url, faulty_node.url) as ours:
        before = chain_net.balance_units(SELLER)
        told = await ours.ask("settle", asked)
        assert told["success"] is True, told
        assert chain_net.balance_units(SELLER) == before + 10_000


async def test_receipts_that_nobody_gives_are_pending(
    chain_net: Devnet, sqlite_url: str, faulty_node: FaultyNode
) -> None:
    asked = paying(chain_net.accounts[0])
    faulty_node.fault("eth_getTransactionReceipt", "status", 500)
    async with opened(chain_net, sqlite_url, faulty_node.url, settle_wait_s=1) as ours:
        told = await ours.ask("settle", asked)
        assert told["errorReason"] == "settlement_pending"
        assert told["transaction"].startswith("0x")
        faulty_node.faults.clear()
        await work.finish_payments(ours.node)
        assert (await ours.ask("settle", asked))["success"] is True


async def test_a_chain_that_cannot_be_asked(
    chain_net: Devnet, sqlite_url: str, faulty_node: FaultyNode
) -> None:
    asked = paying(chain_net.accounts[0])
    async with opened(chain_net, sqlite_url, faulty_node.url) as ours:
        for method in ("eth_call", "eth_getCode", "eth_estimateGas"):
            faulty_node.fault(method, "drop")
        verdict = await ours.ask("verify", asked)
        assert verdict["invalidReason"] == "unexpected_verify_error"
        told = await ours.ask("settle", asked)
        assert (told["errorReason"], told["transaction"]) == ("unexpected_settle_error", "")
        assert await ours.rows() == []
    # Nothing is left of that: the same payment is good at a node that reaches the chain.
    async with opened(chain_net, sqlite_url) as ours:
        assert (await ours.ask("settle", asked))["success"] is True


# -- what it costs ---------------------------------------------------------------------------------


async def test_its_gas_budget_is_its_own(chain_net: Devnet, sqlite_url: str) -> None:
    """Others can spend so much an hour; our own sales go on."""
    first, second = (paying(chain_net.accounts[n]) for n in (0, 1))
    async with opened(chain_net, sqlite_url, gas_per_hour="0.000000001") as ours:
        assert (await ours.ask("settle", first))["success"] is True
        sent = ours.sent()
        verdict = await ours.ask("verify", second)
        assert verdict["invalidReason"] == "unexpected_verify_error"
        assert "gas_budget_spent" in verdict["invalidMessage"]
        told = await ours.ask("settle", second)
        assert told["errorReason"] == "unexpected_settle_error"
        assert "gas_budget_spent" in told["errorMessage"]
        assert ours.sent() == sent
        assert len(await ours.rows()) == 1
        # What was settled is answered all the same.
        assert (await ours.ask("settle", first))["success"] is True


async def test_nothing_of_it_is_in_the_books(chain_net: Devnet, db_url: str) -> None:
    async with opened(chain_net, db_url) as ours:
        assert (await ours.ask("settle", paying(chain_net.accounts[0])))["success"] is True
    db = await Database.connect(db_url)
    try:
        async with db.read() as tx:
            for table in ("lot", "transfer", "mint_key", "account"):
                assert await tx.fetchval(f"SELECT count(*) FROM {table}") in (0, None), table
    finally:
        await db.close()
