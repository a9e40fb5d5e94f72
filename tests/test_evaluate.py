"""`litgpt evaluate`: lm-eval's own class for `transformers` is the truth."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
import torch

from litgpt.__main__ import main
from litgpt.checkpoint.folder import write_model
from litgpt.evaluation import lm, scoring
from litgpt.evaluation.scoring import score
from litgpt.generate.inference_model import InferenceModel
from litgpt.methods.model_source import ModelSource
from litgpt.methods.quantize import QuantizedLinear
from litgpt.model.gpt import GPT
from tests.conftest import save_llama
from tests.eval_tasks import KINDS, made_rows, write_tasks

os.environ.setdefault("HF_DATASETS_CACHE", os.path.join(os.environ["LITGPT_CACHE"], "datasets"))
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

CPU = torch.device("cpu")


# log-likelihoods


def questions(vocabulary: int, draw: torch.Generator) -> list[tuple[list[int], list[int]]]:
    """Contexts with several continuations each, some of which begin alike; some contexts begin alike too."""

    def ids(low: int, high: int) -> list[int]:
        n = int(torch.randint(low, high, (), generator=draw))
        return torch.randint(3, vocabulary, (n,), generator=draw).tolist()

    before = ids(20, 40)
    contexts = [[0, *(before if i % 2 else []), *ids(1, 30)] for i in range(12)]
    return [(c, [i % 5 + 3, *ids(0, 4)]) for c in contexts for i in range(4)] + [(contexts[0], contexts[1])]


def alone(model: GPT, context: list[int], continuation: list[int]) -> float:
    ids = (context + continuation)[-(model.config.block_size + 1) :]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)[-len(continuation) :]
    return float(logprobs[range(len(continuation)), continuation].sum())


@pytest.mark.parametrize(
    "changes",
    [{}, {"model_type": "mistral", "sliding_window": 16}, {"max_position_embeddings": 48}],
    ids=["llama", "window", "cut"],
)
def test_scores_are_those_of_each_text_alone(tmp_path, tokenizer_file, changes, monkeypatch):
    monkeypatch.setattr(scoring, "SEGMENT_COST", {"cpu": 0, "cuda": 0})  # as for a large model
    folder = save_llama(tmp_path / "m", tokenizer_file, **{k: v for k, v in changes.items() if k != "model_type"})
    if "model_type" in changes:
        fields = json.loads((folder / "config.json").read_text()) | changes | {"architectures": ["MistralForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(fields))
    model = ModelSource.open(folder).model(torch.float32, CPU)
    requests = questions(300, torch.Generator().manual_seed(1))
    requests = [request for request in requests if len(request[1]) <= model.config.block_size]
    expected = [alone(model, *request) for request in requests]
    for batch in (None, 1, 5):
        found = [logprob for logprob, _ in score(model, requests, batch)]
        assert max(abs(a - b) for a, b in zip(found, expected)) < 1e-4


def test_what_is_shared_is_read_once(llama, monkeypatch):
    monkeypatch.setattr(scoring, "SEGMENT_COST", {"cpu": 0, "cuda": 0})
    model = ModelSource.open(llama).model(torch.float32, CPU)
    context = list(range(3, 103))
    requests = [([*context, 200 + q, *range(50, 80)], [a, a + 1]) for q in range(6) for a in (110, 120, 130, 140)]
    read: list[int] = []
    hidden = GPT.hidden

    def counting(self, idx, *args, **kwargs):
        read.append(idx.numel())
        return hidden(self, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, "hidden", counting)
    score(model, requests)
    assert sum(read) == 100 + 6 * 31 + 24  # what all begin with, the rest of each question, a token for each answer
    read.clear()
    score(model, [(context, [a]) for a in range(3, 9)])
    assert sum(read) == 100  # one token each: nothing more is read


def test_greedy_is_said_where_it_is(llama):
    loaded = InferenceModel.open(llama)
    from litgpt.generate.engine import generate

    said = list(generate(loaded.model, [0, 5, 9], 4))
    other = [*said[:-1], (said[-1] + 1) % 300]
    assert [greedy for _, greedy in score(loaded.model, [([0, 5, 9], said), ([0, 5, 9], other)])] == [True, False]


# the same numbers as lm-eval's class for transformers


SEEDS: dict[str, Any] = dict.fromkeys(
    ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 1234
)


def theirs(
    folder: Path, tasks: Path, limit: int, adapter: Optional[Path] = None, batch_size: int = 4, **options: Any
) -> dict[str, Any]:
    """lm-eval's results. No text must be asked twice with its answer beginning elsewhere: lm-eval 0.4.13 keeps the
    logits of the one and takes the wrong ones of them for the other."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter or folder)
    hf = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    common = {"tasks": [*KINDS], "task_manager": manager, "limit": limit, "bootstrap_iters": 0}
    return simple_evaluate(hf, **common, **SEEDS, **options)


