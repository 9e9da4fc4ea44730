"""One writer at a time in a folder. Readers take no lock and are not held up.

The lock is the system's (flock on FOLDER/.lock), so it goes when its process ends, however that ends: a file that was
left behind locks nothing. The file holds the writer's process id, for the one that comes second.
"""
import errno
import fcntl
import os
import socket
import sys
from pathlib import Path

from common import InputError

NAME = ".lock"
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)      # file systems that were mounted without locks


def require_ours(folder, what, signs=()):
    """Raises InputError if `folder` is not ours to write in: it is if it is new or empty, holds a file called as one of `signs`,
    or was held for `what` before; and if its path is no text, which safetensors cannot open."""
    folder = Path(folder)
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise InputError(f"{folder}: its path is not UTF-8: name another folder") from None
    try:
        if not folder.exists() or any((folder / name).exists() for name in signs):
            return
        if not [path for path in folder.iterdir() if not path.name.startswith(".")]:
            return
        if (folder / NAME).is_file() and (folder / NAME).read_text(errors="replace").splitlines()[1:2] == [what]:
            return
    except OSError as error:
        raise InputError(f"{folder}: cannot be written in ({error.strerror}): name another folder") from None
    raise InputError(f"{folder}: holds files that are not ours, and nothing is written over them: name a new or empty folder")


def hold(folder, what="run"):
    """Creates `folder` and becomes its one writer -> the open lock file. The lock lasts until that file is closed, or the
    process ends: keep it in a variable, or `with hold(folder):`. what: it is written there, for `require_ours`. Raises InputError
    naming the process that writes there."""
    path = Path(folder) / NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")  # not "w": who comes second must find the first one's number
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be written ({error.strerror}): name another folder") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = (file.read(200).splitlines() or ["another one"])[0]
        file.close()
        raise InputError(f"{folder}: process {holder} is writing there: wait until it ends, or name another folder") from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            file.close()
            raise InputError(f"{path}: cannot be locked ({error.strerror})") from None
        print(f"warning: {folder}: its file system has no locks: see to it that nothing else writes there", file=sys.stderr)
    try:
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n{what}\n")
        file.flush()
    except OSError as error:  # a full disk: locked all the same, but nothing else will fit either
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    return file
