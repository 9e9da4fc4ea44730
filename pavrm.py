"""PAVRM, the process-aware video reward model: will this noisy latent become a good video?

PAVRM is made of the first K blocks of the pretrained generator, one learnable query that attends over all
tokens after these blocks, a three-layer MLP and one logit. It learns from the label of the finished video at
every noise level t (Eq. 4-6).

Deliberate differences:
1. The released code has 8 attention heads; here there is one head, with scale sqrt(D), as in Eq. 5. The
   released code adds the query as [B, 1, D] + [B, D], which broadcasts to [B, B, D]; here the query is added
   to each example, so batches work. The released code draws t from a shift-5 grid; here t ~ U(0, 1).
2. The patch, text and time embeddings stay frozen, as in the released code. The paper says only that blocks,
   query and head are trained. Frozen embeddings keep the reward's reading of x_t and t equal to the
   generator's.
3. In the embedded world a video is "bad" if it is unqualified on at least one axis or does not show its
   prompt; in the paper, if it is unqualified on both axes. Most flawed clips of the embedded world have only
   one flaw. For people's answers --bad of train_reward.py decides; its default is the paper's rule.
4. Unlike the paper, train_reward.py gives a share of each batch another video's prompt and the label bad
   (--mismatched). Without it the paper's recipe loses the prompt in long runs (docs/results.md, "Long runs
   with mismatched prompts"), and so does best of n with an aligned generator.

Axes: b batch, c channels, f frames, h height, w width, n tokens, d model width, k heads, e channels of a
head, l text tokens.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import InputError
from experts import trunk_of
from formats.weights import does_both, load_weights, read_config, unkept
from model import VideoDiT


class QueryAttention(nn.Module):
    """Eq. 5: z = softmax(q (h W_K)^T / sqrt(D)) (h W_V) + q.

    The query is added to the attention's result, as in a residual connection. add_query=False is the ablation
    "attention without query". heads > 1 is the released code's variant.

    With one head the result is

        weights = (self.w_k(h) @ self.query.T / d ** 0.5).softmax(1)        # [b, n, 1]
        z = (weights.mT @ self.w_v(h))[:, 0] + self.query                   # [b, d]

    `forward` computes the same without keys and values, which are as large as h: (h W_K) q^T = h (W_K q^T),
    and the softmax weights are applied to h before W_V is.
    """

    def __init__(self, dim, add_query=True, heads=1):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, dim) / dim ** 0.5)
        self.w_k = nn.Linear(dim, dim, bias=False)
        self.w_v = nn.Linear(dim, dim, bias=False)
        self.add_query, self.heads = add_query, heads

    def forward(self, h):
        """Tokens [b, n, d] -> [b, d]"""
        of_heads = lambda weight: weight.unflatten(0, (self.heads, -1))     # a slice of W_K or W_V: [k, e, d]
        q = self.query.view(self.heads, -1)                                                         # [k, e]
        # W_K q^T / sqrt(e): [k, d]
        key_query = torch.einsum("ke,ked->kd", q, of_heads(self.w_k.weight)) / q.shape[1] ** 0.5
        weights = torch.einsum("bnd,kd->bnk", h, key_query).softmax(1)                           # [b, n, k]
        mean_token = torch.einsum("bnk,bnd->bkd", weights, h)                                    # [b, k, d]
        z = torch.einsum("bkd,ked->bke", mean_token, of_heads(self.w_v.weight)).flatten(1)          # [b, d]
        return z + self.query if self.add_query else z


POOLINGS = {  # each takes the width d and returns a module or function that maps tokens h [b, n, d] to [b, d]
    "query_attention": QueryAttention,                                                  # Eq. 5
    "attention": lambda dim: QueryAttention(dim, add_query=False),                      # Table 5
    "mean": lambda dim: lambda h: h.mean(1),                                            # Table 5
    "max": lambda dim: lambda h: h.amax(1),                                             # Table 5
    "multihead": lambda dim: QueryAttention(dim, heads=8 if dim % 8 == 0 else 4),       # the released code
}


class PAVRM(nn.Module):
    """The reward logit r(x_t, t, p) of the video that x_t will become.

    Build one with `PAVRM.from_generator` or `load_pavrm`. Its trunk is a VideoDiT of K blocks without a head.
    """

    def __init__(self, transformer, pooling="query_attention", by_pieces=False):
        """transformer: the config of the trunk. by_pieces: leave the trunk's weights on the meta device, as
        parallel.shard reads them from their files, one at a time."""
        super().__init__()
        if pooling not in POOLINGS:
            raise InputError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        self.config = {"transformer": dict(transformer), "pooling": pooling}
        with unkept(by_pieces):
            self.trunk = VideoDiT(**transformer)
        del self.trunk.head
        d = transformer["dim"]
        self.pool = POOLINGS[pooling](d)
        self.mlp = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU(), nn.Linear(d, 1))

    @classmethod
    def from_generator(cls, dit, depth, pooling="query_attention"):
        """A PAVRM whose trunk copies the embeddings and the first `depth` blocks of a VideoDiT (Eq. 4).

        Query and head start fresh. Raises InputError if the generator has fewer blocks.
        """
        if not 1 <= depth <= dit.config["num_layers"]:
            raise InputError(f"--depth {depth}: must be from 1 to {dit.config['num_layers']}, the blocks of "
                             f"the generator")
        model = cls({**dit.config, "num_layers": depth}, pooling, by_pieces=bool(dit.weight_files))
        model.weight_files = None
        if dit.weight_files:                                    # parallel.shard reads the trunk from these
            model.weight_files = dit.weight_files.behind("trunk.")
            return model
        model.trunk.load_state_dict({name: dit.get_parameter(name) for name in model.trunk.state_dict()})
        return model.to(next(dit.parameters()).device)

    def forward(self, x, t, context, **conditions):
        """x [b, c, f, h, w] at times t [b], context [b, l, d_text] -> logits [b], float32. 0 or more means
        good. conditions: what the generator is given beside the prompt."""
        # Eq. 4: [b, n, d]
        h = self.trunk.features(x, t, context, depth=len(self.trunk.blocks), **conditions)
        with torch.autocast(x.device.type, enabled=False):
            h = h.to(self.mlp[0].weight.dtype)
            z = self.pool(h)                                                                # Eq. 5: [b, d]
            return self.mlp(z)[:, 0]                                                                # [b]

    def parameter_groups(self, trunk_lr, head_lr):
        """Freezes everything but what is trained, and returns that as groups for AdamW: query and head, and
        the trunk's blocks.

        A trunk_lr of 0 freezes the blocks too, which makes a probe on frozen features.
        """
        self.requires_grad_(False)
        head = [p for name, p in self.named_parameters() if not name.startswith("trunk.")]
        groups = [{"params": head, "lr": head_lr}]
        if trunk_lr > 0:
            groups.append({"params": list(self.trunk.blocks.parameters()), "lr": trunk_lr})
        for group in groups:
            for p in group["params"]:
                p.requires_grad_(True)
        return groups

    def freeze(self):
        """Sets eval mode and stops gradients on every weight. In alignment the gradient still passes through
        to x_s."""
        return self.eval().requires_grad_(False)


def load_pavrm(path, generator=None, load_now=True):
    """The frozen PAVRM that was saved in folder `path`.

    generator: the VideoDiT whose latents it will judge. Raises InputError, which names the difference, if the
    trunk's config is not that of the generator's first blocks. load_now: as in `model.load_transformer`.
    """
    if not Path(path).is_dir():
        raise InputError(f"{path} is not a folder; train a reward model with train_reward.py (--task i2v for "
                         f"the image-to-video generator) and name it with --reward")
    config = read_config(path, "reward")
    if set(config) != {"transformer", "pooling"}:
        raise InputError(f"{path}/config.json is not a reward model's, which has transformer and "
                         "pooling only; make one with train_reward.py")
    try:
        config["transformer"]["patch_size"] = tuple(config["transformer"]["patch_size"])
        if generator is not None:
            require_trunk_of(generator, config["transformer"], path)
        with torch.device("meta"):
            model = PAVRM(**config)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}/config.json is not a reward model's: {error!r}") from None
    load_weights(model, path, load_now)
    return model.freeze()


def require_trunk_of(generator, trunk, path):
    """Raises InputError unless the config `trunk` is that of the generator's first blocks."""
    wanted = trunk_of(generator).config
    differing = [key for key in wanted if key != "num_layers" and trunk.get(key) != wanted[key]]
    if "model_type" in differing and {*differing} <= {"model_type", "in_dim", "image_dim"}:
        theirs, ours = trunk["model_type"], wanted["model_type"]
        flag = f"--task {theirs}, or " if does_both(wanted) else ""
        raise InputError(f"the reward model in {path} is for {theirs}, and the generator runs as {ours}: "
                         f"give {flag}a reward model that was trained with --task {ours}")
    differences = [f"{key} {trunk.get(key)} instead of {wanted[key]}" for key in differing]
    if trunk["num_layers"] > generator.config["num_layers"]:
        differences.append("more blocks")
    if differences:
        raise InputError(f"the reward model in {path} has another trunk than the generator: "
                         f"{', '.join(differences)}: give --model, the generator that it was trained for, or "
                         "train another one with train_reward.py")


def bce_loss(logits, labels):
    """Eq. 6: binary cross-entropy of sigmoid(r) with the label of the clean video, 0 or 1. logits r [b],
    labels [b]."""
    return F.binary_cross_entropy_with_logits(logits, labels.float())


def bradley_terry_loss(logits, labels):
    """Table 7's variant: the mean of -log sigmoid(r_good - r_bad) over all (good, bad) pairs of this rank's
    batch."""
    good, bad = logits[labels == 1], logits[labels == 0]
    if not len(good) or not len(bad):
        return logits.sum() * 0.0                               # no pairs; the sum keeps a (zero) gradient
    return F.softplus(-(good[:, None] - bad[None])).mean()


CRITERIA = {"bce": bce_loss, "bt": bradley_terry_loss}
