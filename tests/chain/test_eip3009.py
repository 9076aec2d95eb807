"""EIP-3009 payments: strict forms, the order of the checks, and who signed by whose rules."""

from __future__ import annotations

import time
from typing import Any

import pytest
from eth_account.messages import encode_typed_data
from eth_utils import keccak  # type: ignore[attr-defined]  # re-exported without __all__
from hypothesis import given, settings
from hypothesis import strategies as st

from anvil.devnet import Devnet, Options, running
from chain import sender, transfers
from chain.errors import Rejected, Unavailable
from chain.networks import NETWORKS, Asset
from chain.rpc import Rpc
from chain.schemes import eip3009
from chain.schemes.eip3009 import Authorization
from tests.fixtures_chain import (
    NETWORK,
    USDC,
    FaultyNode,
    deploy,
    payment,
    typed_data,
    wallet_artifact,
)
from tests.fixtures_wallets import SUFFIX, wallets
from wallet_auth.keys import CURVE_ORDER, address_word

PAY_TO = "0x00000000000000000000000000000000000feeed"
BAD_SIGNATURE = "invalid_exact_evm_payload_signature"
ADDRESS = st.integers(1, 2**160 - 1).map(lambda n: f"0x{n:040x}")
UINT = st.integers(0, 2**256 - 1)


def _form(**changed: Any) -> dict[str, Any]:
    """A well-formed payload, with members of the authorization replaced."""
    authorization: dict[str, Any] = {
        "from": "0x" + "11" * 20,
        "to": "0x" + "22" * 20,
        "value": "10000",
        "validAfter": "0",
        "validBefore": "2000000000",
        "nonce": "0x" + "ab" * 32,
    }
    return {"signature": "0x" + "33" * 64 + "1b", "authorization": authorization | changed}


def _without(name: str) -> dict[str, Any]:
    form = _form()
    del form["authorization"][name]
    return form


async def _refusal(rpc: Rpc, auth: Authorization, asset: Asset = USDC) -> Rejected:
    with pytest.raises(Rejected) as error:
        await eip3009.verify(rpc, asset, auth, int(time.time()))
    return error.value


# --- forms ----------------------------------------------------------------------------------


def test_a_payload_becomes_one_canonical_value() -> None:
    form = _form(**{"from": "0x" + "Ab" * 20, "nonce": "0x" + "CD" * 32, "value": "007"})
    form["extra"] = "members beside the two are left alone"
    assert eip3009.parse(form) == Authorization(
        from_="0x" + "ab" * 20,
        to="0x" + "22" * 20,
        value_units=7,
        valid_after_s=0,
        valid_before_s=2_000_000_000,
        nonce="0x" + "cd" * 32,
        signature=bytes.fromhex("33" * 64 + "1b"),
    )


@pytest.mark.parametrize("name", ["value", "validAfter", "validBefore"])
@pytest.mark.parametrize(
    "odd",
    [
        *("", " 1", "1 ", "1\n", "+1", "-1", "0x10", "1_000", "1.0", "1e3", "٣", "１", "1,000"),
        *("9" * 79, str(2**256), 1, 1.0, True, None, ["1"], "NaN"),
    ],
)
def test_numbers_have_one_form(name: str, odd: object) -> None:
    with pytest.raises(Rejected) as error:
        eip3009.parse(_form(**{name: odd}))
    assert error.value.code == "invalid_payload"
    assert name in error.value.detail


@pytest.mark.parametrize(
    "odd",
    [
        *(None, [], "text", 7, {}, {"authorization": {}}, {"authorization": None}),
        *(_without(name) for name in ("from", "to", "value", "validAfter", "validBefore", "nonce")),
        _form(extra="1"),
        *(_form(**{"from": odd}) for odd in ("", "0x12", "0X" + "11" * 20, "11" * 20, 5, None)),
        *(_form(to=odd) for odd in ("0x" + "1g" * 20, "0x" + "11" * 21, "0x" + "11" * 20 + "\n")),
        *(_form(nonce=odd) for odd in ("0x1234", "0x" + "1" * 63, "ab" * 32, 5, None)),
        *(
            _form() | {"signature": odd}
            for odd in (None, "", "0x", "0x1", "0xzz", "11" * 65, 5, "0x" + "11" * 4097)
        ),
        {"authorization": _form()["authorization"]},
    ],
)
def test_odd_forms_are_malformed(odd: object) -> None:
    with pytest.raises(Rejected) as error:
        eip3009.parse(odd)
    assert error.value.code == "invalid_payload"


