"""The page at `/` in a real browser: type, see, change the task, read an error, by mouse and by keyboard."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait
from small_index import TEXTS, TITLES, configuration, publish_index, publish_model, serving

from serve.arguments import ServeArgs
from serve.keys import Key

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver")
KEY = "k" * 43


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, serve_port: int) -> Iterator[str]:
    """An endpoint that wants a key."""
    folder = tmp_path_factory.mktemp("playground")
    contract = publish_model(str(folder / "model"), configuration(folder), seed=0)
    publish_index(str(folder / "index"), contract, str(folder / "model"))
    args = ServeArgs(
        checkpoint=str(folder / "model"),
        index=str(folder / "index"),
        keys=(Key(name="team", sha256=hashlib.sha256(KEY.encode()).hexdigest()),),
        threads=1,
        shard_threads=1,
    )
    with serving(args, serve_port, "playground") as url:
        yield f"{url}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with Chrome(options=options, service=ChromeService(DRIVER)) as browser:
        browser.set_window_size(1200, 900)
        yield browser


@pytest.fixture
def page(url: str, browser: Chrome) -> Iterator[Chrome]:
    """The page, with the key in it."""
    browser.get(url)
    browser.execute_script(f"sessionStorage.setItem('key', '{KEY}')")
    browser.get(url)
    wait(browser, "#tasks input", 2)
    yield browser
    said = [entry["message"] for entry in browser.get_log("browser") if "favicon" not in entry["message"]]
    refused = [message for message in said if "status of 4" not in message]  # those are meant
    assert refused == [], "the page runs without errors, and loads nothing that its policy forbids"


def wait(browser: Chrome, selector: str, count: int = 1) -> list[WebElement]:
    """At least so many elements, once they are there."""

    def found(browser: Chrome) -> list[WebElement] | None:
        elements = browser.find_elements(By.CSS_SELECTOR, selector)
        return elements if len(elements) >= count else None

    elements: list[WebElement] = WebDriverWait(browser, 20).until(found)
    return elements


def ask(browser: Chrome, text: str) -> None:
    field = browser.find_element(By.ID, "query")
    field.clear()
    field.send_keys(text, Keys.ENTER)


def test_a_query_shows_every_task_side_by_side_with_pages_in_common_and_stages(page: Chrome) -> None:
    ask(page, "which body is far from the sun")
    titles = wait(page, "#columns section .title", 12)
    assert {title.text.split(" 2 of 2")[0] for title in titles} == set(TITLES)
    assert [head.text for head in page.find_elements(By.CSS_SELECTOR, "#columns h2")] == ["1 nq", "2 fever"]
    wait(page, "#below td", 4)
    assert [cell.text for cell in page.find_elements(By.CSS_SELECTOR, "#below td")] == ["6"] * 4
    bar = page.find_element(By.CSS_SELECTOR, ".bar")
    assert "searches" in (bar.get_attribute("aria-label") or "")
    assert sum(piece.size["width"] for piece in bar.find_elements(By.TAG_NAME, "span")) > 0.9 * bar.size["width"]
    assert page.find_element(By.ID, "found").text == "2 tasks found 6 pages, 6 of them by more than one"
    assert "tiny · index" in page.find_element(By.ID, "about").text
    assert "12 passages, 2 shards, flat" in page.find_element(By.ID, "about").text


def test_a_task_can_be_left_out_and_the_address_keeps_the_question(page: Chrome) -> None:
    page.find_element(By.CSS_SELECTOR, "input[value=nq]").click()
    ask(page, "which body")
    wait(page, "#columns .title", 6)
    assert [head.text for head in page.find_elements(By.CSS_SELECTOR, "#columns h2")] == ["1 fever"]
    Select(page.find_element(By.ID, "top_k")).select_by_visible_text("5")
    Select(page.find_element(By.ID, "level")).select_by_value("passage")
    ask(page, "which body")
    WebDriverWait(page, 20).until(
        lambda _: page.current_url.endswith("?q=which+body&tasks=fever&top_k=5&level=passage")
    )
    page.refresh()
    wait(page, "#columns .title", 5)
    assert [head.text for head in page.find_elements(By.CSS_SELECTOR, "#columns h2")] == ["1 fever"]
    assert len(page.find_elements(By.CSS_SELECTOR, "#columns .title")) == 5
    assert page.find_element(By.ID, "level").get_attribute("value") == "passage"


def test_keys_reach_hits_and_open_them(page: Chrome) -> None:
    ask(page, "which body")
    wait(page, "#columns .title", 12)
    page.find_element(By.ID, "query").send_keys(Keys.ARROW_DOWN)
    page.switch_to.active_element.send_keys("2")
    page.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    page.switch_to.active_element.send_keys(Keys.ENTER)
    section = page.find_elements(By.CSS_SELECTOR, "#columns section")[1]
    (opened,) = section.find_elements(By.CSS_SELECTOR, "details[open]")
    assert opened.find_element(By.CSS_SELECTOR, ".soft").text == "2"
    assert opened.find_element(By.TAG_NAME, "p").text in TEXTS
    assert len(page.find_elements(By.CSS_SELECTOR, "details.alike")) == 2, "the same page is marked in both columns"
    page.switch_to.active_element.send_keys("/")
    assert page.switch_to.active_element.get_attribute("id") == "query"


def test_errors_are_shown_where_they_happen(page: Chrome) -> None:
    ask(page, " ")
    assert page.find_element(By.ID, "message").text == "Type a query first."
    page.execute_script("document.querySelector('#top_k').add(new Option('5000', '5000', true, true))")
    ask(page, "which body")
    errors = wait(page, "#columns .error", 2)
    assert errors[0].text.startswith("422: top_k is 5000 but may be 1000 at most (request ")
    page.execute_script("sessionStorage.setItem('key', 'wrong')")
    ask(page, "which body")
    WebDriverWait(page, 20).until(lambda _: "401: no key" in page.find_element(By.CSS_SELECTOR, "#columns").text)
    key = page.find_element(By.ID, "key")
    assert key.is_displayed()
    key.send_keys(KEY, Keys.TAB)
    page.execute_script("document.querySelector('#top_k').value = '5'")
    ask(page, "which body")
    wait(page, "#columns .title", 10)


@pytest.mark.parametrize(("width", "columns"), [(390, 1), (1200, 2)])
def test_the_page_fits_a_phone_and_a_desk(page: Chrome, width: int, columns: int, tmp_path: Path) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    try:
        ask(page, "which body")
        sections = wait(page, "#columns section:not(.busy)", 2)
        assert len({section.location["x"] for section in sections}) == columns
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert page.get_screenshot_as_file(str(tmp_path / "page.png"))
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_is_one_file_that_may_only_run_its_own_code(url: str) -> None:
    answer = httpx.get(url)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'; connect-src 'self'; script-src 'sha256-" in policy
    assert "unsafe" not in policy
    assert "http" not in answer.text.replace("http-equiv", "")
