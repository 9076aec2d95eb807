"""What anybody may read of what is sold here."""

from __future__ import annotations

import json
from functools import lru_cache

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.own import node_of
from gateway.payments.offers import Same
from gateway.price_table import public


async def prices(request: Request) -> Response:
    """``GET v1/prices``: every route and tool with its price, and the packs of credits."""
    # What a reload has changed may be asked for at once.
    headers = {"Cache-Control": "no-cache", "Access-Control-Allow-Origin": "*"}
    return Response(_list(Same(node_of(request).settings)), 200, headers, "application/json")


@lru_cache(maxsize=2)  # of the settings that are in force, made once: anybody may ask
def _list(same: Same) -> bytes:
    return json.dumps(public(same.settings), ensure_ascii=False).encode()


ROUTES = [Route("/farebox/v1/prices", prices, methods=["GET"])]
