"""Keys and values of the tokens that were already read."""

from typing import Optional

import torch

BLOCK = 256  # the cache grows by whole blocks, never to the whole context at once
Pair = tuple[torch.Tensor, torch.Tensor]


class KVCache:
    """One growing pair of tensors per layer, for rows of equal length.

    A layer with a sliding window holds its last `window` tokens, no more: the token at position p lies at place
    p % window.

    Shapes: B rows, g key-value heads, S places, T new tokens, hs head size.
    """

    def __init__(self, n_layer: int) -> None:
        self.layers: list[Pair | None] = [None] * n_layer
        self.clear()

    def clear(self) -> None:
        """Forget everything that was read."""
        self.length = 0  # tokens that every layer has read
        self.layers = [None] * len(self.layers)
        self.ids: list[torch.Tensor] = []  # what was read, (B, T) each; kept by models that may have to read it again

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, window: Optional[int] = None) -> Pair:
        """Add (B, g, T, hs) after what `layer` holds and return what the new tokens may see, the new ones last.

        `length` moves with `advance`, once all layers have the new tokens.

        Returns:
            Keys and values, (B, g, S, hs). Without a window, S = length + T. With one, a single new token gets all
            that it sees, in any order; several new tokens get up to `window` - 1 older ones, in order.
        """
        end = self.length + k.size(2)
        if window is not None and end > window:
            return self.append_to_window(layer, k, v, window)
        keys, values = self.room(layer, k, v, end, window)
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def append_to_window(self, layer: int, k: torch.Tensor, v: torch.Tensor, window: int) -> Pair:
        new, end = k.size(2), self.length + k.size(2)
        stored = self.room(layer, k, v, window, window)
        if new == 1:
            for places, t in zip(stored, (k, v)):
                places[:, :, self.length % window] = t[:, :, 0]
            return stored
        old = torch.arange(max(0, self.length - window + 1), self.length, device=k.device) % window
        seen = tuple(torch.cat([places[:, :, old], t], dim=2) for places, t in zip(stored, (k, v)))
        kept = torch.arange(end - window, end, device=k.device) % window
        for places, t in zip(stored, seen):
            places[:, :, kept] = t[:, :, -window:]
        return seen  # type: ignore[return-value]

    def room(self, layer: int, k: torch.Tensor, v: torch.Tensor, places: int, window: Optional[int]) -> Pair:
        """The tensors of a layer, grown to hold that many places."""
        stored = self.layers[layer]
        if stored is None or stored[0].size(2) < places:
            places = -(-max(places, 2 * self.length) // BLOCK) * BLOCK
            places = min(places, window) if window is not None else places
            grown = tuple(t.new_empty(*t.shape[:2], places, t.size(3)) for t in (k, v))
            if stored is not None:
                for new, old in zip(grown, stored):
                    new[:, :, : self.length] = old[:, :, : self.length]
            stored = self.layers[layer] = grown  # type: ignore[assignment]
        return stored  # type: ignore[return-value]

    def advance(self, tokens: int) -> None:
        self.length += tokens
