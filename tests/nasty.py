"""Texts that tokenizers disagree about, made by code, and how text comes piece by piece."""

import itertools
import random
import unicodedata
from collections.abc import Iterable, Sequence

from litgpt.generate.answers import TextStream
from litgpt.text.tokenizer import Tokenizer

SCRIPTS = (
    "Straße façade naïve Łódź ﬁne ½ İstanbul ǆ", "Ελληνικά ὕδωρ", "Привет, мир ёж", "שָׁלוֹם עולם",
    "السَّلَامُ عليكم ٠١٢٣",
    "नमस्ते क्षत्रिय १२३", "বাংলা", "தமிழ் மொழி", "ไม่เป็นไรครับ", "ສະບາຍດີ", "བོད་སྐད", "ქართული", "Հայերեն", "አማርኛ", "ភាសាខ្មែរ",
    "한국어 조선말 ㄱㄴ", "\u1112\u1161\u11ab", "ひらがなが", "カタカナ ｶﾀｶﾅ", "漢字汉字龘𠮷𪚥", "ᏣᎳᎩ", "ᚠᚢᚦ",
    "𐌲𐌿𐍄", "𒀀𒁀",
    "𝒜𝓑𝔠 ∀x∈ℝ ∑∫√", "⠃⠗⠇", "ＦＵＬＬ ｗｉｄｔｈ １２３",
)  # fmt: skip
EMOJI = (
    "😀🦙", "👩‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈", "🇵🇹🇨🇭", "❤️", "☺︎", "🧑🏿‍🚀", "1️⃣", "🏴\U000e0067\U000e0062\U000e007f",
)  # fmt: skip
BLANKS = (
    " ", "  ", "   ", " " * 7, " " * 33, "\t", "\t\t", "\n", "\n\n", "\r\n", "\r", " \n ", "\t \n\t",
    "\v", "\f", "\x85",
    "\xa0", "\u1680", "\u2003", "\u2028", "\u2029", "\u200b", "\u202f", "\u3000", "\ufeff", "▁", "▁▁", "Ġ",
    "Ċ", "\n " * 5,
)  # fmt: skip
WORDS = (
    "Hello", "world", "don't", "I'LL", "we've", "it's", "'s", "1234567", "3.14159", "1e-05", "a_b", "x+=1",
    "http://a.b/c?d=e",
    "!!!", "...", "—", "“q”", "<b>", "{}", "()", "\\n", "%s", "#!", "ünïcödé", "CamelCase", "ALLCAPS", "foo.bar",
    "@me", "$5",
)  # fmt: skip
SPECIAL = (
    "<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|begin_of_text|>",
    "[INST]",
    "[/INST]", "<|user|>", "<|end|>", "<0x0A>", "<0xE2>", "<pad>", "<|", "|>", "< s >", "<S>", ">>TITLE<<",
    "<|padding|>",
)  # fmt: skip


def nasty_texts(n: int = 600, special: tuple[str, ...] = SPECIAL) -> list[str]:
    """At least `n` texts: all scripts, emoji, control characters, blanks, special tokens as text, none at all.

    Args:
        n: How many, at least.
        special: The texts of special tokens that are mixed in.
    """
    draw = random.Random(0)
    alone = [*SCRIPTS, *EMOJI, *BLANKS, *WORDS, *special]
    texts = ["", *alone]
    texts += [f" {t}" for t in alone] + [f"{t} " for t in alone[:60]] + [f"a{t}b" for t in alone]
    texts += [unicodedata.normalize(form, t) for form in ("NFC", "NFD", "NFKC", "NFKD") for t in SCRIPTS[:18]]
    texts += [chr(i) for i in range(32)] + [chr(i) for i in range(127, 162)] + [f"x{chr(i)}y" for i in range(32)]
    texts += [
        "\ufffd",
        "\ufffe",
        "\uffff",
        "\ud7ff\ue000",
        "\U00010000",
        "\U0010ffff",
        "e\u0301\u0323",
        "\u0301",
        "\u200d",
    ]
    texts += [
        "a" * 1000,
        "ab" * 700,
        "é" * 300,
        "🦙" * 60,
        "word" * 250 + " end",
        "0123456789" * 30,
        "-" * 500,
        "\n" * 80,
    ]
    texts += [f"{a}{a}" for a in special] + [f"{a} {b}" for a, b in itertools.pairwise(special)]
    while len(texts) < n + len(alone):
        parts = draw.choices(alone, k=draw.randint(2, 9))
        texts.append(draw.choice(("", " ", "", "\n")).join(parts))
    return texts


def pieces(tokenizer: Tokenizer, prompt: Sequence[int], new: Iterable[int]) -> list[str]:
    """The pieces of text that are given out as the tokens come."""
    stream = TextStream(tokenizer, prompt)
    return [piece for piece in (*(stream.push([i]) for i in new), stream.close()) if piece]
