"""``python -m gateway.demo.fakestripe [--port P] [--settle-bank-s S]``: run the fake alone."""

from __future__ import annotations

import argparse
import sys

from gateway.demo.fakestripe.server import FakeStripe


def main() -> None:
    """Parse the options, say where it listens, serve until interrupted."""
    parser = argparse.ArgumentParser(prog="fakestripe", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9200)
    parser.add_argument("--settle-bank-s", type=float, default=5.0)
    options = parser.parse_args()
    fake = FakeStripe(host=options.host, port=options.port, settle_bank_s=options.settle_bank_s)
    sys.stdout.write(f"local Stripe on http://{options.host}:{options.port}\n")
    sys.stdout.flush()
    fake.serve()


if __name__ == "__main__":
    main()
