"""`litgpt merge_lora`"""

import json
import shutil
from pathlib import Path
from typing import Literal, Optional

import torch
from safetensors.torch import save_file

from litgpt.checkpoint import INDEX, write_index
from litgpt.errors import UserError
from litgpt.families import name_table
from litgpt.families.table import NameTable
from litgpt.files import whole_folder
from litgpt.generate.parity import PRECISIONS, difference, make_seal, stored_dtypes, write_seal
from litgpt.loading import Source
from litgpt.peft_folder import LoRAFolder
from litgpt.prompts import STYLE_FILE, save_template
from litgpt.styles import STYLES
from litgpt.tokenizer import copy_files, save_stop
from litgpt.train.launch import DTYPES, default_precision, pick_device


def main(
    checkpoint_dir: Path,
    out_dir: Optional[Path] = None,
    base: Optional[Path] = None,
    precision: Optional[Literal["32-true", "bf16-true", "16-true"]] = None,
    overwrite: bool = False,
) -> None:
    """Fold a LoRA adapter into its base model and write an ordinary Hugging Face folder.

    Args:
        checkpoint_dir: The adapter folder, or the path of its adapter_model.safetensors.
        out_dir: The folder to write; by default the adapter's with -merged behind it.
        base: The base model, instead of the one that the adapter records.
        precision: The type of the merged weights; by default that of the base.
        overwrite: Whether out_dir may be replaced.
    """
    source = Source.open(checkpoint_dir, base, merged=False)
    if source.adapter is None:
        raise UserError(f"{source.folder} is no adapter folder: there is nothing to merge.")
    if not isinstance(source.adapter, LoRAFolder):
        raise UserError(
            f"{source.folder} holds a {source.adapter.description}, which cannot be folded into weights: use the "
            "folder as it is."
        )
    folder = source.folder.resolve()
    out_dir = out_dir or folder.with_name(folder.name + "-merged")
    check_out_dir(out_dir, (folder, source.checkpoint.folder.resolve()), overwrite)
    with whole_folder(out_dir.resolve()) as temporary:
        copy_small_files(source, temporary)
        write_weights(source, temporary, DTYPES[precision] if precision else None)
        difference, computed = seal(source, temporary)
    print(f"base       {source.checkpoint.folder}")
    print(f"adapter    {source.folder}")
    print(f"merged     {out_dir}")
    print(f"parity     logits differ from the adapter's by at most {difference:.1e} of the largest, in {computed}")


def check_out_dir(out_dir: Path, sources: tuple[Path, Path], overwrite: bool) -> None:
    """Raise `UserError` if that folder may not be replaced: it is used, holds the sources, or is no model folder."""
    if any(out_dir.resolve() in (source, *source.parents) for source in sources):
        raise UserError(f"--out_dir {out_dir} is or holds the adapter or its base: choose another folder.")
    if not out_dir.exists():
        return
    if not out_dir.is_dir():
        raise UserError(f"--out_dir {out_dir} is a file; name a folder.")
    if any(out_dir.iterdir()) and not overwrite:
        raise UserError(f"--out_dir {out_dir} is not empty: name another, or give --overwrite true.")
    if any(out_dir.iterdir()) and not (out_dir / "config.json").is_file():
        raise UserError(f"--out_dir {out_dir} holds other things than a model, and would be replaced: name another.")


def copy_small_files(source: Source, target: Path) -> None:
    """What is not weights: the base's files, and over them what belongs to the adapter's prompts."""
    for file in source.checkpoint.folder.iterdir():
        if file.suffix in (".json", ".txt", ".model", ".jinja", ".md") and file.name != INDEX and file.is_file():
            shutil.copyfile(file, target / file.name)
    copy_files(source.folder, target)
    if (source.folder / STYLE_FILE).is_file():
        shutil.copyfile(source.folder / STYLE_FILE, target / STYLE_FILE)
    style, tokenizer = source.style(), source.tokenizer()
    if style is not STYLES["none"] or (source.folder / STYLE_FILE).is_file():
        save_template(style, target, tokenizer.prefix, tokenizer.eos_token or "")
        save_stop(target, tokenizer.trained_stop(style), source.checkpoint.fields)


