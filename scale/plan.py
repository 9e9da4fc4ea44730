"""The planner computes what an update will cost, in parameters, tokens, bytes, FLOPs and seconds.

    python -m scale.plan wan2.1-t2v-14b --frames 81 --size 1280*720 --gpus 8 --method prfl
    python -m scale.plan wan2.1-t2v-1.3b --gpus 1 --lora_rank 32 --no-gradient_checkpointing
    python -m scale.plan wan2.1-t2v-1.3b --gpus 8 --parallel ddp --clips 500    also a round: disk, hours
    python -m scale.plan wan2.1-t2v-14b --gpus 8 --simulate    also what PyTorch's tracker counts

Every printed line shows its formula with the numbers in it. The planner counts the fp32 weights, gradients
and AdamW moments of the trained model, the bf16 copies of autocast, the reward model and the decoder. Of each
block it counts what the backward pass keeps, term by term in `block_bytes`, which is equal to the bytes that
autograd saves, and the two tensors that pass through the feed-forward layer. It does not count the CUDA
context (about 1 GB) and the allocator's unused pieces (up to a tenth more). GB is 1e9 bytes.

Frozen weights (the reward model, the base of adapters, a generator that samples) are float32, except for the
matrices of their blocks, which are bf16. A VAE and the pixel reward of RGB ReFL are all float32, and each GPU
holds them whole; autocast casts their weights whenever they work.

The numbers come from functions of plain integers, and only the `report` functions print. Under --parallel
fsdp weights, gradients and moments are split into --gpus parts, and a block is gathered before its use. The
text encoder and the VAE's encoder work only once, when clips are encoded, so no update pays for them.
`--method reward` plans train_reward.py, and the other methods plan train_align.py or, with `sample`,
sample.py.

Symbols: b batch of one GPU, f latent frames, h w latent height and width, n video tokens, l text tokens, m
         CLIP image tokens, d model width, F feed-forward width, k heads, L blocks, K blocks of the reward
         model, N steps of a rollout.
"""
import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import common
import experts
from common import InputError, arg
from families import of_config
from flow import schedule
from formats.weights import BOUNDARIES, TI2V_CHANNELS
from model import PRESETS
from prfl import RECIPES, steps_of_part

IMAGE_TOKENS = 257      # CLIP ViT-H/14 at 224 pixels: 16 x 16 patches and a class token
TEXT_ENCODER = 5_680_910_336    # parameters of UMT5-XXL's encoder, which a GPU runs in bf16
METHODS = ("prfl", "refl", "sft", "rwr", "reward", "sample")
STEADY_PASSES = RECIPES["steady"]["rollout_passes"]
GENERATORS = PRESETS | {"wan2.2-a14b": PRESETS["wan2.1-t2v-14b"] | {"boundary_ratio": BOUNDARIES["t2v"]}}


class Vae(NamedTuple):
    """What one of Wan's VAEs is made of. Its layers work at 1/1 to 1/8 of a full resolution. The full
    resolution is the video's or, if the VAE makes channels of blocks of 2x2 pixels, half of the video's."""
    name: str
    space: int                  # a latent stands for space x space pixels
    # The decoder's stages, one for each resolution: (space: latents are this many times wider here; time:
    # each latent frame but the first has become this many frames here; convolutions 3x3x3 as (input channels,
    # output channels, how many), each after a norm and a SiLU).
    decoder: tuple
    upsamplers: tuple           # between stages: (input channels, output channels, whether frames double)
    decoder_parameters: int
    parameters: int             # of encoder and decoder, which are loaded together
    decoder_shortcuts: tuple    # for each stage (in, out) of its shortcut 1x1x1, None if that is negligible
    # The encoder's stages, one for each resolution: (space and time: width and frames are divided by these
    # here; convolutions 3x3x3; shortcuts 1x1x1; what follows: "space" is a 3x3 to half the resolution, "time"
    # is that and a 3x1x1 to half the frame rate, None is nothing).
    encoder: tuple


WAN21_VAE = Vae(
    "Wan2.1", 8,
    ((1, 1, ((384, 384, 10),)),                         # middle block and first stage
     (2, 2, ((192, 384, 1), (384, 384, 5))),
     (4, 4, ((192, 192, 6),)),
     (8, 4, ((96, 96, 6), (96, 3, 1)))),                # and the last convolution, to pixels
    ((384, 192, True), (384, 192, True), (192, 96, False)), 73_295_603, 126_892_531, (None,) * 4,
    ((1, 1, ((3, 96, 1), (96, 96, 4)), (), "space"),
     (2, 1, ((96, 192, 1), (192, 192, 3)), ((96, 192),), "time"),
     (4, 2, ((192, 384, 1), (384, 384, 3)), ((192, 384),), "time"),
     (8, 4, ((384, 384, 8), (384, 32, 1)), (), None)))
TI2V_VAE = Vae(
    "Wan2.2 TI2V-5B", 16,
    ((1, 1, ((1024, 1024, 10),)),
     (2, 2, ((1024, 1024, 6),)),
     (4, 4, ((1024, 512, 1), (512, 512, 5))),
     (8, 4, ((512, 256, 1), (256, 256, 5), (256, 12, 1)))),
    ((1024, 1024, True), (1024, 1024, True), (512, 512, False)), 555_051_580, 704_688_668,
    (None, None, (1024, 512), (512, 256)),
    ((1, 1, ((12, 160, 1), (160, 160, 4)), (), "space"),
     (2, 1, ((160, 320, 1), (320, 320, 3)), ((160, 320),), "time"),
     (4, 2, ((320, 640, 1), (640, 640, 3)), ((320, 640),), "time"),
     (8, 4, ((640, 640, 8), (640, 96, 1)), (), None)))
# defaults of train_reward.py and train_align.py: steps between checkpoints, and how many of them are kept
REWARD_EVERY, ALIGN_EVERY, KEPT = 200, 40, 2