def same_as_theirs(folder: Path, tasks: Path, out: Path, limit: int) -> None:
    common = ["--tasks", ",".join(KINDS), "--include_path", tasks, "--limit", limit, "--device", "cpu"]
    rest = ["--out_dir", out, "--log_samples", "--precision", "32-true"]
    main([str(word) for word in ("evaluate", folder, *common, *rest)])
    ours = json.loads((out / "results.json").read_text())
    expected = theirs(folder, tasks, limit)
    for task in KINDS:
        samples = [json.loads(line) for line in (out / f"samples_{task}.jsonl").read_text().splitlines()]
        assert len(samples) == limit
        for own, their in zip(samples, expected["samples"][task]):
            same_sample(task, own, their)
        for metric, value in expected["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-5), (task, metric)


def same_sample(task: str, own: dict[str, Any], their: dict[str, Any]) -> None:
    assert [own["doc_hash"], own["prompt_hash"]] == [their["doc_hash"], their["prompt_hash"]]
    assert len(own["resps"]) == len(their["resps"])
    for (a,), (b,) in zip(own["resps"], their["resps"]):
        if task == "generation":
            assert a == b
        elif task == "rolling":  # a sum over hundreds of tokens
            assert float(a) == pytest.approx(b, abs=1e-3, rel=1e-6)
        else:
            assert float(a[0]) == pytest.approx(b[0], abs=1e-4) and str(a[1]) == str(b[1])


@pytest.mark.parametrize("shots", [0, 3])
def test_a_random_model_gets_the_scores_of_transformers(llama, tmp_path, shots):
    same_as_theirs(llama, write_tasks(tmp_path / "tasks", made_rows(16), shots), tmp_path / "out", 10)


def test_stories260k_gets_the_scores_of_transformers(real_data, tmp_path):
    lines = (real_data / "eval" / "blimp_determiner_noun_agreement_1.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:40]]
    made = [
        {
            "begin": row["one_prefix_prefix"],
            "good": row["one_prefix_word_good"],
            "bad": row["one_prefix_word_bad"],
            "repeat": 60,
        }
        for row in rows
    ]
    same_as_theirs(real_data / "models" / "stories260k", write_tasks(tmp_path / "tasks", made, 2), tmp_path / "out", 30)


TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}{% endfor %}"
TURNS += "{% if add_generation_prompt %}[assistant]{% endif %}"
TEMPLATES = {
    "with BOS": "{{ bos_token }}" + TURNS,
    "without BOS": TURNS,
    "no system": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS,
    "blanks kept": TURNS.replace(" | trim", ""),
}
TOKENIZERS = ("adds BOS", "has BOS", "no BOS")
SYSTEM = "Speak of foxes."
CASES: list[Any] = [  # template, tokenizer, shots as turns, system message, what begins the answer, adapter
    ("with BOS", "adds BOS", True, None, "", False),
    ("without BOS", "adds BOS", True, SYSTEM, "", True),
    ("blanks kept", "has BOS", False, SYSTEM, "It is ", False),
    (None, "no BOS", False, SYSTEM, "It is", False),
    ("no system", "no BOS", True, SYSTEM, "", False),
]
EVERY = [
    (template, tokenizer, turns, system, prefix, adapter)
    for template in (None, *TEMPLATES)
    for tokenizer in TOKENIZERS
    for turns in ((False, True) if template else (False,))
    for system in (None, SYSTEM)
    for prefix in ("", "It is ")
    for adapter in (False, True)
]
CASES += [pytest.param(*case, marks=pytest.mark.long) for case in EVERY if case not in CASES]


def change_tokenizer(folder: Path, kind: str, template: Optional[str]) -> None:
    """Let the tokenizer of a folder not add BOS, or have none; and give it a chat template."""
    files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
    backend, fields = (json.loads(file.read_text()) for file in files)
    if kind != "adds BOS":
        backend["post_processor"] = None
    if kind == "no BOS":
        fields["bos_token"] = None
    if template is not None:
        fields["chat_template"] = TEMPLATES[template]
    for file, content in zip(files, (backend, fields)):
        file.write_text(json.dumps(content))


@pytest.mark.parametrize(("template", "tokenizer", "turns", "system", "prefix", "with_adapter"), CASES)
def test_every_way_to_ask(base, whole, tmp_path, capsys, template, tokenizer, turns, system, prefix, with_adapter):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from litgpt.evaluation.lm import LitGPT

    folder = shutil.copytree(base, tmp_path / "base")
    adapter = shutil.copytree(whole("lora") / "final", tmp_path / "adapter") if with_adapter else None
    for place in [folder, *([adapter] if adapter else [])]:
        change_tokenizer(place, tokenizer, template)
        for name in ("prompt_style.yaml", "chat_template.jinja"):
            (place / name).unlink(missing_ok=True)
    more = {"gen_prefix": prefix} if prefix else {}
    tasks = write_tasks(tmp_path / "tasks", made_rows(8), 2, description="Now: ", **more)
    options: dict[str, Any] = {"apply_chat_template": template is not None, "system_instruction": system}
    options["fewshot_as_multiturn"] = turns
    expected = theirs(folder, tasks, 3, adapter, **options)
    loaded = InferenceModel.open(adapter or folder, folder if adapter else None, "32-true", None, "cpu")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    lm = LitGPT(loaded, chat=template is not None)
    common: dict[str, Any] = {"tasks": [*KINDS], "task_manager": manager, "limit": 3, "bootstrap_iters": 0}
    ours = simple_evaluate(lm, **common, **SEEDS, **options)
    for task in KINDS:
        for own, their in zip(ours["samples"][task], expected["samples"][task]):
            assert [list(a) for a in own["arguments"]] == [list(a) for a in their["arguments"]]
            same_sample(task, own, their)
    assert ("refuses system messages" in capsys.readouterr().err) is (template == "no system")


def test_prompts_of_a_style_that_lm_eval_does_not_know_are_those_of_training(whole, base, tmp_path):
    """A saved ChatML has no BOS, though the tokenizer adds one to other texts."""
    from litgpt.evaluation.lm import LitGPT
    from litgpt.text.prompts import choose_style

    loaded = InferenceModel.open(base, None, "32-true", None, "cpu")
    loaded.style = choose_style("chatml", base, chat=True)
    lm = LitGPT(loaded, chat=True)
    text = lm.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert lm.encode([text], rendered=True) == [loaded.render([{"role": "user", "content": "Hello"}])[1]]
    assert lm.encode(["Hello"]) == [loaded.tokenizer.encode("Hello")]
    assert lm.encode(["<s>Hello"]) == [loaded.tokenizer.encode("<s>Hello", special=False)]


# what is left behind, and with and without an adapter


class Kind:
    """The form of a value: its type, or for dicts and lists that of what is in them."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def differs(self, other: Any, where: str = "") -> Iterator[str]:
        value = self.value
        if type(value) is not type(other):
            yield f"{where}: {type(value).__name__}, not {type(other).__name__}"
        elif isinstance(value, dict):
            for key in [k for k in value if k not in other]:
                yield f"{where}/{key} is missing"
            for key in [k for k in other if k not in value]:
                yield f"{where}/{key} is new"
            for key in value.keys() & other.keys():
                yield from Kind(value[key]).differs(other[key], f"{where}/{key}")
        elif isinstance(value, list):
            if len(value) != len(other):
                yield f"{where}: {len(value)} values, not {len(other)}"
            for i, (a, b) in enumerate(zip(value, other)):
                yield from Kind(a).differs(b, f"{where}[{i}]")


OURS = ["/litgpt is new"]  # beside lm-eval's keys
OF_THE_CALL = [f"/configs/{task}/metadata/dtype is missing" for task in KINDS]  # what was given as --model_args


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
def test_files_have_the_form_of_those_that_lm_eval_writes(base, whole, tmp_path, chat, with_adapter):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    folder, tasks = shutil.copytree(base, tmp_path / "base"), write_tasks(tmp_path / "tasks", made_rows(8), 2)
    adapter = shutil.copytree(whole("lora") / "final", tmp_path / "adapter") if with_adapter else None
    for place in [folder, *([adapter] if adapter else [])]:
        change_tokenizer(place, "adds BOS", "with BOS")
        for name in ("prompt_style.yaml", "chat_template.jinja"):
            (place / name).unlink(missing_ok=True)
    model_args = {"pretrained": str(folder), "dtype": "float32", **({"peft": str(adapter)} if adapter else {})}
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    manager = TaskManager(include_path=str(tasks), include_defaults=False, metadata=model_args)
    results = simple_evaluate(  # as the command `lm_eval run` calls it
        "hf", model_args, tasks=[*KINDS], task_manager=manager, limit=3.0, device="cpu", batch_size=2, **SEEDS,
        apply_chat_template=chat, fewshot_as_multiturn=True if chat else None, evaluation_tracker=tracker,
        gen_kwargs={},
    )  # fmt: skip
    samples = results.pop("samples")
    tracker.save_results_aggregated(results, samples)
    for task in KINDS:
        tracker.save_results_samples(task, samples[task])
    command = ["evaluate", adapter or folder, "--tasks", ",".join(KINDS), "--include_path", tasks, "--limit", 3]
    flags = ["--out_dir", tmp_path / "ours", "--log_samples", "--batch_size", 2, "--device", "cpu"]
    flags += [*(["--apply_chat_template"] if chat else []), *(["--base", folder] if adapter else [])]
    main([str(word) for word in (*command, *flags, "--precision", "32-true")])
    (file,) = (tmp_path / "theirs").rglob("results_*.json")
    expected, ours = json.loads(file.read_text()), json.loads((tmp_path / "ours" / "results.json").read_text())
    allowed = OURS + OF_THE_CALL + [f"/configs/{task}/metadata/peft is missing" for task in KINDS if adapter]
    assert sorted(Kind(expected).differs(ours)) == sorted(allowed)
    for key in ("task_hashes", "versions", "n-shot", "n-samples", "higher_is_better", "chat_template_sha"):
        assert ours[key] == expected[key]
    for key in ("tokenizer_pad_token", "tokenizer_eos_token", "tokenizer_bos_token", "eot_token_id", "max_length"):
        assert ours[key] == expected[key]
    for task in KINDS:
        (file,) = (tmp_path / "theirs").rglob(f"samples_{task}_*.jsonl")
        theirs_, ours_ = (
            [json.loads(line) for line in f.read_text().splitlines()]
            for f in (file, tmp_path / "ours" / f"samples_{task}.jsonl")
        )
        assert list(Kind(theirs_).differs(ours_)) == []
        assert [s["arguments"] for s in theirs_] == [s["arguments"] for s in ours_]


def test_what_is_noted_of_the_base_beside_an_adapter(evaluate, whole, base, tmp_path):
    evaluate(whole("lora") / "final", "choice", "--limit", 2, "--vs", "base")
    adapter, alone = (json.loads((tmp_path / "out" / f"results{end}.json").read_text()) for end in ("", "_base"))
    assert adapter["config"]["model_args"]["peft"] == adapter["model_name"] == str(whole("lora") / "final")
    assert "peft" not in alone["config"]["model_args"] and "peft_sha" not in alone["config"]
    assert Path(alone["model_name"]).samefile(base)
    assert "adapter_model.safetensors" not in alone["litgpt"]["model_sha256"]


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_truncated_prompts_are_said_once(llama, tmp_path, capsys, caplog, chat):
    """As many as lm-eval warns about, which does so for each."""
    folder = shutil.copytree(llama, tmp_path / "short")
    fields = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(fields))
    change_tokenizer(folder, "adds BOS", "with BOS")
    tasks = write_tasks(tmp_path / "tasks", made_rows(12), description="away " * 6)
    with caplog.at_level("WARNING", logger="lm_eval"):
        theirs(folder, tasks, 12, batch_size=1, apply_chat_template=chat)
    counts = [
        sum(words in record.getMessage() for record in caplog.records)
        for words in ("exceeds model's maximum length", "Left truncation applied")
    ]
    command = ["evaluate", folder, "--tasks", ",".join(KINDS), "--include_path", tasks, "--out_dir", tmp_path / "out"]
    main([str(word) for word in (*command, "--device", "cpu", *(["--apply_chat_template"] if chat else []))])
    said = [line for line in capsys.readouterr().err.splitlines() if "truncated" in line]
    n = 12 * (3 + 2 + 1)  # answers of choice, pairs and likelihood
    assert all(counts) and len(said) == 2
    assert any(f"{counts[0]} of {n} prompts" in line and "last 64 tokens" in line for line in said)
    assert any(f"{counts[1]} of 12 prompts" in line and "last 40 tokens" in line for line in said)


def test_git_is_silent(llama, tmp_path, monkeypatch, capfd):
    """Outside of a repository, and where there is no git."""
    tasks = write_tasks(tmp_path / "tasks", made_rows(4))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    command = ["evaluate", llama, "--tasks", "choice", "--include_path", tasks, "--limit", 1, "--out_dir", tmp_path]
    for path in (os.environ["PATH"], str(tmp_path)):
        monkeypatch.setenv("PATH", path)
        main([str(word) for word in command])
        assert "git" not in capfd.readouterr().err.replace("litgpt", "")
        assert json.loads((tmp_path / "results.json").read_text())["git_hash"] is None


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Run the command over ten questions of some tasks."""
    tasks = write_tasks(tmp_path / "tasks", made_rows(16))

    def run(folder: Path, names: str, *flags: object) -> dict[str, Any]:
        words = ["evaluate", folder, "--tasks", names, "--include_path", tasks, "--out_dir", tmp_path / "out"]
        try:
            main([str(word) for word in (*words, "--precision", "32-true", *flags)])
        finally:
            run.out, run.err = capsys.readouterr()  # type: ignore[attr-defined]
        return json.loads((tmp_path / "out" / "results.json").read_text())

    return run


def test_results_have_versions_and_hashes(evaluate, llama, tmp_path):
    results = evaluate(llama, "choice,likelihood", "--limit", "10", "--batch_size", "3")
    assert results["versions"] == {"choice": 1.0, "likelihood": 1.0}
    assert results["n-samples"]["choice"] == {"original": 16, "effective": 10}
    assert set(results["litgpt"]["model_sha256"]) == {"model.safetensors", "config.json", "tokenizer"}
    assert set(results["task_hashes"]) == {"choice", "likelihood"} and "samples" not in results
    assert "|choice" in evaluate.out.replace(" ", "") and not list((tmp_path / "out").glob("samples*"))
    again = evaluate(llama, "choice", "--limit", "10")  # auto
    assert again["results"]["choice"] == results["results"]["choice"]
    assert again["task_hashes"]["choice"] == results["task_hashes"]["choice"]


@pytest.mark.parametrize("method", ["lora-embeddings", "adapter_v2"])
def test_the_base_in_the_same_process(evaluate, whole, base, method):
    """Every kind of part: updates, whole weights, prefixes."""
    folder = whole(method) / "final"
    source = ModelSource.open(folder)
    model = source.model(torch.float32, CPU)
    plain = ModelSource.open(base).model(torch.float32, CPU)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        adapted, expected = model(ids), plain(ids)
        assert not torch.allclose(adapted, expected, atol=1e-3)
        with source.without_adapter(model):
            assert torch.equal(model(ids), expected)
        assert torch.equal(model(ids), adapted)
    results = evaluate(folder, "likelihood", "--vs", "base")
    alone = evaluate(base, "likelihood")
    found = results["vs_base"]["likelihood"]
    assert found["perplexity"]["base"] == pytest.approx(alone["results"]["likelihood"]["perplexity,none"], rel=1e-5)
    assert found["perplexity"]["adapter"] == results["results"]["likelihood"]["perplexity,none"]
    assert found["perplexity"]["method"] == "paired bootstrap" and found["acc"]["method"] == "paired normal"


def test_4_bits_are_scored_as_the_weights_that_they_stand_for(evaluate, whole, base, tmp_path):
    pytest.importorskip("bitsandbytes")
    source = ModelSource.open(base)
    model, quantized = (source.model(torch.float32, CPU, scheme) for scheme in (None, "bnb.nf4"))
    layers = {name: m for name, m in quantized.named_modules() if isinstance(m, QuantizedLinear)}
    for name, layer in layers.items():
        model.get_submodule(name).weight.data = layer.dequantized()
    folder = tmp_path / "rounded"
    folder.mkdir()
    write_model(model, source.checkpoint.fields, folder, source.checkpoint)
    for file in base.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    in_4_bits, rounded, plain = (
        evaluate(f, "likelihood", *flags)["results"]["likelihood"]["perplexity,none"]
        for f, flags in ((base, ["--quantize", "bnb.nf4"]), (folder, []), (base, []))
    )
    assert layers and in_4_bits == pytest.approx(rounded, rel=1e-4)
    assert in_4_bits != pytest.approx(plain, rel=1e-3)
    against = evaluate(whole("lora") / "final", "likelihood", "--vs", "base", "--quantize", "bnb.nf4")
    assert against["vs_base"]["likelihood"]["perplexity"]["base"] == pytest.approx(in_4_bits, rel=1e-5)


def test_a_drop_ends_with_1(evaluate, whole, monkeypatch):
    """The drop is measured first, then allowed and not allowed."""
    folder, flags = whole("adapter_v2") / "final", ["--vs", "base", "--fail_if_drop"]
    monkeypatch.setattr("litgpt.evaluation.compare.Difference.drop", 0.03)
    evaluate(folder, "likelihood", *flags, "3%")
    with pytest.raises(SystemExit) as stop:
        evaluate(folder, "likelihood", *flags, "0.02")
    assert stop.value.code == 1 and "likelihood perplexity dropped by 3.0% of the base's score" in evaluate.err


def test_intervals_and_drops():
    from lm_eval.api.metrics import mean

    from litgpt.evaluation.compare import Difference, bootstrap_interval, normal_interval, read_share

    low, high = normal_interval([1.0, 0.0, 1.0, 0.0])
    error = math.sqrt(4 * 0.25 / 3 / 4)
    assert (low, high) == (pytest.approx(0.5 - 1.96 * error), pytest.approx(0.5 + 1.96 * error))
    assert normal_interval([0.0] * 5) == (0, 0) and normal_interval([1.0]) == (None, None)
    pairs = [(float(i % 2), float(i % 3 == 0)) for i in range(300)]
    both = bootstrap_interval(pairs, mean, 1000, 0), normal_interval([b - a for a, b in pairs])
    assert both[0] == (pytest.approx(both[1][0], abs=0.02), pytest.approx(both[1][1], abs=0.02))

    def drop(base, adapter, higher):
        return Difference("t", "m", base, adapter, adapter - base, None, None, 1, "", higher).drop

    assert drop(0.5, 0.4, True) == pytest.approx(0.2) and drop(0.5, 0.6, True) < 0
    assert drop(10.0, 11.0, False) == pytest.approx(0.1) and drop(10.0, 9.0, False) < 0
    assert drop(0.0, 1.0, False) == math.inf and drop(0.5, 0.4, None) == 0 == drop(0.0, 0.0, True)
    assert read_share("2%") == read_share("0.02") == 0.02


# names, and what goes wrong


def test_names():
    from litgpt.evaluation.tasks import split_names

    assert split_names("a, b") == split_names(["a", "b"]) == split_names("[a,b]") == ["a", "b"]
    assert split_names("truthfulqa_mc") == ["truthfulqa_mc1", "truthfulqa_mc2"]
    assert split_names("hendrycksTest-global_facts,hendrycksTest-*") == ["mmlu_global_facts", "mmlu"]


def test_renamed_tasks_are_said_once(capsys):
    from litgpt.evaluation.tasks import split_names

    split_names("truthfulqa_mc,hendrycksTest-virology,arithmetic_2ds")
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "truthfulqa_mc1 and truthfulqa_mc2" in err and "mmlu_virology" in err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--tasks", "chioce"], "Did you mean 'choice'?"),
        (["--tasks", "choice", "--limit", "0"], "--limit 0"),
        (["--tasks", "choice", "--batch_size", "0", "--num_fewshot", "-1"], "--num_fewshot -1"),
        (["--tasks", "choice", "--vs", "base"], "--vs base"),
        (["--tasks", "choice", "--fail_if_drop", "2%"], "--vs base"),
        (["--tasks", "choice", "--fail_if_drop", "much"], "--fail_if_drop much"),
        (["--tasks", "choice", "--dtype", "float23"], "float32"),
        (["--tasks", "choice", "--device", "tpu"], "--device tpu"),
        (["--tasks", ","], "--tasks"),
        (["--tasks", "choice", "--include_path", "nowhere"], "nowhere"),
    ],
)
def test_what_a_user_can_mend(llama, tmp_path, capsys, monkeypatch, flags, words):
    tasks = write_tasks(tmp_path / "tasks", made_rows(4))
    monkeypatch.setattr("litgpt.evaluation.tasks.TaskManager", small_manager)
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(llama), "--out_dir", str(tmp_path / "out"), "--include_path", str(tasks), *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1


