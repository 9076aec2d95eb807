"""Start a local chain with real USDC: Anvil with the chain id of Base Sepolia.

With this chain id and USDC at its Base Sepolia address unmodified x402 clients pay here without
any setting. Only ids of test networks are taken: a payment signed on a toy chain that called
itself Base would be good on Base.
"""

from __future__ import annotations

import asyncio
import http.client
import json as json_lib
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from anvil import usdc
from anvil.process import (
    AnvilProcess,
    DevnetError,
    find_binary,
    spawn,
    stop,
    wait_listening,
)
from chain.networks import NETWORKS
from wallet_auth.keys import checksum

__all__ = ["Account", "Devnet", "DevnetError", "devnet", "run", "running"]

NODE_MODULES: Final = Path(__file__).parent / "node_modules"
CHAIN_ID: Final = NETWORKS["base-sepolia"].chain_id
TOKEN: Final = NETWORKS["base-sepolia"].usdc.address
_MINED_S: Final = 5
HOLDER_UNITS: Final = 1_000_000 * 10**6  # 1,000,000 USDC each
_TEST_CHAIN_IDS: Final = frozenset(
    {row.chain_id for row in NETWORKS.values() if row.testnet} | {1337, 31337}
)
_OURS: Final = (
    "--chain-id",
    "--port",
    "-p",
    "--host",
    "--accounts",
    "-a",
    "--config-out",
    "--cache-path",
    "--max-persisted-states",
)


@dataclass(frozen=True, slots=True)
class Account:
    """A funded account of the chain. Anvil's well-known keys: worthless anywhere else."""

    address: str  # lower case
    private_key: str = field(repr=False)  # "0x" and 64 hex digits
    usdc_units: int  # at the start


@dataclass(frozen=True, slots=True)
class Options:
    """What can be chosen about a chain.

    ``block_time_s``: a block every so many seconds instead of one per transaction.
    ``mining=False``: blocks only on demand (``Devnet.mine``). ``slots_in_an_epoch``: small
    numbers bring the safe and finalized tags near. ``extra``: further arguments for anvil.
    """

    chain_id: int = CHAIN_ID
    holders: int = 10
    holder_units: int = HOLDER_UNITS
    block_time_s: int | None = None
    mining: bool = True
    slots_in_an_epoch: int | None = None
    extra: Sequence[str] = ()
    node_modules: Path = NODE_MODULES


@dataclass(frozen=True, slots=True)
class Devnet:
    """A running chain. The methods block and are meant for set-up and for playing tricks."""

    port: int
    pid: int
    chain_id: int
    usdc: str
    accounts: tuple[Account, ...]
    settler: Account  # has ETH only: the gateway's gas account
    operator: Account  # owner, minter, pauser and blacklister of USDC

    @property
    def rpc_url(self) -> str:
        """Where JSON-RPC is served."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def caip2(self) -> str:
        """The chain's CAIP-2 id."""
        return f"eip155:{self.chain_id}"

    def public(self) -> dict[str, Any]:
        """What ``farebox devnet`` prints; addresses in their mixed-case form."""
        return {
            "rpc_url": self.rpc_url,
            "chain_id": self.chain_id,
            "caip2": self.caip2,
            "usdc": checksum(self.usdc),
            "accounts": [
                {
                    "address": checksum(account.address),
                    "private_key": account.private_key,
                    "usdc_units": account.usdc_units,
                }
                for account in self.accounts
            ],
            "settler": {
                "address": checksum(self.settler.address),
                "private_key": self.settler.private_key,
            },
        }

    def rpc(self, method: str, *params: Any) -> Any:
        """One JSON-RPC call, blocking. ``DevnetError`` carries the node's message."""
        return _ask(self.port, method, *params)

    def mine(self, blocks: int = 1) -> None:
        """Make blocks now."""
        self.rpc("anvil_mine", hex(blocks))

    def send(self, sender: str, to: str | None, data: str) -> str:
        """Have the chain sign and send for one of its accounts; the transaction's hash.

        ``to`` None deploys a contract. Returns when it is in a block, or, where there is no block
        for every transaction, when it is in the pool. A transaction that fails is included too.
        """
        tx = {"from": sender, "data": data} | ({"to": to} if to is not None else {})
        tx_hash: str = self.rpc("eth_sendTransaction", tx)
        if self.rpc("anvil_getAutomine"):
            self.receipt(tx_hash)
        return tx_hash

    def receipt(self, tx_hash: str) -> dict[str, Any]:
        """The receipt of a transaction that is being mined: it can lag a moment behind."""
        deadline = time.monotonic() + _MINED_S
        while time.monotonic() < deadline:
            found: dict[str, Any] | None = self.rpc("eth_getTransactionReceipt", tx_hash)
            if found is not None:
                return found
            time.sleep(0.002)
        raise DevnetError(f"{tx_hash} is in no block after {_MINED_S} s")

    def _operate(self, data: str) -> None:
        """Use one of the token's roles. ``DevnetError`` if the token refuses."""
        call = {"from": self.operator.address, "to": self.usdc, "data": data}
        self.rpc("eth_call", call, "pending")
        self.send(self.operator.address, self.usdc, data)

    def pause(self, paused: bool = True) -> None:
        """Pause USDC, or let it go on."""
        self._operate(usdc.pause_call(paused))

    def blacklist(self, address: str, listed: bool = True) -> None:
        """Put an address on USDC's blacklist, or take it off."""
        self._operate(usdc.blacklist_call(address, listed))

    def mint(self, to: str, units: int) -> None:
        """Make new USDC."""
        self._operate(usdc.mint_call(to, units))

    def transfer(self, sender: str, to: str, units: int) -> str:
        """A plain transfer of USDC by one of the chain's accounts; the transaction's hash."""
        return self.send(sender, self.usdc, usdc.transfer_call(to, units))

    def balance_units(self, address: str) -> int:
        """The USDC an address holds."""
        call = {"to": self.usdc, "data": usdc.balance_call(address)}
        return int(self.rpc("eth_call", call, "latest"), 16)


