"""refl_baseline.py against ReFL written out by hand, finite differences, and the causality of the decoder."""
import pytest
import torch
import torch.nn.functional as F

import flow
import refl_baseline as R
from common import InputError
from formats.encoders import decode_pixels
from formats.video import CHANNELS
from formats.weights import save_module
from model import VideoDiT
from world.vae import VideoVAE

TINY = dict(in_dim=16, out_dim=16, dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=16, text_dim=8,
            text_len=3)
N = 6


@pytest.fixture
def models():
    """A policy with a random head, a VAE whose frames depend on the past, and a reward for each choice of
    frames; float64."""
    torch.manual_seed(0)
    policy = VideoDiT(**TINY)
    torch.nn.init.normal_(policy.head.head.weight, std=0.2)
    vae = VideoVAE(dim=12, num_blocks=2, latents_mean=torch.randn(CHANNELS).tolist(),
                   latents_std=(0.5 + torch.rand(CHANNELS)).tolist())
    for name, p in vae.named_parameters():
        if "temporal" in name:                                                  # zero at the start
            torch.nn.init.normal_(p, std=0.1)
    rewards = {}
    for frames in R.FRAMES:
        rewards[frames] = R.PixelReward(frames, 8, width=4).double().eval().requires_grad_(False)
    return policy.double(), vae.double().eval().requires_grad_(False), rewards


@pytest.fixture
def batch():
    """x_T [b, c, f, h, w] and context [b, l, d]"""
    g = torch.Generator().manual_seed(1)
    return (torch.randn(3, 16, 2, 2, 2, generator=g, dtype=torch.float64),
            torch.randn(3, 3, 8, generator=g, dtype=torch.float64))


def gradients(policy, loss):
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


def close(a, b, rtol=1e-4):
    """t is float32 in the code and float64 by hand: equal to about 1e-6."""
    return all(torch.allclose(a[name], b[name], rtol=rtol, atol=rtol * a[name].abs().max().item())
               for name in a)


# ---- the update
@pytest.mark.parametrize("frames, step", [("first", 4), ("all", 4), ("all", N)])
def test_loss_and_gradient_are_refl_by_hand(models, batch, frames, step):
    policy, vae, rewards = models
    x_T, context = batch
    loss, logits = R.refl_update_loss(policy, rewards[frames], vae, x_T, context, step, N, reward_weight=3.0)
    x = x_T
    for i in range(step):
        t = 1 - i / N
        with torch.set_grad_enabled(i == step - 1):                             # of the last step alone
            v = policy(x, torch.full((3,), t, dtype=torch.float64), context)
        x = x - v / N if i < step - 1 else x - t * v                            # the last one predicts x_0
    whole = vae.decode(x)                                                       # [b, 3, 5, 16, 16]
    r = rewards[frames](whole if frames == "all" else whole[:, :, :1], context)
    torch.testing.assert_close(logits, r.detach(), rtol=1e-5, atol=1e-7)
    assert loss.item() == pytest.approx(-3 * r.mean().item(), rel=1e-5) and not logits.requires_grad
    grads = gradients(policy, loss)
    assert close(grads, gradients(policy, -3 * r.mean()))
    assert all(g.abs().max() > 0 for g in grads.values())               # every weight of the policy learns


@pytest.mark.parametrize("frames", R.FRAMES)
def test_gradient_is_the_finite_difference_of_the_one_step(models, batch, frames):
    policy, vae, rewards = models
    x_T, context = batch
    step = 5
    grads = gradients(policy, R.refl_update_loss(policy, rewards[frames], vae, x_T, context, step, N)[0])
    x = flow.rollout(policy, x_T, context, N, stop=step - 1)                # x_t: held while the weights move
    t = flow.schedule(N)[step - 1].expand(3)

    @torch.no_grad()
    def one_step():
        video = vae.decode(x - t[0].double() * policy(x, t, context))
        return -rewards[frames](video if frames == "all" else video[:, :, :1], context).mean().item()

    g, h = torch.Generator().manual_seed(2), 1e-5
    for name, p in policy.named_parameters():
        way = torch.randn(p.shape, generator=g, dtype=torch.float64)
        way /= way.norm()
        start, values = p.detach().clone(), []
        for sign in (1, -1):
            p.data.copy_(start + sign * h * way)
            values.append(one_step())
        p.data.copy_(start)
        slope = (values[0] - values[1]) / (2 * h)
        assert (grads[name] * way).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-9), name


