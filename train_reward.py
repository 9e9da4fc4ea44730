"""Stage 1: train PAVRM, the latent reward model, on labelled videos that are noised to random t (Eq. 4-6).

    python train_reward.py                                  embedded world: samples are made and labelled
    torchrun --nproc_per_node=8 train_reward.py --data clips_encoded --holdout 100
    python train_reward.py --data round1_encoded round2_encoded     two rounds of labels
    python train_reward.py --data clips_encoded --fold 1/2          half of the labels
    python train_reward.py --data clips_encoded --fold 2/2 --seed 1     the other half, for a judge
    python train_reward.py --mismatched 0                       as in the paper: videos have their own prompts
    python train_reward.py --trunk_learning_rate 0              a probe on frozen features
    python train_reward.py --space rgb --frames_decoded all --output_dir runs/reward_rgb    judges pixels
    python train_reward.py --task i2v --output_dir runs/reward_i2v
    python train_reward.py --resume latest

Without --data the base generator makes samples, and the annotator labels them from their pixels. It grades
motion and form as qualified, partially qualified or unqualified. A sample is good if both are qualified and
it shows its prompt. It is bad if motion or form is unqualified, or if it does not show its prompt. The others
get no label and are left out. The samples stay in <output_dir>/samples. With --data the reward model learns
from your shards. Their labels are read beside the clips: from label.py's answers if there are any, else from
the metadata.

A share of each batch (--mismatched) is given another video's prompt and the label bad. This needs no further
labels. Without such prompts the paper's recipe learns to please the reward model and loses its prompt.

The script writes reward/, metrics.jsonl and report.json to <output_dir>. The report has the accuracy on
held-out videos, without noise and by t. It also says how well the reward model tells good videos with their
own prompt from the same videos with another video's prompt. With --space rgb the reward model trains on
finished videos; for the report it judges, at each t, the pixels of the clean video that is predicted from
x_t.

Axes: b batch, c channels, f frames, h height, w width, l text tokens.
"""
import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import common
import data
import experts
import flow
import refl_baseline
from common import InputError, arg
from families import of_config, training_defaults
from formats import runs
from formats.labels import BAD
from formats.shards import join
from formats.weights import TASKS, resolve_model, save_module, transformer_folder
from model import image_inputs, load_transformer
from pavrm import CRITERIA, PAVRM, POOLINGS
from scale import parallel
from validation import make_reward_report
from world import clips, scene


@dataclass
class Config(runs.Flags, parallel.Flags):
    task: str | None = arg(None, "t2v (text-to-video) or i2v (image-to-video). Without --model it chooses "
                           "the shipped generator; with a --model that can do both, it chooses the task. "
                           "Default: the --model's own task, else t2v", choices=TASKS)
    model: str | None = arg(None, "folder of another generator, with transformer/, vae/ and text_encoder/; "
                            "default: the shipped one for --task")
    space: str = arg("latent", "what the reward model judges: noisy latents (PAVRM) or pixels (RGB ReFL)",
                     choices=("latent", "rgb"))
    frames_decoded: str = arg("first", "which frames are decoded and judged: the first, or all",
                              choices=refl_baseline.FRAMES, only="space rgb")
    data: tuple[str, ...] = arg((), "labelled shards from `data.py encode`; several folders, for example one "
                                "for each round of labels, are used as one. Default: labelled samples of the "
                                "generator")
    labels: str | None = arg(None, "a labels.jsonl to use instead of the one beside the clips", only="data")
    bad: str = arg("both", "which clips are bad: both: those unqualified on both axes, motion and form (the "
                   "paper's A.2.3); any: those unqualified on at least one axis", choices=BAD, only="data")
    output_dir: str = arg("runs/reward", "run folder")
    world: str = arg("tiny", "size of the embedded world's clips: tiny is 32x32, mid is 48x48, small is "
                     "64x64 pixels", choices=tuple(scene.SIZES), only="!data")
    num_samples: int = arg(16384, "number of samples that the generator makes and the annotator labels",
                           above=0, only="!data")
    samples_dir: str | None = arg(None, "folder for these samples; those that are there already are used "
                                  "again. Default: <output_dir>/samples", only="!data")
    num_inference_steps: int = arg(16, "Euler steps per sample of the generator", above=0, only="!data")
    shift: float = arg(1.0, "moves the times of these Euler steps towards noise; 1 spaces them evenly",
                       above=0, at_most=100, only="!data")
    fold: str | None = arg(None, "i/n: use only the i-th of n parts of the labelled videos, for example 1/2 "
                           "for the reward model and 2/2 for a judge; default: all")
    holdout: int | None = arg(None, "number of labelled videos that are held out for the report; default: a "
                              "fifth, but at most 400", above=0)
    depth: int = arg(8, "K, how many of the generator's first blocks make the trunk (Table 8); the paper "
                     "uses 8 of 40, the shipped generator has only 8", above=0, only="space latent")
    pooling: str = arg("query_attention", "how the tokens are pooled into one vector (Eq. 5, Table 5)",
                       choices=tuple(POOLINGS), only="space latent")
    loss: str = arg("bce", "bce: cross-entropy (Eq. 6); bt: Bradley-Terry on the pairs of good and bad "
                    "videos in a batch (Table 7)", choices=tuple(CRITERIA))
    mismatched: float | None = arg(None, "share of each batch that gets the prompt of another video and the "
                                   "label bad; the paper has 0. Default: .25, or 0 if all prompts are alike",
                                   at_least=0, below=1)
    fixed_t: float | None = arg(None, "train at this noise level only (Fig. 3c); default: t is drawn from "
                                "U(0, 1)", at_least=0, below=1, only="space latent")
    learning_rate: float | None = arg(None, "AdamW's learning rate for query and head at the start; it falls "
                                      "to 0. Default: 2e-3, for Wan 1e-5", above=0)
    trunk_learning_rate: float | None = arg(None, "AdamW's learning rate for the trunk's blocks at the "
                                            "start; it falls to 0. With 0 they are frozen. Default: 1e-3, "
                                            "for Wan 1e-6", at_least=0, only="space latent")
    weight_decay: float = arg(0.01, "AdamW's weight decay", at_least=0)
    max_train_steps: int = arg(1600, "optimizer steps", above=0)
    batch_size: int | None = arg(None, "videos per step on each GPU, or on each group of --sequence_parallel "
                                 "GPUs; default: 64, for Wan 2", above=0)
    max_grad_norm: float = arg(1.0, "gradients are clipped to this norm", above=0)
    checkpointing_steps: int = arg(200, "steps between checkpoints", above=0)
    validation_steps: int = arg(200, "steps between reports on the held-out videos", above=0)
    seed: int = arg(0, "seed of the weights, the samples, the order of videos, t and noise", at_least=0)


