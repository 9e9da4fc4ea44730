"""formats/lock.py against a second process: who holds a folder, who is refused, and that a killed holder lets
go."""
import multiprocessing
import os
import signal
import time

import pytest

from common import InputError
from formats import lock

FORK = multiprocessing.get_context("fork")                      # a copy of this process has torch already


def hold_for_ever(path, pipe):
    kept = lock.hold(path)
    pipe.send("held")
    time.sleep(600)
    kept.close()


@pytest.fixture
def holder(tmp_path):
    mine, other = FORK.Pipe(duplex=False)
    process = FORK.Process(target=hold_for_ever, args=(tmp_path / "run", other))
    process.start()
    assert mine.recv() == "held"
    yield process
    process.kill()
    process.join()


def test_the_second_writer_is_told_who_the_first_is(holder, tmp_path):
    with pytest.raises(InputError, match=rf"run: process {holder.pid} on .* is writing there") as refused:
        lock.hold(tmp_path / "run")
    assert "\n" not in str(refused.value)
    with lock.hold(tmp_path / "other"):     # another folder is free
        pass


@pytest.mark.parametrize("how", (signal.SIGKILL, signal.SIGTERM))
def test_the_system_lets_go_when_the_holder_dies(holder, tmp_path, how):
    os.kill(holder.pid, how)
    holder.join()
    with lock.hold(tmp_path / "run"), pytest.raises(InputError, match="is writing there"):
        lock.hold(tmp_path / "run")
    lock.hold(tmp_path / "run").close()     # closed: free again


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file.*: cannot be written .*name another folder"):
        lock.hold(tmp_path / "file" / "run")
