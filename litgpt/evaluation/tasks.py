"""Finds lm-eval's tasks, and loads their data."""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

from lm_eval.tasks import TaskManager

from litgpt.errors import UserError, nearest

FILES = ("json", "csv", "parquet", "text", "arrow")  # names of data sets that stand for files


def new_names(name: str) -> list[str]:
    """The current names of a task of an older lm-eval; usually the name itself."""
    if name == "truthfulqa_mc":
        return ["truthfulqa_mc1", "truthfulqa_mc2"]
    if name in ("hendrycksTest", "hendrycksTest-*", "hendrycksTest*"):
        return ["mmlu"]
    return [re.sub(r"^hendrycksTest-", "mmlu_", name)]


def split_names(tasks: str | Iterable[str]) -> list[str]:
    """The names in `a,b`, `[a, b]` or a list; `UserError` if there is none. Renamed tasks are replaced, with a
    message."""
    text = tasks if isinstance(tasks, str) else ",".join(tasks)
    words = re.split(r"[\s,]+", text.strip().removeprefix("[").removesuffix("]"))
    names = [word.strip("'\"") for word in words if word]
    if not names:
        raise UserError("--tasks is empty. Name the tasks, for example --tasks a,b; --tasks list shows all of them.")
    renamed = {name: new_names(name) for name in names if new_names(name) != [name]}
    if renamed:
        changes = ", ".join(f"{old} is {' and '.join(new)}" for old, new in renamed.items())
        print(f"litgpt: tasks were renamed: {changes}.", file=sys.stderr)
    return list(dict.fromkeys(new for name in names for new in renamed.get(name, [name])))


def find_tasks(
    names: Sequence[str], include: Sequence[Path], metadata: Optional[dict[str, Any]] = None
) -> tuple[TaskManager, list[str]]:
    """A manager of the tasks, and their names with patterns such as `blimp_*` expanded. Raises `UserError` if a task or
    a folder does not exist.

    The tasks in the folders `include` override lm-eval's of the same name. `metadata` is what tasks may know about the
    model; some create their texts with its tokenizer.
    """
    missing = [str(folder) for folder in include if not folder.is_dir()]
    if missing:
        raise UserError(f"--include_path {', '.join(missing)}: the folder does not exist.")
    folders: list[Any] = [str(folder) for folder in include]
    # without lm-eval's own tasks, which take seconds to read
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if any(not matches(manager, name) for name in names):
        manager = TaskManager(include_path=folders, metadata=metadata)
    found = {name: matches(manager, name) for name in names}
    unknown = [name for name, matching in found.items() if not matching]
    if unknown:
        hints = "".join(nearest(name, manager.all_tasks) for name in unknown[:1])
        raise UserError(
            f"Unknown tasks: {', '.join(unknown)}.{hints} To show all tasks, use litgpt evaluate --tasks list."
        )
    return manager, list(dict.fromkeys(task for matching in found.values() for task in matching))


def matches(manager: TaskManager, name: str) -> list[str]:
    if name in manager.task_index or (Path(name).suffix == ".yaml" and Path(name).is_file()):
        return [name]
    return manager.match_tasks([name]) if set(name) & set("*?[") else []


def load_tasks(manager: TaskManager, names: Sequence[str]) -> list[Any]:
    """The tasks and groups with their data. Raises `UserError` if data are not available (the message lists all of
    them), or a task would run twice, by itself and in a group."""
    loaded, missing = list[Any](), list[str]()
    for name in names:
        try:
            found = manager._load_spec(name)
            loaded += found if isinstance(found, list) else [found]
        except UserError:
            raise
        except Exception as e:  # data sets raise anything
            missing.append(f"{name}: {problem_of(manager, name, e)}")
            stay_offline(e)
    if missing:
        tasks = f"{len(missing)} of {len(names)} tasks"
        raise UserError(f"Nothing was run, because {tasks} cannot be loaded: {'; '.join(missing)}.")
    try:
        manager.load(loaded)
    except ValueError as e:
        raise UserError(f"--tasks: {e}.") from e
    return loaded


def problem_of(manager: TaskManager, name: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    data = data_of(manager, name)
    if isinstance(error, (ImportError, KeyError, TypeError, AttributeError)) or not data:
        return f"the task is not valid ({type(error).__name__}: {reason})"
    return f"the data set {data} is not available ({reason})"


def data_of(manager: TaskManager, name: str) -> str:
    """The data set of a task, or of the first task of a group, as named in its definition."""
    entry = manager.task_index.get(name)
    fields = (entry.cfg or {}) if entry is not None else {}
    path = fields.get("dataset_path")
    if not path:
        inner = fields.get("task")
        below = [*(inner if isinstance(inner, list) else []), *sorted(entry.tags if entry is not None else ())]
        below = [task if isinstance(task, str) else str(task.get("task") or task.get("group")) for task in below]
        return next((found for task in below if task != name and (found := data_of(manager, task))), "")
    if path in FILES:
        files = (fields.get("dataset_kwargs") or {}).get("data_files")
        return ", ".join(texts_in(files)) or path
    return f"{path} ({fields['dataset_name']})" if fields.get("dataset_name") else str(path)


def texts_in(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for inner in value for text in texts_in(inner)]
    return [str(value)] if value else []


def stay_offline(error: Exception) -> None:
    """Without a connection, let further data sets fail at once instead of retrying. Cached ones are still found."""
    if "Connect" in type(error).__name__ or isinstance(error, ConnectionError):
        import datasets
        import huggingface_hub

        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True


def listing(words: Sequence[str], include: Sequence[Path], limit: Optional[int] = None) -> str:
    """The names of tasks, groups and tags that contain all of these words, one per line."""
    manager = TaskManager(include_path=[str(folder) for folder in include])
    kinds = {name: entry.kind.name.lower().removeprefix("py_") for name, entry in manager.task_index.items()}
    chosen = sorted(name for name in kinds if all(word.lower() in name.lower() for word in words))
    if not chosen:
        raise UserError(f"No task name contains {' and '.join(words)}.{nearest(words[0], kinds)}")
    lines = [f"{name}  ({kinds[name]})" if kinds[name] != "task" else name for name in chosen[:limit]]
    return "\n".join(lines)
