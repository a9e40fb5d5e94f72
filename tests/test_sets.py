"""The data sets under their names: where their rows come from, and what they become."""

import gzip
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import OpenerDirector

import pytest

from litgpt.checkpoint.hub import PICO
from litgpt.data import download
from litgpt.data.data_module import DataModule, RowSource
from litgpt.data.download import fetch, hub_url, unpack
from litgpt.data.forms import recognize, rename, to_row
from litgpt.data.named import FLAN, LIMA, SUBSETS, Alpaca, Alpaca2k, AlpacaGPT4, Deita, Dolly, LongForm, TinyStories
from litgpt.errors import UserError
from litgpt.text.tokenizer import Tokenizer

ALPACA = {"instruction": "Name a fox.", "input": "red", "output": "Reynard"}
TALK = [("user", "Hi"), ("assistant", "Hello"), ("user", "Sing"), ("assistant", "La")]
MESSAGES = [{"role": role, "content": text} for role, text in TALK]
AESLC, COLA = "aeslc_10templates", "cola_10templates"


def pairs(*texts: str) -> list[tuple[str, str]]:
    return [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


# class, options, a file as published and a row in it, and what the row becomes: role and content, or the story
PUBLISHED: list[tuple[Any, dict[str, Any], dict[str, dict], Any]] = [
    (Alpaca, {}, {"alpaca_data_cleaned_archive.json": ALPACA}, pairs("Name a fox.", "Reynard")),
    (AlpacaGPT4, {}, {"alpaca_gpt4_data.json": ALPACA}, pairs("Name a fox.", "Reynard")),
    (Alpaca2k, {}, {"alpaca2k.jsonl": {**ALPACA, "text": "all of it"}}, pairs("Name a fox.", "Reynard")),
    (
        Dolly,
        {},
        {"databricks-dolly-15k.jsonl": {"instruction": "a", "context": "b", "response": "c", "category": "qa"}},
        pairs("a", "c"),
    ),
    (
        LongForm,
        {},
        {name: {"input": "a", "output": "c", "source": "s"} for name in ("train.json", "val.json")},
        pairs("a", "c"),
    ),
    (
        FLAN,
        {"subsets": f"{AESLC}, {COLA}"},
        {f"{s}_{split}.jsonl": {"inputs": "a", "targets": "c"} for split in ("train", "test") for s in (AESLC, COLA)},
        pairs("a", "c"),
    ),
    (
        Deita,
        {},
        {
            f"{name}.json": {"prompt": "Hi", "prompt_id": "1", "messages": MESSAGES}
            for name in ("train_sft", "test_sft")
        },
        TALK[:2],
    ),
    (
        Deita,
        {"include_multiturn_conversations": True},
        {f"{name}.jsonl": {"prompt": "Hi", "messages": MESSAGES} for name in ("train_sft", "test_sft")},
        TALK,
    ),
    (LIMA, {}, {"train.jsonl": {"conversations": [text for _, text in TALK], "source": "s"}}, TALK[:2]),
    (
        LIMA,
        {"include_multiturn_conversations": True},
        {"train.jsonl": {"conversations": [text for _, text in TALK], "source": "s"}},
        TALK,
    ),
    (
        TinyStories,
        {},
        {f"TinyStories_all_data/data0{i}.json": {"story": "Once.", "summary": "s"} for i in range(3)},
        "Once.",
    ),
]
SETS = sorted({cls for cls, *_ in PUBLISHED}, key=lambda cls: cls.__name__)


def write(folder: Path, files: dict[str, dict]) -> None:
    for name, fields in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(fields)
        (folder / name).write_text(f"[{line}]" if name.endswith(".json") else f"{line}\n")


@pytest.mark.parametrize(("cls", "options", "files", "wanted"), PUBLISHED)
def test_files_that_were_put_there_by_hand(tmp_path, monkeypatch, cls, options, files, wanted):
    monkeypatch.setattr(OpenerDirector, "open", None)  # nothing is fetched
    write(tmp_path, files)
    data = cls(download_dir=tmp_path, **options)
    train, val = data.sources()
    assert {str(s.path) for s in [*train, *(val or [])]} == {str(tmp_path / name) for name in files}
    n_val = {TinyStories: 1, FLAN: 2, LongForm: 1, Deita: 1}.get(cls)
    assert val is None if n_val is None else len(val or []) == n_val
    for source in [*train, *(val or [])]:
        rows = list(source.rows())
        assert len(rows) == 1
        assert became(data, source, *rows[0]) == wanted


def became(data: DataModule, source: RowSource, where: str, fields: dict) -> Any:
    adapted = data.adapt(rename(fields, source.columns, where) if source.columns else fields)
    assert adapted is not None
    row = to_row(adapted, source.form or recognize(adapted, where), where)
    assert row is not None
    return row.text or [(m["role"], m["content"]) for m in row.messages]


def test_where_the_validation_rows_are(tmp_path):
    for cls, options, files, _ in PUBLISHED:
        write(tmp_path / cls.__name__, files)
        _, val = cls(download_dir=tmp_path / cls.__name__, **options).sources()
        names = [Path(s.path).name for s in val or []]
        assert names == {
            TinyStories: ["data00.json"],
            FLAN: [f"{AESLC}_test.jsonl", f"{COLA}_test.jsonl"],
            LongForm: ["val.json"],
            Deita: ["test_sft.json"],
        }.get(cls, [])


def test_the_input_stays(tmp_path):
    dolly = Dolly(download_dir=tmp_path).adapt({"instruction": "a", "context": "b", "response": "c"})
    assert dolly == {"instruction": "a", "input": "b", "output": "c"}


def test_rows_without_an_answer_are_left_out(tmp_path):
    for more in (False, True):
        assert LIMA(include_multiturn_conversations=more).adapt({"conversations": ["Only a question?"]}) is None


def test_the_first_exchange_keeps_the_system_message():
    system = {"role": "system", "content": "Be brief."}
    made = Deita().adapt({"messages": [system, *MESSAGES]})
    assert made == {"messages": [system, *MESSAGES[:2]]}


@pytest.mark.parametrize("cls", SETS)
def test_a_row_of_another_form_is_for_the_forms_to_judge(cls):
    for fields in ({"question": "a", "answer": "b"}, {"messages": None, "conversations": 3}):
        assert cls().adapt(fields) == fields


def test_from_the_hub_where_no_file_is(tmp_path):
    assert Alpaca2k(download_dir=tmp_path).sources() == ([RowSource("hf:mhenrichsen/alpaca_2k_test")], None)
    name = "hf:HuggingFaceH4/deita-10k-v0-sft"
    assert Deita(download_dir=tmp_path).sources() == ([RowSource(f"{name}:train_sft")], [RowSource(f"{name}:test_sft")])


def test_options():
    fractions = {cls.__name__: cls().val_split_fraction for cls in SETS}
    own = dict.fromkeys(("Deita", "FLAN", "LongForm", "TinyStories"))
    held = {"Alpaca": 0.03865, "Alpaca2k": 0.05, "AlpacaGPT4": 0.03847, "Dolly": 0.1, "LIMA": 0.1}
    assert fractions == {**own, **held}
    styles = {cls.__name__: cls().prompt_style for cls in SETS if cls is not TinyStories}
    assert styles == {**dict.fromkeys(styles, "alpaca"), "FLAN": "flan", "LongForm": "longform"}
    for cls in SETS:
        data = cls(seed=7, ignore_index=-1, num_workers=0, mask_prompt=True, prompt_style="phi-2")
        assert (data.seed, data.mask_prompt, data.prompt_style) == (7, True, "phi-2")


def test_flan_subsets(tmp_path):
    assert FLAN().subsets == SUBSETS and len(SUBSETS) == len(set(SUBSETS))
    with pytest.raises(UserError, match=r"'aeslc_10template'\. Did you mean 'aeslc_10templates'\?"):
        FLAN(subsets="aeslc_10template,cola_10templates")


def test_the_options_of_litgpt_for_files_and_repositories(tmp_path, monkeypatch):
    """Its defaults mean the published data; other values are used."""
    at = {"download_dir": tmp_path}
    published = Alpaca().train
    ((name, url),) = published.items()
    assert Alpaca(file_url=url, file_name=name).train == published
    assert Alpaca(file_url="https://x.org/a/mine.json?b=1").train == {"mine.json": "https://x.org/a/mine.json?b=1"}
    (tmp_path / "mine.json").write_text(json.dumps([ALPACA]))
    train, _ = AlpacaGPT4(file_name="mine.json", **at).sources()
    assert [source.path for source in train] == [tmp_path / "mine.json"]
    assert Alpaca2k(repo_id="me/alpaca", file_url="x", **at).sources()[0] == [RowSource("hf:me/alpaca")]
    train, val = Deita(repo_id="me/my.deita", **at).sources()
    assert [str(s.path) for s in [*train, *(val or [])]] == ["hf:me/my.deita:train_sft", "hf:me/my.deita:test_sft"]
    assert LIMA(repo_id="me/lima").train == {"train.jsonl": "hub:me/lima/train.jsonl"}
    flan = {"subsets": AESLC}
    assert FLAN(url="https://huggingface.co/datasets/Muennighoff/flan/resolve/main", **flan).train == FLAN(**flan).train
    mine = FLAN(url="https://x.org/flan/", **flan)
    assert mine.train == {f"{AESLC}_train.jsonl": f"https://x.org/flan/train/{AESLC}_train.jsonl"}
    assert TinyStories(data_path=tmp_path).download_dir == tmp_path


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (Alpaca, {"file_url": "file:///etc/passwd"}, "file_url"),
        (Alpaca, {"file_name": "../x.json"}, "file_name"),
        (Deita, {"repo_id": "me/../x/y"}, "repo_id"),
        (FLAN, {"url": "ftp://x"}, "url"),
    ],
)
def test_wrong_files_and_repositories(cls, options, words):
    with pytest.raises(UserError, match=f"--data.{words}"):
        cls(**options)


