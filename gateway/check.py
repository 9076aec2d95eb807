"""``farebox check``: is the configuration true, and what does it mean.

Reaches everything the configuration names, changes nothing. Each finding is ``ok``, ``warn``
(worth a look) or ``fail`` (this deployment cannot work like this).
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal
from urllib.parse import urlsplit

from gateway.errors import Problem
from gateway.money import format_usd
from gateway.price_table import table
from gateway.sections import Section
from gateway.settings import NO_EFFECT, Chain, Settings, Upstream

if TYPE_CHECKING:
    from chain.rpc import Rpc

State = Literal["ok", "warn", "fail"]
CONNECT_S: Final = 5
GAS_FLOOR_WEI: Final = 10**14
"""Below this much of the gas coin a settler is as good as empty: some tens of settlements."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    text: str

    def members(self) -> dict[str, str]:
        """As a JSON object."""
        return {"check": self.name, "state": self.state, "text": self.text}


def judge(upstream: Upstream) -> Iterator[tuple[str, str]]:
    """Faults of an upstream's prices and patterns, for ``gateway.config.load``."""
    from gateway.pricing.rules import compile_price
    from gateway.proxy.patterns import compile_pattern
    from gateway.proxy.routes_table import NEVER_FORWARDED

    for i, route in enumerate(upstream.routes):
        try:
            compile_price(route.price)
        except ValueError as error:
            yield f"routes[{i}].price", f"is wrong: {error}"
        try:
            compile_pattern(route.path)
        except ValueError as error:
            yield f"routes[{i}].match", f"is wrong: {error}"
        if route.method in NEVER_FORWARDED:
            yield f"routes[{i}].match", f"is {route.method}, which is never forwarded"
    for name, price in upstream.tools:
        try:
            compile_price(price)
        except ValueError as error:
            yield f"tools.{name}", f"is wrong: {error}"


def run(settings: Settings, target: str | None) -> list[Finding]:
    """Look at everything; with ``target`` ("GET /path") also at that request's route and price."""

    async def gather() -> list[Finding]:
        return [finding async for finding in _findings(settings, target)]

    return asyncio.run(gather())


async def _findings(settings: Settings, target: str | None) -> AsyncIterator[Finding]:
    yield Finding("config", "ok", str(settings.source or "from the command line"))
    for key in without_effect(settings):
        yield Finding("config", "warn", f"{key} is set and has no effect in this version")
    for finding in _routes(settings, target):
        yield finding
    yield await _database(settings)
    yield await _redis(settings)
    libraries = _libraries(settings)
    yield libraries
    # What hashes or signs wrongly asks wrongly too: more faults would only hide the one.
    for chain in settings.chains if libraries.state == "ok" else ():
        async for finding in _chain(settings, chain):
            yield finding
    for upstream in settings.upstreams:
        yield await _upstream(upstream)
    if not settings.stripe.enabled:
        yield Finding("stripe", "ok", "off: no cards")


def without_effect(settings: Settings) -> Iterator[str]:
    """The keys that are set although nothing follows from them yet."""
    sections: list[tuple[str, Section]] = [("server", settings.server)]
    sections += [(f"chains.{chain.name}", chain) for chain in settings.chains]
    for where, section in sections:
        for name, field in type(section).model_fields.items():
            if (type(section).__name__, name) in NO_EFFECT and name in section.model_fields_set:
                value = getattr(section, name)
                # A path is made absolute, which counts as setting it.
                if (value.name if isinstance(value, Path) else value) != _plain(field.default):
                    yield f"{where}.{field.alias or name}"


def _plain(default: object) -> object:
    return default.name if isinstance(default, Path) else default


def _routes(settings: Settings, target: str | None) -> Iterator[Finding]:
    from gateway.proxy.routes_table import compile_routes

    compiled = compile_routes(settings.upstreams)
    warnings = compiled.warnings()
    for text in warnings:
        yield Finding("routes", "warn", text)
    if not warnings:
        yield Finding("routes", "ok", f"{len(table(settings, 0))} prices")
    if target is not None:
        yield _price_of(settings, target)


