"""The annotator of the embedded world, in the place of people: it judges any clip by its pixels and its prompt alone, on
the two axes of the paper's annotation guide, physical plausibility and subject deformity.

Axes: b batch (clips), f frames, h height, w width, 3 RGB. Lengths are fractions of the frame's width, times are
frames; y grows downwards.
"""
import math

import torch

from common import InputError
from world.scene import (
    BACKGROUND,
    COLORS,
    DIRECTIONS,
    RADIUS,
    SHAPES,
    SPEED,
    coverage,
    fold,
    parse_prompt,
    walls,
)

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
ANNOTATORS = {"strict": 0.8, "firm": 1.0, "loose": 1.25}         # how much of LIMITS they tolerate, for `grade`
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


def grade(found, tolerance=1.0):
    """What `annotate` found, judged by LIMITS times tolerance (of ANNOTATORS) -> {"physical", "deformity", "qualified",
    "unqualified"}, as annotate has them, each [b]."""
    graded = {}
    for axis, names in AXES.items():
        above = [sum(found[name] > tolerance * limit for limit in LIMITS[name]) for name in names]              # 0, 1 or 2 limits
        graded[axis] = (2 - torch.stack(above).amax(0)) * ~found["absent"]
    graded["qualified"] = (graded["physical"] == 2) & (graded["deformity"] == 2) & found["adherent"]
    graded["unqualified"] = (graded["physical"] == 0) | (graded["deformity"] == 0) | ~found["adherent"]
    return graded


@torch.no_grad()
def annotate(videos, prompts):
    """Judge clips by their pixels, and by their prompts for adherence.

    videos: uint8 [b, f, h, w, 3]; prompts: b strings. Returns a dict of tensors [b]: "physical" and "deformity"
    (2 qualified, 1 partially, 0 unqualified), "adherent" and "qualified" (bool; both axes qualified and adherent),
    "unqualified" (bool; an axis is 0 or the prompt is contradicted), every continuous error of LIMITS, "absent" (bool;
    no subject worth the name), and the panel that exposes reward hacking: "speed" (fraction of the width per frame),
    "dynamic" (bool), "brightness", "saturation"; and "center" [b, f, 2], the tracked subject. Raises InputError for a
    video of another dtype or layout.
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
    out["absent"] = (typical[:, 0] < 0.30) | (radius.median(1).values < 0.7 * RADIUS[0]) \
        | (radius.median(1).values > 1.3 * RADIUS[1])
    asked = [parse_prompt(p) for p in prompts]
    index = lambda key, names: torch.tensor([-1 if a[key] is None else list(names).index(a[key]) for a in asked])
    want_shape, want_hue, want_way = index("shape", SHAPES), index("color", COLORS), index("direction", DIRECTIONS)
    heading = torch.tensor(list(DIRECTIONS.values()))[want_way]
    # The first three steps of a clean clip are free of bounces along the caption's direction.
    cosine = ((path[:, 3] - path[:, 0]) * heading).sum(1) / (3 * speed).clamp_min(1e-6)
    out["direction_error"] = torch.where(want_way < 0, 0.0, torch.arccos(cosine.clamp(-1, 1)))
    out["adherent"] = (((want_shape < 0) | (want_shape == shape)) & ((want_hue < 0) | (want_hue == hue))
                       & (out["direction_error"] < MAX_DIRECTION_ERROR))
    out |= grade(out)
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
