"""search.py against rewards and velocities whose best candidate is known, and against flow.sample."""
import pytest
import torch
from tiny import generator
from torch import nn

import common
import flow
import search
from common import InputError
from pavrm import PAVRM

SHAPE = (2, 3, 2, 2)  # c, f, h, w
N = 8


class Straight(nn.Module):
    """Ends at x_T - target, whatever the steps; counts the videos it was called with."""

    def __init__(self, target=0.5, blocks=4):
        super().__init__()
        self.target, self.blocks, self.seen = target, range(blocks), 0

    def forward(self, x, t, context, y=None):
        self.seen += len(x)
        return torch.full_like(x, self.target) if y is None else y.expand_as(x)


class Brightest(nn.Module):
    """Rewards the mean of x; half as deep as the generator."""

    def __init__(self, blocks=2):
        super().__init__()
        self.trunk, self.seen = nn.Module(), []
        self.trunk.blocks = range(blocks)

    def forward(self, x, t, context, y=None):
        self.seen.append((float(t[0]), len(x)))
        return x.mean((1, 2, 3, 4)) + context.mean((1, 2))


def find(n, drops=None, indices=range(5), dit=None, reward=None, seed=3, **how):
    """drops: text of --drops, "default" for the default drops, None to resample."""
    context = torch.zeros(len(indices), 2, 4)
    if drops:
        drops = search.parse_drops(n, None if drops == "default" else drops)
    return search.best_of(dit or Straight(), reward or Brightest(), SHAPE, context, seed, indices, N, n,
                          drops, **how)


def candidates(n, indices=range(5), seed=3):
    """-> noise [m, n, c, f, h, w]"""
    return torch.stack([common.noise(SHAPE, seed, "sample", k, indices) for k in range(n)], 1)


@pytest.mark.parametrize("drops", ["0:1", ".5:1", ".75:3,.5:2,.25:1", ".75:3", "default"])
def test_the_brightest_start_ends_brightest_so_every_plan_finds_it(drops):
    x = candidates(6)
    best = x.mean((2, 3, 4, 5)).argmax(1)
    found, _ = find(6, drops)
    torch.testing.assert_close(found, x[range(5), best] - 0.5)


def test_each_drop_ranks_what_the_one_before_left_at_its_own_time():
    """A reward that turns around: the two brightest of six at t = 3/4, of these the darker one at the end."""
    class Turning(Brightest):
        def forward(self, x, t, context, y=None):
            return super().forward(x, t, context) * torch.where(t > 0.5, 1, -1)
    x, reward = candidates(6), Turning()
    second = x.mean((2, 3, 4, 5)).topk(2, 1).indices[:, 1]
    found, _ = find(6, ".75:2,0:1", reward=reward)
    torch.testing.assert_close(found, x[range(5), second] - 0.5)
    assert reward.seen == [(0.75, 30), (0.0, 10)]


def test_one_candidate_is_what_sample_makes_and_more_begin_with_it():
    dit = generator()
    context = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    shape = (16, 2, 4, 4)
    one = flow.sample(dit, shape, context, 7, range(5), 4)
    found, passes = search.best_of(dit, PAVRM.from_generator(dit, 1), shape, context, 7, range(5), 4, 1)
    assert torch.equal(found, one) and passes == 4

    def never(x, t, context):                                       # likes what is nearest to a given video
        return (x - never.first).square().flatten(1).sum(1).neg()

    never.trunk, never.first = PAVRM.from_generator(dit, 1).trunk, one[2]
    found, _ = search.best_of(dit, never, shape, context[2:3], 7, [2], 4, 3,
                              search.parse_drops(3, "0:1"))
    torch.testing.assert_close(found[0], one[2])


@pytest.mark.parametrize("n, drops, guidance, passes", [
    (8, "0:1", 1.0, 8 * 8 + 8 / 2),                     # every candidate whole, one reward each: K / L = 1/2
    (8, ".75:4,.5:2,.25:1", 1.0, 8 * 2 + 4 + 4 * 2 + 2 + 2 * 2 + 1 + 2),
    (8, ".75:4,.5:2,.25:1", 3.0, 8 * 4 + 4 + 4 * 4 + 2 + 2 * 4 + 1 + 4),        # guidance: two passes a step
    (4, ".5:2", 1.0, 4 * 4 + 2 + 2 * 4 + 1),            # down to one at the end, though it does not say so
    (3, None, 1.0, 3 * 5 + 3 * 4 / 2 + 3),              # resampled after steps 2, 3, 4; one left after 5
    (3, None, 2.0, 3 * 10 + 3 * 4 / 2 + 6), (1, None, 1.0, 8)])
def test_passes_are_those_made(n, drops, guidance, passes):
    dit, reward = Straight(), Brightest()
    assert find(n, drops, dit=dit, reward=reward, guidance_scale=guidance)[1] == passes
    assert (dit.seen + sum(k for _, k in reward.seen) / 2) / 5 == passes


