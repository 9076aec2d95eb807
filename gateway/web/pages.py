"""Rendering: templates, the headers every page has, and the files they need.

Strict by default: no inline script or style, nothing from elsewhere, no framing, no referrer, not
cached. Templates escape everything; texts of callers and agents are never shown as markup.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from starlette.responses import Response

_HERE: Final = Path(__file__).parent
_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
STRIPE_PAGES: Final = "https://checkout.stripe.com"

_ALWAYS: Final = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def headers(form_targets: tuple[str, ...] = ()) -> dict[str, str]:
    """The header fields of a page. ``form_targets``: origins that a form here may lead to.

    Browsers apply ``form-action`` to the redirect that answers a form, so the card provider's
    origin has to be named by the page that sends people there.
    """
    targets = " ".join(("'self'", *form_targets))
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; frame-ancestors 'none'; "
        f"form-action {targets}"
    )
    return {"Content-Security-Policy": policy, "Cache-Control": "no-store", **_ALWAYS}


@dataclass(frozen=True, slots=True)
class Asset:
    """A static file in memory. ``version`` is a hash of its bytes."""

    content: bytes
    media_type: str
    version: str


@lru_cache(maxsize=1)  # the files of this release, read once
def assets() -> dict[str, Asset]:
    """Every static file by name; nothing else can be asked for."""
    found = {}
    for path in sorted((_HERE / "static").iterdir()):
        content = path.read_bytes()
        version = hashlib.sha256(content).hexdigest()[:16]
        found[path.name] = Asset(content, _TYPES[path.suffix], version)
    return found


def static(name: str, version: str | None) -> Response | None:
    """The answer for a static file; None if there is none of that name."""
    asset = assets().get(name)
    if asset is None:
        return None
    lasting = version == asset.version
    return Response(
        asset.content,
        headers={
            **_ALWAYS,
            "Cache-Control": "public, max-age=31536000, immutable" if lasting else "no-cache",
            "ETag": f'"{asset.version}"',
        },
        media_type=asset.media_type,
    )


def _static_url(name: str) -> str:
    return f"/farebox/static/{name}?v={assets()[name].version}"


@lru_cache(maxsize=1)
def _templates() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from gateway.money import format_usd
    from wallet_auth.keys import checksum

    made = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["static"] = _static_url
    made.filters["usd"] = format_usd
    made.filters["checksum"] = checksum
    return made


def render(
    name: str,
    *,
    status: int = 200,
    form_targets: tuple[str, ...] = (),
    **context: Any,
) -> Response:
    """A page. ``name`` is a template; what it needs and does not get is an error."""
    text = _templates().get_template(name).render(**context)
    return Response(text, status, headers(form_targets), media_type="text/html")
