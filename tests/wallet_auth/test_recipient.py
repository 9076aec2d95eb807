"""The words that give a transfer's credits to another wallet: one form, one meaning."""

from __future__ import annotations

import pytest
from eth_account import Account
from eth_account.messages import encode_defunct

from tests.fixtures_wallets import wrapped
from wallet_auth import recipient

SENDER = Account.from_key("0x" + "42" * 32)
VALUES = ("0f" * 16, "eip155:84532", "0x" + "ab" * 32, 0, "0x" + "cd" * 20)


def signature(text: str) -> bytes:
    return bytes(Account.sign_message(encode_defunct(text=text), SENDER.key).signature)


def test_the_text() -> None:
    assert recipient.message(*VALUES) == "\n".join(
        [
            "Farebox: credits of a transfer to another wallet",
            f"deployment: {'0f' * 16}",
            "network: eip155:84532",
            f"transaction: 0x{'ab' * 32}",
            "transfer: 0",
            f"recipient: 0x{'cd' * 20}",
        ]
    )


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, "0F" * 16),
        (0, ""),
        (1, "eip155:084532"),
        (1, "base"),
        (1, "eip155:1\nrecipient: 0x0"),
        (2, "0x" + "AB" * 32),
        (2, "ab" * 32),
        (3, -1),
        (3, 10**10),
        (4, "0x" + "CD" * 20),
        (4, "0x" + "cd" * 20 + "\n"),
    ],
)
def test_a_value_of_another_form_is_refused(place: int, value: str | int) -> None:
    values = list(VALUES)
    values[place] = value
    with pytest.raises(ValueError, match="another form"):
        recipient.message(*values)  # type: ignore[arg-type]  # odd values on purpose


async def test_every_word_of_it_is_signed() -> None:
    text = recipient.message(*VALUES)
    sender = SENDER.address.lower()
    assert await recipient.signed_by(None, VALUES[1], sender, text, signature(text))
    others = [
        ("1f" * 16, *VALUES[1:]),
        (VALUES[0], "eip155:8453", *VALUES[2:]),
        (*VALUES[:2], "0x" + "ac" * 32, *VALUES[3:]),
        (*VALUES[:3], 1, VALUES[4]),
        (*VALUES[:4], "0x" + "ce" * 20),
    ]
    for other in others:
        said = recipient.message(*other)
        assert not await recipient.signed_by(None, VALUES[1], sender, said, signature(text))
    assert not await recipient.signed_by(None, VALUES[1], VALUES[4], text, signature(text))


async def test_a_contract_is_asked_itself() -> None:
    text = recipient.message(*VALUES)
    asked: list[tuple[str, str]] = []

    async def call(network: str, to: str, data: bytes) -> bytes:
        asked.append((network, to))
        return data[:4] + bytes(28)

    contract = "0x" + "ee" * 20
    for signed in (b"any", wrapped(b"any")):
        assert await recipient.signed_by(call, "eip155:1", contract, text, signed)
    assert asked == [("eip155:1", contract)] * 2


PAYMENT = ("0f" * 16, "eip155:84532", "0x" + "12" * 20, "0x" + "ab" * 32, "0x" + "cd" * 20)
LINES = ("0x" + "12" * 20, "0x" + "cd" * 20, 1000, "nonce", "0x" + "ab" * 32)


def test_the_text_for_a_payment() -> None:
    assert recipient.payment_message(*PAYMENT) == "\n".join(
        [
            "Farebox: credits of a payment to another wallet",
            f"deployment: {'0f' * 16}",
            "network: eip155:84532",
            f"asset: 0x{'12' * 20}",
            f"authorization: 0x{'ab' * 32}",
            f"recipient: 0x{'cd' * 20}",
        ]
    )


@pytest.mark.parametrize("tied_to", ["nonce", "tx"])
def test_the_published_lines(tied_to: str) -> None:
    assert recipient.sponsor_lines(*LINES[:3], tied_to, LINES[4]) == "\n".join(
        [
            "agentpmt-external-sponsor",
            f"payer:0x{'12' * 20}",
            f"recipient:0x{'cd' * 20}",
            "credits:1000",
            f"{tied_to}:0x{'ab' * 32}",
        ]
    )


@pytest.mark.parametrize("place", range(5))
def test_every_value_of_a_payment_has_one_form(place: int) -> None:
    for odd in (PAYMENT[place].upper(), PAYMENT[place] + "\n", "", "0x"):
        values = [*PAYMENT[:place], odd, *PAYMENT[place + 1 :]]
        with pytest.raises(ValueError, match="another form"):
            recipient.payment_message(*values)


@pytest.mark.parametrize(
    ("place", "odd"),
    [
        (0, "0x" + "AB" * 20),
        (1, "0x" + "cd" * 20 + "\ncredits:9"),
        (2, 0),
        (2, -5),
        (3, "credits"),
        (3, "network"),
        (4, "ab" * 32),
    ],
)
def test_every_value_of_the_published_lines_has_one_form(place: int, odd: str | int) -> None:
    values = [*LINES[:place], odd, *LINES[place + 1 :]]
    with pytest.raises(ValueError, match=r"another form|tied to"):
        recipient.sponsor_lines(*values)  # type: ignore[arg-type]  # odd values on purpose


async def test_a_word_for_one_thing_is_none_for_another() -> None:
    texts = [
        recipient.message(*VALUES),
        recipient.payment_message(*PAYMENT),
        recipient.sponsor_lines(*LINES),
        recipient.sponsor_lines(*LINES[:3], "tx", LINES[4]),
    ]
    sender = SENDER.address.lower()
    for one in texts:
        for other in texts:
            good = await recipient.signed_by(None, VALUES[1], sender, other, signature(one))
            assert good == (one == other)
