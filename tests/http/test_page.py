"""What a person sees who opens the bridge in a browser: a real Chromium, a real server between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
from playwright.sync_api import Browser, Locator, expect

from tests.http.visitors import Visitor, visiting
from tests.support.chromium import running_chromium
from tests.support.live_bridge import LiveBridge, running_bridge
from tests.support.live_server import running_server

CIRCLE = "a red circle on a blue background"
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
)
LONG_STEPS = 150
PAGE_SIZE = 24

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


@pytest.fixture(scope="module")
def guarded_bridge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveBridge]:
    """A bridge to a server that asks for tokens."""
    path = tmp_path_factory.mktemp("secret") / "tokens"
    path.write_text("".join(f"{caller} {token_of(caller)}\n" for caller in CALLERS), encoding="utf-8")
    with running_server("--tokens-file", str(path)) as server, running_bridge(server.address) as bridge:
        yield bridge


@pytest.fixture
def open_page(browser: Browser, guarded_bridge: LiveBridge) -> Open:
    def open_as(caller: str, **options: Any) -> AbstractContextManager[Visitor]:
        return visiting(browser, guarded_bridge.url, token_of(caller), **options)

    return open_as


def width_of(image: Locator) -> int:
    """The width of the picture that an element shows; 0 while it shows none."""
    return int(image.evaluate("image => image.naturalWidth"))


def call(bridge: LiveBridge, caller: str, method: str, path: str, **options: Any) -> httpx.Response:
    with bridge.client(headers={"Authorization": f"Bearer {token_of(caller)}"}) as http:
        return http.request(method, path, **options)


def test_a_person_sees_each_preview_and_then_the_image(open_page: Open) -> None:
    with open_page("draws") as visitor:
        expect(visitor.page.locator("#state")).to_have_text("Ready")
        card = visitor.draw(CIRCLE, numInferenceSteps=12, seed=7, numImages=2)
        preview = card.get_by_alt_text(f"Preview of: {CIRCLE}")
        expect(preview).to_be_visible()
        first = preview.get_attribute("src")
        assert first is not None
        expect(preview).not_to_have_attribute("src", first)
        expect(card.locator(".status")).to_contain_text("of 12")
        expect(card.locator(".status")).to_have_text("Done")
        expect(card.get_by_alt_text(f"Image 2 of: {CIRCLE}")).to_have_js_property("naturalWidth", 256)
        expect(card.locator(".facts")).to_contain_text("Seed 7 · 256 × 256 · 12 steps")
        expect(visitor.page.locator("#facts")).to_contain_text("tp=1")

        with visitor.page.expect_download() as download:
            card.get_by_alt_text(f"Image 1 of: {CIRCLE}").click()
            visitor.page.locator("#viewer a").click()
        assert download.value.suggested_filename == "hidream-7.png"
        assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")


def test_cancelling_stops_the_job(open_page: Open, guarded_bridge: LiveBridge) -> None:
    with open_page("cancels") as visitor:
        card = visitor.draw(CIRCLE, numInferenceSteps=LONG_STEPS)
        expect(card.locator(".status")).to_contain_text("Step")
        visitor.button(card, "Cancel").click()
        expect(card.locator(".status")).to_have_text("Cancelled")
        expect(visitor.button(card, "Cancel")).to_be_hidden()
    (job,) = call(guarded_bridge, "cancels", "GET", "/v1/jobs").json()["jobs"]
    assert job["state"] == "JOB_STATE_CANCELLED"


def test_a_job_goes_on_while_the_page_is_loaded_again(open_page: Open) -> None:
    with open_page("reloads") as visitor:
        card = visitor.draw(CIRCLE, numInferenceSteps=24)
        expect(card.locator(".status")).to_contain_text("Step")
        visitor.page.reload()
        expect(card.get_by_alt_text(f"Preview of: {CIRCLE}")).to_be_visible()
        expect(card.locator(".status")).to_have_text("Done")
        expect(visitor.page.locator("#gallery > li")).to_have_count(1)


def test_a_job_is_deleted_after_a_second_click(open_page: Open, guarded_bridge: LiveBridge) -> None:
    with open_page("deletes") as visitor:
        card = visitor.draw(CIRCLE, numInferenceSteps=1)
        expect(card.locator(".status")).to_have_text("Done")
        visitor.button(card, "Delete").click()
        visitor.button(card, "Delete for good?").click()
        expect(card).to_have_count(0)
        expect(visitor.page.locator("#empty")).to_be_visible()
        expect(visitor.page.locator("[name=prompt]")).to_be_focused()
    assert not call(guarded_bridge, "deletes", "GET", "/v1/jobs").json().get("jobs")


def test_the_keyboard_is_enough(open_page: Open) -> None:
    with open_page("types") as visitor:
        keyboard = visitor.page.keyboard
        expect(visitor.page.locator("#draw")).to_be_enabled()
        visitor.page.locator("[name=prompt]").focus()
        keyboard.type(CIRCLE)
        for _ in ("settings", "size", "steps"):
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


def test_a_job_is_drawn_with_another_seed_and_taken_into_the_form(open_page: Open) -> None:
    with open_page("varies") as visitor:
        card = visitor.draw(CIRCLE, numInferenceSteps=2, seed=7)
        expect(card.locator(".status")).to_have_text("Done")
        visitor.button(card, "Vary the seed").click()
        expect(visitor.page.locator("#gallery > li")).to_have_count(2)
        newest = visitor.card(CIRCLE).locator(".facts")
        expect(newest).to_contain_text("2 steps")
        expect(newest).not_to_contain_text("Seed 7 ")
        visitor.describe("something else", numInferenceSteps=9, seed=1)
        visitor.button(visitor.page.locator("#gallery > li").last, "Again").click()
        expect(visitor.page.locator("[name=prompt]")).to_have_value(CIRCLE)
        expect(visitor.page.locator("[name=seed]")).to_have_value("7")
        expect(visitor.page.locator("[name=numInferenceSteps]")).to_have_value("2")


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


def test_a_narrow_screen_needs_no_scrolling_to_the_side(open_page: Open) -> None:
    with open_page("narrow", viewport={"width": 360, "height": 640}, color_scheme="dark") as visitor:
        visitor.page.locator("summary").click()
        card = visitor.draw(f"{CIRCLE} {'very' * 20}", numInferenceSteps=1)
        expect(card.locator(".status")).to_have_text("Done")
        assert visitor.page.evaluate("document.documentElement.scrollWidth") == 360


def test_chinese_readers_find_chinese_words(open_page: Open) -> None:
    prompt = "红色圆形在蓝色背景上"
    with open_page("chinese", locale="zh-CN") as visitor:
        visitor.page.get_by_label("提示词", exact=True).fill(prompt)
        visitor.page.locator("[name=numInferenceSteps]").fill("2")
        visitor.page.get_by_role("button", name="生成").click()
        card = visitor.card(prompt)
        expect(card.locator(".status")).to_have_text("已完成")
        expect(card.locator(".facts")).to_contain_text("种子")
        assert visitor.page.evaluate("document.documentElement.lang") == "zh-Hans"


def test_scrolling_brings_older_jobs(open_page: Open, guarded_bridge: LiveBridge) -> None:
    count = PAGE_SIZE + 6
    requests = [
        {"spec": {"prompt": f"{CIRCLE} {index:02d}", "numInferenceSteps": 150}} for index in range(count)
    ]
    jobs = call(guarded_bridge, "many", "POST", "/v1/jobs:batch", json={"requests": requests}).json()["jobs"]
    for job in jobs:
        call(guarded_bridge, "many", "POST", f"/v1/jobs/{job['jobId']}:cancel", json={})
    with open_page("many") as visitor:
        cards = visitor.page.locator("#gallery > li")
        expect(cards).to_have_count(PAGE_SIZE)
        cards.last.scroll_into_view_if_needed()
        expect(cards).to_have_count(count)


def test_a_token_is_asked_for_and_kept_for_the_tab_alone(
    browser: Browser, guarded_bridge: LiveBridge
) -> None:
    with visiting(browser, guarded_bridge.url, "not-a-token-of-anybody") as visitor:
        dialog = visitor.page.get_by_role("dialog")
        expect(dialog).to_contain_text("does not know this token")
        dialog.get_by_label("Token").fill(token_of("wrong"))
        dialog.get_by_label("Token").press("Enter")
        expect(visitor.page.locator("#draw")).to_be_enabled()
        visitor.page.reload()
        expect(visitor.page.locator("#state")).to_have_text("Ready")
        assert visitor.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        other_tab = visitor.page.context.new_page()
        other_tab.goto(guarded_bridge.url)
        expect(other_tab.get_by_role("dialog")).to_be_visible()
        visitor.page.get_by_role("button", name="Forget token").click()
        expect(dialog).to_be_visible()
