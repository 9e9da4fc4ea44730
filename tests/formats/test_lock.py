"""formats/lock.py against a second process: who holds a folder, who is refused, and that a killed holder lets
go."""
import signal
import subprocess
import sys

import pytest

from common import InputError
from formats import lock

HOLDER = "import sys, time; from formats import lock; kept = lock.hold(sys.argv[1]); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_writer_is_told_who_the_first_is(holder, tmp_path):
    with pytest.raises(InputError, match=rf"run: process {holder.pid} on .* is writing there") as refused:
        lock.hold(tmp_path / "run")
    assert "\n" not in str(refused.value)
    with lock.hold(tmp_path / "other"):     # another folder is free
        pass


@pytest.mark.parametrize("how", (signal.SIGKILL, signal.SIGTERM))
def test_the_system_lets_go_when_the_holder_dies(holder, tmp_path, how):
    holder.send_signal(how)
    holder.wait()
    with lock.hold(tmp_path / "run"), pytest.raises(InputError, match="is writing there"):
        lock.hold(tmp_path / "run")
    lock.hold(tmp_path / "run").close()     # closed: free again


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file.*: cannot be written .*name another folder"):
        lock.hold(tmp_path / "file" / "run")
