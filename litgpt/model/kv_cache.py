"""Keys and values of the tokens that were already read."""

import torch

BLOCK = 256  # the cache grows by whole blocks, never to the whole context at once


class KVCache:
    """One growing pair of tensors per layer, for rows of equal length.

    Shapes: B rows, g key-value heads, S places, T new tokens, hs head size.
    """

    def __init__(self, n_layer: int) -> None:
        self.length = 0  # tokens that every layer holds
        self.layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * n_layer

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add (B, g, T, hs) after what `layer` holds and return all of it, (B, g, length + T, hs).

        `length` moves with `advance`, once all layers have the new tokens.
        """
        end = self.length + k.size(2)
        stored = self.layers[layer]
        if stored is None or stored[0].size(2) < end:
            places = -(-max(end, 2 * self.length) // BLOCK) * BLOCK
            grown = tuple(t.new_empty(*t.shape[:2], places, t.size(3)) for t in (k, v))
            if stored is not None:
                for new, old in zip(grown, stored):
                    new[:, :, : self.length] = old[:, :, : self.length]
            stored = self.layers[layer] = grown  # type: ignore[assignment]
        keys, values = stored  # type: ignore[misc]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens
