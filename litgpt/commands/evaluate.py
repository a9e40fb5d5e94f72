"""`litgpt evaluate`"""

import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, Union

from litgpt.checkpoint.find import find_folder, local_folder
from litgpt.errors import UserError, nearest, require
from litgpt.generate.inference_model import InferenceModel
from litgpt.methods.model_source import ModelSource
from litgpt.methods.quantize import QuantizeName
from litgpt.model.devices import Accelerator, PrecisionName, share_threads
from litgpt.text.chat_template import clock_at, now

if TYPE_CHECKING:
    from litgpt.evaluation.compare import Difference

DTYPES: dict[str, PrecisionName] = {"float32": "32-true", "bfloat16": "bf16-true", "float16": "16-true"}


def main(
    checkpoint_dir: Optional[Path] = None,
    tasks: Union[str, list[str], None] = None,
    out_dir: Optional[Path] = None,
    force_conversion: bool = False,
    num_fewshot: Optional[int] = None,
    batch_size: Union[int, str] = "auto",
    device: Optional[str] = None,
    dtype: Optional[str] = None,
    limit: Optional[float] = None,
    seed: int = 1234,
    save_filepath: Optional[Path] = None,
    overwrite: bool = False,
    access_token: Optional[str] = None,
    include_path: Union[Path, list[Path], None] = None,
    apply_chat_template: bool = False,
    log_samples: bool = False,
    vs: Optional[Literal["base"]] = None,
    fail_if_drop: Optional[str] = None,
    precision: Optional[PrecisionName] = None,
    quantize: Optional[QuantizeName] = None,
    base: Optional[Path] = None,
) -> None:
    """Evaluate a model on the tasks of lm-eval, with lm-eval's own harness.

    If the data of a task are not available, nothing is run.

    Args:
        checkpoint_dir: A base, adapter or merged folder, or its name under checkpoints/. `list` without tasks shows all
            tasks.
        tasks: Tasks, groups or tags, as a,b; patterns such as blimp_*; or YAML files that define tasks. `list` shows
            all tasks, `"list WORD WORD"` those whose names contain the words.
        out_dir: Folder for results.json; by default the folder `evaluate` in the model folder.
        force_conversion: Ignored: models are not converted.
        num_fewshot: Examples before each question, instead of the task's default.
        batch_size: Number of texts that are read or answered at once, or auto to choose by the device. It does not
            change the scores, so the default is auto instead of LitGPT's 1.
        device: cpu, cuda or mps; by default the best available.
        dtype: float32, bfloat16 or float16: the same as --precision 32-true, bf16-true or 16-true.
        limit: Use only this many questions of each task, or this share of them if it is below 1.
        seed: Seed of the few-shot examples and of sampled answers.
        save_filepath: File for the results, instead of results.json in the out_dir.
        overwrite: Replace files that litgpt did not write.
        access_token: Token of the Hugging Face Hub for gated data sets.
        include_path: Folder or list of folders with YAML files that define custom tasks.
        apply_chat_template: Render the questions as conversations, in the style that the model was trained with or by
            its chat template.
        log_samples: Also write samples_TASK.jsonl: each question with its answers and their scores.
        vs: `base` also evaluates the base of an adapter on the same questions, and prints the differences with paired
            95 % confidence intervals.
        fail_if_drop: With --vs base, exit with 1 if a metric of the adapter is worse than the base's by more than this
            share, for example 2%.
        precision: By default 32-true for weights that are stored so, else bf16-true if the device supports it, else
            16-true on CUDA GPUs, else 32-true.
        quantize: Store the weights of the blocks in 4 or 8 bits with bitsandbytes.
        base: Base model of an adapter, instead of the recorded one.
    """
    require("lm_eval", "evaluate")
    if access_token:
        os.environ["HF_TOKEN"] = access_token  # before the hub's library is imported
    silence_libraries()
    from litgpt.evaluation import compare, run
    from litgpt.evaluation.lm import LitGPT
    from litgpt.evaluation.tasks import find_tasks, listing, load_tasks, split_names

    include = [] if include_path is None else include_path if isinstance(include_path, list) else [include_path]
    words = split_words(tasks)
    if (listed := words_to_list(checkpoint_dir, words)) is not None:
        print(listing(listed, include))
        return
    if checkpoint_dir is None or not words:
        raise UserError("A model folder and --tasks are required. To show all tasks, use litgpt evaluate list.")
    share = compare.read_share(fail_if_drop) if fail_if_drop is not None else None
    check_options(num_fewshot, batch_size, limit, missing_base=share is not None and vs is None)
    precision, accelerator = precision_of(precision, dtype), accelerator_of(device)
    source = ModelSource.open(find_folder(checkpoint_dir), base)
    if vs and source.adapter is None:
        raise UserError(f"--vs base requires an adapter folder; {source.folder} is a complete model.")
    folder = run.writable(save_filepath.parent if save_filepath else out_dir or source.folder / "evaluate")
    file, samples_folder = save_filepath or folder / "results.json", folder if log_samples else None
    run.check_outputs(file, log_samples, overwrite)
    manager, names = find_tasks(split_names(words), include, {"pretrained": str(source.checkpoint.folder)})
    loaded_tasks = load_tasks(manager, names)
    loaded = InferenceModel.open(
        checkpoint_dir, base=base, precision=precision, quantize=quantize, accelerator=accelerator
    )
    if vs:
        loaded.source.check_base()
    share_threads(loaded.model, loaded.device)
    lm = LitGPT(loaded, None if str(batch_size).startswith("auto") else int(batch_size), seed, apply_chat_template)
    hashes = run.model_hashes(loaded.source)
    began, clock = time.perf_counter(), now().isoformat()

    def score(source: ModelSource) -> dict[str, Any]:
        with clock_at(clock):  # the same questions for adapter and base
            results = run.evaluate(lm, manager, loaded_tasks, num_fewshot=num_fewshot, limit=limit, seed=seed)
        run.describe(results, source, hashes, time.perf_counter() - began)
        return results

    results = score(loaded.source)
    print(run.tables(results))
    differences = []
    if vs:
        with loaded.source.without_adapter(loaded.model):
            base_results = score(ModelSource.open(loaded.source.checkpoint.folder))
        known = manager.load(loaded_tasks)
        differences = compare.compare(base_results, results, tasks=known["tasks"], groups=known["groups"], seed=seed)
        results["vs_base"] = compare.as_fields(differences)
        print(compare.table(differences))
        run.write_results(base_results, file, samples_folder, "_base")
    run.write_results(results, file, samples_folder)
    print(f"results  {file}")
    exit_if_dropped(differences, share)


