"""``farebox demo`` from its start to its end: the stage, the walk, staying, signals."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from anvil.devnet import DevnetError
from gateway.demo import show, stage
from gateway.demo.show import Screen
from gateway.demo.stage import Stage, StageError, Wallet
from gateway.demo.walk import CARD, STEPS, Broken, Held, Step, Tape, Walk
from gateway.money import format_usd

OK: Final = 0
FAILED: Final = 1
UNREACHABLE: Final = 4
STEP_S: Final = 30
LOOK_S: Final = 1
FUNDS_UNITS: Final = 100_000_000  # $100 of test USDC for each wallet that pays

Hooks = Mapping[str, list[Callable[..., Any]]]


@dataclass(slots=True)
class _End:
    """How the demo is to end: the signal that came, and whether every step had held by then."""

    signal: int | None = None
    held: bool = False


def run(*, once: bool, as_json: bool, keep: Path | None) -> int:
    """Run the demo; its exit code. Raises ``DevnetError`` and ``ConfigError``."""
    screen = show.screen(as_json=as_json)
    try:
        with stage.folder_of(keep) as folder:
            return asyncio.run(_until_stopped(screen, folder, once=once, keep=keep is not None))
    except StageError as error:
        screen.put({"step": 0, "name": "start", "ok": False, "fault": str(error)})
        screen.line(f"✗ {error}", "red")
        return UNREACHABLE


async def _until_stopped(screen: Screen, folder: Path, *, once: bool, keep: bool) -> int:
    """Ctrl-C, SIGTERM and a closed terminal cancel the work once; what was started then ends."""
    end, loop, task = _End(), asyncio.get_running_loop(), asyncio.current_task()

    def stop(number: int) -> None:
        if end.signal is None and task is not None:
            end.signal = number
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, a background job
            loop.add_signal_handler(number, stop, number)
    try:
        return await _play(screen, folder, end, once=once, keep=keep)
    except asyncio.CancelledError:
        if end.signal is None:
            raise
        screen.line()
        screen.line("Stopped. Nothing is left running.")
        return OK if end.held else 128 + end.signal


async def _play(screen: Screen, folder: Path, end: _End, *, once: bool, keep: bool) -> int:
    began_s = time.monotonic()

    def tell(part: str, what: str, seconds: float) -> None:
        if part == "chain":  # not before: what is missing is told in one line
            screen.line("Farebox demo: all on this machine, no accounts, no real money.", "bold")
            screen.line()
        screen.tick("", seconds, f"{part:<10}", what, held=True)

    tape = Tape()
    hooks: Hooks = {"request": [tape.request], "response": [tape.response]}
    async with (
        stage.running(folder, keep=keep, tell=tell) as here,
        httpx.AsyncClient(trust_env=False, timeout=20, event_hooks=hooks) as http,
    ):
        walk = Walk(here, http, tape, *_wallets(here), once=once)
        screen.put(_start(walk, time.monotonic() - began_s, keep=keep))
        screen.line()
        for step in STEPS:
            if not await _step(screen, walk, step):
                return FAILED
        end.held = True
        _summary(screen, folder, time.monotonic() - began_s, keep=keep)
        if once:
            return OK
        _invite(screen, walk)
        return await _stay(screen, walk)


def _wallets(here: Stage) -> tuple[Wallet, Wallet, Wallet]:
    """The agent's, the stranger's and the person's, all fresh; the first two have USDC."""
    agent, stranger, human = (stage.new_wallet() for _ in range(3))
    for payer in (agent, stranger):
        here.chain.mint(payer.address, FUNDS_UNITS)
    return agent, stranger, human


