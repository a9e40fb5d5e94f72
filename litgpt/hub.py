"""Finding a model folder by its path or its name."""

from pathlib import Path

from litgpt.errors import UserError, nearest

CHECKPOINTS = Path("checkpoints")
PICO = Path(__file__).parent / "pico"  # the model that comes with the package


def find_folder(path: Path) -> Path:
    """The folder that `path` means: itself, or the model of that name under `checkpoints/`.

    Raises:
        UserError: there is no such folder; the message names a near one.
    """
    for candidate in (path, CHECKPOINTS / path):
        if candidate.is_dir():
            return candidate
    if str(path) == PICO.name:
        return PICO
    if path.exists():
        raise UserError(f"{path} is a file; a model folder (with config.json and *.safetensors) is wanted.")
    known = [str(p.relative_to(CHECKPOINTS)) for p in CHECKPOINTS.glob("*/*") if p.is_dir()]
    if path.parent.is_dir():
        known += [str(path.parent / p.name) for p in path.parent.iterdir() if p.is_dir()]
    hint = nearest(str(path), known)
    raise UserError(f"No model folder {str(path)!r}, and none of that name under checkpoints/.{hint}")


def repository_id(folder: Path) -> str | None:
    """`organization/name` for a folder that lies under `checkpoints/` as downloads do, else None."""
    parts = folder.resolve().parts
    return "/".join(parts[-2:]) if parts[-3:-2] == (CHECKPOINTS.name,) else None
