"""``farebox account``: what an operator does with one account."""

from __future__ import annotations

from pathlib import Path

import click

from gateway.terminal import NO, USAGE, Stop, common, put, read_settings, say


@click.group()
def account() -> None:
    """Accounts: look at one, grant credits, stop one, give a charge back, give up a debt."""


@account.command("show")
@click.argument("who")
@common
def account_show(who: str, as_json: bool, config: Path | None) -> None:
    """Balance, lots and recent entries of WHO: a wallet address or an account id."""
    from gateway.hands import show

    try:
        found = show(read_settings(config), who)
    except ValueError as error:
        raise Stop(str(error), USAGE) from None
    if found is None:
        raise Stop(f"there is no account of {who}", NO)
    if as_json:
        put(found)
        return
    for key, value in found.items():
        for line in value if isinstance(value, list) else [value]:
            text = "  ".join(map(str, line.values())) if isinstance(line, dict) else line
            say(f"{key:<20} {text}")


@account.command("grant")
@click.argument("who")
@click.argument("amount")
@click.option("--why", required=True, help="Kept with the entry.")
@click.option("--id", "grant_id", help="Repeat the command with the same id to grant only once.")
@common
def account_grant(
    who: str, amount: str, as_json: bool, config: Path | None, **given: str | None
) -> None:
    """Give WHO credits worth AMOUNT (such as '$5'), out of the house's own pocket."""
    from gateway.hands import grant

    try:
        settings = read_settings(config)
        granted = grant(settings, who, amount, why=given["why"] or "", grant_id=given["grant_id"])
    except ValueError as error:
        raise Stop(str(error), USAGE) from None
    if as_json:
        put(granted)
    else:
        say(f"{granted['outcome']}: {granted['credits']} credits for {who}", fg="green")


def _freeze(who: str, *, frozen: bool, why: str, as_json: bool, config: Path | None) -> None:
    from gateway.hands import Refused, freeze

    try:
        done = freeze(read_settings(config), who, frozen=frozen, why=why)
    except ValueError as error:
        raise Stop(str(error), USAGE) from None
    except Refused as error:
        raise Stop(str(error), NO) from None
    if as_json:
        put(done)
        return
    state = "is frozen" if frozen else "can spend"
    say(f"{who} {state}{'' if done['changed'] else ', and did before'}", fg="green")


@account.command("freeze")
@click.argument("who")
@click.option("--why", required=True, help="Kept, with who did it.")
@common
def account_freeze(who: str, why: str, as_json: bool, config: Path | None) -> None:
    """Stop WHO from spending: a wallet address or an account id. What runs may end."""
    _freeze(who, frozen=True, why=why, as_json=as_json, config=config)


@account.command("unfreeze")
@click.argument("who")
@click.option("--why", required=True, help="Kept, with who did it.")
@common
def account_unfreeze(who: str, why: str, as_json: bool, config: Path | None) -> None:
    """Let WHO spend again."""
    _freeze(who, frozen=False, why=why, as_json=as_json, config=config)


@account.command("unpaid")
@click.argument("wallet", required=False)
@common
def account_unpaid(wallet: str | None, as_json: bool, config: Path | None) -> None:
    """Calls that were done and are not paid (x402 upto): of WALLET, or of all."""
    from gateway.hands_upto import unpaid

    try:
        found = unpaid(read_settings(config), wallet)
    except ValueError as error:
        raise Stop(str(error), USAGE) from None
    if as_json:
        put({"unpaid": found})
        return
    for call in found:
        say("  ".join(str(call[n]) for n in ("payment_id", "wallet", "state", "usd", "why")))
    if not found:
        say("none", fg="green")


@account.command("forgive")
@click.argument("payment_id")
@click.option("--why", required=True, help="Kept, with who did it.")
@common
def account_forgive(payment_id: str, why: str, as_json: bool, config: Path | None) -> None:
    """Take the loss of PAYMENT_ID, a call that was done and can never be paid (x402 upto)."""
    from gateway.hands import Refused
    from gateway.hands_upto import forgive

    try:
        done = forgive(read_settings(config), payment_id, why=why)
    except Refused as error:
        raise Stop(str(error), NO) from None
    if as_json:
        put(done)
    else:
        say(f"{done['usd']} of {done['wallet']} is forgiven", fg="green")


@account.command("refund")
@click.argument("request_id")
@click.option("--wallet", "who", required=True, help="Whose call: an address or account id.")
@click.option("--amount", help="Such as '$0.01'; without it all that is left of the charge.")
@click.option("--why", required=True, help="Kept, with who did it.")
@click.option("--id", "refund_id", help="Repeat the command with the same id to refund only once.")
@common
def account_refund(
    request_id: str, as_json: bool, config: Path | None, **given: str | None
) -> None:
    """Give back what the call REQUEST_ID was charged, to the credits that paid for it."""
    from gateway.hands import Refused, refund

    try:
        done = refund(
            read_settings(config),
            request_id,
            given["who"] or "",
            amount=given["amount"],
            why=given["why"] or "",
            refund_id=given["refund_id"],
        )
    except ValueError as error:
        raise Stop(str(error), USAGE) from None
    except Refused as error:
        raise Stop(str(error), NO) from None
    if as_json:
        put(done)
    else:
        say(f"{done['outcome']}: {done['credits']} credits for call {request_id}", fg="green")


@account.command("write-off")
@click.argument("who")
@click.option("--why", required=True, help="Kept, with who did it.")
@click.option("--freeze", is_flag=True, help="Stop the account's spending in the same step.")
@common
def account_write_off(who: str, why: str, freeze: bool, as_json: bool, config: Path | None) -> None:
    """Give up what WHO owes: a wallet address or an account id. The house bears the loss."""
    from gateway.hands import Refused, write_off

    try:
        done = write_off(read_settings(config), who, why=why, freeze=freeze)
    except ValueError as error:
        raise Stop(str(error), USAGE) from None
    except Refused as error:
        raise Stop(str(error), NO) from None
    if as_json:
        put(done)
        return
    state = "is frozen" if done["frozen"] else "can spend"
    left = f"still owes {done['debt_units']} units in dispute" if done["debt_units"] else state
    say(f"{done['credits']} credits are written off; {who} {left}", fg="green")
