"""Fingerprints of files, weights and shards. By them a label, a cache or a run recognises the content that it
was made from, whatever its name is now."""
import collections
import hashlib
import json
import os
from pathlib import Path

from safetensors import safe_open

from common import InputError
from formats.metadata import from_json, replace_text
from formats.weights import WeightFiles, expert_folders, read_config, transformer_folder

# Weight files of up to WHOLE bytes are read whole; of larger files SAMPLE bytes are read at three places of
# each tensor.
WHOLE, SAMPLE = 2 ** 26, 2 ** 12
TOKENIZERS = ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")
BESIDE = {"text_encoder": ("tokenizer", TOKENIZERS),
          "image_encoder": ("image_processor", ("preprocessor_config.json",))}


def of_file(path):
    """32 hex digits of a file's bytes. Raises OSError or ValueError if it cannot be read."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


class Contents:
    """Like `of_file`, but a file is not read again if its inode, size and times are the same as last time.
    The file `file` keeps what is known; if it is lost, this costs only time."""

    def __init__(self, file):
        self.file, self.fresh = Path(file), {}
        try:
            self.known = from_json(self.file.read_text())
            self.known = self.known if isinstance(self.known, dict) else {}
        except (OSError, ValueError):
            self.known = {}

    def content(self, path):
        """-> the 32 hex digits of `of_file`. Raises OSError or ValueError if the file cannot be read."""
        name, found = os.path.abspath(path), os.stat(path)
        state = [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        entry = self.fresh.get(name) or self.known.get(name)
        if not (isinstance(entry, list) and len(entry) == 5 and entry[:4] == state):
            entry = [*state, of_file(path)]
        self.fresh[name] = entry
        return entry[4]

    def save(self):
        replace_text(self.file, json.dumps(self.fresh, sort_keys=True))


def of_encoder(path, role):
    """12 hex digits of the VAE, text_encoder or image_encoder (role) in folder `path`, wherever that folder
    lies.

    They depend on the encoder's config, on the headers and some bytes of its weight files, and on the files
    of the tokenizer or image processor, which lie in the folder or beside it. Raises InputError if the folder
    does not hold such an encoder, or is damaged. """
    path, digest = Path(path), hashlib.blake2b(digest_size=6)
    try:
        config = {}
        for key, value in from_json((path / "config.json").read_text()).items():
            if not key.startswith("_") and not key.endswith("_version"):
                config[key] = value
        digest.update(json.dumps(config, sort_keys=True).encode())
        for file in sorted(path.glob("*.safetensors")):
            _add_weights(digest, file)
        sibling, names = BESIDE.get(role, ("", ()))
        for name in names:
            for file in (path / name, path.resolve().parent / sibling / name):
                if file.is_file():
                    digest.update(name.encode() + file.read_bytes())
                    break
    except FileNotFoundError as error:
        raise InputError(f"{path} is not a folder of a {role}: there is no {error.filename}") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged, or not a {role} ({error})") from None
    return digest.hexdigest()


def _add_weights(digest, path):
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            return digest.update(file.read())
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, WHOLE))
        digest.update(header)
        for name, entry in from_json(header).items():
            if name != "__metadata__":
                begin, end = (8 + length + place for place in entry["data_offsets"])
                for place in (begin, (begin + end) // 2, max(begin, end - SAMPLE)):
                    file.seek(place)
                    digest.update(file.read(min(SAMPLE, end - place)))


def of_weights(path):
    """16 hex digits of the generator or reward model in folder `path`. They depend on its config, and on the
    name, the shape and some of the values of every weight, but not on where the folder lies or how many files
    it has."""
    folder, pair, digest = Path(path), expert_folders(path), hashlib.blake2b(digest_size=8)
    if pair:
        folders = (pair.high, pair.low)
    else:
        folders = (transformer_folder(path)[0] if (folder / "transformer").is_dir() else folder,)
    for folder in folders:
        weights, config = WeightFiles(folder), read_config(folder)
        config.pop("_other", None)                              # where the other expert lies
        digest.update(json.dumps(config, sort_keys=True).encode())
        for name in sorted(weights.handle):
            row = weights.handle[name].get_slice(name)
            digest.update(repr((name, row.get_shape(), row[:1].flatten()[:64].tolist())).encode())
    if pair:
        digest.update(repr(pair.boundary).encode())
    return digest.hexdigest()


def of_shards(shards):
    """16 hex digits of Shards, which depend on the prompt, the label and some of the latent of every clip."""
    digest = hashlib.blake2b(digest_size=8)
    prompts = [row["prompt"] for row in shards.rows]
    digest.update(repr((shards.shapes, prompts, shards.labels.tolist())).encode())
    for path in dict.fromkeys(path for path, _ in shards.where):
        mine = [place for shard, place in shards.where if shard == path]
        with safe_open(path, "pt") as file:
            digest.update(repr(file.get_slice("latents")[:, 0, 0, 0][mine].tolist()).encode())
    return digest.hexdigest()


def of_latents(shards):
    """[for each clip in Shards 16 hex digits of its latent, or None if no other clip can have the same]."""
    rows_of_file = collections.defaultdict(list)
    for i, (path, k) in enumerate(shards.where):
        rows_of_file[path].append((i, k))
    beginnings, digests = [None] * len(shards.where), [None] * len(shards.where)
    for path, rows in rows_of_file.items():
        with safe_open(path, "pt") as file:
            values = file.get_slice("latents")[:, 0, 0, 0]                                          # [n, w]
        for i, k in rows:
            beginnings[i] = values[k].numpy().tobytes()
    counts = collections.Counter(beginnings)
    for path, rows in rows_of_file.items():
        with safe_open(path, "pt") as file:
            view = file.get_slice("latents")
            for i, k in rows:
                if counts[beginnings[i]] > 1:                   # only such latents are read whole
                    digests[i] = hashlib.blake2b(view[k:k + 1].numpy().tobytes(), digest_size=8).hexdigest()
    return digests
