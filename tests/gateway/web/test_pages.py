"""The pages over HTTP: headers, escaping, what is typed wrongly, how a payment stands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.errors import Problem
from gateway.payments.journal import Payment
from gateway.web import pages, shop
from gateway.web.required import payment_required, wants_page
from tests.e2e.stage import new_account
from tests.e2e.wallet import Wallet
from tests.gateway.demo.stripes import SECRET, Stripes, until
from tests.gateway.web.shops import OPERATOR, WALLET, Shop, configured, required

FORM = {"amount": "5", "other": "", "wallet": WALLET}


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, timeout=30) as client:
        yield client


def words(answer: Any) -> str:
    """What a page says, without its markup."""
    text = answer.text if isinstance(answer, httpx.Response) else answer.body.decode()
    return unescape(" ".join(re.sub(r"<[^>]*>", " ", text).split()))


# --- every page -----------------------------------------------------------------------------


class Audit(HTMLParser):
    """Collects what a strict policy forbids and what a person with a screen reader misses."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.labelled: set[str] = set()
        self.fields: list[tuple[str, bool]] = []
        self.ids: list[str] = []
        self.in_label = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        have = {name: value or "" for name, value in attrs}
        self.faults += [f"{tag} has {name}" for name in have if name.startswith("on")]
        if "style" in have or tag == "style":
            self.faults.append(f"{tag} has an inline style")
        if tag == "script" and "src" not in have:
            self.faults.append("an inline script")
        if tag in {"script", "link", "img"}:
            place = have.get("src", have.get("href", ""))
            if not place.startswith("/farebox/static/"):
                self.faults.append(f"{tag} from {place}")
        if tag == "img" and "alt" not in have:
            self.faults.append("an image without alt")
        if tag == "label":
            self.in_label += 1
            self.labelled.add(have.get("for", ""))
        if tag == "input" and have.get("type") != "hidden":
            self.fields.append((have.get("id", ""), self.in_label > 0))
        if "id" in have:
            self.ids.append(have["id"])

    def handle_endtag(self, tag: str) -> None:
        if tag == "label":
            self.in_label -= 1


def audit(text: str) -> None:
    found = Audit()
    found.feed(text)
    assert found.faults == []
    assert [one for one, inside in found.fields if not inside and one not in found.labelled] == []
    assert len(found.ids) == len(set(found.ids))
    assert '<html lang="en">' in text and 'name="viewport"' in text
    assert text.count("<h1") == 1 and text.count("<main") == 1
    described = re.findall(r'aria-(?:describedby|labelledby)="([^"]*)"', text)
    assert {one for all_ids in described for one in all_ids.split()} <= set(found.ids)


@pytest.mark.parametrize("path", ["/buy", "/buy?pay=usdc", "/buy?canceled=1", "/buy/pay_none"])
def test_every_page_is_strict_and_labelled(shop: Shop, http: httpx.Client, path: str) -> None:
    answer = http.get(f"{shop.url}/farebox{path}")
    audit(answer.text)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert OPERATOR in words(answer)


def test_files_of_the_pages_are_kept_by_their_content(shop: Shop, http: httpx.Client) -> None:
    page = http.get(f"{shop.url}/farebox/buy").text
    links = set(re.findall(r'"(/farebox/static/[^"]+)"', page))
    assert len(links) == 3
    for link in links:
        lasting = http.get(shop.url + link)
        assert lasting.status_code == 200 and "immutable" in lasting.headers["cache-control"]
        assert lasting.headers["x-content-type-options"] == "nosniff"
        plain = http.get(shop.url + link.partition("?")[0])
        assert plain.headers["cache-control"] == "no-cache"
    for name in ("nothing.css", "..%2fpages.py", "%2e%2e"):
        assert http.get(f"{shop.url}/farebox/static/{name}").status_code in {400, 404}