def _price_of(settings: Settings, target: str) -> Finding:
    """Which route takes a request, and what it costs."""
    from gateway.proxy.routes_table import MethodNotAllowed, Route, compile_routes
    from gateway.proxy.target import parse

    method, _, path = target.strip().rpartition(" ")
    method = method.strip().upper() or "GET"
    if "://" in path:
        split = urlsplit(path)
        path = split.path + (f"?{split.query}" if split.query else "")
    name = f"{method} {path}"
    try:
        found = compile_routes(settings.upstreams).match(method, parse(path.encode()).decoded)
    except Problem as problem:
        return Finding(name, "fail", f"is refused: {problem.detail}")
    if found is None:
        return Finding(name, "fail", "no route: it would be answered with 404")
    if isinstance(found, MethodNotAllowed):
        return Finding(name, "fail", f"405: this path takes {', '.join(found.allow)}")
    if isinstance(found, Route):
        terms = found.price.describe()
        return Finding(name, "ok", f"{found.id}: {terms.get('price', terms)}")
    return Finding(name, "ok", f"MCP server {found.upstream}: priced by tool")


async def _database(settings: Settings) -> Finding:
    from gateway.db import Database, DatabaseUnavailable
    from gateway.migrations.run import HEAD, current_revision

    kind = "PostgreSQL" if settings.server.on_postgres else "SQLite"
    try:
        db = await Database.connect(settings.server.database)
    except DatabaseUnavailable as error:
        return Finding("database", "fail", f"{kind}: {error}")
    try:
        revision = await current_revision(db)
    finally:
        await db.close()
    if revision is None:
        return Finding("database", "ok", f"{kind}, empty: `farebox serve` makes the tables")
    if revision != HEAD:
        return Finding("database", "warn", f"{kind}, schema {revision}; this release has {HEAD}")
    return Finding("database", "ok", f"{kind}, schema {revision}")


async def _redis(settings: Settings) -> Finding:
    """Never a failure: without it every process counts for itself."""
    from gateway import cache

    found = cache.connect(settings.server.redis, deadline_ms=2_000)
    if found is None:
        return Finding("redis", "ok", "off: limits are counted in each process")
    try:
        answers = await found.ping()
    finally:
        await found.close()
    if not answers:
        return Finding("redis", "warn", f"{found.why}; limits are counted in each process")
    if not settings.server.on_postgres:
        return Finding("redis", "warn", "not used: with SQLite only one process serves")
    return Finding("redis", "ok", "answers; limits are shared")


_LIBRARIES: Final = "libraries"


def library_that_fails_to_load() -> Finding | None:
    """A native library that is missing or broken; None if all are there."""
    try:
        importlib.import_module("chain.second_opinion")
    except ImportError as error:
        return _broken_library(f"a library cannot be loaded: {error}")
    return None


def _broken_library(fault: str) -> Finding:
    advice = "Install Farebox anew, and serve nothing from this one"
    return Finding(_LIBRARIES, "fail", f"{fault}. {advice}")


def _libraries(settings: Settings) -> Finding:
    """Whether hashes, signatures and transactions come out as web3 and eth_account make them."""
    from chain.second_opinion import library_fault

    fault = library_fault(
        [(c.network, asset) for c in settings.chains for asset in c.network.assets]
    )
    if fault is not None:
        return _broken_library(fault)
    return Finding(_LIBRARIES, "ok", "hashes and signatures are those of web3 and eth_account")


async def _chain(settings: Settings, chain: Chain) -> AsyncIterator[Finding]:
    from chain.errors import ChainError
    from chain.rpc import Rpc
    from chain.tokens import read_standing, read_token, standing_faults, token_faults

    name = f"chain {chain.name}"
    rpc = Rpc(chain.network, chain.rpc, timeout_s=chain.rpc_timeout_s)
    try:
        await rpc.check_chain_id()
        block = await rpc.block_number()
        yield Finding(name, "ok", f"{chain.caip2}, block {block}")
        for asset in chain.network.assets:
            token = await read_token(rpc, asset)
            standing = await read_standing(rpc, asset, chain.pay_to)
            faults = token_faults(chain.network, asset, token)
            faults += standing_faults(chain.network, asset, chain.pay_to, standing)
            for fault in faults:
                yield Finding(name, "fail", fault)
            if not faults:
                said = f'{asset.symbol} at {asset.address}: "{token.name}" version {token.version}'
                yield Finding(name, "ok", said)
        async for finding in _providers(chain, rpc):
            yield finding
        async for finding in _past(settings, chain, rpc):
            yield finding
        async for finding in _settlers(chain, rpc):
            yield finding
        yield await _worth(chain, rpc)
        yield await _batching(chain, rpc)
        if chain.permit2:
            yield await _permit2(chain, rpc)
        if settings.takes_upto and chain.settler_key is not None:
            yield await _upto(chain, rpc)
        if chain.facilitator:
            yield await _facilitator(chain)
        async for finding in _second_opinion(chain, rpc):
            yield finding
    except ChainError as error:
        yield Finding(name, "fail", f"{error.code}: {error.detail}")
    finally:
        await rpc.close()


