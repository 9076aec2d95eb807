"""The official Python x402 client of a user who pays by Permit2 only: a policy of its own.

    python permit2_py.py URL PRIVATE_KEY [METHOD] [BODY] [COUNT] [RPC_URL]

With RPC_URL it can see its allowance, and signs an EIP-2612 permit where one is taken.
"""

import asyncio
import sys
from typing import Any

from eth_account import Account
from pay_py import call
from x402 import x402Client
from x402.mechanisms.evm import EthAccountSigner
from x402.mechanisms.evm.exact.register import register_exact_evm_client
from x402.mechanisms.evm.signers import EthAccountSignerWithRPC


def only_permit2(_version: int, offers: list[Any]) -> list[Any]:
    return [each for each in offers if (each.extra or {}).get("assetTransferMethod") == "permit2"]


def main(url: str, key: str, *rest: str) -> None:
    method, body, count, rpc_url = (*rest, *("GET", "", "1", "")[len(rest) :])
    account = Account.from_key(key)
    signer = EthAccountSignerWithRPC(account, rpc_url) if rpc_url else EthAccountSigner(account)
    client = x402Client()
    register_exact_evm_client(client, signer, policies=[only_permit2])
    asyncio.run(call(client, url, method, body, count))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
