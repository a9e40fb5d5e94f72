"""`litgpt export`"""

import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, Optional

from rich.console import Console

from litgpt.errors import UserError
from litgpt.export.gguf import GGUFModel, Line, Parity
from litgpt.export.gguf_lora import DTYPES, check_lora, parity_of_lora, write_gguf_lora
from litgpt.export.llama_cpp import is_installed
from litgpt.export.ollama import modelfile
from litgpt.methods.model_source import ModelSource
from litgpt.storage.outputs import check_file, check_replaceable, exclusive, new_folder, put_single

OUT = Path("out", "export")
TypeName = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"]


def main(
    checkpoint_dir: Path,
    to: Literal["gguf", "gguf-lora", "ollama"] = "gguf",
    type: Optional[TypeName] = None,
    out: Optional[Path] = None,
    base: Optional[Path] = None,
    merge: bool = True,
    parity: Parity = "auto",
    overwrite: bool = False,
) -> None:
    """Write a model for other programs, and compare what was written with the model.

    gguf is one file for llama.cpp, Ollama, and LM Studio; a LoRA adapter is merged into its base while it is written.
    gguf-lora is the adapter alone, to use over a GGUF file of its base, which may be quantized. ollama is a folder with
    a GGUF file and a Modelfile.

    Args:
        checkpoint_dir: A model folder or an adapter folder, or the name of a model under checkpoints/.
        to: The format.
        type: Type of the weights. Default: that of the model; f32 for gguf-lora.
        out: The file, or the folder of ollama. Default: in out/export/, named after the model and the type.
        base: The base model of an adapter, instead of the recorded one.
        merge: For ollama, merge the adapter. Otherwise it stays a file of its own, over the base.
        parity: What to compare: the answers of llama.cpp, which needs the package xllamacpp and the model in memory, or
            the numbers in the file. auto compares answers if xllamacpp is installed and the model is small.
        overwrite: Replace a file that litgpt did not write.
    """
    source = ModelSource.open(checkpoint_dir, base, merged=False)
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
