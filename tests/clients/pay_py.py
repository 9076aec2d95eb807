"""The official Python x402 client, wrapped as its README says, with nothing but a key.

    python pay_py.py URL PRIVATE_KEY [METHOD] [BODY] [COUNT]

Prints one JSON line a call: status, headers of interest and body, or the error.
"""

import asyncio
import json
import sys

from eth_account import Account
from x402 import x402Client
from x402.http.clients import x402HttpxClient
from x402.mechanisms.evm import EthAccountSigner
from x402.mechanisms.evm.exact.register import register_exact_evm_client

INTEREST = (
    "payment-required",
    "payment-response",
    "x-payment-response",
    "retry-after",
    "content-type",
    "cache-control",
    "farebox-paid-from",
    "farebox-charged",
    "farebox-balance",
    "farebox-held",
    "farebox-request-id",
    "farebox-replayed",
    "farebox-credential",
)


def main(url: str, key: str, *arguments: str) -> None:
    client = x402Client()
    register_exact_evm_client(client, EthAccountSigner(Account.from_key(key)))
    asyncio.run(call(client, url, *arguments))


async def call(
    client: x402Client, url: str, method: str = "GET", body: str = "", count: str = "1"
) -> None:
    content = {"content": body.encode(), "headers": {"Content-Type": "application/json"}}
    async with x402HttpxClient(client, timeout=60) as http:
        for _ in range(int(count)):
            try:
                answer = await http.request(method, url, **(content if body else {}))
            except Exception as error:  # whatever the client throws is the result
                line = {"error": f"{type(error).__name__}: {error}"}
            else:
                found = {n: answer.headers[n] for n in INTEREST if n in answer.headers}
                line = {"status": answer.status_code, "headers": found, "body": answer.text}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
