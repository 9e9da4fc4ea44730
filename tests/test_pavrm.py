"""pavrm.py against Eq. 5 and 6 in numpy, brute force, and models whose answers are known."""
import math

import numpy as np
import pytest
import torch
from torch import nn

import pavrm as P
import validation
from common import InputError, Runtime
from formats.weights import save_module
from model import VideoDiT
from scale import parallel

DIM = 24
TINY = dict(in_dim=4, out_dim=4, dim=DIM, ffn_dim=32, num_heads=2, num_layers=3, freq_dim=16, text_dim=8,
            text_len=3)


@pytest.fixture
def dit():
    torch.manual_seed(0)
    return VideoDiT(**TINY)


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 2, 4, 4,
                       generator=g), torch.tensor([0.1, 0.5, 0.9]), torch.randn(3, 3, 8, generator=g)


# ---- pooling
def attention_in_numpy(q, w_k, w_v, h, heads=1):
    """softmax(q (h W_K)^T / sqrt(width of a head)) (h W_V), one example and head at a time."""
    out = np.zeros((len(h), q.shape[1]))
    for i, tokens in enumerate(h):                                                 # [n, d]
        for channels in np.split(np.arange(q.shape[1]), heads):
            keys, values = (tokens @ w_k)[:, channels], (tokens @ w_v)[:, channels]
            score = keys @ q[0, channels] / math.sqrt(len(channels))               # [n]
            share = np.exp(score - score.max())
            out[i, channels] = share / share.sum() @ values
    return out


@pytest.mark.parametrize("pooling, heads, residual", [("query_attention", 1, 1), ("attention", 1, 0),
                                                      ("multihead", 8, 1)])
def test_attention_pooling_is_equation_5(pooling, heads, residual):
    torch.manual_seed(0)
    pool, h = P.POOLINGS[pooling](DIM), torch.randn(5, 7, DIM)  # more than one video at once
    nn.init.normal_(pool.query, std=2.0)  # far from uniform attention
    q, w_k, w_v = (w.detach().double().numpy() for w in (pool.query, pool.w_k.weight.T, pool.w_v.weight.T))
    wanted = attention_in_numpy(q, w_k, w_v, h.double().numpy(), heads) + residual * q
    got = pool(h).detach().numpy()
    assert got.shape == (5, DIM)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_query_starts_with_length_1_and_heads_divide_the_width():
    torch.manual_seed(0)
    for dim in (100, 4096):
        assert P.QueryAttention(dim).query.norm().item() == pytest.approx(1, abs=0.25)
    assert [P.POOLINGS["multihead"](dim).heads for dim in (12, 16, 24, 28)] == [4, 8, 8, 4]


def test_a_reward_model_as_deep_as_the_generator_and_what_it_is_given(tmp_path):
    torch.manual_seed(0)
    dit = VideoDiT(**TINY | dict(model_type="i2v", in_dim=12))
    x, t, context, y = torch.randn(2, 4, 2, 4,
        4), torch.tensor([0.3, 0.6]), torch.randn(2, 3, 8), torch.randn(2, 8, 2, 4, 4)
    reward = P.PAVRM.from_generator(dit, 3)
    nn.init.normal_(reward.mlp[-1].weight)
    save_module(reward, tmp_path)
    loaded = P.load_pavrm(tmp_path, dit)                        # all three of its blocks
    torch.testing.assert_close(loaded(x, t, context, y=y), reward(x, t, context, y=y))
    assert (loaded(x, t, context, y=y) - loaded(x, t, context, y=y + 1)).abs().min() > 1e-4
    with pytest.raises(InputError, match="more blocks"):
        P.load_pavrm(tmp_path, VideoDiT(**TINY | dict(model_type="i2v", in_dim=12, num_layers=2)))


