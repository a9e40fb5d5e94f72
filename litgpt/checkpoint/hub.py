"""The names of models and of their folders, also on the Hugging Face hub, without the hub's library."""

import os
import re
from pathlib import Path

from litgpt.model.config import known_models

CHECKPOINTS = Path("checkpoints")
PICO = Path(__file__).parent / "pico"  # the model in the package
RESULTS = ("final", "best")  # folders in the output folder of a run
NO_ORGANIZATIONS = ("checkpoints", "out", "data")  # first parts of paths that people type


def repository_named(name: str) -> str | None:
    """The repository that a name means: that of a known model, ignoring case, or the name itself if it looks like
    `ORG/NAME` and not like a path; else None."""
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
    """Whether `HF_HUB_OFFLINE` forbids downloads."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def local_rank() -> int:
    """The rank of this process on its machine if a launcher started several, else 0."""
    found = (os.environ.get(name, "") for name in ("LOCAL_RANK", "SLURM_LOCALID"))
    return next((int(value) for value in found if re.fullmatch(r"[0-9]{1,9}", value)), 0)


def repository_id(folder: Path) -> str | None:
    """`ORG/NAME` of a folder `checkpoints/ORG/NAME`, else None."""
    parts = folder.resolve().parts
    return "/".join(parts[-2:]) if parts[-3:-2] == (CHECKPOINTS.name,) else None


def display_name(folder: Path) -> str:
    """The name of a model for people and requests: that of its folder. The result of a run, also merged, has the name
    of the run, which is that of its output folder: `out/support/final` is "support"."""
    *_, parent, name = ("", *folder.resolve().parts)
    stem = name.removesuffix("-merged")
    if stem in RESULTS and parent.strip("/\\"):
        name = parent
    elif re.fullmatch(r"step-\d+", stem):
        name = f"{parent}-{stem}"
    return name.encode(errors="replace").decode()  # it may not be UTF-8
