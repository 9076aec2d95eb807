"""Signatures and hashes against eth_account, and the strictness of ours."""

from __future__ import annotations

import contextlib
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from coincurve import PublicKey
from eth_abi.abi import encode
from eth_account import Account
from eth_account.messages import encode_defunct, encode_typed_data
from eth_utils.address import to_checksum_address
from hypothesis import given
from hypothesis import strategies as st

from tests.fixtures_wallets import FACTORY, SUFFIX, wrapped
from tests.wallet_auth.support import ADDRESS, KEY
from wallet_auth import keys

DIGEST = keys.keccak256(b"a request")
SIGNATURE = keys.sign_digest(keys.private_key(KEY), DIGEST)


def test_the_hash_is_keccak_and_not_sha3() -> None:
    assert keys.keccak256(b"").hex().startswith("c5d2460186f7233c927e7db2dcc703c0")


@given(st.binary(max_size=300), st.binary(min_size=32, max_size=32).filter(any))
def test_personal_signatures_are_those_of_eth_account(message: bytes, secret: bytes) -> None:
    theirs = Account.from_key(secret).sign_message(encode_defunct(message))
    key = keys.private_key(secret)
    digest = keys.eip191_hash(message)
    assert digest == bytes(theirs.message_hash)
    assert keys.sign_digest(key, digest) == bytes(theirs.signature)
    assert keys.recover(digest, bytes(theirs.signature)) == keys.address_of(key)
    assert keys.checksum(keys.address_of(key)) == Account.from_key(secret).address


def test_typed_data_is_that_of_eth_account() -> None:
    contract = "0x036cbd53842c5426634e7929541ec2318f3dcf7e"
    message = encode_typed_data(
        domain_data={
            "name": "USDC",
            "version": "2",
            "chainId": 84532,
            "verifyingContract": to_checksum_address(contract),
        },
        message_types={"Word": [{"name": "word", "type": "bytes32"}]},
        message_data={"word": bytes(range(32))},
    )
    assert keys.eip712_domain("USDC", "2", 84532, contract) == message.header
    struct = keys.keccak256(keys.keccak256(b"Word(bytes32 word)") + bytes(range(32)))
    assert struct == message.body
    theirs = Account.from_key(KEY).sign_message(message)
    assert keys.eip712_hash(message.header, struct) == bytes(theirs.message_hash)


def test_recover_names_the_signer() -> None:
    assert keys.recover(DIGEST, SIGNATURE) == ADDRESS
    assert keys.recover(keys.keccak256(b"another"), SIGNATURE) != ADDRESS


def _flip_s(signature: bytes) -> bytes:
    """The other valid ECDSA signature over the same message (high s, other parity)."""
    s = keys.CURVE_ORDER - int.from_bytes(signature[32:64], "big")
    return signature[:32] + s.to_bytes(32, "big") + bytes((27 + 28 - signature[64],))


def test_the_twin_of_a_signature_is_refused() -> None:
    twin = _flip_s(SIGNATURE)
    assert Account._recover_hash(DIGEST, signature=twin).lower() == ADDRESS  # valid elsewhere
    assert keys.recover(DIGEST, twin) is None


def test_s_at_the_middle_is_the_last_that_passes() -> None:
    middle = SIGNATURE[:32] + keys.HALF_ORDER.to_bytes(32, "big") + b"\x1b"
    above = SIGNATURE[:32] + (keys.HALF_ORDER + 1).to_bytes(32, "big") + b"\x1b"
    assert keys.recover(DIGEST, middle) is not None
    assert keys.recover(DIGEST, above) is None


@pytest.mark.parametrize("v", [v for v in range(256) if v not in (27, 28)])
def test_only_v_27_and_28(v: int) -> None:
    assert keys.recover(DIGEST, SIGNATURE[:64] + bytes((v,))) is None


@pytest.mark.parametrize(
    "signature",
    [
        b"",
        SIGNATURE[:64],
        SIGNATURE + b"\x00",
        bytes(64) + b"\x1b",
        bytes(32) + SIGNATURE[32:],
        SIGNATURE[:32] + bytes(32) + SIGNATURE[64:],
        keys.CURVE_ORDER.to_bytes(32, "big") + SIGNATURE[32:],
        b"\xff" * 32 + SIGNATURE[32:],
    ],
    ids=["empty", "64", "66", "zero", "r=0", "s=0", "r=n", "r>n"],
)
def test_malformed_signatures_recover_nothing(signature: bytes) -> None:
    assert keys.recover(DIGEST, signature) is None


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_digest_is_32_bytes(size: int) -> None:
    """The library is handed a pointer and would read on."""
    assert keys.recover(bytes(size), SIGNATURE) is None


@given(
    st.binary(min_size=32, max_size=32),
    st.sampled_from([0, 1, keys.CURVE_ORDER - 1, keys.CURVE_ORDER, 2**256 - 1])
    | st.integers(0, 2**256 - 1),
    st.sampled_from([0, 1, keys.HALF_ORDER]) | st.integers(0, keys.HALF_ORDER),
    st.sampled_from([27, 28]),
)
def test_recover_is_that_of_coincurve(digest: bytes, r: int, s: int, v: int) -> None:
    """Its own objects give the same key, or none, for any strict signature: half of all r are no
    point of the curve."""
    compact = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    expected: str | None = None
    with contextlib.suppress(ValueError):
        expected = keys.address_of(
            PublicKey.from_signature_and_message(compact + bytes((v - 27,)), digest, hasher=None)
        )
    assert keys.recover(digest, compact + bytes((v,))) == expected


