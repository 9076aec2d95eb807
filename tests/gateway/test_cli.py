"""The command line as a person uses it: the real program, its output and its exit codes."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway import __version__, cli
from tests.servers import Done, Process

Farebox = Callable[..., Done]
PAY_TO = "0x" + "ab" * 20
WALLET = "0x" + "cd" * 20
CONFIG = f"""
[chains.base-sepolia]
rpc = ["http://127.0.0.1:1"]
pay_to = "{PAY_TO}"

[upstreams.weather]
url = "http://127.0.0.1:1"
routes = [
  {{ match = "GET /health", price = "free" }},
  {{ match = "GET /v1/forecast/*", price = "$0.002" }},
]

[upstreams.tools]
kind = "mcp"
url = "http://127.0.0.1:1/mcp"
mount = "/mcp"
tools = {{ search = "$0.005", "*" = "$0.001" }}
"""


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    file = tmp_path / "farebox.toml"
    file.write_text(CONFIG, encoding="utf-8")
    return file


def test_help_imports_nothing_heavy() -> None:
    """What keeps `farebox --help` instant: no pydantic, no database, no chain, no server."""
    program = (
        "import sys\nfrom gateway.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(re.findall(r"'(\w+)'", done.stdout.splitlines()[-1]))
    heavy = {"pydantic", "sqlalchemy", "web3", "eth_account", "stripe", "aiohttp", "starlette"}
    assert not loaded & (heavy | {"chain", "wallet_auth", "anvil", "asyncio", "jinja2", "redis"})


def commands(group: Any = cli.main, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        here = (*above, name)
        found += commands(command, here) if hasattr(command, "commands") else [here]
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_exists_and_takes_config_and_json(command: tuple[str, ...]) -> None:
    found: Any = cli.main
    for name in command:
        found = found.commands[name]
    assert found.help
    assert {"config", "as_json"} <= {parameter.name for parameter in found.params}


def test_version(farebox: Farebox, run: Callable[..., Process]) -> None:
    process = run("farebox", "version")
    assert process.wait_end() == 0
    assert process.text == farebox("version").stdout
    assert process.text.startswith(f"farebox {__version__} ")
    assert json.loads(farebox("version", "--json").stdout)["farebox"] == __version__
    assert __version__ in farebox("--version").stdout


def test_faults_of_the_real_program(run: Callable[..., Process], tmp_path: Path) -> None:
    (tmp_path / "farebox.toml").write_text("[server]\nlisten = 1\nwork = 2\n", encoding="utf-8")
    process = run("farebox", "serve")
    assert process.wait_end() == 3
    assert len(process.text.splitlines()) == 4
    assert "Traceback" not in process.text


def test_the_version_is_that_of_the_package() -> None:
    assert f'\nversion = "{__version__}"\n' in Path("pyproject.toml").read_text(encoding="utf-8")


def test_a_wrong_command_line_is_2(farebox: Farebox) -> None:
    done = farebox("sell")
    assert done.returncode == 2
    assert "No such command 'sell'" in done.stderr


@pytest.mark.parametrize("command", ["serve", "check", "routes", "migrate", "work"])
def test_without_a_configuration_it_says_how_to_get_one(farebox: Farebox, command: str) -> None:
    done = farebox(command)
    assert done.returncode == 3
    assert done.stderr == "farebox: farebox.toml: no such file; `farebox init` writes one\n"


def test_every_fault_has_its_own_line(farebox: Farebox, configured: Path) -> None:
    wrong = CONFIG.replace("$0.002", "cheap").replace("base-sepolia", "base-sepoila")
    configured.write_text(wrong, encoding="utf-8")
    done = farebox("routes")
    assert done.returncode == 3
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("farebox: ") for line in lines)
    told = json.loads(farebox("routes", "--json").stdout)
    assert told == {
        "ok": False,
        "exit": 3,
        "faults": [line.removeprefix("farebox: ") for line in lines],
    }


def test_the_configuration_can_be_named(farebox: Farebox, configured: Path) -> None:
    other = configured.rename(configured.with_name("other.toml"))
    assert farebox("routes", "--config", "other.toml").returncode == 0
    assert farebox("routes", env={"FAREBOX_CONFIG": str(other)}).returncode == 0


def test_routes(farebox: Farebox, configured: Path) -> None:
    assert configured.exists()
    shown = farebox("routes").stdout.splitlines()
    assert [re.split(r"  +", line) for line in shown] == [
        ["weather", "GET /health", "free"],
        ["weather", "GET /v1/forecast/*", "$0.002", "not charged: 4xx, 5xx"],
        ["tools", "tool search", "$0.005", "not charged: errors"],
        ["tools", "tool *", "$0.001", "not charged: errors"],
        ["tools", "all but tools/call", "free"],
    ]
    rows = [json.loads(line) for line in farebox("routes", "--json").stdout.splitlines()]
    assert rows[1]["price"]["price_units"] == 2_000
    assert [row["failed_if"] and row["failed_if"]["status"] for row in rows[:3]] == [
        *(None, ["4xx"], None),
    ]


def test_routes_tell_what_is_not_charged(farebox: Farebox, configured: Path) -> None:
    rules = (
        'failed_if = { status = [404, "5xx"], slower_than = "10s", empty = true, '
        'answer_without = ["result.url"], answer_with = [{ path = "state", equals = "failed" }] }'
    )
    text = configured.read_text()
    configured.write_text(text.replace('"$0.002"', f'"$0.002", {rules}'))
    assert configured.read_text() != text
    row = [json.loads(line) for line in farebox("routes", "--json").stdout.splitlines()][1]
    assert row["failed_if"] == {
        "status": ["404", "5xx"],
        "slower_than_s": 10,
        "empty": True,
        "answer_without": ["result.url"],
        "answer_with": [{"path": "state", "equals": "failed"}],
    }
    assert (
        farebox("routes")
        .stdout.splitlines()[1]
        .endswith(
            "not charged: 404, 5xx, slower than 10 s, empty, without result.url, "
            'with state = "failed"'
        )
    )


def test_check_names_what_cannot_be_reached(farebox: Farebox, configured: Path) -> None:
    assert configured.exists()
    done = farebox("check", "GET /v1/forecast/oslo", "--json")
    found = {row["check"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 4
    assert found["GET /v1/forecast/oslo"]["text"] == "weather GET /v1/forecast/*: $0.002"
    assert found["database"]["state"] == "ok"
    assert found["chain base-sepolia"]["state"] == "fail"
    assert found["upstream weather"]["state"] == "warn"


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("GET /nowhere", "no route"),
        ("POST /health", "405"),
        ("GET /v1/../health", "is refused"),
        ("POST /mcp", "MCP server tools"),
        ("http://127.0.0.1:8402/health", "weather GET /health"),
    ],
)
def test_check_explains_a_request(
    farebox: Farebox, configured: Path, target: str, text: str
) -> None:
    assert configured.exists()
    rows = map(json.loads, farebox("check", target, "--json").stdout.splitlines())
    assert [row for row in rows if text in row["text"]]


def test_grant_show_verify_export(farebox: Farebox, configured: Path, db_url: str) -> None:
    configured.write_text(f'[server]\ndatabase = "{db_url}"\n' + CONFIG, encoding="utf-8")
    assert json.loads(farebox("migrate", "--json").stdout)["ok"] is True
    grant = ("account", "grant", WALLET, "$5", "--why", "a gift", "--id", "gift-1", "--json")
    first, again = (json.loads(farebox(*grant).stdout) for _ in range(2))
    assert (first["outcome"], first["credits"]) == ("granted", "500")
    assert (again["outcome"], again["account"]) == ("granted before", first["account"])
    other = farebox("account", "grant", WALLET, "$6", "--why", "x", "--id", "gift-1")
    assert other.returncode == 2
    assert "was used for another grant" in other.stderr

    shown = json.loads(farebox("account", "show", WALLET, "--json").stdout)
    assert (shown["available"], shown["available_units"]) == ("500", 5_000_000)
    assert [line["kind"] for line in shown["recent"]] == ["mint"]
    by_id = json.loads(farebox("account", "show", str(first["account"]), "--json").stdout)
    assert by_id == shown

    verified = farebox("ledger", "verify", "--json")
    assert (verified.returncode, json.loads(verified.stdout)) == (0, {"ok": True, "broken": {}})
    rows = [json.loads(line) for line in farebox("ledger", "export").stdout.splitlines()]
    lots = [row for row in rows if row["row"] == "lot"]
    assert [(lot["source"], lot["minted_units"]) for lot in lots] == [("grant", 5_000_000)]
    assert {"account", "wallet", "transfer", "lot", "mint_key"} <= {row["row"] for row in rows}


def _charged_calls(url: str, *names: str) -> None:
    """Calls of the wallet, each charged a cent."""
    import asyncio

    from gateway.accounts import wallets
    from gateway.db import Database
    from gateway.ledger import Call, Close, Guard, Held, Hold, apply

    async def work() -> None:
        db = await Database.connect(url)
        async with db.write() as tx:
            account = await wallets.find(tx, WALLET)
            assert account is not None
            for name in names:
                # An alias counts for one principal: here two of the account's use the same.
                guard = Guard(f"{WALLET}{name}", "erc8128", name, "shared")
                now_ms = await tx.now_ms()
                call = Call("GET /paid", "GET", "/paid")
                step = Hold(account, guard, b"", 10_000, 60_000, call)
                (held,) = await apply(tx, [step], now_ms)
                assert isinstance(held, Held)
                await apply(tx, [Close(held.hold, 10_000)], now_ms)
        await db.close()

    asyncio.run(work())


def test_freeze_and_refund(farebox: Farebox, configured: Path, db_url: str) -> None:
    configured.write_text(f'[server]\ndatabase = "{db_url}"\n' + CONFIG, encoding="utf-8")
    assert farebox("account", "grant", WALLET, "$5", "--why", "x").returncode == 0
    _charged_calls(db_url, "first", "second")

    freeze = ("account", "freeze", WALLET, "--why", "an inquiry", "--json")
    assert [json.loads(farebox(*freeze).stdout)["changed"] for _ in range(2)] == [True, False]
    assert json.loads(farebox("account", "show", WALLET, "--json").stdout)["frozen"] is True
    thaw = farebox("account", "unfreeze", WALLET, "--why", "cleared")
    assert (thaw.returncode, thaw.stdout.strip()) == (0, f"{WALLET} can spend")

    refund = ("account", "refund", "first", "--wallet", WALLET, "--why", "it was wrong")
    part = (*refund, "--amount", "$0.004", "--id", "one", "--json")
    first, again = (json.loads(farebox(*part).stdout) for _ in range(2))
    assert (first["outcome"], first["amount_units"]) == ("refunded", 4_000)
    assert again == {**first, "outcome": "refunded before"}
    for arguments, code, text in (
        ((*refund, "--amount", "$0.007"), 1, "$0.006 is left"),
        ((*refund, "--id", "one"), 2, "was used for another refund"),
        ((*refund, "--amount", "$0"), 2, "a refund of nothing"),
        ((*refund, "--amount", "much"), 2, "not a dollar amount"),
        (("account", "refund", "third", "--wallet", WALLET, "--why", "x"), 1, "made no call"),
        (("account", "refund", "shared", "--wallet", WALLET, "--why", "x"), 1, "2 calls go by"),
        (("account", "refund", "first", "--wallet", "0x12", "--why", "x"), 2, "an address"),
        (("account", "freeze", "0x" + "ef" * 20, "--why", "x"), 1, "there is no account"),
        (("account", "unfreeze", WALLET), 2, "--why"),
    ):
        done = farebox(*arguments)
        assert (done.returncode, text in done.stderr) == (code, True), done.stderr
    assert farebox(*refund).returncode == 0
    assert "refund" in farebox(*refund).stderr  # nothing is left
    assert json.loads(farebox("account", "show", WALLET, "--json").stdout)["available_units"] == (
        5_000_000 - 10_000
    )

    rows = [json.loads(line) for line in farebox("ledger", "export").stdout.splitlines()]
    actions = [row for row in rows if row["row"] == "operator_action"]
    assert [(row["action"], row["reason"]) for row in sorted(actions, key=lambda r: r["id"])] == [
        ("freeze", "an inquiry"),
        ("unfreeze", "cleared"),
        ("refund", "it was wrong"),
        ("refund", "it was wrong"),
    ]
    assert all(row["by"] for row in actions)
    assert farebox("ledger", "verify").returncode == 0


def _reversed(url: str) -> None:
    """The grant of the wallet is taken back, after a cent of it was spent."""
    import asyncio

    from gateway.db import Database
    from gateway.ledger import Reverse, apply

    async def work() -> None:
        db = await Database.connect(url)
        async with db.write() as tx:
            lot: int = await tx.fetchval("SELECT id FROM lot")
            await apply(tx, [Reverse(lot, 5_000_000, "gone")], await tx.now_ms())
        await db.close()

    asyncio.run(work())


@pytest.mark.parametrize("freeze", [False, True])
def test_write_off(farebox: Farebox, configured: Path, db_url: str, freeze: bool) -> None:
    configured.write_text(f'[server]\ndatabase = "{db_url}"\n' + CONFIG, encoding="utf-8")
    assert farebox("account", "grant", WALLET, "$5", "--why", "x").returncode == 0
    give_up = ("account", "write-off", WALLET, "--why", "never seen again")
    for arguments, code, text in (
        (give_up, 1, f"{WALLET} owes nothing"),
        (("account", "write-off", "0x" + "ef" * 20, "--why", "x"), 1, "there is no account"),
        (("account", "write-off", WALLET), 2, "--why"),
    ):
        done = farebox(*arguments)
        assert (done.returncode, text in done.stderr) == (code, True), done.stderr
    _charged_calls(db_url, "first")
    _reversed(db_url)
    shown = json.loads(farebox("account", "show", WALLET, "--json").stdout)
    told = json.loads(farebox(*give_up, "--json", *(["--freeze"] if freeze else [])).stdout)
    assert told == {
        "account": shown["account"],
        "amount_units": shown["debt_units"],
        "credits": told["credits"],
        "debt_units": 0,
        "frozen": freeze,
    }
    assert shown["debt_units"] > 0
    shown = json.loads(farebox("account", "show", WALLET, "--json").stdout)
    assert (shown["debt_units"], shown["frozen"]) == (0, freeze)
    assert farebox(*give_up).returncode == 1
    rows = [json.loads(line) for line in farebox("ledger", "export").stdout.splitlines()]
    actions = [row["action"] for row in rows if row["row"] == "operator_action"]
    assert sorted(actions) == (["freeze", "write_off"] if freeze else ["write_off"])
    assert farebox("ledger", "verify").returncode == 0


def test_verify_names_what_is_broken(farebox: Farebox, configured: Path, sqlite_url: str) -> None:
    configured.write_text(f'[server]\ndatabase = "{sqlite_url}"\n' + CONFIG, encoding="utf-8")
    assert farebox("account", "grant", WALLET, "$5", "--why", "x").returncode == 0
    import sqlite3

    connection = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))
    with connection:
        connection.execute("UPDATE account SET available = available + 1")
    connection.close()
    done = farebox("ledger", "verify", "--json")
    assert done.returncode == 1
    assert "I1_balance_is_sum" in json.loads(done.stdout)["broken"]
    assert "I1_balance_is_sum" in farebox("ledger", "verify").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("show", WALLET), 1, "there is no account"),
        (("show", "0x12"), 2, "0x12 should be an address"),
        (("show", "someone"), 2, "neither a wallet address nor an account id"),
        (("grant", WALLET, "$0", "--why", "x"), 2, "nothing"),
        (("grant", WALLET, "five", "--why", "x"), 2, "not a dollar amount"),
        (("grant", "99", "$1", "--why", "x"), 2, "there is no account 99"),
        (("grant", WALLET, "$1"), 2, "--why"),
    ],
)
def test_account_says_what_is_wrong(
    farebox: Farebox, configured: Path, arguments: tuple[str, ...], code: int, text: str
) -> None:
    assert configured.exists()
    assert farebox("migrate").returncode == 0
    done = farebox("account", *arguments)
    assert done.returncode == code
    assert text in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("ledger", "verify"),
        ("ledger", "export", "--json"),
        ("reconcile", "--once"),
        ("account", "show", "0x" + "11" * 20),
    ],
)
@pytest.mark.parametrize(
    ("revision", "told"), [(None, "the database is empty"), ("0001", "is at revision 0001")]
)
def test_books_of_an_earlier_release_are_not_looked_into(
    farebox: Farebox, configured: Path, command: tuple[str, ...], revision: str | None, told: str
) -> None:
    """One line that says what to do, where a column that is not there would be a stack trace."""
    if revision is not None:
        assert farebox("migrate").returncode == 0
        with sqlite3.connect(configured.parent / "farebox.db") as books:
            books.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        books.close()
    done = farebox(*command)
    assert done.returncode == 3
    assert told in done.stderr and "run `farebox migrate`" in done.stderr
    assert "Traceback" not in done.stderr


ANSWERS = ["http://127.0.0.1:9000", "http", "$0.02", "base-sepolia", PAY_TO, "", ""]


def test_init_writes_a_configuration_that_works(farebox: Farebox, tmp_path: Path) -> None:
    done = farebox("init", stdin="\n".join(ANSWERS) + "\n")
    assert done.returncode == 0, done.stderr
    key = tmp_path / "settler.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert re.search(r"send some to 0x[0-9a-fA-F]{40}", done.stderr)
    assert key.read_text().strip() not in done.stdout + done.stderr
    assert farebox("routes").stdout.split()[:4] == ["main", "*", "/*", "$0.02"]
    again = farebox("init")
    assert again.returncode == 1
    assert "farebox.toml exists" in again.stderr


def test_init_asks_again_for_a_wrong_answer(farebox: Farebox) -> None:
    answers = ["weather.example", ANSWERS[0], "mcp", "cheap", *ANSWERS[2:]]
    done = farebox("init", stdin="\n".join(answers) + "\n")
    assert done.returncode == 0, done.stderr
    assert "'cheap'" in done.stderr
    assert farebox("routes").stdout.split()[:4] == ["main", "tool", "*", "$0.02"]


def test_serve_without_a_file_says_what_is_missing(farebox: Farebox) -> None:
    done = farebox("serve", "--upstream", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert "--upstream also needs --price, --pay-to, --rpc" in done.stderr


def test_serve_without_a_file_judges_its_arguments(farebox: Farebox, tmp_path: Path) -> None:
    arguments = ("--upstream", "localhost", "--price", "1c", "--pay-to", "me", "--rpc", "here")
    done = farebox("serve", *arguments)
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) >= 4
    assert not (tmp_path / "settler.key").exists()


def test_devnet_tells_everything_in_one_line_and_leaves_nothing(
    run: Callable[..., Process],
) -> None:
    process = run("farebox", "devnet", "--port", "0", "--json")
    told = json.loads(process.wait_for(r"^\{.*\}$").group(0))
    assert told["chain_id"] == 84532
    assert {"rpc_url", "caip2", "usdc", "accounts", "settler"} <= told.keys()
    port = int(told["rpc_url"].rpartition(":")[2])
    process.wait_port(port)
    taken = run("farebox", "devnet", "--port", str(port))
    assert taken.wait_end() == 4
    assert "Traceback" not in taken.text
    process.popen.send_signal(signal.SIGINT)
    assert process.wait_end() in (0, 130)
