"""``upto``: the real Permit2 on a local chain, and a stand-in for x402's proxy of this scheme."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from anvil.devnet import Account, Devnet
from chain.eth import selector
from chain.networks import NETWORKS
from chain.rpc import Rpc
from chain.schemes import permit2, upto
from gateway import work
from tests.chain.test_x402_vectors import META, VECTORS
from tests.fixtures_chain import NETWORK, USDC, FaultyNode
from tests.fixtures_permit2 import approve, plant, send_as, signed, signed_upto, take_back
from tests.gateway.facilitator.parts import SELLER, Facilitator, asking, opened
from tests.gateway.facilitator.parts import requirements as wanted_for
from tests.gateway.payments.parts import PAY_TO
from wallet_auth.keys import checksum, recover

MOST = 10_000
USED = "invalid_transaction_state"


@pytest.fixture
def net(chain_net: Devnet) -> Devnet:
    """A chain with Permit2 and the proxies, and a first account that has approved Permit2."""
    plant(chain_net)
    approve(chain_net, chain_net.accounts[0])
    return chain_net


def wanted(net: Devnet, amount: object = str(MOST), **change: Any) -> dict[str, Any]:
    extra = {
        "name": "USDC",
        "version": "2",
        "assetTransferMethod": "permit2",
        "facilitatorAddress": checksum(net.settler.address),
    }
    return wanted_for(amount=amount, **({"scheme": "upto", "extra": extra} | change))


def permits(net: Devnet, payer: Account | None = None, **change: Any) -> dict[str, Any]:
    facilitator = change.pop("facilitator", net.settler.address)
    return signed_upto(payer or net.accounts[0], facilitator, **change)


def pays(net: Devnet, payload: dict[str, Any], amount: object = str(MOST)) -> dict[str, Any]:
    """What is asked: with ``amount``, what the call came to, the rest as it was offered."""
    asked = asking(payload, wanted(net))
    return asked | {"paymentRequirements": wanted(net, amount)}


async def refused(net: Devnet, database: str, asked: dict[str, Any], reason: str) -> None:
    async with opened(net, database) as ours:
        sent = ours.sent()
        assert (await ours.ask("verify", asked))["invalidReason"] == reason
        await not_settled(ours, asked, reason)
        assert ours.sent() == sent
        assert await claims(ours) == await ours.rows() == []


async def not_settled(ours: Facilitator, asked: dict[str, Any], reason: str) -> None:
    told = await ours.ask("settle", asked)
    assert (told["success"], told["errorReason"], told["transaction"]) == (False, reason, "")


async def claims(ours: Facilitator) -> list[tuple[str, str]]:
    async with ours.node.db.read() as tx:
        rows = await tx.fetch("SELECT payment_id, decision FROM authorization_use")
    return [(row["payment_id"], row["decision"]) for row in rows]


def test_the_vectors_payload_is_signed_by_its_payer() -> None:
    """Made by the official client."""
    (vector,) = (
        v for v in VECTORS["permit2_unsigned_onchain"] if v["requirements"]["scheme"] == "upto"
    )
    auth = upto.parse(vector["payload"]["payload"])
    assert recover(upto.digest(NETWORK, auth), auth.signature) == META["payer"].lower()
    assert auth.most_units == int(vector["requirements"]["amount"])
    assert auth.facilitator == vector["requirements"]["extra"]["facilitatorAddress"].lower()


def test_who_may_make_a_call_stands_in_it(net: Devnet) -> None:
    auth = upto.parse(permits(net))
    data = upto.settle_calldata(auth, 1)
    assert upto.sender_of(upto.PROXY, data) == net.settler.address
    exact = permit2.settle_calldata(permit2.parse(signed(net.accounts[0])))
    assert upto.sender_of(permit2.EXACT_PROXY, exact) is None
    assert upto.sender_of(USDC.address, data) is None
    assert upto.sender_of(upto.PROXY, exact) is None


# --- what is moved ----------------------------------------------------------------------------


async def test_it_is_told_as_supported_where_its_proxy_is(net: Devnet, sqlite_url: str) -> None:
    async def kinds() -> list[dict[str, Any]]:
        async with opened(net, sqlite_url) as ours:
            told = (await ours.http.get("/farebox/x402/supported")).json()["kinds"]
        return [kind for kind in told if kind["scheme"] == "upto"]

    extra = {"facilitatorAddress": checksum(net.settler.address)}
    whole = {"x402Version": 2, "scheme": "upto", "network": NETWORK.caip2, "extra": extra}
    assert await kinds() == [whole]
    net.rpc("anvil_setCode", upto.PROXY, "0x")
    assert await kinds() == []


@pytest.mark.parametrize("units", [1, 1_234, MOST])
async def test_what_the_call_came_to_is_moved_once(net: Devnet, db_url: str, units: int) -> None:
    payload = permits(net)
    payer = net.accounts[0].address
    asked = pays(net, payload, str(units))
    async with opened(net, db_url) as ours:
        before, sent = net.balance_units(SELLER), ours.sent()
        named = payload["permit2Authorization"]["from"]
        assert await ours.ask("verify", pays(net, payload)) == {"isValid": True, "payer": named}
        assert ours.sent() == sent
        told = await ours.ask("settle", asked)
        assert told.pop("transaction").startswith("0x")
        expected = {"success": True, "network": NETWORK.caip2, "payer": named}
        assert told == expected | {"amount": str(units)}
        again = await asyncio.gather(*(ours.ask("settle", asked) for _ in range(3)))
        assert all(each == again[0] for each in again)
        assert again[0]["success"] is True
        assert ours.sent() == sent + 1
        assert net.balance_units(SELLER) == before + units
        (row,) = await ours.rows()
        assert (row["state"], row["amount_units"], row["method"]) == ("succeeded", units, "permit2")
        assert row["payer"] == payer
        verdict = await ours.ask("verify", pays(net, payload))
        assert verdict["invalidReason"] == USED


async def test_another_amount_is_a_conflict(net: Devnet, db_url: str) -> None:
    """Never a second pull: neither for more nor for less, nor for nothing."""
    payload = permits(net)
    async with opened(net, db_url) as ours:
        before, sent = net.balance_units(SELLER), ours.sent()
        assert (await ours.ask("settle", pays(net, payload, "40")))["success"] is True
        for amount in ("41", "39", "0", str(MOST)):
            await not_settled(ours, pays(net, payload, amount), USED)
        assert ours.sent() == sent + 1
        assert net.balance_units(SELLER) == before + 40


async def test_two_amounts_at_once_are_one_payment(net: Devnet, postgres_url: str) -> None:
    async with (
        opened(net, postgres_url, settle_wait_s=15) as one,
        opened(net, postgres_url, settle_wait_s=15) as two,
    ):
        for amounts in (("7", "8"), ("0", "9"), ("5", "5")):
            payload = permits(net)
            before, sent = net.balance_units(SELLER), one.sent()
            told = await asyncio.gather(
                *(
                    node.ask("settle", pays(net, payload, amount))
                    for amount in amounts
                    for node in (one, two)
                )
            )
            good = [each for each in told if each["success"]]
            assert len({each["amount"] for each in good}) == 1, told
            assert len({each["transaction"] for each in good}) == 1
            assert all(each["errorReason"] == USED for each in told if not each["success"])
            moved = int(good[0]["amount"])
            assert net.balance_units(SELLER) == before + moved
            assert one.sent() == sent + (1 if moved else 0)


async def test_nothing_is_no_transaction_and_ends_it(net: Devnet, db_url: str) -> None:
    payload = permits(net)
    nothing = pays(net, payload, "0")
    async with opened(net, db_url) as ours:
        sent = ours.sent()
        told = await ours.ask("settle", nothing)
        assert told == {
            "success": True,
            "transaction": "",
            "network": NETWORK.caip2,
            "amount": "0",
            "payer": payload["permit2Authorization"]["from"],
        }
        assert await ours.ask("settle", nothing) == told
        await not_settled(ours, pays(net, payload, "1"), USED)
        assert (await ours.ask("verify", pays(net, payload)))["invalidReason"] == USED
        assert ours.sent() == sent
        assert await ours.rows() == []
        assert await claims(ours) == [("", "nothing")]


async def test_only_who_signed_can_have_it_come_to_nothing(net: Devnet, sqlite_url: str) -> None:
    foreign = permits(net, net.accounts[1])
    foreign["permit2Authorization"]["from"] = net.accounts[0].address
    async with opened(net, sqlite_url) as ours:
        await not_settled(ours, pays(net, foreign, "0"), "invalid_permit2_signature")
        assert await claims(ours) == []


async def test_one_nonce_is_one_payment_by_either_scheme(net: Devnet, sqlite_url: str) -> None:
    payer = net.accounts[0]
    extra = {"name": "USDC", "version": "2", "assetTransferMethod": "permit2"}
    exact = asking(signed(payer, nonce=77, amount=40), wanted_for(amount="40", extra=extra))
    async with opened(net, sqlite_url) as ours:
        assert (await ours.ask("settle", pays(net, permits(net, nonce=77), "40")))["success"]
        await not_settled(ours, exact, USED)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spender": permit2.EXACT_PROXY}, "invalid_permit2_spender"),
        ({"to": "0x" + "0b" * 20}, "invalid_permit2_recipient_mismatch"),
        ({"facilitator": "0x" + "0f" * 20}, "upto_facilitator_mismatch"),
        ({"deadline": 1_700_000_000}, "permit2_deadline_expired"),
        ({"validAfter": 2**40}, "permit2_not_yet_valid"),
        ({"token": "0x" + "70" * 20}, "permit2_token_mismatch"),
    ],
)
async def test_what_does_not_match_is_refused(
    net: Devnet, sqlite_url: str, change: dict[str, Any], reason: str
) -> None:
    await refused(net, sqlite_url, pays(net, permits(net, **change)), reason)


async def test_the_maximum_is_the_one_that_was_asked_for(net: Devnet, sqlite_url: str) -> None:
    async with opened(net, sqlite_url) as ours:
        for most in (MOST - 1, MOST + 1):
            verdict = await ours.ask("verify", pays(net, permits(net, amount=most)))
            assert verdict["invalidReason"] == "permit2_amount_mismatch"
        verdict = await ours.ask("verify", pays(net, permits(net, amount=0), "0"))
        assert verdict["invalidReason"] == "invalid_payment_requirements"
        await not_settled(ours, pays(net, permits(net), str(MOST + 1)), upto.EXCEEDED)
        assert await claims(ours) == []


@pytest.mark.parametrize("amount", [5, "0x5", " 5", "+5", "-0", "5.0", "5_0", "٥", "", None])
async def test_odd_amounts_are_refused(net: Devnet, sqlite_url: str, amount: object) -> None:
    asked = pays(net, permits(net), amount)
    await refused(net, sqlite_url, asked, "invalid_payment_requirements")


async def test_bad_signatures_are_refused(net: Devnet, sqlite_url: str) -> None:
    payer, other = net.accounts[:2]
    good = permits(net)
    body = bytes.fromhex(good["signature"][2:])
    flipped = "0x" + (bytes((body[0] ^ 1,)) + body[1:]).hex()
    foreign = permits(net, other)
    foreign["permit2Authorization"]["from"] = payer.address
    richer = permits(net, amount=MOST - 1)
    richer["permit2Authorization"]["permitted"]["amount"] = str(MOST)
    for payload in (
        good | {"signature": flipped},
        good | {"signature": "0x" + body[:64].hex()},
        foreign,
        richer,
        signed_upto(payer, net.settler.address, NETWORKS["base"]),
    ):
        await refused(net, sqlite_url, pays(net, payload), "invalid_permit2_signature")


async def test_it_has_to_be_covered(net: Devnet, sqlite_url: str) -> None:
    """The whole of it before the call, what it came to after it."""
    stranger = net.accounts[1]
    payload = permits(net, stranger)
    await refused(net, sqlite_url, pays(net, payload), "permit2_allowance_required")
    approve(net, stranger, MOST - 1)
    async with opened(net, sqlite_url) as ours:
        verdict = await ours.ask("verify", pays(net, payload))
        assert verdict["invalidReason"] == "permit2_allowance_required"
        told = await ours.ask("settle", pays(net, payload, str(MOST - 1)))
        assert told["success"] is True, told
    approve(net, stranger, 2**255)
    left = net.balance_units(stranger.address)
    net.transfer(stranger.address, "0x" + "0b" * 20, left - MOST + 1)
    poor = pays(net, permits(net, stranger))
    async with opened(net, sqlite_url) as ours:
        assert (await ours.ask("verify", poor))["invalidReason"] == "permit2_insufficient_balance"


async def test_without_code_at_the_proxy_nothing_succeeds(net: Devnet, sqlite_url: str) -> None:
    """A call to an address without code has status 1 and moves nothing."""
    for empty in (upto.PROXY, permit2.PERMIT2):
        code = net.rpc("eth_getCode", empty, "latest")
        net.rpc("anvil_setCode", empty, "0x")
        await refused(net, sqlite_url, pays(net, permits(net)), "permit2_proxy_not_deployed")
        net.rpc("anvil_setCode", empty, code)


async def test_a_proxy_that_moves_nothing_is_no_success(net: Devnet, sqlite_url: str) -> None:
    """Status 1 and no Transfer, as the official facilitator once reported for a success."""
    net.rpc("anvil_setCode", upto.PROXY, "0x00")  # STOP
    async with opened(net, sqlite_url, settle_wait_s=1) as ours:
        told = await ours.ask("settle", pays(net, permits(net), "5"))
        assert told["success"] is False, told


async def test_it_is_no_payment_of_x402_v1(net: Devnet, sqlite_url: str) -> None:
    one = wanted(net, network="base-sepolia") | {"maxAmountRequired": str(MOST)}
    await refused(net, sqlite_url, asking(permits(net), one, version=1), "unsupported_scheme")
    extra = {"name": "USDC", "version": "2", "assetTransferMethod": "eip3009"}
    two = wanted(net, extra=extra)
    await refused(net, sqlite_url, asking(permits(net), two), "unsupported_scheme")


async def test_our_own_sales_are_not_for_others(net: Devnet, sqlite_url: str) -> None:
    asked = asking(permits(net, to=PAY_TO), wanted(net, payTo=PAY_TO))
    await refused(net, sqlite_url, asked, "invalid_payment_requirements")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p.pop("signature"),
        lambda p: p["permit2Authorization"].pop("nonce"),
        lambda p: p["permit2Authorization"]["witness"].pop("facilitator"),
        lambda p: p["permit2Authorization"]["witness"].update(facilitator="0x1"),
        lambda p: p["permit2Authorization"]["witness"].update(more="1"),
        lambda p: p["permit2Authorization"]["witness"].update(validAfter="+1"),
        lambda p: p["permit2Authorization"].update(nonce="0x1"),
        lambda p: p["permit2Authorization"].update(deadline=" 5"),
        lambda p: p["permit2Authorization"]["permitted"].update(amount=str(2**256)),
        lambda p: p["permit2Authorization"]["permitted"].update(amount=MOST),
    ],
)
async def test_odd_forms_are_malformed(net: Devnet, sqlite_url: str, spoil: Any) -> None:
    payload = permits(net)
    spoil(payload)
    await refused(net, sqlite_url, pays(net, payload), "invalid_payload")


# --- who sends it, and what is not known --------------------------------------------------------


async def test_nobody_else_can_hand_it_in(net: Devnet, sqlite_url: str) -> None:
    """The simulation is run as the facilitator: as anybody else it would fail."""
    auth = upto.parse(permits(net))
    data = upto.settle_calldata(auth, 5)
    rpc = Rpc(NETWORK, [net.rpc_url])
    try:
        with pytest.raises(Exception, match=selector("UnauthorizedFacilitator()").hex()):
            net.rpc("eth_call", {"to": upto.PROXY, "data": "0x" + data.hex()}, "latest")
        assert await upto.verify(rpc, USDC, auth, 5) == "key"
    finally:
        await rpc.close()


async def test_it_is_sent_by_the_gas_account_it_names(net: Devnet, db_url: str) -> None:
    """Of several, also when another one has less to do."""
    second = net.accounts[7]
    net.rpc("anvil_setBalance", second.address, hex(10**18))
    async with opened(net, db_url, settler_keys=[second.private_key]) as ours:
        for facilitator in (second.address, net.settler.address, second.address):
            asked = pays(net, signed_upto(net.accounts[0], facilitator), "5")
            told = await ours.ask("settle", asked)
            assert told["success"] is True, told
            sent = net.rpc("eth_getTransactionByHash", told["transaction"])
            assert sent["from"].lower() == facilitator


async def test_an_answer_lost_on_the_way_is_no_failure(
    net: Devnet, sqlite_url: str, faulty_node: FaultyNode
) -> None:
    asked = pays(net, permits(net), "5")
    faulty_node.fault("eth_sendRawTransaction", "lose")
    async with opened(net, sqlite_url, faulty_node.url) as ours:
        before = net.balance_units(SELLER)
        told = await ours.ask("settle", asked)
        assert (told["success"], told["amount"]) == (True, "5"), told
        assert net.balance_units(SELLER) == before + 5


async def stalled(net: Devnet, database: str, node: FaultyNode, asked: dict[str, Any]) -> None:
    """A payment that is claimed and signed here, and that no block has."""
    node.fault("eth_sendRawTransaction", "drop")
    async with opened(net, database, node.url, settle_wait_s=1) as ours:
        await not_known(ours, asked)
        async with ours.node.db.write() as tx:
            await tx.execute("UPDATE payment SET lease_ms = 0")


async def not_known(ours: Facilitator, asked: dict[str, Any]) -> None:
    told = await ours.ask("settle", asked)
    assert (told["success"], told["errorReason"]) == (False, "settlement_pending")
    assert told["transaction"].startswith("0x")


async def test_what_nobody_waits_for_is_finished_once(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    asked = pays(net, permits(net), "5")
    await stalled(net, db_url, faulty_node, asked)
    before = net.balance_units(SELLER)
    async with opened(net, db_url) as ours:
        await work.finish_payments(ours.node)
        async with ours.node.db.write() as tx:
            await tx.execute("UPDATE payment SET lease_ms = 0")
        await work.finish_payments(ours.node)
        told = await ours.ask("settle", asked)
        assert (told["success"], told["amount"]) == (True, "5"), told
        assert net.balance_units(SELLER) == before + 5


async def test_a_lost_nonce_is_signed_anew_by_the_same_account(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    """Its chain nonce went to another transaction: once more, and not by a busier neighbour."""
    asked = pays(net, permits(net), "5")
    await stalled(net, db_url, faulty_node, asked)
    nonce = int(net.rpc("eth_getTransactionCount", net.settler.address, "latest"), 16)
    send_as(net, net.settler.address, net.settler.address, b"")
    second = net.accounts[7]
    net.rpc("anvil_setBalance", second.address, hex(10**18))
    before = net.balance_units(SELLER)
    async with opened(net, db_url, settler_keys=[second.private_key]) as ours:
        for _ in range(2):
            async with ours.node.db.write() as tx:
                await tx.execute("UPDATE payment SET lease_ms = 0")
                # The other one looks idle, this one busy.
                await tx.execute(
                    "INSERT INTO gas_account (network, sender, next_nonce) VALUES ($1, $2, 0)"
                    " ON CONFLICT DO NOTHING",
                    NETWORK.caip2,
                    second.address,
                )
            await work.finish_payments(ours.node)
        told = await ours.ask("settle", asked)
        assert told["success"] is True, told
        sent = net.rpc("eth_getTransactionByHash", told["transaction"])
        assert sent["from"].lower() == net.settler.address
        assert int(sent["nonce"], 16) == nonce + 1
    assert net.balance_units(SELLER) == before + 5


async def test_what_its_payer_takes_back_ends_as_failed(
    net: Devnet, db_url: str, faulty_node: FaultyNode
) -> None:
    payload = permits(net)
    await stalled(net, db_url, faulty_node, pays(net, payload, "5"))
    take_back(net, payload)
    net.rpc("anvil_mine", hex(120))
    async with opened(net, db_url) as ours:
        await work.finish_payments(ours.node)
        await not_settled(ours, pays(net, payload, "5"), USED)
