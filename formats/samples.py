"""How a sampled video was made. Its row of metadata.jsonl says this, so that sample.py can make it again.

Beside file_name, prompt, seed and image (a path relative to the file's folder), a row has `settings`:
  flags of sample.py (FLAGS), except those that are None; paths are relative to the file's folder
  index           the video's number under its seed, from which its noise is drawn
  batch, place    how many videos were sampled together, and which of them this video was, because
                  floating-point sums, and with them a file's bytes, depend on the size of a batch
  weights         a fingerprint of generator, encoders, adapter and reward model
"""
import hashlib
import os
from pathlib import Path

from common import InputError
from formats import fingerprint
from formats.metadata import not_text
from formats.weights import SHIPPED, TASKS, does_both, transformer_folder

FLAGS = ("task", "model", "transformer", "lora", "lora_2", "size", "frames", "fps", "num_inference_steps",
         "guidance_scale", "guidance_scale_2", "negative_prompt", "shift", "batch_size", "mixed_precision",
         "best_of", "search", "drops", "reward")
PATHS = ("model", "transformer", "lora", "lora_2", "reward")
OF_A_VIDEO = ("index", "batch", "place")


def same_path(a, b):
    return os.path.realpath(a) == os.path.realpath(b)


def same_setting(name, a, b):
    """Whether two values of a flag mean the same."""
    return a == b or (name in PATHS and None not in (a, b) and same_path(a, b))


def relative_path(path, folder):
    """`path`, relative to `folder`. Links are followed first, because ".." after a link leads to the folder
    above the link's target, and not above the link."""
    return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))


def of_weights(flags):
    """16 hex digits of all weights that the flags use. flags: {name of FLAGS: value}, with the model's
    folder."""
    model, digest = Path(flags["model"]), hashlib.blake2b(digest_size=8)
    digest.update(fingerprint.of_weights(flags.get("transformer") or model).encode())
    for role in ("vae", "text_encoder", "image_encoder"):
        if (model / role).is_dir():
            digest.update(fingerprint.of_encoder(model / role, role).encode())
    for name in ("lora", "lora_2"):
        if flags.get(name):
            with open(flags[name], "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    if (flags.get("best_of") or 1) > 1:
        digest.update(fingerprint.of_weights(flags.get("reward") or model / "reward").encode())
    return digest.hexdigest()


def describe(flags, folder):
    """The settings that all videos in `folder` share. flags: {name of FLAGS: value}, with the model's folder.
    A shipped generator is recorded by its task instead of its folder. The task of another generator is
    recorded only if it can do both tasks."""
    found = {name: flags[name] for name in FLAGS if flags.get(name) is not None}
    found["weights"] = of_weights(flags)
    if "transformer" in found and same_path(found["transformer"], found["model"]):
        del found["transformer"]
    tasks = [task for task in TASKS if same_path(found["model"], SHIPPED[task])]
    if not does_both(transformer_folder(found.get("transformer", found["model"]))[1]):
        found.pop("task", None)
    if found.get("best_of", 1) == 1:
        found.pop("search", None)
    if found.get("guidance_scale") == 1 == found.get("guidance_scale_2", 1):
        found.pop("negative_prompt", None)
    if tasks:
        del found["model"]
        found["task"] = tasks[0]
    return found | {name: relative_path(found[name], folder) for name in PATHS if name in found}


def row(folder, file_name, prompt, seed, image, settings):
    """A row of metadata.jsonl in `folder`."""
    given = {"image": relative_path(image, folder)} if image else {}
    return {"file_name": file_name, "prompt": prompt, "seed": seed, **given, "settings": settings}


def shared_settings(path, rows):
    """The settings with which the videos of these rows were made -> {flag or "weights": value}, or {} if no
    row has settings. rows: what read_prompts returned for the file `path`. Raises InputError if two rows
    differ or a setting is not known."""
    shared, first = None, None
    for number, given in enumerate((given.get("settings") for given in rows), 1):
        if given is None:
            continue
        place = f"{path}: the settings of prompt {number}"
        if unknown := sorted(given.keys() - {*FLAGS, *OF_A_VIDEO, "weights"}):
            raise InputError(f"{place} have {unknown[0]!r}, which sample.py does not know: leave it out")
        for name, value in given.items():
            if isinstance(value, str) and ("\0" in value or (name not in PATHS and not_text(value))):
                raise InputError(f"{place} have a {name} that is not text")
        check_place(place, given)
        mine = {name: value for name, value in given.items() if name not in OF_A_VIDEO}
        if mine.get("best_of", 1) != 1:
            mine.setdefault("search", "drop")       # a row without "search" is from before there was another
        if shared is None:
            shared, first = mine, number
        for name in sorted(shared.keys() | mine.keys()):
            if shared.get(name) != mine.get(name):
                raise InputError(f"{place} have another {name} than those of prompt {first}: sample them in "
                                 "two runs")
    return {name: resolved(name, value, path) for name, value in (shared or {}).items()}


def resolved(name, value, path):
    """A setting's value. The value of a flag of PATHS is relative to the folder of the file `path`."""
    return str(Path(path).parent / value) if name in PATHS and isinstance(value, str) else value


def check_place(place, settings):
    """Raises InputError unless index, batch and place are whole numbers that fit together."""
    index, batch, number = (settings.get(name) for name in OF_A_VIDEO)
    most = settings.get("batch_size")
    if not all(type(value) is int for value in (index, batch, number, most)):
        raise InputError(f"{place}: index, batch, place and batch_size must be whole numbers")
    if index < 0 or not 0 <= number < batch <= most:
        raise InputError(f"{place}: index {index}, batch {batch} and place {number} do not fit together")
