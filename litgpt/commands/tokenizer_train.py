"""`litgpt tokenizer train`"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litgpt.data.documents import text_sources
from litgpt.errors import UserError
from litgpt.storage.outputs import check_replaceable, exclusive, new_folder

BOS, EOS = "<s>", "</s>"


def main(
    files: list[str],
    vocab_size: int = 32000,
    out_dir: Path = Path("out/tokenizer"),
    special_tokens: list[str] = [],  # noqa: B006
    overwrite: bool = False,
) -> None:
    """Train a byte-level BPE tokenizer on text files. Writes `tokenizer.json` and `tokenizer_config.json`.

    Args:
        files: Text files, or folders with .txt files.
        vocab_size: Number of tokens, including the 256 bytes and the special tokens.
        out_dir: The output folder.
        special_tokens: Additional special tokens, besides the beginning-of-text and end-of-text tokens.
        overwrite: Replace out_dir if it exists.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = [BOS, EOS, *special_tokens]
    if vocab_size < (smallest := 256 + len(special)):
        raise UserError(f"--vocab_size {vocab_size} must be at least {smallest}, for the bytes and the special tokens.")
    check_replaceable(out_dir, overwrite, map(Path, files))
    sources = text_sources(files, "files")

    def texts() -> Iterator[str]:
        for source in sources:
            yield from (piece.text for _, piece in source.rows())

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    fields: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    with exclusive(out_dir), new_folder(out_dir) as folder:
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    print(f"{tokenizer.get_vocab_size():,} tokens from {len(sources):,} files, written to {out_dir}")