def colours(css: str) -> list[dict[str, str]]:
    """The colours of the light and of the dark scheme."""
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    found = [dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block)) for block in blocks]
    assert len(found) == 2 and found[0].keys() == found[1].keys()
    return found


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, contrast ratio."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_read() -> None:
    for scheme in colours(pages.assets()["farebox.css"].content.decode()):
        for text, ground in [
            ("ink", "page"),
            ("ink", "card"),
            ("ink", "soft"),
            ("quiet", "page"),
            ("quiet", "card"),
            ("quiet", "soft"),
            ("accent-deep", "page"),
            ("on-accent", "accent"),
            ("on-accent", "accent-deep"),
            ("bad", "bad-soft"),
            ("on-note", "note"),
            ("on-code", "code"),
        ]:
            assert contrast(scheme[text], scheme[ground]) >= 4.5, (text, ground)
        for edge in ("field", "accent"):  # borders of controls and the focus ring
            assert contrast(scheme[edge], scheme["card"]) >= 3, edge
            assert contrast(scheme[edge], scheme["page"]) >= 3, edge


# --- the buy page ---------------------------------------------------------------------------


def test_the_buy_page_says_what_is_bought(shop: Shop, http: httpx.Client) -> None:
    said = words(http.get(f"{shop.url}/farebox/buy"))
    for text in ("$1 100 credits", "$5 500 credits", "$20 2000 credits", "12 months", "Test mode"):
        assert text in said
    assert "$0.10" not in said  # a card cannot pay so little


def test_usdc_shows_how_an_agent_pays(shop: Shop, http: httpx.Client) -> None:
    said = words(http.get(f"{shop.url}/farebox/buy?pay=usdc"))
    assert "USDC on Base Sepolia test network" in said
    assert "0x036CbD53842c5426634e7929541eC2318f3dCF7e" in said
    assert f'agent.post("{shop.url}/farebox/v1/credits/purchase"' in said
    assert "Wallet that gets" not in said


def test_a_link_chooses_amount_and_wallet(shop: Shop, http: httpx.Client) -> None:
    page = http.get(f"{shop.url}/farebox/buy?wallet={WALLET}&usd=20").text
    assert f'value="{WALLET}"' in page
    assert re.search(r'value="20"[^>]* checked', page)
    other = http.get(f"{shop.url}/farebox/buy?usd=7.50").text
    assert re.search(r'value="other"[^>]* checked', other) and 'value="7.50"' in other


def test_texts_from_outside_stay_text(shop: Shop, http: httpx.Client) -> None:
    evil = '"><script>alert(1)</script>'
    for answer in (
        http.get(f"{shop.url}/farebox/buy", params={"wallet": evil, "usd": evil}),
        http.post(f"{shop.url}/farebox/buy", data={**FORM, "wallet": evil, "other": evil}),
    ):
        assert "<script>alert" not in answer.text
        audit(answer.text)
    # the operator's own name is text too
    assert "Weather &amp; Co" in answer.text


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"amount": ""}, "Choose an amount."),
        ({"amount": "other"}, "Choose an amount."),
        ({"amount": "other", "other": "abc"}, "is not a dollar amount"),
        ({"amount": "other", "other": "0.30"}, "from $0.50"),
        ({"amount": "other", "other": "1.005"}, "whole cents"),
        ({"amount": "other", "other": "1000000"}, "An amount from"),
        ({"wallet": ""}, "Enter a wallet address."),
        ({"wallet": "0x12"}, "should be an address"),
        ({"wallet": WALLET.replace("5aA", "5aa")}, "wrong checksum"),
        ({"wallet": "0x" + "0" * 40}, "zero address"),
    ],
)
def test_a_wrong_form_comes_back_with_the_fault(
    shop: Shop, http: httpx.Client, stripes: Stripes, change: dict[str, str], fault: str
) -> None:
    answer = http.post(f"{shop.url}/farebox/buy", data={**FORM, **change})
    assert answer.status_code == 400
    assert fault in words(answer)
    audit(answer.text)
    assert stripes.ask("state")["checkout.session"] == 0


