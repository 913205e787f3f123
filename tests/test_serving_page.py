"""The page in a real headless Chromium, against the real server with an engine without a model."""

import shutil

import pytest
from fake_engine import REPLY_WORDS, FakeEngine
from running_server import running, wait_until

from qlora_jax import serving
from qlora_jax.evaluation import read_ratings
from qlora_jax.serving.stored import StoredQuestion

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra dev (playwright)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")

NUMBERS = "".join(f"{i} " for i in range(REPLY_WORDS))
BACK = "Math.max(...[...document.querySelectorAll('*')].map(e => e.getBoundingClientRect().right))"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # As root, as in most containers, Chromium has no sandbox of its own.
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    votes = tmp_path_factory.mktemp("votes") / "votes.jsonl"
    with running(FakeEngine(), votes=votes) as (url, service):
        yield url, service, votes


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    page.set_default_timeout(15_000)
    problems = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server[0])
    page.get_by_role("textbox", name="Your message").wait_for()
    yield page
    context.close()
    # A refusal of the policy would stand here, too.
    assert [text for text in problems if "429" not in text] == []


def answers(page):
    return page.locator("#view-chat .turn.assistant .text")


def send(page, text):
    page.get_by_role("textbox", name="Your message").fill(text)
    page.keyboard.press("Enter")


def complete(page, count=1):
    done = page.locator("#view-chat .turn.assistant[aria-busy=false]")
    playwright.expect(done).to_have_count(count)


def test_a_conversation(page):
    send(page, "hello there")
    complete(page)
    text = answers(page).inner_text()
    assert text.startswith("mine: hello there") and text.endswith(NUMBERS)
    assert "to the first word" in page.locator("#view-chat .foot").inner_text()
    assert "tokens/s" in page.locator("#view-chat .foot").inner_text()
    page.get_by_role("radio", name="off").check()
    send(page, "again")
    complete(page, 2)
    assert answers(page).nth(1).inner_text().startswith("base: again")
    assert page.locator("#view-chat .who").all_inner_texts() == ["mine", "tiny"]
    page.get_by_role("button", name="Regenerate").click()
    complete(page, 2)
    assert page.locator("#view-chat .turn").count() == 4
    page.get_by_role("button", name="New chat").click()
    assert page.locator("#view-chat .turn").count() == 0


def test_a_stop(page, server):
    service = server[1]
    for way in ("button", "key"):
        cancelled = len(service.engine.cancelled)
        send(page, "slow")
        playwright.expect(answers(page).last).to_contain_text("3 ")
        if way == "button":
            page.get_by_role("button", name="Stop").click()
        else:
            page.keyboard.press("Escape")
        playwright.expect(page.get_by_role("button", name="Send")).to_be_visible()
        assert "stopped" in page.locator("#view-chat .foot").last.inner_text()
        wait_until(lambda count=cancelled: len(service.engine.cancelled) == count + 1)
    text = answers(page).first.inner_text()
    send(page, "next")
    complete(page, 3)
    assert answers(page).first.inner_text() == text  # a stop is final, and the chat goes on


def test_a_comparison(page):
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("textbox", name="A message to both").fill("why?")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#view-compare .turn.assistant[aria-busy=false]")).to_have_count(
        2
    )
    texts = page.locator("#view-compare .turn.assistant .text").all_inner_texts()
    assert [text.split(":")[0] for text in texts] == ["base", "mine"]
    page.get_by_role("combobox", name="Right model").select_option("tiny")
    page.get_by_role("textbox", name="A message to both").fill("really?")
    page.get_by_role("button", name="Send").click()
    playwright.expect(page.locator("#view-compare .turn.assistant[aria-busy=false]")).to_have_count(
        4
    )
    last = page.locator("#view-compare .side").nth(1).locator(".turn.assistant .text").last
    assert last.inner_text().startswith("base: really?")


def test_a_vote(page, server):
    votes = server[2]
    before = len(votes.read_text().splitlines()) if votes.exists() else 0
    page.get_by_role("tab", name="Tell them apart").click()
    for round_, button in enumerate(["A is better", "Equally good"], start=before + 1):
        page.get_by_role("textbox", name="Your question").fill("who is it?")
        page.get_by_role("button", name="Ask both").click()
        vote = page.get_by_role("button", name=button)
        vote.wait_for()
        assert page.locator("#view-game .name").all_inner_texts() == ["", ""]
        speakers = [
            {"base": "tiny"}.get(name, name)
            for text in page.locator("#view-game .answer").all_inner_texts()
            for name in [text.split(":")[0]]
        ]
        vote.click()
        playwright.expect(page.locator("#view-game .name").first).not_to_be_empty()
        assert page.locator("#view-game .name").all_inner_texts() == speakers
        assert f"Score after {round_} vote" in page.locator("caption").inner_text()
        page.get_by_role("button", name="Next round").click()
    ratings = read_ratings(votes)
    assert ratings.score.tolist()[before:] == [1, 0.5]
    assert len(votes.read_text().splitlines()) == before + 2


