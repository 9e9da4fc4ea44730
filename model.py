"""Wan2.1's video diffusion transformer at any size, and its folders on disk.

Parameter names and arithmetic are those of Wan2.1 (github.com/Wan-Video/Wan2.1, wan/modules/model.py). So
official checkpoints, diffusers' `WanTransformer3DModel` folders and ours hold the same model with three
spellings of its names:

    dit = load_transformer("Wan2.1-T2V-1.3B")                 # or a folder of ours, or of diffusers
    velocity = dit(x, t, context)                             # x [b, c, f, h, w], t [b] in [0, 1], 1 = noise
    export_transformer(dit, "out", layout="diffusers")

Axes: b batch, c channels, f frames, h height, w width, n video tokens, d model width, l text tokens,
      m image tokens, k attention heads, e channels of one head.

Deliberate differences from the released code:
 1. t lives in [0, 1]; the sinusoid of the time embedding takes 1000 t, the released timestep.
 2. All videos of a batch share one grid, so there is no sequence padding and no loop over videos.
 3. RoPE multiplies in complex64 (complex128 in a float64 model), not always in complex128.
 4. The residual stream and the query and key norms are float32 (or wider) throughout, also under autocast.
 5. Image-to-video: after frame 0 `y` is zero or, as with Wan, the shards' `condition`, the VAE's code of
    blank frames.
 6. If latent frame 0 is given clean (Wan2.2 TI2V-5B), its tokens have time 0. The released code makes a
    modulation for every token; here there are two modulations, and each is for a slice of the tokens.
"""
import math
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import InputError
from experts import Experts
from formats.weights import (
    WeightFiles,
    diffusers_config,
    diffusers_name,
    expert_folders,
    read_transformer,
    transformer_folder,
    write_folder,
)

_tiny = dict(model_type="t2v", patch_size=(1, 2, 2), in_dim=16, out_dim=16, dim=192, ffn_dim=768, num_heads=6,
             num_layers=8, freq_dim=64, text_dim=128, text_len=8)
_wan = dict(model_type="t2v", patch_size=(1, 2, 2), in_dim=16, out_dim=16, freq_dim=256, text_dim=4096,
            text_len=512)
_wan_14b = _wan | dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

PRESETS = {
    "tiny-t2v": _tiny,
    "tiny-i2v": _tiny | dict(model_type="i2v", in_dim=36),  # 16 noisy + 4 mask + 16 first frame
    "small-t2v": _tiny | dict(dim=384, ffn_dim=1536, num_heads=6, num_layers=10),
    "wan2.1-t2v-1.3b": _wan | dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "wan2.1-t2v-14b": _wan_14b,
    "wan2.1-i2v-14b": _wan_14b | dict(model_type="i2v", in_dim=36, image_dim=1280),
    "wan2.2-ti2v-5b": _wan | dict(in_dim=48, out_dim=48, dim=3072, ffn_dim=14336, num_heads=24,
                                  num_layers=30),
}


def wide(dtype):
    """The dtype of norms, modulation and the residual stream: float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def wide_linear(layer, x):
    """`layer(x)` in the dtype of x, whatever dtype the weights are stored in. [..., d] -> [..., d']"""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


# ---------------------------------------- position
@lru_cache(maxsize=64)
def rope_table(grid, head_dim, device, dtype):
    """Unit complex numbers [n, 1, e / 2]: the rotary angles of a grid (f, h, w), in the precision of `dtype`.

    Wan gives e - 4 (e // 6) channels of each head to time and 2 (e // 6) to each of height and width.
    """
    per_space = 2 * (head_dim // 6)
    channels = (head_dim - 2 * per_space, per_space, per_space)
    with torch.inference_mode(False):  # a table that sampling builds is used in training later
        # [n, 3]
        position = torch.cartesian_prod(*(torch.arange(s, dtype=torch.float64) for s in grid)).view(-1, 3)
        angle = torch.cat([
            position[:, axis, None] * 10000.0 ** (-torch.arange(0, c, 2, dtype=torch.float64) / c)
            for axis, c in enumerate(channels)], dim=1)                                      # [n, e / 2]
        table = torch.polar(torch.ones_like(angle), angle)[:, None]
        return table.to(device, dtype.to_complex())


def apply_rope(x, table):
    """Rotates pairs of adjacent channels of x [b, n, k, e]. A complex product takes half the time of real
    products. But in compiled blocks only real products are fused with the operations beside them."""
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), torch.view_as_real(table).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * table).flatten(-2)


