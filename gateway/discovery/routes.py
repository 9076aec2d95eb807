"""What anybody may read of what is sold here."""

from __future__ import annotations

import json
from bisect import bisect_right
from functools import lru_cache

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.own import node_of
from gateway.payments.offers import Same
from gateway.price_table import changes, public


async def prices(request: Request) -> Response:
    """``GET v1/prices``: every route and tool with its price, and the packs of credits."""
    node = node_of(request)
    same, now_s = Same(node.settings), node.now_s()
    # What a reload has changed may be asked for at once.
    headers = {"Cache-Control": "no-cache", "Access-Control-Allow-Origin": "*"}
    begun = bisect_right(_changes(same), now_s)
    return Response(_list(same, begun), 200, headers, "application/json")


@lru_cache(maxsize=2)
def _changes(same: Same) -> tuple[int, ...]:
    return changes(same.settings)


@lru_cache(maxsize=2)  # of the settings that are in force, made once: anybody may ask
def _list(same: Same, begun: int) -> bytes:
    """``begun``: how many of the scheduled prices hold already."""
    now_s = _changes(same)[begun - 1] if begun else 0
    return json.dumps(public(same.settings, now_s), ensure_ascii=False).encode()


ROUTES = [Route("/farebox/v1/prices", prices, methods=["GET"])]