def test_the_parity_form_of_v_is_rewritten_only_on_signatures_of_keys() -> None:
    def parsed(signature: bytes) -> bytes:
        return eip3009.parse(_form() | {"signature": "0x" + signature.hex()}).signature

    rs = bytes.fromhex("33" * 64)
    assert parsed(rs + b"\0") == rs + b"\x1b"
    assert parsed(rs + b"\1") == rs + b"\x1c"
    assert parsed(rs + b"\x1c") == rs + b"\x1c"
    assert parsed(rs + b"\x25") == rs + b"\x25"  # never guessed at
    approved_hash = bytes.fromhex("11" * 32) + bytes(32) + b"\1"  # a form of Safe wallets
    assert parsed(approved_hash) == approved_hash
    assert parsed(rs + b"\1\0") == rs + b"\1\0"


@settings(deadline=None)
@given(ADDRESS, ADDRESS, UINT, st.tuples(UINT, UINT), st.binary(min_size=32, max_size=32))
def test_the_digest_is_the_one_of_eth_account(
    from_: str, to: str, value: int, window: tuple[int, int], nonce: bytes
) -> None:
    after, before = window
    data = typed_data(
        from_,
        to,
        value,
        nonce="0x" + nonce.hex(),
        valid_after_s=after,
        valid_before_s=before,
    )
    auth = Authorization(from_, to, value, after, before, "0x" + nonce.hex(), b"\1")
    message = encode_typed_data(full_message=data)
    theirs = keccak(b"\x19" + message.version + message.header + message.body)
    assert eip3009.digest(NETWORK, USDC, auth) == theirs


# --- what was asked for ---------------------------------------------------------------------


def _auth(**changed: Any) -> Authorization:
    return eip3009.parse(_form(to=PAY_TO, **changed))


@pytest.mark.parametrize(
    ("auth", "code"),
    [
        # Everything is wrong in the first and each next one has one fault less: the order.
        (
            eip3009.parse(_form(value="1", validBefore="5", validAfter="2000")),
            "invalid_exact_evm_payload_recipient_mismatch",
        ),
        (
            _auth(value="1", validBefore="5", validAfter="2000"),
            "invalid_exact_evm_payload_authorization_value_mismatch",
        ),
        (
            _auth(validBefore="5", validAfter="2000"),
            "invalid_exact_evm_payload_authorization_valid_before",
        ),
        (_auth(validAfter="2000"), "invalid_exact_evm_payload_authorization_valid_after"),
    ],
)
def test_checks_come_in_the_official_order(auth: Authorization, code: str) -> None:
    with pytest.raises(Rejected) as error:
        eip3009.check(auth, pay_to=PAY_TO, amount_units=10_000, now_s=1_000)
    assert error.value.code == code


def test_the_edges_of_amount_and_time() -> None:
    def ok(auth: Authorization, amount_units: int | None = 10_000) -> bool:
        try:
            eip3009.check(
                auth,
                pay_to=PAY_TO.upper().replace("X", "x"),
                amount_units=amount_units,
                now_s=1_000,
            )
        except Rejected:
            return False
        return True

    assert ok(_auth())
    assert ok(_auth(value="9999")) is ok(_auth(value="10001")) is False
    assert ok(_auth(value="1"), None) and not ok(_auth(value="0"), None)
    assert ok(_auth(validBefore="1006")) and not ok(_auth(validBefore="1005"))
    assert ok(_auth(validAfter="1000")) and not ok(_auth(validAfter="1001"))


# --- who signed -----------------------------------------------------------------------------


async def test_a_key_signs_in_both_forms_of_v(chain_net: Devnet, rpc: Rpc) -> None:
    form = payment(chain_net.accounts[0], PAY_TO, 1)
    raw = bytes.fromhex(form["signature"][2:])
    parity = form | {"signature": "0x" + (raw[:64] + bytes([raw[64] - 27])).hex()}
    assert eip3009.parse(parity) == eip3009.parse(form)
    assert await eip3009.verify(rpc, USDC, eip3009.parse(parity), int(time.time())) == "key"


async def test_the_malleated_twin_is_refused_before_anything_is_run(
    chain_net: Devnet, faulty_node: FaultyNode
) -> None:
    form = payment(chain_net.accounts[0], PAY_TO, 1)
    raw = bytes.fromhex(form["signature"][2:])
    high_s = CURVE_ORDER - int.from_bytes(raw[32:64], "big")
    twin = raw[:32] + high_s.to_bytes(32, "big") + bytes([55 - raw[64]])
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        for form_of_v in (twin, twin[:64] + bytes([twin[64] - 27])):
            auth = eip3009.parse(form | {"signature": "0x" + form_of_v.hex()})
            assert (await _refusal(client, auth)).code == BAD_SIGNATURE
        assert "eth_call" not in faulty_node.asked
    finally:
        await client.close()


