"""The tokenizer of a GGUF file: its kind and its pre-tokenizer, recognized by their rules, tokens, and special ids."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Optional

from litgpt.errors import UserError
from litgpt.text.fast_tokenizer import QWEN_WORDS, FastTokenizer, steps_in
from litgpt.text.length_bound import BYTE_TOKENS
from litgpt.text.sentencepiece import SentencePieceTokenizer
from litgpt.text.tokenizer import Tokenizer

SPACE = "▁"  # stands for a blank in sentencepiece
GPT2 = "gpt2 words"  # the regular expression that `ByteLevel` has built in
LLAMA_3 = QWEN_WORDS.replace(r"\p{N}| ", r"\p{N}{1,3}| ")
CAPITALS, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (  # words begin at a capital letter
    rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}*{SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}+{SMALL}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT_4O = TEKKEN.replace(f"{SMALL}+|", f"{SMALL}+{CONTRACTIONS}|").replace(
    rf"{SMALL}*|\p{{N}}", rf"{SMALL}*{CONTRACTIONS}|\p{{N}}{{1,3}}"
)
# llama.cpp's name of a pre-tokenizer: its steps. Regular expressions are compared as they are written.
PRE_TOKENIZERS: dict[str, list[Any]] = {
    "gpt-2": [GPT2],
    "llama-bpe": [LLAMA_3],
    "dbrx": [LLAMA_3],
    "tekken": [TEKKEN],
    "gpt-4o": [GPT_4O],
    "qwen2": [QWEN_WORDS],
    "smollm": ["single digits", GPT2],
    "falcon": ["punctuation", GPT2, "digits", "[0-9][0-9][0-9]"],
}
IGNORE_MERGES = ("llama-bpe", "tekken")  # which look a word up in the vocabulary before they merge

ASCII = (
    "llama.cpp splits words at ASCII's capital letters, not at those of other alphabets, and at combining characters"
)
BLANKS = "llama.cpp puts a blank before each part of a text that follows a special token"
SENTENCEPIECE = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}


class Kind(IntEnum):
    """llama.cpp's kinds of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class Vocabulary:
    """The tokenizer of a GGUF file.

    Args:
        model: How texts are tokenized: `gpt2` for byte-level BPE, `llama` for sentencepiece.
        pre: The name of the pre-tokenizer.
        notes: What llama.cpp cannot do as the tokenizer does, for the user.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    space_prefix: Optional[bool] = None
    ids: dict[str, int] = field(default_factory=dict)  # of special tokens: bos, eos, eot, ...
    before: bool = False  # whether BOS is added before a text
    after: bool = False  # whether EOS is added after it
    templates: Mapping[str, str] = field(default_factory=dict)  # chat templates by name
    notes: list[str] = field(default_factory=list)

    def add_to(self, writer: Any) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.model == "gpt2":
            writer.add_token_merges(self.merges)
        for name, i in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(i)
        writer.add_add_bos_token(self.before)
        writer.add_add_eos_token(self.after)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        if self.templates:
            writer.add_chat_template([{"name": name, "template": text} for name, text in self.templates.items()])


def vocabulary(
    tokenizer: Tokenizer, n_embeddings: int, stops: frozenset[int], templates: Mapping[str, str]
) -> Vocabulary:
    """The tokenizer in llama.cpp's form. Raises `UserError` if llama.cpp has no such tokenizer.

    Args:
        n_embeddings: How many tokens the model knows; missing ones are filled up.
        stops: The tokens that end an answer.
        templates: The chat templates by name.
    """
    backend = tokenizer.backend
    found = of_sentencepiece(backend) if isinstance(backend, SentencePieceTokenizer) else of_json(backend)
    unknown = len(found.tokens) - n_embeddings
    if unknown > 0:
        found.notes.append(f"{unknown} tokens that the model has no embedding for are left out")
    padding = [f"[PAD{i}]" for i in range(len(found.tokens), n_embeddings)]
    found.tokens = [*found.tokens, *padding][:n_embeddings]
    found.kinds = [*found.kinds, *[Kind.UNUSED] * len(padding)][:n_embeddings]
    if found.scores:
        found.scores = [*found.scores, *[-10000.0] * len(padding)][:n_embeddings]
    add_special_ids(found, tokenizer, stops)
    found.templates = templates
    return found


def add_special_ids(found: Vocabulary, tokenizer: Tokenizer, stops: frozenset[int]) -> None:
    before, after, eos = tokenizer.backend.before, tokenizer.backend.after, tokenizer.eos_id
    bos = before[0] if before else tokenizer.bos_id
    if len(before) > 1 or after not in ([], [eos]):
        raise UserError(
            f"The tokenizer in {tokenizer.folder} adds the tokens {before} before a text and {after} after it. GGUF "
            "can say BOS and EOS only."
        )
    found.before, found.after = bool(before), bool(after)
    ends = [eos, *sorted(stops - {eos})] if eos is not None else sorted(stops)
    named = {"bos": bos, **dict(zip(("eos", "eot", "eom"), ends))}
    found.ids |= {name: i for name, i in named.items() if i is not None and i < len(found.tokens)}
    if not ends:
        default = found.tokens[11 if found.model == "gpt2" else 2 :][:1]
        found.notes.append(f"the model names no token that ends an answer, so llama.cpp stops at {default}")
    if len(ends) > 3:
        names = ", ".join(tokenizer.decode([i], skip_special=False) for i in ends[3:])
        found.notes.append(f"GGUF has room for three tokens that end an answer; these are left out: {names}")


def of_sentencepiece(backend: SentencePieceTokenizer) -> Vocabulary:
    """From a `tokenizer.model`."""
    model, n = backend.backend, backend.backend.vocab_size()
    proto = model.serialized_model_proto()
    kind = trainer_kind(proto)
    if kind != 2:
        raise UserError(
            f"The sentencepiece model is of type {SENTENCEPIECE.get(kind, kind)}. Only BPE can be exported to GGUF."
        )

    def kind_of(i: int) -> Kind:
        if model.is_unknown(i):
            return Kind.UNKNOWN
        if model.is_control(i):
            return Kind.CONTROL
        return Kind.BYTE if model.is_byte(i) else Kind.UNUSED if model.is_unused(i) else Kind.NORMAL

    found = Vocabulary("llama", "default", [model.id_to_piece(i) for i in range(n)], [kind_of(i) for i in range(n)])
    found.scores = [model.get_score(i) for i in range(n)]
    found.space_prefix = model.encode("a") != model.encode("\x01a")[len(model.encode("\x01")) :]
    for i in range(n, backend.vocab_size):
        found.tokens.append(backend.texts.get(i, f"[PAD{i}]"))
        found.kinds.append(
            Kind.CONTROL if i in backend.hidden else Kind.USER_DEFINED if i in backend.texts else Kind.UNUSED
        )
        found.scores.append(-1000.0)
    if found.space_prefix:
        found.notes.append(BLANKS)
    if model.unk_id() >= 0:
        found.ids["unk"] = model.unk_id()
    return found


def trainer_kind(proto: bytes) -> int:
    """The `model_type` in the `trainer_spec` of a sentencepiece model, read from the bytes of its protobuf."""
    for number, value in fields_of(proto):
        if number == 2 and isinstance(value, bytes):
            return next((v for n, v in fields_of(value) if n == 3 and isinstance(v, int)), 1)
    return 1


def fields_of(data: bytes) -> list[tuple[int, Any]]:
    """The fields of a protobuf message: numbers with integers or bytes."""
    found: list[tuple[int, Any]] = []
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            found.append((number, varint()))
        else:
            size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
            found.append((number, data[at : at + size]))
            at += size
    return found


def of_json(backend: FastTokenizer) -> Vocabulary:
    """From a `tokenizer.json`, or `vocab.json` and `merges.txt`."""
    fields = json.loads(backend.backend.to_str())
    model = fields["model"]
    if model["type"] != "BPE":
        raise UserError(f"The tokenizer is of type {model['type']}. Only BPE can be exported to GGUF.")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UserError(f"The tokenizer has {name} {model[name]!r}, which GGUF cannot say.")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    ranks = {
        (m if isinstance(m, str) else "".join(m)).replace(" ", ""): -i for i, m in reversed(list(enumerate(merges)))
    }
    n = max([*model["vocab"].values(), *(t["id"] for t in fields["added_tokens"])]) + 1
    found = Vocabulary("gpt2", "", [f"[PAD{i}]" for i in range(n)], [Kind.UNUSED] * n, merges=merges)
    for text, i in model["vocab"].items():
        found.tokens[i], found.kinds[i] = text, Kind.NORMAL
    if model.get("byte_fallback"):
        as_sentencepiece(found, fields, ranks)
    else:
        found.pre = pre_tokenizer(fields["pre_tokenizer"], bool(model.get("ignore_merges")))
        found.notes += normalizer_notes(fields["normalizer"])
        found.notes += [ASCII] * (found.pre in ("tekken", "gpt-4o"))
    add_added_tokens(found, fields["added_tokens"])
    return found


def as_sentencepiece(found: Vocabulary, fields: dict[str, Any], ranks: dict[str, int]) -> None:
    """BPE with bytes for unknown characters, as tokenizers of sentencepiece are converted: the scores of its tokens are
    the ranks of their merges."""
    steps = [*steps_of(fields["normalizer"]), *steps_of(fields["pre_tokenizer"])]
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = next((s for s in steps if s["type"] == "Prepend"), None)
    metaspace = next((s for s in steps if s["type"] == "Metaspace"), None)
    known = [s for s in (prefix, metaspace) if s is not None] + [s for s in steps if s == replaced]
    splits = [s for s in steps if s["type"] == "Split" and s["pattern"] == {"String": " "}]  # finds none any more
    if len(known) + len(splits) != len(steps) or not (metaspace or replaced in steps):
        raise UserError(f"The tokenizer has steps that GGUF cannot say: {', '.join(s['type'] for s in steps)}.")
    found.model, found.pre = "llama", "default"
    scheme = metaspace.get("prepend_scheme", "always") if metaspace else "always" if prefix else "never"
    found.space_prefix = scheme != "never"
    if scheme == "first":
        found.notes.append(BLANKS)
    if metaspace and found.space_prefix:
        found.notes.append("llama.cpp puts a blank even before a text that begins with one")
    found.scores = [float(ranks.get(token, -len(ranks) - 1)) for token in found.tokens]
    found.merges = []
    for i, token in enumerate(found.tokens):
        found.kinds[i] = Kind.BYTE if token in BYTE_TOKENS else found.kinds[i]
    unknown = fields["model"].get("unk_token")
    if unknown in found.tokens:
        found.ids["unk"] = found.tokens.index(unknown)


def add_added_tokens(found: Vocabulary, added: list[dict[str, Any]]) -> None:
    for token in added:
        i = token["id"]
        found.tokens[i] = token["content"]
        found.kinds[i] = Kind.CONTROL if token["special"] else Kind.USER_DEFINED
        if i == found.ids.get("unk"):
            found.kinds[i] = Kind.UNKNOWN
    if trimmed := [t["content"] for t in added if t["lstrip"] or t["rstrip"]]:
        more = ", ..." * (len(trimmed) > 3)
        found.notes.append(f"llama.cpp keeps the blanks beside special tokens ({', '.join(trimmed[:3])}{more})")


def steps_of(part: Optional[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, without the sequences that hold them."""
    return [step for step in steps_in(part) if "type" in step and step["type"] != "Sequence"]


