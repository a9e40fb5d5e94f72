"""What the model keeps of the tokens that it has already processed: keys and values, or states."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import torch

from litgpt.model.config import Config
from litgpt.model.kernels import empty_cache

BLOCK = 256  # positions that the cache grows by
SNAPSHOTS = 4  # of the states of a row
Pair = tuple[torch.Tensor, torch.Tensor]
Index = Union[slice, torch.Tensor]


@dataclass
class EachRow:
    """Where one new token of each of B sequences goes in the cache."""

    rows: torch.Tensor  # the cache row of each sequence, (B,)
    positions: torch.Tensor  # the position of each token in its sequence, (B,)
    index: Index  # `rows` as an index: a slice if they are the first rows of the cache
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
    A recurrent layer has states, whose size does not depend on the number of tokens. They cannot be truncated: a row
    goes back to its last snapshot, made before several tokens were read at once.

    Shapes: R rows, g key-value heads, S slots, T new tokens of one sequence, B sequences, hs head size.
    """

    def __init__(self, config: Config) -> None:
        self.windows = [config.window(layer) for layer in range(config.n_layer)]
        self.longest = config.block_size
        self.has_states = any(config.is_recurrent(layer) for layer in range(config.n_layer))
        self.clear()

    def clear(self) -> None:
        self.layers: list[Pair | None] = [None] * len(self.windows)  # (R, g, S, hs) each
        self.lengths: list[int] = []  # tokens of each row that every layer has
        self.ids: dict[int, list[int]] = {}  # tokens of each row, for models that may have to process them again
        self.recurrent: dict[int, list[torch.Tensor]] = {}  # the states of each recurrent layer, (R, ...) each
        self.snapshots: dict[int, list[tuple[int, dict[int, list[torch.Tensor]]]]] = {}  # of each row: length, states

    def length(self, row: int) -> int:
        return self.lengths[row] if row < len(self.lengths) else 0

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Record that every layer has the new tokens of these rows."""
        self.lengths += [0] * (max(rows) + 1 - len(self.lengths))
        for row, n in zip(rows, tokens):
            self.lengths[row] += n

    def keep(self, row: int, length: int) -> int:
        """Truncate a row to at most `length` tokens. Returns how many are left: 0 if a window no longer holds all it
        needs, those of a snapshot if layers have states."""
        have = self.length(row)
        moved_on = any(window is not None and window < have for window in self.windows)
        kept = 0 if moved_on and length < have else min(length, have)
        if self.has_states and kept < have:
            kept = self.restore(row, kept)
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
            for layer, states in self.recurrent.items():
                for t in self.state_room(layer, states, rows):
                    t[target] = t[source]
            self.snapshots[target] = list(self.snapshots.get(source, []))

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

    # states of recurrent layers

    def states(
        self, layer: int, rows: Sequence[int], index: Index, shapes: Sequence[tuple[int, ...]], x: torch.Tensor
    ) -> list[torch.Tensor]:
        """The states of these rows of a recurrent layer, (B, *shape) each, which are 0 before the first token. `index`
        selects the rows on the device. The first is in the dtype of `x`, the others at least in float32."""
        exact = torch.promote_types(x.dtype, torch.float32)
        dtypes = [x.dtype, *([exact] * (len(shapes) - 1))]
        new = [torch.zeros(0, *shape, dtype=dtype, device=x.device) for shape, dtype in zip(shapes, dtypes)]
        stored = self.state_room(layer, self.recurrent.get(layer, new), max(rows) + 1)
        for t in stored:
            for row in rows:
                if not self.length(row):
                    t[row] = 0
        return [t[index] for t in stored]

    def put_states(self, layer: int, index: Index, states: Sequence[torch.Tensor]) -> None:
        for stored, t in zip(self.recurrent[layer], states):
            stored[index] = t.to(stored.dtype)

    def state_room(self, layer: int, stored: Sequence[torch.Tensor], rows: int) -> list[torch.Tensor]:
        """The states of a layer, grown to at least this many rows."""
        grown = [t if len(t) >= rows else torch.cat([t, t.new_zeros(rows - len(t), *t.shape[1:])]) for t in stored]
        self.recurrent[layer] = grown
        return grown

    def snapshot(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Remember the states of rows that are about to read several tokens."""
        for row, n in zip(rows, tokens):
            if self.has_states and n > 1 and self.length(row):
                states = {layer: [t[row].clone() for t in stored] for layer, stored in self.recurrent.items()}
                self.snapshots[row] = [*self.snapshots.get(row, []), (self.length(row), states)][-SNAPSHOTS:]

    def restore(self, row: int, length: int) -> int:
        """Go back to the last snapshot with at most `length` tokens. Returns how many it has, 0 without one."""
        left = self.snapshots[row] = [s for s in self.snapshots.get(row, []) if s[0] <= length]
        if not left or not length:
            self.snapshots[row] = []
            return 0
        for layer, states in left[-1][1].items():
            for stored, t in zip(self.recurrent[layer], states):
                stored[row] = t
        return left[-1][0]
