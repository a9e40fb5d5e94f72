"""`litgpt report`: what the page says, that texts stay texts, and that it needs nothing else."""

import json
import math
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Optional

import pytest
import yaml

from litgpt.serve import about
from litgpt.train import examples
from litgpt.train.metrics import FIELDS
from litgpt.train.resume.folder import clear
from litgpt.train.run_report import page
from litgpt.train.run_report.charts import Chart, Line, envelope, ticks
from tests.runs import exit_code, go

HOSTILE = "<img src=x onerror=alert(1)>\"'&\x1b\u202e{{ 7 * 7 }}"
VOID = ("meta", "link", "br", "img", "circle", "line", "path", "polyline")
LOCK = {
    "command": "finetune_lora",
    "versions": {"python": "3.12.1", "torch": "2.13.0"},
    "model": {"model.safetensors": "ab" * 32},
    "adapter": {},
    "data": [["rows.json", "cd" * 32]],
    "order": "0ad" * 20,
    "rows": "0be" * 20,
    "machine": {"device": "cpu", "name": "x86_64", "threads": 2},
    "losses": ["2.0"],
    "check": ["120 read (120 messages): 3 truncated, 0 skipped"],
}
CARD = """# a

## Training

| | |
|---|---|
| base | pico |
| data | `rows.json`: 120 rows, hash cdcd |
| prompt style | a\\|b |

## Use
| no | row |
"""


def make_run(folder: Path, steps: int = 20, **settings: Any) -> Path:
    """The files of a finished run, made by hand, with a spike in its losses."""
    final = folder / "final"
    final.mkdir(parents=True)
    lines = [",".join(FIELDS), "0,,,,3.5,0,0.0,,,"]
    for step in range(1, steps + 1):
        loss = 99.5 if step == steps // 3 else 3 * math.exp(-step / steps)
        lines.append(
            f"{step},{step / steps},{loss!r},{1e-4 * step / steps!r},,{step * 100},{step / 2},200.0,,1500000000"
        )
        if step % (steps // 4) == 0:
            lines.append(f"{step},,,,{2 + step / steps!r},{step * 100},{step / 2},,,")
    (folder / "metrics.csv").write_text("\n".join([*lines, ""]))
    found = {"checkpoint_dir": "pico", "lora_r": 8, "optimizer": {"init_args": {"lr": 1e-4}}, **settings}
    for place in (folder, final):
        (place / "hyperparameters.yaml").write_text(yaml.safe_dump(found))
    (final / "run.lock").write_text(json.dumps(LOCK))
    (final / "README.md").write_text(CARD)
    told = [{"step": step, "prompt": "Say\nhi", "reference": "hi", "answer": f"<b>{step}</b>"} for step in (0, steps)]
    counted = [{"step": 0, "exact": 1, "rows": 40}, {"step": steps, "exact": 30, "rows": 40}]
    (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told + counted))
    return folder


