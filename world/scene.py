"""The embedded world: coloured shapes that move by physics, with captions, and with flaws like those of a
generator.

It stands in for web video, and annotator.py stands in for human annotators, so that the paper's claims can be
checked without people. `make` renders captioned clips, clean or flawed.

    python -m world.clips clips --count 256 --kind clean      writes clips of this world as mp4 with metadata

Axes: b batch (clips), f frames, h height, w width, 3 RGB. Lengths are fractions of the frame's width. Times
are counted in frames. y grows downwards.
"""
import hashlib
import itertools
import math

import torch

from common import InputError

SIZES = {"tiny": {"frames": 9, "resolution": 32},
         "mid": {"frames": 9, "resolution": 48},
         "small": {"frames": 17, "resolution": 64}}
LATENT_SHAPES = {"tiny": (16, 3, 4, 4), "mid": (16, 3, 6, 6), "small": (16, 5, 8, 8)}      # c, f, h, w
FPS = 8
BACKGROUND = (0.10, 0.10, 0.13)
COLORS = {"red": (0.92, 0.20, 0.18), "green": (0.15, 0.75, 0.28), "blue": (0.25, 0.42, 0.96),
          "yellow": (0.95, 0.85, 0.20)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
WORDINGS = ("a {c} {s} moving {d}", "a {c} {s} moves {d}", "the {c} {s} glides {d}",
            "one {c} {s} travelling {d}", "a video of a {c} {s} going {d}", "{c} {s}, heading {d}",
            "there is a {c} {s} drifting {d}", "a {c} {s} that slides {d}")
PHRASES = {"right": ("to the right", "right"), "left": ("to the left", "left"),
           "up": ("up", "upwards"), "down": ("down", "downwards")}
# The sentences of the split "reworded". Nothing was trained, validated or chosen on them. Their verbs,
# phrases and order of words differ from WORDINGS. Only the words for colour, shape and direction are the
# same, because without these the annotator could not tell what was asked for.
REWORDED = ("{c} coloured {s} that goes {d}", "see this {c} {s}: it floats {d}", "some {c} {s} rolling {d}",
            "{d} flies a {c} {s}", "a {s}, {c}, on its way {d}")
REPHRASED = {"right": ("towards the right", "rightwards"), "left": ("towards the left", "leftwards"),
             "up": ("straight up", "up and up"), "down": ("straight down", "down and down")}
RADIUS = (0.15, 0.18)            # smallest and largest radius of a disc that has the subject's area
SPEED = (0.036, 0.070)           # lowest and highest speed, in frame widths per frame
MAX_SKEW = math.radians(20)      # largest angle between the motion and the caption's direction
PHYSICAL = ("teleport", "jitter", "freeze", "reversal", "speed_change")
DEFORMITY = ("pulse", "morph", "flicker", "vanish", "duplicate")
# How far each shape of SHAPES reaches from its centre to the side, up and down, if its area is that of a disc
# of radius 1.
_HALF_SIDE = math.sqrt(math.pi) / 2
_INRADIUS = math.sqrt(math.pi / (3 * math.sqrt(3)))
EXTENTS = torch.tensor([[1.0, 1.0, 1.0], [_HALF_SIDE, _HALF_SIDE, _HALF_SIDE],
                        [_INRADIUS * math.sqrt(3), 2 * _INRADIUS, _INRADIUS]])


def coverage(shape, center, radius, resolution):
    """The share of each pixel that a subject covers, with smooth edges.

    shape: [..., 3] weights of (circle, square, triangle), one-hot if the subject is not morphing. center
    [..., 2] and radius [...] are fractions of the width. resolution: h and w in pixels. Returns [..., h, w]
    in [0, 1].
    """
    grid = (torch.arange(resolution) + 0.5) / resolution
    dx = grid - center[..., 0, None, None]                       # [..., 1, w]
    dy = grid[:, None] - center[..., 1, None, None]              # [..., h, 1]
    r = radius[..., None, None]
    circle = torch.sqrt(dx ** 2 + dy ** 2) - r                   # signed distances, negative inside
    square = torch.maximum(dx.abs(), dy.abs()) - _HALF_SIDE * r
    triangle = torch.maximum(dy, dx.abs() * math.cos(math.pi / 6) - dy * 0.5) - _INRADIUS * r
    weight = shape[..., None, None]
    distance = (weight[..., 0, :, :] * circle + weight[..., 1, :, :] * square
                + weight[..., 2, :, :] * triangle)
    return (0.5 - distance * resolution).clamp(0, 1)


def fold(position, low, high):
    """Reflects the straight path `position` into [low, high], as elastic walls do. The three tensors
    broadcast."""
    span = (high - low).clamp_min(1e-6)
    phase = torch.remainder(position - low, 2 * span)
    return low + torch.minimum(phase, 2 * span - phase)


def walls(shape, radius):
    """Where a subject's centre can be. shape: indices of SHAPES [...]; radius [...]. -> (low [..., 2], high
    [..., 2])"""
    extent = EXTENTS[shape] * radius[..., None]                  # [..., 3]
    return extent[..., [0, 1]], 1 - extent[..., [0, 2]]


def _mid_flight(start, velocity, low, high, frames):
    """The frame in which a subject is farthest from the walls that it moves between. If it turns there,
    nobody can take that for a bounce."""
    path = fold(start + velocity * torch.arange(2, frames - 3)[:, None], low, high)     # [k, 2]
    axis = velocity.abs().argmax()
    return 2 + int(torch.minimum(path - low, high - path)[:, axis].argmax())


def split_of(prompt):
    """The split of a caption: "train", "validation" (for choices) or "test" (for reported results).

    Training never sees the captions of "validation" and "test", which are a fixed sixth of all captions.
    """
    digest = hashlib.blake2b(prompt.encode(), digest_size=4).digest()
    if digest[0] % 6:
        return "train"
    return "test" if digest[1] % 3 else "validation"


def all_prompts(split):
    """Every caption of `split` ("train", "validation", "test" or "reworded"): {(colour, shape, direction):
    [captions]}."""
    wordings, phrases_of = WORDINGS, PHRASES
    if split == "reworded":
        wordings, phrases_of = REWORDED, REPHRASED
    prompts = {}
    for color, shape, direction in itertools.product(COLORS, SHAPES, phrases_of):
        captions = []
        for wording, phrase in itertools.product(wordings, phrases_of[direction]):
            caption = wording.format(c=color, s=shape, d=phrase)
            if split == "reworded" or split_of(caption) == split:
                captions.append(caption)
        prompts[color, shape, direction] = captions
    return prompts


def draw_prompts(count, seed, split="train"):
    """Draws `count` captions of the split: first colour, shape and direction, uniformly, and then one of the
    captions that ask for them."""
    g = torch.Generator().manual_seed(seed)
    captions_of = [captions for captions in all_prompts(split).values() if captions]
    picked = torch.randint(len(captions_of), (count,), generator=g).tolist()
    wording = torch.rand(count, generator=g).tolist()
    drawn = []
    for k, u in zip(picked, wording):
        captions = captions_of[k]
        drawn.append(captions[int(u * len(captions))])
    return drawn


def make(count, seed, kind="clean", size="tiny", split="train", severity=None):
    """Renders clips of the world.

    kind: what flaws the clips have.
    - "clean": none;
    - "mixture", which the base generator is trained on: 45 % of the clips are clean, the others have one
      flaw, sometimes two, of any severity from .3 on;
    - "flawed": one flaw per clip, clearly visible (severity from .6 on);
    - the name of a flaw: every clip has this flaw, also clearly visible.
    size: one of SIZES. split: that of the captions. severity: a number in (0, 1] for every flaw; default:
    drawn. Returns (videos uint8 [b, f, h, w, 3], b prompts, b dicts {flaw: severity}). Raises InputError.
    """
    flaw_names = PHYSICAL + DEFORMITY
    if kind not in ("clean", "mixture", "flawed") + flaw_names:
        raise InputError(f"kind must be clean, mixture, flawed or one of {', '.join(flaw_names)}, "
                         f"got {kind!r}")
    if size not in SIZES:
        raise InputError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    F, R = SIZES[size]["frames"], SIZES[size]["resolution"]
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=g)

    prompts = draw_prompts(count, seed + 1, split)
    asked = [parse_prompt(prompt) for prompt in prompts]
    shape = torch.tensor([SHAPES.index(a["shape"]) for a in asked])
    color = torch.tensor([COLORS[a["color"]] for a in asked])
    heading = torch.tensor([DIRECTIONS[a["direction"]] for a in asked])                 # [b, 2]
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * rand(count)
    speed = SPEED[0] + (SPEED[1] - SPEED[0]) * rand(count)
    skew = MAX_SKEW * (2 * rand(count) - 1)
    velocity = speed[:, None] * (torch.cos(skew)[:, None] * heading
                                 + torch.sin(skew)[:, None] * heading.flip(-1))         # [b, 2]
    low, high = walls(shape, radius)                                                    # [b, 2] each
    # The subject starts where it can move for three frames before it hits a wall, so that its direction can
    # be seen.
    reach = 3 * velocity * (heading != 0)
    start_low = low - reach.clamp_max(0)
    start_high = high - reach.clamp_min(0)
    start = start_low + (start_high - start_low) * rand(count, 2)

    flaws = []
    for _ in range(count):
        names = []
        if kind in flaw_names:
            names.append(kind)
        elif kind == "flawed" or (kind == "mixture" and rand(1).item() > 0.45):
            names.append(flaw_names[int(rand(1).item() * len(flaw_names))])
            if kind == "mixture" and rand(1).item() < 0.2:
                names.append(flaw_names[int(rand(1).item() * len(flaw_names))])
        least = 0.3 if kind == "mixture" else 0.6
        clip_flaws = {}
        for name in names:
            if severity is None:
                clip_flaws[name] = least + (1 - least) * rand(1).item()
            else:
                clip_flaws[name] = severity
        flaws.append(clip_flaws)

    # The state of each subject in each frame. The flaws below change it.
    clock = torch.arange(F).float().repeat(count, 1)                                # [b, f], physical time
    scale = torch.ones(count, F)
    offset = torch.zeros(count, F, 2)
    weight = torch.eye(3)[shape][:, None].repeat(1, F, 1)                               # [b, f, 3]
    tint = color[:, None].repeat(1, F, 1)                                               # [b, f, 3]
    opacity = torch.ones(count, F)
    twin = torch.zeros(count, F)
    twin_shift = torch.zeros(count, 2)
    for i, clip_flaws in enumerate(flaws):
        for name, s in clip_flaws.items():
            k = 2 + int(rand(1).item() * (F - 5))                           # the frame where the flaw begins
            angle = 2 * math.pi * rand(1).item()
            way = torch.tensor([math.cos(angle), math.sin(angle)])
            if name == "teleport":
                middle = (low[i] + high[i]) / 2
                here = fold(start[i] + velocity[i] * k, low[i], high[i])
                way = torch.where(here > middle, -way.abs(), way.abs())         # away from the nearer walls
                offset[i, k:] += (0.10 + 0.25 * s) * way
            elif name == "jitter":
                offset[i] += (0.02 + 0.07 * s) * (2 * rand(F, 2) - 1)
            elif name == "freeze":
                pause = 1 + round(3 * s)
                clock[i, k:] = (clock[i, k:] - pause).clamp_min(clock[i, k - 1])
            elif name == "reversal":
                k = _mid_flight(start[i], velocity[i], low[i], high[i], F)
                backwards = 1.0 - 1.5 * (1 - s)                                         # speed after the turn
                clock[i, k:] = clock[i, k - 1] - backwards * (clock[i, k:] - clock[i, k - 1])
            elif name == "speed_change":
                k = F // 2 - int(rand(1).item() * 2)                            # so that both speeds are seen
                if speed[i] < sum(SPEED) / 2:
                    factor = 1 + 2.5 * s
                else:
                    factor = max(0.0, 1 - 1.2 * s)
                clock[i, k:] = clock[i, k - 1] + factor * (clock[i, k:] - clock[i, k - 1])
            elif name == "pulse":
                phase = 2 * math.pi * (torch.arange(F) / (2.5 + 3 * rand(1).item()) + rand(1).item())
                scale[i] *= 1 + 0.35 * s * torch.sin(phase)
            elif name == "morph":
                other = torch.eye(3)[(int(shape[i]) + 1 + int(rand(1).item() * 2)) % 3]
                ramp = ((torch.arange(F) - k + 1) / 3).clamp(0, 1)[:, None] * min(1.0, 0.5 + 0.8 * s)
                weight[i] = (1 - ramp) * weight[i] + ramp * other
            elif name == "flicker":
                own = list(COLORS).index(asked[i]["color"])
                other = list(COLORS.values())[(own + 1 + int(rand(1).item() * 3)) % len(COLORS)]
                frames = torch.arange(F)
                on = ((frames >= k) & (frames < k + 1 + round(3 * s))).float()[:, None]
                on = on * min(1.0, 0.3 + 0.7 * s)
                tint[i] = (1 - on) * tint[i] + on * torch.tensor(other)
            elif name == "vanish":
                opacity[i, k:k + 1 + round(2 * s)] = max(0.0, 0.8 - s)
            elif name == "duplicate":
                twin[i, k - 1:k + 1 + round(4 * s)] = min(1.0, 0.3 + s)
                twin_shift[i] = 0.42 * way

    center = fold(start[:, None] + velocity[:, None] * clock[..., None] + offset, low[:, None], high[:, None])
    alpha = coverage(weight, center, radius[:, None] * scale, R) * opacity[..., None, None]     # [b, f, h, w]
    if twin.any():
        second = coverage(weight, (center + twin_shift[:, None]).remainder(1.0), radius[:, None] * scale, R)
        alpha = torch.maximum(alpha, second * twin[..., None, None])
    alpha = alpha[..., None]                                                                # [b, f, h, w, 1]
    background = torch.tensor(BACKGROUND)
    video = background + alpha * (tint[:, :, None, None] - background)                      # [b, f, h, w, 3]
    return (video * 255).round().to(torch.uint8), prompts, flaws


def parse_prompt(prompt):
    """What a caption asks for: {"color", "shape", "direction"}, each None where the caption does not say."""
    words = prompt.lower().translate(str.maketrans(",.:", "   ")).split()

    def first(names):
        for word in words:
            for name in names:
                if word in (name, name + "s", name + "wards"):
                    return name
        return None

    return {"color": first(COLORS), "shape": first(SHAPES), "direction": first(DIRECTIONS)}


def meaning(prompt):
    """A value that is equal for two captions that ask for the same video.

    It is (colour, shape, direction) or, for a caption that lacks one of them, the caption's words.
    """
    asked = tuple(parse_prompt(prompt).values())
    if None in asked:
        return " ".join(prompt.casefold().split())
    return asked