def test_mean_and_max_pooling():
    h = torch.randn(5, 7, DIM, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(P.POOLINGS["mean"](DIM)(h), h.numpy().mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(P.POOLINGS["max"](DIM)(h), h.numpy().max(1))


@pytest.mark.parametrize("pooling", P.POOLINGS)
def test_pooling_does_not_see_the_order_of_tokens(pooling):
    torch.manual_seed(0)
    pool, h = P.POOLINGS[pooling](DIM), torch.randn(5, 7, DIM)
    torch.testing.assert_close(pool(h[:, torch.randperm(7)]), pool(h))


@pytest.mark.parametrize("pooling", P.POOLINGS)
def test_logit_is_the_mlp_of_the_pooled_trunk_features(dit, inputs, pooling):
    model = P.PAVRM.from_generator(dit, 2, pooling)
    x, t, context = inputs
    r = model(x, t, context)
    assert r.shape == (3,) and r.dtype == torch.float32
    z = model.pool(dit.features(x, t, context, depth=2))  # the generator's own features
    a, b, c = model.mlp[0], model.mlp[2], model.mlp[4]
    silu = lambda v: v / (1 + torch.exp(-v))
    torch.testing.assert_close(r, c(silu(b(silu(a(z)))))[:, 0])
    one_by_one = torch.cat([model(x[i:i + 1], t[i:i + 1], context[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(r, one_by_one)                                      # examples do not mix


# ---- the trunk
def test_from_generator_copies_the_first_blocks_bit_for_bit(dit):
    model = P.PAVRM.from_generator(dit, 2)
    theirs, before = dit.state_dict(), {k: v.clone() for k, v in dit.state_dict().items()}
    mine = model.trunk.state_dict()
    assert len(model.trunk.blocks) == 2 and not any(name.startswith("head") for name in mine)
    assert set(theirs) - set(mine) == {k for k in theirs if k.startswith(("blocks.2", "head"))}
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    # a copy, not a view
    assert all(torch.equal(value, before[name]) for name, value in dit.state_dict().items())


@pytest.mark.parametrize("depth", [0, 4])
def test_a_depth_the_generator_does_not_have(dit, depth):
    with pytest.raises(InputError, match=f"--depth {depth}: must be from 1 to 3"):
        P.PAVRM.from_generator(dit, depth)


@pytest.mark.parametrize("trunk_lr", [3e-4, 0.0])
def test_embeddings_are_frozen_and_trunk_rate_zero_is_a_probe(dit, inputs, trunk_lr):
    model = P.PAVRM.from_generator(dit, 2)
    groups = model.parameter_groups(trunk_lr, 1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = ("pool.", "mlp.", "trunk.blocks.") if trunk_lr else ("pool.", "mlp.")
    assert trained == {name for name in before if name.startswith(wanted)}
    assert {id(p) for g in groups for p in g["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad}
    assert [g["lr"] for g in groups] == ([1e-3, trunk_lr] if trunk_lr else [1e-3])
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)  # decay must not move them either
    P.bce_loss(model(*inputs), torch.tensor([1, 0, 1])).backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained


# ---- files
@pytest.mark.parametrize("pooling", P.POOLINGS)
def test_save_and_load_bit_for_bit(dit, inputs, pooling, tmp_path):
    model = P.PAVRM.from_generator(dit, 2, pooling)
    save_module(model, tmp_path / "reward")
    loaded = P.load_pavrm(tmp_path / "reward", dit)
    assert loaded.config["pooling"] == pooling and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    assert torch.equal(loaded(*inputs), model(*inputs))


class Scaled(nn.Module):
    """A pooling with a buffer, which is trained by nobody."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("scale", torch.rand(dim))

    def forward(self, h):
        return h.mean(1) * self.scale


@pytest.mark.parametrize("pooling", [*P.POOLINGS, "scaled"])
@pytest.mark.parametrize("way", ["shard", "whole"])
def test_weights_read_later_are_the_same_bit_for_bit(dit, inputs, pooling, way, tmp_path, monkeypatch):
    """With load_now=False, as train_align.py (shard) and sample.py (whole) load a reward model."""
    monkeypatch.setitem(P.POOLINGS, "scaled", Scaled)
    model = P.PAVRM.from_generator(dit, 2, pooling)
    save_module(model, tmp_path / "reward")
    loaded = P.load_pavrm(tmp_path / "reward", dit, load_now=False)
    runtime = Runtime(0, 1, torch.device("cpu"), torch.float32)
    if way == "shard":
        parallel.shard(loaded, runtime, parallel.Flags())
    else:
        parallel.whole(loaded, runtime.dtype)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    assert torch.equal(loaded(*inputs), model(*inputs))


@pytest.mark.parametrize("changed, words", [
    ({"dim": 36, "num_heads": 3}, "dim 24 instead of 36"), ({"text_dim": 12}, "text_dim 8 instead of 12"),
    ({"in_dim": 5, "out_dim": 5}, "in_dim 4 instead of 5"), ({"num_layers": 1}, "more blocks")])
def test_reward_model_of_another_trunk(dit, changed, words, tmp_path):
    save_module(P.PAVRM.from_generator(dit, 2), tmp_path / "reward")
    with pytest.raises(InputError, match=words) as error:
        P.load_pavrm(tmp_path / "reward", VideoDiT(**TINY | changed))
    assert "\n" not in str(error.value) and str(tmp_path / "reward") in str(error.value)


@pytest.mark.parametrize("channels, words", [
    ({"in_dim": 12}, "runs as i2v: give a reward model that was trained with --task i2v"),
    ({"in_dim": 48, "out_dim": 48}, "runs as i2v: give --task t2v, or a reward model that was trained with")])
def test_reward_model_of_another_task(channels, words, tmp_path):
    base = VideoDiT(**TINY | channels | {"in_dim": channels.get("out_dim", 4)})
    save_module(P.PAVRM.from_generator(base, 2), tmp_path / "reward")
    with pytest.raises(InputError, match=f"is for t2v, and the generator {words}"):
        P.load_pavrm(tmp_path / "reward", VideoDiT(**TINY | channels | {"model_type": "i2v"}))


def test_a_folder_that_is_no_reward_model(dit, tmp_path):
    save_module(dit, tmp_path / "transformer")
    with pytest.raises(InputError, match="not a reward model's"):
        P.load_pavrm(tmp_path / "transformer")
    for broken in ('{"transformer": {}, "pooling": "mean"}', '{"transformer": {"dim": 24}, "pooling": '
                   '"mean"}', '{"transformer": 3, "pooling": "mean"}'):
        (tmp_path / "transformer/config.json").write_text(broken)
        with pytest.raises(InputError, match="not a reward model's"):
            P.load_pavrm(tmp_path / "transformer", dit)


# ---- losses and measures
def test_bce_is_equation_6():
    r, y = np.array([-3.0, -0.2, 0.0, 1.5, 40.0]), np.array([1, 0, 1, 1, 0])
    p = 1 / (1 + np.exp(-r))
    wanted = -np.log([p[0], 1 - p[1], p[2], p[3]]).sum() + 40.0  # -log(1 - sigmoid(40)) = 40
    got = P.bce_loss(torch.tensor(r), torch.tensor(y, dtype=torch.int8))
    assert got.item() == pytest.approx(wanted / 5, rel=1e-6)


def test_bradley_terry_is_the_mean_over_pairs():
    r, y = torch.randn(9, dtype=torch.float64), torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 0])
    pairs = [-math.log(1 / (1 + math.exp(-(r[i] - r[j])))) for i in range(9) for j in range(9) if y[i] > y[j]]
    assert P.bradley_terry_loss(r, y).item() == pytest.approx(sum(pairs) / 20)
    alone = r.clone().requires_grad_()
    P.bradley_terry_loss(alone, torch.ones(9)).backward()  # no pairs: nothing to learn
    assert torch.equal(alone.grad, torch.zeros_like(r))


def test_auc_is_the_share_of_pairs_in_order():
    g = torch.Generator().manual_seed(0)
    score, y = torch.randint(6, (40,), generator=g).float(), torch.randint(2, (40,), generator=g)  # many ties
    pairs = [(score[i] > score[j]).item() + 0.5 * (score[i] == score[j]).item()
             for i in range(40) for j in range(40) if y[i] > y[j]]
    assert validation.auc(score, y) == pytest.approx(sum(pairs) / len(pairs))
    assert validation.auc(torch.arange(4.0), torch.tensor([0, 0, 1, 1])) == 1
    assert validation.auc(torch.zeros(4), torch.tensor([0, 0, 1, 1])) == 0.5
    assert math.isnan(validation.auc(torch.zeros(4), torch.ones(4)))


def measured(answer, m=30):
    """metrics_by_t of a model that answers with answer(context); the label stands in the context."""
    labels = (torch.arange(m) % 3 == 0).to(torch.int8)                             # a third is good
    context = labels.float().view(m, 1, 1)
    latents, seen = torch.zeros(m, 4, 2, 2, 2), []

    def model(x, t, context, y=None):
        seen.append((x, t))
        return answer(context[:, 0, 0])

    return validation.metrics_by_t(validation.logits_by_t(model, latents, context, batch_size=8),
                                   labels), seen


def test_interval_metrics_of_known_models():
    right, _ = measured(lambda label: 2 * label - 1)
    assert right == {"accuracy": [1.0] * 5, "balanced_accuracy": [1.0] * 5, "auc": [1.0] * 5}
    for constant in (1.0, -1.0):
        out, _ = measured(lambda label: torch.full_like(label, constant))
        assert out["accuracy"] == pytest.approx([1 / 3 if constant > 0 else 2 / 3] * 5)
        assert out["balanced_accuracy"] == pytest.approx([0.5] * 5) and out["auc"] == [0.5] * 5
    wrong, _ = measured(lambda label: 1 - 2 * label)
    assert wrong["balanced_accuracy"] == [0.0] * 5 and wrong["auc"] == [0.0] * 5


def test_interval_metrics_visits_each_fifth_of_t():
    _, seen = measured(lambda label: label)
    t = torch.cat([t for _, t in seen]).view(5, 30)
    for k in range(5):
        assert k / 5 <= t[k].min() and t[k].max() <= (k + 1) / 5 and t[k].unique().numel() == 30
    x = torch.cat([x for x, _ in seen])  # latents 0: x_t is t times noise
    spread = (x.flatten(1) / t.view(-1, 1)).std()
    assert spread == pytest.approx(1, abs=0.05)
