"""What a person sees who opens the bridge in a browser: a real Chromium, a real server between."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, expect

from tests.http.visitors import Visitor, new_context, visiting
from tests.support.chromium import running_chromium
from tests.support.live_bridge import LiveBridge, running_bridge
from tests.support.live_server import LiveServer, running_server, wait_until
from tests.support.unused_ports import unused_port

CIRCLE = "a red circle on a blue background"
STAR = "a yellow star on a black background"
# Each test is a caller of its own, so that its gallery is empty at first.
CALLERS = (
    "draws",
    "cancels",
    "reloads",
    "deletes",
    "types",
    "varies",
    "errs",
    "narrow",
    "chinese",
    "many",
    "wrong",
    "kills",
)
LONG_STEPS = 150
PAGE_SIZE = 12
SMALL = {"width": 64, "height": 64, "numInferenceSteps": LONG_STEPS}

# What a browser does to a page when its tab is left, or looked at again.
HIDE = """isHidden => {
    Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""

expect.set_options(timeout=120_000)


class Open(Protocol):
    """Opens the page as a caller; keywords are options of the browser's context."""

    def __call__(self, caller: str, **options: Any) -> AbstractContextManager[Visitor]: ...


def token_of(caller: str) -> str:
    return f"token-of-{caller}-0123456789"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_chromium() as browser:
        yield browser


class GuardedServer:
    """A server that asks for tokens, which can be killed, and then starts again with its jobs."""

    def __init__(self, folder: Path) -> None:
        tokens = folder / "tokens"
        tokens.write_text("".join(f"{caller} {token_of(caller)}\n" for caller in CALLERS), encoding="utf-8")
        self.address = f"127.0.0.1:{unused_port()}"
        self._flags = (
            *("--tokens-file", str(tokens), "--max-running-jobs-per-caller", "1"),
            *("--data-dir", str(folder / "data"), "--listen", self.address),
        )
        self._running = ExitStack()
        self._server = self._start()

    @contextmanager
    def killed(self) -> Iterator[None]:
        """Kill it, and start it again after the block."""
        self._server.process.kill()
        self.end()
        try:
            yield
        finally:
            self._server = self._start()

    def end(self) -> None:
        self._running.close()

    def _start(self) -> LiveServer:
        return self._running.enter_context(running_server(*self._flags))


@pytest.fixture(scope="module")
def guarded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedServer]:
    server = GuardedServer(tmp_path_factory.mktemp("guarded"))
    yield server
    server.end()


@pytest.fixture(scope="module")
def guarded_bridge(guarded_server: GuardedServer) -> Iterator[LiveBridge]:
    """A bridge to a server that asks for tokens."""
    with running_bridge(guarded_server.address) as bridge:
        yield bridge


@pytest.fixture(scope="module")
def context(browser: Browser, guarded_bridge: LiveBridge) -> Iterator[BrowserContext]:
    """A profile whose tabs know nothing of each other, and share the process that an idle one keeps."""
    with new_context(browser) as context:
        context.new_page().goto(f"{guarded_bridge.url}/healthz")
        yield context


@pytest.fixture
def open_page(browser: Browser, context: BrowserContext, guarded_bridge: LiveBridge) -> Open:
    @contextmanager
    def open_as(caller: str, **options: Any) -> Iterator[Visitor]:
        with ExitStack() as stack:
            own = stack.enter_context(new_context(browser, **options)) if options else context
            yield stack.enter_context(visiting(own, guarded_bridge.url, token_of(caller)))

    return open_as


def step_of(card: Locator) -> int:
    """The step that a card says is done."""
    match = re.match(r"Step (\d+) of", card.locator(".status").inner_text())
    assert match is not None
    return int(match[1])


def call(bridge: LiveBridge, caller: str, method: str, path: str, **options: Any) -> httpx.Response:
    with bridge.client(headers={"Authorization": f"Bearer {token_of(caller)}"}) as http:
        return http.request(method, path, **options)


def test_a_person_sees_each_preview_and_then_the_image(open_page: Open) -> None:
    with open_page("draws") as visitor:
        expect(visitor.page.locator("#state")).to_have_text("Ready")
        card = visitor.draw(CIRCLE, numInferenceSteps=5, seed=7, numImages=2)
        expect(card.locator(".status")).to_have_text("Done")
        assert len(visitor.seen("preview")) > 1
        assert any(re.fullmatch(r"Step \d of 5 · .* left", line) for line in visitor.seen("status"))
        expect(card.get_by_alt_text(f"Image 2 of: {CIRCLE}")).to_have_js_property("naturalWidth", 256)
        expect(card.locator(".facts")).to_contain_text("Seed 7 · 256 × 256 · Steps: 5")
        expect(visitor.page.locator("#facts")).to_contain_text("tp=1")

        with visitor.page.expect_download() as download:
            card.get_by_alt_text(f"Image 1 of: {CIRCLE}").click()
            visitor.page.locator("#viewer a").click()
        assert download.value.suggested_filename == "hidream-7.png"
        assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")


