"""x402 payment schemes on EVM chains, one file each."""
