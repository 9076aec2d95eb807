"""Sign-in-with-x: the official clients' words, and a challenge good for one request only."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gateway.payments.offers import Keys
from tests.fixtures_wallets import wrapped
from tests.wallet_auth.support import ADDRESS, KEY, NOW, OTHER_KEY
from wallet_auth import AuthError, Signer, check_digests, keys, siwx

VECTORS = json.loads((Path(__file__).parents[1] / "vectors/x402-vectors.json").read_text())["siwx"]
MAC_KEYS = Keys("deployment", {b"\0\0\0\1": b"k" * 32}, b"\0\0\0\1")
BODY = hashlib.sha256(b'{"q": 1}').digest()
ASKED = siwx.Asked(
    "POST", b"/v1/chat?a=1", "http://127.0.0.1:8402", "127.0.0.1:8402", BODY
)  # as a gateway on a port of its own
CHAINS = siwx.supported(("eip155:84532", "eip155:8453"))


def encode(payload: object) -> bytes:
    return base64.b64encode(json.dumps(payload).encode())


def challenge(asked: siwx.Asked = ASKED, ceiling_units: int = 2_000) -> dict[str, Any]:
    text = siwx.challenge(
        MAC_KEYS, asked, CHAINS, ceiling_units, "$0.002 (0.2 credits)", (NOW, NOW + 120)
    )
    found: dict[str, Any] = json.loads(text)
    return found


def answer(extension: dict[str, Any], key: str = KEY, **changed: Any) -> dict[str, Any]:
    """What a client sends: the challenge's own lines, signed."""
    private = keys.private_key(key)
    payload = {
        **extension["info"],
        "address": keys.checksum(keys.address_of(private)),
        "chainId": extension["supportedChains"][0]["chainId"],
        "type": "eip191",
        **changed,
    }
    text = siwx.message(siwx.parse(encode({**payload, "signature": "0x00"})))
    signature = keys.sign_digest(private, keys.eip191_hash(text.encode()))
    return {**payload, "signature": "0x" + signature.hex()}


async def verify(
    payload: object, asked: siwx.Asked = ASKED, *, now_s: int = NOW, call: Any = None
) -> tuple[Signer, int]:
    return await siwx.verify(encode(payload), MAC_KEYS, asked, now_s, call)


async def refused(code: str, payload: object, asked: siwx.Asked = ASKED, **options: Any) -> None:
    with pytest.raises(AuthError) as caught:
        await verify(payload, asked, **options)
    assert caught.value.code == code, caught.value


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["name"])
async def test_the_vectors_of_the_official_clients(vector: dict[str, Any]) -> None:
    header = vector["header"].encode() if "header" in vector else encode(vector["payload"])
    good = not vector["name"].startswith("invalid")
    try:
        proof = siwx.parse(header)
        if "message" in vector:
            assert siwx.message(proof) == vector["message"]
        kind = await siwx.signed_by(proof, None)
    except AuthError as error:
        assert not good, error
        assert error.code in ("invalid_siwx_signature", "invalid_siwx_header")
    else:
        assert good
        assert (kind, proof.address.lower()) == ("key", ADDRESS)


async def test_a_signed_challenge_names_its_signer() -> None:
    extension = challenge()
    signer, ceiling_units = await verify(answer(extension))
    assert ceiling_units == 2_000
    assert signer == Signer(
        scheme="siwx",
        address=ADDRESS,
        chain_id=84532,
        kind="key",
        request_id=extension["info"]["nonce"],
        created_s=NOW,
        expires_s=NOW + 120,
        digests=(("sha-256", BODY),),
        ceiling=None,
        covered=frozenset(),
    )


def test_what_is_signed_says_what_may_be_spent_and_where() -> None:
    info = challenge()["info"]
    assert info["statement"] == ("Spend at most $0.002 (0.2 credits) on POST /v1/chat?a=1")
    assert (info["domain"], info["uri"]) == (
        "127.0.0.1:8402",
        "http://127.0.0.1:8402/v1/chat?a=1",
    )
    assert info["issuedAt"] == "2030-03-17T17:46:40.000Z"
    assert info["expirationTime"] == "2030-03-17T17:48:40.000Z"


