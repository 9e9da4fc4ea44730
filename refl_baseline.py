"""RGB ReFL, the baseline PRFL is compared with: reward the pixels of a predicted clean video, through the decoder.

A sample is rolled out from noise to a late time t without gradients and takes ONE step with gradients, which
predicts x_0; that is decoded WITH gradients, and a pixel reward judges it. The gradient goes through the frozen
reward, the frozen decoder and that one step into the generator. train_align.py puts an SFT update before it, as it
does for PRFL.

    x_T --rollout, no grad--> x_t --one step, with grad--> x_0 = x_t - t v --VAE--> pixels --> r,   loss = -lambda r

frames="first": only the first latent frame is decoded, to one image, and an image reward judges it (the paper uses
PickScore). The VAE is causal, so that image is the first frame of the whole clip. frames="all": the whole clip, and
a video reward (the paper ran out of memory here: 81 frames, 14B).

Where this differs, on purpose, from the paper:
1. Both rewards are small networks of our own, trained on the same labelled samples as PAVRM: what is compared is
   where a reward looks, not what it has learned from. They judge the prompt too, as the labels do.
2. "t near 0" is the late third of the steps (Table 3's word): for N = 16, t from 6/16 to 1/16. The reward has seen
   finished videos only, so the prediction must be close to one, yet the very last step alone would leave the
   generator little to change. train_reward.py reports the reward's accuracy on predictions from every t (Fig. 3a);
   --trajectory_part takes the steps from elsewhere.

Axes: b batch, c channels, f latent frames, h w latents, F video frames (4 (f - 1) + 1), H W pixels, l text tokens.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import InputError
from families import load_vae
from flow import predict_x0, rollout, schedule
from formats.video import CHANNELS, TIME
from formats.weights import load_weights, read_config
from prfl import REWARD_LOSSES

FRAMES = ("first", "all")
CHUNK = 4                                                       # latent frames that checkpointing decodes at a time


class PixelReward(nn.Module):
    """Reward logit of decoded pixels and a prompt: a small convolutional network.

    Each of three stages halves height and width, then mixes neighbouring frames (frames="all"; an image has none),
    with the prompt scaling and shifting the channels.
    """

    def __init__(self, frames, text_dim, width=32):
        super().__init__()
        if frames not in FRAMES:
            raise InputError(f"frames must be first or all, got {frames!r}")
        self.config = {"frames": frames, "text_dim": text_dim, "width": width}
        sizes, time, d = (3, width, 2 * width, 4 * width), 3 if frames == "all" else 1, 4 * width
        self.spatial = nn.ModuleList(nn.Conv3d(a, c, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
                                     for a, c in zip(sizes, sizes[1:]))
        self.temporal = nn.ModuleList(nn.Conv3d(c, c, (time, 1, 1), padding=(time // 2, 0, 0)) for c in sizes[1:])
        self.text = nn.Sequential(nn.Linear(text_dim, d), nn.SiLU(), nn.Linear(d, d))
        self.film = nn.ModuleList(nn.Linear(d, 2 * c) for c in sizes[1:])
        self.head = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, 1))

    def forward(self, video, context):
        """video [b, 3, F, H, W] in about [-1, 1], context [b, l, d_text] -> logits [b]; >= 0 means good."""
        x, text = video, self.text(context.to(video.dtype)).mean(1)                             # [b, d]
        for spatial, temporal, film in zip(self.spatial, self.temporal, self.film):
            x = F.group_norm(F.silu(spatial(x)), 1)                                             # [b, c, F, H/2, W/2]
            scale, shift = film(text)[:, :, None, None, None].chunk(2, dim=1)                   # [b, c, 1, 1, 1]
            x = x + F.silu(temporal(x) * (1 + scale) + shift)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.to(self.head[0].weight.dtype).mean((2, 3, 4)))[:, 0]             # [b]


def load_pixel_reward(path, frames, text_dim):
    """The frozen PixelReward saved in `path`; one for other frames or another text encoder is an InputError."""
    how = f"train one with `python train_reward.py --space rgb --frames_decoded {frames}` in an --output_dir of its own"
    if not Path(path).is_dir():
        raise InputError(f"{path} is not a folder; {how} and name it with --reward")
    config = read_config(path)
    if set(config) != {"frames", "text_dim", "width"}:
        raise InputError(f"{path}/config.json is not a pixel reward's (wants frames, text_dim and width); {how}")
    for name, wanted in (("frames", frames), ("text_dim", text_dim)):
        if config[name] != wanted:
            raise InputError(f"the pixel reward in {path} has {name} {config[name]!r} instead of {wanted!r}; {how}")
    try:
        model = PixelReward(**config)
    except (TypeError, RuntimeError) as error:
        raise InputError(f"{path}/config.json is not a pixel reward's: {error}") from None
    return load_weights(model, path).eval().requires_grad_(False)


def load_decoder(model, channels):
    """The frozen VAE in <model>/vae, for a generator of latents with so many channels. Raises InputError."""
    if channels != CHANNELS:
        raise InputError(f"{model}/vae decodes latents of {CHANNELS} channels, the generator makes {channels}")
    return load_vae(f"{model}/vae")


def load_reward_and_decoder(config, policy, runtime):
    """The frozen reward of pixels that train_align.py's flags name, and the decoder that makes the pixels."""
    config.reward = config.reward or f"{config.model}/reward_rgb_{config.frames_decoded}"
    return (load_pixel_reward(config.reward, config.frames_decoded, policy.config["text_dim"]).to(runtime.device),
            load_decoder(config.model, policy.config["out_dim"]).to(runtime.device))


