"""`litgpt rerun`"""

import os
import sys
from pathlib import Path
from typing import Any, Optional

from litgpt.checkpoint.find import find_folder
from litgpt.cli.commands import COMMANDS, spoken
from litgpt.cli.parser import load, parse
from litgpt.data.named import or_alpaca
from litgpt.errors import UserError, remark
from litgpt.storage.files import read_yaml
from litgpt.train.args import repeated
from litgpt.train.base_model import BaseModel
from litgpt.train.metrics import is_event
from litgpt.train.resume.folder import HYPERPARAMETERS
from litgpt.train.run_lock import LOCK, data_hashes, files_of, losses, read_lock, versions


def main(run: Path, out_dir: Optional[Path] = None, force: bool = False) -> None:
    """Repeat a finished run, and compare its losses.

    Reads run.lock in the result: another base model or other rows are errors, other package versions are remarks. Exits
    with 1 if the losses differ. On the same machine and with the same versions, they are equal to the last bit. What
    litgpt ctl changed in the run happens at the same steps.

    Args:
        run: The output folder of a run, or its result.
        out_dir: Output folder. Default: the name of the run with -again appended.
        force: Repeat the run even with another base model or other rows.
    """
    final = run / "final" if (run / "final" / LOCK).is_file() else run
    lock = read_lock(final)
    if lock is None:
        raise UserError(f"{run} has no {LOCK}. Pass the output folder of a finished run of this version of litgpt.")
    config, command = final / HYPERPARAMETERS, lock.get("command")
    if command not in COMMANDS or not config.is_file():
        raise UserError(f"{final} was not made by a command, so it cannot be repeated.")
    origin = Path(os.path.relpath(final.resolve().parent))
    out_dir = out_dir or origin.with_name(f"{origin.name}-again")
    where = COMMANDS[command][0]
    arguments = parse(where, command, ["--config", str(config), "--out_dir", str(out_dir)])
    problems = changed_base(lock, read_yaml(config)) + changed_rows(lock, arguments.get("data"))
    for problem in problems if force else ():
        remark(problem)
    if problems and not force:
        raise UserError(
            f"The run in {run} cannot be repeated as it was.", [*problems, "To run it anyway: --force true"]
        )
    for name, now in changed(lock["versions"], versions()):
        remark(f"{name} was {lock['versions'].get(name, 'not installed')}, and is {now or 'not installed'}.")
    print(f"Repeating litgpt {spoken(command)} from {final} in {out_dir}", flush=True)
    token = repeated.set([event for event in lock.get("events") or [] if is_event(event)])
    try:
        load(where)(**arguments)
    finally:
        repeated.reset(token)
    report(losses(origin) or lock["losses"], losses(out_dir))


def report(then: list[str], now: list[str]) -> None:
    """Print whether the losses are equal, as far as both are known. Exits with 1 if they are not."""
    for step, (a, b) in enumerate(zip(then, now), 1):
        if a != b:
            print(f"Step {step}: the loss was {a}, and is {b}.")
            sys.exit(1)
    if len(then) > len(now):
        print(f"The run had {len(then):,} losses, and has {len(now):,}.")
        sys.exit(1)
    print(f"All {min(len(then), len(now)):,} losses are equal.")


def changed(then: dict[str, str], now: dict[str, str]) -> list[tuple[str, Optional[str]]]:
    return [(name, now.get(name)) for name in {**then, **now} if then.get(name) != now.get(name)]


def changed_base(lock: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """The files of the base model, or of its adapter, that are not those of the run."""
    model = settings.get("checkpoint_dir") or settings.get("initial_checkpoint_dir") or settings.get("model_name")
    if not model:
        return []
    adapter = settings.get("initial_adapter")
    found = BaseModel.from_folder(find_folder(Path(model)), None if adapter is None else Path(adapter))
    base, initial = found.checkpoint, found.initial_adapter
    now = {"model": files_of(base.folder) if base and lock["model"] else {}}
    now["adapter"] = files_of(initial.folder) if initial else {}
    return [
        f"{name} of the {'base model' if kind == 'model' else 'initial adapter'} is another file than in the run."
        for kind, files in now.items()
        for name, _ in changed(lock[kind], files)
    ]


def changed_rows(lock: dict[str, Any], data: Any) -> list[str]:
    """The files of rows that are not those of the run."""
    now = data_hashes(or_alpaca(data))
    if len(now) != len(lock["data"]):
        return [f"The rows come from {len(now)} files, in the run from {len(lock['data'])}."]
    return [
        f"{path} has other rows than in the run."
        for (_, then), (path, digest) in zip(lock["data"], now)
        if then != digest
    ]
