"""Log-likelihoods of many continuations.

Texts are laid end to end without padding, and a prefix that several of them share is read once: the context of a
question for all its answers, the few-shot examples for all questions, the common words of two sentences.

Shapes: N tokens read, C = n_embd, V = padded_vocab_size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional

import torch

from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.model.kv_cache import KVCache

MIN_SAVED = 16  # tokens that reading a shared prefix separately must save; more for small models
SEGMENT_COST = {"cpu": 4e6, "cuda": 8e9}  # multiplications per layer that take as long as reading one more segment
MAX_LOGITS = 2**24  # logits in memory at once
CPU_TOKENS = 2048  # default batch in tokens; larger ones are not faster on a CPU
GPU_TOKENS = 16384
MAX_CACHE_RATIO = 32  # limit of the positions in the cache, whose rows have equal lengths, per token of a batch

Ids = tuple[int, ...]


@dataclass
class Segment:
    """A part of one text, or of several that are equal up to its end."""

    text: int  # the index of one of them
    start: int  # its first token in the text
    end: int  # the token after its last one
    parent: Optional[int]  # the segment before it
    depth: int  # how many segments precede it
    shared: bool = False  # whether another segment follows it


def shared_length(a: Ids, b: Ids, known: int = 0) -> int:
    """Length of the common prefix of two texts, which is at least `known`."""
    most = min(len(a), len(b))
    if a[known:most] == b[known:most]:
        return most
    return next(i for i in range(known, most) if a[i] != b[i])


def min_saved(model: GPT) -> float:
    """How many tokens a separate segment must save. A layer has about 12 C^2 weights."""
    cost = SEGMENT_COST["cpu" if model.device.type == "cpu" else "cuda"]
    return max(MIN_SAVED, cost / (12 * model.config.n_embd**2))


def split_texts(texts: Sequence[Ids], saved: float) -> tuple[list[Segment], list[list[int]]]:
    """Split texts, all different and sorted, into segments that save `saved` tokens each. Returns them, and for each
    text the indices of its segments."""
    segments: list[Segment] = []
    paths: list[list[int]] = [[] for _ in texts]
    todo: list[tuple[int, int, int, int, list[int]]] = [(0, len(texts), 0, 0, [])]
    while todo:
        low, high, start, known, path = todo.pop()  # the texts from low to high share their first `known` tokens
        alone = high - low == 1
        known = len(texts[low]) if alone else shared_length(texts[low], texts[high - 1], known)
        if (alone and known > start) or (known - start) * (high - low - 1) >= saved:
            segments.append(Segment(low, start, known, path[-1] if path else None, len(path)))
            if path:
                segments[path[-1]].shared = True
            path, start = [*path, len(segments) - 1], known
        if alone:
            paths[low] = path
            continue
        first = low
        for i in range(low + 1, high + 1):  # group the texts by their next token
            if i == high or texts[i][known : known + 1] != texts[first][known : known + 1]:
                todo.append((first, i, start, known, path))
                first = i
    return segments, paths


def read_segments(model: GPT, texts: Sequence[Ids], segments: Sequence[Segment]) -> list[torch.Tensor]:
    """The final hidden states of each segment, (tokens, C)."""
    outputs: dict[int, torch.Tensor] = {}

    def read(indices: Sequence[int], cache: Optional[KVCache] = None, rows: Optional[Sequence[int]] = None) -> None:
        parts = [texts[segments[i].text][segments[i].start : segments[i].end] for i in indices]
        lengths = [len(part) for part in parts]
        ids = torch.tensor([[i for part in parts for i in part]], device=model.device)
        outputs.update(zip(indices, model.hidden(ids, lengths, cache, rows)[0].split(lengths)))

    alone = [i for i, segment in enumerate(segments) if segment.parent is None and not segment.shared]
    if alone:
        read(alone)
    cache, row_of, n_rows = KVCache(model.config), dict[int, int](), 0
    cached = [i for i in range(len(segments)) if i not in outputs]
    for depth in range(max((segments[i].depth for i in cached), default=-1) + 1):
        level = [i for i in cached if segments[i].depth == depth]
        copies: dict[int, list[int]] = {}
        continued = set()
        for i in level:
            parent = segments[i].parent
            if parent is not None and parent not in continued:  # the first child continues the row of its parent
                continued.add(parent)
                row_of[i] = row_of[parent]
                continue
            row_of[i], n_rows = n_rows, n_rows + 1
            if parent is not None:
                copies.setdefault(row_of[parent], []).append(row_of[i])
        for source, targets in copies.items():
            cache.copy(source, targets)
        level.sort(key=row_of.__getitem__)
        read(level, cache, [row_of[i] for i in level])
    return [outputs[i] for i in range(len(segments))]


def likelihoods(model: GPT, texts: Sequence[Ids], targets: Sequence[Sequence[Ids]]) -> list[list[tuple[float, bool]]]:
    """For each target of each text the sum of its log-probabilities, in nats, and whether each of its tokens is the
    most likely one. The texts are all different, and sorted. The targets are the tokens that follow the last tokens of
    a text: `(t + 1)[-n:]` for a text t and n target tokens."""
    if model.switch is None:
        segments, paths = split_texts(texts, min_saved(model))
    else:  # the beginning of a long text is read differently from a short text
        segments = [Segment(i, 0, len(text), None, 0) for i, text in enumerate(texts)]
        paths = [[i] for i in range(len(texts))]
    states = read_segments(model, texts, segments)
    starts = torch.tensor([0, *(len(h) for h in states)]).cumsum(0).tolist()
    positions: list[int] = []  # in the concatenated states, of the token before each target token
    tokens: list[int] = []
    for path, own_targets in zip(paths, targets):
        longest = max(map(len, own_targets))
        own: list[int] = []
        for i in reversed(path):
            own = [*range(starts[i], starts[i + 1]), *own] if len(own) < longest else own
        for target in own_targets:
            positions += own[len(own) - len(target) :]
            tokens += target
    logprobs, greedy = token_logprobs(model, torch.cat(states), torch.tensor(positions), torch.tensor(tokens))
    lengths = [len(target) for own_targets in targets for target in own_targets]
    scores = zip(logprobs.double().split(lengths), greedy.split(lengths))
    return [[(float(p.sum()), bool(g.all())) for p, g in (next(scores) for _ in own)] for own in targets]


def token_logprobs(
    model: GPT, states: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each token at its position, and whether it is the most likely token there. Positions are
    indices into `states` (N, C); logits are computed once for each different one."""
    logprobs, greedy = torch.empty(len(tokens)), torch.empty(len(tokens), dtype=torch.bool)
    unique, at = positions.unique(return_inverse=True)
    size = max(1, MAX_LOGITS // model.config.padded_vocab_size)
    for start in range(0, len(unique), size):
        logits = model.lm_head(states[unique[start : start + size].to(states.device)]).float()
        chosen = (at >= start) & (at < start + size)
        row, token = (at[chosen] - start).to(states.device), tokens[chosen].to(states.device)
        logprobs[chosen] = (logits[row, token] - logits.logsumexp(-1)[row]).cpu()
        greedy[chosen] = (logits.argmax(-1)[row] == token).cpu()
    return logprobs, greedy


@torch.no_grad()
def score(
    model: GPT,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch: Optional[int] = None,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[float, bool]]:
    """The log-likelihood of each continuation after its context, in nats, and whether greedy decoding would produce it.

    Args:
        requests: Contexts of at least one token, and continuations, as ids. Texts that are too long lose their
            beginning. A continuation longer than the model's context raises `UserError`.
        batch: How many different texts are read at once; None to choose by their lengths and the device.
        show: Called with the number of tokens read so far and in total.
    """
    most = model.config.block_size
    results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    asked: dict[Ids, dict[Ids, list[int]]] = {}  # by text and continuation, the indices of requests
    sizes: dict[Ids, int] = {}
    for i, (context, continuation) in enumerate(requests):
        if len(continuation) > most:
            raise UserError(f"A continuation has {len(continuation)} tokens; the model reads at most {most}.")
        if continuation:
            text = tuple([*context, *continuation][-(most + 1) : -1])
            asked.setdefault(text, {}).setdefault(tuple(continuation), []).append(i)
            sizes.setdefault(text, len(context).bit_length())
    # the longest first, so that too little memory shows at once; then by tokens, so that shared prefixes are adjacent
    texts = sorted(asked, key=lambda text: (-sizes[text], text))
    n_new = [len(b) - (shared_length(a, b) if model.switch is None else 0) for a, b in zip([(), *texts], texts)]
    done, total, start = 0, sum(n_new), 0
    tokens = CPU_TOKENS if model.device.type == "cpu" else GPU_TOKENS
    while start < len(texts):
        end = batch_end(texts, n_new, start, tokens) if batch is None else min(start + batch, len(texts))
        group = sorted(texts[start:end])
        targets = [list(asked[text]) for text in group]
        try:
            found = likelihoods(model, group, targets)
        except torch.OutOfMemoryError:
            if batch is not None or end - start == 1:
                raise
            tokens = max(1, tokens // 2)
            continue
        for text, own_targets, scores in zip(group, targets, found):
            for target, result in zip(own_targets, scores):
                for i in asked[text][target]:
                    results[i] = result
        done, start = done + sum(n_new[start:end]), end
        show(done, total)
    return results


def batch_end(texts: Sequence[Ids], n_new: Sequence[int], start: int, tokens: int) -> int:
    """Where the batch ends that begins at the text `start` and reads about `tokens` tokens; at least one text."""
    end, longest, n_read = start, 0, 0
    while end < len(texts):
        longest = max(longest, len(texts[end]))
        n_read += n_new[end] if end > start else len(texts[end])
        if end > start and (n_read > tokens or longest * (end - start) > MAX_CACHE_RATIO * tokens):
            break
        end += 1
    return end
