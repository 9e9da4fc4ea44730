"""Latent shards: encoded clips on disk, which `python data.py encode` writes and training reads.

    clips_encoded/
        shards.json                     shapes, settings, and the file, count and contents of each shard
        metadata.jsonl                  file_name, prompt and label of each clip
        shard-00000.safetensors         latents, context, label; for image-to-video also clip_fea and
                                        condition; for RWR's own samples also reward

Axes: n clips of a shard, b batch, c latent channels, f h w latent frames, height, width, l text tokens, d
text width, m CLIP image tokens, d' their width. """
import collections
import functools
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import common
from common import InputError
from formats import disk, fingerprint, lock
from formats import labels as people
from formats.metadata import from_json, printable, read_listing, read_metadata, replace_text, write_rows
from formats.weights import stream_tensors


def write_shards(folder, latents, contexts, labels, prompts, file_names=None, fps=8.0, settings=None,
                 append=False, clips=None, contents=None, **extra):
    """Writes one shard: latents [n, c, f, h, w] and contexts [n, l, d] as float32, labels (0, 1, None or -1),
    prompts.

    extra: for image-to-video, clip_fea [n, m, d'] and condition [n, c, f, h, w]; for RWR's own samples,
    reward [n]. append: write after the shards that are there; default: replace them. clips: the folder of the
    clips, for `Shards.relabel`. contents: a fingerprint of each clip's file (formats/fingerprint.py). A kill
    at any moment leaves complete shards. Raises InputError if the folder is not ours or holds shards of
    another shape. """
    folder = Path(folder)
    lock.require_ours(folder, "shards", ("shards.json",))
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"latent_shape": list(latents.shape[1:]), "context_shape": list(contexts.shape[1:]),
              "extra_shapes": {name: list(x.shape[1:]) for name, x in extra.items()}}
    before = Shards(folder) if append and (folder / "shards.json").exists() else None
    index = before.index if before else {**shapes, "fps": fps, "settings": settings, "shards": []}
    if clips:
        index["clips"] = os.path.relpath(os.path.realpath(clips), os.path.realpath(folder))
    if {key: index.get(key, {}) for key in shapes} != shapes:
        raise InputError(f"{folder}: shards there have another shape than {shapes}")
    values = torch.tensor([-1 if x is None else int(x) for x in labels], dtype=torch.int8)
    name = f"shard-{len(index['shards']):05d}.safetensors"
    names = file_names or [f"{name}#{i}" for i in range(len(values))]
    rows = before.all_rows if before else []
    for file, prompt, label in zip(names, prompts, values.tolist(), strict=True):
        rows.append({"file_name": file, "prompt": prompt, "label": None if label < 0 else label})
    if not before:
        (folder / "shards.json").unlink(missing_ok=True)
    tensors = {**extra, "latents": latents, "context": contexts}
    tensors = {key: x.float().contiguous() for key, x in tensors.items()}
    tensors["label"] = values
    stream_tensors(tensors, folder / f"{name}.tmp")
    disk.put(folder / f"{name}.tmp", folder / name)
    write_rows(folder / "metadata.jsonl", rows)
    entry = {"file": name, "count": len(values)}
    if contents:
        entry["contents"] = list(contents)
    index["shards"].append(entry)
    index["count"] = len(rows)
    replace_text(folder / "shards.json", json.dumps(index, indent=1))