@pytest.mark.parametrize("drops", ["default", None])
def test_a_video_depends_on_seed_and_index_only(drops):
    whole = find(6, drops)[0]
    few = find(6, drops, batch_size=4)[0]                       # fewer at a time than a video has candidates
    torch.testing.assert_close(few, whole)
    torch.testing.assert_close(find(6, drops, indices=[4, 1])[0], whole[[4, 1]])
    assert not torch.allclose(find(6, drops, indices=[1], seed=4)[0], whole[1:2])


class Still(nn.Module):
    """Leaves every state as it is."""
    blocks = range(4)

    def forward(self, x, t, context):
        return torch.zeros_like(x)


def test_the_best_candidate_fills_all_places_with_new_noise():
    """Under no velocity, and with a reward so steep that every place draws the same candidate: it keeps its
    state in one place, and its copies get new noise on top of the clean video that it points to."""
    n, m = 4, 3

    class Steep(Brightest):
        def forward(self, x, t, context):
            return 1e4 * super().forward(x, t, context)
    found, _ = find(n, indices=range(m), dit=Still(), reward=Steep())
    drawn = lambda purpose: torch.stack([common.noise(SHAPE, 3, purpose, k, range(m)) for k in range(n)], 1)
    best_of = lambda states: states[range(m), states.flatten(2).mean(2).argmax(1)]
    states = drawn("sample")                                                            # [m, n, c, f, h, w]
    for step in (2, 3, 4):
        t, best = 1 - step / N, best_of(states)[:, None]
        states = torch.cat([best, ((1 - t) * best + t * drawn(f"resampling {step}"))[:, 1:]], 1)
    torch.testing.assert_close(found, best_of(states))


def test_places_are_drawn_as_often_as_softmax_says_and_copies_are_renewed():
    m, k = 4000, 3
    t = torch.full((m,), 0.5)
    r = torch.tensor([0.0, 1.0, 2.0]).expand(m, k)
    x = torch.arange(k).float().expand(m, k).reshape(m, k, 1, 1, 1, 1)
    noise, draws = torch.full_like(x, 100.0), torch.rand(m, k, generator=torch.Generator().manual_seed(0))
    states = search.resample(x, 10 * x, r, t, draws, noise).flatten(1)                  # [m, k]
    renewed = states >= 50                                      # (1 - t) 10 x + t noise: 50, 55 or 60
    candidates = torch.where(renewed, (states - 50) / 5, states)
    share = torch.stack([(candidates == i).float().mean() for i in range(k)])
    torch.testing.assert_close(share, r[0].softmax(0), atol=0.02, rtol=0)
    assert torch.equal(renewed, search.is_copy(candidates))


def test_what_counts_as_a_copy():
    chosen = torch.tensor([[0, 0, 2, 0], [3, 1, 3, 1], [0, 1, 2, 3]])
    assert search.is_copy(chosen).tolist() == [[False, True, False, True], [False, False, True, True],
                                               [False] * 4]


def test_a_copy_starts_from_where_its_candidate_points_to(monkeypatch):
    """With a constant velocity v a candidate points to x_T - v all the way."""
    seen = []

    def note(x, predicted, *others):
        seen.append(predicted)
        return x

    monkeypatch.setattr(search, "resample", note)
    find(2, indices=[0], dit=Straight(target=0.5))
    assert len(seen) == 3
    for predicted in seen:
        torch.testing.assert_close(predicted, candidates(2, [0]) - 0.5)


@pytest.mark.parametrize("num_steps, shift, expected", [
    (16, 1.0, {**dict.fromkeys(range(3, 10), 4), 10: 1}), (4, 1.0, {1: 4, 2: 1}), (2, 1.0, {1: 1}),
    (1, 1.0, {1: 1}), (50, 5.0, {**dict.fromkeys(range(27, 45), 4), 45: 1})])
def test_when_candidates_are_resampled(num_steps, shift, expected):
    """At each step from t = .81 on; one is left at t = .38. Short schedules still end with one."""
    assert search.choices_of(flow.schedule(num_steps, shift), 4) == expected
    assert search.choices_of(flow.schedule(num_steps, shift), 1) == {}


