"""`farebox demo` as a person and as a program run it: every step, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.demo import show
from tests import servers
from tests.servers import Process

CLIENTS = Path(__file__).parents[2] / "clients"
STEPS = ["start", "unpaid", "buy", "spend", "repeat", "tool", "cold", "card", "books"]
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="left-over processes are looked for in /proc"
)


class Demo:
    """One `farebox demo`: its processes are known by a mark, its files by their folder."""

    def __init__(self, run: Callable[..., Process], tmp_path: Path) -> None:
        self._run = run
        self.temporary = tmp_path / "temporary"
        self.temporary.mkdir()
        self.mark = f"DEMO_UNDER_TEST={tmp_path}"

    def start(self, *arguments: str, program: str = "farebox", **env: str) -> Process:
        name, _, value = self.mark.partition("=")
        more = {"TMPDIR": str(self.temporary), name: value, **env}
        return self._run(program, *arguments, env=more)

    def processes(self) -> dict[int, str]:
        """Every process that has the mark in its environment: the demo's own and its children."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:  # ended meanwhile, or not ours to look at
                continue
        return found

    def left(self) -> list[str]:
        """What should not be there once it has ended."""
        files = [str(path.relative_to(self.temporary)) for path in self.temporary.rglob("*")]
        return [*self.processes().values(), *files]


@pytest.fixture
def demo(run: Callable[..., Process], tmp_path: Path) -> Iterator[Demo]:
    one = Demo(run, tmp_path)
    yield one
    for pid in one.processes():
        os.kill(pid, signal.SIGKILL)


def rows(process: Process) -> list[dict[str, Any]]:
    return [json.loads(line) for line in process.text.splitlines() if line.startswith("{")]


def header(message: dict[str, Any], name: str) -> str | None:
    value: str | None = message["headers"].get(name)
    return value


def test_every_step_holds_and_nothing_is_left(demo: Demo) -> None:
    process = demo.start("demo", "--once", "--json")
    assert process.wait_end(60) == 0, process.text
    assert demo.left() == []
    told = rows(process)
    assert len(told) == len(process.text.splitlines())  # nothing but objects, one a line
    assert [row["name"] for row in told] == STEPS
    assert [row["step"] for row in told] == list(range(9))
    assert all(row["ok"] is True and row["ms"] > 0 for row in told)
    assert all(len(row["sent"]) == len(row["received"]) for row in told)
    start, unpaid, buy, spend, repeat, tool, cold, card, books = told
    servers.note("Anvil", start["anvil"])

    statuses = [[message.get("status") for message in row["received"]] for row in told]
    assert statuses[1:7] == [[402], [402, 200], [200], [200, 401], [200], [402, 200, 200]]
    assert header(unpaid["received"][0], "payment-required")
    assert "payment-signature" not in unpaid["sent"][0]["headers"]
    assert header(buy["sent"][1], "payment-signature")
    assert re.fullmatch("0x[0-9a-f]{64}", buy["facts"]["transaction"])
    # One signed request without a payment; then the same bytes, then those on another path.
    signatures = [
        [header(message, "signature") for message in row["sent"]] for row in (spend, repeat)
    ]
    assert signatures[1] == signatures[0] * 2
    assert signatures[0][0]
    assert [message["url"] for message in repeat["sent"]] == [
        spend["sent"][0]["url"],
        spend["sent"][0]["url"][:-1] + "a",
    ]
    assert header(repeat["received"][0], "farebox-replayed") == "true"
    assert header(repeat["received"][0], "farebox-charged") == "0"
    assert header(tool["sent"][0], "signature") and tool["sent"][0]["url"].endswith("/mcp")
    assert header(tool["received"][0], "farebox-charged") == "0.5"
    assert tool["received"][0]["body"]["result"]["isError"] is False
    assert "signature" not in cold["sent"][1]["headers"]  # stock x402: nothing but the payment
    assert header(cold["received"][1], "farebox-balance") == "0.8"
    assert card["received"][-2]["body"]["available"] == "500"
    assert card["received"][-1]["body"].startswith("<!doctype html>")
    assert books["received"] == [{"exit": 0, "body": {"ok": True, "broken": {}}}]


@pytest.mark.parametrize(
    ("number", "after"),
    [(signal.SIGTERM, "the gateway starts"), (signal.SIGINT, "buy")],
    ids=["SIGTERM-starting", "SIGINT-walking"],
)
def test_a_signal_midway_leaves_nothing(demo: Demo, number: int, after: str) -> None:
    process = demo.start("demo", "--json")
    if after in STEPS:
        process.wait_for(f'"name": "{after}"', 60)
    else:
        servers.until(
            lambda: any(" serve --config" in line for line in demo.processes().values()),
            60,
            after,
            lambda: process.running,
        )
    assert len(demo.processes()) >= 3  # the demo, the chain, the gateway
    process.popen.send_signal(number)
    assert process.wait_end(30) == 128 + number, process.text
    assert demo.left() == []
    assert all(row["ok"] for row in rows(process))
    assert "Traceback" not in process.text


