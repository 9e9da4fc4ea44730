"""The embedded world: simple subjects that move by physics, with the flaws a generator makes, and an exact judge.

It stands in for web video and for human annotators, so that every claim of the paper can be checked in minutes:
`make` renders captioned clips, clean or flawed, and `annotate` judges any clip by its pixels (and its prompt)
alone, on the two axes of the paper's annotation guide, physical plausibility and subject deformity.

    python data.py world clips/ --count 256 --kind clean      writes clips of this world as mp4 with metadata

Axes: b batch (clips), f frames, h height, w width, 3 RGB. Lengths are fractions of the frame's width, times are
frames; y grows downwards.
"""
import hashlib
import math

import torch

from common import InputError

SIZES = {"tiny": {"frames": 9, "resolution": 32}, "small": {"frames": 17, "resolution": 64}}
LATENT_SHAPES = {"tiny": (16, 3, 4, 4), "small": (16, 5, 8, 8)}         # c, f, h, w under VideoVAE
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


# ---------------------------------------------------------------------------------------------- render

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
    """Every caption of `split` ("train", "validation" or "test") as {(colour, shape, direction): [sentences]}."""
    prompts = {}
    for color in COLORS:
        for shape in SHAPES:
            for direction, phrases in PHRASES.items():
                sentences = [wording.format(c=color, s=shape, d=phrase) for wording in WORDINGS for phrase in phrases]
                prompts[color, shape, direction] = [s for s in sentences if split_of(s) == split]
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
    for i in range(count):
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


# ---------------------------------------------------------------------------------------------- annotate

def parse_prompt(prompt):
    """What a caption asks for: {"color", "shape", "direction"}, None where it says nothing."""
    words = prompt.lower().replace(",", " ").replace(".", " ").split()
    first = lambda names: next((n for word in words for n in names if word in (n, n + "s", n + "wards")), None)
    return {"color": first(COLORS), "shape": first(SHAPES), "direction": first(DIRECTIONS)}


# The firm annotator's limits: (qualified up to, unqualified from); what lies between is "partially qualified".
LIMITS = {
    "track_error": (0.040, 0.065),      # largest distance from the fitted path, of the width
    "speed_error": (0.15, 0.30),        # shortfall or excess over the world's speeds, relative
    "area_error": (0.20, 0.30),         # largest relative departure from the clip's median area
    "shape_error": (0.205, 0.27),        # 1 - soft IoU with the best fitting ideal shape, worst frame
    "color_error": (0.22, 0.32),        # largest RGB distance to the nearest colour of the world
    "presence_error": (0.25, 0.40),     # 1 - weakest contrast over the clip's median contrast
}
AXES = {"physical": ("track_error", "speed_error"),
        "deformity": ("area_error", "shape_error", "color_error", "presence_error")}
MAX_DIRECTION_ERROR = math.radians(38)


def _fit_path(center, low, high):
    """Least-squares elastic path per axis by exhaustive search, then a finer one around the best.

    center: [b, f, 2]; low, high: [b, 2]. Returns (velocity [b, 2], path [b, f, 2]).
    """
    b, F, _ = center.shape
    clock = torch.arange(F).float()
    best_v, best_p = torch.zeros(b, 2), center[:, 0].clone()
    for span_v, span_p in ((1.3 * SPEED[1], 0.03), (0.006, 0.01), (0.0012, 0.002)):
        v = best_v[:, None, None] + torch.linspace(-span_v, span_v, 41)[None, :, None, None]        # [b, 41, 1, 2]
        p = best_p[:, None, None] + torch.linspace(-span_p, span_p, 9)[None, None, :, None]         # [b, 1, 9, 2]
        v, p = v.expand(b, 41, 9, 2).reshape(b, 369, 2), p.expand(b, 41, 9, 2).reshape(b, 369, 2)
        path = fold(p[:, :, None] + v[:, :, None] * clock[:, None], low[:, None, None], high[:, None, None])
        error = (path - center[:, None]).square().sum(2)                                            # [b, 369, 2]
        index = error.argmin(1, keepdim=True)                                                       # [b, 1, 2]
        best_v, best_p = v.gather(1, index)[:, 0], p.gather(1, index)[:, 0]
    path = fold(best_p[:, None] + best_v[:, None] * clock[:, None], low[:, None], high[:, None])
    return best_v, path