@pytest.mark.parametrize("cls", [Deita, LIMA])
def test_several_turns_become_pairs_where_the_style_has_none(cls, tmp_path):
    """As in LitGPT. With a chat template, they stay one row."""
    texts = [text for _, text in TALK]
    row = {"messages": MESSAGES} if cls is Deita else {"conversations": [*texts, "and?"]}
    write(tmp_path, {f"{name}.jsonl": row for name in ("train_sft", "test_sft", "train")})
    options: dict[str, Any] = {"download_dir": tmp_path, "val_split_fraction": 0.0 if cls is LIMA else None}
    tokenizer = Tokenizer(PICO)

    def rows(**more: Any) -> list[str]:
        train = cls(**options, **more).load(tokenizer, PICO, 512).train
        return [tokenizer.decode(train.row(i)[0].tolist(), skip_special=False) for i in range(len(train))]

    first, second = rows(include_multiturn_conversations=True)
    assert "Hi\n" in first and "Hello" in first and "Sing" not in first
    assert "Sing\n" in second and "La" in second and "Hello" not in second
    assert len(rows()) == 1
    if cls is Deita:  # LIMA's row ends with a prompt
        (whole,) = rows(include_multiturn_conversations=True, prompt_style="chat")
        assert "Hello" in whole and "La" in whole


