"""The web page in a real browser: Debian's Chromium, driven by Playwright."""

import shutil
from base64 import b64encode
from io import BytesIO
from itertools import pairwise
from time import sleep

import httpx
import numpy as np
import pytest
from PIL import Image, ImageColor

from aki.apps.demo.page import serve
from aki.apps.demo.reading import Reader, opened, overlays
from aki.apps.loading import load
from aki.models.explain import explain
from aki.models.images import ImageError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUESTION = "how many digits are red?"
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: `make browser` installs it on Debian")


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load(model_folder)


@pytest.fixture(scope="module")
def site(loaded):
    blocks = serve(*loaded, host="127.0.0.1", port=None, max_new_tokens=6, block=False)
    yield blocks.local_url
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser, site, request):
    context = browser.new_context(**getattr(request, "param", {"viewport": {"width": 1100, "height": 820}}))
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.others = []
    page.on(
        "request",
        lambda sent: page.others.append(sent.url) if not sent.url.startswith((site, "data:", "blob:")) else None,
    )
    page.goto(site)
    page.wait_for_selector("#picture input[type=file]", state="attached")
    yield page
    context.close()


def upload(page, path):
    page.locator("#picture input[type=file]").set_input_files(str(path))


def pixels(page, rule):
    """The overlay of a rule, as the browser got it."""
    image = page.locator(f"#overlay-{rule} img")
    image.wait_for()
    return np.asarray(Image.open(BytesIO(page.request.get(image.get_attribute("src")).body())).convert("RGB"))


def shown_soon(page, rule, wanted):
    page.wait_for_function(
        "([id, old]) => { const i = document.querySelector(id + ' img'); return i && i.src !== old }",
        arg=[f"#overlay-{rule}", getattr(page, "old", "")],
    )
    page.old = page.locator(f"#overlay-{rule} img").get_attribute("src")
    np.testing.assert_array_equal(pixels(page, rule), np.asarray(wanted))


