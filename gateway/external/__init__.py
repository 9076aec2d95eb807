"""The wallet API that agents speak elsewhere, under ``/api/external`` and under our own prefix."""
