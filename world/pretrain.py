"""Stage 0: trains the shipped small weights from random ones, on nothing but the embedded world.

There are three stages, in this order:
1. `vae`: the VAE.
2. `text`: the text encoder, which learns to name the words of captions.
3. `dit`: the base generator, with the flow-matching loss of Eq. 2. Its clips are a mixture of clean and
   flawed ones, so that it makes both kinds, as generators trained on web video do.

    python -m world.pretrain vae --output_dir runs/vae \\
        --max_train_steps 4500 --decay_steps 2500 --batch_size 32
    python -m world.pretrain text --output_dir runs/text \\
        --max_train_steps 400 --decay_steps 200 --batch_size 64
    python -m world.pretrain dit --output_dir runs/base \\
        --vae runs/vae/vae --text_encoder runs/text/text_encoder
    python -m world.pretrain dit --preset tiny-i2v --init runs/base/transformer --output_dir runs/base_i2v ...
    python -m world.pretrain dit --preset tiny-i2v-pinned --init runs/base/transformer --output_dir ...
    python -m world.pretrain dit --expert low --init runs/base/transformer --output_dir runs/low ...
    torchrun --nproc_per_node=8 -m world.pretrain dit --preset small-t2v --world small --vae ... ...

checkpoints/README.md has the commands of the shipped weights. Every stage can be stopped at any time and
continued with `--resume latest`.

Muon trains the matrices of the blocks, and AdamW trains the rest. Here this learns several times faster than
AdamW alone. The text encoder is trained first and then frozen, because it collapses when it is trained
together with the generator: a word cannot lower the generator's loss before the generator can draw what the
word means. (After 3,000 steps such an encoder told colours apart, but neither shapes nor directions.)

Axes: b batch, c channels, f frames, h height, w width, l text tokens.
"""
import copy
import hashlib
import itertools
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import common
import experts
import flow
from common import InputError, arg
from families import load_text_encoder, load_vae
from formats import disk, runs
from formats.video import from_pixels, to_pixels
from formats.weights import SHIPPED, WEIGHTS, save_module, stream_tensors
from model import PRESETS, VideoDiT, image_inputs, load_transformer
from world import annotator, scene
from world.text_encoder import TextEncoder
from world.vae import VideoVAE

GENERATORS = {name: config for name, config in PRESETS.items() if "wan" not in name}
GENERATORS["tiny-i2v-pinned"] = PRESETS["tiny-t2v"] | {"model_type": "i2v"}     # see model.is_pinned


@dataclass
class Config:
    stage: str = arg(..., "what to train: the VAE, the text encoder or the generator",
                     choices=("vae", "text", "dit"), positional=True)
    output_dir: str = arg("runs/pretrain", "run folder: metrics.jsonl, checkpoints and the final weights")
    vae: str = arg(str(SHIPPED["t2v"] / "vae"), "folder of the VAE", only="stage dit")
    text_encoder: str = arg(str(SHIPPED["t2v"] / "text_encoder"), "folder of the text encoder",
                            only="stage dit")
    init: str | None = arg(None, "folder of the transformer to start from; the presets for image-to-video "
                           "can also start from a text-to-video one. Default: random weights",
                           only="stage dit")
    preset: str = arg("tiny-t2v", "size and task of the generator; in stage text, of the generator that the "
                      "text encoder is for", choices=tuple(GENERATORS), only="stage text dit")
    world: str = arg("tiny", "size of the clips, by its name in SIZES of world/scene.py",
                     choices=tuple(scene.SIZES), only="stage vae dit")
    clips: int = arg(131072, "number of clips, which are rendered once and used in every epoch; stage vae "
                     "uses at most 16384", above=0, only="stage vae dit")
    max_train_steps: int = arg(20000, "optimizer steps", above=0)
    batch_size: int = arg(128, "clips (in stage text: captions) per step and process", above=0)
    muon_learning_rate: float = arg(0.02, "learning rate of Muon, for the matrices inside blocks", above=0,
                                    only="stage vae dit")
    adam_learning_rate: float = arg(1.5e-3, "learning rate of AdamW, for everything else", above=0)
    warmup_steps: int = arg(200, "number of steps in which the learning rates rise linearly from zero",
                            at_least=0)
    decay_steps: int = arg(6000, "number of last steps, in which the learning rates fall linearly to zero",
                           at_least=0)
    ema: float = arg(0.999, "decay of the averaged weights, which are the weights that are validated and "
                     "saved", at_least=0, at_most=1)
    timestep_shift: float = arg(3.0, "s in t = s u / (1 + (s - 1) u), where u is uniform in (0, 1); with s "
                                "above 1, noisy times are drawn more often", above=0, only="stage dit")
    expert: str | None = arg(None, "which of two experts the generator becomes: it learns only the times on "
                             "its side of --boundary. Default: one generator for all times",
                             choices=experts.NAMES, only="stage dit")
    boundary: float = arg(0.5, "the time from which on the high-noise expert works", above=0, below=1,
                          only="stage dit, expert")
    text_dropout: float = arg(0.1, "share of examples that are trained without text, so that guidance can be "
                              "used", at_least=0, below=1, only="stage dit")
    vae_dim: int = arg(128, "width of the VAE", above=0, only="stage vae")
    kl_weight: float = arg(0.02, "weight of the KL term in the second half of the steps; in the first half "
                           "it is a twentieth of this", at_least=0, only="stage vae")
    mixed_precision: str = runs.precision_flag()
    checkpointing_steps: int = arg(500, "steps between checkpoints", above=0)
    validation_steps: int = arg(1000, "steps between validations, which in stages vae and dit use 256 clips",
                                above=0)
    resume_from_checkpoint: str | None = arg(None, "continue from a checkpoint: its folder, or 'latest' (the "
                                             "last one in --output_dir)", alias="resume")
    seed: int = arg(0, "seed of weights, clips and random draws", at_least=0)


