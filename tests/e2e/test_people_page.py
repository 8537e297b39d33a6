"""The annotators' page in a real headless Chromium."""

import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright
from playwright.sync_api import Page as Tab

from tests.people_page import Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="run `apt-get install chromium` first"),
]

HOSTILE = (
    "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'><svg onload='window.hit = 1'>\n\n"
    "[click me](javascript:window.hit=1) ![pixel](http://127.0.0.1:9/pixel.png) <http://127.0.0.1:9/auto>\n\n"
    "<iframe srcdoc='<script>parent.hit = 1</script>'></iframe><style>footer { display: none }</style>\n\n"
    '```html" onmouseover="window.hit=1\n<b>code</b>\n```\n\n[ref]: http://127.0.0.1:9/ref\n[ref]\n\n'
    "</div></section></main><h1 id='status'>Saved</h1><base href='http://127.0.0.1:9/'>\u202eevil\n\n"
    "| a |\n|:-:|\n| 1 |\n"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Its sandbox cannot be set up by root, which is who runs tests in a container.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    pages: list[Page] = []

    def starting(rows: object, **fields: object) -> Page:
        pages.append(Page(tmp_path, rows, **fields))
        return pages[-1]

    yield starting
    for page in pages:
        page.kill()


def rows_of(count: int) -> list[tuple[str, str, str]]:
    return [(f"prompt {place}", f"first {place}", f"second {place}") for place in range(count)]


def open_tab(browser: Browser, link: str) -> Tab:
    tab = browser.new_context().new_page()
    tab.goto(link)
    expect(tab.locator("#annotator")).not_to_be_empty()
    return tab


def shown(tab: Tab) -> str:
    """The pair that the page shows, as `pair N`."""
    return "pair " + tab.locator("#prompt").inner_text().removeprefix("prompt ").strip()


def press(tab: Tab, key: str, said: str) -> None:
    """Presses a key and waits until the server has confirmed."""
    tab.keyboard.press(key)
    expect(tab.locator("#status")).to_have_text(said)


def test_keys_and_buttons_say_what_they_stand_for(browser, start):
    page = start(rows_of(8), annotators=["ada"])
    tab = open_tab(browser, page.links["ada"])
    pairs, wanted = [], []
    for key, said, verdict in (
        ("1", "Saved: left is better.", "A"),
        ("2", "Saved: right is better.", "B"),
        ("0", "Saved: equal.", "tie"),
        ("s", "Saved: skipped.", "skip"),
    ):
        pairs.append(shown(tab))
        press(tab, key, said)
        wanted.append(("ada", pairs[-1], verdict))
        assert page.verdicts() == wanted
    press(tab, "u", "Undone: this pair again.")
    assert shown(tab) == pairs[-1]
    assert page.verdicts() == wanted[:-1]
    tab.get_by_role("button", name="Right").click()
    expect(tab.locator("#status")).to_have_text("Saved: right is better.")
    assert page.verdicts() == [*wanted[:-1], ("ada", pairs[-1], "B")]
    expect(tab.locator("#count")).to_have_text("4 of 8 pairs finished; answers by you: 4")
    tab.keyboard.press("Control+1")
    tab.keyboard.down("2")
    tab.keyboard.down("2")  # a key held down repeats
    expect(tab.locator("#count")).to_have_text("5 of 8 pairs finished; answers by you: 5")
    tab.wait_for_timeout(200)
    assert len(page.verdicts()) == 5


def test_answers_stand_where_the_verdict_says(browser, start):
    page = start(rows_of(12), annotators=["ada"])
    tab = open_tab(browser, page.links["ada"])
    sides = set()
    for _ in range(12):
        left, right = tab.locator("#left").inner_text().strip(), tab.locator("#right").inner_text().strip()
        assert {left.split()[0], right.split()[0]} == {"first", "second"}
        sides.add(left.split()[0])
        count = len(page.verdicts())
        tab.keyboard.press("1")
        expect(tab.locator("#count")).to_contain_text(f"you: {count + 1}")
    assert sides == {"first", "second"}
    expect(tab.locator("#nothing")).to_contain_text("Nothing is left for you.")


def test_text_from_models_stays_text(browser, start):
    harmless = "**bold** and\na new line\n\n- item\n\n```python\nx < 3\n```\n"
    page = start([(HOSTILE, HOSTILE, harmless)], annotators=["ada"])
    tab = browser.new_context().new_page()
    requests: list[str] = []
    messages: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("dialog", lambda dialog: messages.append(dialog.message))
    tab.goto(page.links["ada"])
    expect(tab.locator("#task")).to_be_visible()
    tab.wait_for_timeout(300)
    assert tab.evaluate("window.hit") is None
    elements = tab.locator("#task .turn *")
    names = elements.evaluate_all("all => [...new Set(all.map(one => one.localName))]")
    assert set(names) <= {
        *("p", "br", "pre", "code", "table", "thead", "tbody", "tr", "th", "td", "strong", "ul", "li")
    }
    attributes = elements.evaluate_all("all => [...new Set(all.flatMap(one => one.getAttributeNames()))]")
    assert attributes == ["class"]  # the language of a code block
    assert "<script>window.hit = 1</script>" in tab.locator("#prompt").inner_text()
    assert tab.locator("#answers strong").inner_text() == "bold"
    assert tab.locator("#answers li").inner_text() == "item"
    assert "x < 3" in tab.locator("#answers").inner_text()
    expect(tab.locator("#choices")).to_be_visible()
    assert {url.split("/")[2] for url in requests} == {f"127.0.0.1:{page.port}"}
    assert messages == []


def test_two_annotators_never_see_the_same_pair(browser, start):
    page = start(rows_of(9), annotators=["ada", "bob"])
    tabs = {name: open_tab(browser, page.links[name]) for name in ("ada", "bob")}
    seen: dict[str, list[str]] = {"ada": [], "bob": []}
    for name in ("ada", "bob", "bob", "ada", "bob", "ada", "ada", "ada", "bob"):
        seen[name].append(shown(tabs[name]))
        tabs[name].keyboard.press("1")
        expect(tabs[name].locator("#count")).to_contain_text(f"you: {len(seen[name])}")
    assert sorted(seen["ada"] + seen["bob"]) == [f"pair {place}" for place in range(9)]
    assert sorted(pair for _, pair, _ in page.verdicts()) == [f"pair {place}" for place in range(9)]


def test_the_lead_sees_agreement_and_ends_the_labelling(browser, start):
    page = start(rows_of(4), annotators=["ada", "bob"], overlap=2, repeat_share=0.5)
    for name, keys in (("bob", "111111"), ("ada", "111111")):
        tab = open_tab(browser, page.links[name])
        for count, key in enumerate(keys, 1):
            tab.keyboard.press(key)
            expect(tab.locator("#count")).to_contain_text(f"you: {count}")
        expect(tab.locator("#nothing")).to_contain_text("Nothing is left for you")
        assert tab.locator("#overview-button").is_visible() == (name == "ada")
    tab.keyboard.press("o")
    expect(tab.locator("#annotators tr")).to_have_count(2)
    assert tab.locator("#annotators tr").first.inner_text().split()[:3] == ["ada", "6", "0"]
    assert tab.locator("#between tr").inner_text().startswith("ada, bob")
    tab.locator("#end").click()
    expect(tab.locator("#end")).to_have_text("Press again to end with 4 of 4 pairs labelled")
    assert page.process.poll() is None
    tab.locator("#end").click()
    expect(tab.locator("#nothing")).to_have_text("The labelling has ended. You can close this page.")
    assert page.process.wait(20) == 0


def test_a_wrong_link_shows_nothing(browser, start):
    page = start(rows_of(2), annotators=["ada"])
    tab = browser.new_context().new_page()
    tab.goto(page.links["ada"][:-1])
    expect(tab.locator("#nothing")).to_contain_text("This link is not valid.")
    assert tab.locator("#task").is_hidden()


def test_a_click_into_a_dead_server_is_saved_when_it_is_back(browser, start):
    page = start(rows_of(4), annotators=["ada"])
    tab = open_tab(browser, page.links["ada"])
    pair = shown(tab)
    page.kill()
    tab.keyboard.press("2")
    expect(tab.locator("#status")).to_contain_text("Not saved yet")
    tab.keyboard.press("1")  # does nothing while the first is not through
    page.start()
    expect(tab.locator("#status")).to_have_text("Saved: right is better.", timeout=20_000)
    assert page.verdicts() == [("ada", pair, "B")]
    assert shown(tab) != pair


# What the server has answered to the next call of each path gets lost on its way to the page.
LOSE_ANSWERS = """(paths) => {
  const real = window.fetch;
  window.lost = [];
  window.fetch = async (path, options) => {
    const response = await real(path, options);
    if (!paths.includes(path) || window.lost.includes(path)) return response;
    window.lost.push(path);
    throw new TypeError("Failed to fetch");
  };
}"""


def test_a_verdict_counts_once_where_the_confirmation_is_lost(browser, start):
    page = start(rows_of(4), annotators=["ada"])
    tab = open_tab(browser, page.links["ada"])
    first = shown(tab)
    press(tab, "2", "Saved: right is better.")
    pair = shown(tab)
    tab.evaluate(LOSE_ANSWERS, ["api/answer", "api/undo"])
    press(tab, "1", "Saved: left is better.")
    assert tab.evaluate("window.lost") == ["api/answer"]
    assert page.verdicts() == [("ada", first, "B"), ("ada", pair, "A")]
    press(tab, "u", "Undone: this pair again.")
    assert tab.evaluate("window.lost") == ["api/answer", "api/undo"]
    assert shown(tab) == pair
    assert page.verdicts() == [("ada", first, "B")]


def test_nothing_is_lost_or_doubled_over_eight_kills(browser, start):
    """kill -9 at random moments while somebody labels 60 pairs: each pair ends with the verdict that was pressed."""
    page = start(rows_of(60), annotators=["ada"])
    tab = open_tab(browser, page.links["ada"])
    done = threading.Event()
    kills = random.Random(0)

    def killing() -> None:
        for _ in range(8):
            if done.wait(kills.uniform(0.2, 0.6)):
                return
            page.kill()
            page.start()

    killer = threading.Thread(target=killing)
    killer.start()
    wanted: list[tuple[str, str, str]] = []
    try:
        for count in range(1, 61):
            key, verdict = kills.choice([("1", "A"), ("2", "B"), ("0", "tie")])
            wanted.append(("ada", shown(tab), verdict))
            tab.keyboard.press(key)
            expect(tab.locator("#count")).to_contain_text(f"you: {count}", timeout=30_000)
            expect(tab.locator("#undo")).to_be_enabled()
            time.sleep(0.05)
    finally:
        done.set()
        killer.join()
    assert page.verdicts() == wanted
    assert len({pair for _, pair, _ in wanted}) == 60
