"""The local chain: real USDC, one clear line on a fault, no process left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account as Signer

from anvil import multicall3, usdc
from anvil.devnet import CHAIN_ID, Account, Devnet, DevnetError, Options, devnet, running
from anvil.process import find_binary, tied
from chain.eth import bytes_tail, selector, uint_word
from chain.networks import NETWORKS
from tests.fixtures_chain import USDC, payment, typed_data
from wallet_auth.keys import address_of, address_word, checksum, keccak256, private_key

ROOT = Path(__file__).parents[2]


# --- what stands on it ----------------------------------------------------------------------


def test_it_says_what_it_is(chain_net: Devnet) -> None:
    told = json.loads(json.dumps(chain_net.public()))
    assert told.keys() == {"rpc_url", "chain_id", "caip2", "usdc", "accounts", "settler"}
    assert (told["chain_id"], told["caip2"]) == (CHAIN_ID, "eip155:84532") == (84532, told["caip2"])
    assert told["usdc"] == "0x036CbD53842c5426634e7929541eC2318f3dCF7e"
    assert told["usdc"].lower() == NETWORKS["base-sepolia"].usdc.address
    assert len(told["accounts"]) == 10
    for account in told["accounts"]:
        assert account.keys() == {"address", "private_key", "usdc_units"}
        assert checksum(address_of(private_key(account["private_key"]))) == account["address"]
        assert account["usdc_units"] == 10**12
        assert chain_net.balance_units(account["address"].lower()) == 10**12
    settler = told["settler"]
    assert settler.keys() == {"address", "private_key"}
    assert chain_net.balance_units(settler["address"].lower()) == 0
    assert int(chain_net.rpc("eth_getBalance", settler["address"], "latest"), 16) > 10**18
    assert int(chain_net.rpc("eth_chainId"), 16) == 84532


def test_keys_are_not_shown(chain_net: Devnet) -> None:
    assert chain_net.accounts[0].private_key not in repr(chain_net)


def _read(net: Devnet, data: bytes, to: str = USDC.address) -> bytes:
    answer: str = net.rpc("eth_call", {"to": to, "data": "0x" + data.hex()}, "latest")
    return bytes.fromhex(answer[2:])


def test_the_proxy_has_its_true_slots(chain_net: Devnet) -> None:
    admin = usdc.PROXY_ADMIN
    for name, expected in (("implementation()", usdc.IMPLEMENTATION), ("admin()", admin)):
        # These two answer everybody; the rest of the proxy's own methods the admin only.
        assert _read(chain_net, selector(name)) == address_word(expected)
    chain_net.rpc("anvil_impersonateAccount", admin)
    chain_net.rpc("anvil_setBalance", admin, hex(10**18))
    upgrade = selector("upgradeTo(address)") + address_word(multicall3.ADDRESS)
    chain_net.send(admin, USDC.address, "0x" + upgrade.hex())
    assert _read(chain_net, selector("implementation()")) == address_word(multicall3.ADDRESS)
    chain_net.rpc("anvil_stopImpersonatingAccount", admin)


def test_every_role_is_filled(chain_net: Devnet) -> None:
    role = address_word(chain_net.operator.address)
    for name in ("owner()", "masterMinter()", "pauser()", "blacklister()"):
        assert _read(chain_net, selector(name)) == role
    for call in (
        "initialize(string,string,string,uint8,address,address,address,address)",
        "initializeV2(string)",
    ):
        with pytest.raises(DevnetError):
            _read(chain_net, selector(call) + uint_word(32) * 8 + bytes(256))


def test_multicall3_is_the_committed_code(chain_net: Devnet) -> None:
    code = bytes.fromhex(chain_net.rpc("eth_getCode", multicall3.ADDRESS, "latest")[2:])
    assert code == multicall3.CODE
    assert "0x" + keccak256(code).hex() == multicall3.CODE_HASH
    assert multicall3.ADDRESS == "0xca11bde05977b3631167028862be2a173976ca11"
    answer = _read(chain_net, selector("getChainId()"), multicall3.ADDRESS)
    assert answer == uint_word(CHAIN_ID)


def _authorization_call(form: dict[str, Any], *, as_bytes: bool) -> str:
    auth = form["authorization"]
    words = (
        address_word(auth["from"])
        + address_word(auth["to"])
        + b"".join(uint_word(int(auth[n])) for n in ("value", "validAfter", "validBefore"))
        + bytes.fromhex(auth["nonce"][2:])
    )
    name = "transferWithAuthorization(address,address,uint256,uint256,uint256,bytes32,"
    sig = bytes.fromhex(form["signature"][2:])
    if as_bytes:
        call = selector(name + "bytes)") + words + uint_word(7 * 32) + bytes_tail(sig)
    else:
        call = selector(name + "uint8,bytes32,bytes32)") + words + uint_word(sig[64]) + sig[:64]
    return "0x" + call.hex()


def _refused(net: Devnet, sender: Account, data: str) -> str:
    """Send what must fail: it is included, moves nothing, and this is why."""
    receipt = net.receipt(net.send(sender.address, USDC.address, data))
    assert receipt["status"] == "0x0" and receipt["logs"] == []
    call = {"from": sender.address, "to": USDC.address, "data": data}
    with pytest.raises(DevnetError) as error:
        net.rpc("eth_call", call, "latest")
    return str(error.value)


def _payee() -> str:
    return "0x" + os.urandom(20).hex()


@pytest.mark.parametrize("as_bytes", [True, False])
def test_both_overloads_move_money_once(chain_net: Devnet, as_bytes: bool) -> None:
    payee = _payee()
    call = _authorization_call(payment(chain_net.accounts[0], payee, 77), as_bytes=as_bytes)
    chain_net.send(chain_net.settler.address, USDC.address, call)
    assert chain_net.balance_units(payee) == 77
    assert "authorization is used or canceled" in _refused(chain_net, chain_net.settler, call)
    assert chain_net.balance_units(payee) == 77


def test_paused_and_blacklisted(chain_net: Devnet) -> None:
    me, payee = chain_net.accounts[0].address, _payee()
    chain_net.pause()
    move = usdc.transfer_call(payee, 5)
    assert "Pausable: paused" in _refused(chain_net, chain_net.accounts[0], move)
    chain_net.pause(False)
    chain_net.blacklist(me)
    assert "account is blacklisted" in _refused(chain_net, chain_net.accounts[0], move)
    chain_net.blacklist(me, False)
    chain_net.transfer(me, payee, 5)
    chain_net.mint(payee, 6)
    assert chain_net.balance_units(payee) == 11
    with pytest.raises(DevnetError, match="mint amount not greater than 0"):
        chain_net.mint(payee, 0)


def test_permit_gives_an_allowance(chain_net: Devnet) -> None:
    owner, spender = chain_net.accounts[0], chain_net.accounts[1]
    data = typed_data(owner.address, spender.address, 0, nonce="0x" + "00" * 32)
    names = ("owner", "spender", "value", "nonce", "deadline")
    del data["types"]["TransferWithAuthorization"]
    data["types"]["Permit"] = [
        {"name": name, "type": "address" if name in ("owner", "spender") else "uint256"}
        for name in names
    ]
    values = (owner.address, spender.address, 9, 0, 2**40)
    data |= {"primaryType": "Permit", "message": dict(zip(names, values, strict=True))}
    signed = Signer.sign_typed_data(owner.private_key, full_message=data)
    call = (
        selector("permit(address,address,uint256,uint256,uint8,bytes32,bytes32)")
        + address_word(owner.address)
        + address_word(spender.address)
        + b"".join(uint_word(n) for n in (9, 2**40, signed.v, signed.r, signed.s))
    )
    chain_net.send(chain_net.settler.address, USDC.address, "0x" + call.hex())
    allowance = selector("allowance(address,address)") + address_word(owner.address)
    assert _read(chain_net, allowance + address_word(spender.address)) == uint_word(9)


# --- how it is started ----------------------------------------------------------------------


async def test_as_an_async_context_with_choices() -> None:
    options = Options(holders=2, holder_units=7, mining=False, slots_in_an_epoch=1, chain_id=31337)
    async with devnet(options=options) as net:
        assert net.caip2 == "eip155:31337" and len(net.accounts) == 2
        assert [account.usdc_units for account in net.accounts] == [7, 7]
        before = net.rpc("eth_blockNumber")
        tx_hash = net.transfer(net.accounts[0].address, net.accounts[1].address, 3)
        assert net.rpc("eth_blockNumber") == before
        net.mine(3)
        assert net.receipt(tx_hash)["status"] == "0x1"
        final = net.rpc("eth_getBlockByNumber", "finalized", False)
        assert int(final["number"], 16) > int(before, 16)
        pid = net.pid
    assert not _alive(pid)


def test_blocks_by_the_clock() -> None:
    with running(options=Options(holders=1, block_time_s=1)) as net:
        tx_hash = net.transfer(net.accounts[0].address, net.settler.address, 3)
        _until(lambda: net.rpc("eth_getTransactionReceipt", tx_hash) is not None)


def test_further_arguments_reach_anvil() -> None:
    with running(options=Options(holders=1, extra=["--gas-limit", "12345678"])) as net:
        block = net.rpc("eth_getBlockByNumber", "latest", False)
        assert int(block["gasLimit"], 16) == 12_345_678


def test_the_chains_clock_does_not_run_ahead(chain_net: Devnet) -> None:
    with running(options=Options(holders=10)) as net:
        block = net.rpc("eth_getBlockByNumber", "latest", False)
        assert int(block["number"], 16) == 1  # all set-up in one block
        assert int(block["timestamp"], 16) <= time.time() + 1


@pytest.mark.parametrize("chain_id", [1, 10, 137, 8453, 42161, 43114, 56, 100])
def test_the_id_of_a_real_network_is_refused(chain_id: int) -> None:
    with (
        pytest.raises(DevnetError, match="not a test network"),
        running(options=Options(chain_id=chain_id)),
    ):
        pass


@pytest.mark.parametrize("extra", ["--chain-id=8453", "--host=0.0.0.0", "-p", "--accounts"])
def test_our_own_arguments_cannot_be_overridden(extra: str) -> None:
    with (
        pytest.raises(DevnetError, match="cannot be given"),
        running(options=Options(extra=[extra])),
    ):
        pass


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DevnetError) as error, running(port):
            pass
    assert str(error.value) == f"port {port} is in use: choose another one, or 0"


def test_a_missing_install_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DevnetError) as error, running(options=Options(node_modules=tmp_path)):
        pass
    assert "make install" in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DevnetError, match=r"anvil for .* run `make install`"):
        find_binary(tmp_path)
    installed = tmp_path / "anvil"
    installed.write_text("#!/bin/sh\n")
    installed.chmod(0o755)
    assert find_binary(tmp_path) == installed  # Foundry's own, where npm has none


def test_an_anvil_that_stops_at_once_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(DevnetError, match=r"anvil stopped at once: .*--no-such-thing"),
        running(options=Options(extra=["--no-such-thing"])),
    ):
        pass


# --- nothing is left behind -----------------------------------------------------------------


def _alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped by the system does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline, "it did not come about in 20 s"
        time.sleep(0.01)


_RUN = "from anvil.devnet import run; run(json=True)"
_SERVE = "import sys; from anvil.devnet import run; run(int(sys.argv[1]))"


@pytest.fixture
def serving() -> Iterator[tuple[subprocess.Popen[str], dict[str, Any], int]]:
    """``run`` in a process of its own, the JSON it printed, and the pid of its anvil."""
    child = subprocess.Popen(
        [sys.executable, "-c", _RUN], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    try:
        told = json.loads(child.stdout.readline())
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        assert len(children) == 1  # the binary itself, no wrapper
        assert "anvil" in Path(f"/proc/{children[0]}/cmdline").read_text()
        yield child, told, int(children[0])
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; the promise is Linux's")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_anvil_ends_with_its_parent(
    serving: tuple[subprocess.Popen[str], dict[str, Any], int], number: signal.Signals
) -> None:
    child, told, pid = serving
    assert _alive(pid) and told["chain_id"] == 84532
    child.send_signal(number)
    status = child.wait(20)
    assert status == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    _until(lambda: not _alive(pid))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; the promise is Linux's")
def test_a_parent_without_any_handler_takes_anvil_along() -> None:
    script = (
        "import time\nfrom anvil.devnet import running\n"
        "with running() as net:\n    print(net.pid, flush=True)\n    time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        assert _alive(pid)
        child.terminate()
        assert child.wait(20) == -signal.SIGTERM
        _until(lambda: not _alive(pid))
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the promise is Linux's")
def test_a_child_whose_parent_is_gone_already_starts_nothing(tmp_path: Path) -> None:
    """The parent can die before the kernel is told whom to watch; then nobody would tell us."""
    begun = tmp_path / "begun"
    command = tied(["/bin/sh", "-c", f"touch {begun}"])
    assert subprocess.run(command, check=False).returncode == 0 and begun.exists()
    begun.unlink()
    orphan = [word if word != str(os.getpid()) else "1" for word in command]
    assert orphan != command
    assert subprocess.run(orphan, check=False).returncode == 1 and not begun.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_anvil_that_dies_is_reported(
    serving: tuple[subprocess.Popen[str], dict[str, Any], int],
) -> None:
    child, _, pid = serving
    os.kill(pid, signal.SIGKILL)
    assert child.wait(20) == 1


def test_people_get_lines_to_read(free_port: Callable[[], int]) -> None:
    port = free_port()
    child = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        first = child.stdout.readline()
        assert f"http://127.0.0.1:{port}" in first and checksum(USDC.address) in first
        child.send_signal(signal.SIGINT)
        rest = child.stdout.read()
        assert "settler" in rest and "never use them" in rest
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def test_no_file_of_a_run_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with running(options=Options(holders=1)):
        assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(DevnetError),
        running(options=Options(holders=1, extra=["--no-such-thing"])),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_chain_leaves_no_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anvil keeps old states on disk, below the user's home, and removes them on a clean end."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with running(options=Options(holders=1)) as net:
        net.mine(600)
        assert net.balance_units(net.accounts[0].address) > 0
        os.kill(net.pid, signal.SIGKILL)
        _until(lambda: not _alive(net.pid))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