@pytest.mark.parametrize("wallet", [WALLET, WALLET.lower(), f"  {WALLET} "])
def test_a_good_form_leads_to_checkout(
    shop: Shop, http: httpx.Client, stripes: Stripes, wallet: str
) -> None:
    answer = http.post(f"{shop.url}/farebox/buy", data={**FORM, "wallet": wallet})
    assert answer.status_code == 303
    assert answer.headers["location"].startswith(f"{stripes.url}/c/pay/")
    # browsers apply the form-action of the page that was left to this redirect
    assert stripes.url in http.get(f"{shop.url}/farebox/buy").headers["content-security-policy"]


def test_forms_of_other_types_are_refused(shop: Shop, http: httpx.Client) -> None:
    assert http.post(f"{shop.url}/farebox/buy", json=FORM).status_code == 415
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    assert http.post(f"{shop.url}/farebox/buy", content=b"\xff", headers=kind).status_code == 400
    many = b"&".join(b"a=1" for _ in range(21))
    assert http.post(f"{shop.url}/farebox/buy", content=many, headers=kind).status_code == 400


def test_when_stripe_fails_the_form_stays(shop: Shop, http: httpx.Client, stripes: Stripes) -> None:
    stripes.tell("faults", kind="error_before", path="/v1/checkout/sessions", times=100)
    answer = http.post(f"{shop.url}/farebox/buy", data=FORM)
    assert answer.status_code == 503 and "nothing was charged" in words(answer)
    assert f'value="{WALLET}"' in answer.text


BEHIND = {"trusted_proxies": ["127.0.0.1"]}
PURCHASES = {
    "/farebox/v1/card/checkout": {"amount_usd": "5", "wallet_address": WALLET},
    "/farebox/v1/credits/purchase": {
        "amount_usd": "5",
        "wallet_address": WALLET,
        "payment_method": "card",
    },
}


def sessions(stripes: Stripes) -> int:
    found: int = stripes.ask("state")["checkout.session"]
    return found


def test_an_address_begins_only_so_many_card_payments(
    shop_with: Callable[..., Shop], http: httpx.Client, stripes: Stripes
) -> None:
    """Each is a row here and a session there: of all doors together."""
    started = shop_with(server=BEHIND, stripe={"checkouts_per_min": 3})
    here, there = {"X-Forwarded-For": "1.2.3.4"}, {"X-Forwarded-For": "5.6.7.8"}
    form = f"{started.url}/farebox/buy"
    # What is refused for what it says does not count.
    assert http.post(form, data={**FORM, "wallet": "no"}, headers=here).status_code == 400
    for path, body in PURCHASES.items():
        wrong = {**body, "wallet_address": "no"}
        assert http.post(started.url + path, json=wrong, headers=here).status_code == 400
    assert http.post(form, data=FORM, headers=here).status_code == 303
    for path, body in PURCHASES.items():
        assert http.post(started.url + path, json=body, headers=here).status_code == 200
    for path, body in PURCHASES.items():
        full = http.post(started.url + path, json=body, headers=here)
        assert (full.status_code, full.json()["code"]) == (429, "rate_limited")
        assert 0 < int(full.headers["retry-after"]) <= 60
    page = http.post(form, data=FORM, headers=here)
    assert page.status_code == 429 and 0 < int(page.headers["retry-after"]) <= 60
    assert "Too many card payments" in words(page) and f'value="{WALLET}"' in page.text
    audit(page.text)
    assert sessions(stripes) == 3
    assert http.post(form, data=FORM, headers=there).status_code == 303


def test_an_address_that_many_may_share_begins_more(
    shop_with: Callable[..., Shop], http: httpx.Client, stripes: Stripes
) -> None:
    started = shop_with(stripe={"checkouts_per_min": 1})
    for status in [303] * 10 + [429]:
        assert http.post(f"{started.url}/farebox/buy", data=FORM).status_code == status
    assert sessions(stripes) == 10


