"""The tests of chain/ run against a real Anvil with real USDC."""

from tests.fixtures_chain import chain_net, chain_session, faulty_node, rpc

__all__ = ["chain_net", "chain_session", "faulty_node", "rpc"]
