# ruff: noqa: E402 - without the packages the module is skipped before the imports that need them
"""The names that a request may give to a model of `litgpt serve`."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from litgpt.checkpoint.hub import PICO
from litgpt.methods.lora import LoRA
from litgpt.serve.models import ModelRegistry
from tests.servers import Running, in_thread
from tests.test_lora import save, with_lora

HUB, NAME = "meta-llama/Llama-3.2-1B", "Llama-3.2-1B"
FOLDER = f"checkpoints/{HUB}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of the hub, and two adapters whose folders have the same name. Read only."""
    root = tmp_path_factory.mktemp("place")
    shutil.copytree(PICO, root / FOLDER)
    lora = LoRA(r=2, alpha=4)
    for run in ("math", "law"):
        (root / "out" / run).mkdir(parents=True)
        save(with_lora(PICO, lora), lora, root / FOLDER, root / "out" / run / "final")
    return root


ALONE: list[tuple[str, list[str], list[str]]] = [  # typed; names that mean it; names that mean nothing
    (FOLDER, [NAME, HUB, FOLDER, f"./{FOLDER}", f"{FOLDER}/", HUB.lower(), NAME.upper()], ["Llama-3.2", "", "."]),
    (f"./{FOLDER}/", [NAME, HUB, FOLDER, f"./{FOLDER}/"], ["meta-llama", f"other/{NAME}"]),
    (HUB, [NAME, HUB, HUB.upper()], [f"x/{HUB}"]),
    ("meta-llama/llama-3.2-1b", [NAME, HUB, "meta-llama/llama-3.2-1b"], []),
    ("pico", ["pico", "PICO"], ["litgpt"]),
    ("out/math/final", ["math", "final", "out/math/final", "Final"], ["law", "out/law/final"]),
    ("out/math/final/adapter_model.safetensors", ["math", "final", "out/math/final/adapter_model.safetensors"], []),
]


@pytest.mark.parametrize(("typed", "names", "others"), ALONE, ids=[typed for typed, _, _ in ALONE])
def test_a_model(place, monkeypatch, typed, names, others):
    monkeypatch.chdir(place)
    registry = ModelRegistry.open(Path(typed), {}, precision="32-true")
    served, *base = registry.models
    assert base == ([NAME] if registry.models[served].source.adapter is not None else [])
    assert [registry.find(name) for name in names] == [served] * len(names)
    assert [registry.find(name) for name in others] == [None] * len(others)


def test_an_absolute_path(place):
    registry = ModelRegistry.open(place / FOLDER, {}, precision="32-true")
    assert registry.find(str(place / FOLDER)) == registry.find(HUB) == NAME


ADAPTERS: dict[str, Any] = {  # name, and the model that it means
    NAME: NAME,
    HUB: NAME,
    "Math": "Math",
    "math": "math",
    "MATH": None,  # of two
    "out/math/final": "math",
    "./out/math/final/": "math",
    "OUT/LAW/FINAL": "Math",
    "final": None,  # of two
    "LLAMA": "llama",
    "out/other": None,
}


@pytest.fixture(scope="module")
def running(place: Path) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        paths = {"math": Path("out/math/final"), "Math": Path("out/law/final"), "llama": place / "out/law/final"}
        with in_thread(Path(FOLDER), paths) as made:
            yield made


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_route(running, name):
    client = openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0)
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    routes = [
        lambda: client.models.retrieve(name).id,
        lambda: client.chat.completions.create(model=name, **chat).model,
        lambda: client.completions.create(model=name, prompt="Hi", max_tokens=1).model,
    ]
    predict = httpx.post(running.url + "/predict", json={"prompt": "Hi", "model": name, "max_tokens": 1})
    if ADAPTERS[name] is not None:
        assert [route() for route in routes] == [ADAPTERS[name]] * 3 and predict.status_code == 200
        return
    for route in routes:
        with pytest.raises(openai.NotFoundError) as error:
            route()
        assert all(known in error.value.message for known in (NAME, "math", "Math", "llama"))
    assert predict.status_code == 404


def test_the_list_has_each_model_once(running):
    for path in ("/v1/models", "/v1/models/"):
        listed = httpx.get(running.url + path).json()["data"]
        assert [model["id"] for model in listed] == [NAME, "math", "Math", "llama"]
