"""A small byte-level text encoder, for the small presets; Wan2.1 has UMT5 in its place.

Any string is a prompt: there is no vocabulary. `python -m world.pretrain text` trains it, and it stays frozen after that.

Axes: b batch, n bytes with the start token, l text tokens of the context.
"""
import torch
from torch import nn


class TextLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, padding):
        """x [b, n, width], padding [b, n] bool, True = not text"""
        y = self.norm1(x)
        x = x + self.attention(y, y, y, key_padding_mask=padding, need_weights=False)[0]
        return x + self.ffn(self.norm2(x))


class TextEncoder(nn.Module):
    """Prompt -> UTF-8 bytes -> 2 transformer layers -> text_len learned queries -> context.

    Bytes beyond max_bytes are dropped. Every string has an encoding, the empty one and lone surrogates included.
    """

    START, PAD = 256, 257  # a start token, so that the empty prompt has something to attend to

    def __init__(self, *, text_len=8, text_dim=128, width=128, heads=4, layers=2, max_bytes=128):
        super().__init__()
        self.config = dict(text_len=text_len, text_dim=text_dim, width=width, heads=heads, layers=layers,
                           max_bytes=max_bytes)
        self.bytes = nn.Embedding(258, width)
        self.positions = nn.Parameter(0.02 * torch.randn(max_bytes + 1, width))
        self.layers = nn.ModuleList(TextLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(text_len, width))
        self.pool = nn.MultiheadAttention(width, heads, batch_first=True)
        self.project = nn.Linear(width, text_dim)
        self.norm_out = nn.LayerNorm(text_dim)
        nn.init.normal_(self.bytes.weight, std=0.02)

    def encode(self, prompts):
        """list of b strings -> context [b, text_len, text_dim]; an item does not depend on its neighbours."""
        device = self.positions.device
        rows = [[self.START, *p.encode("utf-8", "surrogatepass")[:self.config["max_bytes"]]] for p in prompts]
        n = max(map(len, rows))
        ids = torch.tensor([row + [self.PAD] * (n - len(row)) for row in rows], device=device)  # [b, n]
        return self(ids)

    def forward(self, ids):
        """ids [b, n] in 0..257 -> context [b, text_len, text_dim]"""
        padding = ids == self.PAD
        x = self.bytes(ids) + self.positions[:ids.shape[1]]                                 # [b, n, width]
        for layer in self.layers:
            x = layer(x, padding)
        x = self.norm(x)
        queries = self.queries.expand(len(ids), -1, -1)                                     # [b, l, width]
        x = self.pool(queries, x, x, key_padding_mask=padding, need_weights=False)[0]       # [b, l, width]
        return self.norm_out(self.project(x))                                               # [b, l, text_dim]
