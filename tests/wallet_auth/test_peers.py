"""Both directions against two independent makers: http-message-signatures, @slicekit/erc8128.

What they sign we accept; what we sign they accept; what was changed on the way all three refuse.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from http_message_signatures import (
    HTTPMessageSigner,
    HTTPMessageVerifier,
    HTTPSignatureAlgorithm,
    HTTPSignatureKeyResolver,
    InvalidSignature,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.wallet_auth.support import ADDRESS, KEY, NOW, Peer, body_base64, request_of
from wallet_auth import AuthError, SignedRequest, Signer, keys, verify
from wallet_auth.signing import sign_request

# The peers live for the whole module; Hypothesis would rather have them fresh for each example.
PEERS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

SEGMENTS = st.lists(st.text(max_size=6).map(lambda t: quote(t, safe="~!$&'()*+,;=:@")), max_size=3)
QUERIES = st.none() | st.dictionaries(
    st.text(min_size=1, max_size=4), st.text(max_size=4), min_size=1, max_size=3
).map(lambda d: "&".join(f"{quote(k, safe='')}={quote(v, safe='')}" for k, v in d.items()))
TOKENS = st.from_regex(r"[!-~]([ -~]{0,10}[!-~])?", fullmatch=True).filter(lambda v: "  " not in v)
FIELDS = st.dictionaries(st.sampled_from(["x-a", "x-b-c", "farebox-run"]), TOKENS, max_size=2)
ORIGINS = st.sampled_from(
    ["https://api.example", "http://127.0.0.1:8402", "https://API.Example:443", "http://x:443"]
)


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, Any]:
    """A request as a client is given it."""
    segments = [s for s in draw(SEGMENTS) if s not in (".", "..")]
    query = draw(QUERIES)
    method = draw(st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH"]))
    body = draw(st.none() | st.binary(min_size=1, max_size=80)) if method != "GET" else None
    url = f"{draw(ORIGINS)}/{'/'.join(segments)}"
    return {
        "method": method,
        "url": url if query is None else f"{url}?{query}",
        "headers": sorted(draw(FIELDS).items()),
        "body": body,
        "nonce": draw(st.from_regex(r"[A-Za-z0-9._~:=-]{1,40}", fullmatch=True)),
        "created": draw(st.integers(NOW - 200, NOW)),
        "window_s": draw(st.integers(201, 300)),
        "chain_id": draw(st.integers(1, 2**50)),
        "label": draw(st.sampled_from(["eth", "sig1", "x-y.z"])),
    }


def check(request: SignedRequest) -> Signer:
    signer = asyncio.run(verify(request, NOW, None))
    assert signer is not None
    return signer


def matches(signer: Signer, job: dict[str, Any]) -> None:
    assert signer.address == ADDRESS
    assert signer.kind == "key"
    assert signer.request_id == job["nonce"]
    assert signer.chain_id == job["chain_id"]
    assert (signer.created_s, signer.expires_s) == (
        job["created"],
        job["created"] + job["window_s"],
    )
    assert {"@authority", "@method", "@path", *(n for n, _ in job["headers"])} <= signer.covered
    assert ("@query" in signer.covered) is ("?" in job["url"])
    assert ("content-digest" in signer.covered) is bool(job["body"])


def ours(job: dict[str, Any]) -> list[tuple[str, str]]:
    """All headers of the request after our signing half."""
    added = sign_request(
        KEY,
        job["method"],
        job["url"],
        job["headers"],
        job["body"],
        now_s=job["created"],
        nonce=job["nonce"],
        window_s=job["window_s"],
        chain_id=job["chain_id"],
        label=job["label"],
        components=[name for name, _ in job["headers"]],
    )
    return [*job["headers"], *added.items()]


# -- http-message-signatures ----------------------------------------------------------------------


class Eip191(HTTPSignatureAlgorithm):
    """The library's slot for an algorithm of one's own."""

    algorithm_id = "eip191"

    def __init__(self, public_key: Any = None, private_key: Any = None) -> None:
        self.address, self.key = public_key, private_key

    def sign(self, message: bytes) -> bytes:
        return keys.sign_digest(keys.private_key(self.key), keys.eip191_hash(message))

    def verify(self, signature: bytes, message: bytes) -> None:
        if keys.recover(keys.eip191_hash(message), signature) != self.address:
            raise InvalidSignature("another signer")


class KeyIds(HTTPSignatureKeyResolver):
    def resolve_public_key(self, key_id: str) -> Any:
        return key_id.rpartition(":")[2].lower()

    def resolve_private_key(self, key_id: str) -> Any:
        return KEY


class Fields(dict[str, str]):
    """Headers as the library wants them: names ignore case."""

    def __init__(self, lines: list[tuple[str, str]]) -> None:
        super().__init__()
        for name, value in lines:
            self[name] = value

    def __setitem__(self, name: str, value: str) -> None:
        super().__setitem__(name.lower(), value)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).lower())


class Message:
    def __init__(self, method: str, url: str, headers: list[tuple[str, str]]) -> None:
        self.method, self.url, self.headers = method, url, Fields(headers)


class Verifier(HTTPMessageVerifier):
    max_clock_skew = datetime.timedelta(days=40_000)  # times are not what is compared here
    allow_label_only_selection = True


def library_verifies(
    method: str, url: str, headers: list[tuple[str, str]], body: bytes | None
) -> bool:
    try:
        (result,) = Verifier(signature_algorithm=Eip191, key_resolver=KeyIds()).verify(
            Message(method, url, headers),
            max_age=None,
            require_components=("@authority", "@method", "@path"),
            body=body or b"",
        )
    except InvalidSignature:
        return False
    return str(result.parameters["keyid"]).endswith(ADDRESS)


def library_signs(job: dict[str, Any]) -> list[tuple[str, str]]:
    message = Message(job["method"], job["url"], job["headers"])
    covered = ["@authority", "@method", "@path", *(n for n, _ in job["headers"])]
    if "?" in job["url"]:
        covered.append("@query")
    zone = datetime.UTC
    HTTPMessageSigner(signature_algorithm=Eip191, key_resolver=KeyIds()).sign(
        message,
        key_id=f"erc8128:{job['chain_id']}:{ADDRESS}",
        created=datetime.datetime.fromtimestamp(job["created"], zone),
        expires=datetime.datetime.fromtimestamp(job["created"] + job["window_s"], zone),
        nonce=job["nonce"],
        label=job["label"],
        include_alg=False,
        covered_component_ids=covered,
        body=job["body"],
    )
    return list(message.headers.items())


@PEERS
@given(jobs())
def test_we_accept_what_the_library_signs(job: dict[str, Any]) -> None:
    matches(check(request_of(job["method"], job["url"], library_signs(job), job["body"])), job)


@PEERS
@given(jobs())
def test_the_library_accepts_what_we_sign(job: dict[str, Any]) -> None:
    headers = ours(job)
    matches(check(request_of(job["method"], job["url"], headers, job["body"])), job)
    assert library_verifies(job["method"], job["url"], headers, job["body"])


def _mutations(job: dict[str, Any]) -> dict[str, Any]:
    """Changes on the way, each as (method, url, body, headers to replace)."""
    url, body = job["url"], job["body"]
    origin, path = "/".join(url.split("/")[:3]), "/" + "/".join(url.split("/")[3:])
    found: dict[str, Any] = {
        "method": ("PURGE", url, body, {}),
        "path": (job["method"], origin + "/x" + path, body, {}),
        "host": (job["method"], "https://other.example" + path, body, {}),
        "query": (job["method"], url + ("&z" if "?" in url else "?z"), body, {}),
        "body": (job["method"], url, (body or b"") + b"!", {}),
    }
    for name, value in job["headers"]:
        found[name] = (job["method"], url, body, {name: value + "!"})
    return found


@PEERS
@given(jobs(), st.data())
def test_we_refuse_what_the_library_refuses(job: dict[str, Any], data: st.DataObject) -> None:
    headers = ours(job)
    which = data.draw(st.sampled_from(sorted(_mutations(job))))
    method, url, body, replace = _mutations(job)[which]
    sent = [(n, replace.get(n, v)) for n, v in headers]
    with pytest.raises(AuthError):
        check(request_of(method, url, sent, body))
    # The library leaves it to its caller whether a query that appeared must be covered.
    if which != "query" or "?" in job["url"]:
        assert not library_verifies(method, url, sent, body)


@PEERS
@given(jobs(), st.data())
def test_inputs_that_are_spliced_are_read_alike(job: dict[str, Any], data: st.DataObject) -> None:
    """Garbage in Signature-Input: whenever we accept, the library accepts the same bytes."""
    headers = ours(job)
    sent = dict(headers)["Signature-Input"]
    pieces = [" ", ";", ",", '"', "(", ")", "=", "0", "a", ';tag="t"', ' "@method"', ", b=()", "?1"]
    at = data.draw(st.integers(0, len(sent)))
    cut = data.draw(st.integers(0, 2))
    wild = sent[:at] + data.draw(st.sampled_from(pieces)) + sent[at + cut :]
    mixed = [(n, wild if n == "Signature-Input" else v) for n, v in headers]
    request = request_of(job["method"], job["url"], mixed, job["body"])
    try:
        signer = asyncio.run(verify(request, NOW, None))
    except AuthError:
        return
    if signer is None:  # the key id is no longer one of this scheme
        return
    # A second label of ours without a signature is tolerated here and not by the library.
    assume(", b=()" not in wild)
    assert library_verifies(job["method"], job["url"], mixed, job["body"])


# -- @slicekit/erc8128 ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def signer() -> Iterator[Peer]:
    peer = Peer("erc8128_sign.mjs")
    yield peer
    peer.close()


@pytest.fixture(scope="module")
def verifier() -> Iterator[Peer]:
    peer = Peer("erc8128_verify.mjs")
    yield peer
    peer.close()


def slicekit_signs(peer: Peer, job: dict[str, Any]) -> dict[str, Any]:
    return peer.ask(
        {
            "key": KEY,
            "chain_id": job["chain_id"],
            "method": job["method"],
            "url": job["url"],
            "headers": job["headers"],
            "body_base64": body_base64(job["body"]),
            "created": job["created"],
            "expires": job["created"] + job["window_s"],
            "nonce": job["nonce"],
            "label": job["label"],
            "components": [name for name, _ in job["headers"]],
        }
    )


def slicekit_verifies(
    peer: Peer, method: str, url: str, headers: list[tuple[str, str]], body: bytes | None
) -> dict[str, Any]:
    return peer.ask(
        {
            "method": method,
            "url": url,
            "headers": headers,
            "body_base64": body_base64(body),
            "now": NOW,
        }
    )


@PEERS
@given(jobs())
def test_we_accept_what_slicekit_signs(signer: Peer, job: dict[str, Any]) -> None:
    answer = slicekit_signs(signer, job)
    assert "error" not in answer, answer
    request = request_of(answer["method"], answer["url"], answer["headers"], job["body"])
    matches(check(request), job)
    assert library_verifies(answer["method"], answer["url"], answer["headers"], job["body"])


@PEERS
@given(jobs())
def test_slicekit_accepts_what_we_sign(verifier: Peer, job: dict[str, Any]) -> None:
    answer = slicekit_verifies(verifier, job["method"], job["url"], ours(job), job["body"])
    assert answer["ok"] is True, answer
    assert (answer["address"], answer["chainId"]) == (ADDRESS, job["chain_id"])
    assert answer["binding"] == "request-bound"
    assert answer["replayable"] is False
    assert answer["params"]["nonce"] == job["nonce"]


@PEERS
@given(jobs(), st.data())
def test_slicekit_and_we_refuse_the_same(
    verifier: Peer, job: dict[str, Any], data: st.DataObject
) -> None:
    headers = ours(job)
    which = data.draw(st.sampled_from(sorted(_mutations(job))))
    method, url, body, replace = _mutations(job)[which]
    assume(not (body and method == "GET"))  # fetch has no such requests
    sent = [(n, replace.get(n, v)) for n, v in headers]
    with pytest.raises(AuthError):
        check(request_of(method, url, sent, body))
    assert slicekit_verifies(verifier, method, url, sent, body)["ok"] is False


def test_where_slicekit_differs(signer: Peer) -> None:
    """Two corners in which the npm package leaves the RFCs, and what becomes of them here."""
    job: dict[str, Any] = {
        "method": "GET",
        "headers": [],
        "body": None,
        "nonce": "n",
        "created": NOW,
    }
    job |= {"window_s": 60, "chain_id": 1, "label": "eth"}
    # An empty query is sent and not covered: refused, with the component named.
    answer = slicekit_signs(signer, job | {"url": "https://x/a?"})
    with pytest.raises(AuthError) as caught:
        check(request_of("GET", answer["url"], answer["headers"], None))
    assert caught.value.code == "signature_missing_component"
    assert caught.value.params["missing"] == ["@query"]
    # Runs of spaces inside a covered field are signed as one; RFC 9421 2.1 leaves them alone.
    spaced = slicekit_signs(signer, job | {"url": "https://x/a", "headers": [("x-a", "a  b")]})
    with pytest.raises(AuthError) as caught:
        check(request_of("GET", "https://x/a", spaced["headers"], None))
    assert caught.value.code == "signature_invalid"
