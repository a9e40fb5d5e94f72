# ruff: noqa: E402 - without the packages the module is skipped before the imports that need them
"""`litgpt serve` as the official client sees it: OpenAI's interface, LitGPT's, several adapters."""

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from fastapi.testclient import TestClient

from litgpt.__main__ import main
from litgpt.checkpoint.hub import PICO
from litgpt.generate.engine import generate
from litgpt.generate.inference_model import InferenceModel
from litgpt.methods.lora import LoRA
from litgpt.serve.models import ModelRegistry
from litgpt.text.prompts import checkpoint_template
from tests.servers import Running, in_thread
from tests.test_lora import save, with_lora

KINDS = {"one": LoRA(r=4, alpha=32), "two": LoRA(r=2, alpha=64, mlp=True, projection=True)}
QUESTIONS = ["What is five plus six?", "Tell me a story.", "Hello!", "Where is the cat?", "Name a colour."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save(with_lora(PICO, lora, seed), lora, PICO, root / name)
        for seed, (name, lora) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="module")
def running(folders: dict[str, Path]) -> Iterator[Running]:
    with in_thread(PICO, folders) as made:
        yield made


@pytest.fixture
def client(running: Running) -> Any:
    return openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0)


def said(client: Any, question: str, model: str = "pico", **options: Any) -> str:
    messages = [{"role": "user", "content": question}]
    options = {"temperature": 0, "max_tokens": 30, **options}
    return client.chat.completions.create(model=model, messages=messages, **options).choices[0].message.content


def test_greedy_answers_are_those_of_generate(client, capsys):
    capsys.readouterr()
    for question in QUESTIONS[:2]:
        main(
            [
                "generate",
                str(PICO),
                "--prompt",
                question,
                "--temperature",
                "0",
                "--max_new_tokens",
                "30",
                "--precision",
                "32-true",
            ]
        )
        answer = said(client, question)
        assert answer and capsys.readouterr().out == f"{answer}\n"


def test_sixteen_clients_get_what_they_get_alone(client, running, folders):
    names = ["pico", *KINDS]
    alone = {
        name: InferenceModel.open(folder, precision="32-true") for name, folder in [("pico", PICO), *folders.items()]
    }
    jobs = [(QUESTIONS[i % 5], names[i % 3]) for i in range(16)]
    expected = []
    for question, name in jobs:
        loaded = alone[name]
        prompt = loaded.render([{"role": "user", "content": question}])[1]
        ids = list(generate(loaded.model, prompt, 30, stop_ids=loaded.stop_ids))
        expected.append(loaded.tokenizer.decode(ids).lstrip())
    with ThreadPoolExecutor(16) as pool:
        got = [answer.lstrip() for answer in pool.map(lambda job: said(client, *job), jobs)]
    assert got == expected
    assert len({said(client, QUESTIONS[0], name) for name in names}) == 3
    assert [m.id for m in client.models.list()] == names and client.models.retrieve("two").id == "two"


def test_an_answer_is_continued(client):
    question = {"role": "user", "content": QUESTIONS[1]}

    def answer(*messages: Any, limit: int = 30, **body: Any) -> str:
        options: dict = dict(model="pico", messages=[question, *messages], temperature=0, max_tokens=limit)
        return client.chat.completions.create(**options, extra_body=body).choices[0].message.content

    whole, begun = answer(), answer(limit=6)
    assert len(begun) < len(whole)
    message = {"role": "assistant", "content": begun}
    assert begun + answer(message, limit=24, continue_final_message=True) == whole
    for wrong in ([], [message, question]):
        with pytest.raises(openai.BadRequestError, match="continue_final_message"):
            answer(*wrong, continue_final_message=True)


def test_streaming(client):
    messages = [{"role": "user", "content": QUESTIONS[1]}]
    options: dict = dict(model="pico", messages=messages, temperature=0, max_tokens=30)
    whole = client.chat.completions.create(**options)
    parts = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert parts[0].choices[0].delta.role == "assistant" and parts[0].choices[0].delta.content == ""
    assert "".join(p.choices[0].delta.content or "" for p in parts[:-1]) == whole.choices[0].message.content
    assert [p.choices[0].finish_reason for p in parts[:-1]].count(whole.choices[0].finish_reason) == 1
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage
    assert len({p.id for p in parts}) == 1 and len(parts) > 10
    assert all(p.usage is None for p in parts[:-1])


