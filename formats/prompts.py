"""Lists of prompts, to sample from: one per line of a .txt file, or the rows of a .jsonl or .csv file.

Rows have prompt (or text, caption) and perhaps image (a first frame, whose path is relative to the file) and
seed. They are read as strictly as the rows of formats/metadata.py. In a .txt file, lines that begin with #
are comments. Prompt files of other trainers put flags after a prompt, as in `a cat --w 640 --h 480`. Such
flags are refused, so that none of them is sampled as a part of the prompt. """
import os
import re
from pathlib import Path

from common import InputError
from formats.metadata import FIELDS, not_text, read_table

NAMES = {"prompt": FIELDS["prompt"], "image": ("image",), "seed": ("seed",), "settings": ("settings",)}
FOREIGN_FLAG = re.compile(r"(?:^|\s)(--[A-Za-z][\w-]*)(?=[\s=]|$)")


def read_prompts(path):
    """-> [{"prompt": str, "image": path or None, "seed": int or None}], one for each prompt in the file. If a
    row says how its video was made (formats/samples.py), its dict has "settings", a dict, too.

    Raises InputError, which names the file, and the row, that cannot be used: a missing or empty file, a
    prompt that is not text or holds flags of another trainer, an image that is not there, a seed that is not
    a whole number. """
    path = Path(path)
    if path.suffix.lower() not in (".txt", ".jsonl", ".csv"):
        raise InputError(f"{path}: prompts come in a .txt (one per line), .jsonl or .csv file")
    rows = []
    try:
        if path.suffix.lower() == ".txt":
            for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
                if line.strip() and not line.lstrip().startswith("#"):
                    rows.append((f"{path} row {number}", {"prompt": line}, None))
        else:
            rows = [(place, given, problem) for place, given, problem, _ in read_table(path, NAMES, "prompt")]
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise InputError(f"{path}: is not UTF-8 text ({error})") from None
    if not rows:
        raise InputError(f"{path}: holds no prompt")
    return [_checked(place, given, problem, path.parent) for place, given, problem in rows]


def foreign_flag(prompt):
    """The first flag of another trainer in a prompt, such as "--w", or None. A dash between blanks is not a
    flag."""
    found = FOREIGN_FLAG.search(prompt)
    return found and found[1]


def _checked(place, given, problem, folder):
    if problem:
        raise InputError(f"{place}: {problem}")
    prompt, image, seed = given.get("prompt", ""), given.get("image"), given.get("seed")
    wrong = not_text(prompt)
    if wrong or not prompt.strip():
        raise InputError(f"{place}: its prompt (or text, caption) {wrong or 'is empty'}")
    if flag := foreign_flag(prompt):
        raise InputError(f"{place}: {flag} is not read from a prompt: take it out; a seed or image of its "
                         "own goes into a "
                         ".jsonl or .csv file, all else into sample.py's flags")
    if image is not None and not (isinstance(image, str) and os.path.isfile(folder / image)):
        raise InputError(f"{place}: there is no image {folder / str(image)}")
    if seed is not None and not str(seed).strip().isdecimal():
        raise InputError(f"{place}: seed must be a whole number from 0 on, got {seed!r}")
    return {"prompt": " ".join(prompt.split()), "image": None if image is None else str(folder / image),
            "seed": None if seed is None else int(str(seed))} | _settings(place, given.get("settings"))


def _settings(place, value):
    """{"settings": dict} of a row, {} if it has none. Raises InputError if they are not a JSON object."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{place}: settings must be an object, as sample.py writes it in metadata.jsonl")
    return {"settings": value}
