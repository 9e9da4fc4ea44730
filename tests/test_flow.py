"""flow.py against closed forms: the straight path, the schedule, Euler steps, guidance and sampling."""
import pytest
import torch

import common
import flow

SHAPE = (2, 3, 2, 2)  # c, f, h, w


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def straight(v):
    """A generator whose velocity is v everywhere."""
    return lambda x, t, context, y=None: v.expand_as(x)


def curved(x, t, context, y=None):
    """A field that bends with x, t and the prompt, linear in the context."""
    return torch.sin(2 * x) + t.view(-1, 1, 1, 1, 1) + context.mean((1, 2)).view(-1, 1, 1, 1, 1) * x


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 40])
def test_euler_is_exact_on_a_straight_path(num_steps, shift):
    x0, x1 = randn(3, *SHAPE), randn(3, *SHAPE, seed=1)
    reached = flow.rollout(straight(x1 - x0), x1, None, num_steps, shift=shift)
    torch.testing.assert_close(reached, x0, atol=3e-6, rtol=0)


def test_rollout_is_eulers_sum_of_the_velocities_at_the_noisy_end_of_each_step():
    times = [(4 - i) / 4 for i in range(5)]
    shifted = [5 * u / (1 + 4 * u) for u in times]
    by_hand = -sum((shifted[i] - shifted[i + 1]) * 2 * shifted[i] for i in range(4))
    field = lambda x, t, context, y=None: (2 * t).view(-1, 1, 1, 1, 1).expand_as(x)
    reached = flow.rollout(field, torch.zeros(2, *SHAPE), None, 4, shift=5.0)
    torch.testing.assert_close(reached, torch.full((2, *SHAPE), by_hand), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_schedule_falls_from_one_to_zero(shift):
    times = flow.schedule(40, shift)
    assert times.shape == (41,) and times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
    if shift == 1:
        torch.testing.assert_close(-times.diff(), torch.full((40,), 1 / 40), atol=1e-7, rtol=0)
    else:  # u = 1/2 becomes s / (s + 1), Wan's own formula
        assert times[20] == pytest.approx(5 / 6)


def test_add_noise_end_points_and_middle():
    x0, x1 = randn(3, *SHAPE), randn(3, *SHAPE, seed=1)
    assert torch.equal(flow.add_noise(x0, x1, torch.zeros(3)), x0)
    assert torch.equal(flow.add_noise(x0, x1, torch.ones(3)), x1)
    mixed = flow.add_noise(x0, x1, torch.tensor([0.0, 0.25, 1.0]))                 # each example at its own t
    torch.testing.assert_close(mixed, torch.stack([x0[0], 0.75 * x0[1] + 0.25 * x1[1], x1[2]]))


def test_flow_matching_loss():
    x0, x1, v = randn(4, *SHAPE), randn(4, *SHAPE, seed=1), randn(4, *SHAPE, seed=2)
    assert flow.flow_matching_loss(x1 - x0, x0, x1) == 0
    torch.testing.assert_close(flow.flow_matching_loss(v, x0, x1), ((v - x1 + x0) ** 2).mean())
    assert flow.flow_matching_loss(x1 - x0 + 3, x0, x1) == pytest.approx(9, rel=1e-5)
    weight = torch.tensor([0.0, 0.0, 4.0, 0.0])  # only the third example counts
    torch.testing.assert_close(flow.flow_matching_loss(v, x0, x1, weight), ((v - x1 + x0)[2] ** 2).mean())


def test_predict_x0_inverts_add_noise():
    x0, x1, t = randn(5, *SHAPE), randn(5, *SHAPE, seed=1), torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    x_t = flow.add_noise(x0, x1, t)
    torch.testing.assert_close(flow.predict_x0(x_t, x1 - x0, t), x0, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cut", [0, 1, 5, 8])
def test_two_parts_of_a_rollout_are_the_whole(cut):
    x1, context = randn(3, *SHAPE), randn(3, 2, 4, seed=1)
    whole = flow.rollout(curved, x1, context, 8, shift=3.0)
    noisy = flow.rollout(curved, x1, context, 8, stop=cut, shift=3.0)
    assert torch.equal(flow.rollout(curved, noisy, context, 8, start=cut, shift=3.0), whole)
    assert torch.equal(noisy, x1) == (cut == 0)


@pytest.mark.parametrize("passes, N, most",
                         [(0, 10, 10), (4, 10, 4), (3, 10, 3), (1, 10, 1), (8, 3, 3), (4, 6, 3)])
def test_passes_are_longer_steps_on_the_same_grid(passes, N, most):
    """By hand, with a shifted grid: strides of ceil(N / passes) steps, the last one as long as what is
    left."""
    x1, context, calls = randn(2, *SHAPE), randn(2, 2, 4, seed=1), []

    def counted(x, t, context, y=None):
        calls.append(t[0].item())
        return curved(x, t, context)

    times, stride = flow.schedule(N, 3.0), -(-N // passes) if passes else 1
    for last in range(N + 1):
        stops = [*range(0, last, stride), last]
        x = x1
        for a, b in zip(stops, stops[1:]):
            x = x - (times[a] - times[b]) * curved(x, times[a].expand(2), context)
        calls.clear()
        torch.testing.assert_close(flow.rollout(counted, x1, context, N, stop=last, passes=passes, shift=3.0),
                                   x)
        assert len(calls) == len(stops) - 1 <= most


def test_rollout_keeps_the_state_wide_and_has_no_gradient():
    context = torch.zeros(3, 2, 4, requires_grad=True)
    half = lambda x, t, context, y=None: curved(x, t, context).bfloat16()          # what autocast hands back
    assert flow.rollout(half, randn(3, *SHAPE), context, 4).dtype == torch.float32
    assert not flow.rollout(curved, randn(3, *SHAPE), context, 4).requires_grad


def test_guidance():
    x, t, context = randn(3, *SHAPE), torch.tensor([0.1, 0.5, 0.9]), randn(3, 2, 4, seed=1)
    v, v_null = curved(x, t, context), curved(x, t, torch.zeros_like(context))
    assert torch.equal(flow.guided_velocity(curved, x, t, context, 1.0), v)
    for g in (0.0, 2.0, 5.0):  # linear in the scale, 0 is the null prompt's velocity
        torch.testing.assert_close(flow.guided_velocity(curved, x, t, context, g), (1 - g) * v_null + g * v)


def test_guidance_leads_away_from_the_null_context():
    """Given one, the null prompt's velocity is that of its context, in a rollout and in samples too."""
    x, context, null = randn(3, *SHAPE), randn(3, 2, 4, seed=1), randn(2, 4, seed=2)
    t = torch.tensor([0.1, 0.5, 0.9])
    v, v_null = curved(x, t, context), curved(x, t, null.expand(3, 2, 4))
    torch.testing.assert_close(flow.guided_velocity(curved, x, t, context, 5.0, null), 5 * v - 4 * v_null)
    guided = lambda x, t, context: flow.guided_velocity(curved, x, t, context, 5.0, null)
    wanted = flow.rollout(guided, x, context, 4, shift=3.0)
    assert torch.equal(flow.rollout(curved, x, context, 4, shift=3.0, guidance_scale=5.0, null=null), wanted)
    drawn = flow.sample(curved, SHAPE, context, 7, range(3), 4, shift=3.0, guidance_scale=5.0, null=null)
    x_T = common.noise(SHAPE, 7, "sample", 0, range(3))
    assert torch.equal(drawn, flow.rollout(guided, x_T, context, 4, shift=3.0))
    assert not torch.allclose(drawn, flow.sample(curved, SHAPE, context, 7, range(3), 4, shift=3.0,
                                          guidance_scale=5.0))


def test_sample_depends_on_seed_and_index_only():
    context = randn(6, 2, 4)
    draw = lambda indices, seed=0, **how: flow.sample(curved, SHAPE, context[list(indices)], seed, indices, 4,
                                                      **how)
    whole = draw(range(6))
    torch.testing.assert_close(draw(range(6), batch_size=4), whole)
    torch.testing.assert_close(draw([5, 2]), whole[[5, 2]])
    assert not torch.allclose(draw([2], seed=1), whole[2:3])
    x_T = common.noise(SHAPE, 0, "sample", 0, range(6))
    torch.testing.assert_close(whole, flow.rollout(curved, x_T, context, 4))


def test_sample_gives_each_batch_its_own_condition():
    """Image-to-video: y belongs to the index, whatever the split."""
    field = lambda x, t, context, y=None: y.expand_as(x)
    y = randn(5, 1, 1, 1, 1)
    x_T = common.noise(SHAPE, 0, "sample", 0, range(5))
    got = flow.sample(field, SHAPE, torch.zeros(5, 2, 4), 0, range(5), 4, y=y, batch_size=2)
    torch.testing.assert_close(got, x_T - y)


def test_sample_runs_in_the_given_autocast_and_in_float32_without():
    """A matrix product shows the dtype that the model works in."""
    seen = []

    def dit(x, t, context, **image):
        seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return torch.zeros_like(x)

    for autocast, wanted in ((None, torch.float32),
                             (lambda: torch.autocast("cpu", torch.bfloat16), torch.bfloat16)):
        seen.clear()
        x = flow.sample(dit, (1, 1, 1, 1), torch.zeros(3, 1, 1), 0, range(3), 2, batch_size=2,
                        autocast=autocast)
        assert seen == [wanted] * 4 and x.dtype == torch.float32 and x.shape == (3, 1, 1, 1, 1)


def test_ranks_with_fewer_videos_sample_in_as_many_passes():
    """Batches of two: five videos need three, two videos make three as well, and get what they get alone."""
    calls = []

    def field(x, t, context):
        calls.append(len(x))
        return x * t.view(-1, 1, 1, 1, 1) + context.mean()

    found = {}
    for n in (5, 2):
        for most in (5, None):
            calls.clear()
            found[n, most] = flow.sample(field, SHAPE, torch.zeros(n, 2, 4), 0, range(n), 4, batch_size=2,
                                         max_rows=most)
            found[n, most, "calls"] = len(calls)
    assert found[5, 5, "calls"] == found[2, 5, "calls"] == 12 and found[2, None, "calls"] == 4
    assert torch.equal(found[2, 5], found[2, None]) and torch.equal(found[5, 5], found[5, None])
