"""Rules between the keys of the configuration, and what one key takes from another.

A rule yields the keys it speaks about, so that it can stay silent when one of them is already
known to be wrong; its text continues the first key to a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from pydantic import BaseModel, Field, ValidationError

from chain.networks import NETWORKS, Asset, Finality, Network
from gateway import forms
from gateway.money import format_usd
from gateway.sections import Section
from gateway.settings import Chain, Credits, Server, Stripe, Upstream

RESERVED: Final = (
    "/farebox",
    "/.well-known/x402",
    "/healthz",
    "/readyz",
    "/metrics",
    "/api/external",
)
"""The gateway's own paths: what is one of these or lies under one never reaches an upstream."""
CLIENT_CAP_UNITS: Final = 1_000_000
"""Stock x402 clients refuse more than $1 in one payment unless they are told otherwise."""

Rule = tuple[tuple[str, ...], str]


@dataclass(frozen=True, slots=True)
class Parts:
    """The sections as far as they could be read."""

    server: Server | None
    credits: Credits | None
    chains: tuple[Chain, ...]
    stripe: Stripe | None
    upstreams: tuple[Upstream, ...]
    base: Path
    """Relative paths count from here."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a key below the one being read."""

    key: str
    text: str


def faults(parts: Parts, left_out: frozenset[str]) -> Iterator[Rule]:
    """Every rule that does not hold. ``left_out``: tables the configuration does not have."""
    if parts.server is not None:
        yield from _server(parts.server)
        yield from _admin(parts.server, parts.base / parts.server.admin_token_file)
    if parts.stripe is not None:
        yield from _stripe(parts.stripe)
        if "chains" in left_out and not parts.stripe.enabled:
            yield (
                ("chains", "stripe.secret_key"),
                "is missing: there is no way to pay; add [chains.base-sepolia] or [stripe]",
            )
    if "upstreams" in left_out:
        yield ("upstreams",), "is missing: there is nothing to sell; add [upstreams.NAME]"
    yield from _chains(parts.chains, parts.credits)
    yield from _upstreams(parts.upstreams, parts.server)


def _server(server: Server) -> Iterator[Rule]:
    lacking = [] if server.on_postgres else ["PostgreSQL (server.database)"]
    lacking += [] if server.redis else ["Redis (server.redis)"]
    if server.workers > 1 and lacking:
        yield (
            ("server.workers", "server.database", "server.redis"),
            f"is {server.workers}, which needs {' and '.join(lacking)}",
        )
    if not server.public_url and not server.listen.loopback:
        yield (
            ("server.public_url", "server.listen"),
            "is missing: give the origin clients use, as server.listen is open to the network",
        )
    elif not server.public_url and server.listen.port == 0:
        yield (
            ("server.public_url", "server.listen"),
            "is missing: with port 0 in server.listen it cannot be known",
        )
    if server.admin_listen == server.listen and server.listen.port:
        yield (
            ("server.admin_listen", "server.listen"),
            "is the same as server.listen: admin pages and metrics need their own port",
        )
    if server.pages_url and server.pages_url == server.public_url:
        yield (
            ("server.pages_url", "server.public_url"),
            "is the same as server.public_url: pages need an origin no upstream shares",
        )


def _admin(server: Server, file: Path) -> Iterator[Rule]:
    keys = ("server.admin_token_file", "server.admin_listen")
    try:
        token = file.read_bytes().strip()
    except FileNotFoundError:
        if server.admin_listen is not None and not server.admin_listen.loopback:
            yield keys, "is missing, and server.admin_listen is open to the network"
        return
    except OSError as error:
        yield keys, f"cannot be read: {file}: {error.strerror}"
        return
    if not re.fullmatch(rb"[!-~]{24,200}", token):
        yield keys, "should hold 24 to 200 characters without spaces; take them at random"


def _stripe(stripe: Stripe) -> Iterator[Rule]:
    if stripe.secret_key is not None and stripe.webhook_secret is None:
        yield (
            ("stripe.webhook_secret", "stripe.secret_key"),
            "is missing: without it no card payment can be believed",
        )
    if stripe.secret_key is None and stripe.webhook_secret is not None:
        yield ("stripe.secret_key", "stripe.webhook_secret"), "is missing beside webhook_secret"
    key = stripe.secret_key.get_secret_value() if stripe.secret_key else ""
    if stripe.api_base and key.startswith(("sk_live_", "rk_live_")):
        yield (
            ("stripe.api_base", "stripe.secret_key"),
            "is for tests only and is refused together with a live key",
        )


def _chains(chains: tuple[Chain, ...], credit: Credits | None) -> Iterator[Rule]:
    seen: dict[str, str] = {}
    for chain in chains:
        where = f"chains.{chain.name}"
        if chain.caip2 in seen:
            yield (
                (where, f"chains.{seen[chain.caip2]}"),
                f"is the same network as chains.{seen[chain.caip2]}",
            )
        seen[chain.caip2] = chain.name
        if chain.refund_key is not None and chain.settler_key is None:
            yield (
                (f"{where}.refund_key", f"{where}.settler_key"),
                "needs settler_key beside it, which pays the gas of refunds",
            )
        if chain.eip2612 and not chain.permit2:
            yield (
                (f"{where}.eip2612", f"{where}.permit2"),
                "needs permit2 = true: it is for payments by Permit2",
            )
        if chain.min_onchain_units > CLIENT_CAP_UNITS:
            yield (
                (f"{where}.min_onchain", "credits.min_onchain"),
                "should be at most $1: stock x402 clients refuse more in one payment",
            )
        elif credit and credit.packs_units[0] < chain.min_onchain_units:
            yield (
                ("credits.packs", "credits.min_onchain", f"{where}.min_onchain"),
                f"names a pack of {format_usd(credit.packs_units[0])}, less than the smallest "
                f"settlement on {chain.name}, {format_usd(chain.min_onchain_units)}",
            )