# ---------------------------------------- blocks
class RMSNorm(nn.Module):
    """x / rms(x) * weight across the full width, all heads together, in float32 or wider."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x = x.to(wide(x.dtype))
        if not x.is_cpu:
            return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
        # F.rms_norm has no kernel of its own on a CPU; vector_norm reads x once and has a short backward pass
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        return x * (square + self.eps).rsqrt() * self.weight.to(x.dtype)


def modulated_norm(x, shift, scale, eps):
    """LayerNorm without weights, then each video's scale and shift. x [b, n, d], shift, scale [b, 1, d]"""
    return (F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale)).add_(shift)


def by_time(function, x, given_tokens, *rows):
    """function(x, *rows), for tokens x [b, n, d] that have one time, and rows [b, 1, d] made from this time.
    With rows [b, 2, 1, d] there are two times: the first `given_tokens` tokens take the first row, the others
    the second."""
    if rows[0].dim() == 3:
        return function(x, *rows)
    parts = x[:, :given_tokens], x[:, given_tokens:]
    return torch.cat([function(part, *(row[:, i] for row in rows)) for i, part in enumerate(parts)], dim=1)


def attend(q, k, v, sequence=None):
    """Attention of q [b, n, k, e] to keys and values [b, m, k, e], without a mask -> [b, n, d]

    sequence: each of several GPUs has its own n tokens, and attends over all tokens with its own heads. There
    are three ways to the same result: PyTorch's fused kernel on a GPU, this kernel in float32 on a CPU, and
    plain products on a CPU if there are few keys. For 12 keys the fused kernel of a CPU takes 1.4 times as
    long as these products in float32, and ten times as long in bfloat16. For 80 keys it takes twice as long
    in bfloat16 as in float32.
    """
    if sequence is not None:
        return sequence.tokens(attend(*sequence.heads(q, k, v)))
    if v.device.type != "cpu":
        q, k, v = (y.to(v.dtype).transpose(1, 2) for y in (q, k, v))                 # [b, k, n, e]
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)    # [b, n, d]
    with torch.autocast("cpu", enabled=False):
        q, k, v = (y.to(wide(y.dtype)).transpose(1, 2) for y in (q, k, v))           # [b, k, n, e]
        if k.shape[2] > 64:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        heads = q.shape[1]
        q, k, v = q.flatten(0, 1), (k * k.shape[3] ** -0.5).flatten(0, 1), v.flatten(0, 1)  # [b k, n, e]
        weight = torch.bmm(k, q.mT).softmax(1)  # [b k, m, n]; a softmax over a short last axis is slow
        return torch.bmm(weight.mT, v).unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)  # [b, n, d]


class Attention(nn.Module):
    """Self-attention over video tokens, or cross-attention to text and, with has_image_tokens, to CLIP tokens
    too."""

    def __init__(self, dim, num_heads, eps, has_image_tokens=False):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        if has_image_tokens:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(self, x, attended=None, image_tokens=None, rope=None, sequence=None):
        """x [b, n, d]; attended: text [b, l, d], or None for x itself; image_tokens [b, m, d]; rope, sequence
        as in `run_blocks` -> [b, n, d]."""
        x = x.to(self.q.weight.dtype)
        if attended is None:
            attended = x
        split = partial(torch.unflatten, dim=2, sizes=(self.num_heads, -1))        # [b, ., d] -> [b, ., k, e]
        q, k, v = split(self.norm_q(self.q(x))), split(self.norm_k(self.k(attended))), split(self.v(attended))
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        out = attend(q, k, v, sequence)
        if image_tokens is not None:
            k, v = split(self.norm_k_img(self.k_img(image_tokens))), split(self.v_img(image_tokens))
            out = out + attend(q, k, v)
        return self.o(out.to(self.o.weight.dtype))


