"""Paths as the user means them: names are never taken for protocols or patterns, and a path that cannot be
read or written is known before any work begins."""
import os
import stat
import tempfile
import unicodedata
from pathlib import Path

from common import InputError

NAME_MAX = 255                          # bytes that a name may have, if the file system does not say


def as_url(path):
    """The path in the form that FFmpeg needs. Without "file:" the name `take:1.mp4` would be read as a URL of
    the protocol `take`."""
    return f"file:{path}"


def require_file(path):
    """Raises InputError unless `path` is a regular file that can be read and is not empty. Special files of
    the kernel look empty, and some of them never end."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path}: is not a file")
        if not found.st_size:
            raise InputError(f"{path}: damaged or not a video (it is empty)")
        open(path, "rb").close()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: there is no such file{other_spelling(path)}") from None
    except OSError as e:                # permissions, a name that is too long, a loop of links
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except ValueError as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{path}: no file can have such a name") from None


def other_spelling(path):
    """The end of a message about a path that does not exist. It is a hint if the disk has the same letters in
    another Unicode form, because macOS and Linux write accents and umlauts differently; otherwise it is
    empty."""
    found = same_letters(path)
    if found is None:
        return ""
    form = "NFD" if unicodedata.is_normalized("NFD", str(found)) else "NFC"
    return f", but one with the same letters in another Unicode form ({form}): rename it, or change the list"


def same_letters(path):
    """-> the existing path that differs from `path` only by the Unicode normal form of its names, or None."""
    path = Path(path)
    found = Path(path.anchor)
    for name in path.parts[1 if path.anchor else 0:]:
        if not os.path.exists(found / name):
            try:
                there = os.listdir(found)
            except OSError:
                return None
            wanted = unicodedata.normalize("NFC", name)
            name = next((other for other in there if unicodedata.normalize("NFC", other) == wanted), None)
            if name is None:
                return None
        found = found / name
    return None if found == path else found


def require_writable(path, said=None):
    """Raises InputError unless a file can be written at `path`, whose folders need not exist yet. To know, it
    makes a temporary file in the nearest folder that exists, and removes it: permissions alone do not tell
    what a network disk allows. said: what the user gave, such as "--out x", for the message; default: path.
    """
    path = Path(path)
    said = said or path
    if os.path.isdir(path):
        raise InputError(f"{said}: is a folder: name a file to write")
    folder = path.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise InputError(f"{said}: cannot be written ({e.strerror}): name another place") from None
    try:
        longest = os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):       # this file system does not say
        longest = NAME_MAX
    for name in path.relative_to(folder).parts:
        if len(os.fsencode(name)) > longest:
            raise InputError(f"{said}: cannot be written (a name has more than {longest} bytes): "
                             "name another place")
