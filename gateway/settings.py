"""What Farebox can be told: the settings as frozen objects.

A key of ``farebox.toml`` that is a size, a time or an amount of money is text or a whole number
there (``max_body = "10 MiB"``) and an ``int`` here, under a name that ends in the unit
(``max_body_bytes``). Every section refuses unknown keys. Reading files, the environment and the
rules between sections are in ``gateway/config.py``; every key is described in docs/operator.md.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)

from chain.networks import Network
from gateway import forms
from gateway.forms import (
    Address,
    Bytes,
    Count,
    Listen,
    ListenAt,
    MemberAt,
    NetworkAt,
    Origin,
    PriceOf,
    PrivateKey,
    RateLimit,
    Seconds,
    Secret,
    Span,
    StatusRange,
    Units,
)
from gateway.sections import Bazaar, External, Section

NO_EFFECT: Final = frozenset(
    {
        ("Server", "pages_url"),
    }
)
"""Settings that are read and checked, and that nothing follows from in this version.
``farebox check`` says so when one is set; a test holds this list against the code."""

_MATCH: Final = re.compile(r"(?:[A-Z]{1,20}|\*) /[!-~]*")
_MOUNT: Final = re.compile(r"/|(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+")


class Server(Section):
    """``[server]``: where Farebox listens, where it keeps things, and its limits."""

    listen: ListenAt = Listen("127.0.0.1", 8402)
    public_url: Origin = ""
    """The origin signatures are bound to; never taken from Host. Empty: http:// and listen."""
    operator: str = Field("", max_length=80)
    """Who sells here, as pages for people say it. Empty: the host name of ``public_url``."""
    database: str = Field("sqlite:///farebox.db", repr=False)
    redis: str = Field("", repr=False)
    redis_timeout_ms: Annotated[Count, Field(ge=1, le=10_000)] = 50
    """How long a request waits for a count that is shared; then this process counts alone."""
    trusted_proxies: Annotated[tuple[NetworkAt, ...], BeforeValidator(forms.listed)] = ()
    """Whose ``X-Forwarded-For`` is believed when calls are counted by address."""
    workers: Annotated[Count, Field(ge=1, le=256)] = 1
    work: bool = True
    """Whether ``serve`` runs the background loop too."""
    pages_url: Annotated[str, BeforeValidator(lambda v: v and forms.origin(v))] = ""
    admin_listen: Annotated[
        Listen | None, BeforeValidator(lambda v: None if v == "" else forms.listen(v))
    ] = Listen("127.0.0.1", 8403)
    admin_token_file: Path = Path("admin.token")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    buffer_answer_bytes: Annotated[Bytes, Field(ge=0, le=16 << 20)] = Field(
        64 << 10, alias="buffer_answer"
    )
    """Answers up to this size are captured before the first byte leaves, longer ones before the
    last one."""
    max_body_bytes: Annotated[Bytes, Field(ge=1024)] = Field(10 << 20, alias="max_body")
    body_memory_bytes: Annotated[Bytes, Field(ge=0, le=64 << 20)] = Field(
        1 << 20, alias="body_memory"
    )
    """What of a request's body is kept in memory; a longer one goes to a temporary file."""
    max_headers_bytes: Annotated[Bytes, Field(ge=8 << 10, le=256 << 10)] = Field(
        32 << 10, alias="max_headers"
    )
    answer_keep_s: Annotated[Seconds, Field(ge=60)] = Field(86400, alias="answer_keep")
    """How long a stored answer is given again to a repeat of its request."""

    hold_lease_s: Annotated[Seconds, Field(ge=1, le=3600)] = 45
    sweep_s: Annotated[Seconds, Field(ge=1)] = 5
    takeover_s: Annotated[Seconds, Field(ge=2, le=300)] = 10
    """How soon another process goes on with a payment, or with following a chain, whose process
    has died. Whoever lives says so every third of it."""
    reconcile_s: Annotated[Seconds, Field(ge=1)] = 60
    upstream_connect_timeout_s: Annotated[Seconds, Field(ge=1, le=600)] = 5
    upstream_timeout_s: Annotated[Seconds, Field(ge=1, le=86400)] = 60
    """The longest an upstream may take for a whole answer, unless its route says otherwise."""
    settle_wait_s: Annotated[Seconds, Field(ge=1, le=300)] = 20
    """How long a request waits for its payment to be included; then it is pending."""
    offer_timeout_s: Annotated[Seconds, Field(ge=10, le=120)] = 120
    """How long an offer for one call stays payable."""
    quote_timeout_s: Annotated[Seconds, Field(ge=10, le=86_400)] = 600
    """How long a quote locks its price."""
    sign_offers: bool = False
    """Whether 402s carry their offers signed (x402's offer-receipt)."""
    stop_s: Annotated[Seconds, Field(ge=0, le=3600)] = 30
    """How long calls in flight may take to end when the gateway is asked to stop."""
    uncharged_per_min: Annotated[Count, Field(ge=1)] = 60
    """Calls of one account or address that may end uncharged in a minute."""

    @field_validator("database")
    @classmethod
    def _database(cls, url: str) -> str:
        if re.fullmatch(r"sqlite:///[^?#]+", url):
            return url
        if re.fullmatch(r"postgres(ql)?://[!-~]+", url) and len(urlsplit(url).path) > 1:
            return re.sub(r"^postgres(ql)?://", "postgresql://", url)
        raise ValueError(
            'should be "sqlite:///farebox.db" or "postgresql://user:password@host/database"'
        )

    @field_validator("redis")
    @classmethod
    def _redis(cls, url: str) -> str:
        if url and not re.fullmatch(r"(rediss?|unix)://[!-~]+", url):
            raise ValueError('should be empty or a URL such as "redis://127.0.0.1:6379/0"')
        return url

    @property
    def scheme(self) -> str:
        """``http`` or ``https``, of ``public_url``."""
        return urlsplit(self.public_url).scheme

    @property
    def authority(self) -> str:
        """Host and, unless it is the default one, port of ``public_url``, lower case."""
        return urlsplit(self.public_url).netloc

    @property
    def on_postgres(self) -> bool:
        """True for PostgreSQL, False for SQLite."""
        return self.database.startswith("postgresql:")


