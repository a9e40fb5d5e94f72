"""Runs lm-eval's harness on one model, and writes its results."""

import io
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from functools import partialmethod
from pathlib import Path
from traceback import walk_tb
from typing import Any, Optional

from lm_eval import evaluator
from lm_eval.loggers import EvaluationTracker
from lm_eval.loggers.utils import get_commit_from_path
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, hash_string, make_table, sanitize_list
from tqdm import tqdm

from litgpt.errors import UserError
from litgpt.evaluation.lm import LitGPT
from litgpt.storage.outputs import write_single


def evaluate(
    lm: LitGPT,
    manager: TaskManager,
    tasks: Sequence[Any],
    num_fewshot: Optional[int],
    limit: Optional[float],
    seed: int,
) -> dict[str, Any]:
    """lm-eval's results with the samples, for tasks and groups that `manager` loaded and that can be reused. Raises
    `UserError` if lm-eval refuses them."""
    tracker = EvaluationTracker()
    try:
        with quiet():
            results = evaluator.simple_evaluate(
                lm,
                tasks=list(tasks),
                task_manager=manager,
                num_fewshot=num_fewshot,
                batch_size=lm.batch or "auto",  # for the record
                device=str(lm.device),
                limit=limit,
                apply_chat_template=lm.chat,
                fewshot_as_multiturn=True if lm.chat else None,
                gen_kwargs={},
                evaluation_tracker=tracker,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except (ValueError, AssertionError) as e:
        if any(frame.f_globals["__name__"] == LitGPT.__module__ for frame, _ in walk_tb(e.__traceback__)):
            raise  # an error of the model, not of the tasks
        raise UserError(f"lm-eval refuses: {' '.join(str(e).split()) or type(e).__name__}.") from e
    results["task_hashes"] = {
        name: hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))
        for name, samples in results["samples"].items()
    }
    return results | asdict(tracker.general_config_tracker)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress lm-eval's progress bars and messages, and git's complaint about a missing repository."""
    original_bar, original_commit = tqdm.__init__, evaluator.get_git_commit_hash
    tqdm.__init__ = partialmethod(original_bar, disable=True)  # type: ignore[method-assign]
    evaluator.get_git_commit_hash = git_commit
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = original_bar  # type: ignore[method-assign]
        evaluator.get_git_commit_hash = original_commit


def git_commit() -> Optional[str]:
    """The commit of the working directory, as lm-eval records it; None if there is none."""
    try:
        done = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return get_commit_from_path(os.getcwd())
    return done.stdout.strip()


def write_results(results: dict[str, Any], file: Path, folder: Optional[Path], ending: str = "") -> None:
    """Write the results and, to a folder, `samples_TASK.jsonl` for each task in lm-eval's format: a question with its
    answers and their scores per line. `ending` is added to the names."""
    file = file.with_stem(f"{file.stem}{ending}")
    write_single(file, as_json({name: value for name, value in results.items() if name != "samples"}, 2) + "\n")
    if folder is None:
        return
    for name, samples in results["samples"].items():
        lines = [as_json(uniform(sample), None) for sample in samples]
        write_single(folder / f"samples_{name.replace('/', '__')}{ending}.jsonl", "\n".join(lines) + "\n")


def uniform(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample whose fields have one type each, so that the file can be loaded as a table."""
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(request)}
        for i, request in enumerate(sample["arguments"])
    }
    texts = {name: sanitize_list(sample[name]) for name in ("resps", "filtered_resps")}
    return {**sample, **texts, "arguments": arguments, "target": str(sample["target"])}


def as_json(value: Any, indent: Optional[int]) -> str:
    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False)


def tables(results: dict[str, Any]) -> str:
    groups = [make_table(results, "groups")] if results.get("groups") else []
    return "\n".join([make_table(results), *groups])
