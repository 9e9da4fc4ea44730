"""Stage 1: train PAVRM, the latent reward model, on labelled videos noised to random t (Eq. 4-6).

    python train_reward.py                                          the embedded world: samples, labels, trains
    torchrun --nproc_per_node=8 train_reward.py --data clips_encoded --holdout 100
    python train_reward.py --trunk_learning_rate 0                  a probe on frozen features
    python train_reward.py --resume latest

Without --data the base generator makes its own samples, the annotator labels them from pixels (good: qualified on both
axes and true to the prompt; bad: unqualified; in between: dropped), and they stay in <output_dir>/samples. With --data
they are your shards, every clip labelled 0 or 1. Writes <output_dir>/reward, metrics.jsonl and report.json.

Axes: b batch, c channels, f frames, h height, w width, l text tokens.
"""
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import common
import data
import flow
import world
from common import InputError, arg
from model import load_transformer
from pavrm import LOSSES, POOLINGS, PAVRM, interval_metrics
from weights import save_module


@dataclass
class Config:
    model: str = arg(str(Path(__file__).parent / "checkpoints"),
                     "generator: a folder with transformer/ (and text_encoder/, vae/ when it makes the samples)")
    data: str | None = arg(None, "labelled shards from `data.py encode`; without, the generator's own samples")
    output_dir: str = arg("runs/reward", "run folder")
    size: str = arg("tiny", "size of the embedded world (without --data)", choices=tuple(world.SIZES))
    num_samples: int = arg(4096, "own samples to make and label (without --data)", above=0)
    num_inference_steps: int = arg(16, "Euler steps of each own sample", above=0)
    holdout: int = arg(400, "labelled videos kept for the report", above=0)
    depth: int = arg(4, "K, blocks of the generator in the trunk; the paper has 8 of 40, Table 8", above=0)
    pooling: str = arg("query_attention", "how tokens become one vector (Eq. 5; others for Table 5)",
                       choices=tuple(POOLINGS))
    loss: str = arg("bce", "Eq. 6, or Bradley-Terry on the batch's pairs (Table 7)", choices=tuple(LOSSES))
    fixed_t: float | None = arg(None, "train at this one t in place of t ~ U(0, 1) (Fig. 3c)", at_least=0, at_most=1)
    learning_rate: float = arg(1e-3, "AdamW's for query and head; the paper has 1e-5 at 14B", above=0)
    trunk_learning_rate: float = arg(3e-4, "AdamW's for the trunk's blocks (1e-6 at 14B); 0 freezes them", at_least=0)
    weight_decay: float = arg(0.01, "AdamW's", at_least=0)
    max_train_steps: int = arg(600, "optimizer steps", above=0)
    batch_size: int = arg(64, "videos per step and rank", above=0)
    max_grad_norm: float = arg(1.0, "gradients are clipped to this norm", above=0)
    mixed_precision: str = arg("bf16", "autocast dtype", choices=("no", "bf16"))
    gradient_checkpointing: bool = arg(False, "recompute the trunk's blocks in the backward pass")
    checkpointing_steps: int = arg(200, "steps between checkpoints", above=0)
    validation_steps: int = arg(200, "steps between reports on the held-out videos", above=0)
    resume_from_checkpoint: str | None = arg(None, "'latest' or a checkpoint folder", alias="resume")
    seed: int = arg(0, "seed of weights, samples, order, t and noise", at_least=0)


