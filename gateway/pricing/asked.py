"""What a request asks for, as far as a price hangs on it: read so that nobody reads it otherwise.

The upstream reads the same bytes with a reader of its own. Wherever two readers could disagree (a
key twice, a key in another case, a body that is no strict JSON), the request is refused: else
somebody could ask for the dear thing and be priced for the cheap one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import unquote_plus

from gateway.errors import Problem
from wallet_auth.strict import json_object

_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9a-z-]+"
_JSON: Final = re.compile(
    rb"application/(?:[a-z0-9.+-]+\+)?json"
    # Its parameters. Without a comma: a second media type is no parameter.
    rb"((?:[ \t]*;[ \t]*(?:" + _TOKEN + rb"=(?:" + _TOKEN + rb'|"[^",\\]*"))?)*)',
    re.IGNORECASE,
)
_CHARSET: Final = re.compile(rb';[ \t]*charset="?([^;" \t]*)', re.IGNORECASE)


def json_body(body: bytes, content_type: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises ``Problem``."""
    kind = _JSON.fullmatch(content_type.strip(b" \t"))
    # A reader that obeys another charset (UTF-7 hides whole words) reads other text than we do.
    if kind is None or {name.lower() for name in _CHARSET.findall(kind[1])} - {b"utf-8", b"utf8"}:
        raise Problem(
            "unsupported_media_type",
            "The price of this call depends on its body: send JSON in UTF-8, once as "
            "application/json.",
        )
    try:
        return json_object(body)
    except ValueError as error:
        raise Problem(
            "invalid_request", f"The price of this call depends on its body, which is {error}."
        ) from None


def member(value: dict[str, Any], path: Iterable[str]) -> Any:
    """What stands at a place of a request's JSON; None: nothing.

    Raises ``Problem`` where another spelling of a name stands, which some readers take for it.
    """
    found: Any = value
    for name in path:
        if not isinstance(found, dict):
            return None
        _require_plain(found, name)
        found = found.get(name)
    return found


def _require_plain(value: Iterable[str], name: str) -> None:
    folded = _folded(name)
    for key in value:
        if key != name and _folded(key) == folded:
            raise Problem(
                "invalid_request",
                f"The price of this call depends on {name!r}, which also stands here as "
                f"{key[:60]!r}: leave one of them.",
            )


def plain(text: str) -> str:
    """A text as a loose reader sees it: up to a NUL, without case, width and blanks around it."""
    cut = text.partition("\0")[0]
    return unicodedata.normalize("NFKC", cut).casefold().strip()


def _folded(name: str) -> str:
    # PHP makes one name of image_size, image.size and "image size".
    return "".join(filter(str.isalnum, plain(name)))


def query_value(query: bytes | None, name: str) -> str | None:
    """The one value of a name in a query; None: it is not there. Raises ``Problem``."""
    text = (query or b"").decode("latin-1")
    found = _value_in(text.split("&"), name)
    # To some a semicolon separates as well, to most it is a part of the value.
    if ";" in text and _value_in(re.split("[&;]", text), name) != found:
        raise _named_oddly(name)
    return found


def _value_in(pairs: Iterable[str], name: str) -> str | None:
    found: str | None = None
    for pair in pairs:
        key, _, value = pair.partition("=")
        key = unquote_plus(key, errors="replace")
        # PHP and Rails make one name of a list: size[] and size[0] are size.
        bare = key.partition("[")[0]
        if _folded(bare) != _folded(name):
            continue
        if key != name or found is not None:
            raise _named_oddly(name)
        found = unquote_plus(value, errors="replace")
    return found


def _named_oddly(name: str) -> Problem:
    return Problem(
        "invalid_request",
        f"The price of this call depends on {name!r} in the query: name it once, so, and "
        "separated by &.",
    )
