"""`litgpt merge_lora`"""

from pathlib import Path
from typing import Any, Literal, Optional

from litgpt.errors import UserError
from litgpt.export.folder import FolderWriter
from litgpt.methods.merged import MergedWeights
from litgpt.methods.model_source import ModelSource
from litgpt.methods.peft_folder import LoRAFolder
from litgpt.model.devices import DTYPES
from litgpt.storage.files import is_there, read_json
from litgpt.storage.outputs import SUMS, check_replaceable, entry, listed

ADAPTER_FILES = ("adapter_", "lit_model.pth.lora")  # what the names of an adapter's files begin with


def main(
    checkpoint_dir: Path,
    out_dir: Optional[Path] = None,
    base: Optional[Path] = None,
    precision: Optional[Literal["32-true", "bf16-true", "16-true"]] = None,
    overwrite: bool = False,
) -> None:
    """Merge a LoRA adapter into its base model and write a Hugging Face folder.

    What is merged already is left as it is.

    Args:
        checkpoint_dir: The adapter folder, or the path of its adapter_model.safetensors.
        out_dir: The output folder. Default: the name of the adapter folder with -merged appended.
        base: The base model, instead of the recorded one.
        precision: Type of the merged weights. Default: that of the base.
        overwrite: Replace out_dir if it exists.
    """
    source = ModelSource.open(checkpoint_dir, base, merged=False)
    if source.adapter is None and out_dir is None and merged_from(source.folder):
        print(f"{source.folder} is merged already.")
        return
    if source.adapter is None:
        raise UserError(f"{source.folder} is not an adapter folder. There is nothing to merge.")
    if not isinstance(source.adapter, LoRAFolder):
        raise UserError(
            f"{source.folder} has a {source.adapter.description}, which cannot be merged. Use the folder as it is."
        )
    folder = source.folder.resolve()
    out_dir = out_dir or default_out_dir(folder)
    record = merge_record(source, precision)
    if not overwrite and is_merged(out_dir, record):
        print(f"{source.folder} is merged already: {out_dir}")
        return
    check_replaceable(out_dir, overwrite, (folder, source.checkpoint.folder))
    dtype = DTYPES[precision] if precision else None
    lines = FolderWriter(source, MergedWeights(source.weights(), source.adapter), dtype).write(out_dir, merged=record)
    print(f"base       {source.checkpoint.folder}")
    print(f"adapter    {source.folder}")
    print(f"merged     {out_dir}")
    for line in lines:
        print(f"parity     {line}")


def merge_record(source: ModelSource, precision: Optional[str]) -> dict[str, Any]:
    """What a merged folder depends on: the adapter's files, the base, and the type of the weights."""
    files = [p for p in sorted(source.folder.iterdir()) if p.name.startswith(ADAPTER_FILES) and p.is_file()]
    sizes_and_sums = {file.name: entry(file)[:2] for file in files}
    return {"adapter": sizes_and_sums, "base": str(source.checkpoint.folder.resolve()), "precision": precision}


def is_merged(out_dir: Path, record: dict[str, Any]) -> bool:
    """Whether a folder is the complete result of the same merge."""
    return merged_from(out_dir) == record and all(path.is_file() for path in listed(out_dir / SUMS))


def merged_folder(adapter: Path) -> Optional[Path]:
    """Where `merge_lora` has merged an adapter, if it has, and the adapter is still the same."""
    out_dir = default_out_dir(adapter)
    record = merged_from(out_dir)
    precision = record.get("precision") if isinstance(record, dict) else None
    if record is None or not is_merged(out_dir, merge_record(ModelSource.open(adapter, merged=False), precision)):
        return None
    return out_dir


def default_out_dir(adapter: Path) -> Path:
    folder = adapter.resolve()
    return folder.with_name(folder.name + "-merged")


def merged_from(folder: Path) -> Any:
    """The record of the merge that wrote a folder, if one did."""
    return read_json(folder / SUMS).get("merged") if is_there(folder / SUMS) else None
