"""Stage 0: the shipped small weights, from nothing but the embedded world.

The VAE; then a text encoder, which learns to name the words of captions; then the base generator with the
flow-matching loss of Eq. 2 on a mixture of clean and flawed clips, so that it makes both kinds, as generators trained
on web video do.

    python -m world.pretrain vae --output_dir runs/vae --max_train_steps 4500 --decay_steps 2500 --batch_size 32
    python -m world.pretrain text --output_dir runs/text --max_train_steps 400 --decay_steps 200 --batch_size 64
    python -m world.pretrain dit --vae runs/vae/vae --text_encoder runs/text/text_encoder --output_dir runs/base
    python -m world.pretrain dit --preset tiny-i2v --init runs/base/transformer --output_dir runs/base_i2v ...
    torchrun --nproc_per_node=8 -m world.pretrain dit --preset small-t2v --world small --vae ... --output_dir ...

Every stage can be stopped at any time and continued with --resume latest. Muon on the matrices of the blocks and AdamW
on the rest learns several times faster here than AdamW alone. The text encoder is trained first and then frozen: trained
together with the generator it collapses, because a word cannot lower the generator's loss before the generator can draw
what the word means (it told colours apart, but after 3,000 steps neither shapes nor directions).

Axes: b batch, c channels, f frames, h height, w width, l text tokens.
"""
import copy
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import common
import flow
from common import InputError, arg
from formats import disk, runs
from formats.codec import load_text_encoder, load_vae
from formats.video import from_pixels, to_pixels
from formats.weights import SHIPPED, WEIGHTS, save_module, stream_tensors
from model import PRESETS, VideoDiT, first_frame_condition, load_transformer
from world import annotator, scene
from world.text_encoder import TextEncoder
from world.vae import VideoVAE


@dataclass
class Config:
    stage: str = arg(..., "what to train", choices=("vae", "text", "dit"), positional=True)
    output_dir: str = arg("runs/pretrain", "run folder: metrics.jsonl, checkpoints, and the final weights")
    vae: str = arg(str(SHIPPED["t2v"] / "vae"), "VAE folder", only="stage dit")
    text_encoder: str = arg(str(SHIPPED["t2v"] / "text_encoder"), "text encoder folder", only="stage dit")
    init: str | None = arg(None, "transformer folder to start from, in place of random weights; a text-to-video one may start "
                           "tiny-i2v", only="stage dit")
    preset: str = arg("tiny-t2v", "size and task of the DiT, whose contexts the text encoder makes",
                      choices=tuple(p for p in PRESETS if "wan" not in p), only="stage text dit")
    world: str = arg("tiny", "size of the world's clips", choices=tuple(scene.SIZES), only="stage vae dit")
    clips: int = arg(131072, "clips rendered once and revisited epoch after epoch", above=0, only="stage vae dit")
    max_train_steps: int = arg(20000, "optimizer steps", above=0)
    batch_size: int = arg(128, "clips per step and rank", above=0)
    muon_learning_rate: float = arg(0.02, "Muon's, for the matrices inside blocks", above=0, only="stage vae dit")
    adam_learning_rate: float = arg(1.5e-3, "AdamW's, for everything else", above=0)
    warmup_steps: int = arg(200, "steps of linear warm-up", at_least=0)
    decay_steps: int = arg(6000, "last steps, over which both learning rates fall linearly to zero", at_least=0)
    ema: float = arg(0.999, "decay of the averaged weights that are sampled and saved", at_least=0, at_most=1)
    timestep_shift: float = arg(3.0, "t = s u / (1 + (s - 1) u), u ~ U(0,1): above 1, more of the noisy end", above=0,
                                only="stage dit")
    text_dropout: float = arg(0.1, "share of examples without text, for guidance", at_least=0, below=1, only="stage dit")
    vae_dim: int = arg(128, "width of the VAE", above=0, only="stage vae")
    kl_weight: float = arg(0.02, "weight of the KL term in the second half; a twentieth of it before", at_least=0,
                           only="stage vae")
    mixed_precision: str = runs.precision_flag()
    checkpointing_steps: int = arg(500, "steps between checkpoints", above=0)
    validation_steps: int = arg(1000, "steps between validations (qualified rate of 256 clips)", above=0)
    resume_from_checkpoint: str | None = arg(None, "'latest' or a checkpoint folder", alias="resume")
    seed: int = arg(0, "seed of weights, clips and draws", at_least=0)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz (Jordan et al., 2024), for weights of >= 2 dims.

    torch.optim.Muon takes matrices only and handles them one by one; this one flattens convolutions and batches
    equal shapes, which on small networks is most of the cost.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(list(params), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1)            # Nesterov
                by_shape.setdefault(update.shape, []).append((p, update))
            for shape, members in by_shape.items():
                updates = orthogonalise(torch.stack([update for _, update in members]))
                scale = max(1, shape[0] / shape[1]) ** 0.5
                for (p, _), update in zip(members, updates):
                    p.add_(update.view_as(p).to(p.dtype), alpha=-group["lr"] * scale)


