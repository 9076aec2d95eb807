"""The real chain, for the few tests here that ask one."""

from tests.fixtures_chain import chain_net, chain_session, faulty_node

__all__ = ["chain_net", "chain_session", "faulty_node"]
