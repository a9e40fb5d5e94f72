# ruff: noqa: E402 - without the packages the module is skipped before the imports that need them
"""`litgpt serve` of an adapter: its name, its base beside it, and what the server prints when it starts."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from litgpt.__main__ import main
from litgpt.checkpoint.hub import PICO, display_name
from litgpt.commands.serve import introduction
from litgpt.errors import UserError
from litgpt.generate.engine import generate
from litgpt.generate.inference_model import InferenceModel
from litgpt.methods.adapter import LLaMAAdapter
from litgpt.methods.adapter_folder import write_adapter
from litgpt.methods.lora import LoRA
from litgpt.serve.models import ModelRegistry
from litgpt.serve.settings import Settings
from tests.servers import Running, in_thread
from tests.test_lora import save, with_lora

LORAS = {"support": LoRA(r=4, alpha=32), "doves": LoRA(r=2, alpha=16, mlp=True, variant="dora")}
QUESTIONS = ["What is five plus six?", "Tell me a story.", "Hello!"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folders of two runs on pico."""
    root = tmp_path_factory.mktemp("out")
    for seed, (name, lora) in enumerate(LORAS.items()):
        (root / name).mkdir()
        save(with_lora(PICO, lora, seed), lora, PICO, root / name / "final")
    return root


def greedy(folder: Path, question: str, **options: Any) -> str:
    """What the model of a folder answers alone."""
    loaded = InferenceModel.open(folder, **{"precision": "32-true", **options})
    ids = loaded.render([{"role": "user", "content": question}])[1]
    return loaded.tokenizer.decode(list(generate(loaded.model, ids, 20, stop_ids=loaded.stop_ids))).lstrip()


@pytest.fixture(scope="module", params=LORAS)
def running(request: pytest.FixtureRequest, out: Path) -> Iterator[tuple[str, Running]]:
    with in_thread(out / request.param / "final") as made:
        yield request.param, made


def ask(running: Running, question: str, **fields: Any) -> Any:
    client = openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0)
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(messages=messages, temperature=0, max_tokens=20, **fields)


def test_adapter_and_base_in_one_batch(running, out):
    name, server = running
    listed = httpx.get(server.url + "/v1/models").json()["data"]
    assert [model["id"] for model in listed] == [name, "pico"]
    jobs = [(question, model) for question in QUESTIONS for model in (name, "pico")] * 2
    alone = {
        (q, m): greedy(PICO if m == "pico" else out / name / "final", q) for q in QUESTIONS for m in (name, "pico")
    }
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: ask(server, job[0], model=job[1]), jobs))
    assert [a.choices[0].message.content.lstrip() for a in answers] == [alone[job] for job in jobs]
    assert [a.model for a in answers] == [model for _, model in jobs]
    assert len(set(alone.values())) == len(alone), "the adapter makes a difference"
    fields = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1}
    assert httpx.post(server.url + "/v1/chat/completions", json=fields).json()["model"] == name, "the default"


@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
def test_one_base_in_memory(out, quantize):
    registry = ModelRegistry.open(out / "support" / "final", {}, precision="32-true", quantize=quantize)
    alone = InferenceModel.open(out / "support" / "final", precision="32-true", quantize=quantize)
    models = {id(model.model) for model in registry.models.values()}
    assert len(models) == 1 and n_bytes(registry.models["support"].model) <= n_bytes(alone.model)


