"""The tests of anvil/ share the worker's chain with those of chain/."""

from tests.fixtures_chain import chain_net, chain_session

__all__ = ["chain_net", "chain_session"]