class Credits(Section):
    """``[credits]``: how credits are shown, sold and kept."""

    per_usd: Annotated[Count, Field(ge=1, le=1_000_000)] = 100
    packs_units: Annotated[tuple[Units, ...], BeforeValidator(forms.listed)] = Field(
        (1_000_000, 5_000_000, 20_000_000), alias="packs", min_length=1, max_length=20
    )
    pack_multiple: Annotated[Count, Field(ge=1)] = 500
    """Credits bought by name come in multiples of this many."""
    expire_after: Annotated[Span | None, BeforeValidator(forms.span)] = Span(0, 12, "12 months")
    """None: never. ``expire_after.after_ms(now_ms)`` is when credits bought now expire."""
    min_onchain_units: Annotated[Units, Field(ge=1)] = Field(10_000, alias="min_onchain")
    credential_s: Annotated[Count, Field(ge=0, le=3_600)] = 3_600
    """How long what a bare payment is given may spend the rest of it. 0: it is given nothing."""

    @field_validator("per_usd")
    @classmethod
    def _per_usd(cls, rate: int) -> int:
        if 1_000_000 % rate:
            raise ValueError(
                "should divide 1,000,000, so that one credit is a whole number of units"
            )
        return rate

    @field_validator("packs_units")
    @classmethod
    def _packs(cls, packs: tuple[int, ...]) -> tuple[int, ...]:
        if min(packs) < 1:
            raise ValueError("names a pack that costs nothing")
        if min(packs) > 1_000_000:
            raise ValueError(
                "needs one pack of at most $1: stock x402 clients refuse more in one payment"
            )
        return tuple(sorted(set(packs)))


class MintAt(Section):
    """When a transfer becomes credits: at once up to a limit, at a safer point above it."""

    instant_limit_units: Units = Field(5_000_000, alias="instant_limit")
    otherwise: Literal["included", "safe", "finalized"] | Annotated[int, Field(ge=1, le=10_000)] = (
        "safe"
    )
    """``included``, ``safe``, ``finalized`` or a number of blocks."""