VALIDATED = 256     # clips per validation


class Muon(torch.optim.Optimizer):
    """Momentum with an update that Newton-Schulz orthogonalises (Jordan et al., 2024), for weights of 2 or
    more axes.

    torch.optim.Muon accepts only matrices and handles them one by one. This class also accepts convolutions,
    which it flattens, and handles all weights of one shape at once. On small networks that saves most of the
    time.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(list(params), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]).flatten(1)                    # Nesterov's
                by_shape.setdefault(update.shape, []).append((p, update))
            for shape, members in by_shape.items():
                updates = orthogonalise(torch.stack([update for _, update in members]))
                scale = max(1, shape[0] / shape[1]) ** 0.5
                for (p, _), update in zip(members, updates):
                    p.add_(update.view_as(p).to(p.dtype), alpha=-group["lr"] * scale)


def orthogonalise(m):
    """For each matrix of m [n, rows, columns] about the nearest semi-orthogonal matrix, by five steps of
    Newton-Schulz."""
    dtype = torch.float32
    if runs.fast_precision() == "bf16":                         # which is precise enough
        dtype = torch.bfloat16
    tall = m.shape[1] > m.shape[2]
    if tall:
        m = m.mT
    x = m.to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    if tall:
        x = x.mT
    return x


def make_optimizers(config, matrices, others):
    """-> [AdamW for `others`, Muon for `matrices`], two lists of parameters."""
    return [torch.optim.AdamW(others, lr=config.adam_learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
            Muon(matrices, lr=config.muon_learning_rate)]


def learning_rate_factor(config, step):
    """The factor of both learning rates at a step. It rises linearly, stays at 1, and falls linearly.

    To prolong the plateau, resume with a larger --max_train_steps.
    """
    rise = (step + 1) / max(1, config.warmup_steps)
    fall = (config.max_train_steps - step) / max(1, config.decay_steps)
    return min(1.0, rise, fall)


def train(config, modules, optimizers, loss_fn, validate, folders):
    """The training loop of every stage. Returns the averaged modules {name: module}.

    modules: {name: module} to train. optimizers: AdamW and, if there is a second one, Muon. loss_fn(step) ->
    {"loss": the loss, other scalars to log}. validate(averaged modules) -> {metric: value}. folders:
    the names of the modules that checkpoints also hold as folders of weights. Raises InputError if --resume
    names a checkpoint of another stage.
    """
    params = [p for module in modules.values() for p in module.parameters()]
    averaged = {name: copy.deepcopy(module).requires_grad_(False) for name, module in modules.items()}
    resume, state = runs.open_checkpoint(config)
    start = state["step"]
    if resume:
        try:
            for name in modules:
                modules[name].load_state_dict(state["modules"][name])
                averaged[name].load_state_dict(state["averaged"][name])
            for optimizer, saved in zip(optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
        except (KeyError, ValueError, RuntimeError):
            raise InputError(f"--resume_from_checkpoint {resume}: not a checkpoint of this stage") from None
    log = runs.start_run(config, start if resume else None)
    bar = common.progress(config.max_train_steps, config.stage, initial=start)
    seconds = time.perf_counter()

    def save(step):
        state = {"modules": {name: module.state_dict() for name, module in modules.items()},
                 "averaged": {name: module.state_dict() for name, module in averaged.items()},
                 "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        writers = {name: partial(save_module, averaged[name]) for name in folders}
        runs.save_checkpoint(config.output_dir, step, writers, state, config, keep=2)

    for step in range(start, config.max_train_steps):
        losses = loss_fn(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses["loss"].backward()
        losses = {name: value.detach() for name, value in losses.items()}
        norm = common.average_and_clip_gradients(params, 1.0, step)
        factor = learning_rate_factor(config, step)
        for optimizer, peak in zip(optimizers, (config.adam_learning_rate, config.muon_learning_rate)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
        decay = min(config.ema, (step + 1) / (step + 10))
        for name, module in modules.items():
            torch._foreach_lerp_(list(averaged[name].parameters()), list(module.parameters()), 1 - decay)

        done = step + 1
        metrics = {}
        if done % config.validation_steps == 0 or done == config.max_train_steps:
            metrics = validate(averaged)
        if done % 50 == 0 or metrics:
            now = time.perf_counter()
            log.log(done, **losses, **metrics, grad_norm=norm, learning_rate_factor=factor,
                    seconds=now - seconds)
            shown = {}
            for name, value in {**losses, **metrics}.items():
                if name in ("loss", "qualified", "clean_pass"):
                    shown[name] = f"{float(value):.3f}"
            bar.set_postfix(shown)
        bar.update()
        if done % config.checkpointing_steps == 0 or done == config.max_train_steps:
            save(done)
    bar.close()
    return averaged


def save_final(config, runtime, averaged, names):
    """Writes the averaged weights of the modules `names` in half precision, as they are shipped."""
    if runtime.rank > 0:
        return
    for name in names:
        folder = Path(config.output_dir) / name
        save_module(averaged[name], folder, torch.float16)
        print(f"wrote {folder}")


# ---- VAE
def train_vae(config, runtime):
    """Trains the VAE. The loss is the squared error of pixels, in which the subject counts ten times, plus a
    KL divergence."""
    pool, prompts, _ = scene.make(min(config.clips, 16384), config.seed + 1000, "mixture", config.world)
    clean, clean_prompts, _ = scene.make(VALIDATED, config.seed + 7, "clean", config.world,
                                         split="validation")
    vae = VideoVAE(dim=config.vae_dim).to(runtime.device)
    kernels, others = [], []
    for p in vae.parameters():
        if p.ndim == 5 and p[0, 0].numel() > 1:                 # not the 1x1x1 convolutions at both ends
            kernels.append(p)
        else:
            others.append(p)
    background = torch.tensor(scene.BACKGROUND, device=runtime.device).view(1, 3, 1, 1, 1) * 2 - 1

    def loss_fn(step):
        indices = runtime.indices(config.batch_size)
        g = common.random_generator(config.seed, "vae", step)
        picked = torch.randint(len(pool), (config.batch_size * runtime.world_size,), generator=g)[indices]
        video = from_pixels(pool[picked].to(runtime.device))                                # [b, 3, F, H, W]
        with runtime.autocast():
            mean, logvar = vae.posterior(video)
            eps = common.noise(mean.shape[1:], config.seed, "posterior", step, indices).to(mean)
            decoded = vae.decode_raw(mean + eps * (logvar / 2).exp()).float()
        mean, logvar = mean.float(), logvar.float()
        subject = ((video - background).abs().amax(1, keepdim=True) > 0.1).float()
        mse = ((decoded - video).square() * (1 + 9 * subject)).mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        weight = config.kl_weight
        if step < config.max_train_steps // 2:
            weight = config.kl_weight * 0.05
        return {"loss": 10 * mse + weight * kl, "mse": mse.detach(), "kl": kl.detach()}

    @torch.no_grad()
    def validate(averaged):
        mean, _ = averaged["vae"].posterior(from_pixels(clean.to(runtime.device)))
        annotations = annotator.annotate(to_pixels(averaged["vae"].decode_raw(mean)).cpu(), clean_prompts)
        metrics = {"clean_pass": annotations["qualified"].float().mean().item()}
        for name in annotator.LIMITS:
            metrics[name] = annotations[name].quantile(0.99).item()
        return metrics

    optimizers = make_optimizers(config, kernels, others)
    averaged = train(config, {"vae": vae}, optimizers, loss_fn, validate, ("vae",))
    vae = averaged["vae"]
    with torch.no_grad():                       # normalised with these, each latent channel has unit scale
        means = torch.cat([vae.posterior(from_pixels(pool[i:i + 256].to(runtime.device)))[0]
                           for i in range(0, min(len(pool), 4096), 256)])
        vae.config["latents_mean"] = means.mean((0, 2, 3, 4)).tolist()
        vae.config["latents_std"] = means.std((0, 2, 3, 4)).tolist()
    save_final(config, runtime, averaged, ("vae",))


# ---- text encoder
def words_of(prompt):
    return prompt.replace(",", "").split()


def train_text(config, runtime):
    """Trains the text encoder with a linear head on the context, which learns to say which words the caption
    has. The head is not saved."""
    preset = GENERATORS[config.preset]
    text = TextEncoder(text_len=preset["text_len"], text_dim=preset["text_dim"]).to(runtime.device)
    prompts = [*itertools.chain(*scene.all_prompts("train").values())]
    held_out = [*itertools.chain(*scene.all_prompts("validation").values())]
    words = sorted({word for prompt in prompts for word in words_of(prompt)})

    def present(batch):
        """Which of `words` each prompt has, 1 or 0: [b, words]"""
        return torch.tensor([[word in words_of(prompt) for word in words] for prompt in batch]).float()

    head = nn.Linear(preset["text_len"] * preset["text_dim"], len(words)).to(runtime.device)

    def loss_fn(step):
        g = common.random_generator(config.seed, "text", step)
        picked = torch.randint(len(prompts), (config.batch_size * runtime.world_size,), generator=g)
        batch = [prompts[i] for i in picked[runtime.indices(config.batch_size)].tolist()]
        logits = head(text.encode(batch).flatten(1))                                            # [b, words]
        return {"loss": F.binary_cross_entropy_with_logits(logits, present(batch).to(runtime.device))}

    @torch.no_grad()
    def validate(averaged):
        logits = averaged["head"](averaged["text_encoder"].encode(held_out).flatten(1)).cpu()
        right = ((logits > 0) == (present(held_out) > 0)).all(1)                                # every word
        return {"held_out_sentences_right": right.float().mean().item()}

    optimizer = torch.optim.AdamW([*text.parameters(), *head.parameters()], lr=config.adam_learning_rate,
                                  betas=(0.9, 0.98), weight_decay=0.0)
    averaged = train(config, {"text_encoder": text, "head": head}, [optimizer], loss_fn, validate,
                     ("text_encoder",))
    save_final(config, runtime, averaged, ("text_encoder",))


# ---- generator
@torch.no_grad()
def world_latents(config, vae, runtime):
    """Latents [n, c, f, h, w] (float16) and prompts of config.clips clips of the mixture, rounded up to whole
    chunks.

    Rank 0 makes the latents once and keeps them in the run folder.
    """
    digest = hashlib.blake2b((Path(config.vae) / WEIGHTS).read_bytes(), digest_size=4).hexdigest()
    name = f"latents-{config.world}-{config.seed}-{config.clips}-{digest}.safetensors"
    path = Path(config.output_dir) / name
    chunk = min(1024, config.clips)
    starts = range(0, config.clips, chunk)
    prompts = []
    for i in starts:
        prompts += scene.draw_prompts(chunk, config.seed + 100_000 + i + 1)
    if not path.exists() and runtime.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        latents = []
        for i in common.progress(starts, "render and encode"):
            videos, drawn, _ = scene.make(chunk, config.seed + 100_000 + i, "mixture", config.world)
            assert drawn == prompts[i:i + chunk]
            for some in videos.split(128):
                latents.append(vae.encode(from_pixels(some.to(runtime.device))).half().cpu())
        temporary = path.with_suffix(".tmp")
        stream_tensors({"latents": torch.cat(latents)}, temporary)
        disk.put(temporary, path)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return load_file(path)["latents"], prompts


def widened(weights, in_dim):
    """Weights of a generator, with a patch embedding for `in_dim` channels.

    So an image-to-video generator can start from a text-to-video one, as Wan2.1's did. The weights of the new
    channels, which hold the first frame, are zero, so that at first both generators compute the same.
    """
    patch = weights["patch_embedding.weight"]                                               # [d, c, *patch]
    missing = in_dim - patch.shape[1]
    if missing > 0:
        weights["patch_embedding.weight"] = F.pad(patch, (0, 0) * 3 + (0, missing))
    return weights


def train_dit(config, runtime):
    """Trains the generator by flow matching, Eq. 2, on latents of the mixture."""
    vae = load_vae(config.vae).to(runtime.device)
    latents, prompts = world_latents(config, vae, runtime)
    preset = GENERATORS[config.preset]
    dit = VideoDiT(**preset).to(runtime.device)
    if config.init:
        try:
            dit.load_state_dict(widened(load_transformer(config.init).state_dict(), dit.config["in_dim"]))
        except RuntimeError:
            raise InputError(f"--init {config.init}: not a {config.preset} transformer") from None
    text = load_text_encoder(config.text_encoder).to(runtime.device)
    matrices, others = [], []
    for name, p in dit.named_parameters():
        if name.startswith("blocks.") and p.ndim == 2:
            matrices.append(p)
        else:
            others.append(p)
    global_batch = config.batch_size * runtime.world_size
    # `make` draws its prompts with its seed + 1, so the clips below show these prompts.
    held_out_prompts = scene.draw_prompts(VALIDATED, config.seed + 5, split="validation")
    held_out_clips, _, _ = scene.make(VALIDATED, config.seed + 4, "clean", config.world, split="validation")

    distinct = sorted(set(prompts))
    number = {prompt: i for i, prompt in enumerate(distinct)}
    of_clip = torch.tensor([number[prompt] for prompt in prompts])                              # [n]
    contexts = torch.cat([text.encode(distinct[i:i + 64]) for i in range(0, len(distinct), 64)])   # [p, l, d]

    def loss_fn(step):
        indices = runtime.indices(config.batch_size)
        g = common.random_generator(config.seed, "dit", step)
        picked = torch.randint(len(latents), (global_batch,), generator=g)[indices]
        # Stratified times: (0, 1) is cut into as many equal slices as the batch has clips, and each clip gets
        # a time from its own slice, at random.
        slices = torch.randperm(global_batch, generator=g)
        u = (slices + torch.rand(global_batch, generator=g))[indices] / global_batch
        keep = (torch.rand(global_batch, generator=g)[indices] >= config.text_dropout).to(runtime.device)
        x0 = latents[picked].float().to(runtime.device)                                     # [b, c, f, h, w]
        x1 = torch.randn(global_batch, *x0.shape[1:], generator=g)[indices].to(runtime.device)
        t = flow.shift_time(u, config.timestep_shift).to(runtime.device)
        if config.expert:
            t = experts.times_of(config.expert, t, config.boundary, config.seed, step)
        context = contexts[of_clip[picked].to(runtime.device)] * keep[:, None, None]            # [b, l, d]
        image = image_inputs(dit.config, {"latents": x0}, runtime.device)
        with runtime.autocast():
            v = dit(flow.add_noise(x0, x1, t), t, context, **image)
        return {"loss": flow.flow_matching_loss(v, x0, x1, given=flow.given_frames(image))}

    @torch.no_grad()
    def validate(averaged):
        with runtime.autocast():
            context = text.encode(held_out_prompts).float()
            clean = vae.encode(from_pixels(held_out_clips.to(runtime.device)))
            image = image_inputs(dit.config, {"latents": clean}, runtime.device)
            x1 = common.noise(latents.shape[1:], config.seed, "validation", 0, range(VALIDATED))
            x0 = flow.rollout(averaged["transformer"], x1.to(runtime.device), context, 16, **image)
            videos = to_pixels(vae.decode(x0)).cpu()
        annotations = annotator.annotate(videos, held_out_prompts)
        if runtime.rank == 0:
            path = Path(config.output_dir) / "samples.safetensors"
            stream_tensors({"videos": videos[:32].contiguous()}, path)
        metrics = {}
        for name in ("qualified", "adherent", "speed"):
            metrics[name] = annotations[name].float().mean().item()
        for axis in annotator.AXES:
            metrics[f"{axis}_ok"] = (annotations[axis] == 2).float().mean().item()
        for name in annotator.LIMITS:
            metrics[name] = annotations[name].median().item()
        return metrics

    optimizers = make_optimizers(config, matrices, others)
    averaged = train(config, {"transformer": dit}, optimizers, loss_fn, validate, ("transformer",))
    save_final(config, runtime, averaged, ("transformer",))


def main(config):
    runtime = common.setup(config.mixed_precision, config.seed)
    stages = {"vae": train_vae, "text": train_text, "dit": train_dit}
    stages[config.stage](config, runtime)
    common.teardown()


if __name__ == "__main__":
    common.cli(main, Config, __doc__, prog="python -m world.pretrain")
