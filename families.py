"""Families of generators: one table of how each family is used and trained unless flags say otherwise, and
the loaders of their encoders.

Nothing else in this repository asks of which family a generator is. `of_config` finds the family from the
generator's config.json, and formats/weights.py refuses folders of families that are not in this table. To add
a family, add a row to FAMILIES.

    embedded world      the small models in checkpoints/, whose VAE and text encoder are in world/
    Wan2.1              text-to-video and image-to-video, whose encoders formats/wan.py reads
    Wan2.2 TI2V-5B      one generator for both tasks, with a VAE of its own
    Wan2.2 A14B         text-to-video and image-to-video, two experts each (experts.py), with Wan2.1's VAE
"""
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from common import InputError
from formats.encoders import condition_latents, encode_texts, load_saved, on
from formats.video import CHANNELS, SPACE, TIME, from_pixels, read_clip
from formats.weights import BOUNDARIES, TI2V_CHANNELS, read_config, stream_tensors
from model import PRESETS, image_inputs, is_pinned
from world import scene
from world.text_encoder import TextEncoder
from world.vae import VideoVAE


@dataclass(frozen=True)
class Family:
    """One row. Sizes are (width, height) in pixels."""
    name: str
    source: str                             # where the values for sampling come from
    task: str = "t2v"                       # t2v (text-to-video) or i2v (image-to-video)
    world: str | None = None  # size of the embedded world on which it was trained; None: real video
    # ---- its VAE
    channels: int = CHANNELS                # channels of a latent
    time: int = TIME                        # frames per latent frame; the first latent frame is one frame
    space: int = SPACE                      # a latent stands for space x space pixels
    side: int = 16                          # width and height are multiples of this
    # ---- what it is given
    image_tokens: bool = False              # CLIP tokens of the first frame
    blank_frames: bool = False              # i2v: the VAE encodes the first frame and blank frames after it
    pinned: bool = False                    # i2v: latent frame 0 is given clean, in its place in x
    boundary: float | None = None           # two experts: the high-noise one works at times t >= this
    negative_prompt: str | None = None      # prompt that guidance leads away from; None: all-zero context
    # ---- sampling
    sizes: tuple = ()                       # published sizes; the first is the default
    frames: int = 81
    fps: float = 16.0
    steps: int = 40                         # Euler steps from noise to video
    guidance: float = 1.0
    guidance_2: float | None = None         # guidance of the low-noise one of two experts
    shifts: tuple = ((0, 1.0),)             # (the shorter side in pixels that it is for, shift), ascending
    half: bool = False                      # sampled in bf16 if the machine is fast at it
    # ---- training: flags of train_align.py and train_reward.py
    align: dict = field(default_factory=dict)
    steady: dict = field(default_factory=dict)          # more for train_align.py, with PRFL's steady recipe
    reward: dict = field(default_factory=dict)
    videos_per_update: int | None = None    # on all GPUs together, by gradient accumulation; None: one batch

    def shift(self, size):
        """The shift of times for a video of this size. The shorter side decides, so that portrait and
        landscape videos are treated alike."""
        return [shift for side, shift in self.shifts if min(size) >= side][-1]


# ---- the table
# Training: the best settings of results/table1.md.
_TINY = Family(
    name="embedded world, tiny", world="tiny", source="as world.pretrain trained it", steps=32,
    sizes=((scene.SIZES["tiny"]["resolution"],) * 2,), frames=scene.SIZES["tiny"]["frames"],
    fps=float(scene.FPS),
    align={"learning_rate": 1e-4, "batch_size": 32, "gradient_accumulation_steps": 1, "max_train_steps": 120,
           "num_inference_steps": 16},
    steady={"learning_rate": 2e-4, "max_train_steps": 480},                         # results/endurance.md
    reward={"learning_rate": 2e-3, "trunk_learning_rate": 1e-3, "batch_size": 64})
_SMALL = replace(
    _TINY, name="embedded world, small", world="small",
    sizes=((scene.SIZES["small"]["resolution"],) * 2,), frames=scene.SIZES["small"]["frames"])

# Wan2.1's own negative prompt lists what a video should not look like.
WAN_NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，"
                "最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
                "背景人很多，倒着走")
