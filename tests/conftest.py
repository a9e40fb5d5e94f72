"""Tiny models and rows that the tests share."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LITGPT_CACHE"] = tempfile.mkdtemp(prefix="litgpt-tests-")

import pytest
import torch
import yaml

from litgpt.__main__ import main
from litgpt.generate import reference_outputs
from litgpt.train import metrics

if TYPE_CHECKING:
    from tests.mutations import Scene

torch.set_num_threads(1)
reference_outputs.PROMPTS = reference_outputs.PROMPTS[::5]  # of results: two texts take less time than eight
DRAWING = {"test_screen", "test_spared", "test_outputs"}  # the tests that look at loss.png


SAMPLES = {  # the number of cases that `make test` runs of a test, spread evenly; `make test-all` runs all
    "test_attention.py::test_causal_attention_is_torchs": 96,
    "test_benchmarks.py::test_rows_to_tokens": 0,
    "test_benchmarks.py::test_train": 0,
    "test_blocks.py::test_activation_checkpointing_changes_no_number": 1,
    "test_blocks.py::test_compiled_blocks": 1,
    "test_chat_template.py::test_ids_and_refusals": 8,
    "test_compat_data.py::test_the_command_line_needs_no_lightning": 1,
    "test_config.py::test_every_known_model_builds": 12,
    "test_data_files.py::test_interrupted_work_leaves_no_processes_and_no_file": 1,
    "test_data_files.py::test_what_a_template_does_not_show_is_an_error_or_text": 10,
    "test_defaults.py::test_the_rate_of_a_run": 1,
    "test_defaults.py::test_when_checkpoints_are_saved": 1,
    "test_devices.py::test_gradients_that_some_rank_lacks": 0,
    "test_devices.py::test_one_device_does_what_lightning_does": 1,
    "test_devices.py::test_torchrun": 0,
    "test_embeddings.py::test_rows": 7,
    "test_engine.py::test_a_text_does_not_depend_on_the_others": 2,
    "test_engine.py::test_in_4_bits_a_text_does_not_depend_on_the_others": 1,
    "test_evaluate.py::test_4_bits_are_scored_as_the_weights_that_they_stand_for": 0,
    "test_evaluate.py::test_a_random_model_gets_the_scores_of_transformers": 1,
    "test_evaluate.py::test_every_way_to_ask": 2,
    "test_evaluate.py::test_files_have_the_form_of_those_that_lm_eval_writes": 1,
    "test_evaluate.py::test_stories260k_gets_the_scores_of_transformers": 0,
    "test_evaluate.py::test_the_base_in_the_same_process": 1,
    "test_evaluate.py::test_truncated_prompts_are_said_once": 1,
    "test_evaluate_rows.py::test_the_losses_are_those_of_the_run": 3,
    "test_families.py::test_a_drawn_model_runs": 14,
    "test_families.py::test_a_field_that_is_missing_has_the_default": 14,
    "test_families.py::test_cache": 14,
    "test_families.py::test_documents": 14,
    "test_families.py::test_gradients": 14,
    "test_families.py::test_what_is_written": 20,
    "test_families.py::test_greedy_text": 6,
    "test_families.py::test_greedy_text_of_many": 6,
    "test_families_files.py::test_nonsense_is_an_error_of_the_user": 7,
    "test_families_peft.py::test_parts": 7,
    "test_fuzz_files.py::test_damaged_files": 3,
    "test_go_on.py::test_adapters_of_peft": 2,
    "test_go_on.py::test_an_adapter_is_trained_further": 4,
    "test_go_on.py::test_such_a_run_resumes": 2,
    "test_gpu_check.py::test_what_fails_leaves_what_it_measured": 2,
    "test_gpu_matrix.py::test_decoding": 2,
    "test_gpu_on_a_cpu.py::test_two_adapters_at_once": 1,
    "test_gpu_path.py::test_training": 9,
    "test_gradients.py::test_every_trained_weight_has_a_gradient": 4,
    "test_litgpt_documents_commands.py::test_what_trains": 2,
    "test_litgpt_documents_commands.py::test_what_uses_a_model": 2,
    "test_lit_folder.py::test_there_and_back": 12,
    "test_lora.py::test_export_and_merge": 8,
    "test_methods.py::test_what_is_trained": 5,
    "test_moves.py::test_another_dtype": 30,
    "test_optimizers.py::test_large_ranks_and_sgd_with_momentum": 1,
    "test_outputs.py::test_a_file_that_was_put_into_a_run": 2,
    "test_outputs.py::test_a_folder_of_the_users_stays_as_it_is": 2,
    "test_outputs.py::test_killed_at_any_moment": 1,
    "test_packing.py::test_every_real_file_trains": 1,
    "test_peft_embeddings.py::test_adapters_of_peft": 8,
    "test_plan.py::test_dry_runs_download_no_weights": 2,
    "test_plan.py::test_fewer_layers_tell_the_same": 1,
    "test_precision.py::test_mixed_precision_over_a_quantized_base": 1,
    "test_quantize.py::test_loss_curve_of_peft_as_on_cuda": 0,
    "test_recipes.py::test_only_what_differs_from_the_defaults": 20,
    "test_recipes.py::test_trained_parameters": 40,
    "test_recipes.py::test_two_steps": 2,
    "test_result_style.py::test_a_result_is_finetuned_again_in_its_style": 2,
    "test_result_style.py::test_the_style_of_a_run_is_that_of_its_result": 5,
    "test_resume.py::test_killed_again_and_again": 0,
    "test_resume.py::test_paused_and_resumed": 4,
    "test_resume.py::test_what_resume_takes": 2,
    "test_screen.py::test_recorded": 3,
    "test_serve.py::test_every_template_takes_it": 12,
    "test_serve_connections.py::test_a_body_is_freed_with_its_answer": 3,
    "test_serve_heavy.py::test_large_bodies": 0,
    "test_signals.py::test_before_the_first_step": 3,
    "test_signals.py::test_in_a_step": 1,
    "test_small_files.py::test_forms": 10,
    "test_spared.py::test_the_run_goes_on": 2,
    "test_speculative.py::test_a_draft_does_not_pass_the_switch_of_longrope": 0,
    "test_speculative.py::test_greedy_text_is_the_targets": 1,
    "test_templates_show.py::test_parts_of_a_row_under_real_templates": 8,
    "test_tensor_parallel.py::test_the_parts_add_up": 20,
    "test_tokenizer.py::test_a_long_stream": 3,
    "test_tokenizer.py::test_real_tokenizers": 2,
    "test_tokenizer.py::test_real_tokenizers_show_it": 5,
    "test_tokenizer.py::test_real_vocabularies": 2,
    "test_training.py::test_fast_paths_leave_the_curve": 1,
    "test_training.py::test_loss_curves_of_variants_and_of_quantized_bases": 0,
    "test_training.py::test_precisions": 1,
    "test_verify_resume.py::test_no_difference": 1,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases that `SAMPLES` leaves out as long ones."""
    cases: dict[str, list[pytest.Item]] = {name: [] for name in SAMPLES}
    for item in items:
        name = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
        if name in cases and item.get_closest_marker("long") is None:
            cases[name].append(item)
    for name, found in cases.items():
        step = math.ceil(len(found) / SAMPLES[name]) if found and SAMPLES[name] else 1
        for i, item in enumerate(found):
            if i % step or not SAMPLES[name]:
                item.add_marker(pytest.mark.long)