def _start(walk: Walk, seconds: float, *, keep: bool) -> dict[str, Any]:
    """The first JSON object: what is running, and where."""
    here = walk.stage
    return {
        "step": 0,
        "name": "start",
        "ok": True,
        "ms": _ms(seconds),
        "sent": [],
        "received": [],
        "gateway": here.url,
        "upstream": here.api.url,
        "mcp": here.mcp.url,
        "stripe": here.stripe.url,
        "rpc_url": here.chain.rpc_url,
        "chain_id": here.chain.chain_id,
        "anvil": here.chain_version,
        "usdc": here.chain.public()["usdc"],
        "pay_to": here.pay_to,
        "folder": str(here.folder) if keep else None,
        "wallets": {
            name: {"address": wallet.shown, "private_key": wallet.private_key}
            for name, wallet in (
                ("agent", walk.agent),
                ("stranger", walk.stranger),
                ("human", walk.human),
            )
        },
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


async def _step(screen: Screen, walk: Walk, step: Step) -> bool:
    """Run one step and print what came of it."""
    title, began_s = step.title(walk), time.monotonic()
    result = await _result(walk, step)
    seconds = time.monotonic() - began_s
    sent, received = walk.tape.cut()
    row = {"step": step.number, "name": step.name, "ok": isinstance(result, Held)}
    row |= {"title": title, "ms": _ms(seconds), "sent": sent, "received": received}
    if isinstance(result, Held):
        screen.put(row | {"facts": result.facts})
        screen.tick(str(step.number), seconds, f"{title:<34} → ", result.line, held=True)
        return True
    fault = {"what": result.what, "expected": result.expected, "came": result.came}
    log = walk.stage.log_tail()
    screen.put(row | fault | {"gateway_log": log})
    screen.tick(str(step.number), seconds, title, "", held=False)
    screen.under(result.what)
    screen.under(f"expected  {result.expected}", "green")
    screen.under(f"came      {result.came}", "red")
    if log:
        screen.under("the gateway's last lines:", "dim")
        for line in log:
            screen.under(line, "dim")
    screen.line()
    screen.line(f"Step {step.number} did not hold; the steps after it were not run.", "red")
    return False


async def _result(walk: Walk, step: Step) -> Held | Broken:
    try:
        async with asyncio.timeout(STEP_S):
            return await step.run(walk)
    except Broken as broken:
        return broken
    except TimeoutError:
        return Broken("the step", f"an end within {STEP_S} s", "none")
    except (httpx.HTTPError, DevnetError) as error:
        status = walk.stage.gateway.poll()
        came = f"{type(error).__name__}: {error}"
        if status is not None:
            came += f" (the gateway has ended, status {status})"
        return Broken("the step", "an answer", came)
    except (LookupError, TypeError, ValueError) as error:
        return Broken(
            "the answer", "the members this step reads", f"{type(error).__name__}: {error}"
        )


def _summary(screen: Screen, folder: Path, seconds: float, *, keep: bool) -> None:
    screen.line()
    screen.line(f"All {len(STEPS)} steps held, {show.took(seconds)} with starting up.", "green")
    if keep:
        screen.line(f"Kept in {folder}: {stage.CONFIG}, {stage.DATABASE}, {stage.LOG} and keys.")


# --- staying --------------------------------------------------------------------------------


def _invite(screen: Screen, walk: Walk) -> None:
    """What a person can do now."""
    screen.line()
    screen.line(f"Now you: buy credits by test card {CARD}, any date and CVC:", "bold")
    screen.line(f"  {walk.buy_url}")
    for name, lines in show.snippets(walk.stage.url, walk.agent.private_key):
        screen.line()
        screen.line(f"# {name}", "dim")
        for line in lines:
            screen.line(line)
    screen.line()
    funds = format_usd(FUNDS_UNITS)
    screen.line(f"The keys are this demo's own (about {funds} of test USDC). Ctrl-C stops all.")


async def _stay(screen: Screen, walk: Walk) -> int:
    """Until a signal comes. Says when the person has paid, and if a part ends by itself."""
    paid = False
    while True:
        await asyncio.sleep(LOOK_S)
        fault = _fallen(walk.stage)
        if fault is not None:
            screen.put({"step": "stay", "ok": False, "fault": fault})
            screen.line(f"✗ {fault}", "red")
            return FAILED
        credits_ = None if paid else await _bought(walk)
        if credits_ is not None:
            paid = True
            screen.put({"step": "paid", "ok": True, "credits": credits_})
            screen.line(f"✓ The card payment has arrived: {credits_} credits.", "green")


async def _bought(walk: Walk) -> str | None:
    """The credits of the person's wallet; None while there are none, or nobody could say."""
    try:
        found = await walk.credits_of(walk.human)
    except (httpx.HTTPError, Broken):
        return None  # whether the gateway still lives is looked at in the next round
    finally:
        walk.tape.cut()  # nobody reads these, and they would add up
    return None if found == "0" else found


def _fallen(here: Stage) -> str | None:
    """What has ended by itself; None while all is well."""
    status = here.gateway.poll()
    if status is not None:
        return f"the gateway ended by itself, status {status}"
    try:
        here.chain.rpc("eth_chainId")
    except DevnetError as error:
        return str(error)
    return None
