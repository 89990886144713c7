"""Make docs/demo-desktop.png and docs/demo-phone.png: `python docs/screenshots.py runs/digits/mma`. Needs Chromium."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from aki.apps.demo.page import serve
from aki.apps.loading import load

DOCS = Path(__file__).parent
VIEWS: dict[str, dict] = {
    "demo-desktop": {"viewport": {"width": 1100, "height": 830}, "color_scheme": "light"},
    "demo-phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"},
}


def main(folder: str) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("no chromium here: `make browser` installs it on Debian.")
    blocks = serve(*load(folder), host="127.0.0.1", port=None, max_new_tokens=32, block=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, view in VIEWS.items():
            page = browser.new_context(**view).new_page()
            page.goto(blocks.local_url)
            page.get_by_role("button", name="green").click()
            page.locator("#question-words label", has_text="green").click()
            page.locator("#overlay-mma img").wait_for()
            page.wait_for_timeout(1000)
            page.screenshot(path=DOCS / f"{name}.png", full_page=True)
        browser.close()
    blocks.close(verbose=False)


if __name__ == "__main__":
    main(sys.argv[1])
