"""metadata.jsonl or metadata.csv beside the clips, read strictly: what could mean two things is refused, with its row.

One row a clip: file_name (or video, file), prompt (or text, caption), and perhaps label (or reward): 1 good, 0 bad, missing
= unlabelled, which is never read as 0. Case and blanks of these words do not matter. A row that cannot be used is that
row's problem; a file in which rows cannot be told apart is refused as a whole.
"""
import contextlib
import csv
import io
import json
import os
import re
from pathlib import Path

from common import InputError
from formats import disk

FIELDS = {"file_name": ("file_name", "video", "file"), "prompt": ("prompt", "text", "caption"),
          "label": ("label", "reward")}
LABELS = {None: None, "": None, "0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v")
NAMES = ("metadata.jsonl", "metadata.csv")


def printable(text):
    """Text of others on one line of any terminal: control characters and broken ones are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def find_metadata(folder):
    """-> the path of the folder's metadata file. Raises InputError if there is none, or more than one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found = sorted(path for path in folder.iterdir() if path.name.lower() in NAMES)
    if not found:
        near = ", ".join(sorted(path.name for path in folder.glob("*metadata*"))[:3])
        raise InputError(f"{folder}: no metadata.jsonl or metadata.csv in it" + (f", only {near}" if near else ""))
    if len(found) > 1:
        raise InputError(f"{folder}: has {' and '.join(path.name for path in found)}: keep the one that counts")
    return found[0]


def read_listing(folder):
    """-> ([(place, {file_name, prompt, label: 0 | 1 | None} or None, problem or None) of each row], [what else to know]).

    Raises InputError if there is no such file, or its rows cannot be told apart.
    """
    path = find_metadata(folder)
    rows, unknown = [], {}
    for place, given, problem, strange in read_table(path, FIELDS, "file_name"):
        row = None
        if problem is None:
            row, problem = _clip(given)
        unknown |= dict.fromkeys(strange)
        rows.append((place, row, problem))
    listed = ", ".join(printable(name) or "(without a name)" for name in list(unknown)[:8]) + ", ..." * (len(unknown) > 8)
    return rows, [f"{path}: columns that are not read: {listed}"] if unknown else []


def read_table(path, fields, needed):
    """Yields (place, {field: value}, problem or None, [columns that are not read]) of each row of a .jsonl or .csv file.

    fields: {field: the names it may have}; needed: the field without which a csv's first row is no header. Raises InputError
    if rows cannot be told apart.
    """
    path = Path(path)
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:4]:
        raise InputError(f"{path}: is UTF-16 or UTF-32: save it as UTF-8")
    text = raw.decode("utf-8", "surrogateescape")       # a byte that is not UTF-8 is its row's problem
    field_of = {name: field for field, names in fields.items() for name in names}
    rows = _read_csv(path, text, field_of, needed) if path.suffix.lower() == ".csv" else _read_jsonl(path, text)
    for place, pairs, problem in rows:
        given, strange = {}, []
        for name, value in pairs or ():
            field = field_of.get(name.strip().lower())
            if field is None:
                strange.append(name)
            elif value not in (None, "") and given.setdefault(field, value) is not value and given[field] != value:
                problem = problem or f"gives two {field}s, {_short(given[field])} and {_short(value)}"
        yield place, given, problem, strange


def from_json(text, **how):
    """json.loads, for which a text nested too deeply is no JSON either: json.JSONDecodeError, a ValueError."""
    try:
        return json.loads(text, **how)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None


def write_rows(path, rows):
    """Writes dicts as .jsonl, a row a line, whole or not at all: readable, but escaped where a file's name is no text."""
    lines = [line if (line := json.dumps(row, ensure_ascii=False)).isprintable() else json.dumps(row) for row in rows]
    replace_text(path, "".join(f"{line}\n" for line in lines))


def replace_text(path, text):
    replace_bytes(path, text.encode())