class Block(nn.Module):
    """Self-attention, cross-attention and a feed-forward net, each added to the residual stream. The first
    and the third are modulated by the time."""

    def __init__(self, dim, ffn_dim, num_heads, eps, has_image_tokens):
        super().__init__()
        self.eps = eps
        self.self_attn = Attention(dim, num_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps)  # before cross-attention; the other two norms have no parameters
        self.cross_attn = Attention(dim, num_heads, eps, has_image_tokens)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"),
                                 nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim ** 0.5)

    def forward(self, x, time_modulation, context, image_tokens, rope, sequence=None, given_tokens=0):
        """x [b, n, d] float32; time_modulation [b, 6, d] float32, the same for all blocks, or [b, 2, 6, d]
        for two times: the first `given_tokens` tokens have the first time; context [b, l, d] -> [b, n, d]"""
        modulation = self.modulation.to(x.dtype) + time_modulation
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.split(1, dim=-2)
        norm = partial(modulated_norm, eps=self.eps)
        y = self.self_attn(by_time(norm, x, given_tokens, shift_a, scale_a), rope=rope, sequence=sequence)
        x = by_time(torch.mul, y, given_tokens, gate_a).add_(x)     # x + gate y, in place to save a tensor
        weight, bias = self.norm3.weight.to(x.dtype), self.norm3.bias.to(x.dtype)
        y = F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        x = x + self.cross_attn(y, context, image_tokens)
        y = self.ffn(by_time(norm, x, given_tokens, shift_f, scale_f).to(self.ffn[0].weight.dtype))
        return by_time(torch.mul, y, given_tokens, gate_f).add_(x)  # as above


class Head(nn.Module):
    """A norm that is modulated by the time, and the projection from tokens to patches."""

    def __init__(self, dim, out_features, eps):
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, out_features)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim ** 0.5)

    def forward(self, x, time_embedding, given_tokens=0):
        """x [b, n, d], time_embedding [b, 1, d], or [b, 2, 1, d] as in Block -> [b, n, c * patch volume]"""
        shift, scale = (self.modulation.to(x.dtype) + time_embedding).split(1, dim=-2)
        norm = partial(modulated_norm, eps=self.eps)
        return wide_linear(self.head, by_time(norm, x, given_tokens, shift, scale))


class ImageEmbedding(nn.Module):
    def __init__(self, image_dim, dim):
        super().__init__()
        self.proj = nn.Sequential(nn.LayerNorm(image_dim), nn.Linear(image_dim, image_dim), nn.GELU(),
                                  nn.Linear(image_dim, dim), nn.LayerNorm(dim))

    def forward(self, clip_tokens):
        """clip_tokens [b, m, image_dim] -> [b, m, d]"""
        return self.proj(clip_tokens)


