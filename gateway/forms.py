"""The text forms of settings: sizes, times, money, addresses, origins, rates, spans, prices.

Each function takes what stands in ``farebox.toml`` (or in an environment variable) and gives the
value the program uses, or raises ``ValueError`` with a message that continues the name of the key
("server.max_body should be a size such as …") and never repeats a secret.
"""

from __future__ import annotations

import calendar
import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, PlainValidator, SecretStr

from gateway.money import parse_usd

_SIZE_UNITS: Final = {
    "": 1,
    "B": 1,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "KIB": 1024,
    "MIB": 1024**2,
    "GIB": 1024**3,
}
_TIME_UNITS: Final = {
    1: "s sec second seconds",
    60: "m min minute minutes",
    3600: "h hour hours",
    86400: "d day days",
    7 * 86400: "w week weeks",
}
_SECONDS_BY_WORD: Final = {w: s for s, words in _TIME_UNITS.items() for w in words.split()}
_AMOUNT: Final = re.compile(r"([0-9]{1,12}) ?([A-Za-z]*)")
_SPAN: Final = re.compile(r"([1-9][0-9]{0,3}) ?(day|days|d|month|months|year|years)")
_RATE: Final = re.compile(r"([1-9][0-9]{0,8})/(s|sec|second|min|minute|h|hour|d|day)")
_TOKEN: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{40}")
_HOST: Final = re.compile(r"[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


# --- text forms -----------------------------------------------------------------------------


def whole(value: object) -> int:
    """A whole number: an ``int`` of TOML or plain digits of an environment variable."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value):
        return int(value)
    raise ValueError("should be a whole number")


def size_bytes(value: object) -> int:
    """``"64 KiB"``, ``"10 MB"`` or a whole number of bytes, in bytes."""
    found = _AMOUNT.fullmatch(value) if isinstance(value, str) else None
    if found and found.group(2).upper() in _SIZE_UNITS:
        return int(found.group(1)) * _SIZE_UNITS[found.group(2).upper()]
    if isinstance(value, str):
        raise ValueError('should be a size such as "64 KiB" or "10 MiB"')
    return whole(value)


def duration_s(value: object) -> int:
    """``"60s"``, ``"24 h"``, ``"7 days"`` or a whole number of seconds, in seconds."""
    found = _AMOUNT.fullmatch(value) if isinstance(value, str) else None
    if found and found.group(2) in _SECONDS_BY_WORD:
        return int(found.group(1)) * _SECONDS_BY_WORD[found.group(2)]
    if found and not found.group(2):
        return int(found.group(1))
    if isinstance(value, str):
        raise ValueError('should be a duration such as "60s", "5 min" or "24 h"')
    return whole(value)


def usd_units(value: object) -> int:
    """A dollar amount such as ``"$0.002"``, in units. Numbers are refused: TOML's are floats."""
    if not isinstance(value, str):
        raise ValueError('should be a dollar amount in quotes, such as "$0.01"')
    return parse_usd(value)


def address(value: object) -> str:
    """A 20-byte address, lower case. Mixed case must carry the right EIP-55 checksum."""
    if not isinstance(value, str) or not _ADDRESS.fullmatch(value):
        raise ValueError("should be an address: 0x and 40 hexadecimal digits")
    digits = value[2:]
    if digits not in (digits.lower(), digits.upper()):
        from wallet_auth.keys import (
            checksum,  # brings the hash library: not for `farebox --help`
        )

        if checksum(value.lower()) != value:
            raise ValueError(
                "has a wrong checksum: a digit is mistyped, or the mix of upper and lower case is"
            )
    if not int(digits, 16):
        raise ValueError("is the zero address: what is sent there is lost")
    return value.lower()


def private_key(value: object) -> object:
    """A secp256k1 private key as 0x and 64 hexadecimal digits. The value is never in a message."""
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if not isinstance(text, str) or not re.fullmatch(r"0x[0-9a-fA-F]{64}", text):
        raise ValueError("should be a private key: 0x and 64 hexadecimal digits")
    order = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141
    if not 0 < int(text, 16) < order:
        raise ValueError("is not a private key of secp256k1: out of range")
    return text


def origin(value: object) -> str:
    """``scheme://host[:port]`` in its one canonical form (RFC 6454): lower case, default port out.

    A path, query, user or fragment is refused.
    """
    scheme, host, port, rest = _split_http(value)
    if rest not in ("", "/"):
        raise ValueError('should be an origin such as "https://api.example.com", without a path')
    shown = "" if port in (None, _DEFAULT_PORTS[scheme]) else f":{port}"
    return f"{scheme}://{host.lower()}{shown}"


def base_url(value: object) -> str:
    """An http(s) URL with an optional path and nothing behind it; no trailing slash."""
    scheme, host, port, rest = _split_http(value)
    if "?" in rest or "#" in rest:
        raise ValueError("should be a URL without query and fragment")
    shown = "" if port in (None, _DEFAULT_PORTS[scheme]) else f":{port}"
    return f"{scheme}://{host.lower()}{shown}{rest.rstrip('/')}"


def rpc_url(value: object) -> str:
    """An http(s) URL of a JSON-RPC node, kept as written (providers put their key in it)."""
    _split_http(value)
    return str(value)


def _split_http(value: object) -> tuple[str, str, int | None, str]:
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]+", value):
        raise ValueError("should be a URL such as http://127.0.0.1:9000")
    parts = urlsplit(value)
    if parts.scheme not in _DEFAULT_PORTS:
        raise ValueError("should begin with http:// or https://")
    if "@" in parts.netloc:
        raise ValueError("should not carry a user name or password")
    try:
        port = parts.port
    except ValueError:
        raise ValueError("has a port that is not a number up to 65535") from None
    host = parts.netloc.removesuffix(f":{port}") if port is not None else parts.netloc
    if not _HOST.fullmatch(host):
        raise ValueError("has no valid host name")
    return parts.scheme, host, port, value[value.index(parts.netloc) + len(parts.netloc) :]


