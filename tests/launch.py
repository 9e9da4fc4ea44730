"""Starts scripts in processes of their own, alone or as the ranks of one group. They are forked from a server
that has imported torch and the scripts, because importing them takes more time than most of these runs. A
process that tests what Python itself or torchrun does is started without this file."""
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection, forkserver, get_context
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
PRELOAD = ["launch", "tiny", "evaluate", "label", "torch._dynamo", "scale.plan"]
SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(PRELOAD)


def play(argv, cwd, env, file_limit, streams):
    """What a forked process does: it becomes `python *argv`."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for handle, path in zip((1, 2), streams):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), handle)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if argv[0] == "-c":
        sys.argv, code = ["-c", *argv[2:]], argv[1]
        sys.path.insert(0, "")
        exec(compile(code, "<string>", "exec"), sys.modules["__main__"].__dict__ | {"__name__": "__main__"})
    elif argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        runpy.run_path(argv[0], run_name="__main__")


class Launch:
    """`python *argv` in `ranks` processes; with ranks=None in one that knows nothing of ranks. As a context
    it ends those that still run.

    env: further environment variables. file_limit: the most bytes of a file they can write.
    """

    def __init__(self, *argv, ranks=None, cwd=ROOT, env=(), file_limit=None):
        self.folder = tempfile.TemporaryDirectory()
        self.streams = [Path(self.folder.name) / name for name in ("stdout", "stderr")]
        self.argv, self.store, each = [str(word) for word in argv], None, [{}]
        for path in self.streams:
            path.touch()
        if ranks:
            import torch.distributed as dist
            # as torchrun does: the store's port is chosen by whoever starts the ranks, who only join it
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            group = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=self.store.port, TORCHELASTIC_RESTART_COUNT=0,
                         TORCHELASTIC_USE_AGENT_STORE=True, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks,
                         GROUP_RANK=0)
            each = [group | dict(RANK=rank, LOCAL_RANK=rank) for rank in range(ranks)]
        with mock.patch.dict(os.environ, ENV | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}):
            forkserver.ensure_running()
        self.processes = []
        for variables in each:
            whole = ENV | dict(env) | {name: str(value) for name, value in variables.items()}
            self.processes.append(SERVER.Process(target=play, daemon=True, args=(
                self.argv, str(cwd), whole, file_limit, self.streams)))
            self.processes[-1].start()

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        self.signal(signal.SIGKILL)
        self.folder.cleanup()

    def signal(self, number):
        """Sends it to every process that runs, and waits until SIGKILL has ended them."""
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, number)
        if number == signal.SIGKILL:
            for process in self.processes:
                process.join()

    @property
    def running(self):
        return any(process.exitcode is None for process in self.processes)

    def wait(self, timeout=600):
        """-> subprocess.CompletedProcess. As torchrun does, it ends all ranks when one has failed; the return
        code is that of the first which failed."""
        end = time.monotonic() + timeout
        while True:
            # looked at once: one that ends between two looks would leave nothing to wait for
            codes = [process.exitcode for process in self.processes]
            code = next((code for code in codes if code), 0)
            left = [process for process, code in zip(self.processes, codes) if code is None]
            if code or not left:
                break
            if not connection.wait([process.sentinel for process in left], end - time.monotonic()):
                self.signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.argv, timeout, *self.texts())
        self.signal(signal.SIGTERM)
        for process in self.processes:
            process.join(10)
        self.signal(signal.SIGKILL)
        return subprocess.CompletedProcess(self.argv, code, *self.texts())

    def texts(self):
        return [path.read_text() for path in self.streams]


def python(*argv, timeout=600, **how):
    """Runs `python *argv` as Launch does -> subprocess.CompletedProcess"""
    with Launch(*argv, **how) as launched:
        return launched.wait(timeout)


class Popen:
    """As much of subprocess.Popen as study/parts.py uses, for a command that starts with sys.executable."""

    def __init__(self, command, stdout, stderr, env):
        self.log, self.launched = stdout, Launch(*command[1:], env=env)

    def wait(self):
        with self.launched:
            done = self.launched.wait()
        self.log.write(done.stdout + done.stderr)
        return done.returncode

    def terminate(self):
        self.launched.signal(signal.SIGTERM)


def torchrun(ranks, script, *argv, **how):
    """A script in so many processes; fails with the end of what they wrote to stderr -> CompletedProcess"""
    done = python(script, *argv, ranks=ranks, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    return done
