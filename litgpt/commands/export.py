"""`litgpt export`"""

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from rich.console import Console

from litgpt.checkpoint.find import find_folder
from litgpt.checkpoint.hub import display_name
from litgpt.errors import UserError
from litgpt.export.folder import FolderWriter
from litgpt.export.gguf import LARGE, GGUFModel, Line, Parity, merged_weights
from litgpt.export.gguf_lora import DTYPES, check_lora, parity_of_lora, write_gguf_lora
from litgpt.export.hub import Upload
from litgpt.export.llama_cpp import is_installed
from litgpt.export.ollama import modelfile
from litgpt.families.weights import check_weights
from litgpt.methods.model_source import ModelSource
from litgpt.model.gpt import GPT
from litgpt.storage.outputs import check_file, check_replaceable, exclusive, new_folder, put_single

OUT = Path("out", "export")
FILES = ("gguf", "gguf-lora", "ollama", "hf")
FORMATS: dict[str, tuple[str, ...]] = {  # options that only some formats have
    **dict.fromkeys(("repo_id", "private", "access_token"), ("hub",)),
    **dict.fromkeys(("type", "out", "base"), FILES),
    "merge": ("ollama",),
    "shard_size": ("hf",),
}
HF_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}  # of --to hf
TypeName = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"]


def main(
    checkpoint_dir: Path,
    repo_id: Optional[str] = None,
    to: Literal["gguf", "gguf-lora", "ollama", "hf", "hub"] = "gguf",
    type: Optional[TypeName] = None,
    out: Optional[Path] = None,
    base: Optional[Path] = None,
    merge: bool = True,
    shard_size: Optional[str] = None,
    private: bool = False,
    access_token: Optional[str] = None,
    parity: Parity = "auto",
    overwrite: bool = False,
) -> None:
    """Write a model for other programs, and compare what was written with the model; or upload it to the hub.

    gguf is one file for llama.cpp, Ollama, and LM Studio; a LoRA adapter is merged into its base while it is written.
    gguf-lora is the adapter alone, to use over a GGUF file of its base, which may be quantized. ollama is a folder with
    a GGUF file and a Modelfile. hf is a Hugging Face folder, in which an adapter is merged. hub uploads a folder as it
    is to ORG/NAME.

    Args:
        checkpoint_dir: A model folder or an adapter folder, or the name of a model under checkpoints/.
        repo_id: With --to hub: the repository, which is created if it does not exist.
        to: The format, or hub.
        type: Type of the weights; with hf, one of f32, f16, and bf16. Default: that of the model; f32 for gguf-lora.
        out: The file, or the folder of ollama and hf. Default: in out/export/, named after the model and the type.
        base: The base model of an adapter, instead of the recorded one.
        merge: For ollama, merge the adapter. Otherwise it stays a file of its own, over the base.
        shard_size: With --to hf: maximum size of a file of weights, such as 500MB. Default: 5GB.
        private: With --to hub: create a private repository.
        access_token: With --to hub: token with write access. Default: HF_TOKEN, or the token of `hf auth login`.
        parity: What to compare: the answers, which needs the model in memory, and except for hf the package xllamacpp,
            or the numbers in the file. auto compares answers if the model is small, and xllamacpp is installed.
        overwrite: Replace a file that litgpt did not write, or the folder of hf.
    """
    check_options(to, {**locals(), "merge": not merge})
    if to == "hub":
        Upload(find_folder(checkpoint_dir), str(repo_id), private, access_token)()
        return
    source = ModelSource.open(checkpoint_dir, base, merged=False)
    if to == "hf":
        to_hf(source, type, out, shard_size, parity, overwrite)
        return
    if parity == "answers" and not is_installed():
        raise UserError("--parity answers needs the package xllamacpp. Run: pip install xllamacpp")
    if to == "gguf":
        to_gguf(source, type, out, parity, overwrite)
    elif to == "gguf-lora":
        to_gguf_lora(source, type, out, parity, overwrite)
    else:
        to_ollama(source, type, out, merge, parity, overwrite)


def to_gguf(source: ModelSource, type: Optional[str], out: Optional[Path], parity: Parity, overwrite: bool) -> None:
    model = GGUFModel(source, type)
    show(header(source))
    out = write_file(out, f"{model.stem}-{model.type}.gguf", overwrite, model.write)
    show([*model.remarks(), *model.parity(out, parity)])


def to_gguf_lora(
    source: ModelSource, type: Optional[str], out: Optional[Path], parity: Parity, overwrite: bool
) -> None:
    type = type or "f32"
    if type not in DTYPES:
        raise UserError(f"--type {type} is not a type of an adapter. Supported: {', '.join(DTYPES)}.")
    base = GGUFModel(source, "f32", merge=False)
    adapter = check_lora(base)
    show(header(source))
    name = f"{base.stem}-lora-{type}.gguf"
    out = write_file(out, name, overwrite, lambda file: write_gguf_lora(file, base, adapter, type))
    if base.vocabulary.templates:
        template = source.folder / "chat_template.jinja"
        show([("note", f"the file has no chat template. In llama.cpp, pass --chat-template-file {template}")])
    show(parity_of_lora(out, base, parity))


