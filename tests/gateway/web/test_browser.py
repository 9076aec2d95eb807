"""Buying in a real browser: at the gateway's page, on the local Checkout page, and back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from gateway.web.required import payment_required
from tests.gateway.demo.stripes import SECRET, Stripes
from tests.gateway.web.shops import WALLET, Shop, configured, required

pytestmark = pytest.mark.asyncio(loop_scope="session")

Opener = Callable[..., Awaitable[Page]]


async def fill_card(page: Page, number: str) -> None:
    await page.get_by_label("Email").fill("buyer@example.com")
    await page.get_by_label("Card number").fill(number)
    await page.get_by_label("Expiry").fill("12/34")
    await page.get_by_label("CVC").fill("123")
    await page.get_by_role("button", name="Pay").click()


async def fits(page: Page) -> None:
    """Nothing is wider than the screen."""
    wide = await page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0


async def shows(page: Page, heading: str) -> None:
    await expect(page.get_by_role("heading", level=1)).to_have_text(heading, timeout=20_000)


@pytest.mark.parametrize("width", [390, 1280])
async def test_a_person_buys_credits(
    shop: Shop, stripes: Stripes, open_page: Opener, width: int
) -> None:
    page = await open_page(width=width)
    await page.goto(f"{shop.url}/farebox/buy")
    await fits(page)
    await page.get_by_label("$5").check()
    await page.get_by_label("Wallet that gets the credits").fill(WALLET.lower())
    await page.get_by_label("Wallet that gets the credits").blur()
    await expect(page.locator("#wallet-shown")).to_have_text(WALLET)
    await page.get_by_role("button", name="Pay $5 by card").click()
    await page.wait_for_url(f"{stripes.url}/c/pay/*")
    await fits(page)
    await expect(page.get_by_text("500 credits")).to_be_visible()
    await fill_card(page, "4242 4242 4242 4242")
    await page.wait_for_url(f"{shop.url}/farebox/buy/pay_*")
    await shows(page, "Paid")
    await expect(page.get_by_text(WALLET)).to_be_visible()
    await fits(page)


async def test_it_works_without_scripts(shop: Shop, stripes: Stripes, open_page: Opener) -> None:
    page = await open_page(width=390, javascript=False)
    await page.goto(f"{shop.url}/farebox/buy")
    await page.get_by_label("Other").check()
    await page.get_by_label("Amount in US dollars").fill("7.50")
    await page.get_by_role("button", name="Continue to payment").click()
    await expect(page.get_by_text("Enter a wallet address.")).to_be_visible()
    await expect(page.get_by_label("Amount in US dollars")).to_have_value("7.50")
    await page.get_by_label("Wallet that gets the credits").fill(WALLET)
    await page.get_by_role("button", name="Continue to payment").click()
    await page.wait_for_url(f"{stripes.url}/c/pay/*")
    await fill_card(page, "4242424242424242")
    await page.wait_for_url(f"{shop.url}/farebox/buy/pay_*")
    await shows(page, "Paid")
    await expect(page.get_by_text("$7.50")).to_be_visible()


async def test_a_mistyped_wallet_is_caught_before_paying(
    shop: Shop, stripes: Stripes, open_page: Opener
) -> None:
    page = await open_page()
    await page.goto(f"{shop.url}/farebox/buy")
    wallet = page.get_by_label("Wallet that gets the credits")
    for typed, fault in (("", "Enter a wallet"), (WALLET.replace("5aA", "5aa"), "checksum")):
        await wallet.fill(typed)
        await page.get_by_role("button", name="Pay $1 by card").click()
        await expect(page.locator("#wallet-fault")).to_contain_text(fault)
        await expect(wallet).to_be_focused()
        assert await wallet.get_attribute("aria-invalid") == "true"
    await wallet.fill(WALLET)
    await page.get_by_label("Other").check()
    await page.get_by_label("Amount in US dollars").fill("0.2")
    await page.get_by_role("button", name="Pay $0.20 by card").click()
    await expect(page.locator("#amount-fault")).to_contain_text("$0.50")
    assert stripes.ask("state")["checkout.session"] == 0


async def test_the_keyboard_is_enough(shop: Shop, stripes: Stripes, open_page: Opener) -> None:
    page = await open_page()
    await page.goto(f"{shop.url}/farebox/buy")
    seen = []
    for _ in range(6):
        await page.keyboard.press("Tab")
        seen.append(
            await page.evaluate(
                "document.activeElement.name || document.activeElement.textContent.trim()"
            )
        )
    assert seen == ["Skip to the content", "Card", "USDC", "amount", "wallet", "Pay $1 by card"]
    await page.get_by_label("$1", exact=False).first.focus()
    await page.keyboard.press("ArrowRight")
    await expect(page.get_by_role("button", name="Pay $5 by card")).to_be_visible()
    await page.get_by_label("Wallet that gets the credits").focus()
    await page.keyboard.type(WALLET)
    await page.keyboard.press("Enter")
    await page.wait_for_url(f"{stripes.url}/c/pay/*")


async def test_declined_then_failed_then_passed_authentication(
    shop: Shop, stripes: Stripes, open_page: Opener
) -> None:
    page = await open_page()
    await page.goto(f"{shop.url}/farebox/buy?wallet={WALLET}&usd=1")
    await page.get_by_role("button", name="Pay $1 by card").click()
    for number in ("4000000000000002", "4000000000000341"):
        await page.wait_for_url(f"{stripes.url}/c/pay/*")
        await fill_card(page, number)
        await expect(page.get_by_role("alert")).to_have_text("Your card was declined.")
        assert number not in await page.content()
    await fill_card(page, "4000 0027 6000 3184")
    await page.wait_for_url(f"{stripes.url}/authenticate/*")
    await page.get_by_role("button", name="Fail authentication").click()
    await expect(page.get_by_role("alert")).to_contain_text("unable to authenticate")
    await page.go_back()
    intent = stripes.client().v1.payment_intents.list().data[0]
    assert intent.status == "requires_payment_method"
    (session,) = stripes.client().v1.checkout.sessions.list().data
    assert session.status == "open" and session.url
    await page.goto(session.url)
    await fill_card(page, "4000002760003184")
    await page.get_by_role("button", name="Complete authentication").click()
    await page.wait_for_url(f"{shop.url}/farebox/buy/pay_*")
    await shows(page, "Paid")
    assert stripes.ask("state")["payment_intent"] == 1


async def test_going_back_from_checkout_charges_nothing(
    shop: Shop, stripes: Stripes, open_page: Opener
) -> None:
    page = await open_page()
    await page.goto(f"{shop.url}/farebox/buy?wallet={WALLET}")
    await page.get_by_role("button", name="Pay $1 by card").click()
    await page.get_by_role("link", name="Back").click()
    await page.wait_for_url(f"{shop.url}/farebox/buy?*")
    await expect(page.get_by_label("Wallet that gets the credits")).to_have_value(WALLET)
    await expect(page.get_by_role("button", name="Pay $1 by card")).to_be_enabled()


async def test_the_page_of_a_payment_follows_it(
    shop: Shop, stripes: Stripes, open_page: Opener
) -> None:
    page = await open_page(width=390)
    await page.goto(f"{shop.url}/farebox/buy?wallet={WALLET}&usd=5")
    await page.get_by_role("button", name="Pay $5 by card").click()
    await page.wait_for_url(f"{stripes.url}/c/pay/*")
    checkout = page.url
    (session,) = stripes.client().v1.checkout.sessions.list().data
    await page.goto(f"{shop.url}/farebox/buy/{session.client_reference_id}")
    await shows(page, "Waiting")
    await expect(page.get_by_role("link", name="Go to the payment page")).to_have_attribute(
        "href", checkout
    )
    stripes.tell(f"sessions/{session.id}/pay", bank="000123456789")
    await shows(page, "Processing")
    found = stripes.client().v1.checkout.sessions.retrieve(session.id)
    stripes.tell(f"intents/{found.payment_intent}/settle")
    await shows(page, "Paid")
    await expect(page).to_have_title("Paid – Weather & Co")


async def test_expiry_is_seen_live(shop: Shop, stripes: Stripes, open_page: Opener) -> None:
    page = await open_page()
    await page.goto(f"{shop.url}/farebox/buy?wallet={WALLET}")
    await page.get_by_role("button", name="Pay $1 by card").click()
    await page.wait_for_url(f"{stripes.url}/c/pay/*")
    checkout = page.url
    (session,) = stripes.client().v1.checkout.sessions.list().data
    await page.goto(f"{shop.url}/farebox/buy/{session.client_reference_id}")
    await shows(page, "Waiting")
    stripes.tell(f"sessions/{session.id}/expire")
    await shows(page, "Expired")
    await page.goto(checkout)
    await shows(page, "This page has expired")


async def test_a_bank_account_is_paid_on_the_page_too(
    shop: Shop, stripes: Stripes, open_page: Opener
) -> None:
    page = await open_page()
    await page.goto(f"{shop.url}/farebox/buy?wallet={WALLET}")
    await page.get_by_role("button", name="Pay $1 by card").click()
    await page.get_by_label("Email").fill("buyer@example.com")
    await page.get_by_label("US bank account").check()
    await page.get_by_label("Account number").fill("000111111116")
    await page.get_by_role("button", name="Pay").click()
    await page.wait_for_url(f"{shop.url}/farebox/buy/pay_*")
    await shows(page, "Processing")
    (session,) = stripes.client().v1.checkout.sessions.list().data
    stripes.tell(f"intents/{session.payment_intent}/settle")
    await shows(page, "Failed")


async def test_a_closed_browser_is_credited_all_the_same(
    shop: Shop, stripes: Stripes, open_page: Opener
) -> None:
    page = await open_page()
    await page.goto(f"{shop.url}/farebox/buy?wallet={WALLET}&usd=20")
    await page.get_by_role("button", name="Pay $20 by card").click()
    await page.wait_for_url(f"{stripes.url}/c/pay/*")
    await page.close()
    (session,) = stripes.client().v1.checkout.sessions.list().data
    stripes.tell(f"sessions/{session.id}/pay")
    stripes.settled()
    url = f"{shop.url}/farebox/v1/payments/{session.client_reference_id}"
    state = stripes.http.get(url).json()
    assert (state["state"], state["minted_units"]) == ("succeeded", 20_000_000)


async def test_the_usdc_page_fits_and_copies(shop: Shop, open_page: Opener) -> None:
    page = await open_page(width=390)
    await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await page.goto(f"{shop.url}/farebox/buy?pay=usdc")
    await fits(page)
    await page.get_by_role("button", name="Copy").first.click()
    copied = await page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith(f"curl -i {shop.url}/farebox/v1/credits/purchase")
    await expect(page.get_by_role("button", name="Copied")).to_be_visible()


async def test_a_lost_webhook_is_made_up_for_on_return(
    shop: Shop, stripes: Stripes, open_page: Opener
) -> None:
    stripes.tell("webhooks", url="http://127.0.0.1:1/", secret=SECRET)
    page = await open_page()
    await page.goto(f"{shop.url}/farebox/buy?wallet={WALLET}")
    await page.get_by_role("button", name="Pay $1 by card").click()
    await fill_card(page, "4242424242424242")
    await shows(page, "Paid")


@pytest.mark.parametrize("width", [390, 1280])
async def test_a_402_is_a_page(shop: Shop, open_page: Opener, tmp_path: Path, width: int) -> None:
    settings = configured(tmp_path, "sqlite:///x.db", 8402, "http://127.0.0.1:1")
    made = payment_required(settings, required(settings), "GET", "/v1/forecast/oslo")
    page = await open_page(width=width)
    await page.route(
        "**/v1/forecast/oslo",
        lambda route: route.fulfill(
            status=made.status_code, headers=dict(made.headers), body=bytes(made.body).decode()
        ),
    )
    await page.goto(f"{shop.url}/v1/forecast/oslo")
    await shows(page, "This costs $0.002")
    await fits(page)
    await page.get_by_role("link", name="Buy credits").click()
    await shows(page, "Buy credits")
