"""What a rollup of the OP stack takes for the data that it posts on L1, besides gas.

Each transaction pays by its size, as compressed. ``GasPriceOracle``, a predeploy at one address on
every such chain, says the most that a size can cost now (``getL1FeeUpperBound``, of the Fjord
upgrade of 2024; OP stack specification, "L1-Cost fees"). What a transaction did pay stands in its
receipt (``l1Fee``).
"""

from __future__ import annotations

import asyncio
from typing import Final

from chain.errors import ChainError, Unavailable
from chain.eth import selector, uint_word
from chain.rpc import Rpc

ORACLE: Final = "0x420000000000000000000000000000000000000f"
MISSING: Final = "l1_oracle_missing"
UNKNOWN: Final = "l1_fee_unknown"
MOST_BYTE_WEI: Final = 16 * 1_000 * 10**9
"""A byte of calldata on L1 itself at 1,000 gwei: nobody who posts it compressed pays so much."""
WAIT_S: Final = 2
_GAS: Final = 300_000
# The fee is a line over the size, but for a constant that is small against so many bytes.
_SAMPLE_BYTES: Final = 10_000
_UPPER_BOUND: Final = selector("getL1FeeUpperBound(uint256)")


async def byte_wei(rpc: Rpc) -> int:
    """The most that a byte of a signed transaction costs for L1 now, in wei; 0 on other chains.

    Raises ``Unavailable``: ``l1_oracle_missing`` where nothing is deployed, as on a local chain
    with a rollup's id; ``l1_fee_unknown`` where it does not answer within ``WAIT_S``, or with what
    cannot be.
    """
    if not rpc.network.op_stack:
        return 0
    data = _UPPER_BOUND + uint_word(_SAMPLE_BYTES)
    try:
        async with asyncio.timeout(WAIT_S):
            answer = await rpc.eth_call(ORACLE, data, gas=_GAS)
    except TimeoutError:
        raise Unavailable(UNKNOWN, f"{ORACLE} did not answer in {WAIT_S} s") from None
    except ChainError as error:
        raise Unavailable(UNKNOWN, f"{ORACLE}: {error.detail}") from None
    if not answer:
        raise Unavailable(MISSING, f"there is no GasPriceOracle at {ORACLE}")
    if len(answer) != 32:
        raise Unavailable(UNKNOWN, f"{ORACLE} answered {len(answer)} bytes")
    found = -(-int.from_bytes(answer, "big") // _SAMPLE_BYTES)
    if found > MOST_BYTE_WEI:
        raise Unavailable(UNKNOWN, f"{ORACLE} says {found} wei a byte, which cannot be")
    return found