def test_who_has_an_account_and_signs_is_counted_for_it(
    shop_with: Callable[..., Shop], http: httpx.Client, stripes: Stripes
) -> None:
    started = shop_with(server=BEHIND, stripe={"checkouts_per_min": 2})
    known, fresh = Wallet(new_account()), Wallet(new_account())
    url = f"{started.url}/farebox/v1/card/checkout"

    def ask(signer: Wallet | None, at: str) -> httpx.Response:
        body = json.dumps({"amount_usd": "5", "wallet_address": known.address}).encode()
        headers = {"X-Forwarded-For": at}
        if signer is not None:
            headers = signer.sign("POST", url, body, headers=headers)
        return http.post(url, content=body, headers=headers)

    first = ask(None, "9.9.9.9").json()
    stripes.tell(f"sessions/{first['checkout_url'].rsplit('/', 1)[1]}/pay")
    stripes.settled()
    # New keys cost nothing, so they do not make room.
    assert [ask(each, "1.2.3.4").status_code for each in (None, fresh, fresh)] == [200, 200, 429]
    assert [ask(known, "1.2.3.4").status_code for _ in range(3)] == [200, 200, 429]
    assert ask(known, "7.7.7.7").status_code == 429
    other = known.sign("POST", url, b"another body")
    wrong = http.post(url, json={"amount_usd": "5", "wallet_address": WALLET}, headers=other)
    assert wrong.json()["code"] == "signature_digest_mismatch"


def test_addresses_are_shown_as_people_compare_them(shop: Shop, http: httpx.Client) -> None:
    def ask(address: str) -> httpx.Response:
        return http.get(f"{shop.url}/farebox/buy/wallet", params={"address": address})

    assert ask(WALLET.lower()).json() == {"address": WALLET}
    for wrong in ("", "0x12", WALLET.replace("5aA", "5aa"), "0x" + "０" * 40):
        assert ask(wrong).status_code == 400
        assert ask(wrong).json()["detail"].startswith("The wallet address ")


def test_without_cards_only_usdc_is_offered(
    shop_with: Callable[..., Shop], http: httpx.Client
) -> None:
    started = shop_with(stripe=None)
    answer = http.get(f"{started.url}/farebox/buy")
    assert "An agent pays by itself" in words(answer) and "Card" not in words(answer)
    assert answer.headers["content-security-policy"].endswith("form-action 'self'")
    assert http.post(f"{started.url}/farebox/buy", data=FORM).status_code == 404


def test_without_chains_only_cards_are_offered(
    shop_with: Callable[..., Shop], http: httpx.Client
) -> None:
    started = shop_with(chains=None, server={"operator": ""})
    said = words(http.get(f"{started.url}/farebox/buy?pay=usdc"))
    assert "USDC" not in said and "Wallet that gets the credits" in said
    assert "Sold by 127.0.0.1:" in said  # without a name the host stands for the operator


# --- the page of a payment ------------------------------------------------------------------


def opened(shop: Shop, http: httpx.Client, stripes: Stripes) -> tuple[str, str]:
    """Open a card payment: the address of its page, and the session's id."""
    answer = http.post(f"{shop.url}/farebox/buy", data=FORM)
    session = answer.headers["location"].rsplit("/", 1)[1]
    found = stripes.client().v1.checkout.sessions.retrieve(session)
    return f"{shop.url}/farebox/buy/{found.client_reference_id}", session


def heading(answer: httpx.Response) -> str:
    found = re.search(r"<h1[^>]*>(.*?)</h1>", answer.text)
    assert answer.status_code == 200 and found
    audit(answer.text)
    return found[1]