@pytest.mark.parametrize(
    "other",
    [
        {"name": "USD Coin"},
        {"chain_id": 8453},
        {"asset": "0x" + "99" * 20},
    ],
)
async def test_a_signature_for_another_domain_is_refused(
    chain_net: Devnet, rpc: Rpc, other: dict[str, Any]
) -> None:
    auth = eip3009.parse(payment(chain_net.accounts[0], PAY_TO, 1, **other))
    assert (await _refusal(rpc, auth)).code == BAD_SIGNATURE


async def test_another_key_and_a_strange_length_are_refused(chain_net: Devnet, rpc: Rpc) -> None:
    me, other = chain_net.accounts[:2]
    form = payment(other, PAY_TO, 1, from_=me.address)
    assert (await _refusal(rpc, eip3009.parse(form))).code == BAD_SIGNATURE
    longer = form | {"signature": payment(me, PAY_TO, 1)["signature"] + "00"}
    refusal = await _refusal(rpc, eip3009.parse(longer))
    assert refusal.code == BAD_SIGNATURE and "65 bytes" in refusal.detail


async def test_a_wrapper_is_no_part_of_the_payment(chain_net: Devnet, rpc: Rpc) -> None:
    """With or without (ERC-6492) it is one value, and the token sees what was in the wrapper."""
    made = wallets(chain_net)
    bare = made.pay(PAY_TO, 7)
    wrapped = eip3009.parse(made.wrap(bare))
    assert wrapped == eip3009.parse(bare) and wrapped.wrapper is not None
    assert eip3009.transfer_calldata(wrapped) == eip3009.transfer_calldata(eip3009.parse(bare))
    refusal = await _refusal(rpc, wrapped)
    assert refusal.code == "invalid_exact_evm_payload_undeployed_smart_wallet"
    assert (await _refusal(rpc, eip3009.parse(bare))).code == BAD_SIGNATURE
    made.deploy()
    assert await eip3009.verify(rpc, USDC, wrapped, int(time.time())) == "contract"
    before = chain_net.balance_units(PAY_TO)
    data = "0x" + eip3009.transfer_calldata(wrapped).hex()
    chain_net.send(chain_net.settler.address, USDC.address, data)
    assert chain_net.balance_units(PAY_TO) == before + 7


async def test_a_keys_own_signature_may_be_wrapped(chain_net: Devnet, rpc: Rpc) -> None:
    """As long as the key has no code the token asks nobody else. The parity is written as 27 or 28
    inside a wrapper too."""
    made = wallets(chain_net)
    form = payment(made.owner, PAY_TO, 1)
    old = form | {
        "signature": form["signature"][:-2] + f"{int(form['signature'][-2:], 16) - 27:02x}"
    }
    for each in (form, old):
        assert (
            await eip3009.verify(rpc, USDC, eip3009.parse(made.wrap(each)), int(time.time()))
            == "key"
        )


def test_a_malformed_wrapper_is_refused_where_it_is_read() -> None:
    signature = bytes.fromhex("11" * 96) + SUFFIX
    with pytest.raises(Rejected, match="ERC-6492") as error:
        eip3009.parse(_form() | {"signature": "0x" + signature.hex()})
    assert error.value.code == BAD_SIGNATURE


def _wallet_of(net: Devnet, owner: str) -> str:
    code = wallet_artifact("MockERC1271Wallet")["bytecode"] + address_word(owner).hex()
    wallet = deploy(net, owner, code)
    net.mint(wallet, 1_000_000)
    return wallet


async def test_a_contract_wallet_signs_by_erc1271_only(chain_net: Devnet, rpc: Rpc) -> None:
    owner, stranger = chain_net.accounts[:2]
    wallet = _wallet_of(chain_net, owner.address)
    now_s = int(time.time())
    auth = eip3009.parse(payment(owner, PAY_TO, 5, from_=wallet))
    assert await eip3009.verify(rpc, USDC, auth, now_s) == "contract"
    assert await eip3009.account_kind(rpc, wallet) == "contract"
    assert await eip3009.account_kind(rpc, owner.address) == "key"
    refusal = await _refusal(rpc, eip3009.parse(payment(stranger, PAY_TO, 5, from_=wallet)))
    assert refusal.code == BAD_SIGNATURE
    too_much = eip3009.parse(payment(owner, PAY_TO, 1_000_001, from_=wallet))
    assert (await _refusal(rpc, too_much)).code == "insufficient_funds"

    tx_hash = chain_net.send(
        chain_net.settler.address, USDC.address, "0x" + eip3009.transfer_calldata(auth).hex()
    )
    found = await transfers.transfers_of(rpc, tx_hash, USDC, PAY_TO)
    assert found is not None and [t.authorizer for t in found] == [wallet]