# fetching


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, tuple[int, dict[str, str], bytes]], list[tuple[str, str | None]]]]:
    """An address, what is answered there (status, headers, body), and what was asked for (path, Authorization)."""
    answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            status, headers, body = answers.get(self.path, (404, {}, b""))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", answers, asked
    running.shutdown()
    running.server_close()


def refusal(url: str, target: Path, **options: Any) -> str:
    """The message when fetching fails; nothing is left behind, and it is one line with a remedy."""
    with pytest.raises(UserError) as e:
        fetch(url, target, **options)
    text = str(e.value)
    assert "\n" not in text and text.startswith(f"Cannot download {url}: ")
    assert text.endswith(f"Put the file at {target} by hand.")
    assert not target.parent.exists() or not list(target.parent.iterdir())
    return text


def test_fetch(server, tmp_path, capsys):
    address, answers, asked = server
    answers["/rows.json"] = 200, {"Content-Length": "300000"}, b"abc" * 100_000
    target = tmp_path / "new" / "folder" / "rows.json"
    assert fetch(f"{address}/rows.json", target) == target
    assert target.read_bytes() == b"abc" * 100_000
    assert [p.name for p in target.parent.iterdir()] == ["rows.json"]
    assert capsys.readouterr().err == f"litgpt: downloading {address}/rows.json to {target}\n"
    assert fetch(f"{address}/rows.json", target) == target and len(asked) == 1
    assert asked == [("/rows.json", None)]