def resolve(config):
    """Resolves the flags -> (the settings: config with the flags that were left open filled in; {flag: where
    its value comes from}; the shards of --data or None).

    Raises InputError for flags that cannot work together.
    """
    common.refuse(config, tuple(parallel.Flags.__annotations__) if config.space == "rgb" else (),
                  "with --space rgb")
    if config.trunk_learning_rate == 0:
        common.refuse(config, ("gradient_checkpointing",), "with --trunk_learning_rate 0")
    if config.loss == "bt" and config.batch_size == 1:
        raise InputError("--loss bt compares the good and the bad of a batch: it needs --batch_size 2 or "
                         "more")
    if config.labels and len(config.data) > 1:
        raise InputError("--labels replaces the labels.jsonl of one folder: with several folders of --data "
                         "leave it out")
    filled = dataclasses.replace(config)
    model = resolve_model(filled)                               # it also fills in filled.task
    dit_config = transformer_folder(model, filled.task)[1]
    shards = None
    if config.data:
        shards = join([data.Shards(folder).relabel(config.labels, config.bad) for folder in config.data])
    alike = shards is not None and not data.prompt_groups([row["prompt"] for row in shards.rows]).any()
    if alike and config.mismatched:
        raise InputError(f"--mismatched {config.mismatched}: all prompts are alike, so none is wrong: leave "
                         f"it out")
    settings, origin = common.settle(config, {
        "--model" if config.model else "the shipped generator": {"model": model, "task": filled.task},
        "the prompts, which are all alike" if alike else "our default":
            {"mismatched": 0.0 if alike else 0.25},
        of_config(dit_config).name: training_defaults(dit_config, "reward")})
    return settings, origin, shards