async def test_a_signature_of_another_length_goes_by_the_bytes_overload(
    chain_net: Devnet, rpc: Rpc
) -> None:
    wallet = "0x" + "c0" * 20
    artifact = wallet_artifact("MockERC1271WalletWithCustomValidation")
    chain_net.rpc("anvil_setCode", wallet, artifact["deployedBytecode"])
    chain_net.mint(wallet, 10)
    form = payment(chain_net.accounts[0], PAY_TO, 5, from_=wallet)
    form["signature"] = "0x" + "01" * 70
    auth = eip3009.parse(form)
    assert (await _refusal(rpc, auth)).code == BAD_SIGNATURE
    chain_net.rpc("anvil_setStorageAt", wallet, "0x0", f"0x{1 << 160:064x}")  # it says yes now
    assert await eip3009.verify(rpc, USDC, auth, int(time.time())) == "contract"
    data = "0x" + eip3009.transfer_calldata(auth).hex()
    tx_hash = chain_net.send(chain_net.settler.address, USDC.address, data)
    found = await transfers.transfers_of(rpc, tx_hash, USDC, PAY_TO)
    assert found is not None and [t.value_units for t in found] == [5]


async def test_a_delegated_key_signs_by_its_code_and_keeps_its_account(
    chain_net: Devnet, rpc: Rpc
) -> None:
    """EIP-7702: the token sees code, so a good signature of the key itself counts for nothing."""
    payer, owner = chain_net.accounts[2:4]
    wallet = deploy(
        chain_net,
        owner.address,
        wallet_artifact("MockERC1271Wallet")["bytecode"] + address_word(owner.address).hex(),
    )
    chain_net.rpc("anvil_setCode", payer.address, "0xef0100" + wallet[2:])
    chain_net.rpc(
        "anvil_setStorageAt", payer.address, "0x0", "0x" + address_word(owner.address).hex()
    )
    by_key = eip3009.parse(payment(payer, PAY_TO, 5))
    assert (await _refusal(rpc, by_key)).code == BAD_SIGNATURE
    by_code = eip3009.parse(payment(owner, PAY_TO, 5, from_=payer.address))
    assert await eip3009.verify(rpc, USDC, by_code, int(time.time())) == "contract"
    assert await eip3009.account_kind(rpc, payer.address) == "key"


async def test_a_wallet_that_burns_gas_is_cut_off(chain_net: Devnet, rpc: Rpc) -> None:
    wallet = "0x" + "d0" * 20
    chain_net.rpc("anvil_setCode", wallet, "0x5b600056")  # JUMPDEST PUSH1 0 JUMP, for ever
    auth = eip3009.parse(payment(chain_net.accounts[0], PAY_TO, 5, from_=wallet))
    assert (await _refusal(rpc, auth)).code == BAD_SIGNATURE


async def test_a_token_that_looks_at_no_signature_is_not_relied_on(
    chain_net: Devnet, rpc: Rpc
) -> None:
    lax = Asset("0x" + "aa" * 20, "USDC", 6, "USDC", "2")
    chain_net.rpc("anvil_setCode", lax.address, "0x00")  # STOP: every call succeeds
    owner, stranger = chain_net.accounts[:2]
    wallet = _wallet_of(chain_net, owner.address)
    form = payment(stranger, PAY_TO, 5, from_=wallet, asset=lax.address)
    assert (await _refusal(rpc, eip3009.parse(form), lax)).code == BAD_SIGNATURE
    form = payment(owner, PAY_TO, 5, from_=wallet, asset=lax.address)
    assert await eip3009.verify(rpc, lax, eip3009.parse(form), int(time.time())) == "contract"


async def test_everything_is_run_with_a_gas_cap(chain_net: Devnet, faulty_node: FaultyNode) -> None:
    owner = chain_net.accounts[0]
    wallet = _wallet_of(chain_net, owner.address)
    client = Rpc(NETWORK, [faulty_node.url])
    try:
        for from_ in (owner.address, wallet):
            auth = eip3009.parse(payment(owner, PAY_TO, 5, from_=from_))
            await eip3009.verify(client, USDC, auth, int(time.time()))
    finally:
        await client.close()
    calls = [seen["params"][0] for seen in faulty_node.seen if seen["method"] == "eth_call"]
    assert len(calls) == 3
    assert all(int(call["gas"], 16) <= eip3009.SIMULATION_GAS for call in calls)


