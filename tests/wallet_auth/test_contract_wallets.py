"""Contract wallets: asked on the chain of their key id, and only when all else is right."""

from __future__ import annotations

import pytest

from tests.fixtures_wallets import SUFFIX, wrapped
from tests.wallet_auth.support import (
    BASIC,
    NOW,
    OTHER_KEY,
    by_hand,
    changed,
    params,
    plain,
    refused,
    signed,
    with_headers,
)
from wallet_auth import AuthError, SignedRequest, verify

WALLET = "0x" + "c0" * 20


def _contract(signature: bytes, chain_id: int = 8453) -> SignedRequest:
    keyid = f'"erc8128:{chain_id}:{WALLET}"'
    return by_hand(plain(), BASIC, params(keyid=keyid), signature=signature)


class Chain:
    """Answers calls like an RPC would and remembers them."""

    def __init__(self, answer: bytes | Exception) -> None:
        self.answer = answer
        self.calls: list[tuple[str, str, bytes]] = []

    async def __call__(self, caip2: str, to: str, data: bytes) -> bytes:
        self.calls.append((caip2, to, data))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


YES = bytes.fromhex("1626ba7e") + bytes(28)


@pytest.mark.parametrize("size", [1, 65, 130, 4096])
async def test_a_contract_wallet_is_asked_on_the_chain_of_its_key_id(size: int) -> None:
    chain = Chain(YES)
    signer = await verify(_contract(b"\x02" * size), NOW, chain)
    assert signer is not None
    assert (signer.kind, signer.address, signer.chain_id) == ("contract", WALLET, 8453)
    ((caip2, to, data),) = chain.calls
    assert (caip2, to) == ("eip155:8453", WALLET)
    assert data.startswith(bytes.fromhex("1626ba7e"))
    assert b"\x02" * size in data


async def test_a_contract_wallet_can_say_no() -> None:
    for answer in (b"", b"\xff" * 32, YES + bytes(32)):
        chain = Chain(answer)
        await refused(_contract(b"\x02" * 70), "signature_invalid", call=chain)
        assert len(chain.calls) == 1


async def test_a_key_is_never_looked_up_on_chain() -> None:
    chain = Chain(RuntimeError("asked"))
    signer = await verify(signed(), NOW, chain)
    assert signer is not None
    assert signer.kind == "key"
    assert chain.calls == []


async def test_cheap_refusals_come_before_the_chain() -> None:
    chain = Chain(YES)
    late = changed(_contract(b"\x02" * 70), headers=_contract(b"\x02" * 70).headers)
    await refused(late, "signature_expired", NOW + 1000, call=chain)
    await refused(with_headers(late, ("farebox-max", "$1")), "ceiling_not_covered", call=chain)
    await refused(_contract(b"\x02" * 70 + SUFFIX), "signature_invalid", call=chain)
    await refused(_contract(b"\x02" * 4097), "signature_invalid", call=chain)
    assert chain.calls == []


async def test_a_chain_that_is_not_served() -> None:
    await refused(
        _contract(b"\x02" * 70), "identity_unsupported", call=Chain(LookupError("no such chain"))
    )
    wrong_key = by_hand(plain(), BASIC, key=OTHER_KEY)
    await refused(wrong_key, "signature_invalid", call=Chain(LookupError("no such chain")))


async def test_a_chain_that_cannot_be_asked_is_not_a_refusal() -> None:
    class UnavailableError(Exception):
        pass

    with pytest.raises(UnavailableError):
        await verify(_contract(b"\x02" * 70), NOW, Chain(UnavailableError()))


async def test_a_wrapper_is_taken_off_and_what_it_would_deploy_left_alone() -> None:
    """ERC-6492: a wallet that is there is asked as any other; one that is not has said nothing."""
    chain = Chain(YES)
    signer = await verify(_contract(wrapped(b"\x02" * 70)), NOW, chain)
    assert signer is not None and (signer.kind, signer.address) == ("contract", WALLET)
    await verify(_contract(b"\x02" * 70), NOW, bare := Chain(YES))
    ((_, to, data),) = chain.calls
    ((_, _, expected),) = bare.calls
    assert to == WALLET and len(data) == len(expected) and b"\x02" * 70 in data
    nobody = Chain(b"")
    with pytest.raises(AuthError, match="not deployed yet") as error:
        await verify(_contract(wrapped(b"\x02" * 70)), NOW, nobody)
    assert error.value.code == "signature_invalid"
    await refused(_contract(wrapped(b"\x02" * 70)), "identity_unsupported")