def to_ollama(
    source: ModelSource, type: Optional[str], out: Optional[Path], merge: bool, parity: Parity, overwrite: bool
) -> None:
    model = GGUFModel(source, type, merge)
    adapter = None if merge else check_lora(model)
    folders = (source.folder, source.checkpoint.folder)
    out = out or OUT / f"{model.stem}-ollama"
    check_replaceable(out, True, folders, "--out")
    show(header(source))
    name, lora = f"{model.stem}-{model.type}.gguf", f"{model.stem}-lora.gguf" if adapter else None
    text, notes = modelfile(name, lora, folders, source.tokenizer(), source.style())
    with exclusive(out, "--out"), new_folder(out) as temporary:
        model.write(temporary / name)
        if adapter is not None and lora is not None:
            write_gguf_lora(temporary / lora, model, adapter, "f32")
        (temporary / "Modelfile").write_text(text, encoding="utf-8", newline="\n")
    show([("written", f"{out}: {', '.join(filter(None, (name, lora)))}, Modelfile")])
    show([*model.remarks(), *(("note", note) for note in notes)])
    show(model.parity(out / name, parity, out / lora if lora else None))
    tag = re.sub(r"[^a-z0-9._-]+", "-", model.stem.lower()).strip("-._") or "model"
    show([("next", f"ollama create {tag} -f {out / 'Modelfile'}"), ("", f"ollama run {tag}")])


def check_options(to: str, given: Mapping[str, Any]) -> None:
    """Raise `UserError` for options of another format, and for a missing repository."""
    if to == "hub" and given["repo_id"] is None:
        raise UserError("--to hub needs the name of a repository. Pass it after the folder, as ORG/NAME.")
    for name, formats in FORMATS.items():
        if given[name] and to not in formats:
            what = given[name] if name == "repo_id" else f"--{name}"
            raise UserError(f"{what} has no effect with --to {to}, only with --to {' or '.join(formats)}.")


def to_hf(
    source: ModelSource, type: Optional[str], out: Optional[Path], size: Optional[str], parity: Parity, overwrite: bool
) -> None:
    if type not in (None, *HF_TYPES):
        raise UserError(f"--to hf writes {', '.join(HF_TYPES)}, not --type {type}.")
    shard = None if size is None else n_bytes(size)
    weights = merged_weights(source)
    with torch.device("meta"):
        check_weights(GPT(weights.config), weights)
    out = out or OUT / f"{display_name(source.folder)}-{type or 'hf'}"
    check_replaceable(out, overwrite, (source.folder, source.checkpoint.folder), "--out")
    show(header(source))
    size_in_memory = 4 * sum(math.prod(shape) for shape in weights.shapes.values())
    answers = parity == "answers" or (parity == "auto" and size_in_memory <= LARGE)
    lines = FolderWriter(source, weights, HF_TYPES[type] if type else None, shard, answers).write(out, "--out")
    files = [path for path in out.iterdir() if path.suffix == ".safetensors"]
    total = sum(path.stat().st_size for path in files)
    show([("written", f"{out}, {len(files)} file{'s' * (len(files) > 1)} of weights, {total / 1e6:,.1f} MB")])
    show(("parity", line) for line in lines)


def n_bytes(size: str) -> int:
    """The bytes in a text such as 5GB. Raises `UserError` if it is not a size of at least 1 MB."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) *([MGT])B", size.strip(), re.IGNORECASE)
    found = int(float(match[1]) * {"M": 10**6, "G": 10**9, "T": 10**12}[match[2].upper()]) if match else 0
    if found < 10**6:
        raise UserError(f"--shard_size {size} is not a size of at least 1MB. Expected, for example, 500MB or 5GB.")
    return found


def header(source: ModelSource) -> list[Line]:
    base = [] if source.adapter is None else [("base", f"{source.checkpoint.folder}")]
    return [("model", f"{source.folder}, {source.config.model_type}"), *base]


def write_file(out: Optional[Path], name: str, overwrite: bool, write: Callable[[Path], None]) -> Path:
    """Write one file atomically; by default into out/export/. Returns its path."""
    out = out or OUT / name
    check_file(out, overwrite, "--out")
    if out.suffix != ".gguf":
        raise UserError(f"--out {out} must end with .gguf.")
    temporary = out.with_name(f".{out.name}.tmp")
    with exclusive(out, "--out"):
        try:
            write(temporary)
            put_single(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    show([("written", f"{out}, {out.stat().st_size / 1e6:,.1f} MB")])
    return out


def show(lines: Iterable[Line]) -> None:
    """Print lines within the width of the screen as they come."""
    width = Console().width
    for heading, text in lines:
        line = f"{heading:10} {text}"
        print(textwrap.fill(line, width, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False))