def _launch(port: int, options: Options) -> tuple[AnvilProcess, usdc.Code]:
    if options.chain_id not in _TEST_CHAIN_IDS:
        raise DevnetError(
            f"chain id {options.chain_id} is not a test network's: a payment signed here would "
            f"be good there; use one of {', '.join(map(str, sorted(_TEST_CHAIN_IDS)))}"
        )
    for argument in options.extra:
        if argument.split("=")[0] in _OURS:
            raise DevnetError(f"{argument.split('=')[0]} cannot be given to anvil here")
    code = usdc.load_code(options.node_modules)
    binary = find_binary(options.node_modules)
    arguments = ["--chain-id", str(options.chain_id), "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--accounts", str(options.holders + 2)]
    if options.slots_in_an_epoch is not None:
        arguments += ["--slots-in-an-epoch", str(options.slots_in_an_epoch)]
    return spawn(binary, [*arguments, *options.extra]), code


def _prepare(process: AnvilProcess, code: usdc.Code, port: int, options: Options) -> Devnet:
    """Wait until the chain answers, then furnish it. Blocks for a few tenths of a second."""
    try:
        listening = wait_listening(process)
    except DevnetError as error:
        if "Address already in use" in str(error):
            raise DevnetError(f"port {port} is in use: choose another one, or 0") from None
        raise
    told = json_lib.loads(process.config.read_text())
    process.forget_files()  # nobody could remove them after a SIGKILL of ours
    keys = zip(told["available_accounts"], told["private_keys"], strict=True)
    everyone = [
        Account(address.lower(), key, options.holder_units if n < options.holders else 0)
        for n, (address, key) in enumerate(keys)
    ]
    *holders, settler, operator = everyone
    net = Devnet(
        listening, process.child.pid, options.chain_id, TOKEN, tuple(holders), settler, operator
    )
    net.rpc("anvil_setLoggingEnabled", False)  # a line per call would fill the disk in the end
    usdc.plant(
        net.rpc,
        code,
        TOKEN,
        operator=operator.address,
        holders=[holder.address for holder in holders],
        units=options.holder_units,
    )
    if options.block_time_s is not None:
        net.rpc("evm_setIntervalMining", options.block_time_s)
    elif not options.mining:
        net.rpc("evm_setAutomine", False)
    return net


@contextmanager
def running(port: int = 0, options: Options | None = None) -> Iterator[Devnet]:
    """A chain for the length of a ``with`` block. Port 0 takes a free one. ``DevnetError``."""
    options = options or Options()
    process, code = _launch(port, options)
    try:
        yield _prepare(process, code, port, options)
    finally:
        stop(process)


@asynccontextmanager
async def devnet(port: int = 0, options: Options | None = None) -> AsyncIterator[Devnet]:
    """The same for ``async with``. The chain lives no longer than the calling thread."""
    options = options or Options()
    process, code = _launch(port, options)
    try:
        yield await asyncio.to_thread(_prepare, process, code, port, options)
    finally:
        # Not in a thread: this must run to its end also while the loop is being cancelled.
        stop(process)


def run(port: int = 0, json: bool = False, options: Options | None = None) -> None:
    """Serve a chain until SIGINT or SIGTERM: the whole of ``farebox devnet``.

    Prints one JSON line (``json``) or a few lines for a person. ``DevnetError`` if the chain
    cannot be started or stops by itself.
    """

    def end(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    process: AnvilProcess | None = None
    try:
        chosen = options or Options()
        process, code = _launch(port, chosen)
        net = _prepare(process, code, port, chosen)
        text = json_lib.dumps(net.public()) if json else _for_people(net)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        status = process.child.wait()
        raise DevnetError(f"anvil stopped by itself (status {status})")
    except KeyboardInterrupt:
        return
    finally:
        for number in before:  # a second signal must not interrupt the tidying up
            signal.signal(number, signal.SIG_IGN)
        if process is not None:
            stop(process)
        for number, handler in before.items():
            signal.signal(number, handler)


def _for_people(net: Devnet) -> str:
    lines = [
        f"Anvil      {net.rpc_url}   chain id {net.chain_id}, USDC {checksum(net.usdc)}",
        f"settler    {checksum(net.settler.address)}   {net.settler.private_key}",
        *(
            f"account {n}  {checksum(a.address)}   {a.private_key}   {a.usdc_units // 10**6:,} USDC"
            for n, a in enumerate(net.accounts)
        ),
        "Well-known keys of a local chain: never use them anywhere else. Ctrl-C stops it.",
    ]
    return "\n".join(lines)


def _ask(port: int, method: str, *params: Any) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        body = json_lib.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
        connection.request("POST", "/", body, {"Content-Type": "application/json"})
        answer = json_lib.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DevnetError(f"the local chain does not answer {method}: {error}") from None
    finally:
        connection.close()
    if "error" in answer:
        raise DevnetError(f"{method}: {answer['error'].get('message')}")
    return answer["result"]