@dataclass
class Config:
    preset: str = arg(..., f"the generator: {', '.join(GENERATORS)}", choices=tuple(GENERATORS),
                      positional=True)
    method: str = arg("prfl", "what is planned: a method of train_align.py; reward: train_reward.py; sample: "
                      "sample.py", choices=METHODS)
    frames: int | None = arg(None, "number of video frames, 4k + 1; default: the generator's, which is 81 "
                             "for Wan2.1", above=0)
    size: str | None = arg(None, "width*height of the video in pixels (832x480 is read too), both divisible "
                           "by 16 (Wan2.2 TI2V-5B: by 32); default: the generator's, which is 832*480 for "
                           "Wan2.1")
    recipe: str = arg("paper", f"for prfl and refl, how the rollout reaches the rewarded step: paper takes "
                      f"every step, steady takes at most {STEADY_PASSES} long ones",
                      choices=("paper", "steady"))
    gpus: int = arg(1, "number of GPUs in a node", above=0)
    nodes: int = arg(1, "number of nodes; with several, the bytes that an update sends between them are "
                     "counted too", above=0)
    parallel: str = arg("fsdp", "ddp: every GPU has a full copy of everything; fsdp: everything is split "
                        "over all GPUs", choices=("ddp", "fsdp"))
    sequence_parallel: int = arg(1, "number of GPUs that share the tokens of each clip", above=0)
    fsdp_group_size: int = arg(0, "with --parallel fsdp: split over groups of this many GPUs; 0 splits over "
                               "all", at_least=0)
    offload_activations: bool = arg(False, "keep the inputs of the blocks in the host's memory until the "
                                           "backward pass needs them")
    batch_size: int = arg(1, "videos per batch on each GPU, or on each group of --sequence_parallel GPUs",
                          above=0)
    num_inference_steps: int = arg(40, "N, the number of Euler steps in a rollout", above=0)
    depth: int = arg(8, "K, the number of blocks in the reward model (for prfl, rwr and reward)", above=0)
    lora_rank: int = arg(0, "train adapters of this rank beside frozen q, k, v, o; 0 trains all weights",
                         at_least=0)
    frames_decoded: str = arg("first", "what refl decodes: the first latent frame, or all of them",
                              choices=("first", "all"))
    pixel_reward_parameters: int = arg(986_000_000, "number of parameters of refl's reward model, which is "
                                       "held in fp32; PickScore's CLIP ViT-H has 986 M", above=0)
    gradient_checkpointing: bool = arg(True, "recompute each block in the backward pass")
    keep_attention: bool = arg(False, "with --gradient_checkpointing: keep the result of self-attention")
    num_samples: int = arg(2048, "number of samples that rwr draws and weights once, before training",
                           above=0)
    mfu: float = arg(0.4, "share of --tflops that is reached in practice; products that are computed again "
                     "count as work", above=0, at_most=1)
    tflops: float = arg(989.0, "the GPU's peak in bf16, in TFLOP/s; an H100 or H200 has 989", above=0)
    memory: float = arg(80.0, "memory of one GPU in GB", above=0)
    simulate: bool = arg(False, "also run one iteration on tensors without data, and count the bytes that it "
                         "holds at its peak (scale/simulate.py)", only="method prfl")
    clips: int = arg(0, "for prfl: number of clips, for which the disk, memory and hours of data.py encode, "
                     "train_reward.py for the reward model and for the judge, train_align.py --judge and the "
                     "export are planned too; 0 leaves that out", at_least=0)
    reward_steps: int = arg(1600, "with --clips: number of steps of train_reward.py", above=0)
    reward_batch_size: int = arg(2, "with --clips: videos per step and GPU in train_reward.py", above=0)
    holdout: int = arg(100, "with --clips: number of labelled videos that train_reward.py holds out for its "
                       "reports", above=0)
    max_train_steps: int = arg(120, "with --clips: number of iterations of train_align.py", above=0)
    fp32_tflops: float = arg(67.0, "with --clips: the GPU's peak in fp32, in TFLOP/s, because the VAE "
                             "encodes in fp32; an H100 has 67", above=0)
    expert: str = arg("low", "which of the two experts is trained", choices=experts.CHOICES,
                      only="preset wan2.2-a14b")


# ---- counts
def vae_of(c):
    """The Vae of a VideoDiT config `c`, by its channels."""
    return TI2V_VAE if c["out_dim"] == TI2V_CHANNELS else WAN21_VAE


def settle(config, c):
    """config with the values of --frames and --size. If they are not given, the generator's family has them.
    """
    if None in (config.frames, config.size):
        (width, height), frames = of_config(c).sizes[0], of_config(c).frames
        values = {"frames": config.frames or frames, "size": config.size or f"{width}*{height}"}
        config = dataclasses.replace(config, **values)
    return config


def latent_grid(frames, size, space=8):
    """The latent (f, h, w) of a clip. space: that of its Vae. Raises InputError, which names the flag."""
    side = 2 * space
    try:
        width, height = (int(s) for s in size.replace("x", "*").split("*"))
    except ValueError:
        raise InputError(f"--size {size!r} must be width*height, as in 832*480") from None
    if width < side or height < side or width % side or height % side:
        raise InputError(f"--size {size}: width and height must be multiples of {side} (VAE {space}, patch "
                         f"2)")
    if frames % 4 != 1:
        raise InputError(f"--frames {frames} must be 4 k + 1, as in 81: the VAE keeps the first frame alone")
    return (frames - 1) // 4 + 1, height // space, width // space


def parameters(c):
    """Parameters of a VideoDiT config `c`: {part: count}; `block` is one block, `blocks` all, `total`
    everything."""
    d, F, patch = c["dim"], c["ffn_dim"], math.prod(c["patch_size"])
    image = c.get("image_dim") or 0
    count = {
        "embeddings": (c["in_dim"] * patch * d + d) + (c["text_dim"] * d + d) + (d * d + d)     # patch, text
        + (c["freq_dim"] * d + d) + (d * d + d) + (6 * d * d + 6 * d),                # time
        "image": bool(image) * (2 * image + image ** 2 + image + image * d + d + 2 * d),        # CLIP tokens
        "block": (10 if image else 8) * d * d + 2 * d * F + (24 if image else 21) * d + F,
        "head": d * c["out_dim"] * patch + c["out_dim"] * patch + 2 * d}
    count["blocks"] = c["num_layers"] * count["block"]
    return count | {"total": sum(count[part] for part in ("embeddings", "image", "blocks", "head"))}


def reward_parameters(c, depth):
    """Parameters of a PAVRM with query attention: embeddings, K blocks, query, two projections, a three-layer
    head."""
    count, d = parameters(c), c["dim"]
    if depth > c["num_layers"]:
        raise InputError(f"--depth must be 1 to {c['num_layers']}, the generator's blocks; got {depth}")
    trunk = count["embeddings"] + count["image"] + depth * count["block"]
    return trunk + (d + 2 * d * d) + 2 * (d * d + d) + d + 1


def matrix_parameters(c):
    """How many parameters the matrices of a block and their biases have. Frozen matrices are bf16
    (parallel.cast_matrices)."""
    d, F, image = c["dim"], c["ffn_dim"], bool(c.get("image_dim"))
    return (10 if image else 8) * d * d + 2 * d * F + (11 if image else 9) * d + F


def clip_bytes(c, f, h, w):
    """Bytes that a clip, or a sample of RWR, takes in a shard, in fp32: latents, context and, for
    image-to-video, the given first frame and CLIP tokens."""
    i2v = c["model_type"] == "i2v"
    return 4 * (c["out_dim"] * f * h * w * (2 if i2v else 1) + c["text_len"] * c["text_dim"]
                + IMAGE_TOKENS * (c.get("image_dim") or 0))


def clip_formula(c):
    """`clip_bytes`, in symbols."""
    i2v, tokens = c["model_type"] == "i2v", f" + m x {c['image_dim']}" if c.get("image_dim") else ""
    return f"4 ({c['out_dim']} f h w{' x 2' * i2v} + l x {c['text_dim']}{tokens})"


def lora_parameters(c, rank):
    """How many parameters adapters have: d x rank and rank x d on q, k, v, o of both attentions of every
    block."""
    return c["num_layers"] * 8 * 2 * rank * c["dim"]