class VideoDiT(nn.Module):
    """The velocity of a latent video at time t, given text and, in image-to-video models, the first frame.

    Config, in Wan's spelling: model_type "t2v" or "i2v"; patch_size (f, h, w); in_dim channels entering the
    patch embedding (16, or 36 in i2v: 16 noisy + 20 of `y`); out_dim; dim; ffn_dim; freq_dim of the sinusoid;
    text_dim and text_len of the context; num_heads; num_layers; eps of the norms; image_dim of CLIP tokens or
    None. An i2v model with in_dim = out_dim takes its first frame as `first_frame`, see `is_pinned`.

    With `dit.gradient_checkpointing = True` the backward pass computes each block again, except for what
    `dit.checkpoint_options` (options of torch's checkpoint) keep. If several GPUs share the tokens of a call,
    `dit.sequence` is a function of their number n that returns a scale.sequence.Sequence, which says which
    tokens each GPU has; otherwise it is None. Each of these GPUs gets, and returns, the whole video. The
    methods below call the Sequence of one call `sequence`.
    """

    def __init__(self, *, model_type="t2v", patch_size=(1, 2, 2), in_dim=16, out_dim=16, dim=1536,
                 ffn_dim=8960, freq_dim=256, text_dim=4096, text_len=512, num_heads=12, num_layers=30,
                 eps=1e-6, image_dim=None):
        super().__init__()
        if model_type not in ("t2v", "i2v"):
            raise InputError(f"model_type is {model_type!r}; this model knows t2v and i2v")
        if num_heads < 1 or dim % num_heads or dim // num_heads % 2 or dim // num_heads < 6:
            raise InputError(f"dim {dim} must give each of {num_heads} heads an even number of channels, at "
                             "least 6")
        if freq_dim % 2:
            raise InputError(f"freq_dim is {freq_dim}; it must be even (cosines and sines)")
        self.config = dict(model_type=model_type, patch_size=tuple(patch_size), in_dim=in_dim,
                           out_dim=out_dim, dim=dim, ffn_dim=ffn_dim, freq_dim=freq_dim, text_dim=text_dim,
                           text_len=text_len, num_heads=num_heads, num_layers=num_layers, eps=eps,
                           image_dim=image_dim)
        self.gradient_checkpointing, self.checkpoint_options = False, {}
        self.sequence, self.weight_files = None, None
        patch = self.config["patch_size"]
        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"),
                                            nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            Block(dim, ffn_dim, num_heads, eps, image_dim is not None) for _ in range(num_layers))
        self.head = Head(dim, out_dim * math.prod(patch), eps)
        if image_dim is not None:
            self.img_emb = ImageEmbedding(image_dim, dim)
        self.init_weights()

    def init_weights(self):
        """Initialises as Wan does. The weights of the head start at zero, and so does the velocity."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for layer in (*self.text_embedding[::2], *self.time_embedding[::2]):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def forward(self, x, t, context, y=None, clip_tokens=None, first_frame=None):
        """The velocity of x at time t.

        x [b, c, f, h, w] latent; t [b] in [0, 1], 1 = noise; context [b, l <= text_len, text_dim], padded
        here with zeros to text_len and attended without a mask; y [b, in_dim - c, f, h, w] in i2v (mask and
        first-frame latent); clip_tokens [b, m, image_dim] if the model has image tokens (Wan2.1: m = 257);
        first_frame [b, c, 1, h, w] if `is_pinned`: it replaces frame 0 of x, and the velocity there is 0.
        Returns [b, out_dim, f, h, w], float32 (float64 in a float64 model). Raises InputError on a wrong
        shape.
        """
        tokens, time_embedding, (f, h, w), sequence, given_tokens = self.run_blocks(
            x, t, context, len(self.blocks), y, clip_tokens, first_frame)
        with torch.autocast(x.device.type, enabled=False):
            out = self.head(tokens, time_embedding.unsqueeze(-2), given_tokens)  # [b, n, c * patch volume]
        out = sequence.gather_tokens(out) if sequence else out
        pf, ph, pw = self.config["patch_size"]
        v = rearrange(out, "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)",
                      f=f, h=h, w=w, pf=pf, ph=ph, pw=pw)                                   # [b, c, f, h, w]
        return v if first_frame is None else pin(v, torch.zeros_like(first_frame))

    def features(self, x, t, context, *, depth, y=None, clip_tokens=None, first_frame=None):
        """Tokens [b, n, d] after the first `depth` blocks, 0 <= depth <= num_layers; the rest is not run."""
        tokens, _, _, sequence, _ = self.run_blocks(x, t, context, depth, y, clip_tokens, first_frame)
        return sequence.gather_tokens(tokens) if sequence else tokens

    def run_blocks(self, x, t, context, depth, y, clip_tokens, first_frame):
        """-> (tokens [b, n, d], time embedding [b, d], token grid (f, h, w), `sequence`, `given_tokens`).

        If several GPUs share the tokens, these are the tokens of this GPU; otherwise `sequence` is None. With
        a first_frame the time embedding is [b, 2, d], of time 0 and of t, and the first `given_tokens` tokens
        have time 0; without a first_frame `given_tokens` is 0.

        Matrices multiply in their own dtype (or autocast's). The residual stream `tokens`, the norms, the
        modulation and everything about time stay `wide`.
        """
        if not 0 <= depth <= len(self.blocks):
            raise InputError(f"depth is {depth}; this model has 0 to {len(self.blocks)} blocks")
        x = x if y is None else torch.cat([x, self.checked_y(x, y)], dim=1)             # [b, in_dim, f, h, w]
        grid = self.check_inputs(x, t, context, clip_tokens, first_frame)
        x = pin(x, first_frame)
        dtype = self.patch_embedding.weight.dtype
        sequence = self.sequence and self.sequence(math.prod(grid))
        tokens = self.patchify(x.to(dtype), sequence).to(wide(dtype))                        # [b, n, d]
        given_tokens = 0 if first_frame is None else grid[1] * grid[2]      # frame 0 has the first h w tokens
        given_tokens = sequence.share_of(given_tokens) if sequence else given_tokens
        t = t if first_frame is None else torch.stack([torch.zeros_like(t), t], dim=1)      # [b] or [b, 2]
        with torch.autocast(x.device.type, enabled=False):
            # [b, d], [b, 6, d]; or [b, 2, d], [b, 2, 6, d]
            time_embedding, time_modulation = self.embed_time(t.to(wide(dtype)))
        context = F.pad(context.to(dtype), (0, 0, 0, self.config["text_len"] - context.shape[1]))
        context = self.text_embedding(context)                                               # [b, l, d]
        image_tokens = None
        if clip_tokens is not None:
            image_tokens = self.img_emb(clip_tokens.to(dtype)).to(dtype)                     # [b, m, d]
        rope = rope_table(grid, self.config["dim"] // self.config["num_heads"], x.device, wide(dtype))
        rope = sequence.mine(rope, dim=0) if sequence else rope
        for block in self.blocks[:depth]:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # no dropout inside, so there is no random state to preserve
                tokens = checkpoint(block, tokens, time_modulation, context, image_tokens, rope, sequence,
                                    given_tokens, use_reentrant=False, preserve_rng_state=False,
                                    **self.checkpoint_options)
            else:
                tokens = block(tokens, time_modulation, context, image_tokens, rope, sequence, given_tokens)
        return tokens, time_embedding, grid, sequence, given_tokens

    def patchify(self, x, sequence=None):
        """The patch embedding as one product, because its stride is its kernel. [b, c, f, h, w] -> [b, n, d]
        """
        pf, ph, pw = self.config["patch_size"]
        x = rearrange(x, "b c (f pf) (h ph) (w pw) -> b (f h w) (c pf ph pw)", pf=pf, ph=ph, pw=pw)
        x = sequence.mine(x) if sequence else x
        return F.linear(x, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def embed_time(self, t):
        """t [b], or [b, 2] -> [b, d] and [b, 6, d], or [b, 2, d] and [b, 2, 6, d]"""
        half = self.config["freq_dim"] // 2
        frequency = 10000.0 ** (-torch.arange(half, device=t.device, dtype=t.dtype) / half)
        angle = 1000 * t[..., None] * frequency                                            # [b, freq_dim / 2]
        hidden = wide_linear(self.time_embedding[0], torch.cat([angle.cos(), angle.sin()], dim=-1))
        embedding = wide_linear(self.time_embedding[2], F.silu(hidden))                      # [b, d]
        modulation = wide_linear(self.time_projection[1], F.silu(embedding))                 # [b, 6 d]
        return embedding, modulation.unflatten(-1, (6, -1))  # [b, d], [b, 6, d]

    def checked_y(self, x, y):
        if y.shape[0] != x.shape[0] or y.shape[2:] != x.shape[2:]:
            raise InputError(f"y has shape {list(y.shape)}; beside x {list(x.shape)} only its channels may "
                             "differ")
        return y.to(x.dtype)

    def check_inputs(self, x, t, context, clip_tokens, first_frame):
        """The token grid (f, h, w) of x, which has y concatenated already. Raises InputError."""
        config, b = self.config, x.shape[0]
        if x.dim() != 5 or x.shape[1] != config["in_dim"]:
            raise InputError(f"x with y has shape {list(x.shape)}; this model takes [b, {config['in_dim']}, "
                             "f, h, w]")
        if any(size % p for size, p in zip(x.shape[2:], config["patch_size"])):
            raise InputError(f"latent size {list(x.shape[2:])} must divide by the patch size "
                             f"{config['patch_size']}")
        if t.shape != (b,):
            raise InputError(f"t has shape {list(t.shape)}; it must be [{b}], one time for each example")
        if context.dim() != 3 or context.shape[0] != b or context.shape[2] != config["text_dim"] \
                or context.shape[1] > config["text_len"]:
            raise InputError(f"context has shape {list(context.shape)}; this model takes "
                             f"[{b}, at most {config['text_len']}, {config['text_dim']}]")
        if (clip_tokens is None) != (config["image_dim"] is None):
            raise InputError("clip_tokens must be given exactly when the model has image_dim")
        if clip_tokens is not None and (clip_tokens.dim() != 3
                                        or clip_tokens[:, 0].shape != (b, config["image_dim"])):
            raise InputError(f"clip_tokens has shape {list(clip_tokens.shape)}; this model takes [{b}, m, "
                             f"{config['image_dim']}]")
        if (first_frame is not None) != is_pinned(config):
            raise InputError("first_frame must be given exactly when the model is i2v and takes no y")
        one = x[:, :, :1].shape
        if first_frame is not None and (first_frame.shape != one or config["patch_size"][0] > 1):
            raise InputError(f"first_frame has shape {list(first_frame.shape)}; beside x {list(x.shape)} it "
                             f"must be {list(one)}, one latent frame, and patches must have one too")
        return tuple(size // p for size, p in zip(x.shape[2:], config["patch_size"]))


def is_pinned(config):
    """Whether an image-to-video model of this config takes the latent of the given first frame as frame 0 of
    x (Wan2.2 TI2V-5B), and not as more channels beside x."""
    return config["model_type"] == "i2v" and config["in_dim"] == config["out_dim"]


def pin(x, first_frame):
    """x [b, c, f, h, w] with first_frame [b, c, 1, h, w] in place of frame 0, or x itself if that is None."""
    return x if first_frame is None else torch.cat([first_frame.to(x.dtype), x[:, :, 1:]], dim=2)


def first_frame_condition(x0):
    """Wan's image-to-video input `y` for latents x0 [b, c, f, h, w], of which only frame 0 is read.

    -> [b, 4 + c, f, h, w]: a mask, 1 where a frame is given, and the first latent frame, followed by zeros.
    """
    y = x0.new_zeros(x0.shape[0], 4 + x0.shape[1], *x0.shape[2:])
    y[:, :4, 0] = 1
    y[:, 4:, 0] = x0[:, :, 0]
    return y


def image_inputs(config, batch, device):
    """A batch of `data.Shards` -> the keywords that a VideoDiT of this config takes beside x, t and context.

    Text-to-video: none. Image-to-video: y [b, 4 + c, f, h, w], which is the mask and the first frame's latent
    followed by zeros, or the mask and the shards' condition, as with Wan; and clip_tokens [b, m, image_dim]
    if the model has image tokens. If the model `is_pinned`: only first_frame [b, c, 1, h, w], frame 0 of the
    latents.
    """
    if config["model_type"] != "i2v":
        return {}
    if is_pinned(config):
        return {"first_frame": batch["latents"][:, :, :1].to(device)}
    y = first_frame_condition(batch["latents"])
    if "condition" in batch:
        y[:, 4:] = batch["condition"]
    conditions = {"y": y.to(device)}
    if config["image_dim"]:
        conditions["clip_tokens"] = batch["clip_fea"].to(device)
    return conditions


# ---------------------------------------- folders
def load_transformer(path, dtype=torch.float32, load_now=True, task=None):
    """Loads a VideoDiT from a folder of ours, of Wan2.1's authors or of diffusers, or from a folder that
    holds `transformer/`. If the folder holds a generator of two experts, or is a part of one, loads Experts.

    dtype: that of the parameters; float32 for master weights, None for the stored dtypes. The model remembers
    the stored dtypes, unless load_now is False, and `export_transformer` writes them. load_now=False: the
    model is on the meta device, and scale.parallel.shard reads the weights from `dit.weight_files`, each rank
    its own. task: "t2v" or "i2v", for a model that can do both. Raises InputError, one line that names the
    file, for anything missing or unexpected.
    """
    found, pair = transformer_folder(path, task), expert_folders(path)
    if pair is None:
        return load_one(*found, dtype, load_now)
    folders = {"high": pair.high, "low": pair.low}
    high, low = (load_one(*read_transformer(folder), dtype, load_now) for folder in folders.values())
    return Experts(high, low, pair.boundary, folders)


def load_one(path, config, rename, ignore, dtype, load_now):
    """load_transformer for one transformer. path, config, rename, ignore: from transformer_folder."""
    try:
        with torch.device("meta"):
            dit = VideoDiT(**config | {"eps": float(config.get("eps", 1e-6))})
    except (InputError, TypeError, KeyError, ValueError, RuntimeError, ArithmeticError,
            AttributeError) as error:
        reason = f"{path}/config.json does not describe a Wan2.1 transformer: {error}"
        raise InputError(reason.replace("\n", " ")) from None
    dit.weight_files = WeightFiles(path,
                                   rename).require({name: p.shape for name, p in dit.state_dict().items()},
                                                   ignore)
    if not load_now:
        return dit
    state = {name: dit.weight_files.tensor(name) for name in dit.state_dict()}
    dit.weight_files, dit.stored_dtypes = None, {name: tensor.dtype for name, tensor in state.items()}
    # copies, because a parameter must not be a view of a file that may be replaced
    dit.load_state_dict({n: v.to(dtype or v.dtype, copy=True) for n, v in state.items()}, assign=True)
    return dit


def export_transformer(dit, path, layout="wan", dtype=None, state=None, notes=None):
    """Writes dit as an official Wan2.1 folder ("wan") or as a folder of diffusers' WanTransformer3DModel
    ("diffusers").

    Each weight is written in the dtype that it was stored in, or in `dtype`. state: a state_dict to write in
    place of dit's own. notes: what config.json says beside the shape, for example about an expert
    (Experts.notes). Every rank must call it.
    """
    if layout not in ("wan", "diffusers"):
        raise InputError(f"layout is {layout!r}; choose wan or diffusers")
    named, config = (diffusers_name, diffusers_config(dit.config)) if layout == "diffusers" else \
        (str, {"_class_name": "WanModel"} | dit.config)
    stored = {named(name): x for name, x in getattr(dit, "stored_dtypes", {}).items()}
    write_folder(path, config | (notes or {}),
                 {named(name): p for name, p in (state or dit.state_dict()).items()}, dtype or stored)
