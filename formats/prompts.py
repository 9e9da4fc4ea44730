"""Lists of prompts: one a line in a .txt, or rows of a .jsonl or .csv with prompt (or text, caption) and, where wanted,
image (a first frame, beside the file) and seed.
"""
import csv
import json
from pathlib import Path

from common import InputError

NAMES = {"prompt": ("prompt", "text", "caption"), "image": ("image",), "seed": ("seed",)}


def read_prompts(path):
    """-> [{"prompt": str, "image": path or None, "seed": int or None}], one for each row of the file.

    Raises InputError naming the file, and the row, of what cannot be used: a missing or empty file, a row whose prompt is
    no text, an image that is not there, a seed that is no whole number.
    """
    path = Path(path)
    if path.suffix.lower() not in (".txt", ".jsonl", ".csv"):
        raise InputError(f"{path}: prompts come in a .txt (one a line), .jsonl or .csv file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(_rows(path, text))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (UnicodeDecodeError, IsADirectoryError, csv.Error) as error:
        raise InputError(f"{path}: is not UTF-8 text of that format ({error})") from None
    if not rows:
        raise InputError(f"{path}: holds no prompt")
    return [_checked(row, f"{path} row {number}", path.parent) for number, row in rows]


def _rows(path, text):
    """Yields (number, {column: value}) of the rows that are not blank; numbers count from 1, a csv's below its header."""
    if path.suffix.lower() == ".csv":
        reader = csv.reader(text.splitlines(True), strict=True)
        header = [name.strip().lower() for name in next(reader, [])]
        for number, fields in enumerate(reader, 1):
            if len(fields) > len(header):
                raise InputError(f"{path} row {number}: has {len(fields)} fields, the header {len(header)}: quote text with commas")
            if fields:
                yield number, dict(zip(header, fields))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if path.suffix.lower() == ".txt":
            yield number, {"prompt": line}
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{path} row {number}: is not a JSON object")
        yield number, {name.strip().lower(): value for name, value in row.items()}


def _checked(row, place, folder):
    found = {field: next((row[name] for name in names if row.get(name) not in (None, "")), None)
             for field, names in NAMES.items()}
    prompt, image, seed = found["prompt"], found["image"], found["seed"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{place}: its prompt (or text, caption) must be text, got {prompt!r}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place}: its prompt holds half a character (a lone surrogate)") from None
    if image is not None and not (isinstance(image, str) and (folder / image).is_file()):
        raise InputError(f"{place}: there is no image {folder / str(image)}")
    if seed is not None and not str(seed).strip().isdecimal():
        raise InputError(f"{place}: seed must be a whole number from 0 on, got {seed!r}")
    return {"prompt": " ".join(prompt.split()), "image": image and str(folder / image),
            "seed": None if seed is None else int(str(seed))}