def test_stored_answers(browser, tmp_path):
    stored = [StoredQuestion("1", "Which one?", {"x": "from x", "y": "from y"})]
    with running(votes=tmp_path / "votes.jsonl", stored=stored) as (url, _):
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        page.get_by_role("tab", name="Tell them apart").click()
        page.get_by_role("radio", name="From files (1)").check()
        page.get_by_role("button", name="Draw a question").click()
        page.get_by_role("button", name="B is better").click()
        playwright.expect(page.get_by_role("button", name="Next round")).to_be_visible()
        assert page.locator("#view-game .question").inner_text() == "Which one?"
        names = page.locator("#view-game .name").all_inner_texts()
        assert page.locator("#view-game .answer").all_inner_texts() == [f"from {n}" for n in names]
        context.close()
    assert read_ratings(tmp_path / "votes.jsonl").systems == ("x", "y")


def test_output_is_text_and_never_markup(page):
    markup = "<img src=x onerror=alert(1)><b>bold</b>"
    send(page, markup)
    complete(page)
    assert markup in answers(page).inner_text()
    assert page.locator("main img, main b").count() == 0
    send(page, "code:\n```js\nlet a = '<i>';\n```\nthat was it")
    complete(page, 2)
    assert page.locator("#view-chat .turn.assistant pre").inner_text() == "let a = '<i>';"


def test_the_policy_refuses_markup_even_by_mistake(browser, server):
    context = browser.new_context()
    page = context.new_page()
    page.goto(server[0])
    with pytest.raises(playwright.Error, match="TrustedHTML"):
        page.evaluate("() => { document.body.innerHTML = '<b>x</b>'; }")
    context.close()


def test_settings_are_used_and_kept(page, server):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill("2")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0")
    page.keyboard.press("Escape")
    send(page, "x")
    complete(page)
    assert answers(page).inner_text() == "mine: x "
    assert "cut at 2 tokens" in page.locator("#view-chat .foot").inner_text()
    page.reload()
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("System prompt").input_value() == "Be brief."
    assert page.get_by_label("Temperature").input_value() == "0"


def test_the_page_asks_for_no_more_than_the_server_gives(browser):
    with running(limits=serving.Limits(new_tokens=3)) as (url, _):
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        send(page, "x")
        complete(page)
        assert "cut at 3 tokens" in page.locator("#view-chat .foot").inner_text()
        context.close()


def test_by_keyboard_alone(page):
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    page.keyboard.type("one\ntwo".split("\n")[0])
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    complete(page)
    assert "one\ntwo" in answers(page).inner_text()
    page.get_by_role("tab", name="Chat").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-game"
    for _ in range(20):  # to the question, through whatever is between
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('aria-label')") == "Your question":
            break
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none"
    page.keyboard.type("which?")
    page.keyboard.press("Enter")
    first = page.get_by_role("button", name="A is better")
    playwright.expect(first).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    playwright.expect(page.get_by_role("button", name="Next round")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off(browser, server, scheme):
    context = browser.new_context(
        viewport={"width": 360, "height": 640}, has_touch=True, color_scheme=scheme
    )
    page = context.new_page()
    page.goto(server[0])
    send(page, "a" * 200)
    complete(page)
    for tab in ("Chat", "Compare", "Tell them apart"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate(BACK) <= 360
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
    # Letters and paper differ enough (WCAG: 4.5 : 1), by the colours that are computed.
    colours = (
        "() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor] }"
    )
    assert contrast(*page.evaluate(colours)) > 7
    soft = "() => getComputedStyle(document.querySelector('.foot')).color"
    assert contrast(page.evaluate(soft), page.evaluate(colours)[1]) > 4.5
    context.close()


def contrast(one, other):
    def luminance(colour):
        parts = [int(part) / 255 for part in colour[4:-1].split(",")]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_with_reduced_motion_nothing_moves(browser, server):
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.goto(server[0])
    send(page, "slow")
    page.locator("#view-chat .turn.assistant[aria-busy=true]").wait_for()
    animation = "getComputedStyle(document.querySelector('[aria-busy=true] .text'), '::after')"
    assert page.evaluate(f"{animation}.animationName") == "none"
    context.close()


def test_a_server_with_a_token_asks_for_it(browser):
    token = "correct-horse-battery-staple"
    with running(access=serving.Access(token=token)) as (url, _):
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        field = page.get_by_label("Access token")
        playwright.expect(field).to_be_focused()
        field.fill(token)
        page.keyboard.press("Enter")
        send(page, "hello")
        complete(page)
        assert token not in page.url and token not in page.content()
        context.close()


def test_a_full_queue_is_shown_and_the_conversation_goes_on(browser):
    with running(FakeEngine(slots=1), limits=serving.Limits(waiting=0)) as (url, service):
        context = browser.new_context()
        page, other = context.new_page(), context.new_page()
        other.goto(url)
        send(other, "slow")
        wait_until(lambda: service.scheduler.running == 1)
        page.goto(url)
        send(page, "hello")
        complete(page)
        assert "the server is busy" in page.locator("#view-chat .failed").inner_text()
        other.keyboard.press("Escape")
        wait_until(lambda: service.scheduler.running == 0)
        page.get_by_role("button", name="Regenerate").click()
        playwright.expect(answers(page)).to_contain_text("mine: hello")
        context.close()