def write_weights(source: Source, target: Path, dtype: Optional[torch.dtype]) -> None:
    """The base's shards one after the other, each module's update added in float32; and `config.json`."""
    assert isinstance(source.adapter, LoRAFolder)
    base = source.checkpoint
    deltas, in_full = source.adapter.deltas(base.config), source.adapter.whole_weights(base.config)
    table, tied, fields = name_table(base.config), base.config.tie_embeddings, dict(base.fields)
    (head,), (embedding,) = table.to_hf("lm_head"), table.to_hf("transformer.wte")
    pair = f"{embedding}.weight", f"{head}.weight"
    if tied and any(name in in_full for name in pair):  # both are the same
        in_full |= dict.fromkeys((n for n in pair if n in base.files), next(in_full[n] for n in pair if n in in_full))
        in_full = {n: t for n, t in in_full.items() if n in base.files}

    def merged(name: str, module: str) -> torch.Tensor:
        weight = base.tensor(name)
        stored = weight.dtype if dtype is None else dtype
        if name in in_full:
            if in_full[name].shape != weight.shape:
                raise UserError(f"The adapter's {name} does not fit the base's {tuple(weight.shape)}.")
            weight = in_full[name]
        if module in deltas:
            delta, transposed = deltas.pop(module), is_transposed(table, module)
            weight = weight.T if transposed else weight
            if delta.shape != tuple(weight.shape):
                raise UserError(f"The adapter's update of {module} does not fit its weight {tuple(weight.shape)}.")
            weight = delta.added_to(weight)
            weight = weight.T.contiguous() if transposed else weight
        return weight.to(stored)

    missing = sorted(set(in_full) - set(base.files))
    untied = tied and head in deltas
    if untied:
        fields["tie_word_embeddings"] = False
        if isinstance(fields.get("text_config"), dict):
            fields["text_config"] = fields["text_config"] | {"tie_word_embeddings": False}
    weight_map: dict[str, str] = {}
    total = 0
    for file, names in base.layout().items():
        tensors = {name: merged(name, name.removesuffix(".weight")) for name in names}
        if untied and pair[0] in names and pair[1] not in base.files:  # the head is written on its own
            tensors[pair[1]] = merged(pair[0], head)
        save_file(tensors, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    missing += sorted(deltas)
    if missing:
        raise UserError(f"The base has no weights for this of the adapter: {', '.join(missing)}.")
    write_index(weight_map, total, target)
    if dtype is not None:
        fields["dtype"] = str(dtype).removeprefix("torch.")
        fields.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def is_transposed(table: NameTable, module: str) -> bool:
    """Whether a Hugging Face module stores its weight as (in_features, out_features)."""
    ours, part = table.from_hf(module) or ("", 0)
    return bool(ours) and table.stored(ours)[part].transposed


def seal(source: Source, target: Path) -> tuple[float, str]:
    """Seal the merged folder, and return how far its logits are from the adapter's, as a share of the largest, and the
    precision that they were computed in: that of the stored weights, if they have one."""
    device = pick_device("auto")
    precision = PRECISIONS.get("".join(stored_dtypes(source.checkpoint)), default_precision(device))
    dtype = DTYPES[precision]
    model = source.model(dtype, device)
    before = make_seal(model, source.tokenizer(), source.style(), stored_dtypes(source.checkpoint))
    del model  # or both would be in memory
    merged = Source.open(target)
    model = merged.model(dtype, device)
    write_seal(make_seal(model, merged.tokenizer(), merged.style(), stored_dtypes(merged.checkpoint)), target)
    return difference(before, model)[0], precision
