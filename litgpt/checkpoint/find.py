"""Finding a model folder by its path or name. A missing model is downloaded first."""

import time
from pathlib import Path
from typing import Optional

from litgpt.checkpoint.hub import CHECKPOINTS, PICO, local_rank, offline, repository_id, repository_named
from litgpt.errors import UserError, nearest
from litgpt.model.config import known_models
from litgpt.storage.outputs import SINGLE

WEIGHTS = (".safetensors", ".bin", ".pth", ".index.json")  # endings of files that have weights, or list them
WAIT = 60  # seconds that other ranks wait if nobody downloads


def find_folder(path: Path, weights: bool = True) -> Path:
    """The folder that `path` names: itself, or the model of that name under `checkpoints/`.

    A name that looks like a model on the hub, `ORG/NAME` or that of a known model, is downloaded if it is missing.

    Without `weights`, only the tokenizer and `config.json` are. Raises `UserError`, which suggests a similar name, if
    there is no such folder and no such model.
    """
    if (found := local_folder(path)) is not None:
        own_id = repository_id(found)
        is_here = own_id is not None and found.resolve() == (CHECKPOINTS / own_id).resolve()
        if weights and is_here and lacks_weights(found) and not offline():
            return fetched(str(own_id), weights)  # a plan or a check of rows has downloaded the rest
        return found
    repo_id = repository_named(str(path))
    if path.exists():
        raise UserError(f"{path} is a file. Expected a model folder (with config.json and *.safetensors).")
    near = [str(p.relative_to(CHECKPOINTS)) for p in CHECKPOINTS.glob("*/*") if p.is_dir()]
    if path.parent.is_dir():
        near += [str(path.parent / p.name) for p in path.parent.iterdir() if p.is_dir()]
    hint = nearest(str(path), [name for name in near if not name.endswith(".partial")])
    nowhere = f"No model folder {str(path)!r}, and none of that name under checkpoints/"
    if repo_id is None:
        if not hint and len(path.parts) == 1:
            hint = nearest(str(path), [PICO.name, *known_models()]) or " To download a model, use ORG/NAME."
        if path.parent.parent == CHECKPOINTS:
            hint += f" To download it: litgpt download {'/'.join(path.parts[-2:])}"
        raise UserError(f"{nowhere}.{hint}")
    if offline():
        raise UserError(f"{nowhere}. It is not downloaded because HF_HUB_OFFLINE is set.{hint}")
    return fetched(repo_id, weights)


def local_folder(path: Path) -> Optional[Path]:
    """The folder that `path` names, if it is on this machine."""
    repo_id = repository_named(str(path))
    for candidate in (path, CHECKPOINTS / path, *([CHECKPOINTS / repo_id] if repo_id else [])):
        if candidate.is_dir():
            return candidate
    is_pico = str(path) == PICO.name or path.parts[-2:] == ("litgpt", PICO.name)  # where it was in earlier versions
    return PICO if is_pico else None


def lacks_weights(folder: Path) -> bool:
    """Whether this is a model that was downloaded without its weights."""
    is_model = (folder / SINGLE).is_file() and (folder / "config.json").is_file()
    return is_model and not any(path.name.endswith(WEIGHTS) for path in folder.iterdir())


def fetched(repo_id: str, weights: bool) -> Path:
    """Download a model and return its folder. The first process on each machine downloads, the others wait."""
    from litgpt.checkpoint.download import alone, download, say

    target = CHECKPOINTS / repo_id
    if local_rank() == 0:
        reason = "its weights are missing" if target.is_dir() else "there is no folder of that name"
        say(f"Downloading {repo_id} to {target}, because {reason}.")
        return download(repo_id, tokenizer_only=not weights)
    until = time.monotonic() + WAIT
    while not target.is_dir() or (weights and lacks_weights(target)):
        if time.monotonic() > until:
            with alone(target):  # until the download ends
                pass
            if not target.is_dir() or (weights and lacks_weights(target)):
                raise UserError(f"The first process did not download {repo_id}.")
        time.sleep(1)
    return target