def test_a_waiting_job_shows_its_position_and_both_can_be_cancelled(
    open_page: Open, guarded_bridge: LiveBridge
) -> None:
    with open_page("cancels") as visitor:
        running = visitor.draw(CIRCLE, numInferenceSteps=LONG_STEPS)
        expect(running.locator(".status")).to_contain_text(re.compile(r"Step \d+ of 150 · \d+.* left"))
        waiting = visitor.draw(STAR)
        expect(waiting.locator(".status")).to_contain_text(
            re.compile(r"Position 1 in the queue · starts in \d")
        )
        for card in (waiting, running):
            visitor.button(card, "Cancel").click()
            expect(card.locator(".status")).to_have_text("Cancelled")
            expect(visitor.button(card, "Cancel")).to_be_hidden()
    jobs = call(guarded_bridge, "cancels", "GET", "/v1/jobs").json()["jobs"]
    assert [job["state"] for job in jobs] == ["JOB_STATE_CANCELLED"] * 2


def test_a_job_goes_on_while_the_page_is_loaded_again(open_page: Open) -> None:
    with open_page("reloads") as visitor:
        visitor.describe(CIRCLE, numInferenceSteps=LONG_STEPS)
        # Large enough that it does not end while the page is loaded.
        visitor.page.locator("[name=size]").select_option("512x512")
        visitor.page.locator("#draw").click()
        card = visitor.card(CIRCLE)
        expect(card.locator(".status")).to_contain_text("Step")
        before = step_of(card)
        visitor.page.reload()
        expect(card.get_by_alt_text(f"Preview of: {CIRCLE}")).to_be_visible()
        wait_until(lambda: step_of(card) > before, 60, "the job has gone on")
        expect(visitor.page.locator("#gallery > li")).to_have_count(1)
        visitor.button(card, "Cancel").click()
        expect(card.locator(".status")).to_have_text("Cancelled")


def test_the_keyboard_is_enough(open_page: Open) -> None:
    with open_page("types") as visitor:
        keyboard = visitor.page.keyboard
        expect(visitor.page.locator("#draw")).to_be_enabled()
        visitor.page.locator("[name=prompt]").focus()
        keyboard.type(CIRCLE)
        for _ in ("generate", "settings", "size", "steps"):
            keyboard.press("Tab")
        expect(visitor.page.locator("[name=numInferenceSteps]")).to_be_focused()
        keyboard.type(str(LONG_STEPS))
        keyboard.press("Control+Enter")
        card = visitor.card(CIRCLE)
        expect(card.locator(".status")).to_contain_text("Step")
        while not visitor.button(card, "Cancel").evaluate("button => button === document.activeElement"):
            keyboard.press("Tab")
        assert (
            visitor.button(card, "Cancel").evaluate("button => getComputedStyle(button).outlineStyle")
            == "solid"
        )
        keyboard.press("Enter")
        expect(card.locator(".status")).to_have_text("Cancelled")
        expect(visitor.page.get_by_role("status").filter(has_text=f"Cancelled: {CIRCLE}")).to_have_count(1)


def test_a_job_is_varied_taken_into_the_form_and_deleted(open_page: Open, guarded_bridge: LiveBridge) -> None:
    with open_page("varies") as visitor:
        cards = visitor.page.locator("#gallery > li")
        first = visitor.draw(CIRCLE, numInferenceSteps=1, seed=7)
        expect(first.locator(".status")).to_have_text("Done")
        visitor.button(first, "Vary the seed").click()
        expect(cards).to_have_count(2)
        expect(cards.first.locator(".facts")).to_contain_text("Steps: 1 ·")
        expect(cards.first.locator(".facts")).not_to_contain_text("Seed 7 ·")
        expect(cards.first.locator(".status")).to_have_text("Done")

        visitor.describe("something else", numInferenceSteps=9, seed=1)
        visitor.button(cards.last, "Again").click()
        for name, value in (("prompt", CIRCLE), ("seed", "7"), ("numInferenceSteps", "1")):
            expect(visitor.page.locator(f"[name={name}]")).to_have_value(value)

        for count in (1, 0):
            visitor.page.once("dialog", lambda dialog: dialog.accept())
            visitor.button(cards.first, "Delete").click()
            expect(cards).to_have_count(count)
        expect(visitor.page.locator("#empty")).to_be_visible()
        expect(visitor.page.locator("[name=prompt]")).to_be_focused()
    assert not call(guarded_bridge, "varies", "GET", "/v1/jobs").json().get("jobs")


