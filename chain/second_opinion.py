"""What web3 and eth_account make of the same questions, for ``farebox check``.

Serving goes through a few hand-written lines over two native libraries (docs/decisions/0005).
Here the same is done once more by other people's code that shares none of it: Keccak by
pycryptodome, the curve by eth_keys in plain Python (eth_account left alone would take coincurve,
the very library that is looked at), ABI, RLP, typed data and JSON-RPC by web3 and eth_account.
A second of imports and some milliseconds a signature, so nothing that serves comes here.

Every probe uses a random key, made for it and forgotten.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit

from chain import sender, tokens
from chain.errors import Unavailable
from chain.networks import Asset, Network
from chain.rpc import Rpc
from chain.schemes import eip3009
from wallet_auth import keys
from wallet_auth.keys import checksum

Pair = tuple[object, object]  # ours and theirs
Probe = tuple[str, Callable[[], Pair]]

_AUTHORIZATION: Final = (
    ("from", "address"),
    ("to", "address"),
    ("value", "uint256"),
    ("validAfter", "uint256"),
    ("validBefore", "uint256"),
    ("nonce", "bytes32"),
)
_VIEWS: Final[Sequence[tuple[str, tuple[str, ...], str]]] = (
    ("name", (), "string"),
    ("version", (), "string"),
    ("decimals", (), "uint8"),
    ("DOMAIN_SEPARATOR", (), "bytes32"),
    ("paused", (), "bool"),
    ("isBlacklisted", ("address",), "bool"),
)
_LONGEST: Final = 300  # bytes hashed by the first probe: Keccak takes blocks of 136


# -- the libraries on this machine ----------------------------------------------------------------


def library_fault(assets: Sequence[tuple[Network, Asset]]) -> str | None:
    """The first thing the two sides make differently, in words for the operator; None if nothing.

    No network. Only the first: what follows is built on it. ``assets``: the tokens whose payments
    are tried. (A native library that is missing or cannot be loaded is an ``ImportError`` when this
    module is imported.)
    """
    for what, probe in _probes(assets):
        try:
            ours, theirs = probe()
        except Exception as error:  # whatever a broken library throws is the finding
            return f"{what} cannot be tried: {type(error).__name__}: {error}"
        if ours != theirs:
            return f"{what}: this installation computes it wrongly"
    return None


def _probes(assets: Sequence[tuple[Network, Asset]]) -> Iterator[Probe]:
    secret = (secrets.randbelow(keys.CURVE_ORDER - 1) + 1).to_bytes(32, "big")
    yield "Keccak-256 (safe-pysha3)", _hashes
    yield "the address of a key (coincurve)", partial(_address, secret)
    yield "an EIP-191 signature (coincurve)", partial(_message, secret)
    for network, asset in assets:
        what = f"the signature of a payment in {asset.symbol} on {network.name} (EIP-712)"
        yield what, partial(_payment, secret, network, asset)
    yield "a signed transaction (EIP-1559)", partial(_transactions, secret)


def _hashes() -> Pair:
    from eth_hash.backends import pycryptodome

    texts = [secrets.token_bytes(length) for length in range(_LONGEST)]
    # By its own name: left to choose, eth_hash can be told by the environment to use pysha3.
    theirs = [bytes(pycryptodome.backend.keccak256(text)) for text in texts]
    return [keys.keccak256(text) for text in texts], theirs


def _address(secret: bytes) -> Pair:
    address = keys.address_of(keys.private_key(secret))
    return checksum(address), _independent(secret).public_key.to_checksum_address()


def _message(secret: bytes) -> Pair:
    from eth_account import Account
    from eth_account.messages import encode_defunct

    text = secrets.token_bytes(200)
    signed = Account.sign_message(encode_defunct(text), _independent(secret))
    key, digest = keys.private_key(secret), keys.eip191_hash(text)
    # Signatures are deterministic (RFC 6979), so they can be compared as they are.
    ours = (digest, keys.sign_digest(key, digest), keys.recover(digest, bytes(signed.signature)))
    return ours, (bytes(signed.message_hash), bytes(signed.signature), keys.address_of(key))


def _payment(secret: bytes, network: Network, asset: Asset) -> Pair:
    from eth_account import Account
    from eth_account.messages import encode_typed_data
    from web3 import Web3

    key = keys.private_key(secret)
    auth = eip3009.Authorization(
        from_=keys.address_of(key),
        to="0x" + secrets.token_hex(20),
        value_units=secrets.randbelow(2**64),
        valid_after_s=0,
        valid_before_s=secrets.randbelow(2**40),
        nonce="0x" + secrets.token_hex(32),
        signature=b"",
    )
    digest = eip3009.digest(network, asset, auth)
    domain = keys.eip712_domain(
        asset.eip712_name, asset.eip712_version, network.chain_id, asset.address
    )
    message = encode_typed_data(full_message=_typed_data(network, asset, auth))
    signed = Account.sign_message(message, _independent(secret))
    signature = bytes(signed.signature)
    contract = Web3().eth.contract(address=Web3.to_checksum_address(asset.address), abi=_abi())
    words = [*_values(auth).values(), signature[64], signature[:32], signature[32:64]]
    calldata = contract.encode_abi("transferWithAuthorization", args=words)
    auth = replace(auth, signature=keys.sign_digest(key, digest))
    ours = (domain, digest, auth.signature, "0x" + eip3009.transfer_calldata(auth).hex())
    return ours, (message.header, bytes(signed.message_hash), signature, calldata)


def _transactions(secret: bytes) -> Pair:
    from eth_account import Account

    ours, theirs = [], []
    for nonce, length in ((0, 0), (0x7F, 1), (0x80, 55), (2**32, 300)):  # where RLP changes form
        to, data = secrets.token_bytes(20), secrets.token_bytes(length)
        fees = sender.Fees(secrets.randbelow(2**24), secrets.randbelow(2**40), nonce, 0)
        prepared = sender.sign("0x" + secret.hex(), 84532, nonce, "0x" + to.hex(), data, fees)
        signed = Account.sign_transaction(
            {
                "type": 2,
                "chainId": 84532,
                "nonce": nonce,
                "maxPriorityFeePerGas": fees.tip_wei,
                "maxFeePerGas": fees.max_fee_wei,
                "gas": fees.gas_limit,
                "to": to,
                "value": 0,
                "data": data,
            },
            _independent(secret),
        )
        ours.append((prepared.raw, prepared.tx_hash))
        theirs.append((bytes(signed.raw_transaction), "0x" + bytes(signed.hash).hex()))
    return ours, theirs


def _independent(secret: bytes) -> Any:
    """A key whose arithmetic is plain Python. (``Account.set_key_backend`` changes nothing about
    how eth_account signs.)"""
    from eth_keys.datatypes import PrivateKey

    return PrivateKey(secret, backend="eth_keys.backends.NativeECCBackend")


def _values(auth: eip3009.Authorization) -> dict[str, Any]:
    values = (
        checksum(auth.from_),
        checksum(auth.to),
        auth.value_units,
        auth.valid_after_s,
        auth.valid_before_s,
        bytes.fromhex(auth.nonce[2:]),
    )
    return {name: value for (name, _), value in zip(_AUTHORIZATION, values, strict=True)}


def _typed_data(network: Network, asset: Asset, auth: eip3009.Authorization) -> dict[str, Any]:
    fields = {
        "EIP712Domain": (
            ("name", "string"),
            ("version", "string"),
            ("chainId", "uint256"),
            ("verifyingContract", "address"),
        ),
        "TransferWithAuthorization": _AUTHORIZATION,
    }
    return {
        "types": {
            struct: [{"name": name, "type": kind} for name, kind in members]
            for struct, members in fields.items()
        },
        "primaryType": "TransferWithAuthorization",
        "domain": {
            "name": asset.eip712_name,
            "version": asset.eip712_version,
            "chainId": network.chain_id,
            "verifyingContract": checksum(asset.address),
        },
        "message": _values(auth),
    }


# -- what a node says -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answers:
    """What one side was told about a chain and a token at one block."""

    chain_id: int
    token: tokens.Token
    standing: tokens.Standing
    gas_wei: int | None  # None: there is no settler to ask about

    def members(self) -> dict[str, object]:
        """Each answer under the name it is reported by."""
        return {
            "the chain id": self.chain_id,
            "the token's name": self.token.name,
            "the token's version": self.token.version,
            "the token's decimals": self.token.decimals,
            "the token's domain separator": "0x" + self.token.domain_separator.hex(),
            "paused()": self.standing.paused,
            "isBlacklisted(pay_to)": self.standing.blacklisted,
            "the settler's balance in wei": self.gas_wei,
        }


async def differences(
    rpc: Rpc, url: str, asset: Asset, *, pay_to: str, settler: str | None
) -> list[str]:
    """What web3, asking ``url``, is told otherwise than our own client; in words.

    ``rpc`` prefers its first URL, so this also compares the providers of a network. Raises
    ``Unavailable`` if one of the two cannot ask.
    """
    from web3.exceptions import BadFunctionCallOutput, ContractLogicError

    label = urlsplit(url).netloc.rpartition("@")[2]
    ours_block = await rpc.block_number()
    try:
        async with asyncio.timeout(rpc.timeout_ms / 1_000), _client(url) as client:
            # The older of the two newest blocks: what moved since is no difference.
            block = min(ours_block, int(await client.eth.block_number))
            theirs = await _theirs(client, asset, pay_to, settler, block)
    except (BadFunctionCallOutput, ContractLogicError):
        return [f"{label}: web3 finds no token at {asset.address}, our own client does"]
    except Exception as error:
        # Whatever web3 makes of an odd answer. Its texts can hold the URL, and that a secret.
        detail = f"{label}: web3 could not ask ({type(error).__name__})"
        raise Unavailable("rpc_no_answer", detail) from None
    ours = await _ours(rpc, asset, pay_to, settler, block)
    told = theirs.members()
    return [
        f"{label}: {what} is {told[what]!r} through web3 and {value!r} through our own client"
        for what, value in ours.members().items()
        if told[what] != value
    ]


async def _ours(rpc: Rpc, asset: Asset, pay_to: str, settler: str | None, block: int) -> Answers:
    at, gas_wei = hex(block), None
    if settler is not None:
        gas_wei = rpc.quantity(await rpc.call("eth_getBalance", [settler, at]))
    return Answers(
        chain_id=rpc.quantity(await rpc.call("eth_chainId", [])),
        token=await tokens.read_token(rpc, asset),
        standing=await tokens.read_standing(rpc, asset, pay_to, at),
        gas_wei=gas_wei,
    )


async def _theirs(
    client: Any, asset: Asset, pay_to: str, settler: str | None, block: int
) -> Answers:
    from web3.exceptions import BadFunctionCallOutput, ContractLogicError

    contract = client.eth.contract(address=client.to_checksum_address(asset.address), abi=_abi())

    async def ask(name: str, *arguments: str) -> Any:
        return await contract.functions[name](*arguments).call(block_identifier=block)

    async def switch(name: str, *arguments: str) -> bool | None:
        try:
            return bool(await ask(name, *arguments))
        except (BadFunctionCallOutput, ContractLogicError):
            return None  # the token has no such function

    gas_wei = None
    if settler is not None:
        gas_wei = int(await client.eth.get_balance(client.to_checksum_address(settler), block))
    token = tokens.Token(
        await ask("name"),
        await ask("version"),
        await ask("decimals"),
        bytes(await ask("DOMAIN_SEPARATOR")),
    )
    standing = tokens.Standing(
        await switch("paused"), await switch("isBlacklisted", client.to_checksum_address(pay_to))
    )
    return Answers(int(await client.eth.chain_id), token, standing, gas_wei)


@asynccontextmanager
async def _client(url: str) -> AsyncIterator[Any]:
    from web3 import AsyncHTTPProvider, AsyncWeb3

    provider = AsyncHTTPProvider(
        url, request_kwargs={"allow_redirects": False}, exception_retry_configuration=None
    )
    # A contract could otherwise have web3 fetch any address it names (EIP-3668).
    provider.global_ccip_read_enabled = False
    try:
        yield AsyncWeb3(provider)
    finally:
        await provider.disconnect()


def _abi() -> list[Any]:
    views = [
        {
            "type": "function",
            "name": name,
            "stateMutability": "view",
            "inputs": [{"name": f"_{n}", "type": kind} for n, kind in enumerate(inputs)],
            "outputs": [{"name": "", "type": output}],
        }
        for name, inputs, output in _VIEWS
    ]
    signed = (*_AUTHORIZATION, ("v", "uint8"), ("r", "bytes32"), ("s", "bytes32"))
    transfer = {
        "type": "function",
        "name": "transferWithAuthorization",
        "stateMutability": "nonpayable",
        "inputs": [{"name": name, "type": kind} for name, kind in signed],
        "outputs": [],
    }
    return [*views, transfer]