# ---- FLOPs
def forward_flops(c, n, layers, batch=1, ends=True, ranks=1):
    """(linear layers, attention) of one forward pass of `layers` blocks on n tokens; a multiply-add is two.

    ranks: how many GPUs share the tokens; each of them works on the whole prompt. ends: also count the head
    (False for a reward model, whose own head is too small to count).
    """
    d, l, patch = c["dim"], c["text_len"], math.prod(c["patch_size"])
    m = IMAGE_TOKENS if c.get("image_dim") else 0
    mine = math.ceil(n / ranks)
    block = 2 * mine * (6 * d * d + 2 * d * c["ffn_dim"]) + 4 * (l + m) * d * d     # video + text and image
    attention = 4 * mine * (n + l + m) * d  # scores and their weighted sum
    outside = 2 * mine * d * c["in_dim"] * patch + 2 * l * (c["text_dim"] * d + d * d)
    outside += 2 * m * (c["image_dim"] ** 2 + c["image_dim"] * d) if m else 0
    outside += ends * 2 * mine * d * c["out_dim"] * patch
    return batch * (layers * block + outside), batch * layers * attention


def update_flops(forward, trained=True, checkpointing=True, kept=0):
    """FLOPs of one forward and backward pass. The backward pass makes two products for each product of a
    linear layer, or one if the weights are frozen. It makes five for the two products of attention, because
    flash attention computes its scores again. With checkpointing the forward pass is made once more, except
    for `kept` FLOPs of attention."""
    linear, attention = forward
    passes = 2 if checkpointing else 1
    return linear * (passes + (2 if trained else 1)) + attention * (passes + 2.5) - kept


def rollout_passes(steps, stride=1):
    """Forward passes that a rollout without gradients takes, on average over these rewarded steps.

    stride: Euler steps of the schedule that one pass takes at once.
    """
    return sum(math.ceil((step - 1) / stride) for step in steps) / len(steps)


# ---- bytes
def block_bytes(c, n, trained="all", batch=1):
    """Bytes that the backward pass keeps of one block on n tokens, without its weights; {part: bytes}.

    trained: "all", "lora" (adapters on q, k, v, o of frozen weights), "none" (frozen; the gradient passes
    through). The numbers below are sums of 4 bytes (fp32) and 2 bytes (bf16). A layer with frozen weights
    does not keep its input.
    """
    d, l, k = c["dim"], c["text_len"], c["num_heads"]
    m = IMAGE_TOKENS if c.get("image_dim") else 0
    full, learns = trained == "all", trained != "none"
    per_token = {
        # term by term: x; normed x; its bf16 copies for q, k, v; q and k before and after their norm's
        # division; rotated q, k and v, out; out as o's input; o's output, which the gate needs
        "self-attention": 4 + 4 * full + 6 * learns + (16 if full else 8) + 8 + 2 * learns + 2 * full,
        # x; q's input; q normed; q and out; o's input; with image tokens q and out once more
        "cross-attention": 4 + 2 * learns + (8 if full else 4) + 4 + 2 * learns + 4 * (m > 0),
        # x; normed x; its bf16 copy; the output, which the gate needs
        "feed-forward": 4 + 4 * full + 2 * full + 2 * full}
    kept = {part: batch * n * d * size for part, size in per_token.items()}
    kept["hidden"] = batch * n * c["ffn_dim"] * (4 if full else 2)              # before GELU, and after it
    # the sums of the softmax; norms; k and v of text and image in bf16; what the norm of that k needs
    kept["small"] = batch * (n * (8 * k + 4 * k * bool(m) + 48)
                             + (l + m) * d * (4 + (8 if full else 4 * learns)))
    return kept


def decoder_costs(f, h, w, first=False, vae=WAN21_VAE):
    """What a VAE's decoder takes for a latent [c, f, h, w] with gradients to that latent -> {"kept": bytes
    for the backward pass, "passing": bytes that pass through it, "flops": those of the forward pass}. first:
    only the first latent frame is decoded.

    The decoder is frozen in fp32, under bf16 autocast, and works on one latent frame at a time. Autocast
    keeps no copies of frozen weights. So each latent frame casts them again, and the backward pass holds the
    copies of all frames.
    """
    kept = flops = 0
    for frame in range(1 if first else f):
        kept += 2 * vae.decoder_parameters
        for i, (space, time, convolutions) in enumerate(vae.decoder):
            t = time if frame else 1  # the first latent frame becomes a single frame
            pixels, padded = t * h * w * space ** 2, (t + 2) * (h * space + 2) * (w * space + 2)
            for c_in, c_out, count in convolutions:
                # the inputs of the norm and of the SiLU in fp32, the convolution's padded input in bf16
                kept += count * c_in * (4 * pixels + 4 * pixels + 2 * padded)
                flops += count * 2 * 27 * c_in * c_out * pixels
            if vae.decoder_shortcuts[i]:
                c_in, c_out = vae.decoder_shortcuts[i]
                kept += 2 * c_in * pixels
                flops += 2 * c_in * c_out * pixels
            if i < len(vae.upsamplers):
                c_in, c_out, doubles = vae.upsamplers[i]
                if doubles and frame:  # a convolution 3x1x1 to twice the channels
                    kept += 2 * c_in * (t + 2) * h * w * space ** 2
                    flops += 2 * 3 * c_in * 2 * c_in * pixels
                    pixels *= 2
                kept += 2 * c_in * 4 * pixels  # a convolution 3x3 at the doubled resolution
                flops += 2 * 9 * c_in * c_out * 4 * pixels
    last, widest = (1 if first else 4) * h * w * 64, vae.decoder[-1][2][-1][0]
    return {"kept": kept, "passing": 6 * 4 * widest * last, "flops": flops}


def decoding(f, h, w, vae=WAN21_VAE):
    """Bytes that a VAE's decoder takes in fp32 without gradients: the video twice, a stage of four frames,
    and the last two frames that entered each convolution, which the next latent frame needs."""
    video = 3 * (4 * f - 3) * vae.space ** 2 * h * w
    cache = sum(count * c_in * 2 * h * w * space ** 2 for space, _, convolutions in vae.decoder
                for c_in, _, count in convolutions)
    return 4 * (2 * video + cache) + decoder_costs(f, h, w, vae=vae)["passing"]


def encoder_flops(f, h, w, vae=WAN21_VAE):
    """Forward FLOPs of a VAE's encoder for a clip of latent grid f, h, w."""
    flops = 0
    for space, time, convolutions, shortcuts, after in vae.encoder:
        frames = 1 + (f - 1) * 4 // time                                # the first frame is encoded alone
        pixels = frames * h * w * 64 // space ** 2
        flops += sum(count * 2 * 27 * a * b * pixels for a, b, count in convolutions)
        flops += sum(2 * a * b * pixels for a, b in shortcuts)
        if after:
            width = convolutions[-1][1]
            flops += 2 * 9 * width ** 2 * pixels // 4
            if after == "time":
                flops += 2 * 3 * width ** 2 * (frames - 1) // 2 * (h * w * 64 // space ** 2) // 4
    return flops


