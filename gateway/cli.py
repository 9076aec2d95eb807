"""``farebox``: the command line. Thin; each command calls one function elsewhere.

Nothing heavy is imported before a command runs, so that ``farebox --help`` answers at once.
Expected faults are one line on stderr that says what to do, and an exit code:

    0  done              2  wrong command line        4  something it needs is not reachable
    1  the answer is no  3  the configuration is wrong  130  stopped by Ctrl-C
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from gateway import __version__
from gateway.cli_account import account
from gateway.terminal import (
    CONFIG,
    DEFAULT_CONFIG,
    NO,
    OK,
    UNREACHABLE,
    Stop,
    common,
    fail,
    put,
    read_settings,
    say,
)

if TYPE_CHECKING:
    from gateway.settings import Settings


class _Farebox(click.Group):
    """Turns expected faults of any command into one line and an exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["farebox.json"] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        as_json = ctx.meta["farebox.json"]
        try:
            return super().invoke(ctx)
        except Stop as stop:
            fail(stop, as_json=as_json)
        except (click.exceptions.Exit, click.ClickException, click.Abort, KeyboardInterrupt):
            raise
        except Exception as error:
            fault = _expected(error)
            if fault is None:
                raise
            fail(fault, as_json=as_json)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order below, which is the order of use


# Faults a person can mend, by the class they are (named, not imported: most of these modules are
# heavy) and with the line to print; {} is the exception's own text.
_FAULTS: Final[dict[str, tuple[int, str]]] = {
    "gateway.config.ConfigError": (CONFIG, "{}"),
    "gateway.proxy.routes_table.RouteError": (CONFIG, "{}"),
    "gateway.app.BadToken": (CONFIG, "{}"),
    "gateway.workers.WorkersFailed": (UNREACHABLE, "{}"),
    "gateway.migrations.run.NewerDatabase": (CONFIG, "{}; install that release"),
    "gateway.migrations.run.OlderDatabase": (CONFIG, "{}: run `farebox migrate`"),
    "gateway.db.DatabaseUnavailable": (UNREACHABLE, "the database cannot be reached: {}"),
    "chain.errors.Unavailable": (UNREACHABLE, "the chain cannot be reached: {}"),
    "anvil.process.DevnetError": (UNREACHABLE, "{}"),
}


def _expected(error: Exception) -> Stop | None:
    """What a person should read for a fault that is not the program's; None if it is one."""
    for kind in type(error).__mro__:
        found = _FAULTS.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None:
            faults = getattr(error, "faults", None)
            return Stop(found[1].format(error), found[0], list(faults) if faults else None)
    return None


@click.group(cls=_Farebox, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", prog_name="farebox")
def main() -> None:
    """A payment gateway for any HTTP API or MCP server: pay with x402, spend credits."""


# --- try it ---------------------------------------------------------------------------------


@main.command()
@click.option("--once", is_flag=True, help="Walk through every step and exit.")
@click.option("--keep", type=click.Path(path_type=Path), help="Keep its files in this folder.")
@common
def demo(once: bool, keep: Path | None, as_json: bool, config: Path | None) -> None:
    """The whole thing on this machine: chain, API, MCP server, cards, gateway."""
    del config  # the demo writes its own
    from gateway.demo import main as run

    sys.exit(run(once=once, as_json=as_json, keep=keep))


@main.command()
@click.option("--port", type=click.IntRange(0, 65535), default=8545, show_default=True)
@common
def devnet(port: int, as_json: bool, config: Path | None) -> None:
    """Only the chain: Anvil with real USDC and funded wallets."""
    del config
    from anvil.devnet import run

    run(port=port, json=as_json)


# --- set it up ------------------------------------------------------------------------------


@main.command()
@common
def init(as_json: bool, config: Path | None) -> None:
    """Write a configuration by asking a few questions."""
    from gateway.setup import ask

    path = config or Path(DEFAULT_CONFIG)
    if path.exists():
        raise Stop(f"{path} exists; move it away, or choose another one with --config", NO)
    written = ask(path)
    if as_json:
        put({"ok": True, "written": [str(p) for p in written]})
    else:
        say(f"Wrote {', '.join(str(p) for p in written)}. Next: farebox check", fg="green")


@main.command()
@click.argument("target", required=False)
@common
def check(target: str | None, as_json: bool, config: Path | None) -> None:
    """Validate the configuration and reach everything it names.

    TARGET, such as "GET /v1/forecast/oslo", also shows the route and price of that request.
    """
    from gateway.check import library_that_fails_to_load, run

    # First: reading prices and routes already needs the hash library.
    broken = library_that_fails_to_load()
    findings = [broken] if broken is not None else run(read_settings(config), target)
    for finding in findings:
        if as_json:
            put(finding.members())
        else:
            mark, colour = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}[
                finding.state
            ]
            say(f"{mark} {finding.name:<28} {finding.text}", fg=colour)
    sys.exit(UNREACHABLE if any(f.state == "fail" for f in findings) else OK)