def replace_bytes(path, content):
    """Whole or not at all: a temporary name, then a rename. Raises OSError that names the file."""
    try:
        Path(f"{path}.tmp").write_bytes(content)
        disk.put(f"{path}.tmp", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.tmp")
        raise OSError(error.errno, error.strerror, str(path)) from None


def read_metadata(folder):
    """-> [{file_name, prompt, label: 0 | 1 | None}]. Raises InputError naming the first unusable row."""
    rows, _ = read_listing(folder)
    for place, _, problem in rows:
        if problem:
            raise InputError(f"{place}: {problem}")
    if not rows:
        raise InputError(f"{folder}: its metadata file has no rows")
    return [row for _, row, _ in rows]


def _read_jsonl(path, text):
    """Yields (place, [(name, value)] or None, problem or None)."""
    first = None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        first = first or number
        try:
            pairs = from_json(line, object_pairs_hook=_Pairs)
        except ValueError:
            pairs = None
        whole = number == first and (isinstance(pairs, list) and not isinstance(pairs, _Pairs) or line.strip() in ("[", "{"))
        if whole:
            raise InputError(f"{path} row {number}: the file is one JSON document; write one object a line, without brackets or "
                             "commas around it")
        ok = isinstance(pairs, _Pairs)
        yield f"{path} row {number}", pairs if ok else None, None if ok else "not a JSON object"


class _Pairs(list):
    """The (name, value) pairs of a JSON object, in which a name may stand twice."""


def _read_csv(path, text, field_of, needed):
    """Yields (place, [(name, value)] or None, problem or None). Raises InputError where a quote swallows rows."""
    reader, number, before = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True), 0, 0
    try:
        header = next((cells for cells in reader if any(cell.strip() for cell in cells)), [])
        names = [cell.strip() for cell in header]
        if len(names) < 2 and (found := [mark for mark in ";\t|" if mark in text.split("\n")[reader.line_num - 1]]):
            mark = {"\t": "tabs", ";": "semicolons", "|": "bars"}[found[0]]
            raise InputError(f"{path}: its columns are separated by {mark}, not by commas: save it with commas")
        if needed not in [field_of.get(name.lower()) for name in names]:
            first, *others = [name for name, field in field_of.items() if field == needed]
            raise InputError(f"{path}: its first row names no column {first} (or {', '.join(others)}), but "
                             f"{printable(', '.join(names)) or 'nothing'}")
        if twice := [name for name in names if name and [x.lower() for x in names].count(name.lower()) > 1]:
            raise InputError(f"{path}: has the column {printable(twice[0])} twice: keep one of them")
        before = reader.line_num
        for cells in reader:
            first, before = before + 1, reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            number += 1
            place = f"{path} row {number} (line {first})"
            parts = [part.strip(' "') for cell in cells if len(cell.splitlines()) > 1 for part in re.split("[,\r\n]", cell)[1:]]
            swallowed = [part for part in parts if part.lower().endswith(SUFFIXES) or os.path.isfile(path.parent / part)]
            if swallowed:
                raise InputError(f"{place}: a quote that is not closed there takes in the rows below")
            problem = None
            if len(cells) != len(names):
                problem = f"has {len(cells)} fields where the first row names {len(names)}: put text with commas in quotes"
            yield place, None if problem else [(n, cell.strip()) for n, cell in zip(names, cells)], problem
    except csv.Error as error:
        raise InputError(f"{path} row {number + 1} (line {before + 1}): its quotes do not fit ({error}): close each, and double "
                         "those within text") from None


def _clip(given):
    """{field: value} of a row -> ({file_name, prompt, label} or None, problem or None)"""
    name, prompt, label = given.get("file_name"), given.get("prompt", ""), given.get("label")
    if not isinstance(name, str) or not name.strip():
        return None, "no file_name (or video, file)" + ("" if name is None else f", but {_short(name)}")
    if problem := not_text(prompt):
        return None, f"prompt {problem}"
    if "\0" in name or not _is_path(name):
        return None, f"file_name is {_short(name)}, as no file can be called"
    said = label if label is None else str(label).strip().lower()
    if isinstance(label, (list, dict)) or said not in LABELS:
        return None, f"label must be 0, 1 or missing, got {_short(label)}"
    return {"file_name": name, "prompt": prompt.strip(), "label": LABELS[said]}, None


def not_text(value):
    """Why a value is no text that can be written as UTF-8, or None."""
    if not isinstance(value, str):
        return f"must be text, got {_short(value)}"
    wrong = next((c for c in value if "\ud800" <= c <= "\udfff"), None)
    return wrong and f"holds {wrong!r}, which is not UTF-8 text"


def _short(value):
    text = repr(dict(value) if isinstance(value, _Pairs) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_path(name):
    try:
        return bool(name.encode("utf-8", "surrogateescape"))      # a file's name may be bytes that are no text
    except UnicodeEncodeError:
        return False
