"""Models that several benchmarks train."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class GPT2(nn.Module):
    """GPT-2 with tied embedding and head and without dropout, by default GPT-2 124M."""

    def __init__(
        self,
        layers: int = 12,
        wide: int = 768,
        heads: int = 12,
        vocabulary: int = 50257,
        positions: int = 1024,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, wide)
        self.positions = nn.Embedding(positions, wide)
        options: Any = {"dropout": 0.0, "activation": "gelu"}
        layer = nn.TransformerEncoderLayer(
            wide, heads, 4 * wide, batch_first=True, norm_first=True, **options
        )
        norm = nn.LayerNorm(wide)
        self.layers = nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next tokens."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        inner = self.tokens(tokens) + self.positions.weight[:length]
        inner = self.layers(inner, mask=mask, is_causal=True)
        return F.linear(inner, self.tokens.weight)