async def _facilitator(chain: Chain) -> Finding:
    """Whether somebody else's facilitator would be asked. Without it payments are settled here."""
    from gateway.payments import remote

    name = f"chain {chain.name}"
    if await remote.settles_here(chain):
        return Finding(name, "ok", f"the facilitator says that it settles on {chain.caip2}")
    said = f"the facilitator does not say that it settles on {chain.caip2}: it is passed over"
    return Finding(name, "warn", said)


async def _past(settings: Settings, chain: Chain, rpc: Rpc) -> AsyncIterator[Finding]:
    """Whether money came to ``pay_to`` before this ledger: then somebody else may count it too."""
    from chain.eth import selector
    from gateway.db import Database
    from gateway.migrations.run import HEAD, current_revision
    from gateway.payments.watcher import watched
    from wallet_auth.keys import address_word

    db = await Database.connect(settings.server.database)
    try:
        for asset in chain.network.assets:
            data = selector("balanceOf(address)") + address_word(chain.pay_to)
            units = int.from_bytes(await rpc.eth_call(asset.address, data), "big")
            known = None
            if units and await current_revision(db) == HEAD:
                async with db.read() as tx:
                    known = await watched(tx, chain, asset)
            if units and known is None:
                text = f"it holds {units / 10**6:.2f} {asset.symbol} that came before these books"
                ask = "must be this ledger's alone: does anything else count what arrives there?"
                yield Finding(f"pay_to {chain.name}", "warn", f"{text}; {ask}")
    finally:
        await db.close()


async def _providers(chain: Chain, rpc: Rpc) -> AsyncIterator[Finding]:
    """Whether the nodes tell the same chain, and can say when a mint is safe."""
    from chain.blocks import points
    from chain.survey import survey
    from gateway.payments.confirm import trusted

    name = f"providers {chain.name}"
    faults = []
    if len(chain.rpc) == 1:
        faults.append(
            "only one is named: what is above mint_at.instant_limit waits for a safe block, and is "
            "minted by its word alone"
        )
    if (await points(rpc, trusted(chain))).safe < 0:
        faults.append("no block is safe by this one: give mint_at.otherwise a number of blocks")
    for view in await survey(rpc, int(time.time())):
        if view.fault is not None:
            faults.append(f"{view.label}: {view.fault} {view.detail}")
    for text in faults:
        yield Finding(name, "warn", text)
    if not faults:
        yield Finding(name, "ok", f"{len(chain.rpc)} tell the same chain")


async def _settlers(chain: Chain, rpc: Rpc) -> AsyncIterator[Finding]:
    """Whether settlements can be paid for: by every gas account."""
    from wallet_auth.keys import checksum

    name = f"settler {chain.name}"
    senders = _settler_addresses(chain)
    if not senders:
        yield Finding(
            name, "fail", f"chains.{chain.name}.settler_key_file is missing: nothing can be settled"
        )
    for sender in senders:
        wei = rpc.quantity(await rpc.call("eth_getBalance", [sender, "latest"]))
        text = f"{checksum(sender)} has {wei // 10**12 / 10**6:f} of the gas coin"
        yield Finding(name, "ok" if wei >= GAS_FLOOR_WEI else "fail", text)


async def _worth(chain: Chain, rpc: Rpc) -> Finding:
    """Whether the smallest payment is worth its gas, at the price of now."""
    from chain import rollup
    from chain.errors import Unavailable
    from chain.sender import market
    from gateway.payments import worth

    byte_wei, asides = 0, []
    try:
        byte_wei = await rollup.byte_wei(rpc)
    except Unavailable as error:
        asides.append(f"; without its data on L1: {error.detail}")
    gwei = worth.settlement_gwei(await market(rpc, chain.pay_to), byte_wei)
    text = f"a settlement costs {gwei} gwei now"
    cost, least = worth.cost_units(chain, gwei), worth.floor_units(chain, gwei)
    if cost is None:
        asides.append("; set native_usd, so that no offer is below three times that")
    else:
        text += f", {format_usd(cost)}; min_onchain is {format_usd(chain.min_onchain_units)}"
    state: State = "warn" if asides and not chain.network.testnet else "ok"
    if least > chain.min_onchain_units:
        text, state = f"{text} and should be at least three times that", "fail"
    return Finding(f"gas price {chain.name}", state, text + "".join(asides))


async def _batching(chain: Chain, rpc: Rpc) -> Finding:
    """Whether several payments can go in one transaction."""
    from chain.multicall import ADDRESS

    name = f"batches {chain.name}"
    if chain.settle_batch == 1:
        return Finding(name, "ok", "payments are settled one by one (settle_batch = 1)")
    if await rpc.code(ADDRESS):
        return Finding(name, "ok", f"up to {chain.settle_batch} payments in one transaction")
    return Finding(name, "warn", f"no Multicall3 at {ADDRESS}: payments are settled one by one")


async def _permit2(chain: Chain, rpc: Rpc) -> Finding:
    """Whether what payments by Permit2 are settled through is there."""
    from chain.schemes.permit2 import EXACT_PROXY, PERMIT2

    name = f"permit2 {chain.name}"
    for what, address in (("Permit2", PERMIT2), ("x402's proxy", EXACT_PROXY)):
        if not await rpc.code(address):
            return Finding(name, "fail", f"permit2 = true, and there is no {what} at {address}")
    if chain.eip2612:
        from chain.errors import Reverted
        from chain.schemes.eip2612 import NONCES
        from wallet_auth.keys import address_word

        usdc = chain.network.usdc
        try:
            await rpc.eth_call(usdc.address, NONCES + address_word(chain.pay_to))
        except Reverted:
            return Finding(name, "fail", f"eip2612 = true, and {usdc.symbol} takes no permits")
    return Finding(name, "ok", "Permit2 and x402's proxy are deployed")


async def _upto(chain: Chain, rpc: Rpc) -> Finding:
    """The same for routes that are paid by upto."""
    from chain.schemes import permit2, upto

    name = f"upto {chain.name}"
    for what, address in (("Permit2", permit2.PERMIT2), ("x402's proxy for it", upto.PROXY)):
        if not await rpc.code(address):
            return Finding(name, "fail", f"a route has upto, and there is no {what} at {address}")
    return Finding(name, "ok", "Permit2 and x402's proxy for upto are deployed")


def _settler_addresses(chain: Chain) -> list[str]:
    from gateway.payments.gas import accounts

    return [account.address for account in accounts(chain)]


async def _second_opinion(chain: Chain, rpc: Rpc) -> AsyncIterator[Finding]:
    """Whether web3 is told the same as our own client, by every URL of the chain."""
    from chain.errors import Unavailable
    from chain.second_opinion import differences

    name = f"web3 {chain.name}"
    settler = next(iter(_settler_addresses(chain)), None)
    for url in chain.rpc:
        for asset in chain.network.assets:
            try:
                found = await differences(rpc, url, asset, pay_to=chain.pay_to, settler=settler)
            except Unavailable as error:
                yield Finding(name, "warn", f"nothing to compare: {error.detail}")
                continue
            for text in found:
                yield Finding(name, "fail", text)
            if not found:
                host = urlsplit(url).netloc.rpartition("@")[2]
                yield Finding(name, "ok", f"{host} tells web3 the same about {asset.symbol}")


async def _upstream(upstream: Upstream) -> Finding:
    """Whether something listens there. Nothing is asked of it: a call may cost somebody."""
    parts = urlsplit(upstream.url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    name = f"upstream {upstream.name}"
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(parts.hostname, port)
    except (OSError, TimeoutError) as error:
        return Finding(name, "warn", f"{upstream.url} cannot be reached now: {error or 'timeout'}")
    writer.close()
    return Finding(name, "ok", upstream.url)
