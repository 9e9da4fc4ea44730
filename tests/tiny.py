"""A tiny random generator with its reward models, labelled shards, and runs of the training scripts on them.
The fixture `folder` of conftest.py holds them on disk. Everything runs on the CPU."""
import json

import launch
import torch
from safetensors.torch import load_file

import common
import data
import sample
import train_align
import train_reward
from formats.weights import WEIGHTS
from model import VideoDiT

TINY = dict(in_dim=16, out_dim=16, dim=24, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16, text_dim=8,
            text_len=3)
STEPS = 5                                                       # iterations of a run
RUNS = {name: (script, part, flags.split()) for name, script, part, flags in (  # part: the folder it writes
    ("reward", "train_reward", "reward", "--holdout 8 --depth 2"),
    ("reward_rgb", "train_reward", "reward", "--holdout 8 --space rgb --frames_decoded all"),
    ("prfl", "train_align", "transformer", "--method prfl --recipe paper"),
    ("steady", "train_align", "transformer", "--method prfl --recipe steady --rollout_passes 2"),
    ("refl", "train_align", "transformer", "--method refl --recipe paper"),
    ("sft", "train_align", "transformer", "--method sft"),
    ("rwr", "train_align", "transformer", "--method rwr --num_samples 24"),
    ("nft", "train_align", "transformer", "--method nft --group_size 2 --nft_beta 0.5 --inner_updates 2"),
    ("grpo", "train_align", "transformer", "--method grpo --group_size 4 --inner_updates 2"))}


def generator(**changes):
    torch.manual_seed(0)
    dit = VideoDiT(**TINY | changes)
    torch.nn.init.normal_(dit.head.head.weight, std=0.1)        # Wan's own start is zero
    return dit


def write_data(folder, channels=16, context=(3, 8), labels=None, **extra):
    g = torch.Generator().manual_seed(1)
    labels = [i % 2 for i in range(32)] if labels is None else labels
    latents = torch.randn(32, channels, 2, 4, 4, generator=g)
    contexts = torch.randn(32, *context, generator=g)
    data.write_shards(folder, latents, contexts, labels, [f"prompt {i}" for i in range(32)], **extra)


def command(folder, name, output, *more, batch_size=8):
    """(script, flags) of a run of RUNS; more: further flags, which may give one of these another value."""
    script, _, flags = RUNS[name]
    if script == "train_align":
        flags = [*flags, "--num_validation", "0"]
        if name != "sft":
            flags += ["--num_inference_steps", "4"]
    if "--data=" in more:                                  # the generator's own samples, or the world's clips
        more, shards = [word for word in more if word != "--data="], []
    else:
        shards = ["--data", str(folder / "data")]
    return script, [*flags, "--model", str(folder / "generator"), *shards,
                    "--output_dir", str(folder / output), "--mixed_precision", "no",
                    "--batch_size", str(batch_size), "--max_train_steps", str(STEPS),
                    "--checkpointing_steps", "2", *more]


def run(script, argv):
    """In this process: importing torch costs more than such a run."""
    module = {"train_reward": train_reward, "train_align": train_align, "sample": sample}[script]
    common.cli(module.main, module.Config, module.__doc__, argv)


def weights(folder, name, output):
    return load_file(folder / output / RUNS[name][1] / WEIGHTS)


def metrics(folder, output):
    rows = [json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def distance(a, b):
    """The largest difference of any weight."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def apart(a, b):
    """The Euclidean distance of all weights. Where a gradient is near zero, rounding decides which way AdamW
    moves a weight: such a weight would decide `distance`, and hardly counts here."""
    assert a.keys() == b.keys()
    return sum((a[name] - b[name]).double().square().sum().item() for name in a) ** 0.5


# For `launch.torchrun(ranks, "-c", DRIVER, json.dumps([(script, flags), ...]))`.
DRIVER = """
import json, sys, common, train_align, train_reward
leave, common.teardown = common.teardown, lambda: None          # one process group for all runs
for script, argv in json.loads(sys.argv[1]):
    common.cli(sys.modules[script].main, sys.modules[script].Config, "", argv)
leave()
"""
KILLER = """
import json, os, signal, sys, torch, common, train_align, train_reward
save, count = torch.save, 0

def save_or_die(state, file):
    global count
    count += 1
    if count == 2:                                              # half way through the second checkpoint
        file.write(b"PK")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)

torch.save = save_or_die
for script, argv in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        common.cli(sys.modules[script].main, sys.modules[script].Config, "", argv)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


def kill(jobs):
    """Runs each of jobs [(script, flags)] until kill -9 ends it in the middle of its second checkpoint."""
    done = launch.python("-c", KILLER, json.dumps(jobs))
    assert done.returncode == 0, done.stderr[-3000:]


def same(a, b):
    """Bit for bit, for tensors in dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def one_line(stderr):
    return stderr.count("\n") == 1 and stderr.startswith("error: ") and len(stderr) < 600
