"""Finding a model folder by its path or its name; a model that is not here is downloaded first."""

import os
import re
from pathlib import Path

from litgpt.model.config import known_models

CHECKPOINTS = Path("checkpoints")
PICO = Path(__file__).parent / "pico"  # the model that comes with the package
NO_ORGANIZATIONS = ("checkpoints", "out", "data")  # first parts of paths that people type


def repository_named(name: str) -> str | None:
    """The repository that a name means: that of a known model, in any case, or itself if it looks like `ORG/NAME` and
    not like a path; else None."""
    known = {key.lower(): row["repo_id"] for key, row in known_models().items()}
    known |= {repo_id.lower(): repo_id for repo_id in repositories()}
    if name.lower() in known:
        return known[name.lower()]
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*", name)
    if match is None or match[1] in NO_ORGANIZATIONS or Path(match[1]).exists():
        return None
    return name


def repositories() -> list[str]:
    """The repositories of the known models."""
    return [row["repo_id"] for row in known_models().values()]


def offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids to fetch anything."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def local_rank() -> int:
    """The number of this process on its machine, where a launcher started several."""
    found = (os.environ.get(name, "") for name in ("LOCAL_RANK", "SLURM_LOCALID"))
    return next((int(value) for value in found if re.fullmatch(r"[0-9]{1,9}", value)), 0)


def repository_id(folder: Path) -> str | None:
    """`organization/name` for a folder that lies under `checkpoints/` as downloads do, else None."""
    parts = folder.resolve().parts
    return "/".join(parts[-2:]) if parts[-3:-2] == (CHECKPOINTS.name,) else None