def listed(value: object) -> object:
    """A list; an environment variable may write it as ``a,b``."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


def lines(value: object) -> object:
    """A list; a file or an environment variable has one a line, or ``a,b``."""
    if isinstance(value, str):
        return [item for item in re.split(r"[\s,]+", value) if item]
    return value


def long_secret(secret: SecretStr) -> SecretStr:
    """A secret that cannot be guessed and fits into a header field."""
    if not re.fullmatch(r"[!-~]{24,200}", secret.get_secret_value()):
        raise ValueError("should be 24 to 200 characters without spaces; take them at random")
    return secret


def coin_gwei(value: object) -> int:
    """An amount of the gas coin in quotes, such as ``"0.05"``, in gwei."""
    found = re.fullmatch(
        r"([0-9]{1,9})(?:\.([0-9]{1,9}))?", value if isinstance(value, str) else ""
    )
    if found is None:
        raise ValueError('should be an amount of the gas coin in quotes, such as "0.05"')
    return int(found.group(1)) * 10**9 + int((found.group(2) or "").ljust(9, "0"))


IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


def ip_network(value: object) -> IPNetwork:
    """An address such as ``10.1.2.3``, or a network such as ``10.0.0.0/8``."""
    if isinstance(value, IPNetwork):
        return value
    try:
        if isinstance(value, str):
            return ipaddress.ip_network(value)
    except ValueError as error:
        raise ValueError(f"should be an address or a network: {error}") from None
    raise ValueError('should be an address or a network such as "10.0.0.0/8"')


Count = Annotated[int, BeforeValidator(whole)]
Bytes = Annotated[int, BeforeValidator(size_bytes)]
Seconds = Annotated[int, BeforeValidator(duration_s)]
Units = Annotated[int, BeforeValidator(usd_units)]
Address = Annotated[str, BeforeValidator(address)]
NetworkAt = Annotated[IPNetwork, PlainValidator(ip_network)]
Origin = Annotated[str, BeforeValidator(origin)]
Secret = Annotated[SecretStr, Field(min_length=1)]
PrivateKey = Annotated[SecretStr, BeforeValidator(private_key)]


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to listen. Port 0 lets the system pick a free one."""

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """True if only this machine can connect."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def listen(value: object) -> Listen:
    if isinstance(value, Listen):
        return value
    found = re.fullmatch(r"(.*):([0-9]{1,5})", value) if isinstance(value, str) else None
    if not found or not _HOST.fullmatch(found.group(1)) or int(found.group(2)) > 65535:
        raise ValueError('should be host:port, such as "127.0.0.1:8402"')
    return Listen(found.group(1).strip("[]"), int(found.group(2)))


ListenAt = Annotated[Listen, BeforeValidator(listen)]


@dataclass(frozen=True, slots=True)
class Span:
    """A length of calendar time: whole days or whole months."""

    days: int
    months: int
    text: str

    def after_ms(self, start_ms: int) -> int:
        """``start_ms`` plus this span, in UTC; a day the month lacks becomes its last one."""
        start = datetime.fromtimestamp(start_ms // 1000, tz=UTC)
        month = start.month - 1 + self.months
        year, month = start.year + month // 12, month % 12 + 1
        day = min(start.day, calendar.monthrange(year, month)[1])
        end = start.replace(year=year, month=month, day=day) + timedelta(days=self.days)
        return calendar.timegm(end.timetuple()) * 1000 + start_ms % 1000


def span(value: object) -> Span | None:
    if value is None or isinstance(value, Span):
        return value
    if value == "never":
        return None
    found = _SPAN.fullmatch(value) if isinstance(value, str) else None
    if not found:
        raise ValueError('should be "never" or a span such as "12 months" or "90 days"')
    count, word = int(found.group(1)), found.group(2)[0]
    return Span(
        days=count if word == "d" else 0,
        months={"d": 0, "m": count, "y": 12 * count}[word],
        text=found.group(0),
    )


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most ``count`` requests in a window of ``window_s``, which begins with the first."""

    count: int
    window_s: int


