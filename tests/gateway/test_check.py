"""``farebox check`` against a real chain: what an operator should know before money moves."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sha3

from anvil.devnet import Devnet, Options, running
from chain.schemes import upto
from chain.schemes.permit2 import EXACT_PROXY, PERMIT2
from gateway.settings import NO_EFFECT
from tests.fixtures_chain import USDC, FaultyNode
from tests.fixtures_rollup import plant
from tests.servers import Done
from wallet_auth import keys

Farebox = Callable[..., Done]
State = list[tuple[str, str, str]]


def configure(
    folder: Path,
    net: Devnet,
    *urls: str,
    chain: str = "base-sepolia",
    routes: str = '{ match = "GET /*", price = "$0.002" }',
) -> None:
    """A configuration for ``net``; ``chain`` is a name, or an id with ``assets`` behind it."""
    name, _, assets = chain.partition("\n")
    (folder / "settler.key").write_text(net.settler.private_key, encoding="utf-8")
    text = f"""
[chains."{name}"]
rpc = {json.dumps(urls or [net.rpc_url])}
pay_to = "{net.accounts[1].address}"
settler_key_file = "settler.key"
{assets}

[upstreams.weather]
url = "http://127.0.0.1:1"
routes = [{routes}]
"""
    (folder / "farebox.toml").write_text(text, encoding="utf-8")


def check(farebox: Farebox) -> tuple[int, State]:
    """The exit code, and what was found about the chain and the libraries."""
    done = farebox("check", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    about = ("libraries", "chain", "settler", "web3", "permit2", "upto")
    found = [(row["check"], row["state"], row["text"]) for row in rows]
    return done.returncode, [row for row in found if row[0].startswith(about)]


def fails(found: State) -> list[tuple[str, str]]:
    return [(name, text) for name, state, text in found if state != "ok"]


def test_a_good_chain(farebox: Farebox, tmp_path: Path, chain_net: Devnet) -> None:
    configure(tmp_path, chain_net)
    code, found = check(farebox)
    assert code == 0
    assert [(name, state) for name, state, _ in found] == [
        ("libraries", "ok"),
        ("chain base-sepolia", "ok"),
        ("chain base-sepolia", "ok"),
        ("settler base-sepolia", "ok"),
        ("web3 base-sepolia", "ok"),
    ]
    assert chain_net.settler.private_key[2:] not in str(found)


def test_a_paused_token(farebox: Farebox, tmp_path: Path, chain_net: Devnet) -> None:
    configure(tmp_path, chain_net)
    chain_net.pause()
    code, found = check(farebox)
    ((name, text),) = fails(found)
    assert (code, name) == (4, "chain base-sepolia")
    assert "paused by its issuer" in text


def test_a_blacklisted_payee(farebox: Farebox, tmp_path: Path, chain_net: Devnet) -> None:
    configure(tmp_path, chain_net)
    chain_net.blacklist(chain_net.accounts[1].address)
    code, found = check(farebox)
    ((name, text),) = fails(found)
    assert (code, name) == (4, "chain base-sepolia")
    assert "blacklist" in text


def test_no_gas(farebox: Farebox, tmp_path: Path, chain_net: Devnet) -> None:
    configure(tmp_path, chain_net)
    chain_net.rpc("anvil_setBalance", chain_net.settler.address, "0x0")
    code, found = check(farebox)
    ((name, text),) = fails(found)
    assert (code, name) == (4, "settler base-sepolia")
    assert "0.000000" in text


def test_permit2_without_its_contracts(farebox: Farebox, tmp_path: Path, chain_net: Devnet) -> None:
    for address in (EXACT_PROXY, PERMIT2):
        chain_net.rpc("anvil_setCode", address, "0x")
    configure(tmp_path, chain_net, chain="base-sepolia\npermit2 = true")
    for missing in (PERMIT2, EXACT_PROXY, None):
        code, found = check(farebox)
        if missing is None:
            assert (code, fails(found)) == (0, [])
            assert ("permit2 base-sepolia", "ok") in [row[:2] for row in found]
            break
        ((name, text),) = fails(found)
        assert (code, name) == (4, "permit2 base-sepolia")
        assert text.endswith(f"at {missing}")
        chain_net.rpc("anvil_setCode", missing, "0x00")
    configure(tmp_path, chain_net, chain="base-sepolia\npermit2 = true\neip2612 = true")
    code, found = check(farebox)
    assert (code, fails(found)) == (0, [])


METERED = (
    '{ rule = "metered", max = "$0.05", when_unknown = "max", rates = { bytes_out = "$1 / 1M" } }'
)


def test_upto_without_its_contracts(farebox: Farebox, tmp_path: Path, chain_net: Devnet) -> None:
    for address in (upto.PROXY, PERMIT2):
        chain_net.rpc("anvil_setCode", address, "0x")
    routes = f'{{ match = "POST /chat", upto = true, price = {METERED} }}'
    for missing in (PERMIT2, upto.PROXY):
        configure(tmp_path, chain_net, routes=routes)
        code, found = check(farebox)
        ((name, text),) = fails(found)
        assert (code, name) == (4, "upto base-sepolia")
        assert text.endswith(f"at {missing}")
        chain_net.rpc("anvil_setCode", missing, "0x00")
    code, found = check(farebox)
    assert (code, fails(found)) == (0, [])
    assert ("upto base-sepolia", "ok") in [row[:2] for row in found]
    configure(tmp_path, chain_net)
    assert not [row for row in check(farebox)[1] if row[0].startswith("upto")]


@pytest.mark.parametrize("price", ['"free"', '"$0.01"'])
def test_upto_is_for_prices_that_are_not_known_before(
    farebox: Farebox, tmp_path: Path, chain_net: Devnet, price: str
) -> None:
    routes = f'{{ match = "POST /chat", upto = true, price = {price} }}'
    configure(tmp_path, chain_net, routes=routes)
    done = farebox("check")
    assert done.returncode != 0
    assert "upto is for metered prices" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def other_net() -> Iterator[Devnet]:
    """A chain whose tokens the configuration has to spell out."""
    with running(options=Options(chain_id=31337, holders=2)) as net:
        yield net


@pytest.mark.parametrize("name", ["USDC", "USD Coin"])
def test_a_token_that_is_spelled_out(
    farebox: Farebox, tmp_path: Path, other_net: Devnet, name: str
) -> None:
    asset = f'address = "{USDC.address}", symbol = "USDC", decimals = 6, eip712_version = "2"'
    spelled = f'eip155:31337\nassets = [{{ {asset}, eip712_name = "{name}" }}]'
    configure(tmp_path, other_net, chain=spelled)
    code, found = check(farebox)
    if name == "USDC":
        assert (code, fails(found)) == (0, [])
        return
    ((_, text),) = fails(found)
    assert code == 4
    assert "the token's name is 'USDC', not 'USD Coin'" in text


async def test_a_second_provider(
    farebox: Farebox, tmp_path: Path, chain_net: Devnet, faulty_node: FaultyNode
) -> None:
    configure(tmp_path, chain_net, chain_net.rpc_url, faulty_node.url)

    async def failing() -> tuple[int, State]:
        code, found = await asyncio.to_thread(check, farebox)  # the node is on this loop
        return code, [row for row in found if row[1] != "ok"]

    assert await failing() == (0, [])
    faulty_node.fault("eth_getBalance", "change", lambda _: "0x1")
    code, ((name, state, text),) = await failing()
    assert (code, name, state) == (4, "web3 base-sepolia", "fail")
    assert "balance in wei is 1 through web3" in text
    faulty_node.fault("eth_getBalance", "status", 429)
    code, ((name, state, text),) = await failing()
    assert (code, name, state) == (0, "web3 base-sepolia", "warn")
    assert "nothing to compare" in text


async def test_what_providers_tell(
    farebox: Farebox, tmp_path: Path, chain_net: Devnet, faulty_node: FaultyNode
) -> None:
    async def told() -> State:
        done = await asyncio.to_thread(farebox, "check", "--json")
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        name = "providers base-sepolia"
        return [(r["check"], r["state"], r["text"]) for r in rows if r["check"] == name]

    chain_net.mine(40)  # so that there is a safe block, of now
    configure(tmp_path, chain_net, chain_net.rpc_url, faulty_node.url)
    assert [(state, text) for _, state, text in await told()] == [("ok", "2 tell the same chain")]
    other = "0x" + "5" * 64
    faulty_node.fault("eth_getBlockByNumber", "change", lambda block: {**block, "hash": other})
    assert [text.split()[1] for _, _, text in await told()] == ["rpc_disagrees"] * 2
    configure(tmp_path, chain_net)
    ((_, state, text),) = await told()
    assert state == "warn" and "only one is named" in text


async def test_money_that_came_before_the_books(
    farebox: Farebox, tmp_path: Path, chain_net: Devnet
) -> None:
    configure(tmp_path, chain_net)  # pays a wallet that has some

    async def told() -> list[tuple[str, str]]:
        done = await asyncio.to_thread(farebox, "check", "--json")
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        return [(r["state"], r["text"]) for r in rows if r["check"] == "pay_to base-sepolia"]

    ((state, text),) = await told()
    assert state == "warn" and "before these books" in text
    asked = await asyncio.to_thread(farebox, "migrate", "--json")
    assert asked.returncode == 0
    assert [state for state, _ in await told()] == ["warn"]  # still nobody has begun to count


def test_a_broken_library(
    farebox: Farebox, tmp_path: Path, chain_net: Devnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No build of safe-pysha3 that computes wrongly can be had: another hash stands in for it."""
    configure(tmp_path, chain_net)
    monkeypatch.setattr(keys, "sha3", SimpleNamespace(keccak_256=sha3.sha3_256))
    code, found = check(farebox)
    ((name, state, text),) = found  # nothing else was asked: it would be asked wrongly
    assert (code, name, state) == (4, "libraries", "fail")
    assert "safe-pysha3" in text and "serve nothing" in text