@pytest.mark.parametrize("at_s", [0, 951_782_400, 1_709_164_799, 4_107_542_399, 4_294_967_295])
async def test_times_are_written_as_in_iso_8601(at_s: int) -> None:
    text = siwx.challenge(MAC_KEYS, ASKED, CHAINS, 1, "", (at_s - min(at_s, 60), at_s))
    there = datetime.fromtimestamp(at_s, UTC)
    assert datetime.fromisoformat(json.loads(text)["info"]["expirationTime"]) == there


def test_the_challenge_is_small() -> None:
    assert len(siwx.challenge(MAC_KEYS, ASKED, CHAINS, 2_000, "$0.002", (NOW, NOW + 120))) < 700


def test_no_two_challenges_are_alike() -> None:
    assert challenge()["info"]["nonce"] != challenge()["info"]["nonce"]


@pytest.mark.parametrize(
    ("target", "uri", "shown"),
    [
        (b"/a%2Fb?c=%20", "/a%2Fb?c=%20", "/a~2Fb?c=~20"),
        (b'/a|b"c', "/", "/a~b~c"),
        (b"/" + b"x" * 2_000, "/", "/" + "x" * 199 + "..."),
    ],
)
async def test_targets_that_a_statement_cannot_hold(target: bytes, uri: str, shown: str) -> None:
    asked = replace(ASKED, target=target)
    extension = challenge(asked)
    assert extension["info"]["uri"] == ASKED.origin + uri
    assert extension["info"]["statement"].endswith(f" on POST {shown}")
    await verify(answer(extension), asked)
    await refused("invalid_siwx_nonce", answer(extension), replace(asked, target=target + b"y"))


@pytest.mark.parametrize(
    "asked",
    [
        replace(ASKED, method="PUT"),
        replace(ASKED, target=b"/v1/chat?a=2"),
        replace(ASKED, target=b"/v1/chat"),
        replace(ASKED, authority="127.0.0.1"),
    ],
    ids=["method", "query", "path", "authority"],
)
async def test_a_proof_is_for_one_request(asked: siwx.Asked) -> None:
    await refused("invalid_siwx_nonce", answer(challenge()), asked)


async def test_a_proof_is_for_one_deployment() -> None:
    with pytest.raises(AuthError, match="invalid_siwx_nonce"):
        await siwx.verify(
            encode(answer(challenge())), replace(MAC_KEYS, deployment="other"), ASKED, NOW, None
        )


@pytest.mark.parametrize(
    "changed",
    [
        {"nonce": "ff" * 16},
        {"nonce": (NOW + 9_999).to_bytes(4, "big").hex() + "00" * 12},
        {"statement": "Spend at most $9 on POST /v1/chat?a=1"},
        {"statement": None},
        {"uri": "http://127.0.0.1:8402/v1/other"},
        {"domain": "evil.example"},
        {"version": "2"},
        {"issuedAt": "2029-03-17T17:46:40.000Z"},
        {"expirationTime": "2039-03-17T17:48:40.000Z"},
        {"notBefore": "2020-03-17T17:48:40.000Z"},
        {"resources": []},
        {"resources": ["http://127.0.0.1:8402/"]},
        {"requestId": None},
        {"requestId": "AAAA"},
        {"requestId": "not base64 at all"},
    ],
    ids=str,
)
async def test_a_challenge_is_signed_as_it_was_made(changed: dict[str, Any]) -> None:
    """The signature is good each time: it is our own seal that does not hold."""
    await refused("invalid_siwx_nonce", answer(challenge(), **changed))


async def test_the_ceiling_is_sealed() -> None:
    extension = challenge()
    raw = bytearray(base64.urlsafe_b64decode(extension["info"]["requestId"] + "=="))
    for place in range(len(raw)):
        other = bytes(raw[:place]) + bytes((raw[place] ^ 1,)) + bytes(raw[place + 1 :])
        text = base64.urlsafe_b64encode(other).decode().rstrip("=")
        await refused("invalid_siwx_nonce", answer(extension, requestId=text))