def rate(value: object) -> RateLimit | None:
    if value is None or isinstance(value, RateLimit):
        return value
    found = _RATE.fullmatch(value) if isinstance(value, str) else None
    if not found:
        raise ValueError('should be a rate such as "60/min" or "5/s"')
    return RateLimit(int(found.group(1)), _SECONDS_BY_WORD[found.group(2)])


@dataclass(frozen=True, slots=True)
class Price:
    """A price as configured. ``gateway/pricing`` turns it into a rule and judges its options.

    ``rule`` is ``free``, ``flat`` or the name of a rule; ``units`` is the flat price (0 for the
    others); ``options`` is the table of a rule as written, without ``rule`` itself.
    """

    rule: str
    units: int
    options: Mapping[str, Any]


def price(value: object) -> Price:
    """``"free"``, a dollar amount, or a table that names its rule."""
    if isinstance(value, Price):
        return value
    if value == "free":
        return Price("free", 0, {})
    if isinstance(value, Mapping):
        rule = value.get("rule")
        if not isinstance(rule, str) or not re.fullmatch(r"[a-z][a-z_]{0,39}", rule):
            raise ValueError('should name its rule, as in { rule = "by_params", … }')
        return Price(rule, 0, {k: v for k, v in value.items() if k != "rule"})
    units = usd_units(value)
    if units == 0:
        raise ValueError('is zero: write "free" for a route that costs nothing')
    return Price("flat", units, {})


PriceOf = Annotated[Price, BeforeValidator(price)]


@dataclass(frozen=True, slots=True)
class Member:
    """A place in a JSON answer, as names in order, and what must stand there; None: anything."""

    path: tuple[str, ...]
    equals: str | int | bool | None = None

    @property
    def name(self) -> str:
        """The path as it was written."""
        return ".".join(self.path)


def status_range(value: object) -> tuple[int, int]:
    """A status such as ``404``, or a class such as ``"4xx"``: the first and the last of it."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str) and re.fullmatch(r"[2-5][0-9]{2}", text):
        return int(text), int(text)
    if isinstance(text, str) and re.fullmatch(r"[2-5]xx", text):
        return int(text[0]) * 100, int(text[0]) * 100 + 99
    raise ValueError('should be a status such as 404 or a class such as "4xx"')


def member(value: object) -> Member:
    """``"data.id"``, or ``{ path = "status", equals = "ok" }``."""
    if isinstance(value, Member):
        return value
    equals: str | int | bool | None = None
    path = value
    if isinstance(value, Mapping) and set(value) == {"path", "equals"}:
        path, against = value["path"], value["equals"]
        if not isinstance(against, str | int):  # a bool is an int
            raise ValueError("compares with something that is no text, whole number or boolean")
        equals = against
    if not isinstance(path, str) or not 1 <= len(path) <= 200 or "" in path.split("."):
        raise ValueError('should be a path such as "data.id" or { path = "status", equals = "ok" }')
    return Member(tuple(path.split(".")), equals)


StatusRange = Annotated[tuple[int, int], PlainValidator(status_range)]
MemberAt = Annotated[Member, PlainValidator(member)]


def json_value(value: object) -> object:
    """What can stand in JSON: TOML's dates, infinities and not-a-number cannot."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("holds a date or a number that JSON does not have") from None
    return value


def json_table(value: object) -> object:
    """A JSON object."""
    if not isinstance(value, Mapping):
        raise ValueError("should be a table")
    return json_value(value)


Json = Annotated[Any, PlainValidator(json_value)]
JsonTable = Annotated[dict[str, Any], PlainValidator(json_table)]


_FRAMING: Final = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


def headers(value: object) -> object:
    """Header fields to set on the way up, checked so that none can break the framing."""
    if not isinstance(value, Mapping):
        raise ValueError('should be a table such as { Authorization = "Bearer …" }')
    for name, text in value.items():
        if not _TOKEN.fullmatch(name):
            raise ValueError(f"{name!r} is not a header name")
        if name.lower() in _FRAMING or name.lower().startswith("farebox-"):
            raise ValueError(f"{name} is set by the gateway itself")
        if not isinstance(text, str) or not re.fullmatch(r"[\t -~]*", text):
            raise ValueError(f"{name} has a value that is not printable ASCII text")
    if len({name.lower() for name in value}) != len(value):
        raise ValueError("names one header twice")
    return tuple((name, text) for name, text in value.items())


def tools(value: object) -> object:
    """MCP tools by name with their prices; ``*`` is every tool not named."""
    if not isinstance(value, Mapping):
        raise ValueError('should be a table such as { search = "$0.005", "*" = "$0.001" }')
    return tuple(value.items())
