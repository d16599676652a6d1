"""The page, in a real browser: types, streams, goes on from another token, stops, says what is wrong."""

import contextlib
import shutil
import time

import pytest
from conftest import ROOT
from test_serve import NAME, Running, network, scheduler, tokenizer, wait_until  # noqa: F401
from test_serve_chat import model  # noqa: F401
from test_turns import with_pieces, with_words  # noqa: F401

import transformer_lm
from transformer_lm.generation.engine import Engine
from transformer_lm.generation.sampler import SamplingConfig
from transformer_lm.generation.scheduler import Scheduler

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


@pytest.fixture(scope="module")
def talk_server(model):  # noqa: F811
    running = Running(
        Scheduler(Engine(model.network, model.params, slots=2, context=160), model.tokenizer),
        turns=model.turns, openings=("昔話をお願いします。",),
    )  # fmt: skip
    yield running
    running.stop()


@contextlib.contextmanager
def opened(browser, server, **options):
    """The page, in Japanese; whatever goes wrong in it or is asked of others is an error."""
    page = browser.new_page(locale="ja-JP", **options)
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith(server.url) or wrong.append(request.url))
    page.goto(server.url)
    yield page
    page.close()
    assert not wrong


@pytest.fixture
def page(browser, server):
    with opened(browser, server) as page:
        yield page


@pytest.fixture
def talk(browser, talk_server):
    with opened(browser, talk_server) as page:
        yield page


def choose(page, **settings):
    for name, value in settings.items():
        page.locator(f"#{name}").evaluate(
            "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')) }", str(value)
        )


def write(page, **settings):
    choose(page, **{"max_tokens": 12, "seed": 1} | settings)
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
    page.keyboard.press("Control+Enter")  # nothing is written under an open dialog
    expect(page.locator("#choices")).to_be_visible()
    assert page.locator("article").count() == 1
    other.click()
    expect(page.locator("article > .token.chosen")).to_have_count(1)
    expect(page.locator("article > .token.chosen")).to_be_focused()
    page.keyboard.press("Space")
    expect(page.locator("#choices")).to_be_visible()
    page.keyboard.press("Escape")
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


def test_keys_of_an_input_method_are_its_own(page):
    """Enter settles what is being typed, also with Ctrl."""
    press_composing(page, "Enter")
    page.wait_for_timeout(200)
    assert page.locator("article").count() == 0


def press_composing(page, key: str):
    page.locator("#prompt").evaluate(
        "(node, key) => node.dispatchEvent(new KeyboardEvent('keydown', "
        "{ key, ctrlKey: true, isComposing: true, bubbles: true }))", key
    )  # fmt: skip


def test_settings_have_names_and_say_what_is_wrong(page):
    """Also when they are folded away."""
    for name in ("温度", "top_p", "長さ（トークン）"):
        assert page.get_by_label(name).get_attribute("type") == "range"
    write(page, seed=1.5)
    expect(page.locator("#error")).to_contain_text("seed")


def test_the_newest_text_alone_is_written(page, server):
    """Though the tokens of the one before come late, which Escape has given up."""
    waiting = []
    page.route("**/tokenize", lambda route: waiting.append(route))
    write(page)
    page.keyboard.press("Escape")
    write(page)
    page.wait_for_timeout(200)
    for route in waiting:
        route.continue_()
    finished(page)
    assert len(waiting) == 2
    assert page.locator("article").count() == 1
    expect(page.locator("#error")).to_be_empty()


def test_a_text_is_stopped(page, server, monkeypatch):
    engine = server.worker.scheduler.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.2) or step())
    write(page, max_tokens=50)
    expect(page.locator("article > .token").first).to_be_visible()
    press_composing(page, "Escape")  # of an input method, which takes back what is being typed
    page.wait_for_timeout(200)
    expect(page.locator("#stop")).to_be_enabled()
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


