"""The official Python x402 client with the scheme upto registered beside exact.

    python pay_upto.py URL PRIVATE_KEY [METHOD] [BODY] [COUNT]

Prints what pay_py.py prints.
"""

import asyncio
import sys

from eth_account import Account
from pay_py import call
from x402 import x402Client
from x402.mechanisms.evm import EthAccountSigner
from x402.mechanisms.evm.exact.register import register_exact_evm_client
from x402.mechanisms.evm.upto.client import UptoEvmScheme


def main(url: str, key: str, *arguments: str) -> None:
    signer = EthAccountSigner(Account.from_key(key))
    client = x402Client()
    register_exact_evm_client(client, signer)
    client.register("eip155:*", UptoEvmScheme(signer))
    asyncio.run(call(client, url, *arguments))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
