"""`litgpt merge_lora`"""

import json
import shutil
from pathlib import Path
from typing import Any, Literal, Optional

import torch

from litgpt.checkpoint.folder import widest_first, write_weights
from litgpt.errors import UserError
from litgpt.families.weights import FLOATS, Outline
from litgpt.generate.reference_outputs import (
    PRECISIONS,
    difference,
    make_reference_outputs,
    stored_dtypes,
    write_reference_outputs,
)
from litgpt.methods.merged import MergedWeights
from litgpt.methods.model_source import ModelSource
from litgpt.methods.peft_folder import CONFIG, LoRAFolder
from litgpt.model.devices import DTYPES, default_precision, pick_device
from litgpt.storage.files import is_there, read_json
from litgpt.storage.outputs import SUMS, check_replaceable, entry, exclusive, listed, new_folder, write_sums
from litgpt.storage.torch_file import NAMES, TYPES
from litgpt.text.prompts import STYLE_FILE, save_template
from litgpt.text.styles import STYLES
from litgpt.text.tokenizer import copy_files, save_stops

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
    device = pick_device("auto")
    computed = PRECISIONS.get("".join(stored_dtypes(source.checkpoint)), default_precision(device))
    before = make_reference_outputs(source.model(DTYPES[computed], device), source.tokenizer(), source.style(), [])
    with exclusive(out_dir), new_folder(out_dir.resolve()) as temporary:
        copy_small_files(source, temporary)
        write_merged(source, temporary, DTYPES[precision] if precision else None)
        merged = ModelSource.open(temporary)
        model = merged.model(DTYPES[computed], device)
        stored = stored_dtypes(merged.checkpoint)
        write_reference_outputs(make_reference_outputs(model, merged.tokenizer(), merged.style(), stored), temporary)
        write_sums(temporary, merged=record)
    worst, _ = difference(before, model)
    print(f"base       {source.checkpoint.folder}")
    print(f"adapter    {source.folder}")
    print(f"merged     {out_dir}")
    print(f"parity     logits differ from the adapter's by at most {worst:.1e} of the largest, in {computed}")


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


def copy_small_files(source: ModelSource, target: Path) -> None:
    """Copy the files of the base that are not weights, then those of the adapter for tokenizer and prompts."""
    for file in source.checkpoint.folder.iterdir():
        about_weights = file.name in (CONFIG, SUMS) or file.name.endswith(".index.json")
        if file.suffix in (".json", ".txt", ".model", ".jinja", ".md") and not about_weights and file.is_file():
            shutil.copyfile(file, target / file.name)
    copy_files(source.folder, target)
    if (source.folder / STYLE_FILE).is_file():
        shutil.copyfile(source.folder / STYLE_FILE, target / STYLE_FILE)
    style, tokenizer = source.style(), source.tokenizer()
    if style is not STYLES["none"] or (source.folder / STYLE_FILE).is_file():
        save_template(style, target, tokenizer)
        save_stops(target, tokenizer, style, source.checkpoint.fields)


def write_merged(source: ModelSource, target: Path, dtype: Optional[torch.dtype]) -> None:
    """Write the merged weights one by one, and `config.json`."""
    assert isinstance(source.adapter, LoRAFolder)
    merged = MergedWeights(source.weights(), source.adapter)
    fields = dict(merged.fields)

    def outline(name: str) -> Outline:
        found = merged.outline(name)
        return found if dtype is None or found.kind not in FLOATS else found._replace(kind=NAMES[dtype])

    def converted(weight: Outline, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if NAMES.get(tensor.dtype) == weight.kind else tensor.to(TYPES[weight.kind])

    weights = widest_first(map(outline, merged.files))
    tensors = merged.tensors(w.name for w in weights)
    write_weights(weights, ((w.name, converted(w, tensor)) for w, (_, tensor) in zip(weights, tensors)), target)
    if dtype is not None:
        fields["dtype"] = str(dtype).removeprefix("torch.")
        fields.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