class Shards:
    """Read-only view of a folder of shards. Each batch is read through a memory map that is closed again, so
    that resident memory does not grow with the data. Raises InputError, one line, if the folder is missing,
    truncated or inconsistent.

    rows, labels (int8, -1: none), contents (the fingerprint of each clip's file, or None) and where ((shard,
    place in it)) have one entry for each clip that is still listed; all_rows and all_contents also have the
    dropped clips.
    """

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        path = folder / "shards.json"
        where, labels, contents = [], [], []
        try:
            self.index = from_json(path.read_text())
            self.latent_shape = tuple(self.index["latent_shape"])    # (c, f, h, w)
            self.context_shape = tuple(self.index["context_shape"])  # (l, d)
            self.shapes = {"latents": self.latent_shape, "context": self.context_shape}
            for name, shape in self.index.get("extra_shapes", {}).items():
                self.shapes[name] = tuple(shape)
            self.fps, self.settings = self.index["fps"] + 0.0, self.index["settings"] or {}
            is_read = isinstance(self.settings, dict) and isinstance(self.settings.get("encoders", {}), dict)
            if not (self.fps > 0 and is_read):
                raise TypeError(f"fps {self.fps}, settings {self.settings}")
            for entry in self.index["shards"]:
                path, n = folder / entry["file"], entry["count"]
                with safe_open(path, "pt") as file:
                    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
                    if found != {"label": (n,)} | {name: (n, *shape) for name, shape in self.shapes.items()}:
                        raise InputError(f"{path}: holds {found}, not what shards.json says: encode again")
                    labels += file.get_tensor("label").tolist()
                where += [(path, i) for i in range(n)]
                contents += entry.get("contents") or [None] * n
            self.dropped = set(self.index.get("dropped", ()))
        except (FileNotFoundError, NotADirectoryError) as e:
            raise InputError(f"{e.filename or path} is missing: `python data.py encode` writes it") from None
        except (OSError, SafetensorError) as e:
            raise InputError(f"{path}: truncated or damaged ({e}): encode again") from None
        except (json.JSONDecodeError, UnicodeError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{folder}/shards.json: damaged ({e!r}): encode again") from None
        self.all_rows = read_metadata(folder)[:len(where)]  # a kill left later rows without their shard
        if not 0 < len(where) == self.index.get("count") == len(self.all_rows):
            raise InputError(f"{folder}: shards.json counts {self.index.get('count')} clips, the shards hold "
                             f"{len(where)}, metadata.jsonl {len(self.all_rows)}: encode again")
        if [-1 if row["label"] is None else row["label"] for row in self.all_rows] != labels:
            raise InputError(f"{folder}: metadata.jsonl and shards differ in labels: leave these as they "
                             "were encoded, "
                             "and change labels beside the clips")
        self.label_note, self.all_contents = "labels as they were encoded", contents
        # A clip that is no longer listed, or has changed since, stays in its shard, but nothing reads it.
        live = [i for i in range(len(where)) if i not in self.dropped]
        self.rows, self.where = [self.all_rows[i] for i in live], [where[i] for i in live]
        self.contents = [contents[i] for i in live]
        self.labels = torch.tensor([labels[i] for i in live], dtype=torch.int8)

    def __len__(self):
        return len(self.where)

    @functools.cached_property
    def copies(self):
        """int64 [n], in which clips that are copies of each other have equal numbers. Copies have equal files
        or equal latents."""
        return join_equal(self.contents, fingerprint.of_latents(self))

    def relabel(self, answers=None, bad="both"):
        """-> self, with today's labels, the same on every rank.

        A clip's label comes from people's answers in the labels.jsonl beside the clips (or in the file
        `answers`), if these were given for the very content that was encoded. Without such answers it comes
        from the clips' metadata, and without that it stays as it was encoded. bad: see formats/labels.py.
        Raises InputError. """
        folder = self.index.get("clips") and Path(os.path.normpath(self.folder / self.index["clips"]))
        if answers and not Path(answers).is_file():
            raise InputError(f"--labels {answers}: there is no such file")
        path, notes = answers or (folder and folder / "labels.jsonl"), []
        names = [os.path.normpath(row["file_name"]) for row in self.rows]
        said = {}
        if path:
            encoded = dict(zip(names, self.contents))
            given, notes = people.current_answers(
                path, contents_of=lambda answer: [encoded.get(os.path.normpath(answer["file_name"]))])
            said = people.majority(given, bad)
            between = [name for name in names if name in said and said[name] is None]
            if between:
                notes.append(f"{len(between)} clips with answers are neither good nor bad")
                by_any = people.majority(given, "any")
                if count := sum(by_any[name] == 0 for name in between):
                    notes[-1] += f", of which --bad any counts {count} as bad"
        if bad != "both" and not said:
            raise InputError(f"--bad {bad} means nothing without answers, and there are none in "
                             f"{path or self.folder}: leave "
                             "it out")
        listed = []
        if folder and any(folder.glob("metadata.*")):
            # rows with a problem were not encoded either
            listed = [row for _, row, problem in read_listing(folder)[0] if not problem]
        sources = {f"{path}": said, f"the metadata in {folder}": _labels_by_name(listed),
                   "encoding": _labels_by_name(self.rows)}
        counts = collections.Counter()
        for i, name in enumerate(names):
            source = next(source for source, labels in sources.items() if name in labels)
            label = sources[source][name]
            self.labels[i] = -1 if label is None else label
            counts[source] += label is not None
        counted = ", ".join(f"{source}: {counts[source]}" for source in sources if counts[source])
        note = printable("; ".join([f"labels from {counted or 'nowhere'}", *notes]))
        # rank 0's labels for all ranks, because a person may be answering meanwhile
        self.labels, self.label_note = common.gather((self.labels, note))[0]
        return self

    def batch(self, indices, names=None):
        """-> {latents [b, c, f, h, w], context [b, l, d], label int8 [b] (-1: none), prompt: list of b}. For
        image-to-video it also has clip_fea [b, m, d'] and condition [b, c, f, h, w], and for RWR's own
        samples reward [b]. names: the tensors to read; default: all."""
        indices = [int(i) for i in indices]
        batch = {name: torch.empty(len(indices), *self.shapes[name]) for name in names or self.shapes}
        for path in {self.where[i][0] for i in indices}:
            with safe_open(path, "pt") as file:             # closed again: pages of an open map stay resident
                for name, rows in batch.items():
                    view = file.get_slice(name)
                    for j, i in enumerate(indices):
                        shard, k = self.where[i]
                        if shard == path:
                            rows[j:j + 1] = view[k:k + 1]
        return batch | {"label": self.labels[indices], "prompt": [self.rows[i]["prompt"] for i in indices]}

    def require(self, channels=None, context_shape=None, labelled=False, image_dim=None):
        """Raises InputError that names the field that does not fit a model: its latent channels, the shape
        (l, d) of its contexts, or the width image_dim of its CLIP tokens. labelled: both labels must also
        occur."""
        if channels not in (None, self.latent_shape[0]):
            raise InputError(f"{self.folder}: latents have {self.latent_shape[0]} channels, the model "
                             f"has {channels}: give the --model for which they were encoded, or encode with "
                             "its own VAE")
        if context_shape is not None and tuple(context_shape) != self.context_shape:
            raise InputError(f"{self.folder}: context is {list(self.context_shape)} (tokens, width), not "
                             f"{list(context_shape)} as the model's: give the --model for which it was "
                             "encoded, or encode with its own text encoder")
        if image_dim not in (None, self.shapes.get("clip_fea", (0,))[-1]):
            raise InputError(f"{self.folder}: holds no CLIP image tokens of width {image_dim}, which the "
                             "model takes: "
                             "encode with --image_encoder, or better --model")
        found = sorted(set(self.labels.tolist()) - {-1})
        if labelled and len(found) < 2:
            what = f"every label is {found[0]}" if found else "no clip has a label"
            raise InputError(f"{self.folder}: {what}: a reward model needs 0 and 1 (label.py, or `label` in "
                             f"the clips' metadata); {self.label_note}")


def join(parts):
    """Joins several Shards, in their order, for example several rounds of labels for a reward model.

    -> the first of them, which then has the clips of all. Raises InputError, which names a folder that does
    not fit the first.
    """
    whole = parts[0]
    for part in parts[1:]:
        if part.shapes != whole.shapes:
            raise InputError(f"{part.folder}: holds {part.shapes} where {whole.folder} holds {whole.shapes}: "
                             f"encode both with the same --model, --size and --frames")
        if part.settings.get("encoders") != whole.settings.get("encoders"):
            raise InputError(f"{part.folder}: was encoded with other encoders than {whole.folder}: encode "
                             f"both with the same --model")
        whole.rows += part.rows
        whole.where += part.where
        whole.contents += part.contents
        whole.labels = torch.cat([whole.labels, part.labels])
        whole.label_note += f"\n{part.label_note}"
    return whole


def _labels_by_name(rows):
    """{normal path: label} of rows. If two rows have the same file, the first row counts."""
    return {os.path.normpath(row["file_name"]): row["label"] for row in reversed(rows)}


def join_equal(*columns):
    """int64 [n], in which rows that belong together have equal numbers: the index of the first of them. Two
    rows belong together if they have an equal value in one of the columns (lists of n), or if both belong
    together with a third row. None equals nothing."""
    parent = list(range(len(columns[0])))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for column in columns:
        first = {}
        for i, value in enumerate(column):
            if value is not None:
                a, b = root(first.setdefault(value, i)), root(i)
                parent[max(a, b)] = min(a, b)
    return torch.tensor([root(i) for i in range(len(parent))], dtype=torch.int64)