def test_the_target_is_not_there_before_it_is_whole(server, tmp_path, monkeypatch):
    address, answers, _ = server
    answers["/rows.json"] = 200, {}, b"abc"
    copy, seen = download.shutil.copyfileobj, []

    def watched(source: Any, to: Any, *size: int) -> None:
        copy(source, to, *size)
        seen.append(sorted(p.name for p in tmp_path.iterdir()))

    monkeypatch.setattr(download.shutil, "copyfileobj", watched)
    fetch(f"{address}/rows.json", tmp_path / "rows.json")
    assert len(seen) == 1 and len(seen[0]) == 1 and seen[0][0].endswith(".part")
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_fetch_fails(server, tmp_path, monkeypatch):
    address, answers, _ = server
    answers["/short"] = 200, {"Content-Length": "10"}, b"abc"
    answers["/gated"] = 403, {}, b""
    target = tmp_path / "data" / "rows.json"
    assert "HTTP Error 404: Not Found" in refusal(f"{address}/none", target)
    assert "the connection ended after 3 of 10 bytes" in refusal(f"{address}/short", target)
    assert "403: Forbidden. Ask first. Put the file" in refusal(f"{address}/gated", target, hint="Ask first.")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot download"):
        fetch(f"{address}/none", tmp_path / "file" / "rows.json")

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(download.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{address}/short", target)
    assert not list(target.parent.iterdir())


def test_a_token_goes_to_one_server_only(server, tmp_path):
    address, answers, asked = server
    other = address.replace("127.0.0.1", "localhost")
    answers["/here"] = 302, {"Location": "/there"}, b""
    answers["/there"] = 302, {"Location": f"{other}/elsewhere"}, b""
    answers["/elsewhere"] = 302, {"Location": f"{address}/rows"}, b""
    answers["/rows"] = 200, {}, b"[]"
    fetch(f"{address}/here", tmp_path / "rows.json", token="secret")
    bearer = "Bearer secret"
    assert asked == [("/here", bearer), ("/there", bearer), ("/elsewhere", None), ("/rows", None)]


def test_lima_is_gated(server, tmp_path, monkeypatch):
    address, answers, asked = server
    path = "/datasets/GAIR/lima/resolve/main/train.jsonl"
    monkeypatch.setenv("HF_ENDPOINT", address + "/")
    monkeypatch.setenv("HF_TOKEN", "from-environment")
    answers[path] = 401, {}, b""
    with pytest.raises(UserError) as e:
        LIMA(download_dir=tmp_path, access_token="from-option").sources()
    assert "accept its terms at https://huggingface.co/datasets/GAIR/lima, then set HF_TOKEN" in str(e.value)
    answers[path] = 200, {}, b"{}"
    LIMA(download_dir=tmp_path).sources()
    assert asked == [(path, "Bearer from-option"), (path, "Bearer from-environment")]


@pytest.mark.parametrize("failure", ["no network", "closed port"])
@pytest.mark.parametrize("cls", [cls for cls in SETS if cls not in (Alpaca2k, Deita)])
def test_sets_without_network(tmp_path, monkeypatch, cls, failure):
    closed = "http://127.0.0.1:9"  # nobody listens there
    if failure == "no network":

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise URLError("no network\nhere")

        monkeypatch.setattr(OpenerDirector, "open", refuse)
    else:
        monkeypatch.setenv("HF_ENDPOINT", closed)
        if cls in (Alpaca, AlpacaGPT4, LongForm):
            monkeypatch.setattr(cls, "train", dict.fromkeys(cls.train, closed))
    folder = tmp_path / "data"
    with pytest.raises(UserError) as e:
        cls(download_dir=folder).sources()
    text = str(e.value)
    assert ("no network here. " if failure == "no network" else "refused. ") in text and "\n" not in text
    assert f"Put the file at {folder}/" in text and text.endswith(" by hand.")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_hub_url(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert hub_url("a/b", "c/d.jsonl") == "https://huggingface.co/datasets/a/b/resolve/main/c/d.jsonl"


# archives


def tar(path: Path, *members: tuple[str, bytes | None]) -> Path:
    """A compressed archive; a member without bytes is a link to /etc/passwd."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.size = len(content or b"")
            archive.addfile(info, io.BytesIO(content or b""))
    return path


def test_tinystories_are_fetched_and_unpacked(server, tmp_path, monkeypatch):
    address, answers, asked = server
    story = json.dumps([{"story": "Once."}]).encode()
    names = [f"./data0{i}.json" for i in range(3)]
    archive = tar(tmp_path / "archive", *[(name, story) for name in names], ("./._data00.json", b"\0"), ("link", None))
    answers["/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"] = 200, {}, archive.read_bytes()
    monkeypatch.setenv("HF_ENDPOINT", address)
    for _ in range(2):
        train, val = TinyStories(download_dir=tmp_path / "stories").sources()
        assert [Path(s.path).name for s in train] == ["data01.json", "data02.json"]
        assert [Path(s.path).name for s in val or []] == ["data00.json"]
        assert [fields for _, fields in train[0].rows()] == [{"story": "Once."}]
    assert len(asked) == 1
    folder = tmp_path / "stories" / "TinyStories_all_data"
    assert sorted(p.name for p in folder.iterdir()) == ["._data00.json", "data00.json", "data01.json", "data02.json"]


def test_one_file_is_too_few(tmp_path):
    write(tmp_path, {"TinyStories_all_data/data00.json": {"story": "Once."}})
    with pytest.raises(UserError, match="has 1 files"):
        TinyStories(download_dir=tmp_path).sources()


@pytest.mark.parametrize("name", ["../evil.json", "{outside}/evil.json", "a/../../evil.json"])
def test_an_archive_cannot_write_elsewhere(tmp_path, name):
    archive = tar(tmp_path / "a.tar.gz", ("good.json", b"[]"), (name.format(outside=tmp_path), b"[]"))
    with pytest.raises(UserError, match="is not safe"):
        unpack(archive, tmp_path / "inside" / "folder")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [archive]


def test_a_broken_archive(tmp_path):
    whole = tar(tmp_path / "whole.tar.gz", ("a.json", bytes(range(256)) * 400))
    plain = gzip.decompress(whole.read_bytes())
    for content in (b"no archive", whole.read_bytes()[:-300], gzip.compress(plain[:50_000]), b""):
        archive = tmp_path / "broken.tar.gz"
        archive.write_bytes(content)
        with pytest.raises(UserError, match=r"^Cannot unpack .* Remove the file to download it again\.$"):
            unpack(archive, tmp_path / "folder")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.tar.gz", "whole.tar.gz"]