async def test_a_proof_ends() -> None:
    payload = answer(challenge())
    await verify(payload, now_s=NOW + 120)
    await refused("invalid_siwx_expired", payload, now_s=NOW + 121)


async def test_a_signature_of_another_key_is_refused() -> None:
    extension = challenge()
    theirs = answer(extension, OTHER_KEY)
    await refused("invalid_siwx_signature", {**theirs, "address": answer(extension)["address"]})


async def test_the_body_is_the_one_that_was_asked_with() -> None:
    signer, _ = await verify(answer(challenge()))
    check_digests(signer, 8, {"sha-256": BODY})
    with pytest.raises(AuthError, match="signature_digest_mismatch"):
        check_digests(signer, 8, {"sha-256": hashlib.sha256(b"other").digest()})


async def test_no_body_stays_no_body() -> None:
    signer, _ = await verify(answer(challenge(replace(ASKED, body=b""))))
    check_digests(signer, 0, {})
    with pytest.raises(AuthError, match="signature_digest_mismatch"):
        check_digests(signer, 1, {})


async def test_a_long_body_is_not_looked_at() -> None:
    signer, _ = await verify(answer(challenge(replace(ASKED, body=None))))
    assert signer.any_body
    check_digests(signer, 100_000, {})


def broken(**changed: Any) -> Callable[[dict[str, Any]], bytes]:
    return lambda payload: encode({**payload, **changed})


@pytest.mark.parametrize(
    "make",
    [
        lambda _: b"",
        lambda _: b"%%%",
        lambda _: encode([1]),
        lambda payload: base64.urlsafe_b64encode(json.dumps({**payload, "x": "~~~???"}).encode()),
        broken(type="ed25519"),
        broken(chainId="solana:abc"),
        broken(chainId="eip155:x"),
        broken(address="0x1234"),
        broken(signature="0x"),
        broken(signature="0x" + "00" * 5_000),
        broken(signature=7),
        broken(nonce=None),
        broken(statement="two\nlines"),
        broken(resources="one"),
        broken(resources=["a\nb"]),
        broken(padding="x" * 8_000),
    ],
)
async def test_malformed_headers(make: Callable[[dict[str, Any]], bytes]) -> None:
    with pytest.raises(AuthError, match="invalid_siwx_header"):
        await siwx.verify(make(answer(challenge())), MAC_KEYS, ASKED, NOW, None)


async def test_a_contract_wallet_is_asked_after_the_seal() -> None:
    asked_for: list[tuple[str, str]] = []

    async def call(caip2: str, to: str, _data: bytes) -> bytes:
        asked_for.append((caip2, to))
        return keys.ERC1271_YES

    contract = "0x" + "ab" * 20
    extension = challenge()
    payload = {**answer(extension, OTHER_KEY), "address": contract}
    signer, _ = await verify(payload, call=call)
    assert (signer.kind, signer.address, signer.chain_id) == ("contract", contract, 84532)
    assert asked_for == [("eip155:84532", contract)]
    await refused("invalid_siwx_nonce", {**payload, "nonce": "00" * 16}, call=call)
    assert len(asked_for) == 1
    around = "0x" + wrapped(b"w" * 70).hex()  # ERC-6492
    signer, _ = await verify({**payload, "signature": around}, call=call)
    assert (signer.kind, signer.address) == ("contract", contract)
    assert asked_for == [("eip155:84532", contract)] * 2


async def test_a_contract_wallet_that_says_no_or_cannot_be_asked() -> None:
    async def no(_caip2: str, _to: str, _data: bytes) -> bytes:
        return b""

    async def elsewhere(caip2: str, _to: str, _data: bytes) -> bytes:
        raise LookupError(caip2)

    payload = {**answer(challenge(), OTHER_KEY), "address": "0x" + "ab" * 20}
    for call in (no, elsewhere):
        await refused("invalid_siwx_signature", payload, call=call)