def orthogonalise(m):
    """The nearest semi-orthogonal matrix of each [n, rows, columns], roughly: five quintic Newton-Schulz steps."""
    tall = m.shape[1] > m.shape[2]
    x = (m.mT if tall else m).to(torch.bfloat16 if runs.fast_precision() == "bf16" else torch.float32)     # bf16 is enough
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def make_optimizers(config, matrices, others):
    """[AdamW for the rest, Muon for the matrices]."""
    return [torch.optim.AdamW(others, lr=config.adam_learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
            Muon(matrices, lr=config.muon_learning_rate)]


def learning_rate_factor(config, step):
    """Warm-up, plateau, linear decay: a plateau can be prolonged by resuming with more steps."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return min(warmup, (config.max_train_steps - step) / max(1, config.decay_steps))


def train(config, modules, optimizers, loss_fn, validate, folders):
    """The loop of every stage. modules: {name: module} to train; loss_fn(step) -> {"loss": ..., ...};
    validate(averaged modules) -> metrics; folders: names of the modules that are also saved as weight folders."""
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
        state = {"modules": {n: m.state_dict() for n, m in modules.items()},
                 "averaged": {n: m.state_dict() for n, m in averaged.items()},
                 "optimizers": [o.state_dict() for o in optimizers]}
        writers = {n: (lambda path, m=averaged[n]: save_module(m, path)) for n in folders}
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
            metrics = validate(averaged, done)
        if done % 50 == 0 or metrics:
            now = time.perf_counter()
            log.log(done, **losses, **metrics, grad_norm=norm, learning_rate_factor=factor, seconds=now - seconds)
            bar.set_postfix({k: f"{float(v):.3f}" for k, v in {**losses, **metrics}.items() if k in
                             ("loss", "qualified", "clean_pass")})
        bar.update()
        if done % config.checkpointing_steps == 0 or done == config.max_train_steps:
            save(done)
    bar.close()
    return averaged


def save_final(config, runtime, averaged, names):
    """The averaged weights, in half precision: what is shipped."""
    for name in names if runtime.rank == 0 else ():
        save_module(averaged[name], Path(config.output_dir) / name, torch.float16)
        print(f"wrote {Path(config.output_dir) / name}")


# ---------------------------------------------------------------------------------------------- VAE

def train_vae(config, runtime):
    pool, prompts, _ = scene.make(min(config.clips, 16384), config.seed + 1000, "mixture", config.world)
    clean, clean_prompts, _ = scene.make(256, config.seed + 7, "clean", config.world, split="validation")
    vae = VideoVAE(dim=config.vae_dim).to(runtime.device)
    inner = [p for n, p in vae.named_parameters() if p.ndim == 5 and p[0, 0].numel() > 1]       # not the 1x1x1 ends
    rest = [p for p in vae.parameters() if all(p is not q for q in inner)]
    background = torch.tensor(scene.BACKGROUND, device=runtime.device).view(1, 3, 1, 1, 1) * 2 - 1

    def loss_fn(step):
        indices = runtime.indices(config.batch_size)
        picked = torch.randint(len(pool), (config.batch_size * runtime.world_size,),
                               generator=common.random_generator(config.seed, "vae", step))[indices]
        video = from_pixels(pool[picked].to(runtime.device))                                    # [b, 3, F, H, W]
        with runtime.autocast():
            mean, logvar = vae.posterior(video)
            eps = common.noise(mean.shape[1:], config.seed, "posterior", step, indices).to(mean)
            decoded = vae.decode_raw(mean + eps * (logvar / 2).exp()).float()
        mean, logvar = mean.float(), logvar.float()
        subject = ((video - background).abs().amax(1, keepdim=True) > 0.1).float()
        mse = ((decoded - video).square() * (1 + 9 * subject)).mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        weight = config.kl_weight * (0.05 if step < config.max_train_steps // 2 else 1.0)
        return {"loss": 10 * mse + weight * kl, "mse": mse.detach(), "kl": kl.detach()}

    @torch.no_grad()
    def validate(averaged, step):
        video = from_pixels(clean.to(runtime.device))
        decoded = to_pixels(averaged["vae"].decode_raw(averaged["vae"].posterior(video)[0])).cpu()
        judged = annotator.annotate(decoded, clean_prompts)
        return {"clean_pass": judged["qualified"].float().mean().item(),
                **{k: judged[k].quantile(0.99).item() for k in annotator.LIMITS}}

    averaged = train(config, {"vae": vae}, make_optimizers(config, inner, rest), loss_fn, validate, ("vae",))["vae"]
    with torch.no_grad():                                        # per-channel statistics: latents of unit scale
        means = torch.cat([averaged.posterior(from_pixels(pool[i:i + 256].to(runtime.device)))[0]
                           for i in range(0, min(len(pool), 4096), 256)])
        averaged.config["latents_mean"] = means.mean((0, 2, 3, 4)).tolist()
        averaged.config["latents_std"] = means.std((0, 2, 3, 4)).tolist()
    save_final(config, runtime, {"vae": averaged}, ("vae",))


# ---------------------------------------------------------------------------------------------- text encoder

def train_text(config, runtime):
    preset = PRESETS[config.preset]
    text = TextEncoder(text_len=preset["text_len"], text_dim=preset["text_dim"]).to(runtime.device)
    prompts = [sentence for sentences in scene.all_prompts("train").values() for sentence in sentences]
    held = [sentence for sentences in scene.all_prompts("validation").values() for sentence in sentences]
    words_of = lambda prompt: prompt.replace(",", "").split()
    words = sorted({word for prompt in prompts for word in words_of(prompt)})
    present = lambda batch: torch.tensor([[word in words_of(p) for word in words] for p in batch]).float()
    head = nn.Linear(preset["text_len"] * preset["text_dim"], len(words)).to(runtime.device)

    def loss_fn(step):
        picked = torch.randint(len(prompts), (config.batch_size * runtime.world_size,),
                               generator=common.random_generator(config.seed, "text", step))[runtime.indices(config.batch_size)]
        batch = [prompts[i] for i in picked.tolist()]
        logits = head(text.encode(batch).flatten(1))                                            # [b, words]
        return {"loss": F.binary_cross_entropy_with_logits(logits, present(batch).to(runtime.device))}

    @torch.no_grad()
    def validate(averaged, step):
        logits = averaged["head"](averaged["text_encoder"].encode(held).flatten(1)).cpu()
        return {"held_out_sentences_right": ((logits > 0) == (present(held) > 0)).all(1).float().mean().item()}

    optimizer = torch.optim.AdamW([*text.parameters(), *head.parameters()], lr=config.adam_learning_rate,
                                  betas=(0.9, 0.98), weight_decay=0.0)
    averaged = train(config, {"text_encoder": text, "head": head}, [optimizer], loss_fn, validate,
                     ("text_encoder",))
    save_final(config, runtime, averaged, ("text_encoder",))


# ---------------------------------------------------------------------------------------------- DiT

@torch.no_grad()
def world_latents(config, vae, runtime):
    """Latents [n, c, f, h, w] (float16) and prompts of config.clips mixture clips; kept in the run folder."""
    digest = hashlib.blake2b((Path(config.vae) / WEIGHTS).read_bytes(), digest_size=4).hexdigest()
    path = Path(config.output_dir) / f"latents-{config.world}-{config.seed}-{config.clips}-{digest}.safetensors"
    chunk = min(1024, config.clips)
    starts = range(0, config.clips, chunk)
    prompts = [p for i in starts for p in scene.draw_prompts(chunk, config.seed + 100_000 + i + 1)]
    if not path.exists() and runtime.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        latents = []
        for i in common.progress(starts, "render and encode"):
            videos, drawn, _ = scene.make(chunk, config.seed + 100_000 + i, "mixture", config.world)
            assert drawn == prompts[i:i + chunk]
            latents += [vae.encode(from_pixels(v.to(runtime.device))).half().cpu() for v in videos.split(128)]
        temporary = path.with_suffix(".tmp")
        stream_tensors({"latents": torch.cat(latents)}, temporary)
        disk.put(temporary, path)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return load_file(path)["latents"], prompts


def widened(weights, in_dim):
    """A text-to-video generator as the start of an image-to-video one, as Wan2.1's was: the patch embedding gets the
    channels of the first frame, with zeros, so that both compute the same at first."""
    patch = weights["patch_embedding.weight"]                                                   # [d, c, *patch]
    weights["patch_embedding.weight"] = F.pad(patch, (0, 0) * 3 + (0, in_dim - patch.shape[1])) \
        if in_dim > patch.shape[1] else patch
    return weights


def train_dit(config, runtime):
    vae = load_vae(config.vae).to(runtime.device)
    latents, prompts = world_latents(config, vae, runtime)
    preset = PRESETS[config.preset]
    dit = VideoDiT(**preset).to(runtime.device)
    if config.init:
        try:
            dit.load_state_dict(widened(load_transformer(config.init).state_dict(), dit.config["in_dim"]))
        except RuntimeError:
            raise InputError(f"--init {config.init}: not a {config.preset} transformer") from None
    text = load_text_encoder(config.text_encoder).to(runtime.device)
    matrices = [p for n, p in dit.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    chosen = set(map(id, matrices))
    others = [p for p in dit.parameters() if id(p) not in chosen]
    image_to_video = preset["model_type"] == "i2v"
    world_batch = config.batch_size * runtime.world_size
    held_prompts = scene.draw_prompts(256, config.seed + 5, split="validation")
    held_clips = scene.make(256, config.seed + 5 - 1, "clean", config.world, split="validation")

    distinct = sorted(set(prompts))
    number = {prompt: i for i, prompt in enumerate(distinct)}
    of_clip = torch.tensor([number[prompt] for prompt in prompts])                              # [n]
    contexts = torch.cat([text.encode(distinct[i:i + 64]) for i in range(0, len(distinct), 64)])   # [prompts, l, d]

    def loss_fn(step):
        indices = runtime.indices(config.batch_size)
        g = common.random_generator(config.seed, "dit", step)
        picked = torch.randint(len(latents), (world_batch,), generator=g)[indices]
        # Stratified t: one draw in each of the batch's equal slices of (0, 1), in random order.
        u = (torch.randperm(world_batch, generator=g) + torch.rand(world_batch, generator=g))[indices] / world_batch
        keep = (torch.rand(world_batch, generator=g)[indices] >= config.text_dropout).to(runtime.device)
        x0 = latents[picked].float().to(runtime.device)                                         # [b, c, f, h, w]
        x1 = torch.randn(world_batch, *x0.shape[1:], generator=g)[indices].to(runtime.device)
        t = flow.shift_time(u, config.timestep_shift).to(runtime.device)
        context = contexts[of_clip[picked].to(runtime.device)] * keep[:, None, None]             # [b, l, d]
        with runtime.autocast():
            v = dit(flow.add_noise(x0, x1, t), t, context, y=first_frame_condition(x0) if image_to_video else None)
        return {"loss": flow.flow_matching_loss(v, x0, x1)}

    @torch.no_grad()
    def validate(averaged, step):
        with runtime.autocast():
            context = text.encode(held_prompts).float()
            y = first_frame_condition(vae.encode(from_pixels(held_clips[0].to(runtime.device)))) if image_to_video \
                else None
            x1 = common.noise(latents.shape[1:], config.seed, "validation", 0, range(256)).to(runtime.device)
            x0 = flow.rollout(averaged["transformer"], x1, context, 16, y=y)
            videos = to_pixels(vae.decode(x0)).cpu()
        judged = annotator.annotate(videos, held_prompts)
        if runtime.rank == 0:
            stream_tensors({"videos": videos[:32].contiguous()}, Path(config.output_dir) / "samples.safetensors")
        return {k: judged[k].float().mean().item() for k in ("qualified", "adherent", "speed")} \
            | {"physical_ok": (judged["physical"] == 2).float().mean().item(),
               "deformity_ok": (judged["deformity"] == 2).float().mean().item()} \
            | {k: judged[k].median().item() for k in annotator.LIMITS}

    averaged = train(config, {"transformer": dit}, make_optimizers(config, matrices, others), loss_fn, validate,
                     ("transformer",))
    save_final(config, runtime, averaged, ("transformer",))


def main(config):
    runtime = common.setup(config.mixed_precision, config.seed)
    {"vae": train_vae, "text": train_text, "dit": train_dit}[config.stage](config, runtime)
    common.teardown()


if __name__ == "__main__":
    common.cli(main, Config, __doc__)
