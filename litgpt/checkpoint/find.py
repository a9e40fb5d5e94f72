"""Finding a model folder by its path or its name; a model that is not here is downloaded first."""

import time
from pathlib import Path

from litgpt.checkpoint.hub import CHECKPOINTS, PICO, local_rank, offline, repository_named
from litgpt.errors import UserError, nearest
from litgpt.model.config import known_models

WAIT = 60  # seconds that other ranks wait where nobody downloads


def find_folder(path: Path, weights: bool = True) -> Path:
    """The folder that `path` means: itself, or the model of that name under `checkpoints/`.

    What looks like a model of the hub, `ORG/NAME` or the name of a known one, is downloaded if it is not there.

    Args:
        path: As the user typed it.
        weights: Whether they are wanted, or only tokenizer and `config.json`.

    Raises:
        UserError: there is no such folder, and no such model; the message names a near one.
    """
    repo_id = repository_named(str(path))
    for candidate in (path, CHECKPOINTS / path, *([CHECKPOINTS / repo_id] if repo_id else [])):
        if candidate.is_dir():
            return candidate
    if str(path) == PICO.name or path.parts[-2:] == ("litgpt", PICO.name):  # where it was in earlier versions
        return PICO
    if path.exists():
        raise UserError(f"{path} is a file; a model folder (with config.json and *.safetensors) is wanted.")
    near = [str(p.relative_to(CHECKPOINTS)) for p in CHECKPOINTS.glob("*/*") if p.is_dir()]
    if path.parent.is_dir():
        near += [str(path.parent / p.name) for p in path.parent.iterdir() if p.is_dir()]
    hint = nearest(str(path), [name for name in near if not name.endswith(".partial")])
    nowhere = f"No model folder {str(path)!r}, and none of that name under checkpoints/"
    if repo_id is None:
        if not hint and len(path.parts) == 1:
            hint = nearest(str(path), [PICO.name, *known_models()]) or " A model to download is named as ORG/NAME."
        if path.parent.parent == CHECKPOINTS:
            hint += f" To fetch it: litgpt download {'/'.join(path.parts[-2:])}"
        raise UserError(f"{nowhere}.{hint}")
    if offline():
        raise UserError(f"{nowhere}; HF_HUB_OFFLINE is set, so it is not downloaded.{hint}")
    return fetched(repo_id, weights)


def fetched(repo_id: str, weights: bool) -> Path:
    """The folder of a model that is downloaded now: by the first process of a machine, the others wait."""
    from litgpt.checkpoint.download import alone, download, say

    target = CHECKPOINTS / repo_id
    if local_rank() == 0:
        say(f"no folder {repo_id} is here; downloading the model of that name to {target}")
        return download(repo_id, tokenizer_only=not weights)
    until = time.monotonic() + WAIT
    while not target.is_dir():
        if time.monotonic() > until:
            with alone(target):  # as long as somebody downloads
                pass
            if not target.is_dir():
                raise UserError(f"{repo_id} was not downloaded by the first process.")
        time.sleep(1)
    return target
