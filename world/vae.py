"""A small causal 3-D convolutional VAE: 4x in time (the first frame alone), 8x in space, 16 channels.

The geometry of Wan2.1's VAE at a hundredth of its cost. Everything happens at latent resolution: frame 0 is repeated
three times so that time divides by four, blocks of 4x8x8 pixels become channels, and residual blocks of a spatial
(1, 3, 3) and a causal (3, 1, 1) convolution do the rest; one 3x3x3 convolution at pixel resolution would cost more
than the whole network. Causal means that latent frame k sees video frames 0 .. 4k only, so encoding frame 0 alone
gives the first latent frame of the clip: image-to-video needs exactly that.

Axes: b batch, c latent channels, F video frames (4k + 1), f latent frames (k + 1), H W pixels, h w latents.
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import InputError
from formats.video import CHANNELS, SPACE, TIME


class ResidualBlock(nn.Module):
    """x + temporal(spatial(x)), each a group-free RMS norm over channels, SiLU and a convolution."""

    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.spatial = nn.Conv3d(dim, dim, (1, 3, 3), padding=(0, 1, 1))
        self.temporal = nn.Conv3d(dim, dim, (3, 1, 1))
        nn.init.zeros_(self.temporal.weight)
        nn.init.zeros_(self.temporal.bias)

    def forward(self, x):                                                       # [b, dim, f, h, w]
        y = self.spatial(F.silu(channel_norm(x, self.norm1)))
        y = F.pad(F.silu(channel_norm(y, self.norm2)), (0, 0, 0, 0, 2, 0))      # two frames of the past: causal
        return x + self.temporal(y)


def channel_norm(x, gain):
    """RMS norm over the channels of [b, c, f, h, w]; no statistics across time, which would break causality."""
    scale = torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)
    return x * scale * gain[:, None, None, None]


class VideoVAE(nn.Module):
    """encode: video [b, 3, F, H, W] in [-1, 1] -> latents [b, 16, f, h, w], normalised per channel; decode: back."""

    def __init__(self, dim=128, num_blocks=3, latents_mean=None, latents_std=None):
        super().__init__()
        self.config = {"dim": dim, "num_blocks": num_blocks, "latents_mean": latents_mean or [0.0] * CHANNELS,
                       "latents_std": latents_std or [1.0] * CHANNELS}
        self.statistics(torch.zeros(()))                        # raises unless they are sixteen numbers each
        pixels = 3 * TIME * SPACE * SPACE
        self.past = max(1, 2 * num_blocks)                      # how far back a decoded latent frame depends on others
        self.encoder = nn.Sequential(nn.Conv3d(pixels, dim, 1), *[ResidualBlock(dim) for _ in range(num_blocks)],
                                     nn.Conv3d(dim, 2 * CHANNELS, 1))
        self.decoder = nn.Sequential(nn.Conv3d(CHANNELS, dim, 1), *[ResidualBlock(dim) for _ in range(num_blocks)],
                                     nn.Conv3d(dim, pixels, 1))

    def statistics(self, like):
        """Mean and deviation of each channel's latents, [16, 1, 1, 1] in the dtype and on the device of `like`."""
        shape = (CHANNELS, 1, 1, 1)
        return (torch.tensor(self.config["latents_mean"], dtype=like.dtype, device=like.device).view(shape),
                torch.tensor(self.config["latents_std"], dtype=like.dtype, device=like.device).view(shape))

    def fold(self, video):
        """Video [b, 3, F, H, W] with blocks of 4x8x8 pixels as channels: [b, 768, f, h, w]."""
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] % TIME != 1 or video.shape[3] % 16 \
                or video.shape[4] % 16:
            raise InputError(f"the VAE wants video [b, 3, 4k + 1, H, W] with H and W divisible by 16, "
                             f"got {list(video.shape)}")
        first, rest = video[:, :, :1].expand(-1, -1, TIME, -1, -1), video[:, :, 1:]
        first, rest = (rearrange(v, "b c (f p) (h q) (w r) -> b c p q r f h w", p=TIME, q=SPACE, r=SPACE)
                       for v in (first, rest))                  # views; one copy is made, as clips can be large
        x = video.new_empty(*rest.shape[:5], 1 + rest.shape[5], *rest.shape[6:])
        x[..., :1, :, :], x[..., 1:, :, :] = first, rest
        return x.flatten(1, 4)

    def posterior(self, video):
        """Mean and log-variance of q(z | video), unnormalised: two tensors [b, 16, f, h, w]."""
        mean, logvar = self.encoder(self.fold(video)).chunk(2, dim=1)
        return mean, logvar.clamp(-12, 4)

    def encode(self, video):
        """video [b, 3, F, H, W] in [-1, 1] -> latents [b, 16, f, h, w]: the posterior's mean, normalised."""
        mean, std = self.statistics(video)
        video = self.fold(video)                                # in its place: 81 frames of 832x480 are 388 MB
        return (self.encoder(video).chunk(2, dim=1)[0] - mean) / std

    def decode(self, latents):
        """latents [b, 16, f, h, w] -> video [b, 3, 4 (f - 1) + 1, 8 h, 8 w] in [-1, 1]; differentiable."""
        mean, std = self.statistics(latents)
        return self.decode_raw(latents * std + mean)

    def decode_raw(self, z):
        """The same for unnormalised latents; values are not clamped, so that gradients never vanish."""
        x = self.decoder(z)                                                                         # [b, 768, f, h, w]
        video = rearrange(x, "b (c p q r) f h w -> b c (f p) (h q) (w r)", c=3, p=TIME, q=SPACE, r=SPACE)
        return video[:, :, TIME - 1:]                           # drops the copies of frame 0