def decode_chunks(vae, x):
    """vae.decode(x) of latents x [b, c, f, h, w], CHUNK frames at a time, each chunk again in the backward pass.

    The decoder is causal and looks vae.past latent frames back: a chunk that begins so much earlier, and drops what it
    decodes there, is exact. Where that spares nothing (a short clip; None: it looks too far back) there is one chunk.
    """
    f, video = x.shape[2], []
    size = f if vae.past is None or f <= CHUNK + vae.past else CHUNK
    for start in range(0, f, size):
        end = min(start + size, f)
        frames = checkpoint(vae.decode, x[:, :, max(0, start - (vae.past or 0)):end], use_reentrant=False)
        video.append(frames[:, :, -TIME * (end - start):] if start else frames)
    return torch.cat(video, 2)


def predicted_reward(reward, vae, dit, x, t, context, checkpointing=False, **image):
    """Logits [b] of the clean video that one step of dit predicts from x [b, c, f, h, w] at times t [b].

    Where every t is 0, x is that video. checkpointing: each video is decoded, by chunks, and judged on its own, and
    again in the backward pass: beside the pixels of all, the decoder keeps one chunk and vae.past frames before it, the
    reward one video.
    """
    if t.any():
        x = predict_x0(x, dit(x, t, context, **image), t)
    x = x[:, :, :1] if reward.config["frames"] == "first" else x                        # [b, c, 1 or f, h, w]
    if not checkpointing:
        return reward(vae.decode(x), context)
    return torch.cat([checkpoint(reward, decode_chunks(vae, one), text, use_reentrant=False)
                      for one, text in zip(x.split(1), context.split(1))])


def refl_update_loss(policy, reward, vae, x_T, context, step, num_steps, *, rollout_passes=0,
                     reward_weight=1.0, loss="linear", shift=1.0, checkpointing=False, **image):
    """RGB ReFL's update: returns (loss, reward); call backward on the loss.

    policy: the VideoDiT in training. reward, vae: frozen. x_T [b, c, f, h, w]: noise. context [b, l, d_text]. step:
    1 .. num_steps; x_0 is predicted where that step starts, at t = schedule(num_steps, shift)[step - 1].
    rollout_passes, reward_weight, loss, shift: as in prfl.reward_update_loss. checkpointing: as in
    predicted_reward. Returns a scalar loss and the logits [b], detached.
    """
    t = schedule(num_steps, shift, x_T.device)[step - 1].expand(len(x_T))                           # [b]
    x = rollout(policy, x_T, context, num_steps, stop=step - 1, passes=rollout_passes, shift=shift,
                **image)                                                                # x_t, without gradients
    r = predicted_reward(reward, vae, policy, x, t, context, checkpointing, **image)                     # with gradients
    return reward_weight * REWARD_LOSSES[loss](r).mean(), r.detach()