@pytest.mark.parametrize("where", ["loglikelihood", "encode"])
@pytest.mark.parametrize("error", [ValueError("shapes"), AssertionError(), KeyError("x")])
def test_errors_of_the_code_are_not_put_down_to_the_tasks(evaluate, llama, monkeypatch, where, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(*(lm, "score") if where == "loglikelihood" else (lm.LitGPT, "encode"), fail)
    with pytest.raises(type(error)) as caught:
        evaluate(llama, "choice")
    assert caught.value is error


def small_manager(include_path: list[str], include_defaults: bool = False, metadata: Any = None) -> Any:
    """lm-eval's manager, without reading all of its own tasks."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=False, metadata=metadata)


def test_data_that_cannot_be_had_are_named(llama, tmp_path, capsys):
    """Tasks of the hub and of files; nothing is run."""
    tasks = write_tasks(tmp_path / "tasks", made_rows(4))
    hub = "{task: far, dataset_path: nobody/nothing, dataset_name: some, output_type: loglikelihood, test_split: test}"
    (tasks / "far.yaml").write_text(hub)
    text = (tasks / "choice.yaml").read_text().replace("rows.jsonl", "gone.jsonl")
    (tasks / "gone.yaml").write_text(text.replace("task: choice", "task: gone"))
    with pytest.raises(SystemExit) as stop:
        words = ["evaluate", llama, "--tasks", "far,choice,gone", "--include_path", tasks, "--out_dir", tmp_path / "o"]
        main([str(word) for word in words])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("litgpt: error") == 1
    assert "2 of 3 tasks" in err and "far: the data set nobody/nothing (some)" in err and "gone.jsonl" in err
    assert not (tmp_path / "o" / "results.json").exists()


@pytest.mark.long
def test_lm_evals_own_tasks_load_by_name(capsys, tmp_path):
    names = "arithmetic_2ds arithmetic_4ds blimp_causative truthfulqa_mc hendrycksTest-global_facts".split()
    with pytest.raises(SystemExit):
        main(["evaluate", "pico", "--tasks", ",".join(names), "--out_dir", str(tmp_path)])
    err = capsys.readouterr().err
    for name in ("arithmetic_2ds", "arithmetic_4ds", "blimp_causative", "truthfulqa_mc1", "mmlu_global_facts"):
        assert f"{name}: the data set" in err
    main(["evaluate", "--tasks", "list global facts"])
    assert "mmlu_global_facts" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("words", [["list"], ["--tasks", "list"], ["--checkpoint_dir", "list"]])
def test_ways_to_list_the_tasks(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("litgpt.evaluation.tasks.listing", lambda words, include: f"all tasks with {words}")
    main(["evaluate", *words])
    assert "all tasks with []" in capsys.readouterr().out


# a LoRA that learned something, and one that did not


def sums_task(folder: Path) -> Path:
    """The built-in model's validation sums, as a task that is answered in its chat form."""
    from litgpt.data.pico import PicoSums

    rows = [row["messages"] for row in PicoSums().parts()["val"]()]
    folder.mkdir()
    file = folder / "sums.jsonl"
    file.write_text("".join(json.dumps({"q": m[0]["content"], "a": m[1]["content"]}) + "\n" for m in rows))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(file)},
        "test_split": "train",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    }
    (folder / "sums.yaml").write_text(json.dumps(task))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("steps", [460, 1])
