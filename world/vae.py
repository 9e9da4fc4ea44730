"""A small causal 3-D convolutional VAE: 4 times smaller in time, 8 times in space, with 16 channels.

It has the geometry of Wan2.1's VAE at a hundredth of the cost, because every convolution runs at latent
resolution (one 3x3x3 convolution on pixels would cost more than the whole network). Frame 0 is repeated three
times, so that the number of frames is divisible by four. Blocks of 4x8x8 pixels become channels. Residual
blocks, each with a spatial (1, 3, 3) and a causal (3, 1, 1) convolution, do the rest.

Causal means that latent frame k depends on video frames 0 .. 4k only. So encoding frame 0 alone gives the
first latent frame of the clip, which is what image-to-video needs.

Axes: b batch, c latent channels, F video frames (4k + 1), f latent frames (k + 1), H W pixels, h w latents.
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import InputError
from formats.video import CHANNELS, SPACE, TIME


class ResidualBlock(nn.Module):
    """x + temporal(spatial(x)). Both are an RMS norm over channels, a SiLU and a convolution."""

    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.Parameter(torch.ones(dim))
        self.norm2 = nn.Parameter(torch.ones(dim))
        self.spatial = nn.Conv3d(dim, dim, (1, 3, 3), padding=(0, 1, 1))
        self.temporal = nn.Conv3d(dim, dim, (3, 1, 1))
        nn.init.zeros_(self.temporal.weight)
        nn.init.zeros_(self.temporal.bias)

    def forward(self, x):                                                       # [b, dim, f, h, w]
        y = self.spatial(F.silu(channel_norm(x, self.norm1)))
        y = F.pad(F.silu(channel_norm(y, self.norm2)), (0, 0, 0, 0, 2, 0))  # causal: padded in the past only
        return x + self.temporal(y)


def channel_norm(x, gain):
    """RMS norm over the channels of x [b, c, f, h, w]. Statistics over time would break causality."""
    scale = torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)
    return x * scale * gain[:, None, None, None]


class VideoVAE(nn.Module):
    """encode: video [b, 3, F, H, W] in [-1, 1] -> latents [b, 16, f, h, w], normalised per channel. decode:
    the inverse.

    latents_mean, latents_std: 16 numbers each; default: 0 and 1.
    """

    def __init__(self, dim=128, num_blocks=3, latents_mean=None, latents_std=None):
        super().__init__()
        self.config = {"dim": dim, "num_blocks": num_blocks, "latents_mean": latents_mean or [0.0] * CHANNELS,
                       "latents_std": latents_std or [1.0] * CHANNELS}
        self.statistics(torch.zeros(()))                    # raises if mean or std does not have 16 numbers
        self.channels, self.space = CHANNELS, SPACE
        pixels = 3 * TIME * SPACE * SPACE
        self.past = max(1, 2 * num_blocks)          # earlier latent frames on which a decoded frame depends
        blocks = lambda: [ResidualBlock(dim) for _ in range(num_blocks)]
        self.encoder = nn.Sequential(nn.Conv3d(pixels, dim, 1), *blocks(), nn.Conv3d(dim, 2 * CHANNELS, 1))
        self.decoder = nn.Sequential(nn.Conv3d(CHANNELS, dim, 1), *blocks(), nn.Conv3d(dim, pixels, 1))

    def statistics(self, like):
        """Mean and standard deviation of each latent channel: two [16, 1, 1, 1], with dtype and device of
        `like`."""
        shape = (CHANNELS, 1, 1, 1)
        return (torch.tensor(self.config["latents_mean"], dtype=like.dtype, device=like.device).view(shape),
                torch.tensor(self.config["latents_std"], dtype=like.dtype, device=like.device).view(shape))

    def fold(self, video):
        """Turns blocks of 4x8x8 pixels into channels: video [b, 3, F, H, W] -> [b, 768, f, h, w]. Raises
        InputError."""
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] % TIME != 1 \
                or video.shape[3] % 16 or video.shape[4] % 16:
            raise InputError(f"the VAE wants video [b, 3, 4k + 1, H, W] with H and W divisible by 16, "
                             f"got {list(video.shape)}")
        layout = "b c (f p) (h q) (w r) -> b c p q r f h w"
        first = rearrange(video[:, :, :1].expand(-1, -1, TIME, -1, -1), layout, p=TIME, q=SPACE, r=SPACE)
        rest = rearrange(video[:, :, 1:], layout, p=TIME, q=SPACE, r=SPACE)
        # `first` and `rest` are views. Each is copied only once, to where it belongs, as clips can be large.
        x = video.new_empty(*rest.shape[:5], 1 + rest.shape[5], *rest.shape[6:])
        x[..., :1, :, :] = first
        x[..., 1:, :, :] = rest
        return x.flatten(1, 4)

    def posterior(self, video):
        """Mean and log-variance of q(z | video), before normalisation: two tensors [b, 16, f, h, w]."""
        mean, logvar = self.encoder(self.fold(video)).chunk(2, dim=1)
        return mean, logvar.clamp(-12, 4)

    def encode(self, video):
        """video [b, 3, F, H, W] in [-1, 1] -> latents [b, 16, f, h, w], the posterior's normalised mean."""
        mean, std = self.statistics(video)
        video = self.fold(video)            # under the same name, to free the pixels: often hundreds of MB
        return (self.encoder(video).chunk(2, dim=1)[0] - mean) / std

    def decode(self, latents):
        """latents [b, 16, f, h, w] -> video [b, 3, 4 (f - 1) + 1, 8 h, 8 w] in about [-1, 1];
        differentiable."""
        mean, std = self.statistics(latents)
        return self.decode_raw(latents * std + mean)

    def decode_raw(self, z):
        """As `decode`, for latents that are not normalised. Pixels are not clamped, so that gradients never
        vanish."""
        x = self.decoder(z)                                                             # [b, 768, f, h, w]
        video = rearrange(x, "b (c p q r) f h w -> b c (f p) (h q) (w r)", c=3, p=TIME, q=SPACE, r=SPACE)
        return video[:, :, TIME - 1:]                           # without the three copies of frame 0