def n_bytes(model: Any) -> int:
    tensors = {t.data_ptr() if not t.is_mkldnn else id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def test_a_base_in_4_bits(out):
    registry = ModelRegistry.open(out / "support" / "final", {}, precision="32-true", quantize="bnb.nf4")
    with in_thread(out / "support" / "final", registry=registry) as server:
        for question in QUESTIONS:
            for name, folder in (("support", out / "support" / "final"), ("pico", PICO)):
                answer = ask(server, question, model=name).choices[0].message.content.lstrip()
                assert answer == greedy(folder, question, quantize="bnb.nf4")


def test_more_adapters_beside_an_adapter(out):
    registry = ModelRegistry.open(
        out / "support" / "final", {"birds": out / "doves" / "final"}, "helper", precision="32-true"
    )
    assert list(registry.models) == ["helper", "birds", "pico"] and registry.base == "pico"
    for name in ("helper", "support", "final", str(out / "support" / "final")):
        assert registry.find(name) == "helper" or name == "final"  # of two


def test_a_run_with_the_name_of_its_base(out, tmp_path):
    shutil.copytree(out / "support", tmp_path / "pico")
    registry = ModelRegistry.open(tmp_path / "pico" / "final", {}, precision="32-true")
    assert list(registry.models) == ["pico", "pico-base"]
    assert registry.adapter("pico") == "pico" and registry.adapter("pico-base") is None


def test_other_results_have_one_name(out, tmp_path, capsys):
    shutil.copytree(PICO, tmp_path / "full" / "final")
    assert list(ModelRegistry.open(tmp_path / "full" / "final", {}).models) == ["full"]
    main(["merge_lora", str(out / "support" / "final"), "--out_dir", str(tmp_path / "support" / "final-merged")])
    assert list(ModelRegistry.open(tmp_path / "support" / "final-merged", {}).models) == ["support"]
    model = InferenceModel.open(PICO, precision="32-true").model
    adapter = LLaMAAdapter(prompt_length=3, start_layer=1)
    adapter.apply(model)
    folder = tmp_path / "prefix" / "final"
    folder.mkdir(parents=True)
    write_adapter(adapter, model, str(PICO), folder)
    capsys.readouterr()
    assert list(ModelRegistry.open(folder, {}).models) == ["prefix"]
    assert "prefix is served without its base" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot share its base"):
        ModelRegistry.open(folder, {"a": out / "doves" / "final"})


@pytest.mark.parametrize(("option", "value"), [("--name", ""), ("--name", "a\nb"), ("--adapters", "support=x")])
def test_names_that_cannot_be(out, option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["serve", str(out / "support" / "final"), option, value, "--port", "0"])
    assert stop.value.code == 2 and option in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("out/support/final", "support"),
        ("out/support/best", "support"),
        ("out/support/final-merged", "support"),
        ("out/support/step-000012", "support-step-000012"),
        ("out/support", "support"),
        ("checkpoints/org/Model-1B", "Model-1B"),
        ("out/Ünï cödé/final", "Ünï cödé"),
        ("/final", "final"),
    ],
)
def test_names_of_folders(path, name):
    assert display_name(Path(path)) == name


def test_what_is_printed_works(out, monkeypatch):
    """The addresses, and the request in a shell."""
    monkeypatch.setenv("LITGPT_API_KEY", "secret")
    with in_thread(out / "support" / "final", api_key="secret") as server:
        port = int(server.url.rpartition(":")[2])
        models = server.service.registry.models
        text = introduction("127.0.0.1", port, Settings(api_key="secret"), models)
        assert "secret" not in text and f"models  {', '.join(models)}" in text
        chat, api = (re.search(rf"{word} +(http\S+)", text)[1] for word in ("chat", "API"))  # type: ignore[index]
        assert "<!doctype html>" in httpx.get(chat).text
        client = openai.OpenAI(base_url=api, api_key="secret", max_retries=0)
        assert [model.id for model in client.models.list()] == list(models)
        if shutil.which("curl"):
            done = subprocess.run(text[text.index("curl") :], shell=True, capture_output=True, timeout=60)
            assert json.loads(done.stdout)["model"] == "support"


@pytest.mark.parametrize(
    ("host", "url"), [("0.0.0.0", "http://127.0.0.1:1"), ("::", "http://[::1]:1"), ("::1", "http://[::1]:1")]
)
def test_addresses(host, url):
    text = introduction(host, 1, Settings(host=host, allow_anonymous=True), ["it's"])
    assert f"chat    {url}\n" in text and ("other machines" in text) == (host != "::1")
    assert "Authorization" not in text