def test_it_stays_for_a_person(demo: Demo, tmp_path: Path) -> None:
    process = demo.start("demo", PYTHONIOENCODING="ascii")
    process.wait_for("Ctrl-C stops all", 60)
    assert process.text.isascii()
    assert "\x1b" not in process.text
    ticks = re.findall(r"^ok (\d) +\d+(?:\.\d)? m?s ", process.text, re.MULTILINE)
    assert ticks == ["1", "2", "3", "4", "5", "6", "7", "8"]

    assert " 402 " in snippet(process.text, "curl", tmp_path, ["sh"])
    assert "99.1 credits left" in snippet(process.text, "Python", tmp_path, [sys.executable])
    if (CLIENTS / "node_modules").is_dir():
        (tmp_path / "node_modules").symlink_to(CLIENTS / "node_modules")
        assert "'oslo'" in snippet(process.text, "TypeScript", tmp_path, ["node"])
    else:
        assert "wrapFetchWithPaymentFromConfig" in process.text

    buy = process.wait_for(r"^ +(http://\S+/farebox/buy)\?wallet=(0x\w+)&usd=5$")
    order = {"amount": "5", "wallet": buy.group(2)}
    opened = httpx.post(buy.group(1), data=order, trust_env=False)
    assert opened.status_code == 303, opened.text
    form = {"email": "me@example.com", "method": "card", "expiry": "12 / 40", "cvc": "123"}
    form["card_number"] = "4242424242424242"
    paid = httpx.post(opened.headers["location"], data=form, trust_env=False)
    assert paid.status_code == 303, paid.text
    process.wait_for("The card payment has arrived: 500 credits", 30)

    process.popen.send_signal(signal.SIGTERM)
    assert process.wait_end(30) == 0, process.text
    assert demo.left() == []


def snippet(text: str, name: str, folder: Path, program: list[str]) -> str:
    """Run what the demo says to copy: its output."""
    block = re.search(rf"^# {name}.*\n((?:\S.*\n)+)", text, re.MULTILINE)
    assert block is not None, text
    lines = block.group(1).splitlines()
    assert len(lines) <= 6
    file = folder / f"{name}.mjs"
    file.write_text("\n".join(lines), encoding="utf-8")
    done = subprocess.run(
        [*program, str(file)],
        cwd=folder,
        env=servers.child_env(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BROKEN = """
import sys
from gateway.demo import walk
walk.PRICE_UNITS = 3_000  # what the step expects; the gateway's file says 2,000
from gateway.cli import main
main(sys.argv[1:])
"""


def test_a_step_that_fails_says_what_was_expected_and_what_came(demo: Demo, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    program = ("-c", BROKEN, "demo", "--once", "--json", "--keep", str(kept))
    process = demo.start(*program, program="python")
    assert process.wait_end(60) == 1, process.text
    assert [row["ok"] for row in rows(process)] == [True, False]
    failed = rows(process)[-1]
    assert (failed["what"], failed["expected"], failed["came"]) == ("price", 3_000, 2_000)
    assert demo.left() == []

    # What is kept is a deployment one can look into, and no second demo is mixed into it.
    assert {path.name for path in kept.iterdir()} >= {
        "farebox.toml",
        "farebox.db",
        "settler.key",
        "gateway.log",
        "chain.json",
    }
    verified = demo.start("ledger", "verify", "--config", str(kept / "farebox.toml"))
    assert verified.wait_end() == 0, verified.text
    again = demo.start("demo", "--once", "--keep", str(kept))
    assert again.wait_end() == 3
    assert re.fullmatch(r"farebox: .* holds .*: choose an empty folder\n", again.text)


MISSING = """
import sys
from functools import partial
from pathlib import Path
from gateway.demo import stage
stage.Options = partial(stage.Options, node_modules=Path("nowhere"))
from gateway.cli import main
main(sys.argv[1:])
"""


def test_without_the_chain_tools_it_is_one_line(demo: Demo) -> None:
    process = demo.start("-c", MISSING, "demo", program="python")
    assert process.wait_end(60) == 4
    assert re.fullmatch(r"farebox: .*run `make install` \(needs Node 20\)\n", process.text)
    assert demo.left() == []


def test_usual_ports_that_are_taken_are_not_waited_for() -> None:
    from gateway.demo.stage import port_or_free

    taken = servers.free_port()
    assert port_or_free(taken) == taken
    import socket

    with socket.create_server(("127.0.0.1", taken)):
        assert port_or_free(taken) not in (0, taken)


def test_a_narrow_terminal_wraps_under_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    screen = show.Screen(as_json=False, colour=False, unicode=True, columns=80)
    screen.tick("1", 0.0123, "GET /v1/forecast/oslo → ", "402 " + "offer " * 20, held=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("✓ 1   12 ms  GET /v1/forecast/oslo → 402 offer")
    assert len(lines) > 2
    assert all(len(line) <= 80 for line in lines)
    start = lines[0].index("402")
    assert all(line.startswith(" " * start + "offer") for line in lines[1:])


def test_colour_is_for_terminals_only(capsys: pytest.CaptureFixture[str]) -> None:
    show.Screen(as_json=False, colour=True, unicode=True, columns=None).line("well", "green")
    show.Screen(as_json=False, colour=False, unicode=True, columns=None).line("well", "green")
    assert capsys.readouterr().out == "\x1b[32mwell\x1b[0m\nwell\n"
