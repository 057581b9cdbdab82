"""Chromium for tests: the one that ``HALFBYTE_CHROMIUM`` names, the system's, or Playwright's own."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from playwright.sync_api import Error as PlaywrightError

# As root no sandbox is to be had, and offline nothing is to be fetched in the background.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync")
LIMIT_MS = 120_000
# Chromium reports each refused request too, and tests provoke refusals.
REFUSED = "Failed to load resource: the server responded with a status of 4"


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser, or a skip."""
    found = os.environ.get("HALFBYTE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        except PlaywrightError as e:
            pytest.skip(f"no Chromium here: {str(e).splitlines()[0]}")
        yield browser
        browser.close()


@contextlib.contextmanager
def page_in(browser: Browser, url: str, size: Any) -> Iterator[Page]:
    """The page of a server; at the end, no script has failed and nothing was said to be wrong."""
    wrong: list[str] = []
    context = browser.new_context(viewport=size, permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(LIMIT_MS)
    expect.set_options(timeout=LIMIT_MS)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" and REFUSED not in m.text else None)
    page.goto(url + "/")
    try:
        yield page
    finally:
        context.close()
    assert wrong == []


@contextlib.contextmanager
def opened_page(url: str, size: Any) -> Iterator[Page]:
    """The page in a browser of its own."""
    with chromium() as browser, page_in(browser, url, size) as page:
        yield page


def shot(page: Page, name: str) -> None:
    """A picture for whoever wants to look: into the folder that ``HALFBYTE_SHOTS`` names."""
    folder = os.environ.get("HALFBYTE_SHOTS")
    if folder:
        assert page.viewport_size is not None
        page.screenshot(path=Path(folder, f"{name}-{page.viewport_size['width']}.png"))
