"""The official MCP client with the official x402 payments for it, as their READMEs say.

    python mcp_py.py URL PRIVATE_KEY TOOL ARGUMENTS [COUNT]

Prints a JSON line with the list of tools, then one a call.
"""

import asyncio
import json
import sys

from eth_account import Account
from mcp import ClientSession
from mcp.client.streamable_http import streamablehttp_client
from x402 import x402Client
from x402.mcp.client import x402MCPSession
from x402.mechanisms.evm import EthAccountSigner
from x402.mechanisms.evm.exact.register import register_exact_evm_client


async def main(url: str, key: str, tool: str, arguments: str, count: str = "1") -> None:
    payer = x402Client()
    register_exact_evm_client(payer, EthAccountSigner(Account.from_key(key)))
    async with (
        streamablehttp_client(url) as (read, write, _),
        ClientSession(read, write) as session,
    ):
        await session.initialize()
        tools = await session.list_tools()
        print(
            json.dumps(
                {"tools": [each.model_dump(mode="json", by_alias=True) for each in tools.tools]}
            )
        )
        client = x402MCPSession(session, payer)
        for _ in range(int(count)):
            got = await client.call_tool(tool, json.loads(arguments))
            paid = got.payment_response
            line = {
                "text": [each.text for each in got.content],
                "error": got.is_error,
                "paid": got.payment_made,
                "response": paid.model_dump(by_alias=True, exclude_none=True) if paid else None,
                "meta": got.raw_result.meta,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    asyncio.run(main(*sys.argv[1:]))