def some(names: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of a test, all of which `make test-all` runs; `make test` runs those in `quick`."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.long) for name in names]


@pytest.fixture(autouse=True)
def few_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no losses, which would take a sixth of their time here, except for the tests of that."""
    if request.path.stem not in DRAWING:
        monkeypatch.setattr(metrics, "plot", lambda *_: False)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real models, tokenizers and rows."""
    folder = os.environ.get("LITGPT_REAL_DATA")
    if not folder:
        pytest.skip("LITGPT_REAL_DATA is not set: the folder with real data is not at hand")
    return Path(folder)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of 300 tokens with BOS and EOS, trained on a sentence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog", "### Instruction: ### Response:"], trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def save_llama(folder: Path, tokenizer_file: Path, seed: int = 0, shards: bool = False, **changes: object) -> Path:
    """A random Llama as `transformers` writes it, with the tiny tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    fields: dict = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**fields, **changes}))
    for name, parameter in model.named_parameters():  # biases and norms start at 0 and 1 otherwise
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(folder, **({"max_shard_size": "20KB"} if shards else {}))
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """A folder with a random Llama of two layers. Read only."""
    return save_llama(tmp_path_factory.mktemp("models") / "llama", tokenizer_file)


WORDS = "the quick brown fox jumps over the lazy dog and runs away from it all".split()


def make_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Alpaca rows of different lengths."""
    draw = torch.Generator().manual_seed(seed)

    def text(at_most: int) -> str:
        count = int(torch.randint(1, at_most, (), generator=draw))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=draw).tolist())

    return [{"instruction": text(6), "input": text(4) if i % 3 == 0 else "", "output": text(12)} for i in range(n)]


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows as JSON. Read only."""
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(make_rows(40)))
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """Three layers, so that adapters, which begin with the third, have one; blocks of 64 numbers for 4 bits."""
    folder = tmp_path_factory.mktemp("m") / "base"
    return save_llama(folder, tokenizer_file, num_hidden_layers=3, hidden_size=64, intermediate_size=96)


@pytest.fixture(scope="session")
def whole(base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of a method that was never stopped. Read only."""
    from tests.runs import go

    made: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in made:
            made[method] = tmp_path_factory.mktemp("whole") / method
            assert go(method, base, rows_file, made[method]) == 0
        return made[method]

    return run


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> dict[str, "Scene"]:
    """Folders with every small file that commands read, by what they are. Read only."""
    from tests.mutations import make_scenes

    return make_scenes(tmp_path_factory.mktemp("scenes"), tokenizer_file)


@pytest.fixture(autouse=os.environ.get("LITGPT_CPU_KERNELS") == "0")
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU runs the code that a GPU runs: the plain operations, and one kernel for packed sequences."""
    from litgpt.model import attention_kernels, kernels
    from tests.varlen import varlen_attn

    monkeypatch.setattr(kernels, "enabled", False)
    monkeypatch.setattr(attention_kernels, "has_varlen", lambda *_: True)
    monkeypatch.setattr(attention_kernels, "varlen", lambda: varlen_attn)


@pytest.fixture
def settings(capsys: pytest.CaptureFixture) -> Callable[..., Any]:
    """What a command line comes to, as `--print_config` has it."""

    def run(*words: object) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*map(str, words), "--print_config"])
        run.out, run.err = capsys.readouterr()  # type: ignore[attr-defined]
        assert not stop.value.code, run.err  # type: ignore[attr-defined]
        return yaml.safe_load(run.out)  # type: ignore[attr-defined]

    return run


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """Write a config file."""

    def write(name: str, **fields: object) -> Path:
        (tmp_path / name).write_text(yaml.safe_dump(fields))
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, whose console and requests are logged."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield made
    made.quit()
