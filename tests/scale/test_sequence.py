"""--sequence_parallel: two and four ranks that share their clips against one process, by hand and as the
scripts run."""
import json

import pytest
import torch
import torch.distributed as dist
from launch import ROOT, torchrun
from tiny import DRIVER, apart, command, generator, metrics, one_line, run, weights

import common
from formats.weights import save_module
from model import export_transformer
from pavrm import PAVRM
from scale import sequence

pytestmark = pytest.mark.usefixtures("cpu")
STEADY = ["--recipe", "steady", "--rollout_passes", "2"]


@pytest.mark.parametrize("ranks, cases", [(2, 2), (4, 19)])
def test_a_shared_clip_is_a_whole_one(ranks, cases):
    """Loss, reward, samples, gradients and weights after AdamW; t2v, i2v and a pinned first frame;
    checkpointing, adapters, poolings, fsdp, compiled blocks."""
    done = torchrun(ranks, ROOT / "tests/scale/compare_sequence.py")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == cases, done.stderr[-3000:]
    for row in rows:
        assert max(row["found"].values()) < 1e-5, row


# ---- the exchange itself
def test_two_ranks_by_hand(monkeypatch):
    """What each of two ranks holds of 3 tokens; the exchange of heads is that of the numbers written down
    here."""
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: group)
    ranks = [sequence.Sequence(r, 3) for r in range(2)]
    x = torch.arange(3.).view(1, 3, 1) + 1
    assert [one.mine(x).flatten().tolist() for one in ranks] == [[1, 2], [3, 0]]
    assert [one.mine(x[0], dim=0).flatten().tolist() for one in ranks] == [[1, 2], [3, 0]]
    sent = []
    monkeypatch.setattr(sequence, "all_to_all_single_autograd", lambda x, *a: sent.append(x) or x)
    for one in ranks:  # q [b, m, k = 2, e = 1]: token and head as digits
        q = one.mine(torch.tensor([[[11., 12], [21, 22], [31, 32]]]))[..., None]
        one.heads(q, q, q)
    # to rank 0 the first head, to rank 1 the second
    assert sent[0][:, 0].flatten(1).tolist() == [[11, 21], [12, 22]]
    assert sent[1][:, 0].flatten(1).tolist() == [[31, 0], [32, 0]]
    monkeypatch.setattr(sequence, "all_to_all_single_autograd", lambda x,
                        *a: torch.stack([s[0] for s in sent]))
    q, k, v = ranks[0].heads(q, q, q)
    assert q.shape == (1, 3, 1, 1) and q.flatten().tolist() == k.flatten().tolist() == [11, 21, 31]


def test_groups_draw_as_ranks_did():
    """Four ranks that share their clips in pairs have the examples of two."""
    cpu = torch.device("cpu"), torch.float32
    shared = [common.Runtime(rank, 4, *cpu, 2) for rank in range(4)]
    pairs = [common.Runtime(rank // 2, 2, *cpu) for rank in range(4)]
    for micro in range(3):
        assert [one.indices(3, micro) for one in shared] == [one.indices(3, micro) for one in pairs]


# ---- the scripts
@pytest.fixture(scope="module")
def runs(folder):
    """one-*: one process, batch 8. shared-*: four ranks in pairs, batch 4 each pair. Both ways' last
    iteration by the other: one-to-shared-*, shared-to-one-*. A generator of 4 heads, latents of 2x4x4: 8
    tokens."""
    dit = generator(num_heads=4)
    export_transformer(dit, folder / "four/transformer")
    save_module(PAVRM.from_generator(dit, 1), folder / "four/reward")
    flags = {"prfl": [*STEADY, "--gradient_checkpointing"], "reward": [], "rwr": [], "grpo": []}
    shared = lambda name, output, *more: command(folder, name, output, "--model", str(folder / "four"),
                                                 *flags[name],
                                                 "--sequence_parallel", "2", *more, batch_size=4)
    for name in flags:
        run(*command(folder, name, f"one-{name}", "--model", str(folder / "four"), *flags[name]))
    jobs = [shared("prfl", "shared-prfl", "--parallel", "fsdp"),
            shared("reward", "shared-reward", "--parallel", "fsdp"),
            shared("rwr", "shared-rwr"), shared("grpo", "shared-grpo")]
    jobs += [shared("prfl", "one-to-shared-prfl", "--parallel", "fsdp", "--resume",
                    f"{folder}/one-prfl/checkpoint-000004")]
    torchrun(4, "-c", DRIVER, json.dumps(jobs))
    run(*command(folder, "prfl", "shared-to-one-prfl", "--model", str(folder / "four"), *flags["prfl"],
                 "--resume",
                 f"{folder}/shared-prfl/checkpoint-000004"))


@pytest.mark.parametrize("name", ["prfl", "reward", "rwr", "grpo"])
def test_four_ranks_in_pairs_are_one_process(folder, runs, name):
    alone, together = (weights(folder, name, f"{kind}-{name}") for kind in ("one", "shared"))
    torch.manual_seed(0)
    start = generator(num_heads=4)
    if name == "reward":
        torch.manual_seed(0)
        start = PAVRM.from_generator(start, 2)
    assert apart(alone, together) < 0.005 * apart(alone, start.state_dict())
    for row, other in zip(metrics(folder, f"one-{name}"), metrics(folder, f"shared-{name}"), strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_a_checkpoint_of_one_layout_resumes_in_another(folder, runs):
    last = metrics(folder, "one-prfl")[-1]
    for way in ("one-to-shared", "shared-to-one"):
        assert metrics(folder, f"{way}-prfl")[-1] == pytest.approx(last, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name, flags, words", [
    ("prfl", ["--sequence_parallel", "2"], "--sequence_parallel 2 spreads a clip over processes: start with "
                                           "torchrun"),
    ("reward", ["--sequence_parallel", "2"], "--sequence_parallel 2 spreads a clip over processes: start "
                                             "with torchrun"),
    ("reward_rgb", ["--sequence_parallel", "2"], "--sequence_parallel means nothing with --space rgb"),
    ("prfl", ["--sequence_parallel", "0"], "--sequence_parallel must be a finite number above 0")])
def test_bad_input_is_one_line(folder, capsys, name, flags, words):
    with pytest.raises(SystemExit) as stop:
        run(*command(folder, name, "bad-run", *flags))
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and one_line(stderr) and words in stderr, stderr


def test_ranks_that_do_not_divide_are_refused_with_those_that_do(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 12)
    cpu = torch.device("cpu"), torch.float32
    with pytest.raises(common.InputError, match="does not divide the 12 processes: choose one of 1, 2, 3, 4, "
                                                "6, 12$"):
        sequence.check(5)
    with pytest.raises(common.InputError, match="does not divide the generator's 4 heads: choose one of 1, "
                                                "2, 4$"):
        sequence.spread(generator(num_heads=4), common.Runtime(0, 12, *cpu, 6))