def normalizer_notes(normalizer: Optional[dict[str, Any]]) -> list[str]:
    """What of a normalizer is left out. Raises `UserError` for more than a form of Unicode."""
    names = [step["type"] for step in steps_of(normalizer)]
    if set(names) - {"NFC"}:
        raise UserError(f"The tokenizer has a normalizer that GGUF cannot say: {', '.join(names)}.")
    return ["llama.cpp does not compose characters (Unicode NFC) before it tokenizes"] if names else []


def pre_tokenizer(part: Optional[dict[str, Any]], ignore_merges: bool) -> str:
    """llama.cpp's name of a pre-tokenizer. Raises `UserError` if it has none."""
    steps = [step_name(step) for step in steps_of(part)]
    steps = [step for step in steps if step is not None]
    found = [name for name, known in PRE_TOKENIZERS.items() if known == steps]
    name = next((name for name in found if (name in IGNORE_MERGES) == ignore_merges), None)
    if name is None:
        rules = json.dumps(part, ensure_ascii=False)
        raise UserError(f"llama.cpp has no tokenizer with these rules: {rules[:300]}{'...' * (len(rules) > 300)}")
    return name


def step_name(step: dict[str, Any]) -> Any:
    """A step of a pre-tokenizer in the words of `PRE_TOKENIZERS`; None if it only maps bytes to characters."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return GPT2 if step.get("use_regex", True) else None
    if kind == "Digits":
        return "single digits" if step["individual_digits"] else "digits"
    if kind == "Punctuation" and step["behavior"] == "Contiguous":
        return "punctuation"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex")
    return step  # unknown
