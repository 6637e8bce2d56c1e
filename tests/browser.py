"""A headless Chromium for tests of the dashboards."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from tests.services import program

SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1360,850", "--force-device-scale-factor=1", "--hide-scrollbars", "--lang=en",
)  # fmt: skip


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser with an empty profile. Raises Missing without Debian's chromium and chromium-driver."""
    with tempfile.TemporaryDirectory(prefix="hdcs-chromium-") as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = program("chromium")
        for switch in (*SWITCHES, f"--user-data-dir={profile}"):
            options.add_argument(switch)
        driver = webdriver.Chrome(options, Service(program("chromedriver")))
        try:
            driver.set_page_load_timeout(60)
            yield driver
        finally:
            driver.quit()


def picture(driver: webdriver.Chrome, name: str) -> None:
    """A screenshot for the docs, where HDCS_PICTURES names a folder for them."""
    folder = os.environ.get("HDCS_PICTURES")
    if folder:
        driver.save_screenshot(str(Path(folder) / f"{name}.png"))
