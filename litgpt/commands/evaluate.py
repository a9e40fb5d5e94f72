"""`litgpt evaluate`"""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Optional, Union

from litgpt.checkpoint.find import find_folder, local_folder
from litgpt.cli.parser import parse
from litgpt.data.data_module import DataModule, TokenizedDataset, Unit
from litgpt.data.named import Alpaca
from litgpt.errors import UserError, nearest, reason, require
from litgpt.evaluation import compare, rows
from litgpt.evaluation.compare import Difference
from litgpt.evaluation.results import check_outputs, describe, model_hashes, writable
from litgpt.evaluation.rows import RowScorer
from litgpt.generate.inference_model import InferenceModel
from litgpt.methods.model_source import ModelSource
from litgpt.methods.quantize import QuantizeName
from litgpt.model.devices import Accelerator, PrecisionName, share_threads
from litgpt.model.gpt import GPT
from litgpt.storage.files import read_yaml
from litgpt.storage.outputs import SUMS, is_locked, write_single
from litgpt.text.prompt_style import clock_at, now
from litgpt.train.faults import spared
from litgpt.train.inbox import LOCK
from litgpt.train.metrics import METRICS
from litgpt.train.progress import Screen
from litgpt.train.resume.folder import HYPERPARAMETERS
from litgpt.train.run_report.page import write_report
from litgpt.train.runs import RESULTS

DTYPES: dict[str, PrecisionName] = {"float32": "32-true", "bfloat16": "bf16-true", "float16": "16-true"}
REMEDY = "Pass rows with --data FILE, or tasks with --tasks."
OF_RUN = ("train.max_seq_length", "train.pack", "eval.max_new_tokens", "eval.exact_match", "precision", "quantize")


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
    data: Optional[DataModule] = None,
    exact_match: Optional[int] = None,
    vs: Optional[Literal["base"]] = None,
    fail_if_drop: Optional[str] = None,
    precision: Optional[PrecisionName] = None,
    quantize: Optional[QuantizeName] = None,
    base: Optional[Path] = None,
) -> None:
    """Evaluate a model on rows, or on the tasks of lm-eval with lm-eval's own harness.

    Without --tasks and --data, a result is evaluated on the validation rows of its run. If the data of a task are not
    available, nothing is run.

    Args:
        checkpoint_dir: A base, adapter or merged folder, or its name under checkpoints/. `list` without tasks shows all
            tasks.
        tasks: Tasks, groups or tags, as a,b; patterns such as blimp_*; or YAML files that define tasks. `list` shows
            all tasks, `"list WORD WORD"` those whose names contain the words.
        out_dir: Folder for results.json; by default the folder `evaluate` in the model folder.
        force_conversion: Ignored: models are not converted.
        num_fewshot: Examples before each question, instead of the task's default.
        batch_size: Number of texts that are read or answered at once, or auto to choose by the device. It does not
            change the scores, so the default is auto instead of LitGPT's 1. Rows are read one by one.
        device: cpu, cuda or mps; by default the best available.
        dtype: float32, bfloat16 or float16: the same as --precision 32-true, bf16-true or 16-true.
        limit: Use only this many rows, or questions of each task, or this share of them if it is below 1.
        seed: Seed of the few-shot examples and of sampled answers.
        save_filepath: File for the results, instead of results.json in the out_dir.
        overwrite: Replace files that litgpt did not write.
        access_token: Token of the Hugging Face Hub for gated data sets.
        include_path: Folder or list of folders with YAML files that define custom tasks.
        apply_chat_template: Render the questions as conversations, in the style that the model was trained with or by
            its chat template.
        log_samples: Also write samples_TASK.jsonl: each question with its answers and their scores.
        data: Rows on which to measure the loss per target token and the perplexity: files, or a data set, as for a
            finetune. Only the validation rows, if the data has any.
        exact_match: Answer this many of the rows and report the fraction that matches exactly. By default as in the
            run, if these are its validation rows.
        vs: `base` also evaluates the base of an adapter on the same questions or rows, and prints the differences with
            paired 95 % confidence intervals. On rows also for the result of a full finetune.
        fail_if_drop: With --vs base, exit with 1 if a metric of the adapter is worse than the base's by more than this
            share, for example 2%.
        precision: By default that of the run for its validation rows, else 32-true for weights that are stored so, else
            bf16-true if the device supports it, else 16-true on CUDA GPUs, else 32-true.
        quantize: Store the weights of the blocks in 4 or 8 bits with bitsandbytes; mxfp4 keeps the
            experts of gpt-oss in the 4 bits of its files.
        base: Base model of an adapter, instead of the recorded one.
    """
    if access_token:
        os.environ["HF_TOKEN"] = access_token  # before the hub's library is imported
    include = [] if include_path is None else include_path if isinstance(include_path, list) else [include_path]
    words = split_words(tasks)
    if (listed := words_to_list(checkpoint_dir, words)) is not None:
        print_tasks(listed, include)
        return
    if checkpoint_dir is None:
        raise UserError("A model folder is required. To show all tasks, use litgpt evaluate list.")
    of_tasks = {"num_fewshot": num_fewshot, "include_path": include, "log_samples": log_samples}
    check_kind(
        words, {"data": data, "exact_match": exact_match}, of_tasks | {"apply_chat_template": apply_chat_template}
    )
    share = compare.read_share(fail_if_drop) if fail_if_drop is not None else None
    check_options(num_fewshot, batch_size, limit, exact_match, missing_base=share is not None and vs is None)
    precision, accelerator = precision_of(precision, dtype), accelerator_of(device)
    source = ModelSource.open(find_folder(checkpoint_dir), base)
    if vs and source.adapter is not None:
        source.check_base()
    elif vs and (words or recorded_base(source.folder) is None):
        raise UserError(f"--vs base requires an adapter folder; {source.folder} is a complete model.")
    if not words and data is None and not is_result(source.folder):
        raise UserError(f"{source.folder} does not record the rows of a run. {REMEDY}")
    folder = writable(save_filepath.parent if save_filepath else out_dir or source.folder / "evaluate")
    file = save_filepath or folder / "results.json"
    check_outputs(file, log_samples, overwrite)
    common: dict[str, Any] = {"source": source, "file": file, "vs": vs, "limit": limit}
    loading = {"precision": precision, "quantize": quantize, "accelerator": accelerator}
    if words:
        batch = None if str(batch_size).startswith("auto") else int(batch_size)
        lm_options = {"batch": batch, "seed": seed, "chat": apply_chat_template}
        differences = on_tasks(words, include, loading, lm_options, num_fewshot, log_samples, **common)
    else:
        differences = on_rows(data, loading, exact_match, **common)
    print(f"results  {file}")
    if file == source.folder / RESULTS and is_result(source.folder):
        refresh_report(source.folder)
    exit_if_dropped(differences, share)


