"""A lower bound of the number of tokens of a text, so that a much too long prompt is refused before it is tokenized."""

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

BYTE_TOKENS = {f"<0x{i:02X}>": i for i in range(256)}.keys()  # of models that write unknown characters as bytes


class Shrinking(NamedTuple):
    """How much a step of a tokenizer may shorten a text.

    Args:
        factor: The most characters that become one.
        drops_blanks: Whether blanks may vanish.
    """

    factor: float = 1.0
    drops_blanks: bool = False


SHRINKING = {  # any other step may drop anything
    **dict.fromkeys(("NFC", "NFKC"), Shrinking(4)),  # U+1F82 is composed of four characters, none of more
    **dict.fromkeys(("NFD", "NFKD", "Lowercase", "Prepend", "ByteLevel", "Metaspace", "Digits"), Shrinking()),
    **dict.fromkeys(("UnicodeScripts", "FixedLength", "Split", "Punctuation"), Shrinking()),
    **dict.fromkeys(("Strip", "Whitespace", "WhitespaceSplit", "BertPreTokenizer"), Shrinking(1, True)),
}


def length_bound(backend: Any) -> Optional[tuple[float, str]]:
    """The most characters that one token of a `tokenizers.Tokenizer` represents, and a regular expression for the
    characters that may vanish without a token. None if there is no limit."""
    steps = [s for s in (backend.normalizer, backend.pre_tokenizer) if s is not None]
    found = shrinking({"type": "Sequence", "normalizers": [json.loads(step.__getstate__()) for step in steps]})
    vocabulary = backend.get_vocab()  # with the added tokens
    if getattr(backend.model, "byte_fallback", False) and vocabulary.keys() >= BYTE_TOKENS:
        lost: Optional[str] = ""
    else:
        lost = lost_bytes(vocabulary) if "ByteLevel" in "".join(map(str, steps)) else None
    if found is None or lost is None:
        return None
    strips = any(t.lstrip or t.rstrip for t in backend.get_added_tokens_decoder().values())
    dropped = re.escape(lost) + (r"\s" if found.drops_blanks or strips else "")
    return found.factor * max(map(len, vocabulary)), f"[{dropped}]+" if dropped else ""


def lost_bytes(vocabulary: Mapping[str, int]) -> Optional[str]:
    """The control characters that vanish because a byte-level model has no token for them. None if other characters
    may vanish too."""
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    lost = "".join(c for c in map(chr, range(128)) if byte_level.pre_tokenize_str(c)[0][0] not in vocabulary)
    # each character beyond ASCII has one of these bytes
    later = {byte_level.pre_tokenize_str(chr(i))[0][0][-1] for i in range(0x80, 0xC0)}
    return lost if vocabulary.keys() >= later and all(unicodedata.category(c) == "Cc" for c in lost) else None


def shrinking(step: dict[str, Any]) -> Optional[Shrinking]:
    """How much a normalizer or a pre-tokenizer of a `tokenizer.json` may shorten a text. None if it may drop any
    part."""
    if step["type"] == "Sequence":
        found = Shrinking()
        for inner in step.get("normalizers") or step.get("pretokenizers") or []:
            if (part := shrinking(inner)) is None:
                return None
            found = Shrinking(found.factor * part.factor, found.drops_blanks or part.drops_blanks)
        return found
    if step["type"] == "Replace":
        old, new = step["pattern"].get("String"), step["content"]
        return Shrinking(max(1.0, len(old) / len(new))) if old and new else None
    return None if step.get("behavior") == "Removed" else SHRINKING.get(step["type"])