def test_every_candidate_has_its_own_videos_prompt_and_image():
    y = torch.randn(5, 1, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    x = candidates(4)
    found, _ = find(4, "0:1", y=y, batch_size=3)
    torch.testing.assert_close(found, x[range(5), x.mean((2, 3, 4, 5)).argmax(1)] - y)


def test_a_candidate_that_is_not_finite_never_wins():
    class Broken(Brightest):
        def forward(self, x, t, context, y=None):
            return super().forward(x, t, context).index_fill(0, torch.tensor([0]), torch.nan)
    found, _ = find(3, "0:1", indices=[0], reward=Broken())
    x = candidates(3, [0])[0, 1:]
    torch.testing.assert_close(found[0], x[x.mean((1, 2, 3, 4)).argmax()] - 0.5)


@pytest.mark.parametrize("drops, guidance", [("0:1", 1.0), (".75:3,.5:2,.25:1", 2.0), (None, 1.0)])
def test_ranks_with_fewer_videos_make_as_many_passes(drops, guidance):
    """Ragged batches of 3, 2 and 1 videos, two candidates at a time; what the extra passes give is
    dropped."""
    passes = []
    for indices in (range(3), [3, 4], [5]):
        dit, reward = Straight(), Brightest()
        dit.calls = 0
        dit.register_forward_hook(lambda module, given, out: setattr(module, "calls", module.calls + 1))
        x, said = find(5, drops, indices, dit, reward, batch_size=2, max_rows=3, guidance_scale=guidance)
        passes.append((dit.calls, [t for t, _ in reward.seen], said))
        torch.testing.assert_close(x, find(5, drops, indices, batch_size=2, guidance_scale=guidance)[0])
    assert passes[0] == passes[1] == passes[2] and passes[0][0] > 0


def test_a_cost_counts_guidance_on_both_sides():
    """8 candidates for two of eight steps, then 4, 2 and 1, and rewards of half the depth: 30 passes without
    guidance, twice as many with it, and 7 of rewards in both."""
    drops = ".75:4,.5:2,.25:1"
    for guidance, total, times in ((1.0, 37, 4.6), (3.0, 67, 4.2)):
        _, passes = find(8, drops, guidance_scale=guidance)
        line = f"best of 8: {total} forward passes per video, {times} times those of one candidate"
        assert search.cost_in_words(8, passes, N, guidance) == line
    _, passes = find(8, "0:1", reward=Brightest(0), guidance_scale=5)
    assert "128 forward passes per video, 8.0 times" in search.cost_in_words(8, passes, N, 5)


def test_drops():
    assert search.parse_drops(8, ".75:4,.56:2,.37:1") == ((1.0, 8), (0.75, 4), (0.56, 2), (0.37, 1))
    assert search.parse_drops(8, ".5:2") == ((1.0, 8), (0.5, 2), (0.0, 1))
    for n in range(1, 20):
        drops = search.default_drops(n)
        assert drops[0] == (1.0, n) and drops[-1][1] == 1
        assert all(t > later and keep > fewer for (t, keep), (later, fewer) in zip(drops, drops[1:]))


@pytest.mark.parametrize("n, text", [
    (8, ""), (8, "x"), (8, ".5"), (8, ".5:2:1"), (8, ".5:8"), (8, ".5:0"), (8, "1:4"), (8, "-.1:1"),
    (8, ".5:4,.75:2"),
    (8, ".5:2,.25:2"), (8, ".5:1.5"), (8, "nan:1"), (8, "0:1,0:1"), (1, "0:1")])
def test_drops_that_cannot_be(n, text):
    with pytest.raises(InputError, match=f"--drops .* such as .75:{n // 2}; .* first below --best_of {n}$"):
        search.parse_drops(n, text)


def test_generator_and_reward_run_in_the_dtype_of_autocast_or_in_none():
    class Noting(Brightest):
        def forward(self, x, t, context, y=None):
            dtypes.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
            return super().forward(x, t, context, y)

    for autocast, wanted in ((lambda: torch.autocast("cpu", torch.bfloat16), torch.bfloat16), (None, None)):
        dtypes = []
        with torch.autocast("cpu", torch.float16):
            find(4, "0:1", reward=Noting(), autocast=autocast)
        assert dtypes and set(dtypes) == {wanted}


@pytest.mark.parametrize("n, kept", [(2, [1]), (4, [2, 1]), (8, [4, 2, 1]), (16, [8, 4, 1]), (5, [3, 2, 1])])
def test_the_default_keeps_half_a_quarter_and_one(n, kept):
    first, *drops = search.default_drops(n)
    assert first == (1.0, n) and [keep for _, keep in drops] == kept and drops[-1][1] == 1


def test_candidates_go_by_the_shifted_times():
    """A velocity that depends on t ends elsewhere by other times; the only candidate is flow.sample's."""
    class Bent(Straight):
        def forward(self, x, t, context, y=None):
            return t.view(-1, 1, 1, 1, 1).expand_as(x) ** 2

    found, _ = find(2, "0:1", dit=Bent(), shift=5.0)
    x = candidates(2)
    best = x[range(5), x.mean((2, 3, 4, 5)).argmax(1)]
    torch.testing.assert_close(found, flow.rollout(Bent(), best, torch.zeros(5, 2, 4), N, shift=5.0))
    assert not torch.allclose(found, flow.rollout(Bent(), best, torch.zeros(5, 2, 4), N), atol=1e-3)