def costs(config, c):
    """All numbers that `report` prints, for a VideoDiT config `c` and flags: bytes and FLOPs of one GPU,
    seconds. "with" and "without" mean with and without checkpointing. Raises InputError."""
    config = settle(config, c)
    b, ranks, world = config.batch_size, config.sequence_parallel, config.gpus * config.nodes
    vae = vae_of(c)
    f, h, w = latent_grid(config.frames, config.size, vae.space)
    n, d, L, K = f * h * w // 4, c["dim"], c["num_layers"], config.depth
    if world % ranks or c["num_heads"] % ranks:
        works = [str(i) for i in range(1, world + 1) if world % i == c["num_heads"] % i == 0]
        raise InputError(f"--sequence_parallel {ranks} must divide {world} GPUs and {c['num_heads']} heads: "
                         "choose one of "
                         + ", ".join(works))
    m = math.ceil(n / ranks)                    # tokens of a clip that one GPU holds
    count, prfl, refl = parameters(c), config.method == "prfl", config.method == "refl"
    stage1 = config.method == "reward"          # the reward model itself is trained, but not its embeddings
    sampling = config.method == "sample"        # nothing is trained
    reward = reward_parameters(c, K) if config.method in ("prfl", "rwr", "reward") else \
        refl * config.pixel_reward_parameters
    lora = lora_parameters(c, config.lora_rank)
    trained = lora or (reward - count["embeddings"] - count["image"] if stage1 else count["total"])
    updated = trained = 0 if sampling else trained              # updated: what one update changes
    # Two experts are both on the GPU with fsdp, or if both train; otherwise one waits on the host.
    two = "boundary_ratio" in c and not stage1
    trained *= 2 if two and config.expert == "both" else 1
    L = K if stage1 else L                      # blocks with gradients
    fsdp = config.parallel == "fsdp" and world > 1
    parts = (config.fsdp_group_size or world) if fsdp else 1
    if config.fsdp_group_size and (world % config.fsdp_group_size or not fsdp):
        raise InputError(f"--fsdp_group_size {config.fsdp_group_size} must divide {world} GPUs, and "
                         "needs --parallel fsdp")
    if config.offload_activations and not config.gradient_checkpointing:
        raise InputError("--offload_activations moves what gradient checkpointing keeps: leave "
                         "--no-gradient_checkpointing out")
    if config.keep_attention and not config.gradient_checkpointing:
        raise InputError("--keep_attention keeps a part of what gradient checkpointing computes again: leave "
                         "--no-gradient_checkpointing out")
    held = 2 if two and (fsdp or trained > updated) else 1
    one = dict(n=n, m=m, f=f, h=h, w=w, parameters=count, reward_parameters=reward, trained=trained,
               updated=updated, held=held, parts=parts,
               groups=world // ranks)

    # bytes that stay
    # of frozen models the matrices of the blocks are bf16
    frozen_policy = 4 * count["total"] - 2 * c["num_layers"] * matrix_parameters(c)
    frozen_reward = 4 * reward - 2 * K * matrix_parameters(c)
    adapters = lora * (2 if lora and trained > updated else 1)
    # how many frozen generators the GPU holds
    still = held if lora or sampling else 0 if trained > updated else held - 1
    one["still"] = still
    # Without fsdp two experts change places on a GPU, and for a moment both are on the host.
    one["waiting_weights"] = (two and held == 1) * (
        frozen_policy + (frozen_policy if lora or sampling else 4 * count["total"]))
    largest = 4 * max(6 * d * d, d * c["ffn_dim"], d * c["text_dim"])       # weights are read one at a time
    one["weights"] = 4 * (reward if stage1 else (held - still) * count["total"] + adapters) / parts
    one["weights"] += still * frozen_policy / parts
    one["optimizer"] = 8 * trained / parts
    one["gradients"] = 4 * updated / parts
    one["reward_weights"] = 4 * reward if refl else 0 if stage1 or not reward else frozen_reward / parts
    one["vae_weights"] = 4 * vae.parameters * (refl or sampling)
    rwr = config.method == "rwr"                # frees its reward model when the samples are made
    one["static"] = sum(one[k] for k in ("weights", "optimizer", "vae_weights"))
    one["static"] += one["reward_weights"] * (not rwr)
    if sampling:                                # unless it is split, the generator leaves for the decoder
        one["static"] = fsdp * one["weights"]
    # bytes of the backward pass
    how = "lora" if lora else "all"
    edge = 4 * b * m * d                                                        # a block's input
    pooled = 4 * b * n * d                                                      # every rank pools all tokens
    block, frozen = (sum(block_bytes(c, m, kind, b).values()) for kind in (how, "none"))
    hidden = 2 * b * m * c["ffn_dim"]                                           # bf16
    passing = edge + (2 if lora else 1) * hidden
    # a block's matrices in bf16
    copy = 2 * ((10 if c.get("image_dim") else 8) * d * d + 2 * d * c["ffn_dim"])
    # embeddings and head, in fp32
    ends = 4 * (reward - K * count["block"] if stage1 else count["total"] - count["blocks"])
    copy_trained = 0 if lora and not fsdp else copy             # autocast copies nothing that is bf16 already
    copy_frozen = fsdp * copy
    # the next block, and the whole gradients of this block
    gathered = copy + 4 * count["block"] * (not lora) + ends if fsdp else 0
    # the same for the reward model, which is frozen and so has no gradients
    rewarding = 4 * (reward - K * count["block"]) + copy if fsdp and prfl else 0
    # the gradients that the backward pass makes last
    not_yet = 0 if lora else 4 * (count["block"] + count["embeddings"] * (not stage1)) / parts
    one["decoder"] = {key: b * value for key, value in
                      decoder_costs(f, h, w, config.frames_decoded == "first", vae).items()} if refl else None
    here = 2 if config.offload_activations else L + K  # block inputs on the GPU: one leaves, one returns
    one["offloaded"] = 4 * b * m * d * (L + prfl * K) * config.offload_activations
    # The host memory of all processes of a node. The VAE, and a generator that is not split, wait there for
    # their turns. The text encoder is there before the generator is read.
    one["waiting_generator"] = max(2 * TEXT_ENCODER, largest if fsdp else one["waiting_weights"] or
                                   frozen_policy)
    of_a_process = one["vae_weights"] + one["waiting_generator"] if sampling else \
        largest + one["waiting_weights"] + one["offloaded"]
    one["host"] = config.gpus * (of_a_process + 1e9)
    # self-attention's result in bf16, and the sums of its softmax
    attended = b * m * (2 * d + 4 * c["num_heads"]) * config.keep_attention
    for checkpointing in (True, False):
        layers = lambda count, each, copy: (                                    # what `count` blocks keep
            min(count, here) * edge + (count - 1) * attended + each - edge + copy if checkpointing else
            count * (each + (0 if fsdp else copy)) + fsdp * copy)
        waiting = min(L, here) * edge + L * attended if checkpointing else layers(L, block, copy_trained)
        moments = {"generator": layers(L, block, copy_trained) + passing + gathered,
                   "gradients": one["gradients"] - not_yet + block + copy_trained + passing + gathered,
                   "optimizer": one["gradients"] + 4 * updated / parts}
        if prfl:  # the generator's head keeps 3 edges
            rewarded = min(K, here) * edge + K * attended if checkpointing else layers(K, frozen, copy_frozen)
            if ranks > 1:  # the tokens of all ranks, two gradients of them, and the sum of the two
                moments["pooling"] = waiting + 3 * edge + rewarded + 4 * pooled
            moments["reward"] = waiting + 6 * edge + hidden + layers(K, frozen, copy_frozen) + rewarding
        # RWR makes its samples before AdamW has its moments
        samples = one["reward_weights"] + 28 * b * m * d - one["optimizer"]
        samples += copy + ends if fsdp else L * copy_trained
        if rwr and samples > 0:
            moments["samples"] = samples
        if refl:
            decoded = waiting + 3 * edge + one["decoder"]["kept"]
            moments["pixels"] = decoded + 2 * reward            # bf16 copies of the pixel reward's weights
            moments["decoder"] = decoded + one["decoder"]["passing"]
        # first attention's tensors in a forward pass of the generator, then what `decoding` counts
        if sampling:
            at_work = fsdp * (copy + ends) or one["weights"]
            moments = {"generator": at_work + 28 * b * m * d,
                       "decoder": one["vae_weights"] + decoding(f, h, w, vae) * b}
        worst = max(moments, key=moments.get)
        one["with" if checkpointing else "without"] = dict(
            waiting=waiting, moments=moments, worst=worst, peak=one["static"] + moments[worst])
    one |= dict(edge=edge, block=block, block_parts=block_bytes(c, m, how, b), frozen=frozen, hidden=hidden,
                pooled=pooled, attended=attended, passing=passing, copy=copy, copy_trained=copy_trained,
                gathered=gathered, rewarding=rewarding)

    # FLOPs
    forward, reward_forward = forward_flops(c, n, L, b,
                                     ranks=ranks), forward_flops(c, n, K, b, ends=False, ranks=ranks)
    N, recompute = config.num_inference_steps, config.gradient_checkpointing
    one |= dict(forward=forward, reward_forward=reward_forward, rollout_steps=0, reward_flops=0)
    again = 4 * b * m * n * d * config.keep_attention           # a block's self-attention is not made again
    one["update_flops"] = update_flops(reward_forward if stage1 else forward, not lora, recompute, L * again)
    stride = math.ceil(N / STEADY_PASSES) if config.recipe == "steady" else 1
    if prfl or refl:
        # the rewarded step is uniform on 1 .. N or on the last third, and is one that a trained expert makes
        expert_steps = trained_steps(config, c) if two else None
        steps = steps_of_part("late" if refl else "full", N, expert_steps)
        one["rollout_steps"] = rollout_passes(steps, stride)
    if prfl:
        one["reward_flops"] = update_flops(reward_forward, False, recompute, K * again)
    if refl:
        one["reward_flops"] = 2 * one["decoder"]["flops"]       # frozen: backward costs as much as forward
    one["rollout_flops"] = one["rollout_steps"] * sum(forward)
    one["iteration_flops"] = one["update_flops"]
    if prfl or refl:
        one["iteration_flops"] += one["rollout_flops"] + one["update_flops"] + one["reward_flops"]
    if sampling:
        one["iteration_flops"] = one["update_flops"] = N * sum(forward)
    speed = config.mfu * config.tflops * 1e12
    one["seconds"] = one["iteration_flops"] / speed
    one["sampling_flops"] = one["own_samples"] = 0
    if config.method == "rwr":
        one["own_samples"] = config.num_samples * clip_bytes(c, f, h, w)                # on disk
        one["sampling_flops"] = config.num_samples / one["groups"] * (N * sum(forward)
                                                                      + sum(reward_forward)) / b
    one["sampling_seconds"] = one["sampling_flops"] / speed
    one |= network(config, c, one)
    return one


def times_of_rollout(config, c):
    """The times of the Euler steps, at the shift that the generator has at --size."""
    shift = of_config(c).shift(tuple(int(side) for side in config.size.replace("x", "*").split("*")))
    return schedule(config.num_inference_steps, shift)


def trained_steps(config, c):
    """The range of the steps that --expert makes."""
    return experts.steps_of_expert(config.expert, times_of_rollout(config, c), c["boundary_ratio"])


def network(config, c, one):
    """Bytes that an iteration sends out of each node.

    With fsdp over all GPUs, each forward and each backward pass gathers every block in bf16 and the rest in
    fp32. Each update sums gradients in fp32, as ddp does. In a ring of G GPUs, bytes that are gathered, or
    summed in pieces, pass every edge (G - 1) / G times; bytes that are summed for all GPUs pass every edge
    twice as often. If --fsdp_group_size is the number of a node's GPUs, G is the number of nodes, because
    each GPU sums its pieces with the GPU in the same place of every other node."""
    count, two = one["parameters"], config.method in ("prfl", "refl")
    gathers = 2 * (1 + two) + one["rollout_steps"]
    outside = count["total"] - count["blocks"]
    bytes_policy = 2 * count["blocks"] + 4 * outside
    bytes_reward = 2 * config.depth * count["block"] + 4 * (one["reward_parameters"] - config.depth
                                                           * count["block"])
    gathered = (gathers * bytes_policy * (config.method != "reward")
                + 2 * bytes_reward * (config.method in ("prfl", "reward"))) * (one["parts"] > 1)
    world = config.gpus * config.nodes
    gathered *= one["parts"] > config.gpus                          # otherwise they stay inside a node
    # twice, if every copy of a weight needs the sum
    summed = 4 * one["updated"] * (1 + two) * (2 if one["parts"] < world else 1)
    ring = world // one["parts"] if 1 < one["parts"] < world else world
    return {"gathers": gathers, "network_weights": gathered, "network_gradients": summed, "ring": ring,
            "network": (config.nodes > 1) * (ring - 1) / ring * (gathered + summed)}


def way(config, c):
    """What the commands of docs/your_model.md that `report_way` names take -> {name: bytes on disk, seconds,
    bytes of a GPU or of the host}. "1" is one of two runs of train_reward.py, which train the reward model
    and the judge; "2" is train_align.py."""
    stage1 = costs(dataclasses.replace(config, method="reward", batch_size=config.reward_batch_size,
                                       lora_rank=0), c)
    stage2 = costs(config, c)
    i2v, f, h, w = c["model_type"] == "i2v", stage2["f"], stage2["h"], stage2["w"]
    P, R = stage2["parameters"]["total"], stage1["reward_parameters"]
    P *= stage2["trained"] // stage2["updated"]                 # of two experts only those that trained count
    T1, T2 = stage1["trained"], stage2["trained"]
    one = {"clip": clip_bytes(c, f, h, w)}
    one["shards"] = config.clips * one["clip"]
    one["held"] = config.holdout * one["clip"]                  # stays on every GPU
    stages = [("1", stage1, 4 * R, T1, config.reward_steps, REWARD_EVERY),
              ("2", stage2, 4 * P, T2, config.max_train_steps, ALIGN_EVERY)]
    for name, stage, weights, trained, steps, every in stages:
        # weights as others read them, and moments; adapters, which are merged into these weights, once more
        adapters = 4 * lora_parameters(c, config.lora_rank) if name == "2" else 0
        one["checkpoint" + name] = weights + 8 * trained + adapters
        one["number" + name] = min(KEPT + 1, math.ceil(steps / every))
        # and the weights that are written at the end
        one["disk" + name] = one["number" + name] * one["checkpoint" + name] + weights
        one["peak" + name] = stage["with" if config.gradient_checkpointing else "without"]["peak"]
    one["peak1"] += one["held"]
    one["peak2"] += stage2["reward_weights"]                    # of the judge, which is as large
    one["adapters"] = one["number2"] * 4 * T2 + 4 * T2 if config.lora_rank else 0
    # best/, and the one that replaces it, which is written before the old one goes
    one["best"] = 2 * (4 * P + (4 * T2 if config.lora_rank else 0))
    one["export"] = 2 * P
    one["disk"] = 2 * one["disk1"] + sum(one[k] for k in ("shards", "disk2", "adapters", "best", "export"))
    one["host"] = stage2["host"]
    one["encoder_flops"] = encoder_flops(f, h, w, vae_of(c)) * (2 if i2v else 1)
    one["encode_seconds"] = config.clips * one["encoder_flops"] / (config.gpus * config.mfu
                                                                   * config.fp32_tflops * 1e12)
    one["reports"] = math.ceil(config.reward_steps / REWARD_EVERY)
    one["report_flops"] = 6 * config.holdout * sum(stage1["reward_forward"]) / config.reward_batch_size
    one["seconds1"] = config.reward_steps * stage1["seconds"] + one["reports"] * one["report_flops"] / (
        config.mfu * config.tflops * 1e12)
    one["seconds2"] = config.max_train_steps * stage2["seconds"]
    one["seconds"] = one["encode_seconds"] + 2 * one["seconds1"] + one["seconds2"]
    return one | {"stage1": stage1, "stage2": stage2}


# ---- what is printed
ELSEWHERE = {       # flags that mean nothing with a method
    "sample": ("depth", "recipe", "lora_rank", "frames_decoded", "pixel_reward_parameters", "num_samples",
               "gradient_checkpointing", "keep_attention", "expert"),
    "prfl": ("frames_decoded", "pixel_reward_parameters", "num_samples"), "refl": ("depth", "num_samples"),
    "sft": ("depth", "recipe", "num_inference_steps", "frames_decoded", "pixel_reward_parameters",
            "num_samples"),
    "rwr": ("recipe", "frames_decoded", "pixel_reward_parameters"),
    "reward": ("recipe", "num_inference_steps", "lora_rank", "frames_decoded", "pixel_reward_parameters",
               "num_samples", "expert")}
OF_CLIPS = ("reward_steps", "reward_batch_size", "holdout", "max_train_steps", "fp32_tflops")


def report(config, c):
    """Prints `costs`, one worked formula per line."""
    common.refuse(config, ELSEWHERE[config.method] + ("clips",) * (config.method != "prfl"),
                  f"with --method {config.method}")
    common.refuse(config, () if config.clips else OF_CLIPS, "without --clips")
    config = settle(config, c)
    one, b, lora = costs(config, c), config.batch_size, bool(config.lora_rank)
    stage1, sampling, ranks = config.method == "reward", config.method == "sample", config.sequence_parallel
    n, d, F, L, l, N, K = (one["n"], c["dim"], c["ffn_dim"], c["num_layers"], c["text_len"],
                           config.num_inference_steps,
                           config.depth)
    count, parts, image = one["parameters"], one["parts"], bool(c.get("image_dim"))
    M = IMAGE_TOKENS if image else 0
    prfl, refl, rwr = (config.method == name for name in ("prfl", "refl", "rwr"))
    cut = f" / {parts}" if parts > 1 else ""
    big = lambda x: f"{x / 1e9:.3f} B" if x >= 1e9 else f"{x / 1e6:.3f} M"
    gb = lambda x: f"{x / 1e9:.2f}"
    tera = lambda x: f"{x / 1e12:,.1f}" if x < 1e16 else f"{x / 1e12:,.0f}"
    line = lambda name, value, formula="": print(f"  {name:25} {value:>12}  {formula}".rstrip())
    row = lambda name, value, formula: line(name, gb(value) + " GB", formula)
    work = lambda name, value, formula: line(name, tera(value) + " TF", formula)

    world = config.gpus * config.nodes
    print(f"{config.preset}, {config.method}{f' ({config.recipe})' * (prfl or refl)}: {config.frames} frames "
          f"of {config.size}, {b} per {f'{ranks} GPUs that share it' if ranks > 1 else 'GPU'}, "
          f"{f'{config.nodes} nodes of ' * (config.nodes > 1)}{config.gpus} GPU{'s' * (config.gpus > 1)}"
          f"{f' ({config.parallel})' if world > 1 else ''}"
          + ("" if sampling else f", LoRA of rank {config.lora_rank}" if lora else ", reward model trained"
             if stage1 else
             ", all weights trained") + ", bf16")
    print(f"b = {b}, d = {d}, F = {F}, k = {c['num_heads']} heads, L = {L} blocks, l = {l} text tokens"
          f"{f', {M} image tokens' if M else ''}; GB = 1e9 bytes, TF = 1e12 FLOPs\n")

    print("counts")
    line("latent f x h x w", f"{one['f']} x {one['h']} x {one['w']}",
         f"({config.frames} - 1) / 4 + 1, and the pixels / {vae_of(c).space}")
    line("video tokens n", f"{n:,}", f"f h w / 4 = {one['f']} x {one['h']} x {one['w']} / 4")
    if ranks > 1:
        line("of one GPU, m", f"{one['m']:,}", f"n / {ranks}, rounded up")
    line("a block", big(count["block"]), f"{10 if image else 8} d^2 + 2 d F + {24 if image else 21} d + F")
    two = "boundary_ratio" in c
    if lora or sampling or prfl or rwr or two:
        line("its matrices, M", big(matrix_parameters(c)),
             f"{10 if image else 8} d^2 + 2 d F + {11 if image else 9} d + F, with their biases: bf16 where "
             "they are frozen")
    line("an expert P" if two else "generator P", big(count["total"]), f"L x {big(count['block'])} + "
         f"{big(count['total'] - count['blocks'])} (embeddings, head{', image' if image else ''})")
    if prfl or rwr or stage1:
        line("reward model R", big(one["reward_parameters"]),
             f"K = {K} blocks + embeddings + 4 d^2 + 4 d + 1 (query, attention, head)")
    if refl:
        line("pixel reward R", big(one["reward_parameters"]), "--pixel_reward_parameters")
        line("VAE V", big(vae_of(c).parameters), f"{vae_of(c).name}'s; its decoder has "
                                                 f"{big(vae_of(c).decoder_parameters)}")
    if sampling:
        return report_sampling(config, c, one, line, row, work)
    line("trained T", big(one["trained"]), f"L x 8 x 2 x {config.lora_rank} d (adapters on q, k, v, o, twice "
                                           "a block)"
         if lora else "all of R but the embeddings" if stage1 else "all of P")
    if two and not stage1:
        both = config.expert == "both"
        line("experts that train", "2" if both else "1",
             "T in all, one at each update" if both else f"the {config.expert}-noise one")

    print("\nbytes on each GPU that stay")
    frozen = f"{one['still']} x " * (one["still"] > 1) + "(4 P - 2 L M)"
    summed = f"({frozen} + 4 T)" if one["still"] else "4 T"
    row("weights", one["weights"], f"4 R{cut}" if stage1 else f"{summed}{cut}")
    if one["waiting_weights"]:
        row("experts, on the host", one["waiting_weights"], "both, while they change places, of each GPU")
    row("AdamW's two moments", one["optimizer"], f"8 T{cut}")
    if prfl:
        row("reward model", one["reward_weights"], f"(4 R - 2 K M){cut}")
    if refl:
        row("pixel reward, VAE", one["reward_weights"] + one["vae_weights"], "4 R + 4 V, fp32")
    row("together", one["static"], "")

    print("\nbytes on each GPU that come and go")
    if rwr:
        row("reward model", one["reward_weights"], f"(4 R - 2 K M){cut}, until its own samples are made")
    row("gradients", one["gradients"], f"4 T{cut}" + " / 2" * (one["trained"] > one["updated"]))
    m, mine = ("m", one["m"]) if ranks > 1 else ("n", n)
    row("input of a block", one["edge"], f"4 b {m} d = 4 x {b} x {mine} x {d}")
    per = {part: round(size / (b * mine * d)) for part, size in one["block_parts"].items()}
    row("kept by a block", one["block"],
        f"({per['self-attention']} + {per['cross-attention']} + {per['feed-forward']}) b {m} d + "
        f"{2 if lora else 4} b {m} F + {gb(one['block_parts']['small'])} GB (attention, cross-attention, "
        "ffn; norms, text)")
    if prfl:
        row("kept by a frozen block", one["frozen"], f"{40 if image else 36} b {m} d + 2 b {m} F + ..., in "
                                                     "the reward model")
    if prfl and ranks > 1:
        row("tokens to pool", one["pooled"], "4 b n d, whole on each GPU")
    row("passing through", one["passing"], f"4 b {m} d + {4 if lora else 2} b {m} F, gradients inside a "
                                           "block")
    row("a block's bf16 copy", one["copy"], f"2 x ({10 if image else 8} d^2 + 2 d F)")
    if parts > 1:
        row("gathered by fsdp", one["gathered"],
            "the next block's bf16 copy, " + "whole fp32 gradients of this one, " * (not lora)
            + "embeddings and head")
    if config.keep_attention:
        row("attention, kept", one["attended"], f"b {m} (2 d + 4 k), of each block")
    if config.offload_activations:
        behind = "(L + K)" if prfl else "K" if stage1 else "L"
        row("inputs on the host", one["offloaded"], f"{gb(one['edge'])} x {behind}, of each GPU")
    if refl:
        row("kept by the decoder", one["decoder"]["kept"],
            f"{config.frames_decoded} frame{'s' * (config.frames_decoded == 'all')}: norm 4, SiLU 4, padded "
            "input 2 bytes a channel and pixel; bf16 weights for each latent frame")

    L_ = "K" if stage1 else "L"
    names = {"generator": "reward model's backward" if stage1 else "generator's backward",
             "gradients": "its end",
             "optimizer": "optimizer step", "reward": "reward's backward", "decoder": "decoder's backward",
             "pixels": "pixel reward", "pooling": "reward's pooling", "samples": "own samples"}
    fsdp_own, fsdp_reward = (" + gathered", f" + {gb(one['rewarding'])} gathered") if parts > 1 else ("", "")
    for key in ("with", "without"):
        found, kept = one[key], key == "without"
        print(f"\npeak {key} checkpointing: what stays + the largest of")
        copy = " + copy" * (one["copy_trained"] > 0)
        copies = " + copy" if parts > 1 else f" + {L_} copies" * (one["copy_trained"] > 0)
        L_in, K_in = ("2", "2") if config.offload_activations else (L_, "K")
        before = lambda count: "1" if count == "2" else f"({count} - 1)"
        attended = lambda count: f" + {count} x {gb(one['attended'])}" * config.keep_attention
        waiting = f"{L_} ({gb(one['block'])})" + copies if kept else \
            f"{L_in} x {gb(one['edge'])}{attended(L_)}"
        rewarding = f"K x {gb(one['frozen'])}" if kept else \
            f"{before(K_in)} x {gb(one['edge'])}{attended('(K - 1)')} + {gb(one['frozen'])}"
        in_pieces = " + copy" * (parts > 1)
        at_work = f" + {L_} copies" * (one["copy_trained"] > 0)
        if parts > 1:
            at_work = " + copy, embeddings and head"
        formulas = {
            "samples": f"reward model + 28 b {m} d{at_work} - 8 T{cut} (AdamW's moments come later)",
            "pooling": f"{waiting} + 3 x {gb(one['edge'])} + {'K' if kept else K_in} x "
                       f"{gb(one['frozen' if kept else 'edge'])}{in_pieces * kept}"
                       f"{'' if kept else attended('K')} + 4 x {gb(one['pooled'])} "
                       "(tokens, two gradients, their sum)",
            "reward": f"{waiting} + 6 x {gb(one['edge'])} + {gb(one['hidden'])} + {rewarding}{in_pieces}"
                      f"{fsdp_reward}",
            "pixels": f"{waiting} + 3 x {gb(one['edge'])} + kept by the decoder + 2 R (bf16 copies)",
            "decoder": f"{waiting} + 3 x {gb(one['edge'])} + kept by the decoder + what passes through",
            "generator": (waiting if kept else
                          f"{before(L_in)} x {gb(one['edge'])}{attended(f'({L_} - 1)')} + "
                          f"{gb(one['block'])}{copy}")
                         + f" + passing{fsdp_own}",
            "gradients": f"gradients, but the first block's and the embeddings' + {gb(one['block'])}{copy} "
                         f"+ passing{fsdp_own}",
            "optimizer": f"gradients + 4 T{cut} (square roots)"}
        for name in ("samples", "pooling", "reward", "pixels", "decoder", "generator", "gradients",
                     "optimizer"):
            if name in found["moments"]:
                row(names[name], found["moments"][name], formulas[name])
        row("PEAK", found["peak"], verdict(config, one, found))

    if config.nodes > 1:
        print("\nbytes that each node sends to the others, an iteration")
        if parts > config.gpus:
            row("weights", one["network_weights"], f"{one['gathers']:g} x (2 of blocks + 4 of the rest)"
                + ", 2 x the reward model's" * prfl + ": gathered at every pass")
        row("gradients", one["network_gradients"], f"{1 + (prfl or refl)} x 4 T{' x 2' * (parts < world)}, "
                                                   "at each update")
        row("NETWORK", one["network"], f"x ({one['ring']} - 1) / {one['ring']}")

    linear, attention = one["reward_forward" if stage1 else "forward"]
    print(f"\nFLOPs of one GPU, checkpointing {'on' if config.gradient_checkpointing else 'off'}")
    work("linear layers, forward", linear,
         f"2 b {m} (6 d^2 + 2 d F) {L_} + text{', image' if image else ''}, "
         f"embeddings{', head' * (not stage1)}")
    work("attention, forward", attention, f"4 b {m} (n + l{f' + {M}' if image else ''}) d {L_}")
    passes = 2 if config.gradient_checkpointing else 1
    work("forward and backward", one["update_flops"],
         f"{passes + (1 if lora else 2)} x linear + {passes + 2.5} x attention "
         f"(forward {'twice' if passes == 2 else 'once'})"
         + " - 4 b n^2 d L, self-attention not made again" * config.keep_attention)
    total = "as above" if not (prfl or refl) else "SFT update + rollout + step with gradients + reward"
    if prfl or refl:
        if config.recipe == "steady":
            mean = f"at most {STEADY_PASSES}, each of {math.ceil(N / STEADY_PASSES)} steps"
        elif two:
            mean = "to the steps of what trains"
        else:
            mean = "(N - 1) / 2" if prfl else "a step of the last third"
        work("rollout", one["rollout_flops"], f"{one['rollout_steps']:.4g} forward passes on average: "
                                              f"{mean}, N = {N}")
    if prfl:
        work("reward model", one["reward_flops"],
             f"{passes + 1} x {tera(one['reward_forward'][0])} + {passes + 2.5} x "
             f"{tera(one['reward_forward'][1])} (K blocks, frozen)"
             + " - self-attention once" * config.keep_attention)
    if refl:
        work("decoder", one["reward_flops"], "2 x forward; the pixel reward is not counted")
    work("one iteration", one["iteration_flops"], total)
    line("SECONDS", f"{one['seconds']:,.1f} s", f"/ ({config.mfu:g} x {config.tflops:g} TF/s); "
         f"{b * one['groups']} clips on {world} GPU{'s' * (world > 1)}")
    if rwr:
        line("and once, own samples", f"{one['sampling_seconds'] / 3600:,.1f} h",
             f"{config.num_samples} / {one['groups']} x (N forward passes + reward model)")
        row("their shards, on disk", one["own_samples"],
            f"{config.num_samples:,} x {clip_formula(c)}; training reads them batch by batch")
    if config.clips:
        report_way(config, c)


def verdict(config, one, found):
    """The sum of a peak, and whether it fits."""
    fits = f"{'fits' if found['peak'] <= 1e9 * config.memory else 'does NOT fit'} {config.memory:g} GB"
    return f"{one['static'] / 1e9:.2f} + {found['moments'][found['worst']] / 1e9:.2f}: {fits}"


def report_sampling(config, c, one, line, row, work):
    """Prints what sample.py takes: the memory of the generator, then that of the decoder. The text encoder
    leaves the GPU before the generator comes, and the generator, unless it is split, before the decoder
    comes."""
    print("\nbytes on each GPU")
    pieces, n = one["parts"] > 1, "m" if config.sequence_parallel > 1 else "n"
    row("weights", one["weights"], f"{one['held']} x " * (one["held"] > 1) + "(4 P - 2 L M)"
        + f" / {one['parts']}" * pieces)
    row("together", one["static"], "these stay" if pieces else "nothing: the generator goes before the "
        "decoder comes")
    row("generator's forward", one["with"]["moments"]["generator"],
        ("a block's bf16 copy, embeddings and head" if pieces else "weights") + f" + 28 b {n} d")
    row("decoder's forward", one["with"]["moments"]["decoder"],
        f"4 V ({vae_of(c).parameters / 1e6:.0f} M), pixels twice, two frames a convolution, a stage of four")
    row("PEAK", one["with"]["peak"], verdict(config, one, one["with"]))
    waits = "the text encoder, in bf16"
    if one["waiting_generator"] > 2 * TEXT_ENCODER:
        waits = "2 x " * ("boundary_ratio" in c) + "(4 P - 2 L M)"
    row("host memory of a node", one["host"],
        f"{config.gpus} x (4 V + {waits} + 1 GB), between their turns on the GPU")
    print("\nFLOPs of one GPU")
    work("all steps", one["iteration_flops"], f"N = {config.num_inference_steps} forward passes without "
                                              "guidance")
    line("SECONDS", f"{one['seconds']:,.1f} s", f"/ ({config.mfu:g} x {config.tflops:g} TF/s), and the "
                                                "decoder")


def report_way(config, c):
    """Prints `way`, one worked formula per line."""
    one = way(config, c)
    i2v = c["model_type"] == "i2v"
    gb = lambda x: f"{x / 1e9:,.2f}"
    line = lambda name, value, formula: print(f"  {name:25} {value:>12}  {formula}")
    row = lambda name, value, formula: line(name, gb(value) + " GB", formula)
    hours = lambda name, value, formula: line(name, f"{value / 3600:,.1f} h", formula)
    print(f"\none round from {config.clips:,} clips: data.py encode, train_reward.py for the reward model "
          "and for the judge, train_align.py, export")
    print("on disk")
    row("shards", one["shards"], f"{config.clips:,} x {one['clip'] / 1e6:.1f} MB: {clip_formula(c)}")
    row("reward model and judge", 2 * one["disk1"],
        f"2 x ({one['number1']} checkpoints of 4 R + 8 T = {gb(one['checkpoint1'])}, and 4 R)")
    row("alignment's run", one["disk2"] + one["adapters"], f"{one['number2']} checkpoints of 4 P + "
        f"{12 if config.lora_rank else 8} T = "
        f"{gb(one['checkpoint2'])}, and 4 P{'; adapters' * bool(config.lora_rank)}")
    row("its best/", one["best"],
        f"2 x 4 P{' and adapters' * bool(config.lora_rank)}: the new one is written before the old one goes")
    row("export", one["export"], "2 P, bf16")
    row("DISK", one["disk"], "the third checkpoint is written before the first one goes")
    print("and in memory")
    row("train_reward.py, a GPU", one["peak1"], f"--method reward --batch_size {config.reward_batch_size}, "
                                                f"and {config.holdout} held-out clips = {gb(one['held'])}")
    row("train_align.py, a GPU", one["peak2"],
        f"PEAK above, and the judge = {gb(one['stage2']['reward_weights'])}")
    more = ", both experts" * bool(one["stage2"]["waiting_weights"])
    more += ", inputs of blocks" * config.offload_activations
    row("host memory of a node", one["host"], f"train_align.py: {config.gpus} x (4 bytes of the largest "
        f"weight, as they go one at a time{more}, and 1 GB)")
    print("and in time")
    hours("data.py encode", one["encode_seconds"],
          f"{config.clips:,} x {one['encoder_flops'] / 1e12:.1f} TF (VAE{' twice' * i2v}) / ({config.gpus} x "
          f"{config.mfu:g} x {config.fp32_tflops:g} TF/s in fp32); no text, no reading")
    hours("train_reward.py, twice", 2 * one["seconds1"],
          f"2 x ({config.reward_steps:,} x {one['stage1']['seconds']:.2f} s + {one['reports']} reports of "
          f"6 x {config.holdout} forward passes), reward model and judge")
    hours("train_align.py", one["seconds2"], f"{config.max_train_steps:,} x {one['stage2']['seconds']:.1f} s")
    hours("HOURS", one["seconds"], "without samples and validations")


def report_simulated(config, c):
    """Prints the planner's bytes beside those that scale/simulate.py's tracker counts."""
    config = settle(config, c)
    from scale.simulate import simulate  # imported here: only this needs PyTorch's distributed internals
    one = costs(config, c)
    phases = simulate(config, c, (one["f"], one["h"], one["w"]),
                      times_of_rollout(config, c) if "boundary_ratio" in c else None)
    moments = one["with" if config.gradient_checkpointing else "without"]["moments"]
    behind = lambda *names: one["static"] + max(moments[name] for name in names if name in moments)
    most = lambda *names: max(phases[name]["Total"] for name in names)
    backward = ("SFT, backward", "generator's backward")
    print("\na second opinion, by PyTorch's tracker, on tensors without data")
    print(f"  {'':25} {'tracker':>12} {'planner':>12}")
    start = phases["before"]
    for name, tracker, planner in (
            ("weights, reward model", start["Parameter"], one["weights"] + one["reward_weights"]),
            ("AdamW's two moments", start["Optstate"], one["optimizer"]),
            ("reward, and its backward", most("reward, forward", "reward's backward"),
             behind("pooling", "reward")),
            ("generator's backward", most(*backward), behind("generator", "gradients")),
            ("optimizer step", most("optimizer step"), behind("optimizer")),
            ("PEAK", most(*phases), behind(*moments))):
        print(f"  {name:25} {tracker / 1e9:9.2f} GB {planner / 1e9:9.2f} GB  {planner / tracker - 1:+.1%}")


def main(config):
    report(config, GENERATORS[config.preset])
    if config.simulate:
        report_simulated(config, GENERATORS[config.preset])


if __name__ == "__main__":
    common.cli(main, Config, __doc__, prog="python -m scale.plan")
