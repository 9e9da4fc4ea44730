"""A first latent frame that is given clean, in its place in x (Wan2.2 TI2V-5B's image-to-video): two times in
one video, and nothing that is learned from the given frame or changes it.
"""
import pytest
import torch
import torch.nn.functional as F
from tiny import generator

import flow
import prfl
import refl_baseline
import search
import train_align
import validation
from common import InputError
from model import image_inputs, pin, rope_table
from pavrm import PAVRM
from scale.sequence import Sequence

pytestmark = pytest.mark.usefixtures("cpu")
SHAPE = (16, 3, 4, 6)                                           # 3 x 2 x 3 tokens, of which 6 are given


def pinned():
    """-> a generator, a reward model of its first block, and {x, x1, context, first_frame}, in float64"""
    dit = generator(model_type="i2v").double()
    pavrm = PAVRM.from_generator(dit, 1).double().freeze()
    g = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(pavrm.mlp[-1].weight, generator=g)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return dit, pavrm, dict(x=draw(2, *SHAPE), x1=draw(2, *SHAPE), context=draw(2, 3, 8),
                            first_frame=draw(2, 16, 1, 4, 6))


def others_first_frame(x):
    """x with another frame 0"""
    return pin(x, 3 - 2 * x[:, :, :1])


def velocity_by_hand(dit, x, t, context):
    """The velocity with a modulation of its own for every token [b, n, 6, d]."""
    times = torch.cat([torch.zeros(2, 6), t[:, None].expand(2, 12)], 1).double()                # [b, n]
    embedding, modulation = dit.embed_time(times)                               # [b, n, d], [b, n, 6, d]
    tokens, rope = dit.patchify(x), rope_table((3, 2, 3), 12, x.device, x.dtype)
    text = dit.text_embedding(context)

    def norm(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    for block in dit.blocks:
        rows = (block.modulation[:, None] + modulation).unbind(2)                       # six times [b, n, d]
        tokens = tokens + block.self_attn(norm(tokens, rows[0], rows[1]), rope=rope) * rows[2]
        y = F.layer_norm(tokens, tokens.shape[-1:], block.norm3.weight, block.norm3.bias, 1e-6)
        tokens = tokens + block.cross_attn(y, text)
        tokens = tokens + block.ffn(norm(tokens, rows[3], rows[4])) * rows[5]
    shift, scale = (dit.head.modulation[:, None] + embedding[:, :, None]).unbind(2)
    out = dit.head.head(norm(tokens, shift, scale)).view(2, 3, 2, 3, 2, 2, 16)          # b f h w ph pw c
    return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(2, *SHAPE)


def test_two_modulations_are_those_of_every_token():
    dit, pavrm, z = pinned()
    t, first = torch.tensor([0.3, 0.8], dtype=torch.float64), z["first_frame"]
    v = dit(z["x"], t, z["context"], first_frame=first)
    wanted = velocity_by_hand(dit, pin(z["x"], first), t, z["context"])
    torch.testing.assert_close(v[:, :, 1:], wanted[:, :, 1:])
    assert not v[:, :, 0].any() and wanted[:, :, 0].any()
    dit.gradient_checkpointing = True
    again = dit(z["x"], t, z["context"], first_frame=first)
    assert torch.equal(again, v)


def test_at_time_zero_it_is_the_same_as_without():
    """At t = 0 all tokens have one time."""
    dit, _, z = pinned()
    plain = generator().double()
    plain.load_state_dict(dit.state_dict())
    x, t = pin(z["x"], z["first_frame"]), torch.zeros(2, dtype=torch.float64)
    v = dit(z["x"], t, z["context"], first_frame=z["first_frame"])
    torch.testing.assert_close(v[:, :, 1:], plain(x, t, z["context"])[:, :, 1:])
    t = t + 0.5
    v = dit(z["x"], t, z["context"], first_frame=z["first_frame"])
    assert (v - plain(x, t, z["context"]))[:, :, 1:].abs().max() > 1e-4


def gradients(dit, loss):
    dit.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in dit.parameters()])


def test_nothing_of_the_sft_update_comes_from_the_given_frame():
    dit, _, z = pinned()
    first, t = z["first_frame"], torch.tensor([0.3, 0.8], dtype=torch.float64)
    x0, context = pin(z["x"], first), z["context"]
    x1 = z["x1"].requires_grad_()
    loss = prfl.sft_loss(dit, x0, x1, t, context, first_frame=first)
    found = gradients(dit, loss)
    assert not x1.grad[:, :, 0].any() and x1.grad[:, :, 1:].any()
    v = dit(flow.add_noise(x0, x1, t), t, context, first_frame=first)
    error = (v - (x1 - x0))[:, :, 1:].square()
    torch.testing.assert_close(loss, error.mean().float())  # the mean over the frames that are predicted
    again = prfl.sft_loss(dit, x0, others_first_frame(x1.detach()), t, context, first_frame=first)
    assert torch.equal(loss, again) and torch.equal(found, gradients(dit, again))


