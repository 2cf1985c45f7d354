"""The page that `fxprune.draw` writes, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from fxprune.visualize.draw import write_view
from tests.helpers.pictures import PICTURES, Row, residual

webdriver: Any = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROME, DRIVER = which("chromium") or which("google-chrome"), which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROME and DRIVER), reason="apt-get install chromium chromium-driver")

PICTURE = {**residual(3, 3), "initial": 1}
REMOVED = "[...document.querySelectorAll('.box.removed')].map(box => Number(box.dataset.key.slice(1)))"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROME
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Any:
    return opened(browser, PICTURE, tmp_path)


def opened(browser: Any, picture: Row, folder: Path) -> Any:
    write_view(picture, folder / "page.html")
    browser.get((folder / "page.html").as_uri())
    return browser


def box(page: Any, key: str) -> Any:
    return page.find_element(By.CSS_SELECTOR, f'[data-key="{key}"]')


def blocks_of(plan: int) -> list[int]:
    """The blocks that a plan takes as a whole."""
    gone = {node for index in PICTURE["plans"][plan]["removed"] for node in PICTURE["regions"][index]["nodes"]}
    return [block["id"] for block in PICTURE["blocks"] if gone.issuperset(block["nodes"])]


def focused(page: Any) -> str:
    key: str = page.switch_to.active_element.get_attribute("data-key")
    return key


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.switch_to.active_element.send_keys(key)


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_page_loads_without_error_or_request(browser: Any, name: str, tmp_path: Path) -> None:
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    page = opened(browser, PICTURES[name], tmp_path)
    assert page.find_element(By.TAG_NAME, "h1").text
    assert len(page.find_elements(By.CSS_SELECTOR, "#picture .box")) == len(PICTURES[name]["blocks"]) + 2
    assert page.get_log("browser") == []
    sent = [json.loads(row["message"])["message"] for row in page.get_log("performance")]
    asked = [row["params"]["request"]["url"] for row in sent if row["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_page_labels_fit_their_boxes(page: Any) -> None:
    script = """return [...document.querySelectorAll('#picture .box')].map(function (box) {
        const width = box.querySelector('rect').width.baseVal.value;
        return Math.max(...[...box.querySelectorAll('text')].map(text => text.getComputedTextLength())) - width; })"""
    page.execute_async_script("document.fonts.ready.then(arguments[0])")
    assert max(page.execute_script(script)) <= -8


def test_slider_shows_the_plans(page: Any) -> None:
    slider = page.find_element(By.ID, "plan")
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("0", str(len(PICTURE["plans"])))
    for plan in (1, 2, 3):
        assert page.execute_script(f"return {REMOVED}") == blocks_of(plan)
        budget = PICTURE["plans"][plan]["budget"]
        assert page.find_element(By.ID, "chosen").text.startswith(f"{100 * budget:.0f} % of FLOPs")
        names = [PICTURE["regions"][index]["name"] for index in PICTURE["plans"][plan]["removed"]]
        assert sorted(row.text for row in page.find_elements(By.CSS_SELECTOR, "#gone li")) == sorted(names)
        slider.send_keys(Keys.ARROW_RIGHT)
    slider.send_keys(Keys.HOME)
    assert page.execute_script(f"return {REMOVED}") == []
    assert page.find_element(By.ID, "chosen").text == "Nothing removed"
    assert page.find_elements(By.CSS_SELECTOR, '.edge:not([data-style="plain"])') == []


def test_single_plan_is_shown_by_a_switch(browser: Any, tmp_path: Path) -> None:
    page = opened(browser, {**PICTURE, "plans": PICTURE["plans"][:1], "initial": 0}, tmp_path)
    assert page.execute_script(f"return {REMOVED}") == blocks_of(0)
    page.find_element(By.ID, "plan").click()
    assert page.execute_script(f"return {REMOVED}") == []


def test_search_finds_layers_and_enter_goes_to_the_next(page: Any) -> None:
    query = page.find_element(By.ID, "query")
    query.send_keys("LAYER2.2")
    (hit,) = page.find_elements(By.CSS_SELECTOR, ".box.hit")
    assert hit.get_attribute("data-name") == "layer2.2"
    query.send_keys(Keys.ENTER)
    assert "layer2.2" in page.find_element(By.ID, "details").text
    middle = page.execute_script("""const hit = document.querySelector('.hit').getBoundingClientRect();
        const all = document.getElementById('canvas').getBoundingClientRect();
        return [hit.x + hit.width / 2 - all.x - all.width / 2, hit.y + hit.height / 2 - all.y - all.height / 2]""")
    assert middle == pytest.approx([0, 0], abs=3)
    query.clear()
    query.send_keys("downsample", Keys.ENTER, Keys.ENTER)
    assert page.find_element(By.ID, "hits").text == "2 of 3"


def test_click_unfolds_and_folds_a_block(page: Any) -> None:
    block = blocks_of(1)[0]
    before = box(page, f"b{block}").rect
    webdriver.ActionChains(page).move_to_element(box(page, f"b{block}")).click().perform()
    nodes = {element.get_attribute("data-key") for element in page.find_elements(By.CSS_SELECTOR, ".box.node")}
    assert nodes == {f"n{node}" for node in PICTURE["blocks"][block]["nodes"]}
    frame = box(page, f"g:{block}").find_element(By.TAG_NAME, "rect")
    assert frame.rect["y"] == pytest.approx(before["y"], abs=2)
    assert frame.rect["x"] + frame.rect["width"] / 2 == pytest.approx(before["x"] + before["width"] / 2, abs=2)
    page.execute_script("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", frame)
    assert page.find_elements(By.CSS_SELECTOR, ".box.node") == []
    assert box(page, f"b{block}").rect == pytest.approx(before, abs=2)


def test_keyboard_moves_through_the_network(page: Any) -> None:
    page.find_element(By.ID, "theme").click()
    page.find_element(By.ID, "theme").send_keys(Keys.TAB)
    assert focused(page) == "in"
    press(page, Keys.ARROW_DOWN)
    assert focused(page) == "b0"
    press(page, Keys.ENTER)
    assert focused(page) == "g:0"
    assert box(page, "g:0").get_attribute("aria-expanded") == "true"
    press(page, Keys.ARROW_DOWN, Keys.ARROW_UP)
    assert focused(page) == f"n{PICTURE['blocks'][0]['nodes'][-1]}"
    assert "conv1" in page.find_element(By.ID, "details").text
    page.execute_script("document.querySelector('[data-key=\"g:0\"]').focus()")
    press(page, Keys.SPACE)
    assert focused(page) == "b0"
    press(page, Keys.ARROW_DOWN)
    side = focused(page)
    press(page, Keys.ARROW_RIGHT if side == "b2" else Keys.ARROW_LEFT)
    assert {side, focused(page)} <= {"b1", "b2"}


def test_zoom_works_by_key_wheel_and_button(page: Any) -> None:
    def scale() -> float:
        found: float = page.execute_script("return document.getElementById('drawing').getCTM().a")
        return found

    start = scale()
    press(page, "+")
    assert scale() == pytest.approx(1.25 * start)
    page.find_element(By.CSS_SELECTOR, '[data-zoom="out"]').click()
    assert scale() == pytest.approx(start)
    page.execute_script("""document.getElementById('picture').dispatchEvent(
        new WheelEvent('wheel', {deltaY: -200, clientX: 300, clientY: 300, cancelable: true}))""")
    assert scale() > 1.2 * start
    press(page, "0")
    sight = "const a = document.getElementById('drawing').getBoundingClientRect(), " + (
        "b = document.getElementById('canvas').getBoundingClientRect(); "
        "return [a.left - b.left, a.top - b.top, b.right - a.right, b.bottom - a.bottom]"
    )
    assert min(page.execute_script(sight)) >= 0


def test_drag_pans_without_unfolding(page: Any) -> None:
    target = box(page, "b0").find_element(By.TAG_NAME, "rect")
    before = target.rect
    webdriver.ActionChains(page).click_and_hold(target).move_by_offset(60, 40).release().perform()
    assert box(page, "b0").find_element(By.TAG_NAME, "rect").rect["x"] == pytest.approx(before["x"] + 60, abs=6)
    assert page.find_elements(By.CSS_SELECTOR, ".box.node") == []


def test_table_has_every_block_with_layers(page: Any) -> None:
    page.find_element(By.ID, "view").click()
    rows = page.find_elements(By.CSS_SELECTOR, "#table tbody tr")
    assert len(rows) == sum(not block["glue"] for block in PICTURE["blocks"])
    assert [row.text for row in rows if "removed" in row.text.split()] != []
    rows[3].find_element(By.TAG_NAME, "button").click()
    assert page.find_element(By.ID, "canvas").is_displayed()
    assert focused(page).startswith("b")


def test_picture_is_unchanged_after_showing_the_table(page: Any) -> None:
    before = box(page, "out").rect
    page.find_element(By.ID, "view").click()
    page.find_element(By.ID, "plan").send_keys(Keys.ARROW_RIGHT)
    page.find_element(By.ID, "theme").click()
    page.find_element(By.ID, "view").click()
    assert box(page, "out").rect == pytest.approx(before, abs=1)


def test_narrow_screen_has_one_column_without_sideways_scrolling(page: Any) -> None:
    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.refresh()
    wide, seen = page.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    lowest = max(element.rect["y"] for element in page.find_elements(By.CSS_SELECTOR, "#picture .box"))
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert (wide, seen) == (390, 390)
    assert lowest > 800, "the last box of one column lies below the window"


def test_dark_and_light_pictures_differ_and_are_not_blank(page: Any) -> None:
    light = page.get_screenshot_as_png()
    page.find_element(By.ID, "theme").click()
    dark = page.get_screenshot_as_png()
    assert page.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(15, 19, 24)"
    assert light != dark
    assert min(len(light), len(dark)) > 30_000, "a blank page packs to a few thousand bytes"
    media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page.refresh()
    assert page.find_element(By.ID, "theme").get_attribute("aria-pressed") == "true"
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_print_shows_the_whole_picture(page: Any) -> None:
    page.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert page.find_element(By.ID, "picture").get_dom_attribute("viewBox").startswith("0 0 ")
    page.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert page.find_element(By.ID, "picture").get_dom_attribute("viewBox") is None
    assert page.find_element(By.ID, "drawing").get_dom_attribute("transform")


def test_footer_shows_the_healing(browser: Any, tmp_path: Path) -> None:
    heal = {"method": "mimic", "images": 256, "distance": {"before": 0.4812, "after": 0.12}, "seconds": 93.0}
    page = opened(browser, {**PICTURE, "settings": {"criterion": "fisher", "heal": heal}}, tmp_path)
    said = page.find_element(By.ID, "settings").text
    assert said == "criterion fisher · method mimic, images 256, distance 0.481 → 0.120, seconds 93"
