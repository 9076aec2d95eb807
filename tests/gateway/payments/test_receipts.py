"""Signed receipts: those of the official SDK verify here, and ours verify without a gateway."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account

from gateway.payments import receipts
from gateway.payments.offers import Keys
from gateway.payments.receipts import Receipt
from tests.gateway.payments.parts import KEYS

VECTORS = json.loads((Path(__file__).parents[2] / "vectors/x402-vectors.json").read_text())
RECEIPT = Receipt("eip155:84532", "http://shop.test/v1/a?b=1", "0x" + "aa" * 20, 1_795_207_556, "")


def artifact(receipt: Receipt = RECEIPT, keys: Keys = KEYS) -> dict[str, Any]:
    found: dict[str, Any] = receipts.signed(keys, receipt)["offer-receipt"]["info"]["receipt"]
    return found


def test_the_receipt_of_the_official_sdk() -> None:
    vector = VECTORS["offer_receipt"]
    wanted = vector["verify_receipt"]["signer"].lower()
    assert receipts.signer_of(vector["receipt"]) == wanted
    assert vector["receipt"]["payload"] == vector["verify_receipt"]["payload"]


def test_the_offer_of_the_official_sdk() -> None:
    vector = VECTORS["offer_receipt"]
    assert receipts.signer_of(vector["offer"]) == vector["verify_offer"]["signer"].lower()
    for member, value in vector["offer"]["payload"].items():
        changed = value + 1 if isinstance(value, int) else value + "0"
        other = {**vector["offer"], "payload": {**vector["offer"]["payload"], member: changed}}
        assert receipts.signer_of(other) != vector["verify_offer"]["signer"].lower(), member


def test_an_independent_library_finds_our_signer() -> None:
    made = artifact()
    types = {
        "Receipt": [
            {"name": "version", "type": "uint256"},
            {"name": "network", "type": "string"},
            {"name": "resourceUrl", "type": "string"},
            {"name": "payer", "type": "string"},
            {"name": "issuedAt", "type": "uint256"},
            {"name": "transaction", "type": "string"},
        ]
    }
    from eth_account.messages import encode_typed_data

    domain = {"name": "x402 receipt", "version": "1", "chainId": 1}
    message = encode_typed_data(domain, types, made["payload"])
    found = Account.recover_message(message, signature=made["signature"])
    assert found == receipts.addresses(KEYS)[0]


def test_all_nodes_sign_alike_and_every_deployment_for_itself() -> None:
    assert artifact() == artifact(keys=replace(KEYS))
    other = replace(KEYS, deployment="another")
    assert receipts.signer_of(artifact(keys=other)) != receipts.signer_of(artifact())


def test_a_key_that_is_not_in_use_any_more_is_still_named() -> None:
    secrets = {**KEYS.secrets, b"\0\0\0\2": b"n" * 32}
    newer = replace(KEYS, secrets=secrets, current=b"\0\0\0\2")
    first, second = receipts.addresses(newer)
    assert [second] == receipts.addresses(KEYS)
    assert receipts.signer_of(artifact(keys=newer)) == first.lower()


@pytest.mark.parametrize("name", list(RECEIPT.payload()))
def test_every_member_is_signed(name: str) -> None:
    made = artifact()
    value = made["payload"][name]
    made["payload"][name] = value + 1 if isinstance(value, int) else value + "0"
    assert receipts.signer_of(made) != receipts.signer_of(artifact())


@pytest.mark.parametrize(
    "change",
    [
        {"signature": "0x"},
        {"signature": "zz"},
        {"signature": 7},
        {"payload": {}},
        {"payload": None},
        {"payload": {**RECEIPT.payload(), "issuedAt": -1}},
        {"payload": {**RECEIPT.payload(), "payer": 7}},
    ],
)
def test_what_is_no_receipt(change: dict[str, Any]) -> None:
    assert receipts.signer_of({**artifact(), **change}) is None