class Page(HTMLParser):
    """A report, parsed: its tags with their attributes, and its text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Optional[str]]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))
        assert not self.open, "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def lines(self) -> dict[str, list[list[float]]]:
        """The values of the curves of the charts, in which several may have the same name."""
        found: dict[str, list[list[float]]] = {}
        for _, attributes in self.tags:
            if "data-points" in attributes:
                found.setdefault(str(attributes["data-name"]), json.loads(str(attributes["data-points"])))
        return found


def report(*words: Any) -> int:
    return exit_code("report", *words)


def test_a_run(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    assert report(run) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    page = Page(run / "report.html")
    for words in (
        "Best validation loss 2.2500 at step 5, last 3.0000, 3.5000 before training.",
        "1.50 GB",
        "0:00:10",
        f"litgpt rerun {run}",
        f"litgpt finetune lora --config {run / 'final' / 'hyperparameters.yaml'}",
        "python 3.12.1",
        "rows.json hash of its rows " + "cd" * 32,
        "data rows.json: 120 rows",
        "hash of their order " + "0ad" * 20,
        "prompt style a|b",
        "model model.safetensors " + "ab" * 32,
        "optimizer.lr 0.0001",
        "check 120 read (120 messages): 3 truncated, 0 skipped",
        "exact answers 1 of 40 → 30 of 40",
        "prompt Say hi before training <b>0</b> after step 20 <b>20</b> reference hi",
    ):
        assert words in page.text, words
    lines = page.lines()
    assert lines["validation"] == [[0, 3.5], [5, 2.25], [10, 2.5], [15, 2.75], [20, 3.0]]
    assert [6, 99.5] in lines["training"] and len(lines["training"]) == 20
    assert lines["Learning rate"][-1] == [20, 1e-4]
    assert sum(tag == "circle" and "cx" in attributes for tag, attributes in page.tags) >= 5


def test_nothing_comes_from_elsewhere(tmp_path):
    run = make_run(tmp_path / "a", data="https://example.com/rows.json")
    assert report(run) == 0
    page = Page(run / "report.html")
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'") and "http" not in policy
    assert "https://example.com/rows.json" in page.text
    for tag, attributes in page.tags:
        assert tag not in ("img", "iframe", "object", "a", "form", "base")
        assert tag != "script" or not attributes
        assert tag != "link" or attributes["href"] == "data:,"
        assert not {"src", "srcset", "action", "xlink:href"} & {*attributes}
        assert not any(name.startswith("on") for name in attributes)
    source = (run / "report.html").read_text(encoding="utf-8")
    assert "@import" not in source and "url(" not in source and "innerHTML" not in source


def test_texts_stay_texts(tmp_path):
    run = make_run(tmp_path / HOSTILE, note=HOSTILE, **{HOSTILE: "</script><script>alert(2)</script>"})
    final = run / "final"
    hostile = {HOSTILE: HOSTILE}
    lock = {**LOCK, "versions": hostile, "model": hostile, "data": [[HOSTILE, HOSTILE]], "order": HOSTILE}
    (final / "run.lock").write_text(json.dumps(lock))
    (final / "README.md").write_text(f"# a\n\n## Training\n\n| base | {HOSTILE} |\n")
    other = make_run(tmp_path / "b")
    line = {"step": 0, "prompt": HOSTILE, "reference": f"</script>{HOSTILE}", "answer": f"</pre>{HOSTILE}"}
    (run / "examples.jsonl").write_text(json.dumps(line))
    (final / "evaluate").mkdir()
    (final / "evaluate" / "results.json").write_text(json.dumps({"results": {HOSTILE: {f"{HOSTILE},none": 1.0}}}))
    for words in ([run], [run, other, "--out", tmp_path / "both.html"]):
        assert report(*words) == 0
    assert report(other) == 0
    clean = Page(other / "report.html")
    for file in (run / "report.html", tmp_path / "both.html"):
        page = Page(file)
        known = {tag for tag, _ in clean.tags} | {"thead", "tbody"}
        assert {tag for tag, _ in page.tags} <= known
        shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
        assert page.text.count(shown) >= 11
        assert "</script><script>alert(2)</script>" in page.text
        source = file.read_text(encoding="utf-8")
        assert "\x1b" not in source and "\u202e" not in source and source.count("<script") == 1


@pytest.mark.skipif(os.name == "nt", reason="such names are only on Linux")
def test_a_name_that_is_not_utf8(tmp_path):
    run = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    try:
        make_run(run)
    except OSError:
        pytest.skip("the file system refuses the name")
    assert report(run, "--out", tmp_path / "r.html") == 0
    assert "\\udcff" in Page(tmp_path / "r.html").text


def test_several_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [make_run(Path(name), lora_r=r) for name, r in (("x/a", 8), ("x/b", 32), ("y/b", 8))]
    lock = {**LOCK, "versions": {"python": "3.12.1", "torch": "2.14.0"}}
    (runs[1] / "final" / "run.lock").write_text(json.dumps(lock))
    (runs[2] / "final" / "run.lock").unlink()
    assert report(*runs, "x/a/final") == 0  # the first one again
    text = Page(Path("out/report.html")).text
    before = text[: text.index("Curves")]
    assert text.startswith("3 runs") and "lora_r 8 32 8" in before and "version of torch 2.13.0 2.14.0" in before
    assert "checkpoint_dir" not in before and "version of python" not in before
    assert "x/b training" in text and "y/b validation" in text
    assert "checkpoint_dir pico" in text


def test_100_000_steps(tmp_path):
    run = make_run(tmp_path / "a", steps=100_000)
    assert report(run) == 0
    assert (run / "report.html").stat().st_size < 5e5
    training = Page(run / "report.html").lines()["training"]
    assert [33333, 99.5] in training and 500 < len(training) <= 1000
    assert training[0][0] == 1 and training[-1][0] == 100_000


def test_preferences_and_evaluation(tmp_path):
    run = make_run(tmp_path / "a")
    file = run / "metrics.csv"
    head, *rows = file.read_text().splitlines()
    more = ",rewards/margins,val_rewards/margins,val_rewards/accuracies"
    lines = [head + more, *(row + (",,0.5,0.75" if row.split(",")[4] else ",0.25,,") for row in rows)]
    file.write_text("\n".join([*lines, ""]))
    vs_base = {"base": 4.75, "difference": -2.04, "low": -2.13, "high": -1.95, "n": 55}
    results = {
        "results": {
            "rows": {"alias": "rows", "loss,none": 2.71},
            "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.01},
        },
        "n-samples": {"arc": {"effective": 100}},
        "vs_base": {"rows": {"loss": vs_base}},
    }
    (run / "final" / "evaluate").mkdir()
    (run / "final" / "evaluate" / "results.json").write_text(json.dumps(results))
    assert report(run) == 0
    text = Page(run / "report.html").text
    assert "Reward margin" in text and "Reward accuracy" in text and "reward accuracy 75.0%" in text
    assert "rows loss 2.7100 4.7500 -2.0400 -2.13 to -1.95 * 55" in text
    assert "arc acc 0.5000 ± 0.0196 around the value 100" in text
    assert report(run, make_run(tmp_path / "b"), "--out", tmp_path / "both.html") == 0
    text = Page(tmp_path / "both.html").text
    assert "arc acc" in text[: text.index("Curves")]


@pytest.mark.parametrize(
    "name", ["hyperparameters.yaml", "final/run.lock", "final/README.md", "examples.jsonl", "metrics.csv"]
)
@pytest.mark.parametrize("content", [None, b"", b"\xff\x00,{[", b"[1, 2]", b'{"data": 1, "versions": [], "model": 2}'])
def test_damaged_files_are_left_out(name, content, tmp_path):
    run = make_run(tmp_path / "a")
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    assert report(run) == (2 if name == "metrics.csv" else 0)  # without losses it is not a run


def test_half_written_and_not_finite(tmp_path):
    run = make_run(tmp_path / "a")
    shutil.rmtree(run / "final")
    with open(run / "metrics.csv", "a") as f:
        f.write("21,1.05,nan,inf,,,,,,\n22,1.1,1.2e300,,,,,,,\nx,1\n23,1.1,1.2")
    assert report(run) == 0
    page = Page(run / "report.html")
    assert "state failed" in page.text and "3, not in the charts" in page.text
    assert page.lines()["training"][-1][0] == 20 and "rerun" not in page.text


def test_a_run_of_litgpt(tmp_path):
    logs = tmp_path / "a" / "logs" / "csv" / "version_0"
    logs.mkdir(parents=True)
    text = "epoch,iter,learning_rate,loss,step,tokens,total_tokens,val_loss\n0,1,0.01,2.5,1,7,99,\n,,,,1,,,2.25\n"
    (logs / "metrics.csv").write_text(text)
    assert report(tmp_path / "a") == 0
    page = Page(tmp_path / "a" / "report.html")
    assert "tokens 99" in page.text and page.lines()["Learning rate"] == [[1, 0.01]]


def test_where_it_is_written(tmp_path, capsys):
    run, own = make_run(tmp_path / "a"), tmp_path / "own.html"
    own.write_text("mine")
    assert report(run, "--out", own) == 2 and own.read_text() == "mine"
    assert "--out" in capsys.readouterr().err
    assert report(run, "--out", own, "--overwrite", "true") == 0
    for path in (run, run / "final", run):  # its own file is replaced
        assert report(path) == 0
    assert not (run / "final" / "report.html").exists()
    (run / "report.html").write_text("mine")
    assert report(run) == 2 and (run / "report.html").read_text() == "mine"
    for path in (tmp_path / "nothing", tmp_path, own):
        assert report(path) == 2
    assert report(*tmp_path.glob("*"), "--out", own) == 0  # files beside the runs, as in the folder of a sweep
    assert "metrics.csv" in capsys.readouterr().err


def test_a_run_that_starts_over_removes_the_report(tmp_path):
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    assert report(run) == 0
    (other / "report.html").write_text("mine")
    clear(run)
    clear(other)
    assert not (run / "report.html").exists() and (other / "report.html").exists()


# written by the commands that make a run


def recorded(run: Path, questions: bool = False) -> list[dict[str, Any]]:
    """The examples of a run, or the questions for the chat page."""
    lines = [json.loads(line) for line in (run / "examples.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if ("question" in line) == questions]


SHORT = ["--train.max_steps", 2, "--eval.max_new_tokens", 3, "--eval.exact_match", 2, "--eval.interval", 1]


def test_at_the_end_of_a_run(base, rows_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert go("lora", base, rows_file, out, *SHORT, "--eval.examples", 2) == 0
    assert str(out / "report.html") in " ".join(capsys.readouterr().out.split())
    text = Page(out / "report.html").text
    assert "state finished" in text and "in the loss" in text and "steps 2" in text
    found = recorded(out)
    assert [line["step"] for line in found] == [0, 0, 0, 2, 2, 2] and found[2].keys() == {"step", "exact", "rows"}
    assert found[0]["prompt"] == found[3]["prompt"] != found[1]["prompt"]
    questions = [line["question"] for line in recorded(out, questions=True)]
    assert 2 <= len(questions) <= 3 and questions == about.questions(out)
    assert all(text in rows_file.read_text() for text in questions)
    for line in found[:2] + found[3:5]:
        assert all(" ".join(line[name].split()) in text for name in ("prompt", "reference", "answer"))
    assert go("lora", base, rows_file, out, *SHORT, "--overwrite", "true", "--report", "false") == 0
    assert not (out / "report.html").exists()
    assert exit_code("evaluate", out / "final", "--device", "cpu") == 0 and not (out / "report.html").exists()


def test_evaluate_adds_its_scores(base, rows_file, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    assert go("lora", base, rows_file, out, *SHORT) == 0
    before = (out / "report.html").read_bytes()
    for folder in (other, out / "final" / "evaluate"):
        assert (out / "report.html").read_bytes() == before
        assert exit_code("evaluate", out / "final", "--device", "cpu", "--vs", "base", "--out_dir", folder) == 0
    text = Page(out / "report.html").text
    assert "Evaluation of final" in text and "rows exact_match" in text and "report" in capsys.readouterr().out
    own = f"{(out / 'report.html').read_text(encoding='utf-8')} <!-- a note -->"
    (out / "report.html").write_text(own, encoding="utf-8")
    assert exit_code("evaluate", out / "final", "--device", "cpu") == 0
    assert (out / "report.html").read_text(encoding="utf-8") == own and "was changed" in capsys.readouterr().err


def test_of_a_run_that_stops_and_goes_on(base, rows_file, tmp_path):
    out = tmp_path / "out"
    assert go("lora", base, rows_file, out, *SHORT, "--train.pause_after", 1) == 75
    assert "state stopped" in Page(out / "report.html").text
    before = recorded(out)
    assert [line["step"] for line in before] == [0, 0]
    assert go("lora", base, rows_file, out, *SHORT, "--resume", "true", "--report", "false") == 0
    assert recorded(out)[:2] == before and [line["step"] for line in recorded(out)[2:]] == [2, 2]
    assert "state stopped" in Page(out / "report.html").text
    assert go("lora", base, rows_file, out, *SHORT, "--resume", "true", "--train.max_steps", 3) == 0  # it is extended
    assert recorded(out)[:2] == before and [line["step"] for line in recorded(out)[2:]] == [3, 3]
    assert "state finished" in Page(out / "report.html").text


def test_it_never_fails_a_run(base, rows_file, tmp_path, monkeypatch, capsys):
    def fail(*_: Any) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(page, "render", fail)
    monkeypatch.setattr(examples, "write_single", fail)
    assert go("lora", base, rows_file, tmp_path / "out", *SHORT) == 0
    said = capsys.readouterr()
    assert "Cannot write the report" in said.err and "report.html" not in said.out
    assert said.err.count("Cannot write") == 3 and (tmp_path / "out" / "final").is_dir()


def test_envelope_keeps_ends_and_spikes():
    points = [(i, math.sin(i / 50) + 50 * (i == 7777) - 50 * (i == 12345)) for i in range(20_000)]
    kept = envelope(points, 1000)
    assert len(kept) <= 1000 and kept == sorted(kept)
    assert {points[0], points[7777], points[12345], points[-1]} <= {*kept}
    assert envelope(points[:1000], 1000) == points[:1000]


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0, 1),
        (2.1, 2.2),
        (0, 3e-6),
        (-5, 5),
        (0, 9e9),
        (-1e100, 1e100),
        (1e-300, 2e-300),
        (0.1, 999999),
        (1.00001, 1.00005),
    ],
)
def test_ticks(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low <= value <= high for value, _ in found)
    assert len({label for _, label in found}) == len(found)
    assert all(len(label) <= 9 for _, label in found)


@pytest.mark.parametrize("value", [0.0, -2.0, 1e100, 5e-324])
def test_charts_of_one_value(value):
    chart = Chart("x", [Line("x", 0, "training", [(5, value)])])
    (x, y), *more = chart.markers(chart.lines[0])
    assert not more and chart.left < float(x) < chart.right and chart.top < float(y) < chart.bottom
    assert chart.y_ticks and chart.x_ticks


@pytest.mark.long
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scripts", [True, False])
@pytest.mark.parametrize("media", ["light", "dark", "print"])
def test_in_a_browser(width, scripts, media, browser, tmp_path):
    runs = [make_run(tmp_path / f"{HOSTILE[:20]}{i}", lora_r=i, text="x" * 500) for i in range(8)]
    assert report(*runs, "--out", tmp_path / "report.html") == 0
    browser.get_log("performance")
    command = browser.execute_cdp_cmd
    command(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    scheme = {"name": "prefers-color-scheme", "value": "light" if media == "light" else "dark"}
    kind = "print" if media == "print" else "screen"
    command("Emulation.setEmulatedMedia", {"media": kind, "features": [scheme]})
    command("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    browser.get((tmp_path / "report.html").as_uri())
    command("Emulation.setScriptExecutionDisabled", {"value": False})  # the checks below are scripts
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert {url.partition(":")[0] for url in urls} <= {"file", "data"} and sum(u.startswith("file") for u in urls) == 1
    assert not browser.get_log("browser")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert len(browser.find_elements("css selector", "figure polyline")) == 8 * 5
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(22, 25, 29)" if media == "dark" else "rgb(255, 255, 255)")
    tops = [box.rect["y"] for box in browser.find_elements("css selector", ".answers")[0].find_elements("xpath", "*")]
    assert len(tops) == 3 and len({*tops}) == (3 if width == 390 else 1)
    if media == "print":
        height = "return [...document.querySelectorAll('details table')].map(t => t.getBoundingClientRect().height)"
        assert min(browser.execute_script(height)) > 20
    elif scripts:
        move = "const s = document.querySelector('figure svg'), b = s.getBoundingClientRect();"
        move += (
            "s.dispatchEvent(new PointerEvent('pointermove', {clientX: b.left + b.width * 0.975, clientY: b.top + 9}));"
        )
        browser.execute_script(move)
        assert browser.find_element("css selector", "figure output").text.startswith("step 20: ")
