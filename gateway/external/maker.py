"""A new wallet for an agent that has none. Whoever runs this gateway could keep its key."""

from __future__ import annotations

from typing import Any, Final

_WORDS: Final = 12
_PATH: Final = "m/44'/60'/0'/0/0"


def make() -> dict[str, Any]:
    """Address, private key and mnemonic (BIP-39; BIP-44's first account). Kept nowhere."""
    from eth_account import Account

    Account.enable_unaudited_hdwallet_features()
    account, words = Account.create_with_mnemonic(num_words=_WORDS, account_path=_PATH)
    return {
        "address": account.address,
        "wallet_address": account.address,
        "private_key": "0x" + bytes(account.key).hex(),
        "mnemonic": words,
        "warning": "Shown once. The gateway keeps none of this; whoever runs it could have.",
    }
