"""`litgpt evaluate`: lm-eval's own class for `transformers` is the truth."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.__main__ import main
from litgpt.checkpoint import write_model
from litgpt.evaluation import lm, scoring
from litgpt.evaluation.scoring import score
from litgpt.generate.loaded import Loaded
from litgpt.loading import Source
from litgpt.model import GPT
from litgpt.quantize import QuantizedLinear
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
    monkeypatch.setattr(scoring, "EFFORT", {"cpu": 0, "cuda": 0})  # as for a large model
    folder = save_llama(tmp_path / "m", tokenizer_file, **{k: v for k, v in changes.items() if k != "model_type"})
    if "model_type" in changes:
        fields = json.loads((folder / "config.json").read_text()) | changes | {"architectures": ["MistralForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(fields))
    model = Source.open(folder).model(torch.float32, CPU)
    requests = questions(300, torch.Generator().manual_seed(1))
    requests = [request for request in requests if len(request[1]) <= model.config.block_size]
    expected = [alone(model, *request) for request in requests]
    for batch in (None, 1, 5):
        found = [logprob for logprob, _ in score(model, requests, batch)]
        assert max(abs(a - b) for a, b in zip(found, expected)) < 1e-4


def test_what_is_shared_is_read_once(llama, monkeypatch):
    monkeypatch.setattr(scoring, "EFFORT", {"cpu": 0, "cuda": 0})
    model = Source.open(llama).model(torch.float32, CPU)
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
    loaded = Loaded.open(llama)
    from litgpt.generate.engine import generate

    said = list(generate(loaded.model, [0, 5, 9], 4))
    other = [*said[:-1], (said[-1] + 1) % 300]
    assert [greedy for _, greedy in score(loaded.model, [([0, 5, 9], said), ([0, 5, 9], other)])] == [True, False]


# the same numbers as lm-eval's class for transformers


def theirs(folder: Path, tasks: Path, limit: int) -> dict[str, Any]:
    """lm-eval's results. No text must be asked twice with its answer beginning elsewhere: lm-eval 0.4.13 keeps the
    logits of the one and takes the wrong ones of them for the other."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hf = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=4, device="cpu")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 1234)
    return simple_evaluate(hf, tasks=[*KINDS], task_manager=manager, limit=limit, bootstrap_iters=0, **seeds)


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
            assert [own["doc_hash"], own["prompt_hash"]] == [their["doc_hash"], their["prompt_hash"]]
            for a, b in zip(own["resps"], their["resps"]):
                a, b = a[0], b[0]
                if task == "generation":
                    assert a == b
                elif task == "rolling":  # a sum over hundreds of tokens
                    assert a == pytest.approx(b, abs=1e-3, rel=1e-6)
                else:
                    assert a[0] == pytest.approx(b[0], abs=1e-4) and a[1] == b[1]
        for metric, value in expected["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-5), (task, metric)


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


# what is left behind, and with and without an adapter


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
    source = Source.open(folder)
    model = source.model(torch.float32, CPU)
    plain = Source.open(base).model(torch.float32, CPU)
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
    source = Source.open(base)
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
        (["--tasks", "choice", "--batch_size", "0", "--num_fewshot", "-1"], "--num_fewshot -1 is below 0"),
        (["--tasks", "choice", "--vs", "base"], "wants an adapter folder"),
        (["--tasks", "choice", "--fail_if_drop", "2%"], "--vs base"),
        (["--tasks", "choice", "--fail_if_drop", "much"], "--fail_if_drop much"),
        (["--tasks", "choice", "--dtype", "float23"], "float32"),
        (["--tasks", "choice", "--device", "tpu"], "--device tpu"),
        (["--tasks", ","], "Missing: the model folder and --tasks"),
        (["--tasks", "choice", "--include_path", "nowhere"], "nowhere: no such folder"),
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


def small_manager(include_path: list[str], include_defaults: bool = False) -> Any:
    """lm-eval's manager, without reading all of its own tasks."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=False)


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
