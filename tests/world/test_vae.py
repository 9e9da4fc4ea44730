"""vae.py: causality, shapes, gradients and round trips of a small VAE with random weights."""
import pytest
import torch

from common import InputError
from families import load_vae
from formats.video import CHANNELS, from_pixels, to_pixels
from formats.weights import save_module
from world.vae import VideoVAE


@pytest.fixture
def vae():
    torch.manual_seed(0)
    vae = VideoVAE(dim=32, num_blocks=2, latents_mean=torch.randn(CHANNELS).tolist(),
                   latents_std=(0.5 + torch.rand(CHANNELS)).tolist()).eval()
    for name, p in vae.named_parameters():
        if "temporal" in name:  # they start at zero, where causality is trivial
            torch.nn.init.normal_(p, std=0.1)
    return vae


def clip(b=2, frames=9, height=16, width=32, seed=0):
    return 2 * torch.rand(b, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) - 1


@pytest.mark.parametrize("k, height, width", [(0, 16, 16), (1, 32, 16), (2, 16, 48), (4, 16, 16)])
def test_shapes(vae, k, height, width):
    video = clip(2, 4 * k + 1, height, width)
    latents = vae.encode(video)
    assert latents.shape == (2, 16, k + 1, height // 8, width // 8)
    assert vae.decode(latents).shape == video.shape


@pytest.mark.parametrize("shape", [(1, 3, 8, 16, 16), (1, 3, 4, 16, 16), (1, 3, 0, 16, 16), (1, 4, 9, 16, 16),
                                   (1, 3, 9, 24, 16), (1, 3, 9, 16, 20), (3, 9, 16, 16)])
def test_wrong_shapes_are_named(vae, shape):
    with pytest.raises(InputError) as error:
        vae.encode(torch.zeros(shape))
    assert str(list(shape)) in str(error.value) and "4k + 1" in str(error.value)


def test_encoder_is_causal(vae):
    video, other = clip(), clip(seed=1)
    latents = vae.encode(video)
    for k in range(3):                                             # latent frame k has seen frames 0 .. 4 k
        bent = torch.cat([video[:, :, :4 * k + 1], other[:, :, 4 * k + 1:]], 2)
        again = vae.encode(bent)
        assert torch.equal(again[:, :, :k + 1], latents[:, :, :k + 1])
        assert k == 2 or not torch.isclose(again[:, :, k + 1:], latents[:, :, k + 1:]).any((1, 3, 4)).all()
        alone = vae.encode(video[:, :, :4 * k + 1])
        torch.testing.assert_close(alone, latents[:, :, :k + 1], atol=1e-5, rtol=1e-4)
    bent = torch.cat([other[:, :, :1], video[:, :, 1:]], 2)        # and the past reaches the future
    assert not torch.allclose(vae.encode(bent)[:, :, 2], latents[:, :, 2])


def test_decoder_is_causal(vae):
    z = torch.randn(2, 16, 3, 2, 2)
    video = vae.decode(z)
    bent = z.clone()
    bent[:, :, 1] += 1
    again = vae.decode(bent)
    assert torch.equal(again[:, :, :1], video[:, :, :1])
    assert (again[:, :, 1:5] - video[:, :, 1:5]).abs().amax((0, 1, 3, 4)).min() > 0
    torch.testing.assert_close(vae.decode(z[:, :, :2]), video[:, :, :5], atol=1e-5, rtol=1e-4)


def test_gradient_reaches_every_latent(vae):
    """RGB ReFL needs it: the derivative of the decoder against finite differences, and nowhere zero."""
    vae = vae.double()
    z = torch.randn(1, 16, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 3, 5, 16, 16, dtype=torch.float64)
    score = lambda z: (vae.decode(z) * weight).sum()
    grad, = torch.autograd.grad(score(z), z)
    assert grad.abs().min() > 0
    way, h = torch.randn_like(z), 1e-5
    slope = (score(z + h * way) - score(z - h * way)) / (2 * h)
    assert (grad * way).sum().item() == pytest.approx(slope.item(), rel=1e-6)


def test_latents_are_the_normalised_mean_of_the_posterior(vae):
    video = clip()
    mean, logvar = vae.posterior(video)
    m, s = (torch.tensor(vae.config[key]).view(16, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    latents = vae.encode(video)
    assert mean.shape == logvar.shape == latents.shape
    torch.testing.assert_close(latents * s + m, mean)
    torch.testing.assert_close(vae.decode(latents), vae.decode_raw(mean), atol=1e-5, rtol=1e-4)


def test_examples_do_not_mix(vae):
    video = clip(3)
    torch.testing.assert_close(vae.encode(video)[1:2], vae.encode(video[1:2]), atol=1e-5, rtol=1e-4)


def test_pixels_there_and_back():
    every = torch.arange(256, dtype=torch.uint8)[:3 * 4 * 4 * 4].view(1, 4, 4, 4, 3)        # [b, F, H, W, 3]
    video = from_pixels(every)
    assert video.shape == (1, 3, 4, 4, 4) and video.dtype == torch.float32
    assert torch.equal(to_pixels(video), every)
    assert video[0, 2, 3, 1, 0] == every[0, 3, 1, 0, 2] / 127.5 - 1  # channels, not frames, moved
    ends = to_pixels(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]).view(1, 1, 1, 1, 5).expand(1, 3, 1, 1, 5))
    assert ends[0, 0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_saved_and_loaded(vae, tmp_path):
    save_module(vae, tmp_path / "vae")
    loaded = load_vae(tmp_path / "vae")
    assert torch.equal(loaded.encode(clip()), vae.encode(clip()))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    (tmp_path / "vae/config.json").write_text('{"width": 3}')
    with pytest.raises(InputError, match="vae/config.json is not a VideoVAE's"):
        load_vae(tmp_path / "vae")