@pytest.mark.parametrize("step", [1, 2, 4])
def test_nothing_of_the_reward_update_comes_from_the_given_frame(step):
    """Whatever the noise there was; the reward model too sees the clean frame."""
    dit, pavrm, z = pinned()
    found = []
    for x_T in (z["x1"], others_first_frame(z["x1"])):
        loss, reward = prfl.reward_update_loss(dit, pavrm, x_T, z["context"], step, 4,
                                               first_frame=z["first_frame"])
        found.append((loss, reward, gradients(dit, loss)))
    for one, other in zip(*found):
        assert torch.equal(one, other)
    assert found[0][2].abs().max() > 0
    x, s = z["x"].requires_grad_(), torch.tensor([0.3, 0.8], dtype=torch.float64)
    pavrm(x, s, z["context"], first_frame=z["first_frame"]).sum().backward()
    assert not x.grad[:, :, 0].any() and x.grad[:, :, 1:].any()


def test_sampling_leaves_the_frame_as_it_is():
    dit, pavrm, z = pinned()
    dit, pavrm, first, context = dit.float(), pavrm.float(), z["first_frame"].float(), z["context"].float()
    how = dict(shift=5.0, guidance_scale=3.0, first_frame=first)
    x = flow.sample(dit, SHAPE, context, 0, [0, 1], 4, **how)
    assert torch.equal(x[:, :, :1], first) and (x[:, :, 1:] != 0).all()
    for drops in (None, search.default_drops(4)):
        x, _ = search.best_of(dit, pavrm, SHAPE, context, 0, [0, 1], 4, 4, drops, **how)
        assert torch.equal(x[:, :, :1], first)
    given = {"first_frame": first}
    x = flow.rollout(dit, z["x"].float(), context, 4, stop=0, **given)         # no step at all
    assert torch.equal(x, pin(z["x"].float(), first))
    one = validation.logits_by_t(pavrm, x, context, **given)
    other = validation.logits_by_t(pavrm, others_first_frame(x), context, **given)
    assert torch.equal(one, other)


def test_decoded_predictions_have_the_given_frame():
    """RGB ReFL decodes the given frame clean, and refuses to reward that frame alone."""
    dit, _, z = pinned()
    seen = []

    class Decoder:
        past = None

        def decode(self, x):
            seen.append(x)
            return x[:, :3]

    reward = refl_baseline.PixelReward("all", 8, width=4).double()
    t = torch.tensor([0.3, 0.3], dtype=torch.float64)
    refl_baseline.predicted_reward(reward, Decoder(), dit, z["x"], t, z["context"],
                                   first_frame=z["first_frame"])
    assert torch.equal(seen[0][:, :, :1], z["first_frame"])
    config = train_align.Config(method="refl", frames_decoded="first")
    with pytest.raises(InputError, match="--frames_decoded all"):
        refl_baseline.load_reward_and_decoder(config, dit, None)


def test_what_a_batch_of_shards_gives():
    dit, _, z = pinned()
    given = image_inputs(dit.config, {"latents": z["x"]}, "cpu")
    assert given.keys() == {"first_frame"} and torch.equal(given["first_frame"], z["x"][:, :, :1])
    assert image_inputs(generator().config, {"latents": z["x"]}, "cpu") == {}


def test_a_first_frame_too_many_missing_or_misshapen():
    dit, _, z = pinned()
    plain, t = generator().double(), torch.zeros(2, dtype=torch.float64)
    for model, first in ((dit, None), (plain, z["first_frame"])):
        with pytest.raises(InputError, match="first_frame must be given exactly when"):
            model(z["x"], t, z["context"], first_frame=first)
    for first in (z["first_frame"][:1], z["first_frame"][:, :, :, :2], z["x"]):
        with pytest.raises(InputError, match="first_frame has shape .* one latent frame"):
            dit(z["x"], t, z["context"], first_frame=first)


@pytest.mark.parametrize("ranks, wanted",
                         [(1, [6]), (2, [6, 0]), (4, [5, 1, 0, 0]), (8, [3, 3, 0, 0, 0, 0, 0, 0])])
def test_each_ranks_share_of_the_given_tokens(monkeypatch, ranks, wanted):
    """18 tokens, of which the first 6 are given."""
    import torch.distributed as dist
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: ranks)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: group)
    assert [Sequence(rank, 18).share_of(6) for rank in range(ranks)] == wanted
