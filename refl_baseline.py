"""RGB ReFL, the baseline that PRFL is compared with: it rewards the pixels of a predicted clean video.

A sample is rolled out from noise to a late time t without gradients. Then it takes ONE step with gradients,
which predicts x_0. The decoder turns x_0 into pixels WITH gradients, and a reward model scores the pixels.
The gradient goes through the frozen reward model, the frozen decoder and that one step into the generator.
train_align.py makes an SFT update before each such update, as for PRFL.

    x_T --rollout, no grad--> x_t --one step, with grad--> x_0 = x_t - t v --VAE--> pixels --> r

    loss = -lambda r

frames="first": only the first latent frame is decoded, to one image, which a reward model of images scores
(the paper uses PickScore). The VAE is causal, so this image is the first frame of the whole clip.
frames="all": the whole clip is decoded, and a reward model of videos scores it. (With 81 frames and 14B the
paper ran out of memory here.)

Where this differs, on purpose, from the paper:
1. Both reward models are small networks of our own, trained on the same labelled samples as PAVRM. So the
   comparison is about where a reward looks, not about what it has learned from. The two also read the prompt,
   because the labels depend on it.
2. "t near 0" is the last third of the steps, which Table 3 calls late: for N = 16, t from 6/16 to 1/16. The
   reward model has only seen finished videos, so the prediction must be close to a finished video; but in
   the very last step the generator could change little. train_reward.py reports the accuracy on predictions
   from every t (Fig. 3a), and --trajectory_part draws the steps from another third.
3. The decoder works in the dtype of --mixed_precision, which args.json records, both where the reward model
   of pixels is trained and where it is used. With bf16 it takes half of float32's memory, and RGB ReFL's rows
   in results/table1.md were made with bf16. Validation and sample.py decode in float32, as Wan does.

Axes: b batch, c channels, f latent frames, h w latents, F video frames (4 (f - 1) + 1), H W pixels, l text
tokens.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import InputError
from families import load_vae
from flow import predict_x0, rollout, schedule
from formats.video import TIME
from formats.weights import load_weights, read_config
from model import is_pinned, pin
from prfl import REWARD_LOSSES

FRAMES = ("first", "all")
CHUNK = 4                       # latent frames that are decoded at a time with checkpointing


class PixelReward(nn.Module):
    """A small convolutional network from decoded pixels and a prompt to a reward logit.

    Each of three stages halves height and width and then, with frames="all", mixes neighbouring frames. The
    prompt scales and shifts the channels.
    """

    def __init__(self, frames, text_dim, width=32):
        super().__init__()
        if frames not in FRAMES:
            raise InputError(f"frames must be first or all, got {frames!r}")
        self.config = {"frames": frames, "text_dim": text_dim, "width": width}
        sizes, d = (3, width, 2 * width, 4 * width), 4 * width
        time = 3 if frames == "all" else 1                                              # size of the kernels
        self.spatial = nn.ModuleList(nn.Conv3d(a, c, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
                                     for a, c in zip(sizes, sizes[1:]))
        self.temporal = nn.ModuleList(nn.Conv3d(c, c, (time, 1, 1), padding=(time // 2, 0, 0))
                                      for c in sizes[1:])
        self.text = nn.Sequential(nn.Linear(text_dim, d), nn.SiLU(), nn.Linear(d, d))
        self.film = nn.ModuleList(nn.Linear(d, 2 * c) for c in sizes[1:])
        self.head = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, 1))

    def forward(self, video, context):
        """video [b, 3, F, H, W] in about [-1, 1], context [b, l, d_text] -> logits [b], where 0 or more means
        good."""
        x = video
        text = self.text(context.to(video.dtype)).mean(1)                                       # [b, d]
        for spatial, temporal, film in zip(self.spatial, self.temporal, self.film):
            x = F.group_norm(F.silu(spatial(x)), 1)             # [b, c, F, H, W]; a stage halves H and W
            scale, shift = film(text)[:, :, None, None, None].chunk(2, dim=1)               # [b, c, 1, 1, 1]
            x = x + F.silu(temporal(x) * (1 + scale) + shift)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.to(self.head[0].weight.dtype).mean((2, 3, 4)))[:, 0]             # [b]


def load_pixel_reward(path, frames, text_dim):
    """The frozen PixelReward saved in `path`. Raises InputError if it is for other frames or another text
    encoder."""
    advice = (f"train one with `python train_reward.py --space rgb --frames_decoded {frames}` in an "
              "--output_dir of its own")
    if not Path(path).is_dir():
        raise InputError(f"{path} is not a folder; {advice} and name it with --reward")
    config = read_config(path, "reward")
    if set(config) != {"frames", "text_dim", "width"}:
        raise InputError(f"{path}/config.json is not a pixel reward's (wants frames, text_dim and width); "
                         f"{advice}")
    for name, wanted in (("frames", frames), ("text_dim", text_dim)):
        if config[name] != wanted:
            raise InputError(f"the pixel reward in {path} has {name} {config[name]!r} instead of {wanted!r}; "
                             f"{advice}")
    try:
        model = PixelReward(**config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}/config.json is not a pixel reward's: {error}") from None
    return load_weights(model, path).eval().requires_grad_(False)


def load_decoder(model, channels):
    """The frozen VAE in <model>/vae. Raises InputError if it does not decode latents of this many
    channels."""
    vae = load_vae(f"{model}/vae")
    if channels != vae.channels:
        raise InputError(f"{model}/vae decodes latents of {vae.channels} channels, the generator makes "
                         f"{channels}")
    return vae


def load_reward_and_decoder(config, policy, runtime):
    """The frozen reward model that train_align.py's flags name, and the decoder that makes the pixels it
    scores. Raises InputError, also if the generator cannot change these pixels."""
    if is_pinned(policy.config) and config.frames_decoded == "first":
        raise InputError("--frames_decoded first: this generator is given the first frame and cannot change "
                         "it: use --frames_decoded all")
    reward = load_pixel_reward(config.reward, config.frames_decoded, policy.config["text_dim"])
    decoder = load_decoder(config.model, policy.config["out_dim"])
    return reward.to(runtime.device), decoder.to(runtime.device)


def decode_chunks(vae, x):
    """vae.decode(x) of latents x [b, c, f, h, w], CHUNK latent frames at a time, and again in the backward
    pass -> [b, 3, F, H, W].

    The decoder is causal: a frame depends only on its own latent frame and on the vae.past latent frames
    before it. So a chunk is decoded together with vae.past frames before it, whose pixels are then dropped,
    and the result is exact. If this would save nothing, the clip is decoded in one chunk: because it is
    short, or because the decoder looks too far back (vae.past is None).
    """
    f, video = x.shape[2], []
    size = CHUNK
    if vae.past is None or f <= CHUNK + vae.past:
        size = f
    for start in range(0, f, size):
        end = min(start + size, f)
        first = max(0, start - (vae.past or 0))
        frames = checkpoint(vae.decode, x[:, :, first:end], use_reentrant=False)
        if start > 0:
            frames = frames[:, :, -TIME * (end - start):]
        video.append(frames)
    return torch.cat(video, 2)


def predicted_reward(reward, vae, dit, x, t, context, checkpointing=False, **conditions):
    """Logits [b] of the clean video that one step of dit predicts from x [b, c, f, h, w] at times t [b].

    If every t is 0, x is the clean video and dit is not called. conditions: what an image-to-video generator
    is given beside the prompt. checkpointing: each video is decoded (in chunks) and scored by itself, and
    again in the backward pass. Then memory holds only the pixels of all videos, what the decoder keeps for
    one chunk, and what the reward model keeps for one video.
    """
    x = pin(x, conditions.get("first_frame"))
    if t.any():
        x = predict_x0(x, dit(x, t, context, **conditions), t)
    x = x[:, :, :1] if reward.config["frames"] == "first" else x                        # [b, c, 1 or f, h, w]
    if not checkpointing:
        return reward(vae.decode(x), context)
    return torch.cat([checkpoint(reward, decode_chunks(vae, one), text, use_reentrant=False)
                      for one, text in zip(x.split(1), context.split(1))])


def refl_update_loss(policy, reward, vae, x_T, context, step, num_steps, *, rollout_passes=0,
                     reward_weight=1.0, loss="linear", shift=1.0, checkpointing=False, **conditions):
    """RGB ReFL's update -> (the loss, a scalar with gradients; the logits [b], detached).

    policy: the VideoDiT in training. reward, vae: frozen. x_T [b, c, f, h, w]: noise. context [b, l, d_text].
    step: from 1 to num_steps. x_0 is predicted where this step starts, at t = schedule(num_steps,
    shift)[step - 1]. rollout_passes, reward_weight, loss, shift: as in prfl.reward_update_loss.
    checkpointing, conditions: as in predicted_reward.
    """
    t = schedule(num_steps, shift, x_T.device)[step - 1].expand(len(x_T))                       # [b]
    x = rollout(policy, x_T, context, num_steps, stop=step - 1, passes=rollout_passes, shift=shift,
                **conditions)                                                       # x_t, without gradients
    r = predicted_reward(reward, vae, policy, x, t, context, checkpointing, **conditions)   # with gradients
    return reward_weight * REWARD_LOSSES[loss](r).mean(), r.detach()