@torch.no_grad()
def annotate(videos, prompts):
    """Judge clips by their pixels, and by their prompts for adherence.

    videos: uint8 [b, f, h, w, 3]; prompts: b strings. Returns a dict of tensors [b]: "physical" and "deformity"
    (2 qualified, 1 partially, 0 unqualified), "adherent" and "qualified" (bool; both axes qualified and adherent),
    "unqualified" (bool; an axis is 0 or the prompt is contradicted), every continuous error of LIMITS, and the
    panel that exposes reward hacking: "speed" (fraction of the width per frame), "dynamic" (bool), "brightness",
    "saturation"; and "center" [b, f, 2], the tracked subject. Raises InputError for a video of another dtype or layout.
    """
    if videos.dtype != torch.uint8 or videos.ndim != 5 or videos.shape[-1] != 3 or videos.shape[1] < 4 \
            or videos.shape[2] != videos.shape[3] or len(prompts) != len(videos):
        raise InputError(f"annotate wants uint8 videos [b, f >= 4, h, w = h, 3] and b prompts, got {videos.dtype} "
                         f"{list(videos.shape)} and {len(prompts)} prompts")
    if len(videos) > 256:                                        # bounded memory
        parts = [annotate(videos[i:i + 256], prompts[i:i + 256]) for i in range(0, len(videos), 256)]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    b, F, R = videos.shape[:3]
    video = videos.float() / 255
    background = torch.tensor(BACKGROUND)

    # Matte: contrast to the background, relative to the subject's own contrast in that frame.
    contrast = (video - background).abs().amax(-1)                                      # [b, f, h, w]
    strength = contrast.flatten(2).topk(R * R // 32, dim=2).values.mean(2)              # [b, f]
    typical = strength.median(1, keepdim=True).values
    reference = torch.maximum(strength, 0.5 * typical).clamp_min(0.1)
    alpha = ((contrast / reference[..., None, None] - 0.12) / 0.80).clamp(0, 1)
    mass = alpha.flatten(2).sum(2).clamp_min(1e-3)                                      # [b, f]
    grid = (torch.arange(R) + 0.5) / R
    center = torch.stack([(alpha * grid).flatten(2).sum(2), (alpha * grid[:, None]).flatten(2).sum(2)], -1)
    center = center / mass[..., None]                                                   # [b, f, 2]
    area = mass / R ** 2
    radius = (area / math.pi).sqrt()                                                    # [b, f]
    core = (alpha > 0.8).float()[..., None]
    color = (video * core).sum((2, 3)) / core.sum((2, 3)).clamp_min(1)                  # [b, f, 3]

    # Shape: soft IoU with each ideal shape of the same centre and area.
    ideal = coverage(torch.eye(3)[:, None, None], center, radius, R)                    # [3, b, f, h, w]
    union = torch.maximum(ideal, alpha).flatten(3).sum(3).clamp_min(1e-3)               # not 0 in a vanished frame
    iou = torch.minimum(ideal, alpha).flatten(3).sum(3) / union                         # [3, b, f]
    shape = iou.mean(2).argmax(0)                                                       # [b]
    fit = iou.gather(0, shape[None, :, None].expand(1, b, F))[0]                        # [b, f]
    odd_one = (iou.argmax(0) != shape[:, None]) & (iou.amax(0) - fit > 0.03)            # another shape in this frame
    # Colour: nearest colour of the world in each frame.
    palette = torch.tensor(list(COLORS.values()))
    distance = (color[:, :, None] - palette).norm(dim=-1)                               # [b, f, 4]
    hue = distance.mean(1).argmin(1)                                                    # [b]
    # Physics: the nearest elastic path between the walls of this shape and size.
    low, high = walls(shape, radius.median(1).values)
    velocity, path = _fit_path(center, low, high)
    speed = velocity.norm(dim=1)

    out = {
        "track_error": (path - center).norm(dim=-1).amax(1),
        "speed_error": torch.maximum(1 - speed / SPEED[0], speed / SPEED[1] - 1).clamp_min(0),
        "area_error": (area / area.median(1, keepdim=True).values - 1).abs().amax(1),
        "shape_error": (1 - fit + odd_one).amax(1),
        "color_error": distance.gather(2, hue[:, None, None].expand(b, F, 1)).amax((1, 2)),
        "presence_error": 1 - (strength.amin(1) / typical[:, 0].clamp_min(0.1)).clamp(0, 1),
    }
    # No subject worth the name: fainter than half of the faintest colour, or not a subject's size.
    absent = (typical[:, 0] < 0.30) | (radius.median(1).values < 0.7 * RADIUS[0]) \
        | (radius.median(1).values > 1.3 * RADIUS[1])
    for axis, names in AXES.items():
        level = torch.full((b,), 2)
        for name in names:
            level = torch.minimum(level, 2 - (out[name] > LIMITS[name][0]).long() - (out[name] > LIMITS[name][1]).long())
        out[axis] = level * ~absent
    asked = [parse_prompt(p) for p in prompts]
    index = lambda key, names: torch.tensor([-1 if a[key] is None else list(names).index(a[key]) for a in asked])
    want_shape, want_hue, want_way = index("shape", SHAPES), index("color", COLORS), index("direction", DIRECTIONS)
    heading = torch.tensor(list(DIRECTIONS.values()))[want_way]
    # The first three steps of a clean clip are free of bounces along the caption's direction.
    cosine = ((path[:, 3] - path[:, 0]) * heading).sum(1) / (3 * speed).clamp_min(1e-6)
    out["direction_error"] = torch.where(want_way < 0, 0.0, torch.arccos(cosine.clamp(-1, 1)))
    out["adherent"] = (((want_shape < 0) | (want_shape == shape)) & ((want_hue < 0) | (want_hue == hue))
                       & (out["direction_error"] < MAX_DIRECTION_ERROR))
    out["qualified"] = (out["physical"] == 2) & (out["deformity"] == 2) & out["adherent"]
    out["unqualified"] = (out["physical"] == 0) | (out["deformity"] == 0) | ~out["adherent"]
    step = (center[:, 1:] - center[:, :-1]).norm(dim=-1)
    out["speed"] = step.median(1).values
    out["dynamic"] = out["speed"] > 0.5 * SPEED[0]
    out["center"] = center                                                              # [b, f, 2]
    out["brightness"] = video.amax(-1).mean((1, 2, 3))
    out["saturation"] = (video.amax(-1) - video.amin(-1)).mean((1, 2, 3))
    return out


PANEL = ("speed", "dynamic", "brightness", "saturation", "adherent")


def summary(judged):
    """Means over clips of what `annotate` says: the qualified rate, each axis, and the panel against hacking."""
    rate = lambda values: values.float().mean().item()
    return {"qualified": rate(judged["qualified"]), "physical_qualified": rate(judged["physical"] == 2),
            "deformity_qualified": rate(judged["deformity"] == 2), **{name: rate(judged[name]) for name in PANEL}}