@main.command()
@common
def routes(as_json: bool, config: Path | None) -> None:
    """The priced route table."""
    import time

    from gateway.price_table import table

    rows = table(read_settings(config), int(time.time()))
    if as_json:
        for row in rows:
            put(row)
        return
    columns = ("upstream", "match", "price_text", "failed_if_text")
    shown = [[str(row[key]) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in shown) for i in range(4)]
    for line in shown:
        say("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


@main.command()
@common
def migrate(as_json: bool, config: Path | None) -> None:
    """Bring the database to this version's schema."""
    from gateway.hands import migrate as run

    version = run(read_settings(config))
    if as_json:
        put({"ok": True, "schema": version})
    else:
        say(f"The database is at schema {version}.", fg="green")


# --- run it ---------------------------------------------------------------------------------


@main.command()
@click.option("--upstream", help="Without a file: the URL of what you sell.")
@click.option("--price", help="Without a file: the price of every call, such as '$0.01'.")
@click.option("--pay-to", help="Without a file: the address that is paid.")
@click.option("--network", default="base-sepolia", show_default=True)
@click.option("--rpc", help="Without a file: a JSON-RPC node of the network.")
@click.option("--kind", type=click.Choice(["http", "mcp"]), default="http", show_default=True)
@click.option("--settler-key-file", type=click.Path(path_type=Path), default="settler.key")
@click.option("--listen", help="Where to listen, as host:port; overrides the file.")
@common
def serve(as_json: bool, config: Path | None, **given: Any) -> None:
    """The gateway. With --upstream, --price, --pay-to and --rpc it needs no file."""
    from gateway.config import ConfigError

    overrides: dict[str, Any] = {"server": {"listen": given["listen"]}} if given["listen"] else {}
    if given["upstream"] is None:
        settings = read_settings(config, overrides)
    else:
        try:
            settings = _quick_settings(config, overrides, given)
        except ConfigError as error:
            raise Stop(str(error), CONFIG, error.faults) from None
    from gateway.serve import serve as run

    try:
        run(settings, as_json=as_json)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
            raise
        raise Stop(
            f"cannot listen on {error.filename or settings.server.listen}: {error.strerror}; choose"
            " another address with --listen, server.listen or server.admin_listen",
            UNREACHABLE,
        ) from None


def _quick_settings(
    config: Path | None, overrides: dict[str, Any], given: dict[str, Any]
) -> Settings:
    """Settings without a file; the settler's key is made on first use."""
    from gateway.check import judge
    from gateway.config import quick
    from gateway.setup import settler_key

    if config is not None:
        raise click.UsageError("--upstream is for running without a file: leave --config out")
    missing = [f"--{n.replace('_', '-')}" for n in ("price", "pay_to", "rpc") if not given[n]]
    if missing:
        raise click.UsageError(f"--upstream also needs {', '.join(missing)}")
    arguments = [given[name] for name in ("upstream", "price", "pay_to", "network", "rpc")]
    quick(*arguments, kind=given["kind"], overrides=overrides, judge=judge)  # before making files
    key_file: Path = given["settler_key_file"]
    address = settler_key(key_file)
    if address is not None:
        click.echo(
            f"Made {key_file}. It pays the gas of settlements: send some to {address}", err=True
        )
    overrides["chains"] = {given["network"]: {"settler_key_file": str(key_file)}}
    return quick(*arguments, kind=given["kind"], overrides=overrides, judge=judge)


@main.command()
@common
def work(as_json: bool, config: Path | None) -> None:
    """Only the background loop: settlements to finish, deposits, expiry, audits."""
    settings = read_settings(config)
    from gateway.work import run

    run(settings, as_json=as_json)


# --- look after it --------------------------------------------------------------------------


@main.group()
def ledger() -> None:
    """The books: verify and export."""


@ledger.command("verify")
@common
def ledger_verify(as_json: bool, config: Path | None) -> None:
    """Check every invariant of the books; exit 1 and name the broken ones."""
    from gateway.hands import verify

    broken = verify(read_settings(config))
    if as_json:
        put({"ok": not broken, "broken": broken})
    elif not broken:
        say("The books are in order.", fg="green")
    else:
        for name, found in broken.items():
            say(f"✗ {name}: {found['meaning']}; the first: {found['rows'][0]}", fg="red")
    sys.exit(NO if broken else OK)


@ledger.command("export")
@common
def ledger_export(as_json: bool, config: Path | None) -> None:
    """Entries, lots, holds, payments and external keys, one JSON object a line."""
    del as_json  # the export is JSON in any case
    from gateway.hands import export

    export(read_settings(config), put)


main.add_command(account)


@main.command()
@click.option("--once", is_flag=True, help="Compare everything once; without it, again and again.")
@common
def reconcile(once: bool, as_json: bool, config: Path | None) -> None:
    """Compare the chains, the cards and the books; exit 1 on a difference without a reason."""
    import time

    from gateway.hands import reconcile as run

    settings = read_settings(config)
    while True:
        compared = run(settings)
        odd = [d for each in compared for d in each["differences"] if not d["explained"]]
        if as_json:
            put({"ok": not odd, "compared": compared})
        else:
            _show_compared(compared)
        if once:
            sys.exit(NO if odd else OK)
        time.sleep(settings.server.reconcile_s)


def _show_compared(compared: list[dict[str, Any]]) -> None:
    for each in compared:
        span = "" if each["to_block"] is None else f", blocks to {each['to_block']}"
        say(f"{each['where']}: {each['transfers']} {each['what']}, {each['units']} units{span}")
        for odd in each["differences"]:
            mark, colour = ("·", "yellow") if odd["explained"] else ("✗", "red")
            outside, books = odd["outside_units"], odd["books_units"]
            say(f"{mark} {odd['kind']} {odd['ref']}: {outside} there, {books} here", fg=colour)


@main.command()
@common
def version(as_json: bool, config: Path | None) -> None:
    """The version of Farebox and of Python."""
    del config
    python = ".".join(str(part) for part in sys.version_info[:3])
    if as_json:
        put({"farebox": __version__, "python": python})
    else:
        say(f"farebox {__version__} (Python {python})")


if __name__ == "__main__":
    main()