def main(config):
    runtime = common.setup(config.mixed_precision, config.seed)
    generator = load_transformer(config.model).to(runtime.device).eval().requires_grad_(False)
    resume = config.resume_from_checkpoint and common.resolve_checkpoint(config.output_dir,
                                                                         config.resume_from_checkpoint)
    state = common.load_state(resume) if resume else None
    shards = data.Shards(config.data) if config.data else data.own_samples(
        Path(config.output_dir) / "samples", generator, config.model, config.num_samples, config.num_inference_steps,
        config.size, config.seed, runtime)
    shards.require(channels=generator.config["out_dim"], labelled=bool(config.data),
                   context_shape=(min(shards.context_shape[0], generator.config["text_len"]),
                                  generator.config["text_dim"]), image_dim=generator.config["image_dim"])
    labelled = (shards.labels >= 0).nonzero()[:, 0]
    if config.holdout >= len(labelled):
        raise InputError(f"--holdout {config.holdout} leaves nothing to train on: there are {len(labelled)} labelled "
                         "videos")
    train, held = (labelled[part] for part in data.split(len(labelled), config.holdout, config.seed))
    if any(len(shards.labels[part].unique()) < 2 for part in (train, held)):
        raise InputError(f"{shards.folder}: training or held-out videos are all of one label; a reward model needs "
                         "both 0 and 1")
    share = (shards.labels[train] == 1).float().mean().item()
    if runtime.rank == 0:
        print(f"{len(train)} videos to train on ({share:.0%} good), {len(held)} held out, "
              f"{len(shards) - len(labelled)} in between dropped")

    torch.manual_seed(config.seed)
    pavrm = PAVRM.from_generator(generator, config.depth, config.pooling).to(runtime.device)
    pavrm.trunk.gradient_checkpointing = config.gradient_checkpointing
    del generator
    optimizer = torch.optim.AdamW(pavrm.parameter_groups(config.trunk_learning_rate, config.learning_rate),
                                  weight_decay=config.weight_decay)
    params = [p for p in pavrm.parameters() if p.requires_grad]
    start = 0
    if resume:
        try:
            pavrm.load_state_dict(state["pavrm"])
            optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError, RuntimeError):
            raise InputError(f"--resume_from_checkpoint {resume}: not a checkpoint of this script with these "
                             "--model, --depth and --pooling") from None
        start = state["step"]
        for group, rate in zip(optimizer.param_groups, (config.learning_rate, config.trunk_learning_rate)):
            group["lr"], group["weight_decay"] = rate, config.weight_decay      # the flags of this call hold
    common.start_run(config, start if resume else None)
    log = common.MetricsLog(config.output_dir, start if resume else None)
    held_batch = {k: v.to(runtime.device) for k, v in shards.batch(held).items() if k != "prompt"}
    global_batch = config.batch_size * runtime.world_size
    bar = common.progress(config.max_train_steps, "reward model", initial=start)
    report = {}

    def measure():
        found = interval_metrics(
            pavrm, held_batch["latents"], held_batch["context"], held_batch["label"], config.seed,
            batch_size=4 * config.batch_size, autocast=runtime.autocast,
            **data.image_inputs(pavrm.trunk.config, held_batch, runtime.device))
        if runtime.rank == 0:
            show(found, bar)
        return found

    for step in range(start, config.max_train_steps):
        clock = time.perf_counter()
        indices = runtime.indices(config.batch_size)                    # places in the global batch
        batch = shards.batch(train[data.order(len(train), config.seed, step, indices, global_batch)])
        x0, context = batch["latents"].to(runtime.device), batch["context"].to(runtime.device)
        labels = batch["label"].to(runtime.device)                      # [b]
        t = common.uniform(config.seed, "t", step, indices).to(runtime.device)                      # Eq. 6: U(0, 1)
        if config.fixed_t is not None:
            t = torch.full_like(t, config.fixed_t)
        x1 = common.noise(x0.shape[1:], config.seed, "x1", step, indices).to(runtime.device)
        with runtime.autocast():
            logits = pavrm(flow.add_noise(x0, x1, t), t, context,
                           **data.image_inputs(pavrm.trunk.config, batch, runtime.device))          # [b]
        loss = LOSSES[config.loss](logits, labels)
        common.check_finite(loss, "the loss", step + 1)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = common.clip_gradients(params, config.max_grad_norm, step + 1)
        optimizer.step()

        done = step + 1
        accuracy = ((logits >= 0) == (labels == 1)).float().mean()
        means = torch.stack([loss.detach(), accuracy])
        common.average([means])
        measured = done % config.validation_steps == 0 or done == config.max_train_steps
        if measured:
            report = measure()
        log.log(done, loss=means[0], accuracy=means[1], grad_norm=grad_norm, learning_rate=config.learning_rate,
                seconds=time.perf_counter() - clock,
                **{f"held_out_{name}": sum(values) / len(values) for name, values in report.items() if measured})
        bar.set_postfix(loss=f"{means[0]:.3f}", accuracy=f"{means[1]:.2f}")
        bar.update()
        if done % config.checkpointing_steps == 0 or done == config.max_train_steps:
            common.save_checkpoint(config.output_dir, done, {"reward": lambda path: save_module(pavrm, path)},
                                   {"pavrm": pavrm.state_dict(), "optimizer": optimizer.state_dict()}, config, keep=2)
    report = report or measure()                                # resumed at its last step: nothing was left to train
    bar.close()
    if runtime.rank == 0:
        save_module(pavrm, Path(config.output_dir) / "reward")
        common.write_json(Path(config.output_dir) / "report.json",
                          {**report, "trained_on": len(train), "held_out": len(held), "good_share": share})
        print(f"wrote {Path(config.output_dir) / 'reward'} and report.json")
    common.teardown()


def show(report, bar):
    """The paper's table: the five intervals of t and their average."""
    ranges = "".join(f"  ({k / 5:.1f},{(k + 1) / 5:.1f}]" for k in range(5))
    bar.write(f"{'held out, t in':18}{ranges}   average")
    for name, values in report.items():
        bar.write(f"{name:18}" + "".join(f"{v:11.3f}" for v in values) + f"{sum(values) / len(values):10.3f}")


if __name__ == "__main__":
    common.cli(main, Config, __doc__)
