# ruff: noqa: E402 - without the packages the module is skipped before the imports that need them
"""The page to chat, in a headless Chromium; skipped where there is none."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from litgpt.checkpoint.hub import PICO
from litgpt.generate.engine import GREEDY, generate
from litgpt.generate.inference_model import InferenceModel
from litgpt.generate.sampling import Sampling
from litgpt.methods.lora import LoRA
from tests.servers import Running, in_thread
from tests.test_lora import save, with_lora

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    lora = LoRA(r=4, alpha=32)
    folder = save(with_lora(PICO, lora), lora, PICO, tmp_path_factory.mktemp("a") / "one")
    with in_thread(PICO, {"one": folder}, sampling=Sampling(0.0)) as made:
        yield made


def test_what_the_page_may_do(running):
    page = httpx.get(running.url + "/")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    script = httpx.get(running.url + "/script.js")
    assert script.headers["Content-Type"].startswith("text/javascript")
    for text in (page.text, script.text, httpx.get(running.url + "/style.css").text):
        assert "://" not in text and "innerHTML" not in text and "insertAdjacent" not in text


class Page:
    def __init__(self, browser: Any, url: str) -> None:
        self.browser = browser
        browser.get(url)
        self.wait(lambda: len(self.all("#model option")) == 2)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def wait(self, ready: Any) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, 20, poll_frequency=0.05).until(lambda _: ready())

    def idle(self) -> bool:
        return self.one("#send").is_displayed()

    def answers(self) -> list[str]:
        return [element.get_property("textContent") for element in self.all(".assistant .said")]

    def ask(self, question: str) -> str:
        n = len(self.answers())
        self.browser.switch_to.active_element.send_keys(question, "\ue007")  # Enter: no mouse is needed
        self.wait(lambda: len(self.answers()) == n + 1 and self.idle())
        return self.answers()[-1]

    def picture(self, name: str) -> None:
        if folder := os.environ.get("LITGPT_SCREENSHOTS"):
            self.browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def expected(question: str) -> str:
    loaded = InferenceModel.open(PICO, precision="32-true")
    ids = loaded.render([{"role": "user", "content": question}])[1]
    return loaded.tokenizer.decode(list(generate(loaded.model, ids, 200, GREEDY, loaded.stop_ids))).strip()


def test_a_question_and_another_adapter(browser, running):
    page = Page(browser, running.url)
    browser.set_window_size(1100, 800)
    page.one("#settings summary").click()
    page.one("#temperature").clear()
    page.one("#temperature").send_keys("0")
    page.one("#system").send_keys("Be kind.")
    page.picture("settings")
    page.one("#system").clear()
    page.one("#settings summary").click()
    page.one("#question").click()
    first = page.ask("What is five plus six?")
    assert first.strip() == expected("What is five plus six?")
    page.one("#fresh").click()
    page.one("#model").send_keys("one")
    page.one("#question").click()
    assert page.ask("What is five plus six?") != first
    assert [e.get_property("textContent") for e in page.all(".assistant .who")] == ["one"]
    page.picture("desktop")
    browser.set_window_size(500, 800)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 375, "height": 667, "deviceScaleFactor": 1, "mobile": True}
    )
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    page.picture("phone")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_what_the_model_says_is_text(browser, running, monkeypatch):
    """It also comes piece by piece, and can be stopped."""
    loaded = InferenceModel.open(PICO, precision="32-true")
    script = loaded.tokenizer.encode(HOSTILE, special=False)
    assert loaded.tokenizer.decode(script).strip() == HOSTILE and len(script) > 5
    place = iter(range(10**9))

    def draw(self: Sampling, logits: Any, numbers: Any) -> Any:
        import time

        time.sleep(0.02)
        return logits[:, 0].long() * 0 + script[next(place) % len(script)]

    monkeypatch.setattr(Sampling, "draw", draw)
    page = Page(browser, running.url)
    page.one("#question").send_keys("Attack!", "\ue007")
    lengths = []
    page.wait(
        lambda: lengths.append(len("".join(page.answers()))) or (page.answers()[:1] and HOSTILE in page.answers()[0])
    )
    assert len({n for n in lengths if n}) > 2, "it grows"
    page.browser.switch_to.active_element.send_keys("\ue00c")  # Escape
    page.wait(page.idle)
    assert page.all("#talk img") == [] and HOSTILE in page.one("#talk").text
    page.picture("hostile")
    running.wait_idle()
