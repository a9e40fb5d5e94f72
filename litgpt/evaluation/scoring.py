"""Log-likelihoods of many continuations.

Texts lie end to end without padding, and what several of them begin with is read once: the context of a question for
all its answers, the examples before it for all questions, the common words of two sentences.

Shapes: N tokens read, C = n_embd, V = padded_vocab_size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional

import torch

from litgpt.errors import UserError
from litgpt.model import GPT, KVCache

SAVED = 16  # tokens that must be saved by reading the beginning of some texts apart, more for small models:
EFFORT = {"cpu": 4e6, "cuda": 8e9}  # products in a layer that take as long as reading a piece more
LOGITS = 2**24  # numbers of logits that are held at once
CPU_TOKENS = 2048  # read at once by default: on a CPU more is not faster
GPU_TOKENS = 16384
PADDED = 32  # times these tokens are the places of a cache at most, whose rows are as long as the longest

Ids = tuple[int, ...]


@dataclass
class Piece:
    """A part of one or several texts that begin alike up to its end.

    Args:
        text: The number of one of them.
        start: Where it begins in the text.
        parent: The piece before it.
        depth: How many pieces are before it.
        shared: Whether a further piece follows it.
    """

    text: int
    start: int
    end: int
    parent: Optional[int]
    depth: int
    shared: bool = False


def shared_length(a: Ids, b: Ids, known: int = 0) -> int:
    """How many tokens two texts have in common at their beginning; at least the first `known` ones."""
    most = min(len(a), len(b))
    if a[known:most] == b[known:most]:
        return most
    return next(i for i in range(known, most) if a[i] != b[i])


def worthwhile(model: GPT) -> float:
    """How many tokens must be saved for a piece to be read apart. A layer has about 12 C^2 weights."""
    return max(SAVED, EFFORT["cpu" if model.device.type == "cpu" else "cuda"] / (12 * model.config.n_embd**2))


def divide(texts: Sequence[Ids], saved: float) -> tuple[list[Piece], list[list[int]]]:
    """The pieces of some texts, and for each text the numbers of those that make it up.

    Args:
        texts: All different, in order.
        saved: The tokens that a piece must save.
    """
    pieces: list[Piece] = []
    paths: list[list[int]] = [[] for _ in texts]
    todo: list[tuple[int, int, int, int, list[int]]] = [(0, len(texts), 0, 0, [])]
    while todo:
        low, high, start, known, path = todo.pop()  # the texts from low to high have `known` tokens in common
        alone = high - low == 1
        known = len(texts[low]) if alone else shared_length(texts[low], texts[high - 1], known)
        if (alone and known > start) or (known - start) * (high - low - 1) >= saved:
            pieces.append(Piece(low, start, known, path[-1] if path else None, len(path)))
            if path:
                pieces[path[-1]].shared = True
            path, start = [*path, len(pieces) - 1], known
        if alone:
            paths[low] = path
            continue
        first = low
        for i in range(low + 1, high + 1):  # those that go on with the same token stay together
            if i == high or texts[i][known : known + 1] != texts[first][known : known + 1]:
                todo.append((first, i, start, known, path))
                first = i
    return pieces, paths


def read(model: GPT, texts: Sequence[Ids], pieces: Sequence[Piece]) -> list[torch.Tensor]:
    """What the head reads of each piece, (tokens, C)."""
    outputs: dict[int, torch.Tensor] = {}

    def hidden(numbers: Sequence[int], cache: Optional[KVCache] = None, rows: Optional[Sequence[int]] = None) -> None:
        parts = [texts[pieces[i].text][pieces[i].start : pieces[i].end] for i in numbers]
        lengths = [len(part) for part in parts]
        ids = torch.tensor([[i for part in parts for i in part]], device=model.device)
        outputs.update(zip(numbers, model.hidden(ids, lengths, cache, rows)[0].split(lengths)))

    alone = [i for i, piece in enumerate(pieces) if piece.parent is None and not piece.shared]
    if alone:
        hidden(alone)
    cache, row_of, used = KVCache(model.config), dict[int, int](), 0
    left = [i for i in range(len(pieces)) if i not in outputs]
    for depth in range(max((pieces[i].depth for i in left), default=-1) + 1):
        level = [i for i in left if pieces[i].depth == depth]
        copies: dict[int, list[int]] = {}
        taken = set()
        for i in level:
            parent = pieces[i].parent
            if parent is not None and parent not in taken:  # the first one goes on where its parent is
                taken.add(parent)
                row_of[i] = row_of[parent]
                continue
            row_of[i], used = used, used + 1
            if parent is not None:
                copies.setdefault(row_of[parent], []).append(row_of[i])
        for source, targets in copies.items():
            cache.copy(source, targets)
        level.sort(key=row_of.__getitem__)
        hidden(level, cache, [row_of[i] for i in level])
    return [outputs[i] for i in range(len(pieces))]


def likelihoods(model: GPT, texts: Sequence[Ids], targets: Sequence[Sequence[Ids]]) -> list[list[tuple[float, bool]]]:
    """For each text and each of its targets their log-probability, in nats, and whether each is the likeliest token.

    Args:
        texts: All different, in order.
        targets: What follows the last tokens of a text, one token after each: as (t + 1)[-n:] for a text t and n
            targets.
    """
    if model.switch is None:
        pieces, paths = divide(texts, worthwhile(model))
    else:  # the beginning of a long text is read otherwise than a short text
        pieces = [Piece(i, 0, len(text), None, 0) for i, text in enumerate(texts)]
        paths = [[i] for i in range(len(texts))]
    read_pieces = read(model, texts, pieces)
    first = torch.tensor([0, *(len(h) for h in read_pieces)]).cumsum(0).tolist()
    places: list[int] = []
    wanted: list[int] = []
    for path, some in zip(paths, targets):
        most = max(map(len, some))
        own: list[int] = []
        for i in reversed(path):
            own = [*range(first[i], first[i + 1]), *own] if len(own) < most else own
        for target in some:
            places += own[len(own) - len(target) :]
            wanted += target
    unique, at = torch.tensor(places).unique(return_inverse=True)
    hidden = torch.cat(read_pieces)
    ids, logprobs, likeliest = (
        torch.tensor(wanted),
        torch.empty(len(wanted)),
        torch.empty(len(wanted), dtype=torch.bool),
    )
    size = max(1, LOGITS // model.config.padded_vocab_size)
    for start in range(0, len(unique), size):
        logits = model.lm_head(hidden[unique[start : start + size].to(hidden.device)]).float()
        some_pairs = (at >= start) & (at < start + size)
        row, token = ((t[some_pairs] - d).to(hidden.device) for t, d in ((at, start), (ids, 0)))
        logprobs[some_pairs] = (logits[row, token] - logits.logsumexp(-1)[row]).cpu()
        likeliest[some_pairs] = (logits.argmax(-1)[row] == token).cpu()
    lengths = [len(target) for some in targets for target in some]
    each = iter(zip(logprobs.double().split(lengths), likeliest.split(lengths)))
    return [[(float(p.sum()), bool(best.all())) for p, best in (next(each) for _ in some)] for some in targets]


@torch.no_grad()
def score(
    model: GPT,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch: Optional[int] = None,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[float, bool]]:
    """The log-likelihood of each continuation after its context, in nats, and whether greedy decoding would say it.

    Args:
        requests: Contexts, of a token at least, and continuations, as ids. What is too long loses its beginning.
        batch: How many different texts are read at once; None for as many as make good use of the device.
        show: Is told how many tokens were read, of how many.

    Raises:
        UserError: a continuation is longer than what the model reads.
    """
    most = model.config.block_size
    answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    wanted: dict[Ids, dict[Ids, list[int]]] = {}
    sizes: dict[Ids, int] = {}
    for i, (context, continuation) in enumerate(requests):
        if len(continuation) > most:
            raise UserError(f"A continuation has {len(continuation)} tokens; the model reads at most {most}.")
        if continuation:
            text = tuple([*context, *continuation][-(most + 1) : -1])
            wanted.setdefault(text, {}).setdefault(tuple(continuation), []).append(i)
            sizes.setdefault(text, len(context).bit_length())
    # the longest first, so that a full memory shows at once; then by tokens, so that what begins alike is read together
    texts = sorted(wanted, key=lambda text: (-sizes[text], text))
    news = [len(b) - (shared_length(a, b) if model.switch is None else 0) for a, b in zip([(), *texts], texts)]
    done, total, start = 0, sum(news), 0
    tokens = CPU_TOKENS if model.device.type == "cpu" else GPU_TOKENS
    while start < len(texts):
        end = fill(texts, news, start, tokens) if batch is None else min(start + batch, len(texts))
        group = sorted(texts[start:end])
        targets = [list(wanted[text]) for text in group]
        try:
            found = likelihoods(model, group, targets)
        except torch.OutOfMemoryError:
            if batch is not None or end - start == 1:
                raise
            tokens = max(1, tokens // 2)
            continue
        for text, some, scores in zip(group, targets, found):
            for target, answer in zip(some, scores):
                for i in wanted[text][target]:
                    answers[i] = answer
        done, start = done + sum(news[start:end]), end
        show(done, total)
    return answers


def fill(texts: Sequence[Ids], news: Sequence[int], start: int, tokens: int) -> int:
    """Where the batch ends that begins with the text `start` and has so many new tokens; one text at least."""
    end, longest, read_tokens = start, 0, 0
    while end < len(texts):
        longest = max(longest, len(texts[end]))
        read_tokens += news[end] if end > start else len(texts[end])
        if end > start and (read_tokens > tokens or longest * (end - start) > PADDED * tokens):
            break
        end += 1
    return end
