"""Keys and values of the tokens that the model has already processed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import torch

from litgpt.model.config import Config
from litgpt.model.kernels import empty_cache

BLOCK = 256  # positions that the cache grows by
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass
class EachRow:
    """Where one new token of each of B sequences goes in the cache."""

    rows: torch.Tensor  # the cache row of each sequence, (B,)
    positions: torch.Tensor  # the position of each token in its sequence, (B,)
    index: Union[slice, torch.Tensor]  # `rows` as an index: a slice if they are the first rows of the cache
    n_rows: int  # that the cache needs
    shortest: int  # length of the shortest sequence, with its new token
    longest: int
    made: dict[Any, torch.Tensor] = field(default_factory=dict)  # what all layers share

    def lengths(self, slots: int) -> torch.Tensor:
        """How many of the slots each sequence fills, (B,), int32."""
        if slots not in self.made:
            self.made[slots] = (self.positions + 1).clamp(max=slots).int()
        return self.made[slots]

    def mask(self, slots: int) -> Optional[torch.Tensor]:
        """Where slots are filled, (B, 1, 1, slots); None if all are."""
        if slots <= self.shortest:
            return None
        if ("mask", slots) not in self.made:
            filled = torch.arange(slots, device=self.rows.device) < self.lengths(slots)[:, None, None, None]
            self.made["mask", slots] = filled
        return self.made["mask", slots]


class KVCache:
    """A growing pair of tensors per layer, with a row for each sequence. Sequences may differ in length.

    A layer with a sliding window keeps only the last `window` tokens of a sequence: position p is stored at p % window.

    Shapes: R rows, g key-value heads, S slots, T new tokens of one sequence, B sequences, hs head size.
    """

    def __init__(self, config: Config) -> None:
        self.windows = [config.window(layer) for layer in range(config.n_layer)]
        self.longest = config.block_size
        self.clear()

    def clear(self) -> None:
        self.layers: list[Pair | None] = [None] * len(self.windows)  # (R, g, S, hs) each
        self.lengths: list[int] = []  # tokens of each row that every layer has
        self.ids: dict[int, list[int]] = {}  # tokens of each row, for models that may have to process them again

    def length(self, row: int) -> int:
        return self.lengths[row] if row < len(self.lengths) else 0

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Record that every layer has the new tokens of these rows."""
        self.lengths += [0] * (max(rows) + 1 - len(self.lengths))
        for row, n in zip(rows, tokens):
            self.lengths[row] += n

    def keep(self, row: int, length: int) -> int:
        """Truncate a row to `length` tokens. Returns how many are left: 0 if a window no longer holds all it needs."""
        have = self.length(row)
        moved_on = any(window is not None and window < have for window in self.windows)
        kept = 0 if moved_on and length < have else min(length, have)
        if row < len(self.lengths):
            self.lengths[row] = kept
            self.ids[row] = self.ids.get(row, [])[:kept]
        return kept

    def copy(self, source: int, targets: Sequence[int]) -> None:
        """Copy a row over others, which may be new."""
        length, rows = self.length(source), max(targets) + 1
        for layer, (stored, window) in enumerate(zip(self.layers, self.windows)):
            slots = length if window is None else min(length, window)
            for t in self.room(layer, *stored, rows, slots) if stored is not None and slots else ():
                for target in targets:
                    t[target, :, :slots] = t[source, :, :slots]
        self.lengths += [0] * (rows - len(self.lengths))
        for target in targets:
            self.lengths[target], self.ids[target] = length, list(self.ids.get(source, []))

    def append(self, layer: int, row: int, k: torch.Tensor, v: torch.Tensor) -> Pair:
        """Add keys and values (1, g, T, hs) to a row. Call `advance` once all layers have them. Returns what the new
        tokens may attend to, (1, g, S, hs), with the new tokens last. Without a window, S is length + T. With one, a
        single new token gets all keys that it sees, in any order; several get up to `window` - 1 older ones, in order.
        """
        length, window = self.length(row), self.windows[layer]
        end = length + k.size(2)
        stored = [t[row : row + 1] for t in self.room(layer, k, v, row + 1, end)]
        if window is not None and end > window:
            return self.append_to_window(stored, (k, v), length, window)
        for cached, t in zip(stored, (k, v)):
            cached[:, :, length:end] = t
        return tuple(cached[:, :, :end] for cached in stored)  # type: ignore[return-value]

    @staticmethod
    def append_to_window(stored: Sequence[torch.Tensor], new: Pair, length: int, window: int) -> Pair:
        end, device = length + new[0].size(2), new[0].device
        if end == length + 1:
            for cached, t in zip(stored, new):
                cached[:, :, length % window] = t[:, :, 0]
            return tuple(stored)  # type: ignore[return-value]
        old = torch.arange(max(0, length - window + 1), length, device=device) % window
        visible = [torch.cat([cached[:, :, old], t.to(cached.dtype)], dim=2) for cached, t in zip(stored, new)]
        kept = torch.arange(end - window, end, device=device) % window
        for cached, t in zip(stored, visible):
            cached[:, :, kept] = t[:, :, -window:]
        return tuple(visible)  # type: ignore[return-value]

    def each_row(self, rows: Sequence[int], on_device: torch.Tensor, positions: torch.Tensor) -> EachRow:
        """For a new token of each of `rows`, which are also `on_device`, at its position."""
        lengths = [self.length(row) + 1 for row in rows]
        first = slice(0, len(rows)) if list(rows) == list(range(len(rows))) else on_device
        return EachRow(on_device, positions, first, max(rows) + 1, min(lengths), max(lengths))

    def append_to_each(self, layer: int, each: EachRow, k: torch.Tensor, v: torch.Tensor) -> Pair:
        """Add one token (B, g, hs) to each of several rows. Returns these rows, (B, g, S, hs), with all their slots."""
        window = self.windows[layer]
        stored = self.room(layer, k[:, :, None], v[:, :, None], each.n_rows, each.longest)
        at = each.positions if window is None else each.positions % window
        for cached, t in zip(stored, (k, v)):
            cached[each.rows, :, at] = t.to(cached.dtype)
        return tuple(cached[each.index] for cached in stored)  # type: ignore[return-value]

    def room(self, layer: int, k: torch.Tensor, v: torch.Tensor, rows: int, slots: int) -> Pair:
        """The tensors of a layer, grown to at least this many rows and slots."""
        stored, window = self.layers[layer], self.windows[layer]
        had_rows, had_slots = (stored[0].size(0), stored[0].size(2)) if stored is not None else (0, 0)
        if window is not None:
            slots = min(slots, window)
        if stored is None or had_rows < rows or had_slots < slots:
            rows = had_rows if rows <= had_rows else max(rows, 2 * had_rows)
            if slots > had_slots:
                grown = -(-max(slots, had_slots * 3 // 2) // BLOCK) * BLOCK
                slots = min(grown, max(slots, self.longest))
                slots = min(slots, window) if window is not None else slots
            slots = max(slots, had_slots)
            pair = empty_cache(k, rows, slots), empty_cache(v, rows, slots)
            if stored is not None:
                for new, old in zip(pair, stored):
                    new[:had_rows, :, :had_slots] = old
            stored = self.layers[layer] = pair
        return stored
