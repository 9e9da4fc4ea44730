"""The annotator of the embedded world: fixed rules that grade a clip where the paper asks people.

It uses nothing but the clip's pixels and its prompt. It grades the two axes of the paper's annotation guide,
physical plausibility and subject deformity, and says whether the clip shows what the prompt asks for.

Axes: b batch (clips), f frames, h height, w width, 3 RGB. Lengths are fractions of the frame's width. Times
are counted in frames. y grows downwards.
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

# The firm annotator's limits for each error: a clip is qualified up to the first number and unqualified above
# the second. Between the two it is partially qualified.
LIMITS = {
    "track_error": (0.040, 0.065),      # largest distance from the fitted path, in frame widths
    "speed_error": (0.15, 0.30),        # how far the speed is outside of the world's, relative
    "area_error": (0.20, 0.30),         # largest relative difference from the clip's median area
    "shape_error": (0.205, 0.27),       # 1 - soft IoU with the best fitting ideal shape, in the worst frame
    "color_error": (0.22, 0.32),        # largest RGB distance to the nearest colour of the world
    "presence_error": (0.25, 0.40),     # 1 - weakest contrast / median contrast of the clip
}
AXES = {"physical": ("track_error", "speed_error"),
        "deformity": ("area_error", "shape_error", "color_error", "presence_error")}
ANNOTATORS = {"strict": 0.8, "firm": 1.0, "loose": 1.25}    # the factor that `grade` multiplies LIMITS with
MAX_DIRECTION_ERROR = math.radians(38)


def _fit_path(center, low, high):
    """Finds the elastic path nearest to the tracked centres, by least squares, for x and y separately.

    A coarse search tries every velocity and start on a grid. Two finer searches then try values around the
    best so far.
    center: [b, f, 2]; low, high: walls [b, 2]. Returns (velocity [b, 2], path [b, f, 2]).
    """
    b, F, _ = center.shape
    clock = torch.arange(F).float()
    best_v, best_p = torch.zeros(b, 2), center[:, 0].clone()
    for span_v, span_p in ((1.3 * SPEED[1], 0.03), (0.006, 0.01), (0.0012, 0.002)):
        v = best_v[:, None, None] + torch.linspace(-span_v, span_v, 41)[None, :, None, None]   # [b, 41, 1, 2]
        p = best_p[:, None, None] + torch.linspace(-span_p, span_p, 9)[None, None, :, None]     # [b, 1, 9, 2]
        v = v.expand(b, 41, 9, 2).reshape(b, 369, 2)
        p = p.expand(b, 41, 9, 2).reshape(b, 369, 2)
        path = fold(p[:, :, None] + v[:, :, None] * clock[:, None], low[:, None, None], high[:, None, None])
        error = (path - center[:, None]).square().sum(2)                                        # [b, 369, 2]
        index = error.argmin(1, keepdim=True)                                                   # [b, 1, 2]
        best_v = v.gather(1, index)[:, 0]
        best_p = p.gather(1, index)[:, 0]
    path = fold(best_p[:, None] + best_v[:, None] * clock[:, None], low[:, None], high[:, None])
    return best_v, path


def grade(found, tolerance=1.0):
    """Compares the errors that `annotate` measured with LIMITS times `tolerance` (one of the values of
    ANNOTATORS), and grades them.

    found: a dict that holds the errors of LIMITS, "absent" and "adherent", each [b]. Returns "physical",
    "deformity", "qualified" and "unqualified", each [b] and with the meaning that they have in `annotate`.
    """
    graded = {}
    for axis, names in AXES.items():
        # How many limits the worst error of this axis exceeds: 0, 1 or 2.
        limits_exceeded = torch.zeros(found["absent"].shape, dtype=torch.long)
        for name in names:
            low, high = LIMITS[name]
            exceeded = (found[name] > tolerance * low).long() + (found[name] > tolerance * high).long()
            limits_exceeded = torch.maximum(limits_exceeded, exceeded)
        graded[axis] = (2 - limits_exceeded).masked_fill(found["absent"], 0)
    graded["qualified"] = (graded["physical"] == 2) & (graded["deformity"] == 2) & found["adherent"]
    graded["unqualified"] = (graded["physical"] == 0) | (graded["deformity"] == 0) | ~found["adherent"]
    return graded


def _places(asked, names):
    """asked: b names, or None -> [b], the index of each in `names`, or -1 for None."""
    names = list(names)
    places = []
    for name in asked:
        if name is None:
            places.append(-1)
        else:
            places.append(names.index(name))
    return torch.tensor(places)


@torch.no_grad()
def annotate(videos, prompts):
    """Grades clips by their pixels, and compares them with their prompts.

    videos: uint8 [b, f, h, w, 3] with h = w and at least 4 frames. prompts: b strings. Returns a dict of
    tensors [b]:
    - "physical" and "deformity": 2 qualified, 1 partially qualified, 0 unqualified;
    - "adherent": bool, the clip does not contradict its prompt;
    - "qualified": bool, both axes are 2 and the clip is adherent;
    - "unqualified": bool, an axis is 0 or the clip is not adherent;
    - the errors of LIMITS, and "direction_error" in radians;
    - "absent": bool, nothing in the clip has the contrast and the size of a subject;
    - PANEL, which exposes reward hacking: "speed" in frame widths per frame, "dynamic" (bool), "brightness"
      and "saturation" in 0 .. 1, and "adherent".
    "center" [b, f, 2] is the tracked subject. Raises InputError for videos of another dtype or layout.
    """
    right_layout = videos.ndim == 5 and videos.shape[1] >= 4 and videos.shape[2] == videos.shape[3] \
        and videos.shape[4] == 3
    if videos.dtype != torch.uint8 or not right_layout or len(prompts) != len(videos):
        raise InputError(f"annotate wants uint8 videos [b, f >= 4, h, w = h, 3] and b prompts, got "
                         f"{videos.dtype} {list(videos.shape)} and {len(prompts)} prompts")
    if len(videos) > 256:                                       # 256 at a time, to bound the memory
        parts = [annotate(videos[i:i + 256], prompts[i:i + 256]) for i in range(0, len(videos), 256)]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    b, F, R = videos.shape[:3]
    video = videos.float() / 255
    background = torch.tensor(BACKGROUND)

    # How much of each pixel is subject: the pixel's contrast to the background, relative to the contrast that
    # the subject has in this frame.
    contrast = (video - background).abs().amax(-1)                                      # [b, f, h, w]
    strength = contrast.flatten(2).topk(R * R // 32, dim=2).values.mean(2)              # [b, f]
    typical = strength.median(1, keepdim=True).values
    reference = torch.maximum(strength, 0.5 * typical).clamp_min(0.1)
    alpha = ((contrast / reference[..., None, None] - 0.12) / 0.80).clamp(0, 1)
    mass = alpha.flatten(2).sum(2).clamp_min(1e-3)                                      # [b, f]
    grid = (torch.arange(R) + 0.5) / R
    center_x = (alpha * grid).flatten(2).sum(2)
    center_y = (alpha * grid[:, None]).flatten(2).sum(2)
    center = torch.stack([center_x, center_y], -1) / mass[..., None]                    # [b, f, 2]
    area = mass / R ** 2
    radius = (area / math.pi).sqrt()                                                    # [b, f]
    core = (alpha > 0.8).float()[..., None]
    color = (video * core).sum((2, 3)) / core.sum((2, 3)).clamp_min(1)                  # [b, f, 3]

    # Shape: the soft IoU with each ideal shape that has the same centre and area.
    ideal = coverage(torch.eye(3)[:, None, None], center, radius, R)                    # [3, b, f, h, w]
    union = torch.maximum(ideal, alpha).flatten(3).sum(3).clamp_min(1e-3)   # 0 where the subject vanished
    iou = torch.minimum(ideal, alpha).flatten(3).sum(3) / union                         # [3, b, f]
    shape = iou.mean(2).argmax(0)                                                       # [b]
    fit = iou.gather(0, shape[None, :, None].expand(1, b, F))[0]                        # [b, f]
    odd_one = (iou.argmax(0) != shape[:, None]) & (iou.amax(0) - fit > 0.03)    # another shape in this frame
    # Colour: the distance to each colour of the world, in each frame.
    palette = torch.tensor(list(COLORS.values()))
    distance = (color[:, :, None] - palette).norm(dim=-1)                               # [b, f, 4]
    hue = distance.mean(1).argmin(1)                                                    # [b]
    # Physics: the nearest elastic path between the walls for this shape and size.
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
    # A subject has at least half of the faintest colour's contrast, and about the size of the world's
    # subjects.
    faint = typical[:, 0] < 0.30
    size = radius.median(1).values
    out["absent"] = faint | (size < 0.7 * RADIUS[0]) | (size > 1.3 * RADIUS[1])
    # The prompt: any clip fits what the prompt leaves open.
    asked = [parse_prompt(prompt) for prompt in prompts]
    want_shape = _places([a["shape"] for a in asked], SHAPES)
    want_hue = _places([a["color"] for a in asked], COLORS)
    want_way = _places([a["direction"] for a in asked], DIRECTIONS)
    heading = torch.tensor(list(DIRECTIONS.values()))[want_way]
    # In a clean clip the subject hits no wall along the caption's direction before frame 3.
    cosine = ((path[:, 3] - path[:, 0]) * heading).sum(1) / (3 * speed).clamp_min(1e-6)
    out["direction_error"] = torch.where(want_way < 0, 0.0, torch.arccos(cosine.clamp(-1, 1)))
    right_shape = (want_shape < 0) | (want_shape == shape)
    right_hue = (want_hue < 0) | (want_hue == hue)
    out["adherent"] = right_shape & right_hue & (out["direction_error"] < MAX_DIRECTION_ERROR)
    out |= grade(out)
    step = (center[:, 1:] - center[:, :-1]).norm(dim=-1)
    out["speed"] = step.median(1).values
    out["dynamic"] = out["speed"] > 0.5 * SPEED[0]
    out["center"] = center                                                              # [b, f, 2]
    out["brightness"] = video.amax(-1).mean((1, 2, 3))
    out["saturation"] = (video.amax(-1) - video.amin(-1)).mean((1, 2, 3))
    return out


PANEL = ("speed", "dynamic", "brightness", "saturation", "adherent")
