"""Lists of clips and of prompts (.jsonl or .csv): one reader and one writer for the whole project.

A folder of clips holds metadata.jsonl or metadata.csv with one row per clip: file_name (or video, file),
prompt (or text, caption) and perhaps label (or reward). A label is 1 good or 0 bad; a missing one means
unlabelled and is never read as 0. Case and blanks around these words do not matter.

Reading is strict. A row that could mean two things is refused, and the other rows are still read. A file in
which rows cannot be told apart is refused as a whole. Writing changes the labels and no other byte: columns
that nobody reads, their order, quotes, blanks, line ends, and bytes that are not UTF-8 stay as they are. """
import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from common import InputError
from formats import disk

FIELDS = {"file_name": ("file_name", "video", "file"), "prompt": ("prompt", "text", "caption"),
          "label": ("label", "reward")}
LABELS = {None: None, "": None, "0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v")
NAMES = ("metadata.jsonl", "metadata.csv")
BOM = b"\xef\xbb\xbf"
LINE_END = re.compile("\r\n|\r|\n")
# One field of a CSV file, after blanks: text between quotes, in which quotes are doubled, or text up to the
# next comma.
CSV_FIELD = re.compile(r' *+(?:"([^"]*+(?:""[^"]*+)*+)"|([^",\r\n][^,\r\n]*+)?)')
BLANKS = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()


@dataclass
class Row:
    """One row of a list, and where its values are in the file's text."""
    place: str                      # file, row and line, for messages
    values: list  # (name, value, start, end): the value is written at text[start:end], inside its quotes
    end: int                        # where the row's last value ends, and another one can be inserted
    problem: str | None = None      # why the row cannot be used


