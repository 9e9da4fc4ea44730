"""A small text encoder that reads bytes, for the small presets. Wan2.1 has UMT5 in its place.

There is no vocabulary, so any string is a prompt. `python -m world.pretrain text` trains the encoder. After
that it stays frozen.

Axes: b batch, n bytes including the start token, l text tokens of the context.
"""
import torch
from torch import nn


class TextLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, padding):
        """x [b, n, width]; padding [b, n] bool, True where there is no text. Returns [b, n, width]."""
        y = self.norm1(x)
        x = x + self.attention(y, y, y, key_padding_mask=padding, need_weights=False)[0]
        return x + self.ffn(self.norm2(x))


class TextEncoder(nn.Module):
    """Prompt -> UTF-8 bytes -> `layers` transformer layers -> text_len learned queries -> context.

    Bytes beyond max_bytes are dropped. Every string can be encoded, also the empty one and one with lone
    surrogates.
    """

    START, PAD = 256, 257       # the start token gives the empty prompt something to attend to

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
        """b strings -> context [b, text_len, text_dim]. No prompt's context depends on the other prompts."""
        rows = []
        for prompt in prompts:
            text = prompt.encode("utf-8", "surrogatepass")[:self.config["max_bytes"]]
            rows.append([self.START, *text])
        n = max(len(row) for row in rows)
        padded = [row + [self.PAD] * (n - len(row)) for row in rows]
        return self(torch.tensor(padded, device=self.positions.device))                     # ids [b, n]

    def forward(self, ids):
        """ids [b, n] in 0 .. 257 -> context [b, text_len, text_dim]"""
        padding = ids == self.PAD
        x = self.bytes(ids) + self.positions[:ids.shape[1]]                                 # [b, n, width]
        for layer in self.layers:
            x = layer(x, padding)
        x = self.norm(x)
        queries = self.queries.expand(len(ids), -1, -1)                                     # [b, l, width]
        x = self.pool(queries, x, x, key_padding_mask=padding, need_weights=False)[0]       # [b, l, width]
        return self.norm_out(self.project(x))                                               # [b, l, text_dim]