# Training: as in the paper (A.2.3 to A.2.5). 800 iterations are one epoch over its prompts. The paper does
# not say how many videos PAVRM sees at once.
_WAN21 = Family(
    name="Wan2.1 text-to-video", source="Wan-Video/Wan2.1; the paper for the steps (Sec. 5.1)",
    sizes=((832, 480), (1280, 720)), guidance=5.0, shifts=((0, 3.0), (720, 5.0)),
    negative_prompt=WAN_NEGATIVE, half=True,
    align={"learning_rate": 5e-6, "batch_size": 1, "max_train_steps": 800, "num_inference_steps": 40},
    reward={"learning_rate": 1e-5, "trunk_learning_rate": 1e-6, "batch_size": 2}, videos_per_update=30)
# Published use: wan/configs/wan_ti2v_5B.py. Training: as for Wan2.1, since nobody has published other values.
_TI2V_5B = replace(
    _WAN21, name="Wan2.2 TI2V-5B text-to-video",
    source="Wan-Video/Wan2.2; the paper for training, which is of Wan2.1", channels=TI2V_CHANNELS, space=16,
    side=32, sizes=((1280, 704), (704, 1280)), frames=121, fps=24.0, steps=50, shifts=((0, 5.0),))
# Published use: wan/configs/wan_t2v_A14B.py and wan_i2v_A14B.py. Training: as for Wan2.1.
_A14B = replace(
    _WAN21, name="Wan2.2 A14B text-to-video",
    source="Wan-Video/Wan2.2; the paper for training, which is of Wan2.1", boundary=BOUNDARIES["t2v"],
    guidance=4.0, guidance_2=3.0, shifts=((0, 12.0),))

FAMILIES = (
    _TINY,
    replace(_TINY, task="i2v"),
    _SMALL,
    replace(_SMALL, task="i2v"),
    _WAN21,
    replace(_WAN21, name="Wan2.1 image-to-video", task="i2v", image_tokens=True, blank_frames=True),
    _TI2V_5B,
    replace(_TI2V_5B, name="Wan2.2 TI2V-5B image-to-video", task="i2v", pinned=True),
    _A14B,
    replace(_A14B, name="Wan2.2 A14B image-to-video", task="i2v", boundary=BOUNDARIES["i2v"],
            blank_frames=True, guidance=3.5, guidance_2=3.5, shifts=((0, 5.0),)),
)
UMT5_TOKENS = PRESETS["wan2.1-t2v-1.3b"]["text_len"]  # length of the context in all of Wan's generators


def of_config(dit_config):
    """The Family of a generator. dit_config: the config of its VideoDiT, with `boundary_ratio` if it has two
    experts. Raises InputError if the table has no such family.

    A generator whose context is as long as UMT5's is one of Wan's. Any other generator is of the embedded
    world, tiny or small by its width.
    """
    if dit_config["text_len"] != UMT5_TOKENS:
        world = "small" if dit_config["dim"] == PRESETS["small-t2v"]["dim"] else "tiny"
        return next(row for row in FAMILIES if (row.world, row.task) == (world, dit_config["model_type"]))
    task, channels = dit_config["model_type"], dit_config["out_dim"]
    image_tokens, pinned = bool(dit_config.get("image_dim")), is_pinned(dit_config)
    two = "boundary_ratio" in dit_config
    found = task, channels, image_tokens, pinned, two
    for row in FAMILIES:
        known = row.task, row.channels, row.image_tokens, row.pinned, row.boundary is not None
        if row.world is None and known == found:
            return row
    known = "; ".join(row.name for row in FAMILIES if row.world is None)
    raise InputError(f"a generator {'of two experts ' * two}for {task} with latents of {channels} channels "
                     f"and {'with' if image_tokens else 'without'} CLIP tokens is of a family that is not "
                     f"supported, or half of one of two experts; supported are {known}")


# ---- flags that are left open
def fill_in(config, values):
    """Sets those flags of config that are open (None) to their `values`, {flag: value}. Values of flags that
    config does not have are ignored."""
    for name, value in values.items():
        if getattr(config, name, "") is None:
            setattr(config, name, value)