def test_stop_strings_and_length(client):
    story = said(client, QUESTIONS[1], max_tokens=60)
    word = story.split()[3]
    for stop in (word, ["never said", word]):
        answer = client.chat.completions.create(
            model="pico", messages=[{"role": "user", "content": QUESTIONS[1]}], temperature=0, max_tokens=60, stop=stop
        )
        assert answer.choices[0].message.content == story[: story.index(word)]
        assert answer.choices[0].finish_reason == "stop"
    short = client.chat.completions.create(
        model="pico", messages=[{"role": "user", "content": QUESTIONS[1]}], temperature=0, max_completion_tokens=3
    )
    assert short.usage.completion_tokens == 3 and short.choices[0].finish_reason == "length"
    assert story.startswith(short.choices[0].message.content)


def test_several_answers_and_seeds(client):
    def draw(**options: Any) -> list[str]:
        made = client.chat.completions.create(
            model="pico",
            messages=[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}],
            temperature=1.0,
            max_tokens=12,
            **options,
        )
        assert [c.index for c in made.choices] == list(range(options.get("n", 1)))
        return [c.message.content for c in made.choices]

    three = draw(n=3, seed=7)
    assert len(set(three)) == 3 and draw(n=3, seed=7) == three and draw(seed=8) == three[1:2]
    assert draw() != draw() or draw() != draw()