def on_tasks(
    tasks: list[str],
    include: list[Path],
    loading: dict[str, Any],
    lm_options: dict[str, Any],
    num_fewshot: Optional[int],
    log_samples: bool,
    *,
    source: ModelSource,
    file: Path,
    vs: Optional[str],
    limit: Optional[float],
) -> list[Difference]:
    """Evaluate on lm-eval's tasks, print and write the results, and return the differences to the base."""
    require("lm_eval", "evaluate")
    silence_libraries()
    from litgpt.evaluation import run
    from litgpt.evaluation.lm import LitGPT
    from litgpt.evaluation.tasks import find_tasks, load_tasks, split_names

    samples_folder, seed = file.parent if log_samples else None, lm_options["seed"]
    manager, names = find_tasks(split_names(tasks), include, {"pretrained": str(source.checkpoint.folder)})
    loaded_tasks = load_tasks(manager, names)
    loaded = InferenceModel.open(source, **loading)
    share_threads(loaded.model, loaded.device)
    lm = LitGPT(loaded, **lm_options)
    hashes = model_hashes(source)
    began, clock = time.perf_counter(), now().isoformat()

    def score(source: ModelSource) -> dict[str, Any]:
        with clock_at(clock):  # the same questions for adapter and base
            results = run.evaluate(lm, manager, loaded_tasks, num_fewshot=num_fewshot, limit=limit, seed=seed)
        describe(results, source, hashes, time.perf_counter() - began)
        return results

    results = score(source)
    print(run.tables(results))
    differences = []
    if vs:
        with source.without_adapter(loaded.model):
            base_results = score(ModelSource.open(source.checkpoint.folder))
        known = manager.load(loaded_tasks)
        differences = compare.compare(base_results, results, tasks=known["tasks"], groups=known["groups"], seed=seed)
        results["vs_base"] = compare.as_fields(differences)
        print(compare.table(differences))
        run.write_results(base_results, file, samples_folder, "_base")
    run.write_results(results, file, samples_folder)
    return differences


