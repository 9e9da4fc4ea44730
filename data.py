"""Turns clips into latent shards (check, encode), and reads training batches from them (the loader).

    python data.py check clips --model Wan2.1                    says what is wrong, clip by clip
    python data.py encode clips --out latents                    encodes with the shipped VAE and text encoder
    python data.py encode clips --out latents --size "832*480" --frames 81 --fps 16 --model Wan2.1
                                                                 uses all encoders of that folder
                                                                 (requirements-wan.txt)
    torchrun --nproc_per_node=8 data.py encode ...               makes the same folder, byte for byte
    python data.py check --help                                  lists the flags; so does encode --help

Run encode again when clips, captions or the list have changed: it encodes new and changed clips, and leaves
out those that are no longer listed.

A data folder holds clips and metadata.jsonl (or .csv) with one row per clip: file_name (or video, file),
prompt (or text, caption) and perhaps label (or reward). A label is 1 good or 0 bad; a missing one means
unlabelled and is never read as 0. formats/metadata.py reads the lists, formats/video.py the
clips, and formats/shards.py the shards.

Axes: b batch, c latent channels, F video frames (4k + 1), f latent frames (k + 1), H W pixels, h w latents,
l text tokens, d text width, n clips, m CLIP image tokens.
"""
import collections
import functools
import itertools
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import common
import families
from common import InputError, arg
from families import load_image_encoder, load_text_encoder, load_vae, save_null_context
from formats import disk, encoders, fingerprint, lock
from formats.metadata import SUFFIXES, printable, read_listing, replace_text
from formats.shards import Shards, join_equal, write_shards
from formats.video import Facts, from_pixels, read_clip_facts
from formats.weights import SHIPPED, require_fetched, transformer_folder
from model import is_pinned, load_transformer
from world.scene import meaning

FEWEST = 5  # the fewest frames of a clip to train on; they make two latent frames
# Limits on what encode holds in memory: clips decoded ahead, pixels of a batch, bytes of a shard, and bytes
# of a clip if no flag gives its size and length. A clip of 81 frames of 832x480 has 97 MB as pixels, 388 MB
# as float32, and 17 MB in a shard of Wan2.1.
AHEAD, BATCH_PIXELS, SHARD_BYTES, CLIP_BYTES = 2, 2 ** 24, 2 ** 27, 2 ** 27


# ---- shards and the model that reads them
def require_fit(shards, dit, model=None, labelled=False):
    """Raises InputError, with the remedy, unless a VideoDiT can be trained on the Shards. Prints notes about
    what may surprise.

    Contexts may be shorter than the generator's text_len, because the generator pads them. model: the folder
    whose encoders must be those that made the shards. labelled: both labels must occur. """
    folder = shards.folder
    if not len(shards):
        raise InputError(f"{folder}: none of its clips is listed any more: encode again")
    if any(side % patch for side, patch in zip(shards.latent_shape[1:], dit.config["patch_size"])):
        raise InputError(f"{folder}: latents are {list(shards.latent_shape[1:])}, which the model's patches "
                         "of "
                         f"{list(dit.config['patch_size'])} do not divide: encode with another --size")
    length = min(shards.context_shape[0], dit.config["text_len"])
    shards.require(dit.config["out_dim"], (length, dit.config["text_dim"]), labelled, dit.config["image_dim"])
    made_by, notes = shards.settings.get("encoders", {}), []
    if shards.settings and not made_by:
        notes.append("does not say which encoders made it: see to it that they are the model's")
    if made_by:
        found = encoders.find_encoders(model) if model else {}
        is_image_to_video = dit.config["model_type"] == "i2v"
        for role, path in found.items():
            if role in made_by and made_by[role] != fingerprint.of_encoder(path, role):
                raise InputError(f"{folder}: was encoded with another {role} than {path}: encode with "
                                 f"--model {model}")
        if families.of_config(dit.config).blank_frames and "condition" not in shards.shapes:
            raise InputError(f"{folder}: lacks the given first frame as Wan2.1's image-to-video models take "
                             f"it: encode with --model {model or 'and its folder'}")
        if not found:
            why = f"{model} holds none" if model else "there is no --model"
            notes.append(f"its encoders cannot be compared with the model's: {why}")
        fps = families.sampling_defaults(dit.config)["fps"]
        if abs(shards.fps / fps - 1) > .02:
            notes.append(f"clips run at {shards.fps:g} frames per second, the model's own videos at "
                         f"{fps:g}: it will learn "
                         "another speed; encode with --fps")
        if "condition" in shards.shapes and not is_image_to_video:
            notes.append("was encoded for image-to-video; this model takes no first frame")
    if common.rank() == 0:
        for note in notes:
            print(f"note: {folder}: {note}", flush=True)


