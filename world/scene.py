"""The embedded world: simple subjects that move by physics, with the flaws a generator makes, and captions.

It stands in for web video, as annotator.py does for human annotators, so that the paper's claims can be checked without
people: `make` renders captioned clips, clean or flawed.

    python -m world.clips clips --count 256 --kind clean      writes clips of this world as mp4 with metadata

Axes: b batch (clips), f frames, h height, w width, 3 RGB. Lengths are fractions of the frame's width, times are
frames; y grows downwards.
"""
import hashlib
import math

import torch

from common import InputError

SIZES = {"tiny": {"frames": 9, "resolution": 32}, "mid": {"frames": 9, "resolution": 48}, "small": {"frames": 17, "resolution": 64}}
LATENT_SHAPES = {"tiny": (16, 3, 4, 4), "mid": (16, 3, 6, 6), "small": (16, 5, 8, 8)}         # c, f, h, w under VideoVAE
FPS = 8
BACKGROUND = (0.10, 0.10, 0.13)
COLORS = {"red": (0.92, 0.20, 0.18), "green": (0.15, 0.75, 0.28), "blue": (0.25, 0.42, 0.96),
          "yellow": (0.95, 0.85, 0.20)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
WORDINGS = ("a {c} {s} moving {d}", "a {c} {s} moves {d}", "the {c} {s} glides {d}", "one {c} {s} travelling {d}",
            "a video of a {c} {s} going {d}", "{c} {s}, heading {d}", "there is a {c} {s} drifting {d}",
            "a {c} {s} that slides {d}")
PHRASES = {"right": ("to the right", "right"), "left": ("to the left", "left"),
           "up": ("up", "upwards"), "down": ("down", "downwards")}
# Sentences of the split "reworded", kept out of all training, validation and choice: built otherwise, with other verbs and
# phrases, in another order. Only the words for colour, shape and direction are the world's own, or the annotator could not tell
# what was asked.
REWORDED = ("{c} coloured {s} that goes {d}", "see this {c} {s}: it floats {d}", "some {c} {s} rolling {d}", "{d} flies a {c} {s}",
            "a {s}, {c}, on its way {d}")
REPHRASED = {"right": ("towards the right", "rightwards"), "left": ("towards the left", "leftwards"),
             "up": ("straight up", "up and up"), "down": ("straight down", "down and down")}
RADIUS = (0.15, 0.18)            # of a disc with the subject's area
SPEED = (0.036, 0.070)           # per frame
MAX_SKEW = math.radians(20)      # between the motion and the caption's direction
PHYSICAL = ("teleport", "jitter", "freeze", "reversal", "speed_change")
DEFORMITY = ("pulse", "morph", "flicker", "vanish", "duplicate")
# Half extents of each shape for a disc-equivalent radius of 1: left/right, up, down (all shapes have equal area).
_HALF_SIDE = math.sqrt(math.pi) / 2
_INRADIUS = math.sqrt(math.pi / (3 * math.sqrt(3)))
EXTENTS = torch.tensor([[1.0, 1.0, 1.0], [_HALF_SIDE, _HALF_SIDE, _HALF_SIDE],
                        [_INRADIUS * math.sqrt(3), 2 * _INRADIUS, _INRADIUS]])


def coverage(shape, center, radius, resolution):
    """Anti-aliased share of each pixel that a subject covers.

    shape: [..., 3] weights of (circle, square, triangle), one-hot unless the subject is morphing. center: [..., 2]
    and radius: [...] in fractions of the width. Returns [..., h, w] in [0, 1].
    """
    grid = (torch.arange(resolution) + 0.5) / resolution
    dx = grid - center[..., 0, None, None]                       # [..., 1, w]
    dy = grid[:, None] - center[..., 1, None, None]              # [..., h, 1]
    r = radius[..., None, None]
    circle = torch.sqrt(dx ** 2 + dy ** 2) - r                   # signed distances, negative inside
    square = torch.maximum(dx.abs(), dy.abs()) - _HALF_SIDE * r
    triangle = torch.maximum(dy, dx.abs() * math.cos(math.pi / 6) - dy * 0.5) - _INRADIUS * r
    weight = shape[..., None, None]
    distance = weight[..., 0, :, :] * circle + weight[..., 1, :, :] * square + weight[..., 2, :, :] * triangle
    return (0.5 - distance * resolution).clamp(0, 1)


def fold(position, low, high):
    """Elastic walls: the straight path `position` reflected into [low, high]."""
    span = (high - low).clamp_min(1e-6)
    phase = torch.remainder(position - low, 2 * span)
    return low + torch.minimum(phase, 2 * span - phase)


def walls(shape, radius):
    """Where a subject's centre can be: (low [..., 2], high [..., 2]) for shape indices and radii [...]."""
    extent = EXTENTS[shape] * radius[..., None]                  # [..., 3]
    return extent[..., [0, 1]], 1 - extent[..., [0, 2]]


def _mid_flight(start, velocity, low, high, frames):
    """The frame in which a subject is farthest from the walls it moves between: there no bounce excuses a turn."""
    path = fold(start + velocity * torch.arange(2, frames - 3)[:, None], low, high)     # [k, 2]
    axis = velocity.abs().argmax()
    return 2 + int(torch.minimum(path - low, high - path)[:, axis].argmax())


def split_of(prompt):
    """"train", or for a fixed sixth of all sentences, which training never sees, "validation" (choices are made on
    it) or "test" (results are reported on it)."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=4).digest()
    if digest[0] % 6:
        return "train"
    return "test" if digest[1] % 3 else "validation"


def all_prompts(split):
    """Every caption of `split` ("train", "validation", "test", or "reworded") as {(colour, shape, direction): [sentences]}."""
    reworded = split == "reworded"
    prompts = {}
    for color in COLORS:
        for shape in SHAPES:
            for direction, phrases in (REPHRASED if reworded else PHRASES).items():
                sentences = [wording.format(c=color, s=shape, d=phrase)
                             for wording in (REWORDED if reworded else WORDINGS) for phrase in phrases]
                prompts[color, shape, direction] = [s for s in sentences if reworded or split_of(s) == split]
    return prompts


def draw_prompts(count, seed, split="train"):
    """`count` captions of the split, drawn uniformly over colour, shape and direction."""
    g = torch.Generator().manual_seed(seed)
    prompts = all_prompts(split)
    keys = [key for key in prompts if prompts[key]]
    picked = torch.randint(len(keys), (count,), generator=g).tolist()
    wording = torch.rand(count, generator=g).tolist()
    return [prompts[keys[k]][int(u * len(prompts[keys[k]]))] for k, u in zip(picked, wording)]


def make(count, seed, kind="clean", size="tiny", split="train", severity=None):
    """Render clips of the world.

    kind: "clean"; "mixture" (45 % clean, the rest with one flaw, sometimes two, of any severity: what the base
    generator is trained on); "flawed" (one clear flaw each); or the name of one flaw. severity: a number in (0, 1]
    for every flaw, or None to draw it. Returns (videos uint8 [b, f, h, w, 3], prompts, flaws), where flaws holds,
    for each clip, a dict {flaw: severity}.
    """
    flaw_names = PHYSICAL + DEFORMITY
    if kind not in ("clean", "mixture", "flawed") + flaw_names:
        raise InputError(f"kind must be clean, mixture, flawed or one of {', '.join(flaw_names)}, got {kind!r}")
    if size not in SIZES:
        raise InputError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    F, R = SIZES[size]["frames"], SIZES[size]["resolution"]
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=g)

    prompts = draw_prompts(count, seed + 1, split)
    asked = [parse_prompt(p) for p in prompts]
    shape = torch.tensor([SHAPES.index(a["shape"]) for a in asked])
    color = torch.tensor([COLORS[a["color"]] for a in asked])
    heading = torch.tensor([DIRECTIONS[a["direction"]] for a in asked])                 # [b, 2]
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * rand(count)
    speed = SPEED[0] + (SPEED[1] - SPEED[0]) * rand(count)
    skew = MAX_SKEW * (2 * rand(count) - 1)
    velocity = speed[:, None] * (torch.cos(skew)[:, None] * heading
                                 + torch.sin(skew)[:, None] * heading.flip(-1))         # [b, 2]
    low, high = walls(shape, radius)                                                    # [b, 2] each
    # The start leaves three free frames along the motion, so that the caption's direction can be seen.
    reach = 3 * velocity * (heading != 0)
    start_low, start_high = low - reach.clamp_max(0), high - reach.clamp_min(0)
    start = start_low + (start_high - start_low) * rand(count, 2)

    flaws = []
    for _ in range(count):
        names = []
        if kind in flaw_names:
            names = [kind]
        elif kind == "flawed" or (kind == "mixture" and rand(1).item() > 0.45):
            names = [flaw_names[int(rand(1).item() * len(flaw_names))]]
            if kind == "mixture" and rand(1).item() < 0.2:
                names.append(flaw_names[int(rand(1).item() * len(flaw_names))])
        least = 0.3 if kind == "mixture" else 0.6
        flaws.append({n: severity if severity is not None else least + (1 - least) * rand(1).item() for n in names})

    # Per-frame state of each subject; the flaws below bend it.
    clock = torch.arange(F).float().repeat(count, 1)                                    # [b, f], physical time
    scale = torch.ones(count, F)
    offset = torch.zeros(count, F, 2)
    weight = torch.eye(3)[shape][:, None].repeat(1, F, 1)                               # [b, f, 3]
    tint = color[:, None].repeat(1, F, 1)                                               # [b, f, 3]
    opacity = torch.ones(count, F)
    twin = torch.zeros(count, F)
    twin_shift = torch.zeros(count, 2)
    for i, clip_flaws in enumerate(flaws):
        for name, s in clip_flaws.items():
            k = 2 + int(rand(1).item() * (F - 5))                                       # frame where it strikes
            angle = 2 * math.pi * rand(1).item()
            way = torch.tensor([math.cos(angle), math.sin(angle)])
            if name == "teleport":
                middle = (low[i] + high[i]) / 2
                here = fold(start[i] + velocity[i] * k, low[i], high[i])
                way = torch.where(here > middle, -way.abs(), way.abs())                 # away from the near wall
                offset[i, k:] += (0.10 + 0.25 * s) * way
            elif name == "jitter":
                offset[i] += (0.02 + 0.07 * s) * (2 * rand(F, 2) - 1)
            elif name == "freeze":
                held = 1 + round(3 * s)
                clock[i, k:] = (clock[i, k:] - held).clamp_min(clock[i, k - 1])
            elif name == "reversal":
                keep = 1 - s                                                            # share of speed kept forward
                k = _mid_flight(start[i], velocity[i], low[i], high[i], F)
                clock[i, k:] = clock[i, k - 1] - (1.0 - 1.5 * keep) * (clock[i, k:] - clock[i, k - 1])
            elif name == "speed_change":
                k = F // 2 - int(rand(1).item() * 2)                                    # both speeds are seen
                factor = 1 + 2.5 * s if speed[i] < sum(SPEED) / 2 else max(0.0, 1 - 1.2 * s)
                clock[i, k:] = clock[i, k - 1] + factor * (clock[i, k:] - clock[i, k - 1])
            elif name == "pulse":
                phase = 2 * math.pi * (torch.arange(F) / (2.5 + 3 * rand(1).item()) + rand(1).item())
                scale[i] *= 1 + 0.35 * s * torch.sin(phase)
            elif name == "morph":
                other = torch.eye(3)[(int(shape[i]) + 1 + int(rand(1).item() * 2)) % 3]
                ramp = ((torch.arange(F) - k + 1) / 3).clamp(0, 1)[:, None] * min(1.0, 0.5 + 0.8 * s)
                weight[i] = (1 - ramp) * weight[i] + ramp * other
            elif name == "flicker":
                names = list(COLORS.values())
                other = names[(names.index(COLORS[asked[i]["color"]]) + 1 + int(rand(1).item() * 3)) % len(names)]
                frames = torch.arange(F)
                on = ((frames >= k) & (frames < k + 1 + round(3 * s))).float()[:, None] * min(1.0, 0.3 + 0.7 * s)
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
    alpha = alpha[..., None]                                                                    # [b, f, h, w, 1]
    background = torch.tensor(BACKGROUND)
    video = background + alpha * (tint[:, :, None, None] - background)                          # [b, f, h, w, 3]
    return (video * 255).round().to(torch.uint8), prompts, flaws


def parse_prompt(prompt):
    """What a caption asks for: {"color", "shape", "direction"}, None where it says nothing."""
    words = prompt.lower().translate(str.maketrans(",.:", "   ")).split()
    first = lambda names: next((n for word in words for n in names if word in (n, n + "s", n + "wards")), None)
    return {"color": first(COLORS), "shape": first(SHAPES), "direction": first(DIRECTIONS)}


def meaning(prompt):
    """What makes two captions ask for the same video: colour, shape and direction, or for a sentence that lacks one of
    them, its words."""
    asked = tuple(parse_prompt(prompt).values())
    return asked if None not in asked else " ".join(prompt.casefold().split())
