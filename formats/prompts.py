"""Lists of prompts: one a line in a .txt, or rows of a .jsonl or .csv with prompt (or text, caption) and, where wanted,
image (a first frame, beside the file) and seed. Rows are read as strictly as those of formats/metadata.py.
"""
import os
from pathlib import Path

from common import InputError
from formats.metadata import FIELDS, not_text, read_table

NAMES = {"prompt": FIELDS["prompt"], "image": ("image",), "seed": ("seed",), "settings": ("settings",)}


def read_prompts(path):
    """-> [{"prompt": str, "image": path or None, "seed": int or None}], one for each row of the file; with "settings", a
    dict, where a row says how its video was made (formats/samples.py).

    Raises InputError naming the file, and the row, of what cannot be used: a missing or empty file, a row whose prompt is
    no text, an image that is not there, a seed that is no whole number.
    """
    path = Path(path)
    if path.suffix.lower() not in (".txt", ".jsonl", ".csv"):
        raise InputError(f"{path}: prompts come in a .txt (one a line), .jsonl or .csv file")
    try:
        if path.suffix.lower() == ".txt":
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            rows = [(f"{path} row {n}", {"prompt": line}, None, []) for n, line in enumerate(lines, 1) if line.strip()]
        else:
            rows = list(read_table(path, NAMES, "prompt"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise InputError(f"{path}: is no UTF-8 text ({error})") from None
    if not rows:
        raise InputError(f"{path}: holds no prompt")
    return [_checked(given, place, problem, path.parent) for place, given, problem, _ in rows]


def _checked(given, place, problem, folder):
    if problem:
        raise InputError(f"{place}: {problem}")
    prompt, image, seed = given.get("prompt", ""), given.get("image"), given.get("seed")
    if (wrong := not_text(prompt)) or not prompt.strip():
        raise InputError(f"{place}: its prompt (or text, caption) {wrong or 'is empty'}")
    if image is not None and not (isinstance(image, str) and os.path.isfile(folder / image)):
        raise InputError(f"{place}: there is no image {folder / str(image)}")
    if seed is not None and not str(seed).strip().isdecimal():
        raise InputError(f"{place}: seed must be a whole number from 0 on, got {seed!r}")
    return {"prompt": " ".join(prompt.split()), "image": image and str(folder / image),
            "seed": None if seed is None else int(str(seed))} | _settings(place, given.get("settings"))


def _settings(place, pairs):
    """{"settings": dict} of a row's JSON object, as read_table gives it; {} if there is none."""
    if pairs is None:
        return {}
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise InputError(f"{place}: settings must be an object, as sample.py writes it in metadata.jsonl")
    return {"settings": dict(pairs)}
