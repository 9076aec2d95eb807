"""Things for trying Farebox without the outside world: sample services and a local Stripe."""
