"""A shop to buy at, and a browser, launched once per worker.

The browser lives on pytest-asyncio's session loop, so tests that use it say
``pytestmark = pytest.mark.asyncio(loop_scope="session")``.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, Page, Playwright, async_playwright

from tests import servers
from tests.gateway.demo.stripes import SECRET, Stripes, stripes
from tests.gateway.web.shops import BROWSERS, FLAGS, Shop, configured, running

__all__ = ["stripes"]


@pytest.fixture
def shop_with(
    tmp_path: Path, sqlite_url: str, stripes: Stripes, free_port: Callable[[], int]
) -> Iterator[Callable[..., Shop]]:
    """Start a gateway with changes to its sections; Stripe's messages go to it."""
    with contextlib.ExitStack() as ends:

        def start(**change: Any) -> Shop:
            settings = configured(tmp_path, sqlite_url, free_port(), stripes.url, **change)
            shop = ends.enter_context(contextlib.contextmanager(running)(settings))
            stripes.tell("webhooks", url=f"{shop.url}/farebox/webhooks/stripe", secret=SECRET)
            return shop

        yield start


@pytest.fixture
def shop(shop_with: Callable[..., Shop]) -> Shop:
    """A gateway as configured by default."""
    return shop_with()


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser of this machine."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        servers.missing("a browser", "install chromium")
    servers.note("Chromium", found)
    return found


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser(chromium: str) -> AsyncIterator[Browser]:
    """One Chromium per worker."""
    playwright: Playwright
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield launched
        await launched.close()


@pytest_asyncio.fixture(loop_scope="session")
async def open_page(browser: Browser) -> AsyncIterator[Callable[..., Any]]:
    """Open a page in a fresh profile: ``await open_page(width=390, javascript=False)``.

    Whatever the browser complains about (a blocked script, a missing file) fails the test.
    """
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    async def start(
        *, width: int = 1280, height: int = 900, javascript: bool = True, dark: bool = False
    ) -> Page:
        context = await browser.new_context(
            viewport={"width": width, "height": height},
            java_script_enabled=javascript,
            color_scheme="dark" if dark else "light",
        )
        contexts.append(context)
        page = await context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        return page

    yield start
    for context in contexts:
        await context.close()
    expected = "Failed to load resource: the server responded with a status of 4"
    assert [said for said in complaints if not said.startswith(expected)] == []
