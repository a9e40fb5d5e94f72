"""Rows of instructions as LitGPT's padded batches, for loops in Python. Our own loop uses `litgpt.data.batches`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Optional, Union

import torch
from torch import Tensor
from torch.utils.data import Dataset

from litgpt.text.prompts import PromptStyle
from litgpt.text.tokenizer import Tokenizer

Sample = dict[str, Any]


def encode(tokenizer: Any, text: str, **options: Any) -> Tensor:
    """Token IDs of a text, shape (T,). `options` are `bos`, `eos`, and `max_length` of LitGPT's `Tokenizer.encode`."""
    if type(tokenizer) is not Tokenizer:
        return tokenizer.encode(text, **options)
    ids = tokenizer.encode(text, special=options.get("bos") is not False, eos=options.get("eos", False))
    length = options.get("max_length", -1)
    return torch.tensor(ids[:length] if length > 0 else ids)


class SFTDataset(Dataset):
    """Instructions with answers, tokenized on access.

    Each sample has `input_ids` and `labels`, both of shape (T,), and `token_counts`: the tokens of the instruction and
    the answer alone, `raw`, and of the sample, `raw_plus_prompt_template`.

    Args:
        data: Rows with `instruction`, `output`, and perhaps `input` and more, which the prompt style receives.
        tokenizer: A `litgpt.Tokenizer`, or an object with its `encode`.
        prompt_style: A style or its name.
        max_seq_length: Maximum length of a sample in tokens; -1 for no limit.
        mask_prompt: Train on answers only.
        ignore_index: The label of tokens that are not trained on.
        transform: Applied to each row first.
    """

    def __init__(
        self,
        data: Sequence[dict[str, str]],
        tokenizer: Any,
        prompt_style: Union[str, PromptStyle],
        max_seq_length: int = -1,
        mask_prompt: bool = True,
        ignore_index: int = -100,
        transform: Optional[Callable[[Any], Any]] = None,
    ) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.prompt_style = PromptStyle.from_name(prompt_style) if isinstance(prompt_style, str) else prompt_style
        self.max_seq_length, self.mask_prompt, self.ignore_index = max_seq_length, mask_prompt, ignore_index
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, idx: int) -> Sample:
        row: Any = self.data[idx]
        if self.transform is not None:
            row = self.transform(row)
        style, limit = self.prompt_style, self.max_seq_length
        own = style.own_special_tokens  # the style writes BOS and the stop token
        end = style.turn_end(getattr(self.tokenizer, "special_tokens", ())) if own else None
        text = style.apply(prompt=row["instruction"], **row)
        prompt = encode(self.tokenizer, text, max_length=limit, **({"bos": False} if own else {}))
        answer = encode(self.tokenizer, row["output"] + (end or ""), bos=False, eos=end is None, max_length=limit)
        ids = torch.cat((prompt, answer)).to(torch.int64)
        ids = ids[:limit] if limit > 0 else ids
        labels = ids.clone()
        if self.mask_prompt:
            labels[: len(prompt)] = self.ignore_index
        raw = len(encode(self.tokenizer, row["instruction"], max_length=limit)) + len(answer)
        return {
            "input_ids": ids,
            "labels": labels,
            "token_counts": {"raw": raw, "raw_plus_prompt_template": len(ids)},
        }


def get_sft_collate_fn(
    max_seq_length: int = -1, pad_id: int = 0, ignore_index: int = -100
) -> Callable[[list[Sample]], Sample]:
    """A function that makes one batch of B samples, padded on the right to the longest: `input_ids` and `labels` of
    shape (B, T), `token_counts` of shape (B, 1).

    Args:
        max_seq_length: Maximum length in tokens; -1 for no limit.
        pad_id: Pads `input_ids`.
        ignore_index: Pads `labels`.
    """
    return partial(collate, max_seq_length=max_seq_length, pad_id=pad_id, ignore_index=ignore_index)


def collate(samples: list[Sample], max_seq_length: int, pad_id: int, ignore_index: int) -> Sample:
    batch: Sample = {}
    for key, padding in (("input_ids", pad_id), ("labels", ignore_index)):
        rows = [sample[key] for sample in samples]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        batch[key] = padded[:, :max_seq_length] if max_seq_length > 0 else padded
    batch["token_counts"] = {
        key: torch.tensor([sample["token_counts"][key] for sample in samples], dtype=torch.int64).unsqueeze(1)
        for key in ("raw", "raw_plus_prompt_template")
    }
    return batch