def test_the_form_shows_the_limits_and_which_field_is_wrong(
    open_page: Open, guarded_bridge: LiveBridge
) -> None:
    info = call(guarded_bridge, "errs", "GET", "/v1/server").json()
    with open_page("errs") as visitor:
        steps = visitor.page.locator("[name=numInferenceSteps]")
        expect(steps).to_have_attribute("max", str(info["limits"]["maxNumInferenceSteps"]))
        expect(steps).to_have_value(str(info["defaults"]["numInferenceSteps"]))
        sizes = visitor.page.locator("[name=size] option")
        offered = info["recommendedSizes"] + info["supportedSizes"] + [info["defaults"]]
        assert sorted(sizes.all_inner_texts()) == sorted(
            f"{size['width']} × {size['height']}" for size in offered
        )
        visitor.describe(CIRCLE, numInferenceSteps=info["limits"]["maxNumInferenceSteps"] + 1)
        visitor.page.locator("#draw").click()
        expect(visitor.page.get_by_role("alert")).to_contain_text("num_inference_steps")
        expect(steps).to_have_attribute("aria-invalid", "true")
        expect(steps).to_be_focused()


def test_chinese_readers_find_chinese_words_that_fit_a_narrow_screen(open_page: Open) -> None:
    prompt = "红色圆形在蓝色背景上" * 3
    phone = {"viewport": {"width": 360, "height": 640}, "color_scheme": "dark", "locale": "zh-CN"}
    with open_page("chinese", **phone) as visitor:
        expect(visitor.page.get_by_role("button", name="生成")).to_be_enabled()
        visitor.page.get_by_text("设置").click()
        visitor.page.get_by_label("提示词", exact=True).fill(prompt)
        visitor.page.get_by_label("步数").fill("1")
        visitor.page.get_by_role("button", name="生成").click()
        card = visitor.card(prompt)
        expect(card.locator(".status")).to_have_text("已完成")
        expect(card.locator(".facts")).to_contain_text("种子")
        assert visitor.page.evaluate("document.documentElement.lang") == "zh-Hans"
        assert visitor.page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.long
def test_scrolling_brings_older_jobs(open_page: Open, guarded_bridge: LiveBridge) -> None:
    count = PAGE_SIZE + 3

    def add_jobs() -> None:
        requests = [{"spec": {**SMALL, "prompt": f"{CIRCLE} {index:02d}"}} for index in range(count)]
        with guarded_bridge.client(headers={"Authorization": f"Bearer {token_of('many')}"}) as http:
            for job in http.post("/v1/jobs:batch", json={"requests": requests}).json()["jobs"]:
                http.post(f"/v1/jobs/{job['jobId']}:cancel", json={})

    add_jobs()
    with open_page("many") as visitor:
        cards = visitor.page.locator("#gallery > li")
        expect(cards).to_have_count(PAGE_SIZE)
        cards.last.scroll_into_view_if_needed()
        expect(cards).to_have_count(count)
        # More than a page of them may come while nobody looks.
        visitor.page.evaluate(HIDE, True)
        add_jobs()
        visitor.page.evaluate(HIDE, False)
        expect(cards).to_have_count(count + PAGE_SIZE)
        cards.last.scroll_into_view_if_needed()
        expect(cards).to_have_count(2 * count)


def test_a_token_is_asked_for_and_kept_for_the_tab_alone(
    context: BrowserContext, guarded_bridge: LiveBridge
) -> None:
    with visiting(context, guarded_bridge.url, "not-a-token-of-anybody") as visitor:
        dialog = visitor.page.get_by_role("dialog")
        expect(dialog).to_contain_text("does not know this token")
        dialog.get_by_label("Token").fill(token_of("wrong"))
        dialog.get_by_label("Token").press("Enter")
        expect(visitor.page.locator("#draw")).to_be_enabled()
        visitor.page.reload()
        expect(visitor.page.locator("#state")).to_have_text("Ready")
        assert visitor.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        with visiting(context, guarded_bridge.url) as other:
            expect(other.page.get_by_role("dialog")).to_be_visible()
        visitor.page.get_by_role("button", name="Forget token").click()
        expect(dialog).to_be_visible()


def test_a_killed_server_goes_on_with_the_job_before_the_persons_eyes(
    open_page: Open, guarded_server: GuardedServer
) -> None:
    with open_page("kills") as visitor:
        card = visitor.draw(CIRCLE, numInferenceSteps=30)
        expect(card.locator(".status")).to_contain_text(re.compile(r"Step ([3-9]|1\d) of 30"))
        with guarded_server.killed():
            expect(visitor.page.locator("#state")).to_have_text("Reconnecting…")
            # It is sent until the server answers, and drawn once.
            visitor.describe(STAR, numInferenceSteps=1)
            visitor.page.locator("#draw").click()
            expect(visitor.page.get_by_role("alert")).to_contain_text("Trying again")
        expect(visitor.card(STAR).locator(".status")).to_have_text("Done")
        expect(visitor.page.locator("#state")).to_have_text("Ready")
        expect(card.locator(".status")).to_have_text("Done")
        picture = card.get_by_alt_text(f"Image 1 of: {CIRCLE}")
        expect(picture).to_have_js_property("naturalWidth", 256)
        expect(visitor.page.locator("#gallery > li")).to_have_count(2)