@pytest.mark.parametrize("module", ["sha3", "coincurve"])
def test_a_library_that_cannot_be_loaded(tmp_path: Path, chain_net: Devnet, module: str) -> None:
    configure(tmp_path, chain_net)
    program = (
        f"import sys; sys.modules['{module}'] = None\n"  # what `import` takes for a missing one
        "from gateway.cli import main; main(['check', '--json'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=60,
    )
    rows: list[Any] = [json.loads(line) for line in done.stdout.splitlines()]
    found = {row["check"]: row for row in rows}
    assert done.returncode == 4, done.stderr
    assert "cannot be loaded" in found["libraries"]["text"]
    assert module in found["libraries"]["text"]


def test_settings_without_effect_are_named(
    farebox: Farebox, tmp_path: Path, chain_net: Devnet
) -> None:
    """Every one of the list, if it is set; none if it is not."""
    configure(tmp_path, chain_net)
    file = tmp_path / "farebox.toml"
    head = """[server]
pages_url = "http://pages.test"
"""
    text = file.read_text(encoding="utf-8")
    told = [warned(farebox)]
    file.write_text(head + text, encoding="utf-8")
    told.append(warned(farebox))
    assert told == [[], sorted(name for _, name in NO_EFFECT)]


def warned(farebox: Farebox) -> list[str]:
    """The fields of the settings that ``check`` says have no effect."""
    rows = [json.loads(line) for line in farebox("check", "--json").stdout.splitlines()]
    keys = [row["text"].split()[0] for row in rows if "has no effect" in row["text"]]
    return sorted(key.rsplit(".")[-1] for key in keys)


