"""Keys and values of the tokens that were already read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Union

import torch

from litgpt.model.config import Config

BLOCK = 256  # the cache grows by whole blocks, never to the whole context at once
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass
class EachRow:
    """Where one new token of each of B texts goes.

    Args:
        rows: (B,)
        places: The position of each token in its text, (B,).
        seen: The rows again, as an index: a slice where they are the first ones.
        longest: The number of tokens of the longest text, the new one included.
    """

    rows: torch.Tensor
    places: torch.Tensor
    seen: Union[slice, torch.Tensor]
    longest: int


class KVCache:
    """One growing pair of tensors per layer, with a row for each text; the texts have lengths of their own.

    A layer with a sliding window holds the last `window` tokens of a text, no more: the token at position p lies at
    place p % window. On a CPU the numbers are float32, also for a 16-bit model: attention of one token to many is many
    times faster there.

    Shapes: R rows, g key-value heads, S places, T new tokens of one text, B texts, hs head size.
    """

    def __init__(self, config: Config) -> None:
        self.windows = [config.window(layer) for layer in range(config.n_layer)]
        self.clear()

    def clear(self) -> None:
        """Free everything."""
        self.layers: list[Pair | None] = [None] * len(self.windows)  # (R, g, S, hs) each
        self.lengths: list[int] = []  # tokens of each row that every layer has read
        self.ids: dict[int, list[int]] = {}  # what was read; kept for models that may have to read it again

    def length(self, row: int) -> int:
        return self.lengths[row] if row < len(self.lengths) else 0

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Note that every layer has so many more tokens of these rows."""
        self.lengths += [0] * (max(rows) + 1 - len(self.lengths))
        for row, n in zip(rows, tokens):
            self.lengths[row] += n

    def keep(self, row: int, length: int) -> int:
        """Forget what a row has behind its first `length` tokens; how many of them could be kept. It is none where a
        window has moved past what it would have to show."""
        have = self.length(row)
        passed = any(window is not None and window < have for window in self.windows)
        kept = 0 if passed and length < have else min(length, have)
        if row < len(self.lengths):
            self.lengths[row] = kept
            self.ids[row] = self.ids.get(row, [])[:kept]
        return kept

    def move(self, source: int, target: int) -> None:
        """Let `target` hold what `source` holds."""
        if source >= len(self.lengths):  # a text of which nothing was read yet
            self.keep(target, 0)
            return
        for stored in self.layers:
            for t in stored or ():
                t[target] = t[source]
        self.lengths[target], self.ids[target] = self.lengths[source], list(self.ids.get(source, []))

    def copy(self, source: int, targets: Sequence[int]) -> None:
        """Let all of `targets`, which may be new rows, hold what `source` holds."""
        length, rows = self.lengths[source], max(targets) + 1
        numbers = list(targets)
        for layer, (stored, window) in enumerate(zip(self.layers, self.windows)):
            places = length if window is None else min(length, window)
            for t in self.room(layer, *stored, rows, places) if stored is not None else ():
                t[numbers, :, :places] = t[source, :, :places].clone()
        self.lengths += [0] * (rows - len(self.lengths))
        for target in targets:
            self.lengths[target], self.ids[target] = length, list(self.ids.get(source, []))

    def append(self, layer: int, row: int, k: torch.Tensor, v: torch.Tensor) -> Pair:
        """Add (1, g, T, hs) to a row and return what the new tokens may see, the new ones last.

        Lengths move with `advance`, once all layers have the new tokens.

        Returns:
            Keys and values, (1, g, S, hs). Without a window, S = length + T. With one, a single new token gets all
            that it sees, in any order; several new tokens get up to `window` - 1 older ones, in order.
        """
        length, window = self.length(row), self.windows[layer]
        end = length + k.size(2)
        stored = [t[row : row + 1] for t in self.room(layer, k, v, row + 1, end)]
        if window is not None and end > window:
            return self.append_to_window(stored, (k, v), length, window)
        for places, t in zip(stored, (k, v)):
            places[:, :, length:end] = t
        return tuple(places[:, :, :end] for places in stored)  # type: ignore[return-value]

    @staticmethod
    def append_to_window(stored: Sequence[torch.Tensor], new: Pair, length: int, window: int) -> Pair:
        end, device = length + new[0].size(2), new[0].device
        if end == length + 1:
            for places, t in zip(stored, new):
                places[:, :, length % window] = t[:, :, 0]
            return tuple(stored)  # type: ignore[return-value]
        old = torch.arange(max(0, length - window + 1), length, device=device) % window
        seen = [torch.cat([places[:, :, old], t.to(places.dtype)], dim=2) for places, t in zip(stored, new)]
        kept = torch.arange(end - window, end, device=device) % window
        for places, t in zip(stored, seen):
            places[:, :, kept] = t[:, :, -window:]
        return tuple(seen)  # type: ignore[return-value]

    def each_row(self, rows: Sequence[int], device: torch.device) -> EachRow:
        lengths = [self.length(row) for row in rows]
        numbers = torch.tensor(list(rows), device=device)
        first = slice(0, len(rows)) if list(rows) == list(range(len(rows))) else numbers
        return EachRow(numbers, torch.tensor(lengths, device=device), first, max(lengths) + 1)

    def append_to_each(self, layer: int, each: EachRow, k: torch.Tensor, v: torch.Tensor) -> Pair:
        """Add one token (B, g, hs) to each of several rows.

        Returns:
            Keys and values (B, g, S, hs); a text that is shorter than S has nothing of use behind its end.
        """
        window = self.windows[layer]
        stored = self.room(layer, k[:, :, None], v[:, :, None], int(each.rows.max()) + 1, each.longest)
        at, seen = each.places, each.longest
        if window is not None:
            at, seen = at % window, min(seen, window)
        for places, t in zip(stored, (k, v)):
            places[each.rows, :, at] = t.to(places.dtype)
        return tuple(places[each.seen, :, :seen] for places in stored)  # type: ignore[return-value]

    def room(self, layer: int, k: torch.Tensor, v: torch.Tensor, rows: int, places: int) -> Pair:
        """The tensors of a layer, grown to hold so many rows and places."""
        stored, window = self.layers[layer], self.windows[layer]
        had_rows, had_places = (stored[0].size(0), stored[0].size(2)) if stored is not None else (0, 0)
        if window is not None:
            places = min(places, window)
        if stored is None or had_rows < rows or had_places < places:
            rows = had_rows if rows <= had_rows else max(rows, 2 * had_rows)
            if places > had_places:
                places = -(-max(places, had_places * 3 // 2) // BLOCK) * BLOCK
                places = min(places, window) if window is not None else places
            dtype = torch.float32 if k.device.type == "cpu" else k.dtype
            # zeros: attention multiplies what is masked by 0, which must not meet a NaN
            grown = tuple(t.new_zeros(rows, t.size(1), max(places, had_places), t.size(3), dtype=dtype) for t in (k, v))
            if stored is not None:
                for new, old in zip(grown, stored):
                    new[:had_rows, :, :had_places] = old
            stored = self.layers[layer] = grown  # type: ignore[assignment]
        return stored  # type: ignore[return-value]
