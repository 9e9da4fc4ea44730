"""One writer at a time in a folder. Readers take no lock and never wait.

The lock is the system's (flock on FOLDER/.lock). It ends with its process, however the process ends, so a
file that was left behind locks nothing. The file holds the writer's process id, which a second writer is
told."""
import fcntl
import os
import socket
from pathlib import Path

from common import InputError
from formats import disk
from formats.paths import require_writable

NAME = ".lock"


def require_ours(folder, what, signs=(), flag=""):
    """Raises InputError, which names the flag, if `folder` is not ours to write in, or cannot be written in.
    It is ours if it is new or empty, holds a file named as one of `signs`, or was held for `what` before. A
    path that is not UTF-8 is refused: safetensors cannot open it."""
    folder, said = Path(folder), f"{flag} {folder}".strip()
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise InputError(f"{said}: its path is not UTF-8: name another folder") from None
    require_writable(folder / NAME, said)
    try:
        if not folder.exists() or any((folder / name).exists() for name in signs):
            return
        if not [path for path in folder.iterdir() if not path.name.startswith(".")]:
            return
        if (folder / NAME).is_file():
            held_for = (folder / NAME).read_text(errors="replace").splitlines()[1:2]
            if held_for == [what]:
                return
    except OSError as error:
        raise InputError(f"{said}: cannot be written in ({error.strerror}): name another folder") from None
    raise InputError(f"{said}: holds files that are not ours, and nothing is written over them: name a "
                     "new or empty folder")


def take(file, folder):
    """Locks an open file until it is closed or the process ends -> whether nobody else holds the lock. If the
    file system has no locks, it warns once and returns True."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        disk.warn_once("lock", f"{folder}: its file system has no locks ({error.strerror}): make sure that "
                               "nothing else writes "
                       "there")
    return True


def hold(folder, what="run"):
    """Creates `folder` and becomes its one writer -> the open lock file. The lock lasts until that file is
    closed or the process ends: keep it in a variable, or use `with hold(folder):`. what: is written into the
    file, for `require_ours`. Raises InputError, which names the process that writes there."""
    path = Path(folder) / NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # not "w", because a second writer must be able to read the first one's process id
        file = path.open("a+")
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be written ({error.strerror}): name another "
                         "folder") from None
    if not take(file, folder):
        file.seek(0)
        holder = (file.read(200).splitlines() or ["another one"])[0]
        file.close()
        raise InputError(f"{folder}: process {holder} is writing there: wait until it ends, or name another "
                         "folder")
    try:
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n{what}\n")
        file.flush()
    except OSError as error:                                    # on a full disk nothing else would fit either
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    return file
