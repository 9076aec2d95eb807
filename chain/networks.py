"""The networks and tokens this program knows: one row each, nothing derived.

Addresses are Circle's native USDC (no bridged tokens). The EIP-712 name differs between
networks ("USD Coin" or "USDC"), so it stands in the row, and ``chain/tokens.py`` compares every
row that is in use with the token itself at start. Short names are those of x402 version 1 where
that version has one. Adding a chain or a token is a row here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Asset:
    """A token that is accepted. ``decimals`` must be 6: one unit is one micro-USD."""

    address: str  # lower case
    symbol: str
    decimals: int
    eip712_name: str
    eip712_version: str


@dataclass(frozen=True, slots=True)
class Finality:
    """How far a block can be trusted: the block tags to ask for, and the usual block time.

    ``safe`` is the tag from which a mint is no longer provisional, ``final`` the tag from which
    it counts as irreversible. ``block_ms`` paces polling; it is not a promise of the chain.
    """

    safe: str
    final: str
    block_ms: int


@dataclass(frozen=True, slots=True)
class Network:
    """One EVM network. ``v1_name`` is the short name in x402 version 1, if it has one.

    ``op_stack``: a rollup that charges for data on L1 besides gas (chain/rollup.py).
    ``most_tip_gwei``: no tip above this is believed to be needed. A tip is paid whole, and what a
    node says of it cannot be held against anything; base fees are the chain's own.
    """

    name: str
    caip2: str
    chain_id: int
    v1_name: str | None
    testnet: bool
    assets: tuple[Asset, ...]
    explorer_tx: str  # a URL with {tx}
    finality: Finality
    op_stack: bool = False
    most_tip_gwei: int = 100

    @property
    def usdc(self) -> Asset:
        """The network's native USDC: always the first asset."""
        return self.assets[0]

    def asset(self, address: str) -> Asset | None:
        """The row of a token by its address, in any case of letters."""
        wanted = address.lower()
        return next((asset for asset in self.assets if asset.address == wanted), None)


def _usdc(address: str, eip712_name: str) -> tuple[Asset, ...]:
    return (Asset(address, "USDC", 6, eip712_name, "2"),)


# OP-stack and Arbitrum chains: "safe" is posted to L1, "finalized" is final there. Bor has no
# useful "safe" tag; its milestones answer to "finalized" within seconds.
_ROLLUP: Final = Finality("safe", "finalized", 2_000)

NETWORKS: Final[dict[str, Network]] = {
    row.name: row
    for row in (
        Network(
            name="base",
            caip2="eip155:8453",
            chain_id=8453,
            v1_name="base",
            testnet=False,
            assets=_usdc("0x833589fcd6edb6e08f4c7c32d4f71b54bda02913", "USD Coin"),
            explorer_tx="https://basescan.org/tx/{tx}",
            finality=_ROLLUP,
            op_stack=True,
            most_tip_gwei=5,
        ),
        Network(
            name="base-sepolia",
            caip2="eip155:84532",
            chain_id=84532,
            v1_name="base-sepolia",
            testnet=True,
            assets=_usdc("0x036cbd53842c5426634e7929541ec2318f3dcf7e", "USDC"),
            explorer_tx="https://sepolia.basescan.org/tx/{tx}",
            finality=_ROLLUP,
            op_stack=True,
            most_tip_gwei=5,
        ),
        Network(
            name="arbitrum",
            caip2="eip155:42161",
            chain_id=42161,
            v1_name=None,
            testnet=False,
            assets=_usdc("0xaf88d065e77c8cc2239327c5edb3a432268e5831", "USD Coin"),
            explorer_tx="https://arbiscan.io/tx/{tx}",
            finality=Finality("safe", "finalized", 250),
            most_tip_gwei=5,
        ),
        Network(
            name="optimism",
            caip2="eip155:10",
            chain_id=10,
            v1_name=None,
            testnet=False,
            assets=_usdc("0x0b2c639c533813f4aa9d7837caf62653d097ff85", "USD Coin"),
            explorer_tx="https://optimistic.etherscan.io/tx/{tx}",
            finality=_ROLLUP,
            op_stack=True,
            most_tip_gwei=5,
        ),
        Network(
            name="polygon",
            caip2="eip155:137",
            chain_id=137,
            v1_name="polygon",
            testnet=False,
            assets=_usdc("0x3c499c542cef5e3811e1192ce70d8cc03d5c3359", "USD Coin"),
            explorer_tx="https://polygonscan.com/tx/{tx}",
            finality=Finality("finalized", "finalized", 2_000),
            most_tip_gwei=1000,
        ),
        Network(
            name="avalanche",
            caip2="eip155:43114",
            chain_id=43114,
            v1_name="avalanche",
            testnet=False,
            assets=_usdc("0xb97ef9ef8734c71904d8002f8b6bc66dd9c48a6e", "USD Coin"),
            explorer_tx="https://snowtrace.io/tx/{tx}",
            finality=Finality("safe", "finalized", 2_000),
        ),
        Network(
            name="ethereum",
            caip2="eip155:1",
            chain_id=1,
            v1_name="ethereum",
            testnet=False,
            assets=_usdc("0xa0b86991c6218b36c1d19d4a2e9eb0ce3606eb48", "USD Coin"),
            explorer_tx="https://etherscan.io/tx/{tx}",
            finality=Finality("safe", "finalized", 12_000),
        ),
    )
}

_BY_CAIP2: Final = {row.caip2: row for row in NETWORKS.values()}


def network(name_or_caip2: str) -> Network:
    """The network with this short name or CAIP-2 id. ``KeyError`` if there is none."""
    found = NETWORKS.get(name_or_caip2) or _BY_CAIP2.get(name_or_caip2)
    if found is None:
        raise KeyError(f"unknown network {name_or_caip2!r}; known: {', '.join(sorted(NETWORKS))}")
    return found