def sampling_defaults(dit_config, size=None):
    """How a generator of this config is used unless flags say otherwise: {"size" (W, H), "frames", "fps",
    "num_inference_steps", "guidance_scale", "shift", "negative_prompt"}, and "guidance_scale_2" if there are
    two experts. size: that of the video; default: the family's."""
    row = of_config(dit_config)
    found = {"size": row.sizes[0], "frames": row.frames, "fps": row.fps, "num_inference_steps": row.steps,
            "guidance_scale": row.guidance, "shift": row.shift(size or row.sizes[0]),
            "negative_prompt": row.negative_prompt}
    return found if row.guidance_2 is None else found | {"guidance_scale_2": row.guidance_2}


def training_defaults(dit_config, stage, batch_size=None, sequence_parallel=1):
    """The defaults of train_align.py ("align") or train_reward.py ("reward") for this generator: {flag:
    value}.

    batch_size, sequence_parallel: the values of these flags. If the family has a number of videos per update,
    gradient_accumulation_steps of "align" brings the update as near to this number as these flags and the
    number of processes allow.
    """
    row = of_config(dit_config)
    values = dict(getattr(row, stage))
    if stage == "align" and row.videos_per_update:
        groups = max(1, int(os.environ.get("WORLD_SIZE", 1)) // sequence_parallel)
        at_once = groups * (batch_size or values["batch_size"])
        values["gradient_accumulation_steps"] = max(1, round(row.videos_per_update / at_once))
    return values


def latent_shape(dit_config, size, frames):
    """(c, f, h, w) of the latents of a video of size (W, H)."""
    row = of_config(dit_config)
    return dit_config["out_dim"], (frames - 1) // row.time + 1, size[1] // row.space, size[0] // row.space


def video_size(dit_config, latent_shape):
    """(W, H) in pixels of videos with latents of this shape (c, f, h, w)."""
    row = of_config(dit_config)
    return row.space * latent_shape[3], row.space * latent_shape[2]


# ---- encoders
def load_vae(path):
    """The VAE in folder `path`: a VideoVAE, or one of Wan's as diffusers stores it. Raises InputError if it
    is another VAE."""
    config = read_config(path)
    if config.get("_class_name") != "AutoencoderKLWan":
        return load_saved(VideoVAE, path)
    found = tuple(config.get(name, default) for name, default in
                  (("z_dim", CHANNELS), ("scale_factor_temporal", TIME), ("scale_factor_spatial", SPACE)))
    if found not in {(row.channels, row.time, row.space) for row in FAMILIES}:
        raise InputError(f"{path}: is the VAE of a family that is not supported: {found[0]} channels, "
                         f"{found[1]} x in time, "
                         f"{found[2]} x in space, where Wan2.1's has {CHANNELS}, {TIME} x and {SPACE} x, "
                         f"and Wan2.2 TI2V-5B's {TI2V_CHANNELS}, 4 x and 16 x")
    from formats.wan import WanVAE
    return WanVAE(path)


def side_of_vae(path):
    """For the VAE in folder `path`, the number of pixels of which width and height of clips must be
    multiples: the side of a patch of 2x2 latents."""
    space = read_config(path).get("scale_factor_spatial")
    return 2 * (space if isinstance(space, int) and space > 0 else SPACE)


def load_text_encoder(path):
    """The text encoder in folder `path`: a TextEncoder, or Wan2.1's UMT5 as transformers stores it. Raises
    InputError."""
    if read_config(path).get("model_type") == "umt5":
        from formats.wan import WanTextEncoder
        return WanTextEncoder(path)
    return load_saved(TextEncoder, path)


def load_image_encoder(path):
    """The image encoder in folder `path`: Wan2.1's CLIP vision model as transformers stores it. Raises
    InputError."""
    from formats.wan import WanImageEncoder
    return WanImageEncoder(path)


def takes_blank_frames(text):
    """Whether image-to-video generators that use this text encoder take the first frame as Wan's do: encoded
    with blank frames after it."""
    return not isinstance(text, TextEncoder)


def image_conditions(dit_config, vae, image_encoder, first, frames):
    """First frames uint8 [b, H, W, 3] of videos of this many frames -> the keywords that an image-to-video
    generator takes: y [b, 4 + c, f, h, w], and clip_tokens [b, m, image_dim] if it has image tokens; or, if
    latent frame 0 is pinned, first_frame [b, c, 1, h, w]."""
    row = of_config(dit_config)
    if is_pinned(dit_config):
        return {"first_frame": vae.encode(from_pixels(first[:, None]))}
    videos = first[:, None].expand(-1, frames, -1, -1, -1)  # [b, F, H, W, 3]; only frame 0 is read
    condition = condition_latents(vae, videos, row.blank_frames)                            # [b, c, f, h, w]
    batch = {"latents": condition}
    if row.blank_frames:
        batch["condition"] = condition
    if dit_config.get("image_dim"):
        batch["clip_fea"] = image_encoder.encode(first)
    return image_inputs(dit_config, batch, first.device)


def conditions_of_images(dit_config, vae, image_encoder, paths, size, frames, device):
    """`image_conditions` of pictures; {} if the paths, one per video, are None. size: (W, H).

    Each picture is encoded alone, because in a batch its rounding, and with it the bytes of a video, would
    depend on the other pictures.
    """
    if paths[0] is None:
        return {}
    found = {}
    with on(vae, device), on(image_encoder, device):
        for path in dict.fromkeys(paths):
            first = read_clip(path, size=size, frames=1)[0].to(device)                      # [1, H, W, 3]
            found[path] = image_conditions(dit_config, vae, image_encoder, first, frames)
    return {name: torch.cat([found[path][name] for path in paths]) for name in found[paths[0]]}


def require_encoders(dit_config, model, generator):
    """Raises InputError if the VAE or the text encoder in folder `model` cannot be those of the generator
    with this config. Loads no weights. generator: its flag and folder, for the message."""
    vae, text = read_config(f"{model}/vae"), read_config(f"{model}/text_encoder")
    width = text.get("d_model", text.get("text_dim"))           # in transformers' words, in ours
    for role, what, taken, given in (
            ("vae", "channels of latents", dit_config["out_dim"], vae.get("z_dim", CHANNELS)),
            ("text_encoder", "numbers per token of text", dit_config["text_dim"], width)):
        if given not in (None, taken):
            raise InputError(f"{generator}: takes {taken} {what}, and {model}/{role} gives {given}: give "
                             "--model, the folder that this generator came from")


def encode_prompts(folder, prompts, device):
    """formats.encoders.encode_texts with the text encoder in `folder`, which is loaded for this call only."""
    return encode_texts(load_text_encoder(folder), folder, prompts, device)


# ---- the prompt that guidance leads away from
NULL_CONTEXT = "null_context.safetensors"                       # lies in a folder of shards


def save_null_context(folder, text):
    """Saves the contexts of the empty and of the negative prompt in `folder`, beside shards for Wan. For the
    embedded world it saves nothing, because there the null context is all zeros."""
    if not isinstance(text, TextEncoder):
        empty, negative = text.encode(["", WAN_NEGATIVE]).float().cpu().contiguous()
        stream_tensors({"empty": empty.clone(), "negative": negative.clone()}, Path(folder) / NULL_CONTEXT)


def null_context(dit_config, kind, shards, model, device):
    """The context [l, d_text] of the "empty" or the "negative" prompt (kind) of a Wan generator. It is read
    from the folder of shards, or made by the text encoder in `model`. In the embedded world it is None,
    because there the null context is all zeros. Raises InputError if neither folder gives it."""
    negative = of_config(dit_config).negative_prompt
    if negative is None:
        return None
    if shards and (path := Path(shards) / NULL_CONTEXT).is_file():
        return load_file(path)[kind].to(device)
    folder = Path(f"{model}/text_encoder")
    if not folder.is_dir():
        raise InputError(f"{shards}: holds no {NULL_CONTEXT}, and {model} no text_encoder/ to make it with: "
                         "encode again")
    prompt = {"empty": "", "negative": negative}[kind]
    return encode_texts(load_text_encoder(folder), folder, [prompt], device)[prompt].to(device)