def test_logprobs(client):
    options: dict = dict(model="pico", temperature=0, max_tokens=8)
    chat = client.chat.completions.create(
        **options, messages=[{"role": "user", "content": "Hello!"}], logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == chat.usage.completion_tokens and all(len(t.top_logprobs) == 3 for t in content)
    assert all(t.logprob == t.top_logprobs[0].logprob <= 0 and t.token == t.top_logprobs[0].token for t in content)
    assert bytes(b for t in content for b in t.bytes).decode().strip() == chat.choices[0].message.content.strip()
    plain = client.completions.create(**options, prompt="Once upon a time", logprobs=2)
    about = plain.choices[0].logprobs
    assert len(about.tokens) == len(about.token_logprobs) == plain.usage.completion_tokens
    assert all(len(top) == 2 and max(top.values()) == own for top, own in zip(about.top_logprobs, about.token_logprobs))


def test_completions(client):
    loaded = InferenceModel.open(PICO, precision="32-true")
    prompts = ["Once upon a time", "The cat"]
    ids = [loaded.tokenizer.encode(p) for p in prompts]
    options: dict = dict(model="pico", temperature=0, max_tokens=10)
    texts = client.completions.create(**options, prompt=prompts, n=2)
    by_ids = client.completions.create(**options, prompt=ids, n=2)
    assert [c.text for c in texts.choices] == [c.text for c in by_ids.choices]
    expected = [list(generate(loaded.model, i, 10, stop_ids=loaded.stop_ids)) for i in ids]
    assert [c.text.strip() for c in texts.choices][::2] == [loaded.tokenizer.decode(e).strip() for e in expected]
    parts = client.completions.create(**options, prompt=prompts[1], stream=True)
    assert "".join(p.choices[0].text for p in parts) == texts.choices[2].text


def test_tools_and_parts_reach_the_template(client, running, monkeypatch):
    seen = []
    original = InferenceModel.render
    monkeypatch.setattr(InferenceModel, "render", lambda self, *a: seen.append(a[:2]) or original(self, *a))
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Add "}, {"type": "text", "text": "1."}]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    client.chat.completions.create(model="pico", messages=messages, tools=[tool], max_tokens=1)
    client.chat.completions.create(model="pico", messages=messages, tools=[tool], tool_choice="none", max_tokens=1)
    (given, tools), (_, none) = seen
    assert tools == [tool] and none is None
    assert given[0] == {"role": "system", "content": "Be brief."} and given[1] == {"role": "user", "content": "Add 1."}
    assert given[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert given[3] == {"role": "tool", "content": "2", "tool_call_id": "c1"}


WEATHER = {"name": "weather", "arguments": '{"city": "Łódź", "days": null}'}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def returned(**fields: Any) -> dict[str, Any]:
    """A message as the client returns it."""
    message = openai.types.chat.ChatCompletionMessage(role="assistant", **fields).model_dump()
    assert message["refusal"] is None and message["audio"] is None  # and more of these
    return message


def call(**more: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": WEATHER, **more}


ASK = {"role": "user", "content": "Is it warm?"}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "20 degrees"}
HISTORIES: dict[str, tuple[list[dict[str, Any]], bool]] = {  # and whether there are tools in it
    "an answer": ([ASK, returned(content="Yes."), ASK], False),
    "nothing said": ([ASK, returned(content=None), ASK], False),
    "a call": ([ASK, returned(content=None, tool_calls=[call()]), RESULT], True),
    "a call with words": ([ASK, returned(content="Let me see.", tool_calls=[call()]), RESULT], True),
    "a call from a stream": ([ASK, returned(content=None, tool_calls=[call(index=0)]), RESULT], True),
    "no calls": ([ASK, returned(content="Yes.", tool_calls=[]), ASK], False),
    "reasoning": ([ASK, returned(content="Yes.", reasoning="20 is warm.", reasoning_content=None), ASK], False),
    "thinking": ([ASK, returned(content="Yes.", thinking="20 is warm."), ASK], False),
    "names": ([{**ASK, "name": "Ann"}, returned(content="Yes.", name="Bob"), ASK], False),
}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The messages of each request, as they reach the template."""
    found: list[Any] = []
    original = InferenceModel.render
    monkeypatch.setattr(InferenceModel, "render", lambda self, *a: found.append(a[0]) or original(self, *a))
    return found


@pytest.mark.parametrize("name", HISTORIES)
def test_what_a_client_returns_is_taken_back(client, seen, name):
    """What a message holds reaches the template, null nowhere, and what a client cannot mean is left out."""
    messages, _ = HISTORIES[name]
    given = [{**m, "input": "x", "train": False} for m in messages]
    client.chat.completions.create(model="pico", messages=given, max_tokens=1, tools=TOOLS)
    for sent, got in zip(messages, seen[0]):
        expected = {k: v for k, v in sent.items() if v is not None and v != []}
        assert got == {**expected, "content": sent["content"] or ""}


@pytest.mark.parametrize("name", HISTORIES)
@pytest.mark.parametrize("template", ["llama-2", "llama-3-8b-instruct", "minimind", "phi-3", "qwen2.5", "smollm2"])
def test_every_template_takes_it(client, running, real_data, monkeypatch, name, template):
    """The text is that of `transformers`, and refused is only what it refuses too."""
    from transformers import AutoTokenizer

    texts, original = [], InferenceModel.render
    monkeypatch.setattr(InferenceModel, "render", lambda self, *a: texts.append(original(self, *a)) or texts[-1])
    folder = real_data / "tokenizers" / template
    monkeypatch.setattr(running.service.registry.models["pico"], "style", checkpoint_template(folder))
    messages, with_tools = HISTORIES[name]
    options: dict[str, Any] = {"tools": TOOLS} if with_tools else {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    clean = [{k: v for k, v in m.items() if v is not None and v != []} for m in messages]
    for message in clean:
        message.setdefault("content", "")
    try:
        expected = tokenizer.apply_chat_template(clean, tokenize=False, add_generation_prompt=True, **options)
    except Exception as e:
        with pytest.raises(openai.BadRequestError) as refusal:
            client.chat.completions.create(model="pico", messages=messages, max_tokens=1, **options)
        assert str(e) in refusal.value.message
        return
    try:
        client.chat.completions.create(model="pico", messages=messages, max_tokens=1, **options)
    except openai.BadRequestError as e:  # of the tiny model's context
        assert e.code == "context_length_exceeded"
    if not with_tools:  # how arguments are written is up to the template's side
        assert texts[0][0] == expected


def test_what_is_no_message(client):
    for wrong in ({"role": "user", "content": None}, {"role": "tool", "content": None, "tool_call_id": "c"}):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(model="pico", messages=[ASK, wrong], max_tokens=1)
        assert error.value.param == "messages.1"


def test_what_is_wrong_is_said(client):
    def refused(**options: Any) -> Any:
        options = {"model": "pico", "messages": [{"role": "user", "content": "Hi"}], **options}
        with pytest.raises(openai.APIStatusError) as error:
            client.chat.completions.create(**options)
        assert error.value.body.keys() == {"message", "type", "param", "code"}
        return error.value

    wrong = refused(model="pica")
    assert isinstance(wrong, openai.NotFoundError) and wrong.code == "model_not_found" and "'pico'" in wrong.message
    cases: list[tuple[dict, str]] = [
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 81 + 1}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"extra_body": {"heat": 1}}, "heat"),
    ]
    for options, param in cases:
        error = refused(**options)
        assert isinstance(error, openai.BadRequestError) and error.param == param, options
    assert "frequency_penalty" in refused(frequency_penalty=1).message
    assert refused(messages=[{"role": "user", "content": "so " * 400}]).code == "context_length_exceeded"


def test_litgpts_own_form(running, client):
    whole = httpx.post(running.url + "/predict", json={"prompt": QUESTIONS[1], "temperature": 0}).json()
    assert whole == {"output": said(client, QUESTIONS[1], max_tokens=None)}
    with httpx.stream(
        "POST", running.url + "/predict", json={"prompt": QUESTIONS[1], "temperature": 0, "stream": True}
    ) as r:
        pieces = [json.loads(line)["output"] for line in r.iter_lines()]
    assert len(pieces) > 3 and "".join(pieces) == whole["output"]
    short = {"prompt": QUESTIONS[1], "max_new_tokens": 2}
    assert httpx.post(running.url + "/predict", json=short).json()["finish_reason"] == "length"
    assert httpx.post(running.url + "/predict", json={**short, "n": 2}).json()["finish_reason"] == ["length"] * 2
    lines = httpx.post(running.url + "/predict", json={**short, "stream": True}).text.splitlines()
    assert json.loads(lines[-1])["finish_reason"] == "length"


def test_figures(running, client):
    before = running.figure("litgpt_tokens_total")
    answer = client.completions.create(model="pico", prompt="The cat", max_tokens=4, temperature=0)
    running.wait_idle()
    assert running.figure("litgpt_tokens_total") == before + answer.usage.total_tokens
    text = httpx.get(running.url + "/metrics").text
    assert 'litgpt_requests_total{path="/v1/completions",status="200"}' in text
    assert httpx.get(running.url + "/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "--api_key"),
        (["--devices", "2"], "--devices 2"),
        (["--generate_strategy", "sequential"], "--generate_strategy sequential"),
        (["--port", "70000"], "--port 70000"),
        (["--port", "-1"], "--port -1"),
        (["--max_queue", "-1", "--max_batch", "0"], "--max_batch 0 must be above 0; --max_queue -1"),
        (["--api_key", " "], "--api_key"),
        (["--adapters", "pico=x"], "--adapters pico: the first model has this name"),
        (["--adapters", "a=nowhere", "b=x"], "No model folder 'nowhere'"),
    ],
)
def test_options_that_cannot_be(words, message, capsys, monkeypatch):
    monkeypatch.delenv("LITGPT_API_KEY", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["serve", str(PICO), *words, *(["--port", "0"] if "--port" not in words else [])])
    assert stop.value.code == 2 and message in capsys.readouterr().err


REFUSED_PATHS = [
    "",
    "/",
    "//",
    "predict",
    "/health",
    "/health/",
    "/metrics",
    "/v1",
    "/v1/",
    "/v1/x",
    "/page",
    "/page/x",
    "/openapi.json",
    "/a b",
    "/a?b",
    "/a#b",
    "/..",
    "/a/../b",
    "/./a",
    "/a//b",
    "/a//",
    "//a",
    "/a%20b",
    "/%",
    "/{x}",
    "/a\\b",
    "/a\n",
    "/a\0",
    "/\udcff",
    " /a",
    "http://x/a",
    "*",
]
PATHS = [
    "/predict",
    "/predict/",
    "/a/b",
    "/docs",
    "/v1x",
    "/x/v1",
    "/health/x",
    "/a.b",
    "/...",
    "/prédire",
    "/a:b;c=d@e!",
    "/龘",
    "/HEALTH",
]


@pytest.mark.parametrize("path", REFUSED_PATHS)
def test_paths_that_cannot_work(path, capsys, monkeypatch):
    monkeypatch.setattr("litgpt.serve.server.serve", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        main(["serve", str(PICO), "--port", "0", f"--api_path={path}"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and f"--api_path {path!r}" in err and err.count("\n") == 1


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_work(path, monkeypatch):
    """From the command line to an answer, as clients write them, and with a slash at the end."""
    monkeypatch.delenv("LITGPT_API_KEY", raising=False)
    made = []
    monkeypatch.setattr("litgpt.serve.server.serve", lambda app, *_: made.append(app))
    main(["serve", str(PICO), "--port", "0", "--api_path", path])
    with TestClient(made[0].guard, base_url="http://localhost") as client:
        for url in {path, path.rstrip("/"), path.rstrip("/") + "/"}:
            answer = client.post(url, json={"prompt": "Hi", "max_tokens": 1})
            assert answer.status_code == 200 and "output" in answer.json(), url
        assert client.get("/health").json() == {"status": "ok"} and client.get("/v1/models").status_code == 200


NAMES = [
    'a"b',
    "a\\b",
    "a\nb",
    "a\\nb",
    '\\"\n',
    "a{b}",
    "é龘😀",
    " a ",
    "a\tb\rc",
    "\u2028",
    "<img>",
    "a/b",
    "%s",
    "x" * 300,
]


def test_names_in_figures(running, monkeypatch):
    """Read as the text format of Prometheus is defined: a value ends at the first quote without a backslash."""
    counts = running.service.metrics.tokens
    monkeypatch.setattr(running.service.metrics, "tokens", type(counts)({(name, "answer"): 7 for name in NAMES}))
    content = httpx.get(running.url + "/metrics").content.decode()
    found = []
    for line in content.split("\n"):
        if line.startswith("litgpt_tokens_total{"):
            value = r'"((?:[^"\\\n]|\\["\\n])*)"'
            match = re.fullmatch(rf"litgpt_tokens_total\{{model={value},kind={value}\}} 7", line)
            assert match, line
            found.append(re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], match[1]))
    assert sorted(found) == sorted(NAMES)


@pytest.mark.parametrize("name", ["", "a\udcffb"])
def test_names_that_no_request_can_give(name, folders, capsys, monkeypatch):
    monkeypatch.setattr("litgpt.serve.server.serve", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        main(["serve", str(PICO), "--port", "0", "--adapters", json.dumps({name: str(folders["one"])})])
    assert stop.value.code == 2 and "--adapters" in capsys.readouterr().err


def test_what_bodies_may_hold_is_described(client, running):
    described = httpx.get(running.url + "/openapi.json").json()
    for path, name in (("/v1/chat/completions", "Chat"), ("/v1/completions", "Completion"), ("/predict", "Predict")):
        schema = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": f"#/components/schemas/{name}"}
    text = json.dumps(described)
    for name in re.findall(r'"\$ref": "#/components/schemas/(\w+)"', text):
        assert "properties" in described["components"]["schemas"][name]
    assert text.count("$ref") == text.count("#/components/schemas/") > 5


def test_adapters_are_given_as_pairs(settings):
    expected = {"a": "x/y", "b": "z=1"}
    for words in (["--adapters", "a=x/y", "b=z=1", "pico"], ["pico", "--adapters", json.dumps(expected)]):
        got = settings("serve", *words)
        assert got["adapters"] == expected and got["checkpoint_dir"] == "pico"


def test_variables_of_the_template(tmp_path):
    """A request overrides what the command line says, as `chat_template_kwargs`."""
    folder = shutil.copytree(PICO, tmp_path / "styled")
    template = "{% if loud %}LOUD LOUD LOUD {% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)

    def n_prompt(running: Running, **fields: Any) -> int:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, **fields}
        answer = httpx.post(running.url + "/v1/chat/completions", json=body)
        return answer.json()["usage"]["prompt_tokens"] if answer.status_code == 200 else -answer.status_code

    with in_thread(folder) as running:
        plain = n_prompt(running)
        loud = n_prompt(running, chat_template_kwargs={"loud": True})
        assert plain < loud and n_prompt(running, chat_template_kwargs={"loud": False}) == plain
        for wrong in ({"messages": []}, {"not a name": 1}, {"tools": [1]}, [1], "x"):
            assert n_prompt(running, chat_template_kwargs=wrong) == -400
    registry = ModelRegistry.open(folder, {}, precision="32-true", template_kwargs={"loud": True})
    (model,) = registry.models.values()
    assert len(model.render([{"role": "user", "content": "Hi"}])[1]) == loud
    assert len(model.render([{"role": "user", "content": "Hi"}], variables={"loud": False})[1]) == plain