def on_rows(
    data: Optional[DataModule],
    loading: dict[str, Any],
    exact_match: Optional[int],
    *,
    source: ModelSource,
    file: Path,
    vs: Optional[str],
    limit: Optional[float],
) -> list[Difference]:
    """Evaluate on rows, print and write the results, and return the differences to the base."""
    began, screen = time.perf_counter(), Screen(active=True)
    dataset, options = rows_of_run(source, screen) if data is None else given_rows(source, data, screen)
    usable = dataset.val if len(dataset.val) else dataset.train.unweighted()
    if dataset.unit == "label":
        usable = usable.subset((~usable.is_rejected()).nonzero().squeeze(1))
    chosen = rows.first(usable, limit)
    n_answers = exact_match or options.eval.exact_match or 0
    scorer = RowScorer(chosen, dataset, source.tokenizer(), n_answers, options.eval.max_new_tokens or 100)
    own = {"precision": options.precision, "quantize": options.quantize}
    loading = {name: value or own.get(name) for name, value in loading.items()}
    loaded = InferenceModel.open(source, **loading)
    share_threads(loaded.model, loaded.device)
    scores, differences = scorer.score(loaded.model, screen), list[Difference]()
    results = rows.as_results(scores, len(usable), loaded.model.dtype)
    describe(results, source, model_hashes(source), time.perf_counter() - began)
    noun = {"row": "row", "pair": "pair", "label": "desirable answer"}[dataset.unit]
    kind = f"{'validation ' * bool(len(dataset.val))}{noun}{'s' * (len(usable) > 1)}" + " of the run" * (data is None)
    share = f"{len(chosen):,} of " * (len(chosen) < len(usable))
    trained = "answers" if dataset.mask_prompt else "prompts and answers"
    trained = "chosen answers" if dataset.unit == "pair" else trained
    screen.table(
        f"litgpt evaluate {source.folder}",
        {
            "rows": f"{share}{len(usable):,} {kind}, {sum(scores.counts):,} target tokens",
            "prompt style": f"{dataset.style.name}; loss on {trained}",
            **({} if vs else rows.describe(scores)),
        },
    )
    if vs:
        with base_model(loaded, loading) as model:
            base_scores = scorer.score(model, screen)
        differences = rows.differences(base_scores, scores)
        results["vs_base"] = compare.as_fields(differences)
        screen.say(rows.table(differences))
        if scores.rejected:
            gains = scores.gains(base_scores)
            results["results"][rows.TASK]["reward_accuracy,none"] = fmean(gains)
            screen.say(f"reward accuracy, over the base: {rows.counted(gains)}")
    write_single(file, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return differences


@contextmanager
def base_model(loaded: InferenceModel, loading: dict[str, Any]) -> Iterator[GPT]:
    """The model before its training: without its adapter, or, if it is complete, what its run started from."""
    if loaded.source.adapter is not None:
        with loaded.source.without_adapter(loaded.model):
            yield loaded.model
    else:
        yield InferenceModel.open(Path(str(recorded_base(loaded.source.folder))), **loading).model


def recorded_base(folder: Path) -> Optional[str]:
    """The model that the run of a result started from, if its settings name one."""
    return read_yaml(folder / HYPERPARAMETERS).get("checkpoint_dir") if is_result(folder) else None


def is_result(folder: Path) -> bool:
    """Whether a run of ours wrote a folder and recorded its settings. LitGPT holds out other rows."""
    return (folder / HYPERPARAMETERS).is_file() and (folder / SUMS).is_file()


def refresh_report(result: Path) -> None:
    """Write the report of the run that wrote a result, now with its scores. One that is running does so at its end."""
    run = result.absolute().parent
    if (run / METRICS).is_file() and not is_locked(run / LOCK):
        with spared("Cannot write the report"):
            wanted = read_yaml(result / HYPERPARAMETERS).get("report", True)
            if wanted and (written := write_report(run)):
                print(f"report   {os.path.relpath(written)}")


def is_preference(result: Path) -> bool:
    """Whether the run that wrote a result trained preferences."""
    return bool(read_yaml(result / HYPERPARAMETERS).get("preference"))


def unit_of(data: DataModule) -> Unit:
    """What a row is, by the first one."""
    form, _ = data.first_form(data.sources()[0], checks=True)
    units: dict[str, Unit] = {"preference": "pair", "ranked": "pair", "label": "label"}
    return units.get(form, "row")


def given_rows(source: ModelSource, data: DataModule, screen: Screen) -> tuple[TokenizedDataset, rows.Options]:
    """All rows of files, or the validation rows of data that have or hold out some."""
    options = rows.Options(data)
    if is_result(source.folder) and is_preference(source.folder):
        data.unit = unit_of(data)
    if data.val_split_fraction is None:
        data.val_split_fraction = 0
    dataset = rows.load_rows(source, data, options.train, screen)
    for note in dataset.notes():
        screen.say(note)
    return dataset, options


def rows_of_run(source: ModelSource, screen: Screen) -> tuple[TokenizedDataset, rows.Options]:
    """The rows of the run that wrote a folder, and its options. Raises `UserError` if there are none for validation."""
    try:
        options = options_of_run(source.folder / HYPERPARAMETERS)
        if options.data is not None and is_preference(source.folder):
            options.data.unit = unit_of(options.data)
        dataset = rows.load_rows(source, options.data or Alpaca(), options.train, screen)
    except (UserError, OSError) as e:
        raise UserError(f"The rows of the run that wrote {source.folder} cannot be read. {REMEDY} ({reason(e)})") from e
    if not len(dataset.val):
        raise UserError(f"The run that wrote {source.folder} had no validation rows. {REMEDY}")
    return dataset, options


def options_of_run(file: Path) -> rows.Options:
    """What the settings of a run say of its rows, parsed as by the command that wrote them."""
    fields = read_yaml(file)
    words = ["--data", json.dumps(fields["data"])] if fields.get("data") else []
    for name in OF_RUN:
        group, _, leaf = name.rpartition(".")
        settings = fields.get(group) if group else fields
        value = settings.get(leaf) if isinstance(settings, dict) else None
        words += [] if value is None else [f"--{name}", str(value)]
    where = f"{rows.Options.__module__}:{rows.Options.__name__}"
    return rows.Options(**copy_context().run(parse, where, "evaluate", words))


def print_tasks(words: list[str], include: list[Path]) -> None:
    require("lm_eval", "evaluate")
    silence_libraries()
    from litgpt.evaluation.tasks import listing

    print(listing(words, include))


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


def check_kind(tasks: list[str], of_rows: dict[str, Any], of_tasks: dict[str, Any]) -> None:
    """Raise `UserError` for options that do not apply to tasks, or to rows."""
    unused = ", ".join(f"--{name}" for name, value in (of_rows if tasks else of_tasks).items() if value)
    if unused and tasks:
        raise UserError(f"{unused} is for rows, and --tasks for lm-eval's tasks. Pass only one of them.")
    if unused:
        raise UserError(f"{unused}: only for lm-eval's tasks, which --tasks names.")


def check_options(
    num_fewshot: Optional[int],
    batch_size: Union[int, str],
    limit: Optional[float],
    exact_match: Optional[int],
    missing_base: bool,
) -> None:
    wrong = []
    if not re.fullmatch(r"auto(:.*)?|0*[1-9][0-9]*", str(batch_size)):  # lm-eval has auto:N
        wrong.append(f"--batch_size {batch_size} must be above 0, or auto")
    if exact_match is not None and exact_match <= 0:
        wrong.append(f"--exact_match {exact_match} must be above 0")
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
