"""A Stripe for machines without the internet: stateful, at the HTTP level, objects in memory.

It answers the real SDK unchanged (``base_addresses={"api": url}``), shows a hosted Checkout page
that a browser can pay on with Stripe's published test cards, and sends signed webhooks. What it
knows: customers, payment methods, payment intents, charges, checkout sessions in payment mode,
refunds, disputes, events, webhook endpoints. Everything else answers 404 as Stripe does for an
unknown address, so that a caller who needs more finds out at once.

``FakeStripe`` runs it inside the process; ``python -m gateway.demo.fakestripe`` runs it alone.
Test-only doors are under ``/_fake/`` (``control.py``). It never sees real cards or real money.
"""

from __future__ import annotations

from gateway.demo.fakestripe.server import FakeStripe

__all__ = ["FakeStripe"]
