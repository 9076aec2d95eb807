"""The configuration: what is read, from where, and that every fault is named at once."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gateway import forms
from gateway.check import judge
from gateway.config import ConfigError, load, quick
from gateway.settings import Settings

PAY_TO = "0x" + "ab" * 20
KEY = "0x" + "11" * 32
# Vectors of EIP-55 itself.
CHECKSUMMED = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"

BASE = f"""
[chains.base-sepolia]
rpc = ["http://127.0.0.1:8545"]
pay_to = "{PAY_TO}"

[upstreams.weather]
url = "http://127.0.0.1:9000"
routes = [{{ match = "GET /v1/*", price = "$0.002" }}]
"""

Loader = Callable[..., Settings]


@pytest.fixture
def loaded(tmp_path: Path) -> Loader:
    """Load a configuration from its text."""

    def call(
        text: str, env: Mapping[str, str] | None = None, overrides: dict[str, Any] | None = None
    ) -> Settings:
        file = tmp_path / "farebox.toml"
        file.write_text(text, encoding="utf-8")
        return load(file, env=env or {}, overrides=overrides, judge=judge)

    return call


def faults_of(call: Callable[[], object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value.faults


# --- what is read ---------------------------------------------------------------------------


def test_the_example_of_the_documentation_is_read(loaded: Loader, tmp_path: Path) -> None:
    (tmp_path / "settler.key").write_text(KEY + "\n")
    text = Path("docs/farebox.example.toml").read_text(encoding="utf-8")
    env = {
        "STRIPE_SECRET_KEY": "sk_test_1",
        "STRIPE_WEBHOOK_SECRET": "whsec_1",
        "WEATHER_KEY": "secret",
    }
    settings = loaded(text, env)
    assert settings.server.buffer_answer_bytes == 64 * 1024
    assert settings.server.public_url == "http://127.0.0.1:8402"
    assert settings.credits.packs_units == (1_000_000, 5_000_000, 20_000_000)
    assert settings.credits.min_onchain_units == 10_000
    chain = settings.chain("base-sepolia")
    assert chain.caip2 == "eip155:84532"
    assert chain.mint_at.instant_limit_units == 5_000_000
    assert chain.settler_key is not None
    assert chain.settler_key.get_secret_value() == KEY
    assert settings.chain("eip155:84532") is chain
    weather = settings.upstreams[0]
    assert [r.price.units for r in weather.routes[:2]] == [0, 2_000]
    assert weather.inject[0][1].get_secret_value() == "Bearer secret"
    assert settings.upstreams[1].kind == "mcp"
    assert dict(settings.upstreams[1].tools)["*"].units == 1_000


def test_defaults_are_sane(loaded: Loader) -> None:
    settings = loaded(BASE)
    server = settings.server
    assert str(server.listen) == "127.0.0.1:8402"
    assert str(server.admin_listen) == "127.0.0.1:8403"
    assert (server.scheme, server.authority) == ("http", "127.0.0.1:8402")
    assert (server.hold_lease_s, server.offer_timeout_s, server.answer_keep_s) == (45, 120, 86_400)
    assert server.workers == 1
    assert server.work
    assert settings.credits.per_usd == 100
    assert not settings.stripe.enabled
    assert settings.chains[0].min_onchain_units == 10_000


def test_relative_paths_count_from_the_file(loaded: Loader, tmp_path: Path) -> None:
    server = loaded(BASE).server
    assert server.database == f"sqlite:///{tmp_path / 'farebox.db'}"
    assert server.admin_token_file == tmp_path / "admin.token"


def test_the_environment_wins_over_the_file_and_the_command_over_both(loaded: Loader) -> None:
    text = '[server]\nlisten = "127.0.0.1:1"\nsweep_s = 1\nreconcile_s = 1\n' + BASE
    env = {"FAREBOX_SERVER__LISTEN": "127.0.0.1:2", "FAREBOX_SERVER__SWEEP_S": "2"}
    server = loaded(text, env, {"server": {"listen": "127.0.0.1:3"}}).server
    assert (server.listen.port, server.sweep_s, server.reconcile_s) == (3, 2, 1)


def test_the_environment_reaches_tables_by_name(loaded: Loader) -> None:
    env = {
        "FAREBOX_CHAINS__BASE_SEPOLIA__RPC": "http://127.0.0.1:1,http://127.0.0.1:2",
        "FAREBOX_CHAINS__BASE_SEPOLIA__MINT_AT__OTHERWISE": "12",
        "FAREBOX_UPSTREAMS__WEATHER__ROUTES": json.dumps([{"match": "* /*", "price": "$1"}]),
        "FAREBOX_SERVER__WORK": "false",
    }
    settings = loaded(BASE, env)
    assert settings.chains[0].rpc == ("http://127.0.0.1:1", "http://127.0.0.1:2")
    assert settings.chains[0].mint_at.otherwise == 12
    assert settings.upstreams[0].routes[0].price.units == 1_000_000
    assert settings.server.work is False


def test_everything_can_come_from_the_environment() -> None:
    env = {
        "FAREBOX_CHAINS__BASE_SEPOLIA__RPC": '["http://127.0.0.1:1"]',
        "FAREBOX_CHAINS__BASE_SEPOLIA__PAY_TO": PAY_TO,
        "FAREBOX_UPSTREAMS__A__URL": "http://127.0.0.1:9",
        "FAREBOX_UPSTREAMS__A__ROUTES": '[{"match": "* /*", "price": "$0.01"}]',
    }
    settings = load(None, env=env)
    assert settings.chains[0].name == "base-sepolia"
    assert settings.source is None


def test_interpolation(loaded: Loader) -> None:
    text = BASE + '\n[stripe]\nsecret_key = "${A}"\nwebhook_secret = "${B:-whsec_x}$${A}"\n'
    stripe = loaded(text, {"A": "sk_test_a"}).stripe
    assert stripe.secret_key is not None
    assert stripe.webhook_secret is not None
    assert stripe.secret_key.get_secret_value() == "sk_test_a"
    assert stripe.webhook_secret.get_secret_value() == "whsec_x${A}"


def test_a_value_is_not_interpolated_twice(loaded: Loader) -> None:
    text = BASE + '\n[stripe]\nsecret_key = "${A}"\nwebhook_secret = "x"\n'
    stripe = loaded(text, {"A": "${HOME}"}).stripe
    assert stripe.secret_key is not None
    assert stripe.secret_key.get_secret_value() == "${HOME}"


def test_secrets_from_files(loaded: Loader, tmp_path: Path) -> None:
    (tmp_path / "stripe").write_text("sk_test_file\n")
    text = BASE + '\n[stripe]\nsecret_key_file = "stripe"\nwebhook_secret = "x"\n'
    stripe = loaded(text).stripe
    assert stripe.secret_key is not None
    assert stripe.secret_key.get_secret_value() == "sk_test_file"


def test_quick_is_a_whole_deployment() -> None:
    settings = quick(
        "http://127.0.0.1:9000", "$0.01", CHECKSUMMED, "base-sepolia", "http://127.0.0.1:1", env={}
    )
    assert settings.upstreams[0].routes[0].match == "* /*"
    assert settings.upstreams[0].routes[0].price.units == 10_000
    assert settings.chains[0].pay_to == CHECKSUMMED.lower()


def test_a_network_spelled_out(loaded: Loader) -> None:
    token = "0x" + "cd" * 20
    text = BASE.replace("base-sepolia", '"eip155:31337"') + (
        f'\n[[chains."eip155:31337".assets]]\naddress = "{token}"\nsymbol = "TUSD"\ndecimals = 6\n'
        'eip712_name = "Test USD"\neip712_version = "1"\n'
    )
    network = loaded(text).chains[0].network
    assert (network.chain_id, network.caip2, network.v1_name) == (31337, "eip155:31337", None)
    assert network.assets[0].address == token


# --- what it is as an object ----------------------------------------------------------------


def test_settings_are_frozen_and_survive_a_process_boundary(loaded: Loader) -> None:
    settings = loaded(BASE)
    with pytest.raises(ValidationError):
        settings.server.workers = 5  # type: ignore[misc]  # that it cannot be done is the test
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301  (made a line before)


def test_no_secret_in_repr_or_in_faults(loaded: Loader) -> None:
    text = (
        BASE
        + '\n[server]\ndatabase = "postgresql://u:hunter2@db/x"\nredis = "redis://:hunter2@r"\n'
    )
    text += '[stripe]\nsecret_key = "sk_test_hunter2"\nwebhook_secret = "hunter2"\n'
    text = text.replace("http://127.0.0.1:8545", "http://127.0.0.1:8545/hunter2")
    text = text.replace("[upstreams.weather]", '[upstreams.weather]\ninject = { X = "hunter2" }')
    shown = repr(loaded(text)) + str(loaded(text))
    assert "hunter2" not in shown
    wrong = text.replace("postgresql://", "mysql://").replace("redis://", "hunter2://")
    wrong = wrong.replace(f'pay_to = "{PAY_TO}"', 'pay_to = "x"\nsettler_key = "hunter2"')
    faults = faults_of(lambda: loaded(wrong))
    assert len(faults) >= 4
    assert "hunter2" not in "\n".join(faults)


# --- faults ---------------------------------------------------------------------------------


def test_every_fault_is_named_at_once(loaded: Loader) -> None:
    text = """
    sever = {}
    [server]
    lisen = "x"
    workers = 2
    max_body = "10 parsecs"
    [credits]
    packs = ["$2"]
    min_onchain = 0.01
    [chains.base-sepoila]
    rpc = []
    [chains.base]
    rpc = ["ftp://a"]
    pay_to = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAeD"
    mint_at = { otherwise = "soon" }
    [stripe]
    secret_key = "${STRIPE_SECRET_KEY}"
    [upstreams.w]
    url = "http://127.0.0.1:9000"
    routes = [{ match = "GET /a" }, { match = "GET b", price = "$0.0000001" }]
    [upstreams.t]
    kind = "mcp"
    url = "http://127.0.0.1:1/mcp"
    mount = "/farebox/x"
    tools = { search = { rule = "flatt" } }
    """
    faults = faults_of(lambda: loaded(text, {"FAREBOX_SERVER__REDISS": "x"}))
    for part in (
        "sever is not a section; did you mean server?",
        "server.lisen is not a key of [server]; did you mean listen?",
        "server.rediss (FAREBOX_SERVER__REDISS) is not a key of [server]; did you mean redis?",
        "server.max_body should be a size",
        "server.workers is 2, which needs PostgreSQL (server.database) and Redis (server.redis)",
        "credits.packs needs one pack of at most $1",
        "credits.min_onchain should be a dollar amount in quotes",
        "chains.base-sepoila is not a network Farebox knows; did you mean base-sepolia?",
        "chains.base-sepoila.rpc should not be empty",
        "chains.base-sepoila.pay_to is missing",
        "chains.base.rpc should begin with http",
        "chains.base.pay_to has a wrong checksum",
        "chains.base.mint_at.otherwise should be",
        "stripe.secret_key needs the environment variable STRIPE_SECRET_KEY",
        "upstreams.w.routes[0].price is missing",
        "upstreams.w.routes[1].match should be",
        "upstreams.w.routes[1].price: '$0.0000001' is not",
        "upstreams.t.mount is /farebox/x, which belongs to Farebox itself",
        "upstreams.t.tools.search is wrong: there is no price rule 'flatt'",
    ):
        assert [f for f in faults if f.startswith(part)], part
    assert len(faults) == len({f.split(" ", 1)[0] + f[-20:] for f in faults})


def test_one_fault_a_key(loaded: Loader) -> None:
    text = BASE + '\n[server]\nworkers = "many"\n'
    assert faults_of(lambda: loaded(text)) == ["server.workers should be a whole number"]


CASES: list[tuple[str, str, str]] = [
    ("server", 'listen = "8402"', "server.listen should be host:port"),
    ("server", 'listen = "127.0.0.1:99999"', "server.listen should be host:port"),
    ("server", 'listen = "0.0.0.0:8402"', "server.public_url is missing"),
    ("server", 'listen = "127.0.0.1:0"', "server.public_url is missing"),
    ("server", 'public_url = "http://a.example/path"', "server.public_url should be an origin"),
    ("server", 'public_url = "http://u:p@a.example"', "server.public_url should not carry"),
    ("server", 'public_url = "a.example"', "server.public_url should begin with http"),
    (
        "server",
        'pages_url = "http://127.0.0.1:8402"\npublic_url = "http://127.0.0.1:8402/"',
        "server.pages_url is the same",
    ),
    ("server", 'admin_listen = "127.0.0.1:8402"', "server.admin_listen is the same"),
    ("server", 'database = "sqlite://farebox.db"', "server.database should be"),
    ("server", 'redis = "http://x"', "server.redis should be"),
    ("server", 'trusted_proxies = ["10.0.0.1/8"]', "server.trusted_proxies[0] should be"),
    ("server", "trusted_proxies = [10]", "server.trusted_proxies[0] should be"),
    ("server", "redis_timeout_ms = 0", "server.redis_timeout_ms should be at least 1"),
    ("server", "workers = 0", "server.workers should be at least 1"),
    ("server", "workers = true", "server.workers should be a whole number"),
    ("server", "workers = 1.0", "server.workers should be a whole number"),
    ("server", 'hold_lease_s = "1 fortnight"', "server.hold_lease_s should be a duration"),
    ("server", "offer_timeout_s = 121", "server.offer_timeout_s should be at most 120"),
    ("server", 'work = "perhaps"', "server.work should be true or false"),
    ("server", 'log_level = "loud"', "server.log_level should be"),
    ("credits", "per_usd = 300_001", "credits.per_usd should divide"),
    ("credits", "packs = []", "credits.packs should not be empty"),
    ("credits", 'packs = ["$0"]', "credits.packs names a pack that costs nothing"),
    ("credits", 'packs = ["$0.001"]', "credits.packs names a pack of $0.001, less than"),
    ("credits", 'expire_after = "1 eon"', 'credits.expire_after should be "never" or a span'),
    ("credits", 'min_onchain = "$2"', "chains.base-sepolia.min_onchain should be at most $1"),
    ("stripe", 'secret_key = "sk_test_1"', "stripe.webhook_secret is missing"),
    ("stripe", 'webhook_secret = "x"', "stripe.secret_key is missing"),
    (
        "stripe",
        'secret_key = "sk_live_1"\nwebhook_secret = "x"\napi_base = "http://127.0.0.1:1"',
        "stripe.api_base is for tests only",
    ),
    ("stripe", 'secret_key_file = "nowhere"', "stripe.secret_key_file cannot be read"),
    (
        "stripe",
        'secret_key = "a"\nsecret_key_file = "b"\nwebhook_secret = "x"',
        "stripe.secret_key_file is given beside",
    ),
    (
        "chains.base-sepolia",
        'settler_key = "0x00"',
        "chains.base-sepolia.settler_key should be a private key",
    ),
    (
        "chains.base-sepolia",
        f'settler_key = "0x{"f" * 64}"',
        "chains.base-sepolia.settler_key is not a private key of",
    ),
    (
        "chains.base-sepolia",
        f'refund_key = "{KEY}"',
        "chains.base-sepolia.refund_key needs settler_key beside it",
    ),
    (
        "chains.base-sepolia",
        "assets = []",
        "chains.base-sepolia.assets is for networks Farebox does not know",
    ),
    ("chains.base-sepolia", 'name = "x"', "chains.base-sepolia.name is not a key"),
    ("chains.base-sepolia", 'network = "x"', "chains.base-sepolia.network is not a key"),
    ("upstreams.weather", 'mount = "weather"', "upstreams.weather.mount should be a path"),
    ("upstreams.weather", 'mount = "/a/../b"', "upstreams.weather.mount should be a path"),
    ("upstreams.weather", 'mount = "/healthz"', "upstreams.weather.mount is /healthz"),
    ("upstreams.weather", 'tools = { "*" = "$1" }', 'upstreams.weather.tools is for kind = "mcp"'),
    ("upstreams.weather", 'inject = { Host = "x" }', "upstreams.weather.inject Host is set by"),
    ("upstreams.weather", 'inject = { X = "a\\nb" }', "upstreams.weather.inject X has a value"),
    ("upstreams.weather", 'inject = { "a b" = "c" }', "upstreams.weather.inject: 'a b' is not"),
    (
        "upstreams.weather",
        'inject = { X = "a", x = "b" }',
        "upstreams.weather.inject names one header twice",
    ),
    ("upstreams.weather", 'colour = "red"', "upstreams.weather.colour is not a key"),
]


@pytest.mark.parametrize(("section", "lines", "fault"), CASES, ids=[c[1][:40] for c in CASES])
def test_a_fault_is_found(loaded: Loader, section: str, lines: str, fault: str) -> None:
    header = f"[{section}]"
    text = (
        BASE.replace(header, f"{header}\n{lines}")
        if header in BASE
        else f"{BASE}\n{header}\n{lines}\n"
    )
    faults = faults_of(lambda: loaded(text))
    assert [f for f in faults if f.startswith(fault)], faults
    assert len(faults) == 1, faults


ROUTES: list[tuple[str, str]] = [
    ('{ match = "GET /v1", price = "0" }', "price is zero"),
    ('{ match = "GET /v1", price = 1 }', "price should be a dollar amount in quotes"),
    ('{ match = "GET /v1", price = "-$1" }', "price: '-$1' is not a dollar amount"),
    ('{ match = "GET /v1", price = {} }', "price should name its rule"),
    ('{ match = "get /v1", price = "$1" }', "match should be"),
    ('{ match = "/v1", price = "$1" }', "match should be"),
    ('{ match = "GET /v1?x=1", price = "$1" }', "match should be"),
    ('{ match = "GET /v1/../x", price = "$1" }', "match should be"),
    ('{ match = "GET /a*b", price = "$1" }', "match is wrong"),
    ('{ match = "TRACE /a", price = "$1" }', "match is TRACE, which is never forwarded"),
    ('{ match = "GET /farebox/v1", price = "$1" }', "match is a path that belongs to Farebox"),
    ('{ match = "GET /v1", price = "$1", charge = "always" }', "charge should be"),
    ('{ match = "GET /v1", price = "$1", rate_limit = "0/min" }', "rate_limit should be a rate"),
    ('{ match = "GET /v1", price = "$1", amount_from = "upstream" }', "amount_from is"),
    ('{ match = "GET /v1", price = "$1", timeout_s = 0 }', "timeout_s should be at least 1"),
    ('{ match = "GET /v1", price = "$1", failed_if = { status = ["9xx"] } }', "failed_if.status"),
    (
        '{ match = "GET /v1", price = "$1", failed_if = { slow = 1 } }',
        "failed_if.slow is not a key",
    ),
    (
        '{ match = "GET /v1", price = "$1", failed_if = { answer_with = [1] } }',
        "failed_if.answer_with[0] should be a path",
    ),
]


@pytest.mark.parametrize(("route", "fault"), ROUTES)
def test_a_fault_in_a_route_is_found(loaded: Loader, route: str, fault: str) -> None:
    text = BASE.replace('{ match = "GET /v1/*", price = "$0.002" }', route)
    faults = faults_of(lambda: loaded(text))
    assert faults == [f for f in faults if f.startswith(f"upstreams.weather.routes[0].{fault}")]


def test_routes_and_mounts_are_not_named_twice(loaded: Loader) -> None:
    route = '{ match = "GET /v1/*", price = "$0.002" }'
    text = BASE.replace(route, f"{route}, {route}")
    text += '\n[upstreams.other]\nurl = "http://127.0.0.1:8402"\n'
    text += 'routes = [{ match = "* /*", price = "free" }]\n'
    text += '[server]\npublic_url = "http://127.0.0.1:8402"\n'
    assert faults_of(lambda: loaded(text)) == [
        "upstreams.weather.routes[1].match repeats routes[0]",
        "upstreams.other.mount is also the mount of upstreams.weather",
        "upstreams.other.url is server.public_url: the gateway would call itself",
    ]


def test_one_network_under_two_names(loaded: Loader) -> None:
    text = BASE + f'\n[chains."eip155:84532"]\nrpc = ["http://127.0.0.1:1"]\npay_to = "{PAY_TO}"\n'
    (fault,) = faults_of(lambda: loaded(text))
    assert "is the same network as chains.base-sepolia" in fault


def test_something_to_sell_and_a_way_to_pay_are_needed(loaded: Loader) -> None:
    faults = faults_of(lambda: loaded(""))
    assert [f.split(" ")[0] for f in faults] == ["chains", "upstreams"]


@pytest.mark.parametrize(
    ("assets", "fault"),
    [
        ("", "assets is missing"),
        ("assets = 5", "assets should be a list"),
        ('assets = [{ address = "x" }]', "assets[0].address should be an address"),
        (
            f'assets = [{{ address = "{PAY_TO}", symbol = "T", decimals = 18, eip712_name = "T",'
            ' eip712_version = "1" }]',
            "assets[0].decimals should be 6",
        ),
    ],
)
def test_a_spelled_out_network_needs_its_tokens(loaded: Loader, assets: str, fault: str) -> None:
    text = BASE.replace("[chains.base-sepolia]", f'[chains."eip155:31337"]\n{assets}')
    assert faults_of(lambda: loaded(text))[0].startswith(f"chains.eip155:31337.{fault}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such file" in faults_of(lambda: load(tmp_path / "x.toml", env={}))[0]
    (tmp_path / "y.toml").write_text("[server")
    assert "is not valid TOML" in faults_of(lambda: load(tmp_path / "y.toml", env={}))[0]
    (tmp_path / "z.toml").write_bytes(b"\xff")
    assert "cannot be read" in faults_of(lambda: load(tmp_path / "z.toml", env={}))[0]


# --- text forms -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("64 KiB", 65536), ("10MB", 10_000_000), ("7 b", 7), ("512", 512), (9, 9), ("1 GiB", 2**30)],
)
def test_sizes(text: object, value: int) -> None:
    assert forms.size_bytes(text) == value


@pytest.mark.parametrize("text", ["", "KiB", "1.5 MB", "-1", "1  KiB", "1_000", "٣ KiB", 1.5, True])
def test_sizes_refused(text: object) -> None:
    with pytest.raises(ValueError, match="should be"):
        forms.size_bytes(text)


@pytest.mark.parametrize(
    ("text", "value"), [("60s", 60), ("5 min", 300), ("24 h", 86400), ("7 days", 604800), (3, 3)]
)
def test_durations(text: object, value: int) -> None:
    assert forms.duration_s(text) == value


@pytest.mark.parametrize(
    ("start", "text", "end"),
    [
        ((2026, 11, 20), "12 months", (2027, 11, 20)),
        ((2024, 2, 29), "1 year", (2025, 2, 28)),
        ((2026, 12, 31), "2 months", (2027, 2, 28)),
        ((2026, 1, 31), "30 days", (2026, 3, 2)),
    ],
)
def test_spans_follow_the_calendar(
    start: tuple[int, int, int], text: str, end: tuple[int, int, int]
) -> None:
    span = forms.span(text)
    assert span is not None
    at_ms = int(datetime(*start, 13, 5, 7, tzinfo=UTC).timestamp()) * 1000 + 89
    until_ms = int(datetime(*end, 13, 5, 7, tzinfo=UTC).timestamp()) * 1000 + 89
    assert span.after_ms(at_ms) == until_ms


def test_never_expires() -> None:
    assert forms.span("never") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("HTTPS://API.Example.COM:443/", "https://api.example.com"),
        ("http://127.0.0.1:8402", "http://127.0.0.1:8402"),
        ("http://[::1]:80", "http://[::1]"),
    ],
)
def test_origins_have_one_form(text: str, value: str) -> None:
    assert forms.origin(text) == value


@pytest.mark.parametrize(
    "text", ["http://", "http://a b", "http://a?x", "http://a#x", "http://a:x", "//a", "http://é"]
)
def test_origins_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"should|has"):
        forms.origin(text)


def test_addresses() -> None:
    assert forms.address(CHECKSUMMED) == CHECKSUMMED.lower()
    assert forms.address(CHECKSUMMED.lower()) == CHECKSUMMED.lower()
    assert forms.address("0x" + CHECKSUMMED[2:].upper()) == CHECKSUMMED.lower()
    for wrong in (CHECKSUMMED[:-1] + "D", "0x" + "0" * 40, CHECKSUMMED[2:], CHECKSUMMED + "0", 5):
        with pytest.raises(ValueError, match=r"checksum|address"):
            forms.address(wrong)


def test_rates() -> None:
    assert forms.rate("60/min") == forms.RateLimit(60, 60)
    assert forms.rate("5/s") == forms.RateLimit(5, 1)
    with pytest.raises(ValueError, match="rate"):
        forms.rate("60 per minute")
