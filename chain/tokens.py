"""Is the token what the networks table says it is, and would it move money now?"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from chain.errors import Reverted, Unavailable
from chain.eth import read_string, selector
from chain.networks import Asset, Network
from chain.rpc import Rpc
from wallet_auth.keys import address_word, checksum, eip712_domain


@dataclass(frozen=True, slots=True)
class Token:
    """What a token says about itself."""

    name: str
    version: str
    decimals: int
    domain_separator: bytes


@dataclass(frozen=True, slots=True)
class Standing:
    """What the issuer's switches say. None: the token has no such switch."""

    paused: bool | None
    blacklisted: bool | None  # the one address that was asked about


async def read_token(rpc: Rpc, asset: Asset) -> Token:
    """Ask the token. ``Unavailable`` if the chain cannot be asked or the answers make no sense."""
    if not await rpc.code(asset.address):
        raise Unavailable(
            "rpc_error", f"there is no contract at {asset.address} on {rpc.network.name}"
        )
    names = ("name()", "version()", "decimals()", "DOMAIN_SEPARATOR()")
    try:
        name, version, decimals, domain = await asyncio.gather(
            *(rpc.eth_call(asset.address, selector(each)) for each in names)
        )
        if len(decimals) != 32 or len(domain) != 32:
            raise ValueError("not one word")
        return Token(
            read_string(name), read_string(version), int.from_bytes(decimals, "big"), domain
        )
    except (Reverted, ValueError) as error:
        raise Unavailable(
            "rpc_error", f"the contract at {asset.address} is no EIP-3009 token: {error}"
        ) from None


def token_faults(network: Network, asset: Asset, token: Token) -> list[str]:
    """Every difference between the token and its row; each is a reason not to serve.

    A wrong name or version would make every payer sign something the token refuses; wrong
    decimals would credit the wrong amount.
    """
    where = f"{asset.symbol} on {network.name}"
    faults = []
    if token.name != asset.eip712_name:
        faults.append(f"{where}: the token's name is {token.name!r}, not {asset.eip712_name!r}")
    if token.version != asset.eip712_version:
        faults.append(
            f"{where}: the token's version is {token.version!r}, not {asset.eip712_version!r}"
        )
    if token.decimals != asset.decimals:
        faults.append(f"{where}: the token has {token.decimals} decimals, not {asset.decimals}")
    expected = eip712_domain(
        asset.eip712_name, asset.eip712_version, network.chain_id, asset.address
    )
    if not faults and token.domain_separator != expected:
        faults.append(f"{where}: the token's EIP-712 domain separator is not the expected one")
    return faults


async def read_standing(rpc: Rpc, asset: Asset, account: str, block: str = "latest") -> Standing:
    """Ask for the switches USDC has (``paused``, ``isBlacklisted``) at ``block``. Other tokens may
    lack them. Raises ``Unavailable``."""

    async def switch(signature: str, argument: bytes = b"") -> bool | None:
        try:
            word = await rpc.eth_call(asset.address, selector(signature) + argument, block)
        except Reverted:
            return None
        value = int.from_bytes(word, "big")
        return bool(value) if len(word) == 32 and value < 2 else None

    return Standing(
        await switch("paused()"), await switch("isBlacklisted(address)", address_word(account))
    )


def standing_faults(network: Network, asset: Asset, account: str, standing: Standing) -> list[str]:
    """What keeps payments to ``account`` from being settled at the moment."""
    where = f"{asset.symbol} on {network.name}"
    faults = []
    if standing.paused:
        faults.append(f"{where} is paused by its issuer: no payment can be settled")
    if standing.blacklisted:
        faults.append(f"{checksum(account)} is on the blacklist of {where}: it cannot be paid")
    return faults