class Chain(Section):
    """``[chains.NAME]``: one network this gateway takes payments on."""

    name: str
    network: Network
    """From chain/networks.py, or built from the assets spelled out in the config."""
    rpc: Annotated[tuple[str, ...], BeforeValidator(forms.listed)] = Field(
        min_length=1, max_length=10, repr=False
    )
    pay_to: Address
    settler_key: PrivateKey | None = None
    """Pays the gas of settlements. None: this gateway cannot settle on this network itself."""
    min_onchain_units: Annotated[Units, Field(ge=1)] = Field(10_000, alias="min_onchain")
    """Smallest single settlement; the value of ``[credits]`` unless given here."""
    native_usd_units: Annotated[
        Annotated[int, Field(ge=1)] | None,
        BeforeValidator(lambda v: None if v == "" else forms.usd_units(v)),
    ] = Field(None, alias="native_usd")
    """What one whole gas coin is worth. None: what is offered does not hang on gas."""
    mint_at: MintAt = MintAt.model_validate({})
    exposure_limit_units: Annotated[Units, Field(ge=1)] = Field(200_000_000, alias="exposure_limit")
    """Most that may be minted and not yet safe, over all wallets; above it mints wait."""
    rpc_timeout_s: Annotated[Seconds, Field(ge=1, le=120)] = 10
    settler_keys: Annotated[tuple[PrivateKey, ...], BeforeValidator(forms.lines)] = Field(
        (), max_length=20
    )
    """More gas accounts. The load is spread over all; one that is stuck or empty is passed over."""
    facilitator: Annotated[str, BeforeValidator(lambda v: v and forms.base_url(v))] = ""
    """Somebody else's, asked to settle our sales before our own gas accounts do."""
    facilitator_key: Secret | None = None
    """What it is sent as ``Authorization: Bearer …``."""
    facilitator_wait_s: Annotated[Seconds, Field(ge=1, le=60)] = 10
    """How long it may take to answer, and then how long its transaction may take."""
    settle_batch: Annotated[Count, Field(ge=1, le=100)] = 50
    """Most payments that one transaction settles."""
    settle_window_ms: Annotated[Count, Field(ge=0, le=5_000)] = 50
    """How long a payment waits for company while others are being settled."""
    bump_after_s: Annotated[Seconds, Field(ge=1, le=3600)] = 10
    """A transaction that is in no block after this long, or after two blocks, is offered more."""
    max_fee_gwei: Annotated[int, BeforeValidator(forms.whole), Field(ge=1)] | None = None
    """Most that is paid for a unit of gas, tip included. None: what it costs."""
    gas_per_hour_gwei: Annotated[int, BeforeValidator(forms.coin_gwei), Field(ge=1)] | None = Field(
        None, alias="gas_per_hour"
    )
    """Most gas money to spend in an hour, all gas accounts together. None: no such limit."""
    refund_key: PrivateKey | None = None
    """Pays unused credits back on chain; may be the key of ``pay_to``. None: they are not."""
    refund_min_units: Annotated[Units, Field(ge=1)] = Field(100_000, alias="refund_min")
    """Smallest refund of one lot: each is a transaction."""
    failed_per_hour: Annotated[Count, Field(ge=1)] = 1
    """Settlements of one payer that may fail in an hour; then no more is sent for it."""
    permit2: bool = False
    """Our own sales take ``exact`` by Permit2 too, where x402's proxy is deployed."""
    eip2612: bool = False
    """There the approval of Permit2 may come signed (EIP-2612); we pay its gas."""

    @model_validator(mode="before")
    @classmethod
    def _first_settler(cls, given: Any) -> Any:
        """``settler_keys`` alone will do: the first of them is then ``settler_key``."""
        keys = forms.lines(given.get("settler_keys") or ()) if isinstance(given, dict) else ()
        if keys and isinstance(keys, (list, tuple)) and not given.get("settler_key"):
            return {**given, "settler_key": keys[0], "settler_keys": keys[1:]}
        return given

    @field_validator("rpc")
    @classmethod
    def _rpc(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(forms.rpc_url(url) for url in urls)

    @property
    def caip2(self) -> str:
        """The network as ``eip155:<chain id>``."""
        return self.network.caip2


class Stripe(Section):
    """``[stripe]``: cards. Off without a secret key."""

    secret_key: Secret | None = None
    webhook_secret: Secret | None = None
    api_base: Annotated[str, BeforeValidator(lambda v: v and forms.base_url(v))] = ""
    """Another Stripe, for tests and the demo only."""
    checkouts_per_min: Annotated[Count, Field(ge=1)] = 10
    """Card payments that one address, or one account that signs, may begin in a minute."""

    @property
    def enabled(self) -> bool:
        """True if cards are offered."""
        return self.secret_key is not None


class Facilitator(Section):
    """``[facilitator]``: verifies and settles payments for other people's servers. Off without a
    key."""

    api_key: Annotated[SecretStr, AfterValidator(forms.long_secret)] | None = None
    """What those servers send as ``Authorization: Bearer …``."""
    gas_per_hour_gwei: Annotated[int, BeforeValidator(forms.coin_gwei), Field(ge=1)] = Field(
        10_000_000, alias="gas_per_hour"
    )
    """Most gas money to spend for others in an hour, for each network."""
    repeat_s: Annotated[Seconds, Field(ge=60, le=86400)] = 300
    """How long after its settlement a payment that is sent to settle again gets the same answer."""
    erc6492_factories: Annotated[tuple[Address, ...], BeforeValidator(forms.listed)] = Field(
        (), max_length=50
    )
    """Whose wallets may pay before they are deployed, as far as verifying goes."""

    @property
    def enabled(self) -> bool:
        """True if others are served."""
        return self.api_key is not None


class FailedIf(Section):
    """``failed_if`` of a route: which answers are no success, and so not charged.

    An answer of 5xx, one that breaks off and one that does not come always is none.
    """

    status: Annotated[tuple[StatusRange, ...], Field(max_length=100)] = ((400, 499),)
    slower_than_s: Annotated[Seconds, Field(ge=1, le=86400)] | None = Field(
        None, alias="slower_than"
    )
    """The upstream took longer than this for the whole answer."""
    empty: bool = False
    answer_without: Annotated[tuple[MemberAt, ...], Field(max_length=20)] = ()
    """Its JSON lacks one of these members."""
    answer_with: Annotated[tuple[MemberAt, ...], Field(max_length=20)] = ()
    """Its JSON has one of these members."""


class Route(Section):
    """One entry of ``routes``: which requests, and what they cost."""

    match: str
    """``METHOD /path``, the path as the upstream sees it; ``*`` for every method."""
    price: PriceOf
    rate_limit: Annotated[RateLimit | None, BeforeValidator(forms.rate)] = None
    charge: Literal["on_success"] = "on_success"
    """Only an answer of the upstream that counts as success is charged."""
    failed_if: FailedIf = FailedIf.model_validate({})
    """What does not count as success."""
    amount_from: Literal["price", "upstream"] = "price"
    """``upstream``: it may say what the call cost, never more than was held."""
    retry_safe: bool = False
    """A call whose gateway died may be sent to the upstream again."""
    upto: bool = False
    """Paid for what a call came to, after it (x402 ``upto``). For metered prices."""
    timeout_s: Annotated[Seconds, Field(ge=1, le=86400)] | None = None
    description: str = Field("", max_length=500)
    bazaar: Annotated[Bazaar | None, BeforeValidator(lambda v: None if v is False else v)] = (
        Bazaar.model_validate({})
    )
    """None (``false``): its 402s say nothing for catalogs."""
    slug: str = Field("", pattern=r"^(?:[a-z0-9][a-z0-9-]{0,63})?$")
    """Its name as an action of the external wallet API. Empty: made of its path."""

    @field_validator("match")
    @classmethod
    def _match(cls, match: str) -> str:
        if not _MATCH.fullmatch(match) or re.search(
            r"[?#\\]|//|/\.\.?(/|$)|%(?![0-9A-F]{2})", match
        ):
            raise ValueError('should be "METHOD /path" such as "GET /v1/forecast/*"')
        return match

    @property
    def method(self) -> str:
        """The method in ``match``: upper case, or ``*``."""
        return self.match.split(" ", 1)[0]

    @property
    def path(self) -> str:
        """The path pattern in ``match``."""
        return self.match.split(" ", 1)[1]


class Upstream(Section):
    """``[upstreams.NAME]``: an HTTP API or MCP server behind the gateway."""

    name: str
    kind: Literal["http", "mcp"] = "http"
    url: Annotated[str, BeforeValidator(forms.base_url)]
    mount: str = "/"
    """Where it stands under the gateway's origin; replaced by ``url`` on the way up."""
    inject: Annotated[tuple[tuple[str, SecretStr], ...], BeforeValidator(forms.headers)] = ()
    """Header fields set on the way up, never shown."""
    routes: Annotated[tuple[Route, ...], Field(max_length=1000)] = ()
    tools: Annotated[tuple[tuple[str, PriceOf], ...], BeforeValidator(forms.tools)] = ()
    """MCP only: price by tool name; ``*`` is every tool not named."""
    connect_timeout_s: Annotated[Seconds, Field(ge=1, le=600)] | None = None
    timeout_s: Annotated[Seconds, Field(ge=1, le=86400)] | None = None

    @field_validator("mount")
    @classmethod
    def _mount(cls, mount: str) -> str:
        if not _MOUNT.fullmatch(mount):
            raise ValueError(
                'should be a path such as "/" or "/weather", without a slash at its end'
            )
        return mount


class Settings(Section):
    """Everything Farebox was told, checked. Made by ``gateway.config.load`` or ``quick``."""

    server: Server
    credits: Credits
    chains: tuple[Chain, ...]
    stripe: Stripe
    facilitator: Facilitator = Facilitator.model_validate({})
    external: External = External.model_validate({})
    upstreams: tuple[Upstream, ...]
    source: Path | None
    """The file it was read from; None if there was none."""

    @property
    def takes_permit2(self) -> bool:
        """Whether some network's sales take Permit2."""
        return any(chain.permit2 for chain in self.chains)

    @property
    def takes_permits(self) -> bool:
        """Whether some network's sales take an EIP-2612 permit for it."""
        return any(chain.eip2612 for chain in self.chains if chain.settler_key is not None)

    @cached_property
    def takes_upto(self) -> bool:
        """Whether some route is paid by ``upto``."""
        return any(route.upto for upstream in self.upstreams for route in upstream.routes)

    def chain(self, name_or_caip2: str) -> Chain:
        """The configured chain of that name or CAIP-2 id. Raises ``KeyError``."""
        for chain in self.chains:
            if name_or_caip2 in (chain.name, chain.caip2):
                return chain
        raise KeyError(name_or_caip2)