def words_to_list(checkpoint_dir: Optional[Path], tasks: list[str]) -> Optional[list[str]]:
    """The words of a search for tasks: `--tasks "list WORD"`, or `list` in the place of the model. None: no search."""
    if str(checkpoint_dir) == "list" and not tasks and local_folder(Path("list")) is None:
        return []
    if tasks[:1] != ["list"]:
        return None
    return [*tasks[1:], *([str(checkpoint_dir)] if checkpoint_dir and not checkpoint_dir.exists() else [])]


def exit_if_dropped(differences: Sequence["Difference"], share: Optional[float]) -> None:
    """Exit with 1 if a metric is worse than the base's by more than a share of it."""
    dropped = [d for d in differences if share is not None and d.drop > share]
    for d in dropped:
        print(f"litgpt: {d.task} {d.metric} dropped by {d.drop:.1%} of the base's score.", file=sys.stderr)
    if dropped:
        sys.exit(1)


def split_words(tasks: Union[str, list[str], None]) -> list[str]:
    """The names in `--tasks`, which commas and spaces separate."""
    several = [tasks] if isinstance(tasks, str) else tasks or []
    return [word for text in several for word in text.replace(",", " ").split()]


def silence_libraries() -> None:
    """Hide messages and progress bars of lm-eval and its libraries."""
    for name in ("lm_eval", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def check_options(
    num_fewshot: Optional[int], batch_size: Union[int, str], limit: Optional[float], missing_base: bool
) -> None:
    wrong = []
    if not re.fullmatch(r"auto(:.*)?|0*[1-9][0-9]*", str(batch_size)):  # lm-eval has auto:N
        wrong.append(f"--batch_size {batch_size} must be above 0, or auto")
    if num_fewshot is not None and num_fewshot < 0:
        wrong.append(f"--num_fewshot {num_fewshot} must not be negative")
    if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit))):
        wrong.append(f"--limit {limit} must be an integer or a share between 0 and 1")
    if missing_base:
        wrong.append("--fail_if_drop requires --vs base")
    if wrong:
        raise UserError("; ".join(wrong) + ".")


def precision_of(precision: Optional[PrecisionName], dtype: Optional[str]) -> Optional[PrecisionName]:
    if dtype is None:
        return precision
    name = dtype.removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}.{nearest(name, DTYPES)}")
    if precision not in (None, DTYPES[name]):
        raise UserError(f"--dtype {dtype} and --precision {precision} contradict each other. Pass one of them.")
    return DTYPES[name]


def accelerator_of(device: Optional[str]) -> Accelerator:
    kind, _, number = (device or "auto").partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or number not in ("", "0"):
        raise UserError(f"--device {device}: choose from cpu, cuda, mps. To use another GPU, set CUDA_VISIBLE_DEVICES.")
    return kind  # type: ignore[return-value]
