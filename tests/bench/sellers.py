"""What P-spend is compared with, each a process of its own: ``python -m tests.bench.sellers KIND``.

``x402``          the official Python x402 middleware (FastAPI) with the official facilitator in
                  the same process: every request is verified, answered and settled on the chain.
``conventional``  prepaid credits as one would plainly write them (``conventional.py``).
"""

from __future__ import annotations

import argparse

from tests.bench.servers import ANSWER

NETWORK = "eip155:84532"
PRICE = "$0.001"


def x402(port: int, rpc_url: str, key: str, pay_to: str) -> None:
    import uvicorn
    from fastapi import FastAPI, Response
    from x402 import x402Facilitator, x402ResourceServer
    from x402.http.middleware.fastapi import PaymentMiddlewareASGI
    from x402.http.types import PaymentOption, RouteConfig
    from x402.mechanisms.evm import FacilitatorWeb3Signer
    from x402.mechanisms.evm.exact import register_exact_evm_facilitator, register_exact_evm_server

    facilitator = register_exact_evm_facilitator(
        x402Facilitator(), FacilitatorWeb3Signer(key, rpc_url), NETWORK
    )
    server = register_exact_evm_server(x402ResourceServer(facilitator), NETWORK)
    option = PaymentOption(scheme="exact", price=PRICE, network=NETWORK, pay_to=pay_to)
    app = FastAPI()
    routes = {"POST /v1/echo": RouteConfig(accepts=[option])}
    app.add_middleware(PaymentMiddlewareASGI, routes=routes, server=server)

    @app.post("/v1/echo")
    async def echo() -> Response:
        return Response(ANSWER, media_type="application/json")

    uvicorn.run(app, port=port, log_level="error", access_log=False)


def conventional(port: int, database: str, redis_url: str) -> None:
    import uvicorn

    from tests.bench.conventional import app

    uvicorn.run(
        app(database, redis_url),
        port=port,
        log_level="error",
        access_log=False,
        loop="uvloop",
        http="httptools",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["x402", "conventional"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rpc", default="")
    parser.add_argument("--key", default="")
    parser.add_argument("--pay-to", default="")
    parser.add_argument("--database", default="")
    parser.add_argument("--redis", default="")
    given = parser.parse_args()
    if given.kind == "x402":
        x402(given.port, given.rpc, given.key, given.pay_to)
    else:
        conventional(given.port, given.database, given.redis)