class TestConversation:
    @staticmethod
    def said(page) -> list[str]:
        return page.locator("article .said").all_text_contents()

    def say(self, page, text: str):
        """Says something, and waits for the answer's end."""
        page.locator("#prompt").fill(text)
        page.get_by_role("button", name="送る").click()
        expect(page.get_by_role("button", name="もう一度")).to_be_visible()

    def test_it_answers_again_and_takes_words_back(self, talk, talk_server):
        choose(talk, max_tokens=12, seed=4, temperature=1)
        expect(talk.locator("#about")).to_contain_text("話しかけると")
        talk.get_by_role("button", name="昔話をお願いします。").click()
        expect(talk.get_by_role("button", name="もう一度")).to_be_visible()
        self.say(talk, "誰が？")
        said, messages = self.said(talk), []
        for text, answer in zip(said[::2], said[1::2], strict=True):
            messages.append({"role": "user", "content": text})
            asked = {"messages": messages, "max_tokens": 12, "seed": 4, "top_p": 1, "top_k": 0}
            found = talk_server.post("/v1/chat/completions", **asked).json()["choices"][0]["message"]
            assert answer == found["content"]
            messages.append(found | {"refusal": None})
        choose(talk, seed=5)
        talk.get_by_role("button", name="もう一度").click()
        expect(talk.get_by_role("button", name="もう一度")).to_be_visible()
        assert self.said(talk)[:3] == said[:3]
        assert self.said(talk)[3] != said[3]
        said = self.said(talk)
        talk.route("**/v1/chat/completions", lambda route: route.abort())
        talk.get_by_role("button", name="もう一度").click()
        expect(talk.locator("#error")).to_contain_text("サーバーにつながりません")
        assert self.said(talk) == said  # where no other comes the answer stays
        expect(talk.locator("#prompt")).to_be_empty()
        talk.get_by_role("button", name="書き直す").nth(1).click()
        expect(talk.locator("#prompt")).to_have_value("誰が？")
        assert self.said(talk) == said[:2]
        talk.get_by_role("button", name="新しい会話").click()
        assert self.said(talk) == []

    def test_stop_and_errors(self, talk, talk_server, monkeypatch):
        engine = talk_server.worker.scheduler.engine
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: time.sleep(0.2) or step())
        choose(talk, max_tokens=80, temperature=2, top_k=0, top_p=1)  # so hot that it does not end at once
        talk.locator("#prompt").fill("昔話をお願いします。")
        talk.keyboard.press("Control+Enter")
        expect(talk.locator(".assistant .said")).not_to_be_empty()
        talk.keyboard.press("Escape")
        expect(talk.locator(".assistant .how")).to_have_text("— 止めました")
        wait_until(lambda: not talk_server.worker.open)
        monkeypatch.undo()
        kept = self.said(talk)
        talk.locator("#prompt").fill("昔" * 200)
        talk.get_by_role("button", name="送る").click()
        expect(talk.locator("#error")).to_contain_text("会話がモデルの文脈より長く")
        assert self.said(talk) == kept
        expect(talk.locator("#prompt")).to_have_value("昔" * 200)


def test_the_picture(browser, scheduler, tmp_path, request):  # noqa: F811
    """Of this test's model; with --picture=WORKDIR of that one, for the documentation."""
    workdir, path = request.config.getoption("picture"), tmp_path / "page.png"
    options = {"openings": (OPENING,), "is_mukashi": True, "sampling": SamplingConfig(0.6, 20)}
    if workdir:
        path, model = ROOT / "docs" / "page.png", transformer_lm.load(workdir)
        scheduler = Scheduler(Engine(model.network, model.params, slots=2, context=160), model.tokenizer)
        options["name"] = "mukashi"
    running = Running(scheduler, **options)
    try:
        with opened(browser, running, viewport={"width": 760, "height": 700}, color_scheme="light") as page:
            write(page, texts=2, max_tokens=64 if workdir else 20, seed=7)
            finished(page, 2)
            doubts = (
                page.locator("article")
                .nth(0)
                .locator(".token")
                .evaluate_all("tokens => tokens.map(token => Number(token.style.getPropertyValue('--doubt')))")
            )
            page.locator("article").nth(0).locator(".token").nth(doubts.index(max(doubts))).click()
            expect(page.locator("#choices")).to_be_visible()
            page.screenshot(path=path, scale="css")
    finally:
        running.stop()
    assert path.stat().st_size < 150_000