def test_a_trained_lora_is_clearly_better_and_an_untrained_one_is_not(tmp_path, steps):
    run = ["--train.max_steps", str(steps), "--out_dir", str(tmp_path / "run"), "--eval.exact_match", "null"]
    still = ["--optimizer.lr", "1e-9"] if steps == 1 else []
    main(
        ["finetune", "lora", "--config", "pico/lora", *run, *still, "--train.lr_warmup_steps", str(min(20, steps - 1))]
    )
    tasks = ["--tasks", "sums", "--include_path", str(sums_task(tmp_path / "tasks")), "--apply_chat_template"]
    out = ["--out_dir", str(tmp_path / "out"), "--vs", "base"]
    main(["evaluate", str(tmp_path / "run" / "final"), *tasks, *out, "--device", "cpu"])
    found = json.loads((tmp_path / "out" / "results.json").read_text())["vs_base"]["sums"]["exact_match"]
    if steps > 1:
        assert found["low"] > 0.8 and found["base"] == 0
    else:
        assert found["low"] <= 0 <= found["high"]


def test_the_table_keeps_digits_and_signs():
    from litgpt.evaluation.compare import Difference, table

    text = table([Difference("t", "acc", 0.5, 0.51, 0.01, 0.001, 0.02, 100, "paired normal", True)])
    assert all(part in text for part in ("0.5000", "0.5100", "+0.0100", "+0.0010 to +0.0200 *"))
