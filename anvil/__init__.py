"""A local chain that behaves like a real one: Anvil with Circle's USDC. For tests and demos."""