def test_a_payment_is_shown_from_waiting_to_paid(
    shop: Shop, http: httpx.Client, stripes: Stripes
) -> None:
    page, session = opened(shop, http, stripes)
    waiting = http.get(page)
    assert heading(waiting) == "Waiting" and f"/c/pay/{session}" in waiting.text
    assert WALLET in waiting.text and "$5" in waiting.text
    stripes.tell("mode", copies=40)
    stripes.tell(f"sessions/{session}/pay")
    assert {one["state"] for one in stripes.settled()} == {"succeeded"}
    paid = http.get(page)
    assert heading(paid) == "Paid" and "/c/pay/" not in paid.text
    state = http.get(page.replace("/buy/", "/v1/payments/")).json()
    assert (state["state"], state["minted_units"]) == ("succeeded", 5_000_000)  # once, of 160


def test_a_lost_message_does_not_keep_a_payment_waiting(
    shop: Shop, http: httpx.Client, stripes: Stripes
) -> None:
    page, session = opened(shop, http, stripes)
    stripes.tell("webhooks", url="http://127.0.0.1:1/", secret=SECRET)
    stripes.tell(f"sessions/{session}/pay")
    # a slow Stripe makes the page show what is known; it asks again when it is opened again
    until(lambda: heading(http.get(page)) == "Paid")


def test_views_do_not_ask_stripe_each_time(
    shop: Shop, http: httpx.Client, stripes: Stripes
) -> None:
    page, session = opened(shop, http, stripes)
    before = len(stripes.ask("calls")["calls"])
    for _ in range(40):
        assert heading(http.get(page)) == "Waiting"
    new = stripes.ask("calls")["calls"][before:]
    looks = [call for call in new if call["path"] == f"/v1/checkout/sessions/{session}"]
    assert 1 <= len(looks) < 20  # one a second


def test_when_stripe_is_silent_the_page_shows_what_is_known(
    shop: Shop, http: httpx.Client, stripes: Stripes
) -> None:
    page, _ = opened(shop, http, stripes)
    stripes.tell("faults", kind="error_before", method="GET", path="/v1/checkout", times=100)
    assert heading(http.get(page)) == "Waiting"


def test_a_bank_debit_is_processing_then_paid_or_failed(
    shop: Shop, http: httpx.Client, stripes: Stripes
) -> None:
    for account, end in (("000123456789", "Paid"), ("000111111116", "Failed")):
        page, session = opened(shop, http, stripes)
        stripes.tell(f"sessions/{session}/pay", bank=account)
        stripes.settled()
        assert heading(http.get(page)) == "Processing"
        intent = stripes.client().v1.checkout.sessions.retrieve(session).payment_intent
        stripes.tell(f"intents/{intent}/settle")
        stripes.settled()
        assert heading(http.get(page)) == end


def test_an_expired_payment_offers_another_try(
    shop: Shop, http: httpx.Client, stripes: Stripes
) -> None:
    page, session = opened(shop, http, stripes)
    stripes.tell(f"sessions/{session}/expire")
    stripes.settled()
    expired = http.get(page)
    assert heading(expired) == "Expired" and "Try again" in words(expired)
    again = re.search(r'href="(/farebox/buy\?[^"]*)"', expired.text)
    assert again
    form = http.get(shop.url + unescape(again[1])).text
    assert WALLET.lower() in form and re.search(r'value="5"[^>]* checked', form)


def payment(**change: Any) -> Payment:
    nothing: dict[str, Any] = dict.fromkeys(Payment.__dataclass_fields__)
    fixed = {"id": "pay_1", "provider": "stripe", "state": "created", "amount_units": 5_000_000}
    return Payment(**{**nothing, **fixed, "created_at_ms": 0, "recipient": WALLET, **change})