def _upstreams(upstreams: tuple[Upstream, ...], server: Server | None) -> Iterator[Rule]:
    mounts: dict[str, str] = {}
    for upstream in upstreams:
        where = f"upstreams.{upstream.name}"
        if upstream.mount in mounts:
            yield (
                (f"{where}.mount", f"upstreams.{mounts[upstream.mount]}.mount"),
                f"is also the mount of upstreams.{mounts[upstream.mount]}",
            )
        mounts[upstream.mount] = upstream.name
        if is_reserved(upstream.mount):
            yield (f"{where}.mount",), f"is {upstream.mount}, which belongs to Farebox itself"
        if server and server.public_url and upstream.url == server.public_url:
            yield (
                (f"{where}.url", "server.public_url"),
                "is server.public_url: the gateway would call itself",
            )
        if upstream.kind == "http":
            if upstream.tools:
                yield (f"{where}.tools", f"{where}.kind"), 'is for kind = "mcp"'
            if not upstream.routes:
                yield (f"{where}.routes",), "is missing: nothing of it can be called"
        elif not upstream.tools and not upstream.routes:
            yield (f"{where}.tools",), 'is missing: name prices, such as { "*" = "$0.001" }'
        yield from _routes(upstream, where)


def _routes(upstream: Upstream, where: str) -> Iterator[Rule]:
    seen: dict[str, int] = {}
    for i, route in enumerate(upstream.routes):
        if route.match in seen:
            yield (f"{where}.routes[{i}].match",), f"repeats routes[{seen[route.match]}]"
        seen[route.match] = i
        if is_reserved(upstream.mount.rstrip("/") + route.path):
            yield (
                (f"{where}.routes[{i}].match", f"{where}.mount"),
                "is a path that belongs to Farebox itself",
            )
        if route.amount_from == "upstream" and route.price.rule in ("free", "flat"):
            yield (
                (f"{where}.routes[{i}].amount_from", f"{where}.routes[{i}].price"),
                'is "upstream", which needs a metered price with a max',
            )


def is_reserved(path: str) -> bool:
    """True if ``path`` is one of Farebox's own, or lies under one."""
    return any(path == own or path.startswith(f"{own}/") for own in RESERVED)


def complete_server(server: Server, base: Path) -> Server:
    """The values that follow from others: the public URL, and paths made absolute."""
    changes: dict[str, Any] = {"admin_token_file": base / server.admin_token_file}
    if not server.public_url:
        changes["public_url"] = forms.origin(f"http://{server.listen}")
    if not server.on_postgres:
        changes["database"] = f"sqlite:///{base / server.database.removeprefix('sqlite:///')}"
    return server.model_copy(update=changes)


def inherited_min_onchain(credit: Credits) -> str:
    """``min_onchain`` of a chain that does not give its own."""
    return format_usd(credit.min_onchain_units)


def model_at(model: type[Section], place: tuple[int | str, ...]) -> type[Section]:
    """The section model a location inside ``model`` belongs to, for naming the nearest key."""
    for part in place:
        field = next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        inner = None if field is None else _section_in(field.annotation)
        model = inner or model
    return model


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation if issubclass(annotation, Section) else None
    found = (_section_in(part) for part in get_args(annotation))
    return next((one for one in found if one is not None), None)


# --- networks -------------------------------------------------------------------------------


def network_of(name: str, assets: object) -> Network | Fault:
    """The network of ``[chains.NAME]``: a row of the table, or a CAIP-2 id with its assets."""
    known = NETWORKS.get(name) or next((n for n in NETWORKS.values() if n.caip2 == name), None)
    if known is not None:
        if assets is not None:
            return Fault(".assets", "is for networks Farebox does not know; leave it out")
        return known
    found = re.fullmatch(r"eip155:([1-9][0-9]{0,14})", name)
    if found is None:
        import difflib

        close = difflib.get_close_matches(name, list(NETWORKS), n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        return Fault(
            "", f"is not a network Farebox knows{hint} (others: eip155:<chain id> with assets)"
        )
    if assets is None:
        return Fault(
            ".assets",
            "is missing: [{ address, symbol, decimals, eip712_name, eip712_version }]",
        )
    return _spelled_out(name, int(found.group(1)), assets)


class _AssetKeys(Section):
    """One entry of ``assets`` of a network spelled out in the config."""

    address: forms.Address
    symbol: str = Field(min_length=1, max_length=20)
    decimals: forms.Count
    eip712_name: str = Field(min_length=1, max_length=100)
    eip712_version: str = Field(min_length=1, max_length=20)


def _spelled_out(name: str, chain_id: int, assets: object) -> Network | Fault:
    """A network that is not in the table. Its assets must be six-decimals dollars like USDC."""
    if not isinstance(assets, list) or not assets:
        return Fault(".assets", "should be a list of tables, one for each token")
    rows: list[Asset] = []
    for i, item in enumerate(assets):
        try:
            keys = _AssetKeys.model_validate(item)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            at = "".join(f".{part}" for part in first["loc"])
            return Fault(f".assets[{i}]{at}", first["msg"].removeprefix("Value error, "))
        if keys.decimals != 6:
            return Fault(f".assets[{i}].decimals", "should be 6: one unit is one micro-USD")
        rows.append(Asset(**keys.model_dump()))
    return Network(
        name=name,
        caip2=name,
        chain_id=chain_id,
        v1_name=None,
        testnet=False,
        assets=tuple(rows),
        explorer_tx="",
        finality=Finality("safe", "finalized", 2_000),
    )
