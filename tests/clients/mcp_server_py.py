"""An MCP server made with the official SDK: sessions, answers as streams, a GET stream.

python mcp_server_py.py PORT
"""

import sys
from weakref import WeakKeyDictionary

from mcp.server.fastmcp import Context, FastMCP

server = FastMCP("official", host="127.0.0.1", port=int(sys.argv[1]), log_level="ERROR")


visits: WeakKeyDictionary[object, int] = WeakKeyDictionary()


@server.tool()
async def visit(ctx: Context) -> str:
    """Counts the calls of a session."""
    visits[ctx.session] = visits.get(ctx.session, 0) + 1
    return f"visit {visits[ctx.session]}"


@server.tool()
async def search(q: str, ctx: Context) -> str:
    """Looks a word up."""
    await ctx.info(f"looking for {q}")
    return f"{q}: found by the official server"


@server.tool()
async def fail() -> str:
    """Always fails."""
    raise ValueError("it failed, as always")


if __name__ == "__main__":
    server.run(transport="streamable-http")
