"""The page goes on when its server is killed and started again behind the bridge."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import expect

from tests.http.visitors import visiting
from tests.support.chromium import running_chromium
from tests.support.live_bridge import running_bridge
from tests.support.live_server import running_server

CIRCLE = "a red circle on a blue background"
STAR = "a yellow star on a black background"
LATER_STEPS = re.compile(r"Step [1-4]\d of 50")


def test_a_killed_server_goes_on_with_the_job_before_the_persons_eyes(tmp_path: Path) -> None:
    folder = ("--data-dir", str(tmp_path))
    with (
        running_chromium() as browser,
        running_server(*folder) as first,
        running_bridge(first.address) as bridge,
        visiting(browser, bridge.url) as visitor,
    ):
        card = visitor.draw(CIRCLE, numInferenceSteps=50)
        expect(card.locator(".status")).to_contain_text(LATER_STEPS, timeout=120_000)
        first.process.kill()
        first.process.wait()
        expect(visitor.page.locator("#state")).to_have_text("Reconnecting…", timeout=120_000)
        # It is sent until the server answers, and drawn once.
        visitor.describe(STAR, numInferenceSteps=1)
        visitor.page.locator("#draw").click()
        expect(visitor.page.get_by_role("alert")).to_contain_text("Trying again")
        with running_server(*folder, "--listen", first.address):
            expect(visitor.card(STAR).locator(".status")).to_have_text("Done", timeout=120_000)
            expect(visitor.page.locator("#state")).to_have_text("Ready", timeout=120_000)
            expect(card.locator(".status")).to_have_text("Done", timeout=120_000)
            picture = card.get_by_alt_text(f"Image 1 of: {CIRCLE}")
            expect(picture).to_have_js_property("naturalWidth", 256, timeout=120_000)
            expect(visitor.page.locator("#gallery > li")).to_have_count(2)
