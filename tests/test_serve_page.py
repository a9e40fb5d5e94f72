# ruff: noqa: E402 - without the packages the module is skipped before the imports that need them
"""The chat page, in a headless Chromium; skipped where there is none."""

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from litgpt.checkpoint.hub import PICO
from litgpt.generate.sampling import Sampling
from litgpt.methods.lora import LoRA
from litgpt.serve.failure import Failure
from litgpt.serve.worker import Delta, Generation
from tests.servers import Running, in_thread
from tests.test_lora import save, with_lora

PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
DESKTOP = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
ENTER, ESCAPE, UP, SHIFT = "\ue007", "\ue00c", "\ue013", "\ue008"


class Script:
    """What the server's models say instead of their own answers."""

    def __init__(self) -> None:
        self.texts: list[str] = []  # in turn; the last one again and again
        self.piece, self.delay, self.finish = 40, 0.0, "stop"
        self.failure: Optional[Failure] = None  # at the end of each answer

    async def deltas(self, generation: Generation) -> AsyncIterator[Delta]:
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        try:
            for start in range(0, len(text), self.piece):
                generation.n_new += 1
                yield Delta(0, text[start : start + self.piece], [], None)
                await asyncio.sleep(self.delay)
            if self.failure:
                raise self.failure
            yield Delta(0, "", [], self.finish)
        finally:
            generation.cancel()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    made = Script()
    monkeypatch.setattr(Generation, "deltas", lambda generation: made.deltas(generation))
    return made


class Page:
    """The page in a browser, after a visit to the address without earlier chats."""

    def __init__(self, browser: Any, url: str, device: dict[str, Any] = DESKTOP) -> None:
        self.browser, self.url = browser, url
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
        browser.get(url + "/health")
        self.js("localStorage.clear(); sessionStorage.clear()")
        browser.get_log("browser"), browser.get_log("performance")
        self.open()

    def open(self) -> None:
        self.browser.get(self.url)
        self.wait(lambda: self.all("#models input"))

    def js(self, code: str, *values: Any) -> Any:
        return self.browser.execute_script(code, *values)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def click(self, action: str, number: int = -1) -> None:
        self.all(f"[data-action={action}]")[number].click()

    def wait(self, ready: Callable[[], Any], seconds: float = 20) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, seconds, poll_frequency=0.05).until(lambda _: ready())

    def idle(self) -> bool:
        return self.one("#send").is_displayed()

    def texts(self, selector: str) -> list[str]:
        return [element.get_property("textContent") for element in self.all(selector)]

    def answers(self) -> list[str]:
        return self.texts(".said")

    def send(self, question: str) -> None:
        self.one("#question").send_keys(question, ENTER)

    def ask(self, question: str) -> str:
        self.send(question)
        self.wait(self.idle)
        return self.answers()[-1]

    def keys(self, *keys: str) -> None:
        self.browser.switch_to.active_element.send_keys(*keys)

    def choose_both(self) -> None:
        for box in self.all("#models input:not(:checked)"):
            box.click()

    def chats(self) -> list[dict[str, Any]]:
        """What the browser keeps."""
        code = "return Object.keys(localStorage).filter(k => k.includes(':chat:')).map(k => localStorage[k])"
        return sorted(map(json.loads, self.js(code)), key=lambda chat: chat["changed"])

    def fits(self) -> bool:
        """Whether nothing makes the page wider than the screen."""
        return self.js("return document.documentElement.scrollWidth <= innerWidth")

    def requests(self) -> set[str]:
        """The addresses that the page asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        return {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}

    def problems(self) -> list[str]:
        """Errors on the browser's console since the last call."""
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]

    def picture(self, name: str) -> None:
        if folder := os.environ.get("LITGPT_SCREENSHOTS"):
            self.browser.save_screenshot(str(Path(folder) / f"{name}.png"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A base model, which is the default, and an adapter."""
    lora = LoRA(r=4, alpha=32)
    folder = save(with_lora(PICO, lora), lora, PICO, tmp_path_factory.mktemp("a") / "one")
    with in_thread(PICO, {"one": folder}, sampling=Sampling(0.0)) as made:
        yield made
