"""The local Stripe and a webhook receiver as fixtures."""

from tests.gateway.demo.stripes import receiver, stripes

__all__ = ["receiver", "stripes"]