def test_recovering_shares_nothing_between_threads() -> None:
    """The interpreter lets other threads run inside the library: each call has its own memory."""
    made = [
        (digest, keys.sign_digest(key, digest), keys.address_of(key))
        for key in (keys.private_key(bytes([n]) * 32) for n in range(1, 9))
        for digest in (keys.keccak256(secrets.token_bytes(8)),)
    ]

    def work(start: int) -> bool:
        return all(
            keys.recover(digest, signature) == address
            for digest, signature, address in (made[(start + i) % len(made)] for i in range(200))
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize(
    "bad", ["", "0x", "0x12", KEY + "00", "g" * 64, b"", bytes(32), b"\xff" * 32, bytes(31)]
)
def test_bad_private_keys_are_refused_without_being_repeated(bad: str | bytes) -> None:
    with pytest.raises(ValueError, match="private key") as caught:
        keys.private_key(bad)
    assert not bad or str(bad) not in str(caught.value)


def test_private_keys_come_in_three_forms() -> None:
    raw = bytes.fromhex(KEY[2:])
    forms: list[Any] = [KEY, KEY[2:].upper(), raw, keys.private_key(raw)]
    assert {keys.address_of(keys.private_key(form)) for form in forms} == {ADDRESS}


@given(st.binary(max_size=200))
def test_erc1271_calldata_is_abi(signature: bytes) -> None:
    expected = bytes.fromhex("1626ba7e") + encode(["bytes32", "bytes"], [DIGEST, signature])
    assert keys.erc1271_calldata(DIGEST, signature) == expected


WALLET = "0x" + "c0" * 20


@pytest.mark.parametrize(
    ("answer", "agreed"),
    [
        (keys.ERC1271_MAGIC + bytes(28), True),
        (keys.ERC1271_MAGIC, False),
        (keys.ERC1271_MAGIC + bytes(27) + b"\x01", False),
        (keys.ERC1271_MAGIC + bytes(60), False),
        (b"\xff" * 4 + bytes(28), False),
        (bytes(31) + b"\x01", False),
        (b"", False),
    ],
    ids=["yes", "short", "dirty", "long", "no", "true", "revert"],
)
async def test_a_contract_must_answer_in_one_word(answer: bytes, agreed: bool) -> None:
    async def call(caip2: str, to: str, data: bytes) -> bytes:
        assert (caip2, to) == ("eip155:8453", WALLET)
        assert data == keys.erc1271_calldata(DIGEST, b"blob")
        return answer

    assert await keys.contract_signed(call, "eip155:8453", WALLET, DIGEST, b"blob") is agreed


async def test_precompiles_and_giant_signatures_are_not_asked() -> None:
    async def identity(caip2: str, to: str, data: bytes) -> bytes:
        return keys.ERC1271_YES

    for low in (1, 4, 0xFFFF):
        address = f"0x{low:040x}"
        assert not await keys.contract_signed(identity, "eip155:1", address, DIGEST, b"s")
    for size, agreed in ((4096, True), (4097, False)):
        blob = secrets.token_bytes(size)
        assert await keys.contract_signed(identity, "eip155:1", WALLET, DIGEST, blob) is agreed
    assert await keys.contract_signed(identity, "eip155:1", f"0x{0x10000:040x}", DIGEST, b"s")


@pytest.mark.parametrize("inner", [b"i", b"i" * 65, b"i" * 96, b"i" * 130])
@pytest.mark.parametrize("call", [b"", b"c" * 4, b"c" * 68])
async def test_a_wrapper_is_taken_off(inner: bytes, call: bytes) -> None:
    """ERC-6492: only the wallet itself is asked, with the signature that was inside."""
    signature = wrapped(inner, call)
    assert keys.unwrap(signature) == (inner, keys.Wrapper(FACTORY, call))
    asked: list[tuple[str, bytes]] = []

    async def wallet(_caip2: str, to: str, data: bytes) -> bytes:
        asked.append((to, data))
        return keys.ERC1271_YES

    assert await keys.contract_signed(wallet, "eip155:1", WALLET, DIGEST, signature)
    assert asked == [(WALLET, keys.erc1271_calldata(DIGEST, inner))]


def test_what_is_not_wrapped_is_left_alone() -> None:
    for signature in (b"", b"s" * 65, SUFFIX[1:], SUFFIX + b"x"):
        assert keys.unwrap(signature) == (signature, None)


@pytest.mark.parametrize(
    "signature",
    [
        SUFFIX,
        bytes(95) + SUFFIX,
        b"\1" + wrapped(b"i")[1:],  # more than an address
        wrapped(b"i" * 65)[:-64] + SUFFIX,  # cut short
        bytes(31) + b"\1" + (2**255).to_bytes(32, "big") * 2 + SUFFIX,
        bytes(12) + SUFFIX,
        bytes(32) + (0).to_bytes(32, "big") * 2 + SUFFIX,
        # an offset into the head, where a length would stand
        bytes(32) + (32).to_bytes(32, "big") + wrapped(b"i" * 65)[64:],
        bytes(32) + (96).to_bytes(32, "big") * 2 + (2**200).to_bytes(32, "big") + SUFFIX,
        wrapped(b""),
        wrapped(wrapped(b"i")),
    ],
)
async def test_a_malformed_wrapper_is_no_signature(signature: bytes) -> None:
    async def yes(_caip2: str, _to: str, _data: bytes) -> bytes:
        return keys.ERC1271_YES

    with pytest.raises(ValueError, match=r"^[a-z]"):
        keys.unwrap(signature)
    assert not await keys.contract_signed(yes, "eip155:1", WALLET, DIGEST, signature)
