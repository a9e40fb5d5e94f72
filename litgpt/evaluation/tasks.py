"""Finding lm-eval's tasks, and their data."""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

from lm_eval.tasks import TaskManager

from litgpt.errors import UserError, nearest

FILES = ("json", "csv", "parquet", "text", "arrow")  # what a task names as its data set when its data are files


def new_names(name: str) -> list[str]:
    """What a task of an older lm-eval is called now; the name itself where that did not change."""
    if name == "truthfulqa_mc":
        return ["truthfulqa_mc1", "truthfulqa_mc2"]
    if name in ("hendrycksTest", "hendrycksTest-*", "hendrycksTest*"):
        return ["mmlu"]
    return [re.sub(r"^hendrycksTest-", "mmlu_", name)]


def split_names(tasks: str | Iterable[str]) -> list[str]:
    """The names in `a,b`, `[a, b]` or a list, by their present names; what was renamed is said once.

    Raises:
        UserError: there is none.
    """
    words = tasks if isinstance(tasks, str) else ",".join(tasks)
    given = [word for word in re.split(r"[\s,]+", words.strip().removeprefix("[").removesuffix("]")) if word]
    names = [name.strip("'\"") for name in given]
    if not names:
        raise UserError("--tasks is empty: name one or several tasks, as --tasks a,b; --tasks list shows them.")
    renamed = {name: new_names(name) for name in names if new_names(name) != [name]}
    if renamed:
        said = ", ".join(f"{old} is {' and '.join(new)}" for old, new in renamed.items())
        print(f"litgpt: tasks were renamed: {said}.", file=sys.stderr)
    return list(dict.fromkeys(new for name in names for new in renamed.get(name, [name])))


def find_tasks(
    names: Sequence[str], include: Sequence[Path], metadata: Optional[dict[str, Any]] = None
) -> tuple[TaskManager, list[str]]:
    """What knows the tasks, and their names with patterns such as `blimp_*` filled in.

    Args:
        include: Folders with tasks of one's own, which come before those of the same name in lm-eval.
        metadata: What tasks are told of the model; some make their texts with its tokenizer.

    Raises:
        UserError: there are no such tasks, or no such folder.
    """
    missing = [str(folder) for folder in include if not folder.is_dir()]
    if missing:
        raise UserError(f"--include_path {', '.join(missing)}: no such folder.")
    folders: list[Any] = [str(folder) for folder in include]
    # reading all of lm-eval's own takes seconds
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if any(not matches(manager, name) for name in names):
        manager = TaskManager(include_path=folders, metadata=metadata)
    found = {name: matches(manager, name) for name in names}
    unknown = [name for name, those in found.items() if not those]
    if unknown:
        hints = "".join(nearest(name, manager.all_tasks) for name in unknown[:1])
        raise UserError(f"Unknown tasks: {', '.join(unknown)}.{hints} litgpt evaluate --tasks list shows all.")
    return manager, list(dict.fromkeys(task for those in found.values() for task in those))


def matches(manager: TaskManager, name: str) -> list[str]:
    if name in manager.task_index or (Path(name).suffix == ".yaml" and Path(name).is_file()):
        return [name]
    return manager.match_tasks([name]) if set(name) & set("*?[") else []


def load_tasks(manager: TaskManager, names: Sequence[str]) -> list[Any]:
    """The tasks and groups with their data.

    Raises:
        UserError: data cannot be had; all of them at once. No task is run without the others. Or a task would be run
            twice, by itself and in a group.
    """
    loaded, missing = list[Any](), list[str]()
    for name in names:
        try:
            found = manager._load_spec(name)
            loaded += found if isinstance(found, list) else [found]
        except UserError:
            raise
        except Exception as e:  # each data set fails in its own way
            missing.append(f"{name}: {what_is_missing(manager, name, e)}")
            stay_offline(e)
    if missing:
        raise UserError(
            f"Nothing was run, for {len(missing)} of {len(names)} tasks lack their data: {'; '.join(missing)}."
        )
    try:
        manager.load(loaded)
    except ValueError as e:
        raise UserError(f"--tasks: {e}.") from e
    return loaded


def what_is_missing(manager: TaskManager, name: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    data = data_of(manager, name)
    if isinstance(error, (ImportError, KeyError, TypeError, AttributeError)) or not data:
        return f"cannot be made ({type(error).__name__}: {reason})"
    return f"the data set {data} cannot be had ({reason})"


def data_of(manager: TaskManager, name: str) -> str:
    """The data set of a task, or of a group's first task, as its definition names it."""
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
        return ", ".join(flat(files)) or path
    return f"{path} ({fields['dataset_name']})" if fields.get("dataset_name") else str(path)


def flat(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    return [text for inner in value for text in flat(inner)] if isinstance(value, list) else [str(value)] * bool(value)


def stay_offline(error: Exception) -> None:
    """Where there is no connection, let the next data sets fail at once instead of trying again and again; what is in
    the cache is still found."""
    if "Connect" in type(error).__name__ or isinstance(error, ConnectionError):
        import datasets
        import huggingface_hub

        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True


def listing(words: Sequence[str], include: Sequence[Path], limit: Optional[int] = None) -> str:
    """The names of tasks, groups and tags with all of these words in them, one on a line."""
    manager = TaskManager(include_path=[str(folder) for folder in include])
    kinds = {name: entry.kind.name.lower().removeprefix("py_") for name, entry in manager.task_index.items()}
    chosen = sorted(name for name in kinds if all(word.lower() in name.lower() for word in words))
    if not chosen:
        raise UserError(f"No task has {' and '.join(words)} in its name.{nearest(words[0], kinds)}")
    lines = [f"{name}  ({kinds[name]})" if kinds[name] != "task" else name for name in chosen[:limit]]
    return "\n".join(lines)
