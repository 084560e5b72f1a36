from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_merge.report import Grid, Page, write_page
from tests.report.browser import console_errors, open_page, outside_requests, screenshot
from tests.report.pages import many, nasty, ordinary

WIDTHS = (390, 1280)


def shown(browser: Any, column: int = 0) -> list[str]:
    """The texts of a column of the first table, in the order that is shown."""
    script = "return [...document.querySelector('table').tBodies[0].rows].map(row => row.cells[arguments[0]].innerText)"
    return browser.execute_script(script, column)


def find(browser: Any, selector: str, which: int = 0) -> Any:
    return browser.find_elements("css selector", selector)[which]


def wait(browser: Any, script: str, *args: Any) -> Any:
    """What a script returns, as soon as that is something."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 5, poll_frequency=0.02).until(lambda _: browser.execute_script(script, *args))


def texts_of(browser: Any, selector: str, table: int | None = None) -> list[str]:
    """The texts of all that a selector finds, on the page or in one of its tables."""
    root = browser if table is None else find(browser, "table", table)
    return [element.text for element in root.find_elements("css selector", selector)]


def sort(browser: Any, column: int, key: str | None = None, table: int = 0) -> str:
    """Click the header of a column of a table, or press a key on it; returns the direction."""
    table = find(browser, "table", table)
    button = find(table, "thead button", column)
    browser.execute_script("document.addEventListener('sort-end', () => { window.isSorted = true; }, { once: true })")
    button.send_keys(key) if key else button.click()
    wait(browser, "const done = window.isSorted; window.isSorted = false; return done")
    headers = table.find_elements("css selector", "thead th")
    assert [i for i, header in enumerate(headers) if header.get_attribute("aria-sort")] == [column]
    return headers[column].get_attribute("aria-sort")


def copied(browser: Any, name: str, table: int = 0) -> str:
    """What the clipboard holds after a click on a button of a table."""
    permission = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    browser.execute_cdp_cmd("Browser.grantPermissions", permission)
    browser.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    browser.execute_script("document.getElementById('status').textContent = ''")
    find(browser, f"[data-format={name}]", table).click()
    assert wait(browser, "return document.getElementById('status').textContent") == f"{name} copied"
    return browser.execute_async_script("navigator.clipboard.readText().then(arguments[0], arguments[0])")


@pytest.fixture(scope="module")
def page() -> Page:
    return ordinary()


@pytest.fixture(scope="module")
def path(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(page, tmp_path_factory.mktemp("page") / "report.html", data={"photo": [0.5, math.nan]})


def grid(page: Page) -> Grid:
    return next(part for part in page.sections[0].parts if isinstance(part, Grid))


@pytest.mark.parametrize("make", [ordinary, nasty, lambda: many(40, 8), lambda: many(1, 1)])
def test_pages_are_quiet_load_nothing_and_do_not_scroll_sideways(browser: Any, tmp_path: Path, make: Any) -> None:
    page = make()
    path = write_page(page, tmp_path / "report.html")
    for width in WIDTHS:
        open_page(browser, path, width=width)
        assert console_errors(browser) == []
        assert outside_requests(browser) == []
        scroll, inner = browser.execute_script("return [document.scrollingElement.scrollWidth, innerWidth]")
        assert scroll <= inner == width
        assert browser.title == " ".join(page.title.split())
        assert screenshot(browser, tmp_path / f"{width}.png").stat().st_size > 10_000


def test_a_click_sorts_by_what_is_not_rounded_and_puts_what_is_missing_last(browser: Any, path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    open_page(browser, path)
    assert sort(browser, 1) == "descending"
    assert shown(browser) == ["Iso-C", "base", "TIES", "9", "SCORE", "10"]
    assert sort(browser, 1, Keys.ENTER) == "ascending"
    assert shown(browser) == ["9", "TIES", "base", "Iso-C", "SCORE", "10"]
    assert sort(browser, 2, Keys.SPACE) == "descending"
    assert shown(browser, 2) == ["100.0", "50.0", "30.0", "25.0", "10.0", "4.0"]
    assert sort(browser, 0) == "ascending"
    assert shown(browser) == ["10", "9", "base", "Iso-C", "SCORE", "TIES"]
    assert sort(browser, 0) == "descending"
    find(browser, ".unsort").click()
    assert shown(browser) == ["base", "TIES", "SCORE", "Iso-C", "10", "9"]
    assert not browser.find_elements("css selector", "[aria-sort]")
    assert not find(browser, ".unsort").is_displayed()


def test_copies_are_the_tables_own_texts_in_the_order_shown(browser: Any, page: Page, path: Path) -> None:
    open_page(browser, path)
    table = grid(page)
    assert copied(browser, "Markdown") == table.markdown()
    assert copied(browser, "CSV") == table.csv()
    assert copied(browser, "LaTeX") == table.latex()
    sort(browser, 2)
    by_sketch = sorted(table.rows, key=lambda row: -row[2].value)
    assert copied(browser, "Markdown") == Grid(table.header, by_sketch, table.caption).markdown()
    assert copied(browser, "CSV") == Grid(table.header, by_sketch, table.caption).csv()


def test_copies_work_where_the_browser_has_no_clipboard(browser: Any, page: Page, path: Path) -> None:
    open_page(browser, path)
    browser.execute_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    browser.execute_script("document.addEventListener('copy', () => { window.taken = document.activeElement.value; })")
    button = find(browser, "[data-format=Markdown]")
    button.click()
    assert wait(browser, "return document.getElementById('status').textContent") == "Markdown copied"
    assert browser.execute_script("return window.taken") == grid(page).markdown()
    assert browser.switch_to.active_element == button
    assert browser.find_elements("css selector", "textarea") == []


def test_the_theme_follows_the_system_until_it_is_chosen(browser: Any, path: Path) -> None:
    def background() -> str:
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    open_page(browser, path)
    light = background()
    open_page(browser, path, dark=True)
    dark = background()
    assert light != dark
    assert find(browser, "#theme").text == "Light"
    find(browser, "#theme").click()
    assert background() == light
    open_page(browser, path, dark=True)
    assert background() == light, "the choice was not remembered"
    find(browser, "#theme").click()
    assert background() == dark
    browser.execute_script("localStorage.clear()")


@pytest.mark.parametrize("dark", [False, True])
def test_texts_have_contrast_in_both_themes(browser: Any, path: Path, dark: bool) -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1, by the colours that the browser computes."""
    open_page(browser, path, dark=dark)
    pairs = browser.execute_script("""
        const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
        const rgb = (...layers) => {
          for (const layer of layers) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
          return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
        };
        const behind = element => {
          const own = element ? [getComputedStyle(element).backgroundColor] : ["white"];
          return element ? [...behind(element.parentElement), ...own] : own;
        };
        const tags = "p, li, dt, dd, a, summary, th, td, caption, figcaption, button, code, h1, h2";
        return [...document.querySelectorAll(tags)].filter(element => element.checkVisibility())
          .map(element => {
            const ink = rgb(getComputedStyle(element).color);
            return [element.outerHTML.slice(0, 80), ink, rgb(...behind(element))];
          });
    """)
    assert len(pairs) > 40
    for name, ink, paper in pairs:
        low, high = sorted((luminance(ink), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ink, paper)


def luminance(color: list[int]) -> float:
    """Relative luminance (WCAG 2.2) of red, green and blue in 0 to 255."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (channel / 255 for channel in color)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_on_a_phone_wide_tables_scroll_inside_with_their_names_in_sight(browser: Any, tmp_path: Path) -> None:
    open_page(browser, write_page(many(40, 8), tmp_path / "report.html"), width=390)
    region = find(browser, ".scroll")
    assert region.get_attribute("tabindex") == "0"
    where = """
        const [region, name] = [arguments[0], arguments[0].querySelector("tbody th")];
        region.scrollLeft = 200;
        return [region.scrollLeft, name.getBoundingClientRect().x - region.getBoundingClientRect().x];
    """
    assert browser.execute_script(where, region) == [200, 0]
    assert not find(browser, ".contents ol").is_displayed()
    open_page(browser, tmp_path / "report.html", width=1280)
    assert wait(browser, "return document.querySelector('.scroll').classList.contains('fits')")
    assert find(browser, ".scroll").get_attribute("tabindex") is None
    assert find(browser, ".contents ol").is_displayed()


def test_figures_can_be_enlarged_and_come_back(browser: Any, path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    open_page(browser, path, width=390)
    small = find(browser, "figure svg").size["width"]
    assert small <= 390
    button = find(browser, ".enlarge")
    button.click()
    assert find(browser, "dialog svg").size["width"] > small
    find(browser, "dialog").send_keys(Keys.ESCAPE)
    assert wait(browser, "return document.querySelector('figure svg')").size["width"] == small
    assert browser.switch_to.active_element == button


def test_the_data_can_be_saved(browser: Any, path: Path) -> None:
    open_page(browser, path)
    link = find(browser, "footer a")
    assert link.get_attribute("download") == "A-benchmark.json"
    read = "fetch(arguments[0]).then(answer => answer.text()).then(arguments[1], arguments[1])"
    browser.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})
    try:
        open_page(browser, path)
        text = browser.execute_async_script(read, find(browser, "footer a").get_attribute("href"))
    finally:
        browser.execute_cdp_cmd("Page.setBypassCSP", {"enabled": False})
    assert json.loads(text) == {"photo": [0.5, None]}


def test_the_checks_themselves_find_a_page_that_asks_for_something(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text('<title>asks</title><img src="http://127.0.0.1:9/nobody.png">')
    open_page(browser, path)
    assert outside_requests(browser) == ["http://127.0.0.1:9/nobody.png"]
    assert len(console_errors(browser)) == 1