# --- what the chain says --------------------------------------------------------------------


async def test_the_tokens_own_refusals_have_their_codes(chain_net: Devnet, rpc: Rpc) -> None:
    payer = chain_net.accounts[0]
    auth = eip3009.parse(payment(payer, PAY_TO, 5))
    chain_net.pause()
    assert (await _refusal(rpc, auth)).code == "asset_paused"
    chain_net.pause(False)
    for blocked in (payer.address, PAY_TO):
        chain_net.blacklist(blocked)
        assert (await _refusal(rpc, auth)).code == "payer_blocked"
        chain_net.blacklist(blocked, False)
    too_much = eip3009.parse(payment(payer, PAY_TO, payer.usdc_units + 1))
    assert (await _refusal(rpc, too_much)).code == "insufficient_funds"
    late = eip3009.parse(payment(payer, PAY_TO, 5, valid_before_s=1))
    assert (
        await _refusal(rpc, late)
    ).code == "invalid_exact_evm_payload_authorization_valid_before"
    early = eip3009.parse(payment(payer, PAY_TO, 5, valid_after_s=2**40))
    assert (
        await _refusal(rpc, early)
    ).code == "invalid_exact_evm_payload_authorization_valid_after"
    assert await eip3009.verify(rpc, USDC, auth, int(time.time())) == "key"


async def test_an_idle_chain_whose_clock_lags_does_not_refuse(chain_net: Devnet) -> None:
    """Version 1 clients sign validAfter = now - 600; the newest block can be older than that."""
    with running(options=Options(holders=1)) as net:
        client = Rpc(NETWORK, [net.rpc_url])
        try:
            newest_s = int(net.rpc("eth_getBlockByNumber", "latest", False)["timestamp"], 16)
            net.rpc("evm_increaseTime", 1_000)  # of the next block; the newest one stays old
            form = payment(net.accounts[0], PAY_TO, 5, valid_after_s=newest_s + 500)
            auth, now_s = eip3009.parse(form), newest_s + 1_000
            assert await eip3009.verify(client, USDC, auth, now_s) == "key"
            data = eip3009.transfer_calldata(auth)
            fees = await sender.fees(client, net.settler.address, USDC.address, data)
            key = net.settler.private_key
            prepared = sender.sign(key, net.chain_id, fees.nonce, USDC.address, data, fees)
            await sender.broadcast(client, prepared.raw)
            receipt = await sender.wait(client, prepared.tx_hash, 10)
            assert receipt is not None and receipt.succeeded
            broke = payment(net.settler, PAY_TO, 5, valid_after_s=newest_s + 500)
            with pytest.raises(Rejected) as error:
                await eip3009.verify(client, USDC, eip3009.parse(broke), now_s)
            assert error.value.code == "insufficient_funds"
        finally:
            await client.close()


async def test_a_token_that_is_not_there_moves_nothing(chain_net: Devnet, rpc: Rpc) -> None:
    """A call to an empty address succeeds; that once passed for a settlement elsewhere."""
    ghost = Asset("0x" + "99" * 20, "USDC", 6, "USDC", "2")
    auth = eip3009.parse(payment(chain_net.accounts[0], PAY_TO, 5, asset=ghost.address))
    with pytest.raises(Unavailable):
        await eip3009.verify(rpc, ghost, auth, int(time.time()))


async def test_a_chain_that_cannot_be_asked_is_no_verdict(
    chain_net: Devnet, faulty_node: FaultyNode
) -> None:
    auth = eip3009.parse(payment(chain_net.accounts[0], PAY_TO, 5))
    for method in ("eth_getCode", "eth_call"):
        faulty_node.faults.clear()
        faulty_node.fault(method, "status", 503)
        client = Rpc(NETWORK, [faulty_node.url])
        try:
            with pytest.raises(Unavailable):
                await eip3009.verify(client, USDC, auth, int(time.time()))
        finally:
            await client.close()


async def test_a_signature_for_this_chain_is_nothing_on_base(chain_net: Devnet) -> None:
    auth = eip3009.parse(payment(chain_net.accounts[0], PAY_TO, 5))
    base = NETWORKS["base"]
    assert eip3009.digest(base, base.usdc, auth) != eip3009.digest(NETWORK, USDC, auth)