# ---- reading
def find_metadata(folder):
    """-> the path of the folder's metadata file. Raises InputError if the folder has none, or more than
    one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found = sorted(path for path in folder.iterdir() if path.name.lower() in NAMES)
    if not found:
        near = ", ".join(sorted(path.name for path in folder.glob("*metadata*"))[:3])
        only = f", only {near}" if near else ""
        raise InputError(f"{folder}: no metadata.jsonl or metadata.csv in it{only}")
    if len(found) > 1:
        raise InputError(f"{folder}: has {' and '.join(path.name for path in found)}: keep the one that "
                         "counts")
    return found[0]


def read_listing(folder):
    """-> ([(place, {file_name, prompt, label: 0, 1 or None}, problem or None) of each row], [notes to
    print]). The dict of a row with a problem has only the file_name, and is None if that cannot be used.

    Raises InputError if there is no list in the folder, or if its rows cannot be told apart.
    """
    path = find_metadata(folder)
    rows, unread = [], []
    for place, given, problem, others in read_table(path, FIELDS, "file_name"):
        clip, wrong = _clip(given)
        rows.append((place, clip, problem or wrong))
        unread += [name for name in others if name not in unread]
    if not unread:
        return rows, []
    listed = ", ".join(printable(name) or "(without a name)" for name in unread[:8])
    if len(unread) > 8:
        listed += ", ..."
    return rows, [f"{path}: columns that are not read: {listed}"]


def read_metadata(folder):
    """-> [{file_name, prompt, label: 0, 1 or None}]. Raises InputError, which names the first row that cannot
    be used."""
    rows, _ = read_listing(folder)
    for place, _, problem in rows:
        if problem:
            raise InputError(f"{place}: {problem}")
    if not rows:
        raise InputError(f"{folder}: its metadata file has no rows")
    return [row for _, row, _ in rows]


def read_table(path, fields, needed):
    """Yields (place, {field: value}, problem or None, [columns that are not read]) of each row of a .jsonl or
    .csv file.

    fields: {field: the names that its column may have}; needed: the field that the header of a CSV file must
    have. Raises InputError if rows cannot be told apart. """
    _, text = _read_text(path)
    _, rows = _read_rows(Path(path), text, fields, needed)
    for row in rows:
        yield row.place, *_given(row, fields)


def _read_text(path):
    """-> (BOM or b"", the text after it). A byte that is not UTF-8 becomes a lone surrogate, so that only its
    row has a problem."""
    content = Path(path).read_bytes()
    start = BOM if content.startswith(BOM) else b""
    content = content[len(start):]
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:4]:
        raise InputError(f"{path}: is UTF-16 or UTF-32: save it as UTF-8")
    return start, content.decode("utf-8", "surrogateescape")


def _read_rows(path, text, fields, needed):
    """-> (the header as a Row, or None for .jsonl; the Rows as an iterable)."""
    if path.suffix.lower() != ".csv":
        return None, _jsonl_rows(path, text)
    records = _csv_records(path, text)
    header = _csv_header(path, text, records, fields, needed)
    return header, _csv_rows(path, records, header)


def _field_of(name, fields):
    """The field that a column of this name gives, or None."""
    name = name.strip().lower()
    return next((field for field, names in fields.items() if name in names), None)


def _given(row, fields):
    """-> ({field: value}, problem or None, [columns that are not read]) of a Row."""
    given, problem, unread = {}, row.problem, []
    for name, value, _, _ in row.values:
        field = _field_of(name, fields)
        if field is None:
            unread.append(name)
        elif value in (None, ""):
            continue
        elif field not in given:
            given[field] = value
        elif given[field] != value:
            problem = problem or f"gives two {field}s, {_short(given[field])} and {_short(value)}"
    return given, problem, unread


def _clip(given):
    """{field: value} of a row -> (the dict that `read_listing` returns or None, problem or None)."""
    name, prompt, label = given.get("file_name"), given.get("prompt", ""), given.get("label")
    if not isinstance(name, str) or not name.strip():
        return None, "no file_name (or video, file)" + ("" if name is None else f", but {_short(name)}")
    if "\0" in name or not _is_path(name):
        return None, f"file_name is {_short(name)}, as no file can be called"
    if problem := not_text(prompt):
        return {"file_name": name}, f"prompt {problem}"
    word = label if label is None else str(label).strip().lower()
    if isinstance(label, (list, dict)) or word not in LABELS:
        return {"file_name": name}, f"label must be 0, 1 or missing, got {_short(label)}"
    return {"file_name": name, "prompt": prompt.strip(), "label": LABELS[word]}, None


def not_text(value):
    """Why a value is not text that can be written as UTF-8, or None."""
    if not isinstance(value, str):
        return f"must be text, got {_short(value)}"
    wrong = next((c for c in value if "\ud800" <= c <= "\udfff"), None)
    return None if wrong is None else f"holds {wrong!r}, which is not UTF-8 text"


def _is_path(name):
    try:
        name.encode("utf-8", "surrogateescape")             # a file's name may be bytes that are not text
    except UnicodeEncodeError:
        return False
    return True


def printable(text):
    """Text that others wrote, on one line of any terminal: control characters and lone surrogates are
    escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _short(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- .jsonl
def from_json(text, **how):
    """json.loads, but a text that is nested too deeply raises json.JSONDecodeError, a ValueError, as any
    other text that is not JSON."""
    try:
        return json.loads(text, **how)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None


def _jsonl_rows(path, text):
    """Yields the Rows of a .jsonl file. Raises InputError if the file is one JSON document over several
    lines."""
    start, first = 0, None
    for number, line in enumerate(text.split("\n"), 1):
        place = f"{path} row {number}"
        if line.strip():
            first = first or number
            try:
                value = from_json(line)
            except ValueError:
                value = None
            if number == first and (isinstance(value, list) or line.strip() in ("[", "{")):
                raise InputError(f"{place}: the file is one JSON document; write one object per line, "
                                 "without brackets or "
                                 "commas around it")
            if isinstance(value, dict):
                values = _members(line, start)
                yield Row(place, values, values[-1][3] if values else start)
            else:
                yield Row(place, [], start, "not a JSON object")
        start += len(line) + 1


def _members(line, offset):
    """(name, value, start, end) of each member of the JSON object in `line`; a name may come twice. offset:
    where the line starts in the file's text."""
    found, at = [], line.index("{") + 1
    while True:
        at = BLANKS.match(line, at).end()
        if line[at] == "}":
            return found
        if line[at] == ",":
            at = BLANKS.match(line, at + 1).end()
        name, at = DECODER.raw_decode(line, at)
        start = BLANKS.match(line, line.index(":", at) + 1).end()
        value, at = DECODER.raw_decode(line, start)
        found.append((name, value, offset + start, offset + at))


# ---- .csv
def _csv_records(path, text):
    """Yields (line number, [(value, start, end) of each field], where the record ends), for blank lines as
    well.

    Raises InputError at a quote that is not closed, or that has text after it.
    """
    at, line, fields, begin, number = 0, 1, [], 0, 0
    while at <= len(text):
        match = CSV_FIELD.match(text, at)
        quoted, at = match[1] is not None, match.end()
        if quoted:
            start, end = match.span(1)
        else:
            start, end = at - len(match[2] or ""), at
        if at < len(text) and text[at] not in ",\r\n":
            why = "there is text after a closing quote" if quoted else "one is not closed"
            raise InputError(f"{path} row {number} (line {line}): its quotes do not fit ({why}): close "
                             "each, and double "
                             "those within text")
        inner = text[start:end]
        start += len(inner) - len(inner.lstrip())
        inner = inner.strip()
        fields.append((inner.replace('""', '"') if quoted else inner, start, start + len(inner)))
        if at < len(text) and text[at] == ",":
            at += 1
            continue
        number += any(value for value, _, _ in fields)
        yield line, fields, at
        newline = LINE_END.match(text, at)
        at = newline.end() if newline else len(text) + 1
        line += len(LINE_END.findall(text, begin, at))
        fields, begin = [], at


def _csv_header(path, text, records, fields, needed):
    """-> the first record that is not blank, as a Row that has a name for each column."""
    found = next((record for record in records if any(value for value, _, _ in record[1])), (1, [], 0))
    line, cells, end = found
    names = [value for value, _, _ in cells]
    if len(names) < 2:
        words = {";": "semicolons", "\t": "tabs", "|": "bars"}
        for mark in words:
            if mark in text[:end].split("\n")[-1]:
                raise InputError(f"{path}: its columns are separated by {words[mark]}, not by commas: save "
                                 "it with commas")
    if needed not in [_field_of(name, fields) for name in names]:
        first, *others = fields[needed]
        raise InputError(f"{path}: its first row names no column {first} (or {', '.join(others)}), but "
                         f"{printable(', '.join(names)) or 'nothing'}")
    seen = set()
    for name in names:
        if name and name.lower() in seen:
            first = next(other for other in names if other.lower() == name.lower())
            raise InputError(f"{path}: has the column {printable(first)} twice: keep one of them")
        seen.add(name.lower())
    return Row(f"{path} line {line}", [(name, name, start, stop) for name, start, stop in cells], end)


def _csv_rows(path, records, header):
    """Yields the Rows of the records after the header. Raises InputError if a quote that is not closed takes
    in the rows below."""
    number, names = 0, [name for name, _, _, _ in header.values]
    for line, cells, end in records:
        if not any(value for value, _, _ in cells):
            continue
        number += 1
        place = f"{path} row {number} (line {line})"
        for value, _, _ in cells:
            if len(value.splitlines()) > 1:
                _refuse_swallowed_rows(path, place, value)
        if len(cells) == len(names):
            yield Row(place, [(name, *cell) for name, cell in zip(names, cells)], end)
        else:
            yield Row(place, [], end, f"has {len(cells)} fields where the first row names {len(names)}: put "
                                      "text with "
                      "commas in quotes")


def _refuse_swallowed_rows(path, place, value):
    """Raises InputError if a field of several lines holds the name of another clip."""
    for part in re.split("[,\r\n]", value)[1:]:
        part = part.strip(' "')
        if part.lower().endswith(SUFFIXES) or os.path.isfile(path.parent / part):
            raise InputError(f"{place}: a quote that is not closed there takes in the rows below")


# ---- writing
def write_labels(folder, labels):
    """Writes labels into the folder's list and changes no other byte of it -> the list's path.

    labels: {normal path of a clip's file: 1, 0, or None for no label}; other clips keep theirs. If the list
    has no field for labels, one is added after the others. Raises InputError, which names the first row that
    cannot be used, or OSError if the disk fails; in both cases the list stays as it was. """
    path = find_metadata(folder)
    start, text = _read_text(path)
    header, rows = _read_rows(path, text, FIELDS, "file_name")
    edits, changed = [], False
    columns = [] if header is None else [_field_of(name, FIELDS) for name, _, _, _ in header.values]
    lacks_column = header is not None and "label" not in columns
    words = {None: "null", 0: "0", 1: "1"} if header is None else {None: "", 0: "0", 1: "1"}
    for row in rows:
        given, problem, _ = _given(row, FIELDS)
        clip, problem = (None, problem) if problem else _clip(given)
        if problem:
            raise InputError(f"{row.place}: {problem}")
        label = labels.get(os.path.normpath(clip["file_name"]), clip["label"])
        fields = [value for value in row.values if _field_of(value[0], FIELDS) == "label"]
        filled = [value for value in fields if value[1] not in (None, "")]
        changed = changed or label != clip["label"]
        if lacks_column:                        # every row gets a field, so that all have equally many
            edits.append((row.end, row.end, f",{words[label]}"))
        elif label != clip["label"]:
            for _, _, begin, end in filled or fields[:1]:
                edits.append((begin, end, words[label]))
            if not fields:
                edits.append((row.end, row.end, f', "label": {words[label]}'))
    if changed:
        if lacks_column:
            edits.append((header.end, header.end, ",label"))
        pieces, at = [], 0
        for begin, end, written in sorted(edits):
            pieces += [text[at:begin], written]
            at = end
        text = "".join(pieces) + text[at:]
        replace_bytes(os.path.realpath(path), start + text.encode("utf-8", "surrogateescape"))
    return path


def write_rows(path, rows):
    """Writes dicts as .jsonl, one per line, whole or not at all."""
    replace_text(path, "".join(f"{_as_line(row)}\n" for row in rows))


def update_rows(path, rows):
    """Like `write_rows`, for a list that others may have changed meanwhile. If the list already has a row
    with the same values, its line stays as it is, with its label, other fields and spelling. Rows of other
    files stay too, after these."""
    path, lines = Path(path), {}
    text = _read_text(path)[1] if path.exists() else ""
    for line in filter(str.strip, text.split("\n")):
        try:
            row = from_json(line)
            name = os.path.normpath(row["file_name"])
        except (ValueError, TypeError, KeyError):
            row, name = {}, line                                # a line that cannot be read stays as it is
        lines[name] = row, line
    written = []
    for row in rows:
        old, line = lines.pop(os.path.normpath(row["file_name"]), ({}, ""))
        is_there = line and all(old.get(key) == value for key, value in row.items() if key != "file_name")
        written.append(line if is_there else _as_line(row))
    for name, (row, line) in lines.items():
        if not row or os.path.exists(path.parent / name):
            written.append(line)
    replace_bytes(path, "".join(f"{line}\n" for line in written).encode("utf-8", "surrogateescape"))


def _as_line(row):
    """A dict as one line of JSON. Text is escaped only if it would not print."""
    line = json.dumps(row, ensure_ascii=False)
    return line if line.isprintable() else json.dumps(row)


def replace_text(path, text):
    replace_bytes(path, text.encode())


def replace_bytes(path, content):
    """Writes a file whole or not at all, also if the power fails: it gets a temporary name until
    formats/disk.put renames it.

    Raises OSError, which names the file. The temporary file is removed if anything fails.
    """
    temporary = f"{path}.tmp"
    try:
        Path(temporary).write_bytes(content)
        if os.path.exists(path):
            shutil.copymode(path, temporary)
        disk.put(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
