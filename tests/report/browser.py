"""Pages opened in headless Chromium, and what happens there."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-extensions",
)


@contextmanager
def chromium(folder: Path) -> Iterator[Any]:
    """A browser whose profile, home and downloads are in a folder; skips where there is none."""
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = browser
    for argument in (*_ARGUMENTS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    home = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    service = selenium.ChromeService(driver, env={**os.environ, **home})
    opened = selenium.Chrome(options, service)
    opened.set_page_load_timeout(30)
    try:
        yield opened
    finally:
        opened.quit()


def open_page(browser: Any, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
    """Open a file anew, on a screen so wide, with the system's light or dark theme; drop earlier logs."""
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    wishes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wishes.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(path.resolve().as_uri())


def console_errors(browser: Any) -> list[str]:
    """What the console has said since the page was opened, but for mere information."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]


def outside_requests(browser: Any) -> list[str]:
    """The addresses asked for since the page was opened, but for files and what the page holds itself."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    addresses = [request["request"]["url"] for request in sent]
    assert any(address.startswith("file://") for address in addresses), "the log holds no request at all"
    return [address for address in addresses if not address.startswith(("file://", "data:", "blob:", "about:"))]


def screenshot(browser: Any, path: Path) -> Path:
    """Save a picture of the page from top to bottom."""
    size = browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    image = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(image["data"]))
    return path
