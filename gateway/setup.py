"""``farebox init``: a first configuration from a few questions, and the settler's key."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

import click

from gateway import forms


def settler_key(path: Path) -> str | None:
    """Make a private key in ``path`` unless the file is there; the checksummed address if made.

    The file is readable by its owner alone.
    """
    from wallet_auth.keys import address_of, checksum, private_key

    key = "0x" + secrets.token_hex(32)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(key + "\n")
    return checksum(address_of(private_key(key)))


def ask(path: Path) -> list[Path]:
    """Ask, and write ``path`` and the key file beside it. Returns what was written."""
    from chain.networks import NETWORKS

    click.echo("A few questions; Enter takes the value in brackets.", err=True)
    upstream = _question("What do you sell? URL of the HTTP API or MCP server", forms.base_url)
    kind = _choice("Is it an HTTP API or an MCP server", ["http", "mcp"], "http")
    what = "tool call" if kind == "mcp" else "call"
    price = _question(f"Price of a {what}", _price, "$0.01")
    network = _choice("Network you are paid on", list(NETWORKS), "base-sepolia")
    pay_to = _question("Address that is paid (used for nothing else)", forms.address)
    rpc = _question("JSON-RPC node of that network", forms.rpc_url, "http://127.0.0.1:8545")
    public = _question("Origin clients will use", forms.origin, "http://127.0.0.1:8402")
    text = _toml(
        upstream=upstream,
        kind=kind,
        price=price,
        network=network,
        pay_to=pay_to,
        rpc=rpc,
        public=public,
    )
    path.write_text(text, encoding="utf-8")
    key_file = path.parent / "settler.key"
    address = settler_key(key_file)
    if address is None:
        return [path]
    click.echo(f"The settler pays the gas of settlements: send some to {address}", err=True)
    return [path, key_file]


def _price(text: object) -> str:
    forms.price(text)
    return str(text)


def _question(text: str, form: Any, default: str | None = None) -> str:
    """Ask until the answer has the right form."""

    def parse(answer: str) -> str:
        try:
            return str(form(answer.strip()))
        except ValueError as error:
            raise click.BadParameter(f"{answer!r} {error}") from None

    return str(click.prompt(text, default=default, value_proc=parse, err=True))


def _choice(text: str, values: list[str], default: str) -> str:
    return str(click.prompt(text, type=click.Choice(values), default=default, err=True))


def _toml(
    *, upstream: str, kind: str, price: str, network: str, pay_to: str, rpc: str, public: str
) -> str:
    """The file. JSON strings are TOML strings for everything the questions let through."""
    q = json.dumps
    sold = (
        f'tools = {{ "*" = {q(price)} }}'
        if kind == "mcp"
        else f'routes = [\n  {{ match = "* /*", price = {q(price)} }},\n]'
    )
    mount = "/mcp" if kind == "mcp" else "/"
    return f"""\
# Written by `farebox init`. Every key: docs/operator.md.

[server]
public_url = {q(public)}
database = "sqlite:///farebox.db"

[credits]
packs = ["$1", "$5", "$20"]

[chains.{network}]
rpc = [{q(rpc)}]
pay_to = {q(pay_to)}
settler_key_file = "settler.key"

[upstreams.main]
kind = {q(kind)}
url = {q(upstream)}
mount = {q(mount)}
{sold}
"""
