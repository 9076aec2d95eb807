"""Verifying and settling payments for other people's servers (x402 facilitator interface).

Their payments are rows of the same table and go through the same engine as our own, with provider
``facilitator``: no ledger is touched, because the money is not ours.
"""
