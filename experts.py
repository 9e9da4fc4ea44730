"""A generator of two experts (Wan2.2 A14B): one VideoDiT for the noisy times from the boundary on, another
for the times below it.

Code that samples or trains a generator calls the two as one model, and the times decide which one answers:

    t = 1, noise  -- high: t >= boundary --|-- low: t < boundary -->  t = 0, video

A step of a rollout has one time for all videos, so one of the two makes it. Training does the same: each
update trains one expert, the same one on all processes, because all processes gather sharded weights at the
same time.

Axes: b batch, c channels, f frames, h height, w width, l text tokens.
"""
import torch
from torch import nn

from common import InputError, refuse, uniform

NAMES = ("high", "low")                                         # in the order in which a rollout uses them
CHOICES = ("low", "high", "both")                               # values of --expert
FLAGS = ("expert", "lora_2", "guidance_scale_2")                # flags that only two experts need


class Experts(nn.Module):
    """Two VideoDiTs of one shape, called like one VideoDiT. folders: {"high" or "low": the folder that it is
    from}.

    `resting`: the expert that is not called waits in the host's memory, because most GPUs cannot hold both.
    """

    def __init__(self, high, low, boundary, folders=None):
        super().__init__()
        self.high, self.low, self.boundary, self.folders = high, low, boundary, folders
        self.resting = False

    @property
    def config(self):
        return self.low.config | {"boundary_ratio": self.boundary}

    @property
    def blocks(self):
        """The blocks that one forward call runs through."""
        return self.low.blocks

    def forward(self, x, t, context, **conditions):
        """The velocity [b, c, f, h, w], as from a VideoDiT. If times t [b] lie on both sides of the boundary,
        both experts are called; if the experts are sharded, all ranks must make the same calls."""
        above = t >= self.boundary                                                              # [b]
        rows = [side.nonzero()[:, 0] for side in (above, ~above)]
        found = [self.wake(name, x.device)(x[j], t[j], context[j], **{key: z[j] for key, z in
                                                                       conditions.items()})
                 for name, j in zip(NAMES, rows) if len(j)]
        return torch.cat(found)[torch.cat(rows).argsort()]                      # in the order of the batch

    def wake(self, name, device):
        """-> the expert of this name, on the device where it is called. If experts rest, the other expert
        leaves this device."""
        expert, other = (self.high, self.low) if name == "high" else (self.low, self.high)
        if self.resting and next(expert.parameters()).device != device:
            torch.clear_autocast_cache()                        # or copies of the leaving weights would stay
            other.cpu()
            expert.to(device)
        return expert

    def to(self, *args, **kwargs):
        """Moves both experts to a device; or neither if they rest, because then each comes when it is called.
        """
        return self if self.resting else super().to(*args, **kwargs)

    def trained(self):
        """{name: VideoDiT} of the experts that train."""
        return {name: getattr(self, name) for name in NAMES
                if any(p.requires_grad for p in getattr(self, name).parameters())}

    def notes(self, name, written):
        """What the config.json of a written expert says beside its shape, so that nobody takes the expert for
        a whole generator. written: the names of all experts that are written. If the other expert is not, the
        config.json says in which folder it is."""
        found = {"_expert": name, "_boundary_ratio": self.boundary}
        for other in NAMES:
            if other not in written and self.folders:
                found["_other"] = str(self.folders[other].resolve())
        return found


def parts(model):
    """The VideoDiTs of a generator: its two experts, or the generator itself. A reward model is one part."""
    return [model.high, model.low] if isinstance(model, Experts) else [model]


def trunk_of(generator):
    """The VideoDiT whose first blocks become a reward model's trunk. Of two experts it is the low-noise one,
    because the reward is about videos. From this trunk the reward model learns all times."""
    return parts(generator)[-1]


# ---- flags
def check_flags(config, dit_config):
    """Raises InputError for a flag about two experts where the generator with this config has none, and for
    files of adapters that do not fit what train_align.py is to train."""
    if "boundary_ratio" not in dit_config:
        refuse(config, FLAGS, "to a generator of one expert")
    elif hasattr(config, "expert"):
        for name, flag in (("high", "lora"), ("low", "lora_2")):
            if getattr(config, flag) and (config.expert or "low") not in (name, "both"):
                raise InputError(f"--{flag} {getattr(config, flag)}: is of the {name}-noise expert, which "
                                 f"does not train: leave it out, or give --expert {name} or both")
        if config.expert == "both" and bool(config.lora) != bool(config.lora_2) and not config.lora_rank:
            raise InputError("--expert both with adapters of one expert alone would train all weights of the "
                             "other: give --lora and --lora_2, or --lora_rank for new ones")


def to_train(generator, config):
    """Freezes the expert that --expert leaves out -> for each VideoDiT that trains (it, the LoRA file that it
    starts from or None)."""
    if not isinstance(generator, Experts):
        return [(generator, config.lora)]
    pairs = {"high": (generator.high, config.lora), "low": (generator.low, config.lora_2)}
    for name in NAMES:
        if config.expert not in (name, "both"):
            pairs.pop(name)[0].requires_grad_(False)
    return list(pairs.values())


def with_adapters(generator, config):
    """[(VideoDiT, LoRA file)] of --lora and --lora_2, to sample with."""
    return [(dit, path) for dit, path in zip(parts(generator), (config.lora, config.lora_2)) if path]


def guidance(generator, scale, scale_2):
    """The guidance_scale for flow.rollout: a number or, for two experts with two scales, a function of the
    time. scale_2: the scale of the low-noise expert; None: the same as the high-noise expert's."""
    if not isinstance(generator, Experts) or scale_2 in (None, scale):
        return scale
    return lambda t: torch.where(t >= generator.boundary, scale, scale_2).view(-1, 1, 1, 1, 1)


# ---- the times of the expert that trains
def steps_of_expert(expert, times, boundary):
    """The range of the Euler steps that an expert, or "both", makes. The first step of a schedule is step 1.
    times: from flow.schedule, from 1 to 0."""
    num_high = int((times[:-1] >= boundary).sum())              # the time at which a step starts decides
    steps = range(1, len(times))
    return {"high": steps[:num_high], "low": steps[num_high:], "both": steps}[expert]


def times_of(expert, u, boundary, seed, iteration, purpose="expert"):
    """Random times [b] for an update, on the side of the expert that trains. u [b]: uniform in [0, 1), is
    scaled to that side. With "both" each update draws a side, with the probability that a uniform time lies
    on it. purpose: a name for this draw, so that each update of an iteration can draw its own side."""
    if expert == "both":
        expert = "low" if uniform(seed, purpose, iteration, [0]).item() < boundary else "high"
    return boundary * u if expert == "low" else boundary + (1 - boundary) * u
