"""What was written stays: after a kill, and after a power loss.

With a rename a file is there whole or not at all, which is enough for a kill. But after a power loss a disk
may have kept the new name and lost the content, or lost the name. So the content is flushed first, then the
file is renamed, and then the folder that holds the name is flushed. If a file system cannot flush a folder,
or has no locks, a warning is printed once, and work continues."""
import errno
import os
import secrets
import shutil
import socket
import sys
import time
from pathlib import Path

from common import InputError, gather, rank

# A flush that fails with one of UNSUPPORTED is tolerated. For a folder any error but FULL is tolerated.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
FULL = (errno.ENOSPC, errno.EDQUOT)
# the end that a folder's name gets while another folder takes its place
REPLACED = ".replaced"
# seconds that a network disk has to show a new file to other nodes
PATIENCE = 3.0

_warned = set()


def warn_once(about, message):
    """Prints a warning on stderr, but only the first one that a process has for each `about`."""
    if about not in _warned:
        _warned.add(about)
        print(f"warning: {message}", file=sys.stderr, flush=True)


def flush(path):
    """Returns when the file or folder is on the disk. Raises OSError, which names it, if the disk is full or
    fails; where the file system cannot flush, it warns once."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        if not Path(path).is_dir():
            raise
        return _cannot_flush(path, "it cannot be opened")
    try:
        flush_handle(handle, path)
    finally:
        os.close(handle)


def flush_handle(handle, path):
    """`flush` of an open file, given by its number; path: its name, for the message."""
    try:
        os.fsync(handle)
    except OSError as error:
        tolerated = error.errno in UNSUPPORTED or (Path(path).is_dir() and error.errno not in FULL)
        if not tolerated:
            raise OSError(error.errno, error.strerror, str(path)) from None
        _cannot_flush(path, error.strerror)


def _cannot_flush(path, why):
    warn_once("flush", f"{path}: its file system cannot flush ({why}): what was written last can be missing "
                       "after a power loss")


def put(temporary, path):
    """Renames the file or folder `temporary` to `path`, and replaces what is there. After a kill or a power
    loss `path` has the old content or the new content, whole. But if a folder was being replaced, the old
    folder can be left at `<path>.replaced`. Raises OSError."""
    temporary, path = Path(temporary), Path(path)
    old = path.with_name(f"{path.name}{REPLACED}")
    is_folder = temporary.is_dir()
    if is_folder:
        for inner in temporary.rglob("*"):
            flush(inner)
    flush(temporary)
    if is_folder and path.exists():                             # a folder cannot be replaced in one move
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.replace(temporary, path)
    # the new name is there for good before the old content goes
    flush(path.parent)
    if is_folder:
        shutil.rmtree(old, ignore_errors=True)


def require_shared(folder, flag):
    """Raises InputError, in every process, if not all of them see what the first one writes in `folder`: the
    nodes have no common disk, or their working folders differ. Every process must call it; it leaves nothing
    behind. flag: such as "--output_dir", for the message."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    # look in the folder itself, or in the nearest folder above that exists
    above = 0
    places = [Path(folder), *Path(folder).absolute().parents]
    name, problem = None, None
    if rank() == 0:
        while not places[above].is_dir():
            above += 1
        name = f".shared-{secrets.token_hex(8)}"
        try:
            (places[above] / name).touch()
        except OSError as error:
            problem = f"{flag} {folder}: cannot be written in ({error.strerror}): name another folder"
    above, name, problem = gather((above, name, problem))[0]
    if problem:
        raise InputError(problem)
    try:
        end = time.monotonic() + PATIENCE
        mark = places[min(above, len(places) - 1)] / name
        while not mark.exists() and time.monotonic() < end:
            time.sleep(0.05)
        found = gather((mark.exists(), socket.gethostname()))
    finally:
        if rank() == 0:
            mark.unlink(missing_ok=True)
    blind = [number for number, (seen, _) in enumerate(found) if not seen]
    if blind:
        raise InputError(f"{flag} {folder}: process {blind[0]} on {found[blind[0]][1]} does not see what "
                         "process 0 on "
                         f"{found[0][1]} writes there: give the same folder on a disk that all nodes share")