@pytest.mark.parametrize(
    ("state", "error", "word", "final"),
    [
        ("created", None, "Waiting", False),
        ("processing", None, "Processing", False),
        ("succeeded", None, "Paid", True),
        ("failed", "expired", "Expired", True),
        ("failed", "declined", "Failed", True),
        ("refunded", None, "Refunded", True),
        ("disputed", None, "Disputed", True),
        ("reversed", None, "Reversed", True),
    ],
)
def test_every_state_has_its_word(state: str, error: str | None, word: str, final: bool) -> None:
    found = shop.state_of(payment(state=state, error_code=error))
    assert (found.word, found.final) == (word, final)


def test_a_checkout_page_is_linked_while_it_is_open(tmp_path: Path) -> None:
    settings = configured(tmp_path, "sqlite:///x.db", 8402, "http://127.0.0.1:1")
    one = payment(external_url="https://checkout.stripe.com/c/pay/x")
    assert shop.payment_facts(settings, one, 3_599_999)["pay_url"] == one.external_url
    assert shop.payment_facts(settings, one, 3_600_000)["pay_url"] is None
    done = replace(one, state="succeeded")
    assert shop.payment_facts(settings, done, 0)["pay_url"] is None


def test_a_chain_payment_links_its_transaction(tmp_path: Path) -> None:
    settings = configured(tmp_path, "sqlite:///x.db", 8402, "http://127.0.0.1:1")
    one = payment(provider="x402", state="succeeded", network="eip155:84532", tx_hash="0xabc")
    found = shop.payment_facts(settings, one, 0)["explorer"]
    assert found.startswith("https://") and found.endswith("0xabc")


# --- 402 as a page --------------------------------------------------------------------------

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/webp,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "page"),
    [
        (BROWSER, True),
        ("text/html", True),
        ("TEXT/HTML; q=0.9", True),
        ("*/*", False),
        ("", False),
        ("application/json", False),
        ("application/json, text/html;q=0.5", False),
        ("text/html;q=0", False),
        ("text/html;q=x", False),
        ("text/*", False),
        ("application/json;q=0.5, text/html", True),
    ],
)
def test_only_who_asks_for_html_gets_a_page(accept: str, page: bool) -> None:
    assert wants_page(accept) is page


def test_a_402_for_a_browser_keeps_its_headers(tmp_path: Path) -> None:
    settings = configured(tmp_path, "sqlite:///x.db", 8402, "http://127.0.0.1:1")
    problem = required(settings)
    page = payment_required(settings, problem, "GET", "/v1/forecast/oslo")
    assert page.status_code == 402
    assert page.headers["payment-required"] == problem.headers["PAYMENT-REQUIRED"]
    assert page.headers["vary"] == "Accept" and page.headers["cache-control"] == "no-store"
    assert page.headers["content-type"].startswith("text/html")
    audit(bytes(page.body).decode())
    said = words(page)
    assert "This costs $0.002" in said and "0.2" in said
    assert "$0.01 USDC on Base Sepolia (test network)" in said  # the smallest settlement
    assert 'href="/farebox/buy"' in bytes(page.body).decode()
    assert "GET http://127.0.0.1:8402/v1/forecast/oslo" in said


def test_a_402_page_shows_the_address_as_text(tmp_path: Path) -> None:
    settings = configured(tmp_path, "sqlite:///x.db", 8402, "http://127.0.0.1:1")
    target = "/v1/forecast/%3Cscript%3E?'\"<b>" + "x" * 5000
    page = bytes(payment_required(settings, required(settings), "GET", target).body).decode()
    audit(page)
    assert "<b>" not in page and "x" * 400 not in page


def test_a_402_without_cards_or_without_offers(tmp_path: Path) -> None:
    settings = configured(tmp_path, "sqlite:///x.db", 8402, "", stripe=None)
    page = payment_required(settings, required(settings), "GET", "/v1/forecast/oslo")
    assert "With a card" not in words(page) and "With USDC" in words(page)
    bare = Problem("settlement_pending", "It is on its way.")
    page = payment_required(settings, bare, "GET", "/v1/forecast/oslo")
    assert "With USDC" not in words(page) and "It is on its way." in words(page)