# ---- the loader
@functools.lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    return torch.randperm(n, generator=common.random_generator(seed, "order", epoch))


def order(n, seed, step, indices, global_batch):
    """-> int64 [len(indices)]: which of n examples are at the places `indices` of a step's global batch.

    Every epoch has its own permutation. Nothing depends on the number of ranks, and there is no state to
    save.
    """
    places = [step * global_batch + int(i) for i in indices]
    return torch.stack([_permutation(n, seed, place // n)[place % n] for place in places])


def prompt_groups(prompts):
    """int64 [n], in which prompts that are alike have equal numbers: each of them fits the others' videos.

    Captions of the embedded world are alike if they ask for the same colour, shape and direction. Other
    captions are alike if they have the same words. """
    groups = {}
    numbers = [groups.setdefault(meaning(prompt), len(groups)) for prompt in prompts]
    return torch.tensor(numbers, dtype=torch.int64)


def other_rows(groups, rows, seed, step, indices):
    """For each of `rows` [b], a random row whose prompt is not alike -> int64 [b]. groups [n]:
    `prompt_groups` of all rows.

    Row j's draw depends only on (seed, step, indices[j]). Raises InputError if all prompts are alike.
    """
    by_group = groups.argsort(stable=True)                      # rows of the same group are neighbours
    first = torch.searchsorted(groups[by_group], groups[rows])
    size = torch.bincount(groups)[groups[rows]]
    others = len(groups) - size                                 # rows of all other groups
    if not others.all():
        raise InputError("all prompts are alike: there is no mismatched prompt to train on or to test with")
    # A place counts the rows outside the own group. From place `first` on, the own group's `size` rows come
    # before the row in by_group.
    place = (common.uniform(seed, "other prompt", step, indices).double() * others).long()
    return by_group[torch.where(place < first, place, place + size)]


def split(n, holdout, seed):
    """-> (train, held-out), sorted int64 indices; holdout: a share below 1, or a number of examples."""
    count = round(n * holdout) if holdout < 1 else int(holdout)
    if not 0 <= count < n:
        raise InputError(f"a holdout of {holdout} leaves nothing to train on: there are {n} examples")
    shuffled = torch.randperm(n, generator=common.random_generator(seed, "split"))
    return shuffled[count:].sort().values, shuffled[:count].sort().values


# A split keeps clips of one prompt together if there are at least FEWEST_PROMPTS prompts, with at most
# MOST_CLIPS clips of each on average.
FEWEST_PROMPTS, MOST_CLIPS = 10, 16


def groups_to_keep(shards):
    """-> [int64 [n], ...]: for each clip the number of its group, which a split should keep together. The
    grouping to try first comes first.

    Copies of a clip always belong together. Clips of one prompt belong together if there are enough prompts.
    But a generator's own samples come from no files, and their prompts are drawn again and again, so among
    them only copies belong together. """
    prompts = prompt_groups([row["prompt"] for row in shards.rows])
    number = len(prompts.unique())
    if any(shards.contents) and number >= FEWEST_PROMPTS and len(prompts) <= MOST_CLIPS * number:
        return [join_equal(shards.copies.tolist(), prompts.tolist()), shards.copies]
    return [shards.copies]


def take_fold(shards, fold):
    """-> the shards, in which all clips outside `fold` are now unlabelled; fold None changes nothing.

    "i/n" is the i-th of n random parts. No two parts share a clip, or a copy of a clip, or, if there are
    enough prompts, a prompt. Parts do not depend on labels, so later labels move no clip to another part.
    There is one exception: a part with fewer than two clips of a label gets some from another part. With so
    few labels, train on all parts before you add more labels. Raises InputError. """
    if fold is None:
        return shards
    i, n = (int(part) if part.isdecimal() else 0 for part in f"{fold}/x".split("/")[:2])
    if fold.count("/") != 1 or not 1 <= i <= n or n < 2:
        raise InputError(f"--fold {fold}: must be i/n, as 1/2 and 2/2 are, with i from 1 to n and n of at "
                         "least 2")
    order = torch.randperm(len(shards.labels), generator=common.random_generator(0, "fold"))
    for groups in groups_to_keep(shards):
        part = deal(groups, order, n)
        # with a few large groups, parts would be too unequal
        if 2 * n * torch.bincount(part, minlength=n).min() >= len(order):
            break
    for label in (0, 1):
        mine = shards.labels == label
        counts = torch.bincount(part[mine], minlength=n)
        while counts.min() < 2 <= counts.max() - counts.min():
            donors = (mine & (part == counts.argmax())).nonzero()[:, 0]
            moved = next((groups == groups[j] for j in donors
                          if (mine & (groups == groups[j])).sum() < counts.max() - counts.min()), None)
            if moved is None:
                break
            part[moved] = counts.argmin()
            counts = torch.bincount(part[mine], minlength=n)
    shards.labels = shards.labels.masked_fill(part != i - 1, -1)
    return shards


def deal(groups, order, n):
    """-> int64 [len(groups)]: the part, 0 to n - 1, of each clip. Whole groups are dealt out, one after
    another, each to the part that has the fewest clips. A group's turn comes with the first of its clips in
    `order`."""
    part, sizes, members = torch.empty_like(groups), [0] * n, collections.defaultdict(list)
    for i in order.argsort().tolist():
        members[groups[i].item()].append(i)                     # a dict keeps the order of its first entries
    for clips in members.values():
        smallest = sizes.index(min(sizes))
        part[clips] = smallest
        sizes[smallest] += len(clips)
    return part


def labelled_split(shards, holdout, seed):
    """Splits the labelled clips -> (train, held-out), sorted int64 indices.

    holdout: how many clips are held out; None: a fifth, but at most 400. Both sides have a like share of
    each label, and at least one clip of it. Copies of a clip are on the same side, and so are clips of one
    prompt if there are enough prompts; because of that, fewer clips than `holdout` may be held out. Raises
    InputError, with the remedy, if there is no such split. """
    where = [(shards.labels == label).nonzero()[:, 0] for label in (0, 1)]
    counts = [len(part) for part in where]
    for label, count in enumerate(counts):
        if count < 2:
            raise InputError(f"{shards.folder}: {count} clips are labelled {label}; training and held-out "
                             "videos need one each: "
                             f"label more (label.py, or `label` in the clips' metadata)")
    holdout = min(400, max(2, sum(counts) // 5)) if holdout is None else holdout
    if not 2 <= holdout <= sum(counts) - 2:
        why = "leaves nothing to train on" if holdout >= sum(counts) else "is too few or too many"
        raise InputError(f"--holdout {holdout} {why}: of {sum(counts)} labelled videos 2 to "
                         f"{sum(counts) - 2} can be held out, "
                         f"because both parts need each label: try --holdout {max(2, sum(counts) // 5)}")
    bad = round(holdout * counts[0] / sum(counts))
    bad = min(max(bad, 1, holdout - counts[1] + 1), counts[0] - 1, holdout - 1)
    order = []
    for label in (0, 1):
        generator = common.random_generator(f"{seed} {label}", "split")
        order += where[label][torch.randperm(counts[label], generator=generator)].tolist()
    for groups in groups_to_keep(shards):
        held = hold_out_groups(groups.tolist(), shards.labels.tolist(), order, [bad, holdout - bad])
        if 2 * len(held) >= holdout:
            break
    if not held:
        raise InputError(f"{shards.folder}: clips of one label are copies of one another, and training and "
                         "held-out videos need "
                         "different ones: label more (label.py, or `label` in the clips' metadata)")
    labelled = torch.cat(where).sort().values
    is_held = torch.isin(labelled, torch.tensor(held))
    return labelled[~is_held], labelled[is_held]


def hold_out_groups(groups, labels, order, wanted):
    """-> [clips to hold out]. Whole groups are taken in `order`, as long as no more than wanted[label] clips
    of each label are held out; [] if both labels cannot occur on both sides. groups, labels: the group and
    the label of each clip. order: the labelled clips."""
    members = collections.defaultdict(list)
    for i in order:
        members[groups[i]].append(i)
    size = {}                                          # group -> [number of its clips labelled 0, labelled 1]
    for group, clips in members.items():
        size[group] = [sum(labels[i] == label for i in clips) for label in (0, 1)]
    total, taken, held = [sum(counts[label] for counts in size.values()) for label in (0, 1)], [0, 0], []

    def take(group):
        held.append(group)
        for label in (0, 1):
            taken[label] += size[group][label]

    for group in members:
        if all(taken[label] + size[group][label] <= wanted[label] for label in (0, 1)):
            take(group)
    for label in (0, 1):
        if not taken[label]:  # no group was small enough: take the smallest that training can spare
            spare = [group for group in members if group not in held and size[group][label]
                     and all(taken[k] + size[group][k] < total[k] for k in (0, 1))]
            if not spare:
                return []
            take(min(spare, key=lambda group: sum(size[group])))
    return [i for group in held for i in members[group]]


def without_relatives(shards, train, held):
    """-> `train` (int64 indices) without copies of the clips in `held` and, if there are enough prompts,
    without clips that share a prompt with them. Raises InputError if nothing is left."""
    for groups in groups_to_keep(shards):
        left = train[~torch.isin(groups[train], groups[held])]
        if 2 * len(left) >= len(train):
            break
    if not len(left):
        raise InputError(f"{shards.folder}: all clips are copies of those held out, so nothing is left to "
                         "train on")
    return left


def count_relatives(copies, prompts):
    """A phrase that counts copies among clips, and clips of one prompt. copies, prompts: the group of each
    clip, int64 [n]."""
    copied, shared = (int((torch.bincount(groups)[groups] > 1).sum()) for groups in (copies, prompts))
    return (f"{copied} of {len(copies)} clips are copies of others, {shared} share their prompt with others "
            f"({len(prompts.unique())} prompts)")


def describe_split(shards, train, held):
    """A sentence that counts copies and prompts in the two parts of `labelled_split`."""
    both, prompts = torch.cat([train, held]), prompt_groups([row["prompt"] for row in shards.rows])
    on_both_sides = set(prompts[train].tolist()) & set(prompts[held].tolist())
    return (f"{count_relatives(shards.copies[both], prompts[both])}; no copy is on both sides of the split, "
            "and "
            f"{len(on_both_sides)} prompts are")


# ---- commands
@dataclass
class Check:
    folder: str = arg(..., "folder with clips and metadata", positional=True)
    size: str | None = arg(None, "W*H in pixels: clips are scaled until they cover it, then cropped at their "
                           "centre; default: the clips' own size")
    frames: int | None = arg(None, "number of frames of each clip, 4k + 1; default: as many as the clip has, "
                             "cut to 4k + 1. All clips must come to the same number", at_least=FEWEST)
    fps: float | None = arg(None, "frames per second (16 for Wan2.1, 24 for Wan2.2 TI2V-5B). Faster clips "
                            "lose frames, and frames of slower clips are repeated; default: the clips' own",
                            above=0)
    model: str | None = arg(None, "folder of the generator that will use the clips; its vae/, text_encoder/ "
                            "and, if it has one, image_encoder/ are used. Default: the shipped generator")
    text_encoder: str | None = arg(None, "folder of a text encoder of the embedded world, or of "
                                   "transformers' UMT5 (with its tokenizer there or in the folder beside "
                                   "it), to use where --model is not given; default: the shipped one")
    multiple = 16       # width and height must be multiples of this number; `resolve_encoders` sets it


@dataclass
class Clip:
    """A clip as it is listed, and later as it was read."""
    name: str                               # of the file or, if the row has a problem, where the row is
    row: dict | None                        # of the list; None if its file_name cannot be used
    problem: str | None                     # why the clip cannot be used
    kind: list | None = None                # [W, H, F, fps]
    video: torch.Tensor | None = None       # uint8 [F, H, W, 3]
    facts: Facts | None = None
    content: str | None = None              # fingerprint of the file


def parse_size(config, multiple=1):
    """--size "832*480" or "832x480" -> (832, 480), or None. Checks --frames, too. multiple: the number of
    which both sides must be multiples (16, or 32 for Wan2.2 TI2V-5B); 1 while the model is not known. Raises
    InputError."""
    sides = (config.size or f"{multiple}*{multiple}").replace("x", "*").split("*")
    sides = [int(side) if side.isdecimal() else 0 for side in sides]
    if len(sides) != 2 or not all(sides):
        raise InputError(f"--size must be W*H, such as 832*480, got {config.size}")
    if any(side % multiple for side in sides):
        raise InputError(f"--size must be W*H, both multiples of {multiple}, got {config.size}")
    if config.frames and config.frames % 4 != 1:
        raise InputError(f"--frames must be 4k + 1, as {config.frames // 4 * 4 + 1} is, got {config.frames}")
    return tuple(sides) if config.size else None


def list_clips(folder):
    """-> ([Clip of each row of the folder's list], [notes to print]). If several rows name one file, the
    first one counts."""
    listed, notes = read_listing(folder)
    clips, seen = [], set()
    for place, row, problem in listed:
        if problem:
            clips.append(Clip(place, row, problem))
            continue
        path = os.path.normpath(row["file_name"])               # a/../b.mp4 is b.mp4
        clips.append(Clip(row["file_name"], row, "listed twice" if path in seen else None))
        seen.add(path)
    return clips, notes


def load_clip(clip, config, contents=None):
    """A listed Clip -> the same with its video, cut to 4k + 1 frames, or with its problem. Whether it is like
    the other clips is for `load_clips` to say.

    contents: a fingerprint.Contents, or None if the file's content is not wanted.
    """
    if clip.problem:
        return clip
    path, size = Path(config.folder) / clip.name, parse_size(config, config.multiple)
    try:
        most = None if size and config.frames else CLIP_BYTES
        video, fps, facts = read_clip_facts(path, size, config.frames, config.fps, most)
        content = contents and contents.content(path)
    except (InputError, OSError) as e:
        return replace(clip, problem=printable(str(e).removeprefix(f"{path}: ")))
    have, wanted = len(video), config.frames or FEWEST
    kind = [video.shape[2], video.shape[1], (have - 1) // 4 * 4 + 1, round(fps, 1)]
    clip = replace(clip, kind=kind, facts=facts, content=content)
    if kind[2] < wanted:
        clip.problem = f"too short: {have} frames of {wanted} at {fps:.3g} fps"
        if kind[2] >= FEWEST:
            clip.problem += f": --frames {kind[2]} takes it"
    elif kind[0] % config.multiple or kind[1] % config.multiple:
        clip.problem = f"size {kind[0]}x{kind[1]} is not a multiple of {config.multiple}: pass --size W*H"
    elif not clip.row["prompt"]:
        clip.problem = "empty prompt"
    else:
        clip.video = video[:kind[2]]
    return clip


def load_clips(clips, config, kind=None, contents=None):
    """Yields `load_clip` of each clip, in order, and decodes a few ahead. All clips must be of one kind [W,
    H, F, fps]: the given one, or that of the first usable clip."""
    with ThreadPoolExecutor(AHEAD) as pool:
        clips, waiting = iter(clips), collections.deque()

        def start(count):
            for clip in itertools.islice(clips, count):
                waiting.append(pool.submit(load_clip, clip, config, contents))

        start(AHEAD)
        while waiting:
            clip = waiting.popleft().result()
            start(1)
            kind = kind or (None if clip.problem else clip.kind)
            if clip.problem is None and clip.kind != kind:
                clip.problem = (f"is {show(clip.kind)}, the others are {show(kind)}: pass --size, --frames, "
                                "--fps")
                clip.video = None
            yield clip


class Tally:
    """Counts what reading did to the frames of usable clips. Users may not want to train on changed clips."""

    def __init__(self):
        self.found, self.kept = collections.defaultdict(list), []

    def add(self, clip):
        frames, facts = clip.kind[2], clip.facts
        if facts.kept < 0.95:
            self.kept.append(facts.kept)
        for name, true in (("slow", 10 * facts.repeated > frames), ("still", 4 * facts.still > frames),
                           (facts.colours, facts.colours), ("interlaced", facts.interlaced)):
            if true:
                self.found[name].append(clip.name)

    def lines(self, config, prompts):
        """The sentences to print. prompts: those of all usable clips."""
        cut, limit = encoders.count_long_captions(config.text_encoder, prompts)
        said = {"still": "stand still for a quarter of their frames or longer",
                "converted": "are HDR or of a wide gamut: converted to BT.709, what is brighter than its "
                             "white is clipped",
                "approximate": "have colours that only approximate what a player shows",
                "guessed": "do not say how their colours are coded: read by BT.709, as players do from 720 "
                           "lines on, which is only approximate if they were written by BT.601",
                "interlaced": "are interlaced: each pair of fields became one picture, by FFmpeg's bwdif",
                "slow": f"are slower than {config.fps or 0:g} fps: their frames will repeat"}
        if self.kept:
            yield (f"{len(self.kept)} of them lose part of their picture to the crop: {min(self.kept):.0%} "
                   "of it stays at worst, "
                   f"{sum(self.kept) / len(self.kept):.0%} on average")
        if cut:
            yield (f"{cut} of their captions are longer than the {limit} that {config.text_encoder} reads: "
                   f"the rest is cut off")
        for name, sentence in said.items():
            if found := self.found[name]:
                yield f"{len(found)} of them {sentence}" + ("" if name == "slow" else f": {some(found)}")


def some(names):
    listed = ", ".join(map(printable, names[:3]))
    return f"{listed}, ..." if len(names) > 3 else listed


def show(kind):
    return "{}x{}, {} frames, {:g} fps".format(*kind)


def check_command(config):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("data.py check is one process: start it without torchrun")
    parse_size(config)
    folder, tally, problems, usable = Path(config.folder), Tally(), [], []
    clips, notes = list_clips(folder)
    resolve_encoders(config)
    if config.model:
        load_transformer(config.model, load_now=False)          # only to know that its weights are there
        for encoder in encoders.find_encoders(config.model).values():
            require_fetched(encoder)
    parse_size(config, config.multiple)
    bar, contents = common.progress(len(clips), "check"), fingerprint.Contents(folder / ".contents.json")
    for clip in load_clips(clips, config, contents=contents):
        if clip.problem:
            problems.append(f"{printable(clip.name)}: {clip.problem}")
        else:
            usable.append((clip.row, show(clip.kind), clip.content))
            tally.add(clip)
        bar.update()
    bar.close()
    labels = collections.Counter(row["label"] for row, _, _ in usable)
    prompts = [row["prompt"] for row, _, _ in usable]
    summary = (f"{folder}: {len(usable)} of {len(clips)} clips usable: {labels[1]} good, {labels[0]} bad, "
               f"{labels[None]} "
               "unlabelled")
    if usable:
        summary += f"; {usable[0][1]}"
    lines = [*problems, summary, *notes, *tally.lines(config, prompts)]
    copies, groups = join_equal([content for _, _, content in usable]), prompt_groups(prompts)
    if len(copies.unique()) < len(usable) or len(groups.unique()) < len(usable):
        lines.append(count_relatives(copies, groups))
    print(*lines, sep="\n")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES}
    if unlisted := sorted(names - {os.path.normpath(clip.row["file_name"]) for clip in clips if clip.row}):
        print(f"{len(unlisted)} video files are not in the metadata: {some(unlisted)}")
    if problems or not clips:
        raise InputError(f"{folder}: {len(problems)} of {len(clips)} clips cannot be used")


@dataclass
class Encode(Check):
    out: str = arg("latents", "folder of the shards; a second run encodes only clips that are new or have "
                              "changed")
    vae: str | None = arg(None, "folder of a VAE of the embedded world, or of diffusers' AutoencoderKLWan, "
                          "to use where --model is not given; default: the shipped one")
    image_encoder: str | None = arg(None, "folder of transformers' CLIPVisionModel, which Wan2.1's "
                                    "image-to-video models need, to use where --model is not given. The "
                                    "shards then also hold CLIP tokens, and the first frame in the form that "
                                    "those models read")
    batch_size: int = arg(8, "clips encoded at once, but fewer if together they hold more than 16 million "
                          "pixels", above=0)
    clips_per_shard: int = arg(256, "clips per shard, but fewer if together they hold more than 128 MiB",
                               above=0)




def resolve_encoders(config):
    """Fills in the folders of the encoders and config.multiple -> ({role: folder}, whether the shards have to
    hold a given first frame beside the latents). Raises InputError."""
    image_to_video = getattr(config, "image_encoder", None) is not None
    if config.model:
        common.refuse(config, encoders.ROLES, "with --model, whose own encoders are used")
        dit, found = transformer_folder(config.model)[1], encoders.find_encoders(config.model)
        image_to_video = dit["model_type"] == "i2v" and not is_pinned(dit)  # pinned: it is in the latents
        config.multiple = families.of_config(dit).side
        wanted = [role for role in encoders.ROLES if hasattr(config, role)]
        if not dit["image_dim"] and "image_encoder" in wanted:
            wanted.remove("image_encoder")
        if lacking := [role for role in wanted if role not in found]:
            raise InputError(f"--model {config.model}: there is no {lacking[0]}/ in it")
    else:
        found = {role: getattr(config, role, None) for role in encoders.ROLES}
        if not found["image_encoder"]:
            del found["image_encoder"]                  # most models have none
        found = {role: path or SHIPPED["t2v"] / role for role, path in found.items()}
        wanted = list(found)
    for role in wanted:
        setattr(config, role, str(found[role]))
    if "vae" in wanted:
        config.multiple = families.side_of_vae(config.vae)
    return {role: str(found[role]) for role in wanted}, image_to_video


def encode_batch(clips, models, image_to_video):
    """Loaded clips -> {name in the shards: tensor [b, ...] on the CPU}. models: {role: encoder}"""
    device = next(models["vae"].parameters(), torch.empty(0)).device
    videos = torch.stack([clip.video for clip in clips]).to(device)                    # uint8 [b, F, H, W, 3]
    out = {"latents": models["vae"].encode(from_pixels(videos)),                            # [b, c, f, h, w]
           "context": models["text_encoder"].encode([clip.row["prompt"] for clip in clips])}  # [b, l, d]
    if image_to_video:
        out["condition"] = encoders.condition_latents(
            models["vae"], videos, families.takes_blank_frames(models["text_encoder"]))      # [b, c, f, h, w]
    if "image_encoder" in models:
        out["clip_fea"] = models["image_encoder"].encode(videos[:, 0])                      # [b, m, d']
    return {name: x.float().cpu() for name, x in out.items()}


def unchanged(before, clips, folder, contents):
    """{index of a clip: its place in the shards `before`} for clips whose caption and file have not changed
    since they were encoded."""
    places = {(row["file_name"], row["prompt"], content): i
              for i, (row, content) in enumerate(zip(before.all_rows, before.all_contents)) if content}
    names, found = {name for name, _, _ in places}, {}
    for i, clip in enumerate(clips):
        if clip.name in names and not clip.problem:
            try:
                content = contents.content(Path(folder) / clip.name)
            except (OSError, ValueError):
                continue                            # load_clip will say why it cannot be read
            place = places.get((clip.name, clip.row["prompt"], content))
            if place is not None:
                found[i] = place
    return found


def encode_command(config):
    encode(config, common.setup())
    common.teardown()


@torch.inference_mode()
def encode(config, runtime):
    """Encodes a folder of clips. Rank 0 finds out which clips are new, writes the shards and reports; all
    ranks read and encode clips."""
    parse_size(config)
    out, (folders, image_to_video) = Path(config.out), resolve_encoders(config)
    parse_size(config, config.multiple)
    loaders = dict(zip(encoders.ROLES, (load_vae, load_text_encoder, load_image_encoder)))

    @functools.cache
    def load():
        return {role: loaders[role](path).to(runtime.device) for role, path in folders.items()}

    contents = fingerprint.Contents(out / "contents.json")
    disk.require_shared(out, "--out")
    if not all(common.gather(Path(config.folder).is_dir() or runtime.rank == 0)):
        raise InputError(f"{config.folder}: not every process sees this folder: put the clips on a disk that "
                         f"all nodes share")
    if runtime.rank > 0:
        for _ in encode_chunks(*common.gather(None)[0], config, load, image_to_video, contents, runtime):
            pass                                    # what this rank encodes goes to rank 0
        return common.gather(contents.fresh, to=0)
    clips, notes = list_clips(config.folder)
    if not clips:
        raise InputError(f"{config.folder}: its metadata file has no rows")
    if out.exists() and out.samefile(config.folder):
        raise InputError(f"--out {out}: is the folder of the clips: name another one for the shards")
    lock.require_ours(out, "shards", ("shards.json",), "--out")
    settings = {"size": config.size and config.size.replace("x", "*"), "frames": config.frames,
                "fps": config.fps, "condition": image_to_video,
                "encoders": {role: fingerprint.of_encoder(path, role) for role, path in folders.items()}}
    if not out.exists():
        load()                                      # encoders that cannot be loaded leave no folder behind
    with lock.hold(out, "shards"):
        before = Shards(out) if (out / "shards.json").exists() else None
        kind = ((before and before.settings) or {}).get("kind")
        if before and before.settings != settings | {"kind": kind}:
            raise InputError(f"{out}: was encoded with other settings "
                             f"({differences(before.settings, settings)}): use those "
                             "flags and encoders, or another --out")
        done = unchanged(before, clips, config.folder, contents) if before else {}
        gone = sorted(set(range(len(before.all_rows))) - set(done.values())) if before else []
        if before and gone != sorted(before.dropped):
            replace_text(out / "shards.json", json.dumps(before.index | {"dropped": gone}, indent=1))
            if new := set(gone) - before.dropped:
                print(f"{out}: {len(new)} clips that it holds are no longer listed, or have changed: left "
                      "out")
        for i in range(len(clips) if kind is None else 0):
            first = load_clip(clips[i], config, contents)
            if not first.problem:
                kind = first.kind
                break
            clips[i] = first                        # with its problem, so it is not read again
        # A clip's last bits depend on its batch. So the rows of the list in a chunk depend neither on the
        # number of ranks nor on what is done already.
        room, chunks = 1, []
        if kind:
            room = max(1, min(config.batch_size, config.clips_per_shard, BATCH_PIXELS // math.prod(kind[:3])))
        for k in range(0, len(clips), room):
            chunk = [clips[i] for i in range(k, min(k + room, len(clips))) if i not in done]
            if chunk:
                chunks.append(chunk)
        common.gather((chunks, kind))
        if any(not clip.problem for chunk in chunks for clip in chunk):
            save_null_context(out, load()["text_encoder"])
        encoded = encode_chunks(chunks, kind, config, load, image_to_video, contents, runtime)
        with (out / "report.jsonl").open("w", buffering=1) as report:
            skipped = write_chunks(encoded, config, settings | {"kind": kind}, report, len(done), len(clips))
        for found in common.gather(contents.fresh, to=0):
            contents.fresh |= found
        contents.save()
    print(*notes, f"{out}: {len(clips) - skipped} of {len(clips)} clips encoded"
          + (f", {skipped} skipped: see {out / 'report.jsonl'}" if skipped else ""), sep="\n")
    if skipped == len(clips):
        raise InputError(f"{config.folder}: no clip could be encoded: see {out / 'report.jsonl'}")


def differences(before, now):
    """The settings that differ, in words."""
    before = before or {}
    if "encoders" not in before:
        return "it does not say which"
    changed = [f"{key} {before.get(key)}, not "
               f"{now[key]}" for key in now if key != "encoders" and before.get(key) != now[key]]
    then, now = before["encoders"], now["encoders"]
    changed += [f"another {role}" for role in encoders.ROLES if then.get(role) != now.get(role)]
    return "; ".join(changed)


def encode_chunks(chunks, kind, config, load, image_to_video, contents, runtime):
    """Reads and encodes the chunks of clips; the ranks take them in turn. On rank 0 it yields for each chunk,
    in order: (the clips, {name in the shards: tensor [b, ...] of the clips that have no problem})."""
    # in the last round some ranks have nothing to do
    chunks = chunks + [[]] * (-len(chunks) % runtime.world_size)
    mine = chunks[runtime.rank::runtime.world_size]
    clips = load_clips(itertools.chain(*mine), config, kind, contents)
    for chunk in mine:
        chunk = list(itertools.islice(clips, len(chunk)))
        good = [clip for clip in chunk if not clip.problem]
        tensors = encode_batch(good, load(), image_to_video) if good else {}
        for clip in good:
            clip.video = None
        yield from common.gather((chunk, tensors), to=0)


def write_chunks(encoded, config, settings, report, done, total):
    """Writes what `encode_chunks` yields, and reports it -> how many clips could not be encoded."""
    ready, parts, skipped, tally, prompts = [], [], 0, Tally(), []
    bar = common.progress(total, "encode", initial=done)
    for chunk, tensors in itertools.chain(encoded, [(None, {})]):           # None: there are no more chunks
        good = [clip for clip in chunk or () if not clip.problem]
        bytes_of_a_clip = sum(4 * x[0].numel() for x in tensors.values())
        enough = min(config.clips_per_shard, SHARD_BYTES // max(1, bytes_of_a_clip))
        if ready and (chunk is None or len(ready) + len(good) > enough):
            whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            write_shards(config.out, whole.pop("latents"), whole.pop("context"),
                         *([clip.row[name] for clip in ready] for name in ("label", "prompt", "file_name")),
                         fps=settings["kind"][3], settings=settings, append=True, clips=config.folder,
                         contents=[clip.content for clip in ready], **whole)
            ready, parts = [], []
        if good:
            ready, parts = ready + good, [*parts, tensors]
        for clip in chunk or ():
            if clip.problem:
                skipped += 1
                bar.write(f"skipped {printable(clip.name)}: {clip.problem}")
                report.write(json.dumps({"file_name": clip.name, "reason": clip.problem}) + "\n")
            else:
                tally.add(clip)
                prompts.append(clip.row["prompt"])
            bar.update()
    bar.close()
    print(*(f"{line}\n" for line in tally.lines(config, prompts)), sep="", end="")
    return skipped


COMMANDS = {"check": (check_command, Check), "encode": (encode_command, Encode)}

if __name__ == "__main__":
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(__doc__)
    elif command in COMMANDS:
        common.cli(*COMMANDS[command], __doc__, sys.argv[2:], f"data.py {command}")
    else:
        sys.exit(print(f"error: data.py has check and encode, not {command}", file=sys.stderr) or 2)
