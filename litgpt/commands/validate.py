"""`litgpt validate`"""

import glob
import sys
from pathlib import Path
from typing import Optional

import torch

from litgpt.errors import UserError, reason, without_secrets
from litgpt.families.weights import check_weights
from litgpt.generate.engine import Request
from litgpt.generate.reference_outputs import (
    FILE,
    PRECISIONS,
    changes,
    last_logits,
    read_reference_outputs,
    stored_dtypes,
)
from litgpt.methods.model_source import ModelSource
from litgpt.model.devices import DTYPES, Accelerator, PrecisionName, default_precision, pick_device
from litgpt.model.gpt import GPT
from litgpt.storage.files import is_there


def main(
    checkpoint_dir: list[Path],
    precision: Optional[PrecisionName] = None,
    accelerator: Accelerator = "auto",
    base: Optional[Path] = None,
) -> None:
    """Check that model folders are complete and still give their recorded outputs.

    With several folders, a problem with one does not stop the others, and any problem exits with 1.

    Args:
        checkpoint_dir: Model folders or adapter folders, names of some under checkpoints/, or patterns such as
            out/*/final.
        precision: Default: the precision of the recorded outputs, if the folder has any.
        accelerator: The kind of device.
        base: The base model of the adapters, instead of the recorded one.
    """
    folders = list(dict.fromkeys(folder for path in checkpoint_dir for folder in matching(path)))
    if len(folders) == 1:
        check(folders[0], precision, accelerator, base)
        return
    failed = []
    for folder in folders:
        try:
            check(folder, precision, accelerator, base)
        except (UserError, OSError) as e:
            failed.append(str(folder))
            print(f"failed      {folder}: {without_secrets(reason(e))}")
        print(flush=True)
    print(f"{len(folders) - len(failed):,} of {len(folders):,} folders are complete and usable.")
    if failed:
        print(f"litgpt: failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def matching(path: Path) -> list[Path]:
    """The folders that a pattern stands for, where the shell left it as it is; else the path."""
    return [Path(name) for name in sorted(glob.glob(str(path))) if Path(name).is_dir()] or [path]


def check(folder: Path, precision: Optional[PrecisionName], accelerator: Accelerator, base: Optional[Path]) -> None:
    """Check one folder, and print what it has. Raises `UserError` if it cannot be used or gives other outputs."""
    source = ModelSource.open(folder, base)
    weights = source.weights()
    config = weights.config
    with torch.device("meta"):
        empty = GPT(config)
    check_weights(empty, weights)
    del weights
    tokenizer, style = source.tokenizer(), source.style()
    print(f"folder      {source.folder}")
    if source.adapter is not None:
        print(f"adapter     {source.adapter.description} over {source.checkpoint.folder}")
    n_parameters = sum(p.numel() for p in empty.parameters())
    tensors = f"{len(source.checkpoint.shapes)} tensors of type {', '.join(stored_dtypes(source.checkpoint))}"
    print(f"model       {config.model_type}, {n_parameters:,} parameters, {tensors}")
    print(f"tokenizer   {tokenizer.vocab_size:,} tokens, stops at {sorted(tokenizer.stop_ids)}")
    print(f"prompts     {style.name}")
    if (beyond := tokenizer.vocab_size - config.padded_vocab_size) > 0:
        print(f"note        the model has no embedding for {beyond:,} of these tokens and refuses texts with them")
    reference = read_reference_outputs(source.folder) if is_there(source.folder / FILE) else None
    device = pick_device(accelerator)
    recorded = PRECISIONS[reference["computed"]] if reference else None
    scheme = reference.get("quantize") if reference else None
    model = source.model(DTYPES[precision or recorded or default_precision(device)], device, scheme)
    ids = tokenizer.encode("Once upon a time")
    Request(ids, 1).check(model)
    if not bool(last_logits(model, ids).isfinite().all()):
        raise UserError(f"The model in {source.folder} gives NaN or infinite logits. Its weights are damaged.")
    if reference is None:
        print("parity      no reference outputs in this folder")
    else:
        found = changes(reference, model, tokenizer, style, stored_dtypes(source.checkpoint))
        for part, detail in found.items():
            print(f"changed     {part}: {detail}")
        if found:
            raise UserError(
                f"{source.folder} no longer gives its recorded outputs. Changed: {', '.join(sorted(found))}."
            )
        print(f"parity      {len(reference['prompts'])} prompts give their recorded outputs")
    print("The folder is complete and usable.")