@in_a_browser
class TestPage:
    def test_upload_ask_click_words(self, page, loaded, scene):
        upload(page, scene)
        page.locator("#picture img").wait_for()
        page.locator("#question textarea").fill(QUESTION)
        page.locator("#ask").click()
        words = page.locator("#question-words label")
        words.first.wait_for()
        found = [explain(*loaded, scene, QUESTION, attention_rule=rule, max_new_tokens=6) for rule in ("causal", "mma")]
        for e in found:
            assert page.locator(f"#answer-{e.rule} textarea").input_value() == e.answer
        assert words.all_inner_texts() == ["how", "many", "digits", "are", "red", "?"]
        assert page.locator("#overlay-mma img").count() == 0

        words.nth(4).click()
        (_, causal), (mma, sentence) = overlays(found, "question", 4, None)
        shown_soon(page, "mma", mma)
        assert page.locator("#caption-mma").inner_text().strip() == sentence
        assert page.locator("#caption-causal").inner_text().strip() == causal == "causal: the picture never sees “red”."

        answer = page.locator("#answer-words label")
        assert answer.all_inner_texts() == found[1].answer_words
        answer.nth(1).click()
        shown_soon(page, "mma", overlays(found, "answer", 1, None)[1][0])
        page.locator("#layer input").click()
        page.get_by_role("option", name="2").click()
        shown_soon(page, "mma", overlays(found, "answer", 1, 1)[1][0])
        assert page.others == [], "the page asked other hosts"

    def test_a_broken_file_and_an_empty_question_get_a_sentence(self, page, scene, tmp_path):
        broken = tmp_path / "broken.png"
        broken.write_bytes(scene.read_bytes()[:900])
        upload(page, broken)
        page.get_by_text("This file is broken or truncated").wait_for()
        assert str(tmp_path) not in page.content()
        page.locator("#question textarea").fill(QUESTION)
        page.locator("#ask").click()
        page.get_by_text("This file is broken or truncated").wait_for()
        assert page.locator("#answer-mma textarea").input_value() == ""
        page.get_by_label("Clear").or_(page.get_by_label("Remove Image")).first.click()
        page.locator("#message").wait_for(state="hidden")
        page.locator("#ask").click()
        page.get_by_text("Give a picture first").wait_for()
        text = tmp_path / "text.png"
        text.write_text("no picture")
        upload(page, text)
        page.get_by_text("This file is not a picture").wait_for()
        upload(page, scene)
        page.locator("#message").wait_for(state="hidden")
        page.locator("#question textarea").fill("what is <image>?")
        page.locator("#ask").click()
        page.locator("#question-words label").first.wait_for()
        assert page.locator("#message").is_hidden(), "a mark that somebody types is text"

    def test_a_pasted_picture(self, page, scene):
        """Ctrl+V where somebody types; once more, over the picture that is there."""
        put = "async data => navigator.clipboard.write([new ClipboardItem({'image/png': (await fetch(data)).blob()})])"
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        for colour in ("red", "blue"):
            picture = BytesIO()
            Image.new("RGB", (8, 8), colour).save(picture, "PNG")
            page.evaluate(put, "data:image/png;base64," + b64encode(picture.getvalue()).decode())
            page.locator("#question textarea").focus()
            page.keyboard.press("Control+v")
            page.wait_for_function(
                "old => { const i = document.querySelector('#picture img'); return i && i.src !== old }",
                arg=getattr(page, "old", ""),
            )
            page.old = page.locator("#picture img").get_attribute("src")
            got = Image.open(BytesIO(page.request.get(page.old).body())).convert("RGB")
            assert got.getcolors() == [(64, ImageColor.getrgb(colour))]

    def test_two_at_once_get_their_own(self, page, browser, site, loaded, scene, tmp_path):
        """Two users, each with a question of theirs; and the last of two clicks counts, however fast they come."""
        other = tmp_path / "other.png"
        Image.new("RGB", (40, 20), "blue").save(other)
        second = browser.new_context().new_page()
        second.goto(site)
        second.wait_for_selector("#picture input[type=file]", state="attached")
        users = [(page, scene, QUESTION), (second, other, "is there a green 7?")]
        # Before the page uses the same model in its own thread.
        expected = [
            [explain(*loaded, picture, question, attention_rule=r, max_new_tokens=6) for r in ("causal", "mma")]
            for _, picture, question in users
        ]
        for user, picture, question in users:
            upload(user, picture)
            user.locator("#picture img").wait_for()
            user.locator("#question textarea").fill(question)
        for user, _, _ in users:
            user.locator("#ask").click()
        for (user, _, _), found in zip(users, expected, strict=True):
            user.locator("#question-words label").first.wait_for()
            assert user.locator("#answer-mma textarea").input_value() == found[1].answer
            user.evaluate("[1, 2].forEach(n => document.querySelectorAll('#question-words input')[n].click())")
            wanted, sentence = overlays(found, "question", 2, None)[1]
            user.wait_for_function(
                "said => document.querySelector('#caption-mma')?.innerText.trim() === said", arg=sentence
            )
            np.testing.assert_array_equal(pixels(user, "mma"), np.asarray(wanted))
        second.context.close()

    @pytest.mark.parametrize(
        "page", [{"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "has_touch": True}], indirect=True
    )
    def test_a_phone_in_the_dark(self, page):
        page.locator(".example").first.tap()
        page.locator("#question-words label").nth(1).tap()
        page.locator("#overlay-mma img").wait_for()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, "the page scrolls sideways"
        for part in ("#ask", "#question-words label", "#overlay-mma img"):
            box = page.locator(part).first.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390
            assert min(box["width"], box["height"]) >= 38, f"{part} is too small for a thumb"
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(int(n) for n in background.removeprefix("rgb(").rstrip(")").split(",")) < 60

    def test_keys_alone(self, page):
        def focused():
            return page.evaluate("document.activeElement.closest('[id]')?.id + ' ' + document.activeElement.className")

        def tab_to(wanted):
            for _ in range(40):
                if wanted in focused():
                    return
                page.keyboard.press("Tab")
            raise AssertionError(f"{wanted} cannot be reached by Tab")

        tab_to("example")
        page.keyboard.press("Enter")
        page.locator("#question-words label").first.wait_for()
        tab_to("question-words")
        page.keyboard.press("Space")
        page.locator("#overlay-mma img").wait_for()
        first = page.locator("#caption-mma").inner_text()
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        page.wait_for_function(
            "old => document.querySelector('#caption-mma').innerText.trim() !== old.trim()", arg=first
        )
        page.locator("#question textarea").focus()
        page.keyboard.press("Control+a")
        page.keyboard.type("is there a red 3?")
        page.keyboard.press("Enter")
        page.locator("#question-words label", has_text="there").wait_for()


@in_a_browser
def test_a_client_that_leaves_in_the_middle_does_not_keep_the_model(loaded, browser, scene):
    model, processor = loaded
    blocks = serve(model, processor, host="127.0.0.1", port=None, max_new_tokens=60, block=False)
    slow = model.register_forward_pre_hook(lambda *_: sleep(0.1))
    try:
        leaving, staying = browser.new_context().new_page(), browser.new_context().new_page()
        leaving.goto(blocks.local_url)
        leaving.locator(".example").first.click()
        leaving.wait_for_function("document.querySelector('#answer-mma textarea').value.length > 20")
        leaving.context.close()
        slow.remove()
        staying.goto(blocks.local_url)
        staying.locator(".example").first.click()
        staying.locator("#question-words label").first.wait_for(timeout=60_000)
        staying.context.close()
    finally:
        slow.remove()
        blocks.close(verbose=False)


class TestUploads:
    def test_files_of_the_server_are_not_read(self, site, tmp_path):
        """A client that names a path of the server's instead of uploading."""
        secret = tmp_path / "secret.png"
        Image.new("RGB", (8, 8)).save(secret)
        config = httpx.get(f"{site}config").json()
        reading = next(d for d in config["dependencies"] if d["targets"][0][1] == "upload")
        for path in (str(secret), "/etc/passwd"):
            payload = {"path": path, "meta": {"_type": "gradio.FileData"}}
            body = {"data": [payload], "fn_index": reading["id"], "session_hash": "x"}
            httpx.post(f"{site}gradio_api/queue/join", json=body)
            with httpx.stream("GET", f"{site}gradio_api/queue/data?session_hash=x", timeout=30) as events:
                done = next(line for line in events.iter_lines() if "process_completed" in line)
            assert '"success":false' in done.replace(" ", "")

    def test_files_that_are_too_large_are_refused(self, site):
        answer = httpx.post(f"{site}gradio_api/upload", files={"files": ("a.png", bytes(21_000_000))}, timeout=60)
        assert answer.status_code == 413

    def test_bombs_are_refused_without_naming_paths(self, tmp_path):
        bomb = tmp_path / "bomb.png"
        Image.new("1", (20_000, 20_000)).save(bomb)
        with pytest.raises(ImageError, match=r"^This file .*pixels") as refused:
            opened(str(bomb))
        assert str(tmp_path) not in str(refused.value)


def test_answers_stream_and_the_other_rule_is_beside_it(loaded, scene):
    model, processor = loaded
    reader = Reader(model, processor, max_new_tokens=6)
    steps = list(reader.read(opened(str(scene)), QUESTION))
    texts = [text for text, explanations, _ in steps if not explanations]
    assert len(texts) > 3
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    text, explanations, problem = steps[-1]
    assert (problem, [e.rule for e in explanations]) == ("", ["causal", "mma"])
    assert explanations[1].answer == text.strip()
    assert model.config.attention_rule == "mma"


def test_a_reader_that_hangs_up_frees_the_model(loaded, scene):
    reader = Reader(*loaded, max_new_tokens=200)
    reading = reader.read(opened(str(scene)), QUESTION)
    next(reading)
    reading.close()
    assert not reader.lock.locked()


def test_a_port_that_cannot_be_had(loaded):
    with pytest.raises(OSError, match=r"port 99999 of 127.0.0.1 cannot be had: choose another with --port"):
        serve(*loaded, host="127.0.0.1", port=99999, max_new_tokens=6, block=False)


def test_the_page_listens_here_alone_by_default():
    from aki.commands.demo import Demo

    assert Demo("model").host == "127.0.0.1"