@pytest.mark.parametrize("frames", R.FRAMES)
def test_decoder_checkpointing_changes_the_memory_and_nothing_else(models, batch, frames):
    policy, vae, rewards = models

    def kept(call):
        """What call() returns, and how many numbers it keeps for its backward pass."""
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            return call(), sum(sizes)

    update = lambda checkpointing: R.refl_update_loss(policy, rewards[frames], vae, *batch, 5, N,
                                                      checkpointing=checkpointing)
    (loss, logits), size = kept(lambda: update(False))
    (loss_again, logits_again), size_again = kept(lambda: update(True))
    torch.testing.assert_close(logits_again, logits)
    assert close(gradients(policy, loss), gradients(policy, loss_again), rtol=1e-9)
    _, without_decoder = kept(lambda: policy(batch[0], torch.full((3,), 0.5, dtype=torch.float64), batch[1]))
    pixels = vae.decode(batch[0][:, :, :1] if frames == "first" else batch[0]).numel()      # these are kept
    assert size_again - without_decoder - pixels < 0.1 * (size - without_decoder)


@pytest.mark.parametrize("f", [1, 2, 5, 11])
def test_chunks_decode_as_the_whole_with_less_memory_at_a_time(models, f, monkeypatch):
    _, vae, _ = models
    monkeypatch.setattr(R, "CHUNK", 2)
    x = torch.randn(2, CHANNELS, f, 2, 2, dtype=torch.float64, requires_grad=True)
    decode, longest = vae.decode, []
    vae.decode = lambda z: longest.append(z.shape[2]) or decode(z)
    video = R.decode_chunks(vae, x)
    assert max(longest) == min(f, vae.past + 2) and vae.past == 4
    assert f > 6 or longest == [f]                          # nothing to spare: not a frame is decoded twice
    torch.testing.assert_close(video, decode(x), rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(video)
    grad, by_hand = (torch.autograd.grad((v * weight).sum(), x)[0] for v in (video, decode(x)))
    torch.testing.assert_close(grad, by_hand, rtol=1e-10, atol=1e-10)
    vae.past = 1                                                # too short a look back must not go unseen
    assert f < 5 or not torch.allclose(R.decode_chunks(vae, x), decode(x))


def test_vae_and_reward_stay_bit_for_bit_without_gradients_and_the_reward_rises(models, batch):
    policy, vae, rewards = models
    frozen = {"vae": vae, "reward": rewards["all"]}
    before = {k: {n: v.clone() for n, v in m.state_dict().items()} for k, m in frozen.items()}
    optimizer, logits = torch.optim.AdamW(policy.parameters(), lr=1e-3), []
    for _ in range(5):
        optimizer.zero_grad()
        loss, r = R.refl_update_loss(policy, rewards["all"], vae, *batch, N, N)
        loss.backward()
        optimizer.step()
        logits.append(r.mean().item())
    assert logits[-1] > logits[0]
    for name, module in frozen.items():
        assert all(p.grad is None for p in module.parameters())
        assert all(torch.equal(value, before[name][n]) for n, value in module.state_dict().items())


# ---- what is scored
def test_the_first_frame_alone_is_the_first_frame_of_the_whole_clip(models, batch):
    _, vae, rewards = models
    x, context = batch
    alone, whole = vae.decode(x[:, :, :1]), vae.decode(x)
    assert alone.shape == (3, 3, 1, 16, 16) and whole.shape == (3, 3, 5, 16, 16)
    torch.testing.assert_close(alone, whole[:, :, :1])
    seen = []
    record = lambda video, context: seen.append(video.shape) or rewards["first"](video, context)
    record.config = rewards["first"].config
    R.predicted_reward(record, vae, None, x, torch.zeros(3), context)
    assert seen == [(3, 3, 1, 16, 16)]                                  # the other frames are never decoded
    x.requires_grad_()
    R.predicted_reward(rewards["first"], vae, None, x, torch.zeros(3), context).sum().backward()
    assert x.grad[:, :, 0].abs().min() > 0 and not x.grad[:, :, 1:].any()


def test_the_clean_video_is_predicted_in_one_step(models, batch):
    """With a generator that knows x_0 the logits do not depend on t. At t = 0 it is not called."""
    _, vae, rewards = models
    x0, context = batch
    x1 = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = rewards["all"](vae.decode(x0), context)
    for t in (0.1, 0.7, 1.0):
        t = torch.full((3,), t, dtype=torch.float64)
        knows = lambda x, t, context, y=None: x1 - x0
        found = R.predicted_reward(rewards["all"], vae, knows, flow.add_noise(x0, x1, t), t, context)
        torch.testing.assert_close(found, wanted)
    finished = R.predicted_reward(rewards["all"], vae, None, x0, torch.zeros(3), context)
    torch.testing.assert_close(finished, wanted)


def test_pixels_are_decoded_in_the_dtype_of_autocast():
    """In ReFL and where its reward is trained; validation has no autocast around its decoder."""
    torch.manual_seed(3)
    vae, reward = VideoVAE(dim=8, num_blocks=1), R.PixelReward("all", 8, width=4)
    x, context, seen = torch.randn(1, 16, 2, 2, 2), torch.randn(1, 3, 8), []
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        R.predicted_reward(reward, vae, None, x, torch.zeros(1), context)
    in_refl, seen[:] = set(seen), []
    decode_pixels(vae, x)
    assert (in_refl, set(seen)) == ({torch.bfloat16}, {torch.float32})


@pytest.mark.parametrize("frames", R.FRAMES)
def test_pixel_reward_by_hand(frames):
    """Three stages, each a residual beside what it mixes; 32 channels unless told; the head in float32 under
    autocast."""
    torch.manual_seed(3)
    reward = R.PixelReward(frames, 8)
    assert reward.config["width"] == 32 and reward.head[0].weight.shape == (128, 128)
    video, context = torch.randn(2, 3, 5 if frames == "all" else 1, 16, 16), torch.randn(2, 3, 8)
    text = torch.stack([reward.text(one).mean(0) for one in context])
    x = video
    for spatial, temporal, film in zip(reward.spatial, reward.temporal, reward.film):
        x, before = F.silu(spatial(x)), x.shape
        assert x.shape[2:] == (before[2], before[3] // 2, before[4] // 2)
        mean, var = x.mean((1, 2, 3, 4), keepdim=True), x.var((1, 2, 3, 4), keepdim=True, unbiased=False)
        x = (x - mean) / (var + 1e-5).sqrt()
        wide = film(text)
        scale, shift = (part.view(2, -1, 1, 1, 1) for part in (wide[:, :x.shape[1]], wide[:, x.shape[1]:]))
        mixed = (1 + scale) * temporal(x) + shift
        x = x + mixed * mixed.sigmoid()
    logits = reward.head(x.mean((2, 3, 4)))[:, 0]
    torch.testing.assert_close(reward(video, context), logits, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert reward(video, context).dtype == torch.float32



def test_pixel_reward_sees_motion_only_with_all_frames(models, batch):
    _, _, rewards = models
    g = torch.Generator().manual_seed(4)
    video, context = torch.randn(3, 3, 5, 16, 16, generator=g, dtype=torch.float64), batch[1]
    backwards = video.flip(2)
    # The reward of single frames mixes none, so their order cannot matter.
    assert torch.allclose(rewards["first"](video, context), rewards["first"](backwards, context))
    assert not torch.allclose(rewards["all"](video, context), rewards["all"](backwards, context), rtol=1e-3)
    for reward in rewards.values():
        r = reward(video, context)
        one_by_one = torch.cat([reward(video[i:i + 1], context[i:i + 1]) for i in range(3)])
        assert r.shape == (3,)
        torch.testing.assert_close(r, one_by_one)                               # examples do not mix
        assert not torch.allclose(r, reward(video, context.flip(0)), rtol=1e-3)     # the prompt counts too


# ---- folders
@pytest.mark.parametrize("frames", R.FRAMES)
def test_save_and_load_bit_for_bit(models, batch, frames, tmp_path):
    reward = models[2][frames].float()
    save_module(reward, tmp_path / "reward")
    loaded = R.load_pixel_reward(tmp_path / "reward", frames, 8)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    video, context = torch.randn(3, 3, 5, 16, 16), batch[1].float()
    assert torch.equal(loaded(video, context), reward(video, context))


@pytest.mark.parametrize("saved, frames, text_dim, words", [
    ("first", "all", 8, "frames 'first' instead of 'all'; train one with .*--space rgb --frames_decoded all"),
    ("all", "first", 8, "frames 'all' instead of 'first'; train one with .*--frames_decoded first"),
    ("all", "all", 12, "text_dim 8 instead of 12")])
def test_a_reward_of_another_kind_is_refused(models, saved, frames, text_dim, words, tmp_path):
    save_module(models[2][saved], tmp_path / "reward")
    with pytest.raises(InputError, match=words) as error:
        R.load_pixel_reward(tmp_path / "reward", frames, text_dim)
    assert "\n" not in str(error.value) and str(tmp_path / "reward") in str(error.value)


def test_folders_that_are_no_pixel_reward(models, tmp_path):
    with pytest.raises(InputError, match="absent is not a folder; train one with .*--frames_decoded first"):
        R.load_pixel_reward(tmp_path / "absent", "first", 8)
    save_module(models[0], tmp_path / "reward")
    with pytest.raises(InputError, match="not a pixel reward's"):
        R.load_pixel_reward(tmp_path / "reward", "first", 8)
    for width in ('"4"', "-1", "8.5", "null"):
        config = f'{{"frames": "first", "text_dim": 8, "width": {width}}}'
        (tmp_path / "reward/config.json").write_text(config)
        with pytest.raises(InputError, match="not a pixel reward's"):
            R.load_pixel_reward(tmp_path / "reward", "first", 8)
    with pytest.raises(InputError, match="frames must be first or all"):
        R.PixelReward("last", 8)


def test_a_decoder_for_other_latents_is_refused(models, tmp_path):
    save_module(models[1], tmp_path / "vae")
    assert R.load_decoder(tmp_path, 16).config == models[1].config
    with pytest.raises(InputError, match="decodes latents of 16 channels, the generator makes 4"):
        R.load_decoder(tmp_path, 4)
