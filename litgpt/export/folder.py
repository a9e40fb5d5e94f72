"""Writes a model as a Hugging Face folder, with its LoRA adapter merged, and compares the two. Weights are read and
written one by one."""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from litgpt.checkpoint.folder import Checkpoint, parts_of, widest_first, write_weights
from litgpt.checkpoint.hub import display_name
from litgpt.checkpoint.model_card import Facts, write_card
from litgpt.errors import UserError
from litgpt.families import weight_map
from litgpt.families.weights import FLOATS, READ, Outline, Weights
from litgpt.generate.reference_outputs import (
    FILE,
    PRECISIONS,
    difference,
    make_reference_outputs,
    stored_dtypes,
    write_reference_outputs,
)
from litgpt.methods.model_source import ModelSource
from litgpt.methods.peft_folder import CONFIG
from litgpt.model.devices import DTYPES, default_precision, pick_device
from litgpt.storage.outputs import SINGLE, SUMS, exclusive, new_folder, write_sums
from litgpt.storage.torch_file import NAMES
from litgpt.text.prompts import STYLE_FILE, save_template
from litgpt.text.styles import STYLES
from litgpt.text.tokenizer import copy_files, save_stops

ROUNDING = 1e-2  # how far numbers may be from those of the model, as a fraction of the largest in their tensor


@dataclass
class FolderWriter:
    """Writes a model to a new folder.

    Args:
        source: The model.
        weights: Its weights, with the adapter merged if it has one.
        dtype: Type of the written weights. None for that of the base.
        shard: Maximum bytes of a file of weights. None for 5 GB.
        answers: Whether to compare the answers of the two models, which need to fit in memory, or only the weights.
    """

    source: ModelSource
    weights: Weights
    dtype: Optional[torch.dtype] = None
    shard: Optional[int] = None
    answers: bool = True

    def write(self, out_dir: Path, option: str = "--out_dir", **record: Any) -> list[str]:
        """Write the folder, with `record` in its checksums, and return lines about how it compares with the source.
        Raises `UserError`, without writing, if the folder does not have the numbers of the model."""
        source, device = self.source, pick_device("auto")
        computed = PRECISIONS.get("".join(stored_dtypes(source.checkpoint)), default_precision(device))
        before = self.outputs(source, computed, []) if self.answers else None
        with exclusive(out_dir, option), new_folder(out_dir.resolve()) as temporary:
            copy_small_files(source, temporary)
            self.write_weights(temporary)
            if before is not None:
                lines = self.compare_answers(before, ModelSource.open(temporary), computed)
            else:
                lines = [self.compare_weights(Checkpoint(temporary))]
            facts = Facts.of_source(source.folder, source.checkpoint.folder)
            write_card(temporary, display_name(source.folder), facts, source.checkpoint.folder)
            write_sums(temporary, **record)
        return lines

    def write_weights(self, target: Path) -> None:
        """Write the weights and `config.json`."""
        weights, fields = self.weights, dict(self.weights.fields)
        names = weight_map(weights.config)
        outlines = [self.outline(name) for name in weights.files if name != names.tied_head]
        ordered = widest_first(w for w in outlines if not names.unused.search(w.name))
        write_weights(ordered, weights.tensors(w.name for w in ordered), target, weights.config, self.shard)
        if self.dtype is not None:
            fields["dtype"] = str(self.dtype).removeprefix("torch.")
            fields.pop("torch_dtype", None)
        (target / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    def outline(self, name: str) -> Outline:
        found = self.weights.outline(name)
        return found if self.dtype is None or found.kind not in FLOATS else found._replace(kind=NAMES[self.dtype])

    def outputs(self, source: ModelSource, computed: str, stored: list[str]) -> dict[str, Any]:
        model = source.model(DTYPES[computed], pick_device("auto"))
        return make_reference_outputs(model, source.tokenizer(), source.style(), stored)

    def compare_answers(self, before: dict[str, Any], written: ModelSource, computed: str) -> list[str]:
        model = written.model(DTYPES[computed], pick_device("auto"))
        stored = stored_dtypes(written.checkpoint)
        after = make_reference_outputs(model, written.tokenizer(), written.style(), stored)
        write_reference_outputs(after, written.folder)
        worst, _ = difference(before, model)
        check_finite(worst)
        pairs = list(zip(before["prompts"], after["prompts"]))
        same = {key: sum(then[key] == now[key] for then, now in pairs) for key in ("text", "ids", "greedy")}
        whose = "adapter's" if self.source.adapter is not None else "model's"
        return [
            f"the same prompt for {same['text']} of {len(pairs)} texts, the same token IDs for {same['ids']}, the same "
            f"next tokens for {same['greedy']}",
            f"logits differ from the {whose} by at most {worst:.1e} of the largest, in {computed}",
        ]

    def compare_weights(self, written: Checkpoint) -> str:
        """Compare each weight with what was written."""
        errors, largest = defaultdict[str, float](float), defaultdict[str, float](float)
        for name, ours, theirs in self.pairs(written):
            ours = ours.float()
            error = (ours - theirs.float()).abs().max().item()
            check_finite(error)
            errors[name] = max(errors[name], error)
            largest[name] = max(largest[name], ours.abs().max().item())
        relative = {name: error / largest[name] for name, error in errors.items() if error}
        where = max(relative, key=lambda name: relative[name], default="all are equal")
        worst = relative.get(where, 0.0)
        if worst > ROUNDING:
            raise UserError(f"The written weight {where} differs from that of the model. The disk may be damaged.")
        return f"weights differ by at most {worst:.1e} of the largest in their tensor ({where})"

    def pairs(self, written: Checkpoint) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Weights with what was written, large ones in parts."""
        large = {name for name in written.files if written.outline(name).size > READ}
        small = [name for name in written.files if name not in large]
        for (name, ours), (_, theirs) in zip(self.weights.tensors(small), written.tensors(small)):
            yield name, ours, theirs
        for name in large:
            at = 0
            for ours in parts_of(self.weights.tensor(name)):
                yield name, ours, written.part(name, 0, [range(at, at + len(ours))])
                at += len(ours)


def check_finite(number: float) -> None:
    if not abs(number) < float("inf"):
        raise UserError(
            "The written weights are not finite: the model has numbers that the type cannot hold. Use bf16."
        )


def copy_small_files(source: ModelSource, target: Path) -> None:
    """Copy the files of the base that are not weights, then those of the adapter for tokenizer and prompts."""
    for file in source.checkpoint.folder.iterdir():
        other = file.name in (CONFIG, SUMS, SINGLE, FILE) or file.name.endswith(".index.json")
        if file.suffix in (".json", ".txt", ".model", ".jinja") and not other and file.is_file():
            shutil.copyfile(file, target / file.name)
    copy_files(source.folder, target)
    if (source.folder / STYLE_FILE).is_file():
        shutil.copyfile(source.folder / STYLE_FILE, target / STYLE_FILE)
    style, tokenizer = source.style(), source.tokenizer()
    if style is not STYLES["none"] or (source.folder / STYLE_FILE).is_file():
        save_template(style, target, tokenizer)
        save_stops(target, tokenizer, style, source.checkpoint.fields)
