"""payment-identifier: the same call signed for again is not paid for again."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.e2e.stage import PRICE_UNITS, Api, Gateway
from tests.e2e.wallet import Wallet, decode, encode, new_wallet, offers, outcome, problem

ID = "pay_7d5d747be160e280504c099d984bcfe0"


async def paid(
    http: httpx.AsyncClient, wallet: Wallet, target: str, identifier: object = ID, body: str = ""
) -> dict[str, str]:
    """A payment of a client that adds the id to what the 402 declared."""
    asked = await http.request("POST" if body else "GET", target, content=body or None)
    extension = decode(asked.headers["payment-required"])["extensions"]["payment-identifier"]
    assert extension == {"info": {"required": False}, "schema": {}}
    payload = decode(wallet.pay(offers(asked)[0]))
    extension["info"]["id"] = identifier
    payload["extensions"] = {"payment-identifier": extension}
    return {"PAYMENT-SIGNATURE": encode(payload)}


async def test_signed_again_it_is_the_same_call(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    async with gateway.client() as http:
        first = await http.get(target, headers=await paid(http, wallet, target))
        assert first.status_code == 200, first.text
        sent, received = gateway.sent(), gateway.received()
        for _ in range(2):
            anew = await paid(http, wallet, target)
            again = await http.get(target, headers=anew)
            assert (again.status_code, again.content) == (200, first.content)
            assert again.headers["farebox-replayed"] == "true"
            assert again.headers["farebox-charged"] == "0"
            assert outcome(again)["transaction"] == ""
        # The first one's own header finds it too.
        assert (gateway.sent(), gateway.received()) == (sent, received)
    assert api.calls(target) == 1
    assert gateway.transfers(wallet.address) == [
        ("mint", PRICE_UNITS, "x402"),
        ("capture", PRICE_UNITS, None),
    ]


async def test_of_several_at_once_one_is_sent(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    """A client that signs again while its first payment is under way. Each has the answer of the
    one call, or is told to ask again."""
    async with gateway.client() as http:
        headers = [await paid(http, wallet, target) for _ in range(4)]
        answers = await asyncio.gather(*(http.get(target, headers=each) for each in headers))
        while waiting := [i for i, each in enumerate(answers) if each.status_code == 409]:
            for i in waiting:
                problem(answers[i], "request_in_progress")
                answers[i] = await http.get(target, headers=headers[i])
    assert [each.status_code for each in answers] == [200] * 4
    assert len({each.content for each in answers}) == 1
    assert api.calls(target) == 1
    assert len(gateway.payments(wallet.address)) == 1
    assert gateway.transfers(wallet.address) == [
        ("mint", PRICE_UNITS, "x402"),
        ("capture", PRICE_UNITS, None),
    ]


async def test_the_same_payment_again_is_the_same_call(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    async with gateway.client() as http:
        header = await paid(http, wallet, target)
        first = await http.get(target, headers=header)
        again = await http.get(target, headers=header)
        assert (again.status_code, again.content) == (200, first.content)
        assert outcome(again)["transaction"] == outcome(first)["transaction"] != ""
    assert api.calls(target) == 1


async def test_with_other_content_it_is_a_conflict(
    gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    async with gateway.client() as http:
        header = await paid(http, wallet, target, body="one")
        assert (await http.post(target, content="one", headers=header)).status_code == 200
        sent = gateway.sent()
        header = await paid(http, wallet, target, body="two")
        refused = await http.post(target, content="two", headers=header)
        assert problem(refused, "request_id_conflict")["status"] == 409
        assert gateway.sent() == sent
    assert api.calls(target) == 1


async def test_an_id_belongs_to_its_wallet(
    sqlite_gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    """Another wallet, and who only says that it is this one, get nothing of its answer."""
    gateway = sqlite_gateway
    other = new_wallet(gateway.net)
    async with gateway.client() as http:
        await http.get(target, headers=await paid(http, wallet, target))
        theirs = await http.get(target, headers=await paid(http, other, target))
        assert theirs.status_code == 200
        assert "farebox-replayed" not in theirs.headers
        forged = decode((await paid(http, other, target))["PAYMENT-SIGNATURE"])
        forged["payload"]["authorization"]["from"] = wallet.address
        answer = await http.get(target, headers={"PAYMENT-SIGNATURE": encode(forged)})
        problem(answer, "invalid_exact_evm_payload_signature")
    assert api.calls(target) == 2


@pytest.mark.parametrize("identifier", ["short", "x" * 129, "has space 1234567", 7, ["a"]])
async def test_an_id_of_another_form_is_refused(
    identifier: object, sqlite_gateway: Gateway, api: Api, wallet: Wallet, target: str
) -> None:
    async with sqlite_gateway.client() as http:
        header = await paid(http, wallet, target, identifier)
        problem(await http.get(target, headers=header), "invalid_payload")
    assert api.calls(target) == 0