def gas_price(farebox: Farebox) -> tuple[int, str, str]:
    """The exit code, and what ``check`` says of gas against price."""
    done = farebox("check", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    (row,) = (row for row in rows if row["check"].startswith("gas price"))
    return done.returncode, row["state"], row["text"]


def test_the_smallest_payment_is_held_against_its_gas(
    farebox: Farebox, tmp_path: Path, chain_net: Devnet
) -> None:
    """Less than three times what a settlement costs is refused, where the coin has a price."""
    chain_net.rpc("anvil_setNextBlockBaseFeePerGas", hex(9 * 10**9))
    chain_net.mine()
    configure(tmp_path, chain_net)
    code, state, text = gas_price(farebox)
    assert (code, state) == (0, "ok")
    assert "set native_usd" in text and "GasPriceOracle" in text
    for usd, least, expected in (
        ("$1", "$0.01", (0, "ok")),
        ("$2000", "$0.01", (4, "fail")),  # a settlement is about $1.80
        ("$200", "$0.50", (4, "fail")),
        ("$200", "$0.60", (0, "ok")),
    ):
        configure(
            tmp_path,
            chain_net,
            chain=f'base-sepolia\nnative_usd = "{usd}"\nmin_onchain = "{least}"',
        )
        code, state, text = gas_price(farebox)
        assert (code, state) == expected, text
        assert f"min_onchain is {least}" in text


def test_data_on_l1_counts_beside_gas(farebox: Farebox, tmp_path: Path, chain_net: Devnet) -> None:
    plant(chain_net, 900 * 10**9)
    configure(tmp_path, chain_net)
    _, state, text = gas_price(farebox)
    with_data = int(text.split()[3])
    assert state == "ok" and "L1" not in text
    plant(chain_net, 900 * 10**9, mood=3)
    _, state, text = gas_price(farebox)
    assert state == "ok" and "without its data on L1" in text  # of a test network
    assert int(text.split()[3]) < with_data
