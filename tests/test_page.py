"""The page, in a real browser: types, streams, goes on from another token, stops, says what is wrong."""

import shutil
import time

import pytest
from test_serve import NAME, Running, network, scheduler, tokenizer, wait_until  # noqa: F401

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the extra dev")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if not CHROMIUM:
    pytest.skip("no Chromium on this machine: apt install chromium", allow_module_level=True)
expect = playwright.expect
OPENING = "昔々あるところに"


@pytest.fixture(scope="module")
def server(scheduler):  # noqa: F811
    running = Running(scheduler, openings=(OPENING, "吾輩は"), is_mukashi=True)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser, server):
    """The page, in Japanese; whatever goes wrong in it or is asked of others fails the test."""
    page = browser.new_page(locale="ja-JP")
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith(server.url) or wrong.append(request.url))
    page.goto(server.url)
    yield page
    page.close()
    assert not wrong


def write(page, **settings):
    for name, value in {"max_tokens": 12, "seed": 1, **settings}.items():
        page.evaluate("([id, value]) => { document.getElementById(id).value = value }", [name, str(value)])
    page.get_by_role("button", name="書く", exact=True).click()


def finished(page, texts: int = 1):
    expect(page.locator("article > .how:not(:empty)")).to_have_count(texts)


def test_a_text_streams_and_goes_on_from_another_token(page, server):
    expect(page).to_have_title(NAME)
    expect(page.locator("#mukashi")).to_be_visible()
    expect(page.locator("#prompt")).to_have_value(OPENING)
    write(page, temperature=0.5)
    finished(page)
    expected = server.post(prompt=OPENING, seed=1, max_tokens=12, temperature=0.5).json()["choices"][0]["text"]
    shown = "".join(page.locator("article > .token").all_text_contents())
    assert shown.replace(" ∎", "") == expected
    assert page.locator("article > .given").text_content() == OPENING

    third = page.locator("article > .token").nth(2)
    before = page.locator("article > .token").all_text_contents()[:2]
    third.focus()
    page.keyboard.press("Enter")
    choices = page.locator("#choices li button")
    expect(choices).to_have_count(10)
    odds = [float(text.removesuffix(" %")) for text in page.locator("#choices li span + span").all_text_contents()]
    assert odds == sorted(odds, reverse=True)
    other = page.locator("#choices li button:not([aria-current])").nth(1)
    other.click()
    expect(page.locator("article > .token.chosen")).to_have_count(1)
    finished(page)
    assert page.locator("article > .token").all_text_contents()[:2] == before
    assert page.locator("article > .token").count() > 3
    expect(page.locator("#error")).to_be_empty()


def test_several_side_by_side_stop_and_errors(page, server):
    write(page, texts=3, max_tokens=8)
    finished(page, 3)
    assert len(set(page.locator("article").all_text_contents())) == 3
    write(page, texts=1, max_tokens=63)
    expect(page.locator("#error")).to_contain_text("モデルの文脈より長く")
    page.get_by_role("button", name="English").click()
    expect(page.get_by_role("button", name="Write", exact=True)).to_be_visible()
    page.route("**/v1/completions", lambda route: route.abort())
    page.locator("#prompt").fill("猫")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#error")).to_contain_text("The server does not answer")


def test_a_text_is_stopped(page, server, monkeypatch):
    engine = server.worker.scheduler.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.2) or step())
    write(page, max_tokens=50)
    expect(page.locator("article > .token").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("article > .how")).to_have_text("— 止めました")
    wait_until(lambda: not server.worker.open)
    assert 0 < page.locator("article > .token").count() < 50


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens(browser, server, scheme):
    page = browser.new_page(viewport={"width": 360, "height": 640}, color_scheme=scheme, locale="en-US")
    page.goto(server.url)
    expect(page.get_by_role("button", name="Write", exact=True)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    colours = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.documentElement).colorScheme]"
    )
    assert (colours[0] == "rgb(0, 0, 0)") == (scheme == "light")
    page.close()


def test_the_key_is_asked_for(browser, scheduler):  # noqa: F811
    running = Running(scheduler, api_key="secret")
    page = browser.new_page(locale="ja-JP")
    try:
        page.goto(running.url)
        page.locator("#prompt").fill("猫")
        write(page, max_tokens=4)
        expect(page.locator("#error")).to_contain_text("API キーが要ります")
        page.locator("#key").fill("secret")
        write(page, max_tokens=4)
        finished(page)
    finally:
        page.close()
        running.stop()
