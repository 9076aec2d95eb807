"""x402 payment schemes on EVM chains, one file each: ``eip3009``, ``permit2`` with ``eip2612`` for
its approval, ``upto``, and ``erc6492`` for signatures of wallets that are perhaps not deployed."""
