"""The predeploy of OP-stack rollups that says what data on L1 costs, on a local chain."""

from __future__ import annotations

import json
from pathlib import Path

from anvil.devnet import Devnet
from chain import rollup

_COMPILED = Path(__file__).parents[1] / "contracts" / "fixtures" / "compiled.json"
GWEI = 10**9


def plant(
    net: Devnet,
    l1_base_wei: int,
    *,
    base_scalar: int = 2_269,  # as on Base
    blob_scalar: int = 1_055_762,
    mood: int = 0,
) -> None:
    """The stand-in at the real address; ``mood``: see its source."""
    runtime = json.loads(_COMPILED.read_text())["GasPriceOracle"]["runtime"]
    net.rpc("anvil_setCode", rollup.ORACLE, runtime)
    for slot, value in enumerate((l1_base_wei, GWEI, base_scalar, blob_scalar, mood)):
        net.rpc("anvil_setStorageAt", rollup.ORACLE, hex(slot), f"0x{value:064x}")
