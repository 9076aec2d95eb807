"""The official Python x402 client with its sign-in-with-x extension, wrapped as its README says.

    python siwx_py.py URL PRIVATE_KEY [METHOD] [BODY] [COUNT]

Prints one JSON line a call, as pay_py.py does.
"""

import asyncio
import sys

from eth_account import Account
from pay_py import call
from x402 import x402Client
from x402.extensions.sign_in_with_x import (
    CreateSIWxClientExtensionOptions,
    create_siwx_client_extension,
)
from x402.mechanisms.evm import EthAccountSigner
from x402.mechanisms.evm.exact.register import register_exact_evm_client


def main(url: str, key: str, *arguments: str) -> None:
    account = Account.from_key(key)
    client = x402Client()
    register_exact_evm_client(client, EthAccountSigner(account))
    options = CreateSIWxClientExtensionOptions(signers=[account])
    client.register_extension(create_siwx_client_extension(options))
    asyncio.run(call(client, url, *arguments))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