def main(config):
    runtime = common.setup(config.mixed_precision, config.seed, config.sequence_parallel)
    config, origin, shards = resolve(config)
    parallel.check(config)
    # Making samples and predicting clean videos need the whole generator. Otherwise only the trunk is read.
    whole = config.space == "rgb" or not config.data
    dit = load_transformer(config.model, load_now=whole, task=config.task).eval().requires_grad_(False)
    resume, state = runs.open_checkpoint(config)
    if not config.data:
        folder = config.samples_dir or Path(config.output_dir) / "samples"
        shards = clips.own_samples(folder, dit.to(runtime.device), config.model, config.num_samples,
                                   config.num_inference_steps, config.world, config.seed, runtime,
                                   config.shift)
    data.require_fit(shards, dit, config.model, labelled=bool(config.data))
    train, held_out = data.labelled_split(data.take_fold(shards, config.fold), config.holdout, config.seed)
    # prompts that are alike have equal numbers
    prompt_group = data.prompt_groups([shards.rows[i]["prompt"] for i in train.tolist()])
    good_share = (shards.labels[train] == 1).float().mean().item()
    if runtime.rank == 0:
        left_out = len(shards) - len(train) - len(held_out)
        print(shards.label_note)
        print(f"{len(train)} videos to train on ({good_share:.0%} good), {len(held_out)} held out, "
              f"{left_out} left out, because they are unlabelled or neither good nor bad")
        print(data.describe_split(shards, train, held_out))

    torch.manual_seed(config.seed)      # so that query and head do not depend on whether samples were drawn
    if config.space == "latent":
        reward = PAVRM.from_generator(experts.trunk_of(dit), config.depth, config.pooling)
        parallel.shard(reward, runtime, config)
        reward_fn = reward                                      # (x_t, t, context, **image) -> logits [b]
        groups = reward.parameter_groups(config.trunk_learning_rate, config.learning_rate)
        dit.to("meta")                                         # PAVRM has its own copy of the blocks it needs
    else:
        reward = refl_baseline.PixelReward(config.frames_decoded, dit.config["text_dim"]).to(runtime.device)
        vae = refl_baseline.load_decoder(config.model, dit.config["out_dim"]).to(runtime.device)
        reward_fn = partial(refl_baseline.predicted_reward, reward, vae, dit.to(runtime.device))
        groups = [{"params": list(reward.parameters()), "lr": config.learning_rate}]
    for group in groups:
        group["initial_lr"] = group["lr"]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    params = [p for p in reward.parameters() if p.requires_grad]
    if resume:
        parallel.load_state(resume, state, reward, optimizer)
    global_batch = config.batch_size * runtime.world_size // config.sequence_parallel
    measure = make_reward_report(reward_fn, shards.batch(held_out), dit.config, config, runtime)
    log = runs.start_run(config, state["step"] if resume else None, shards)     # now the run folder changes
    common.print_settings(config, origin)
    bar = common.progress(config.max_train_steps, "reward model", initial=state["step"])
    report = None

    for step in range(state["step"], config.max_train_steps):
        clock = time.perf_counter()
        indices = runtime.indices(config.batch_size)                    # places in the global batch
        rows = data.order(len(train), config.seed, step, indices, global_batch)
        batch = shards.batch(train[rows])
        wrong = common.uniform(config.seed, "mismatched", step, indices) < config.mismatched        # [b]
        if wrong.any():     # bad, however good they look, as they do not show what their new prompt asks for
            others = data.other_rows(prompt_group, rows, config.seed, step, indices)
            batch["context"][wrong] = shards.batch(train[others[wrong]], ["context"])["context"]
            batch["label"][wrong] = 0
        x0, context = batch["latents"].to(runtime.device), batch["context"].to(runtime.device)
        labels = batch["label"].to(runtime.device)                      # [b]
        t = common.uniform(config.seed, "t", step, indices).to(runtime.device)                # Eq. 6: U(0, 1)
        if config.space == "rgb":
            t = torch.zeros_like(t)                             # pixels learn from finished videos
        elif config.fixed_t is not None:
            t = torch.full_like(t, config.fixed_t)
        x1 = common.noise(x0.shape[1:], config.seed, "x1", step, indices).to(runtime.device)
        with runtime.autocast():
            logits = reward_fn(flow.add_noise(x0, x1, t), t, context,
                               **image_inputs(dit.config, batch, runtime.device))                   # [b]
        loss = CRITERIA[config.loss](logits, labels)
        common.check_finite(loss, "the loss", step + 1)
        loss.backward()
        grad_norm = common.average_and_clip_gradients(params, config.max_grad_norm, step + 1)
        lr_factor = 1 - step / config.max_train_steps
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        optimizer.step()
        optimizer.zero_grad()                                           # gradients make room for the report

        done = step + 1
        accuracy = ((logits >= 0) == (labels == 1)).float().mean()
        means = torch.stack([loss.detach(), accuracy])
        common.all_reduce_mean_([means])
        metrics = {}
        if done % config.validation_steps == 0 or done == config.max_train_steps:
            report, metrics = measure()
        log.log(done, loss=means[0], accuracy=means[1], grad_norm=grad_norm,
                learning_rate=config.learning_rate * lr_factor, seconds=time.perf_counter() - clock,
                **metrics)
        bar.set_postfix(loss=f"{means[0]:.3f}", accuracy=f"{means[1]:.2f}")
        bar.update()
        if done % config.checkpointing_steps == 0 or done == config.max_train_steps:
            parallel.save_checkpoint(config.output_dir, done, {"reward": partial(save_module, reward)},
                                     reward, optimizer, config)
    report = report or measure()[0]                 # a run resumed at its last step had nothing left to train
    bar.close()
    save_module(reward, Path(config.output_dir) / "reward")
    if runtime.rank == 0:
        runs.write_json(Path(config.output_dir) / "report.json", {
            **report, "trained_on": len(train), "held_out": len(held_out), "good_share": good_share})
        print(f"wrote {Path(config.output_dir) / 'reward'} and report.json")
    common.teardown()


if __name__ == "__main__":
    common.cli(main, Config, __doc__)
