"""Runs of the script without the seconds that Python's start and PyTorch's import take each time: a server that has
imported it forks a process for each.

That process has the environment, folder and files of its run alone, and does what the script's main() does. Only the
start is left out; tests that are about it call run_script(fresh=True).
"""

import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
import train_gpt  # noqa: E402

TRAIN = ROOT / "train_gpt.py"
LONGEST = 300  # seconds: only guards against waiting for ever


def clean_environment(settings: dict[str, str]) -> dict[str, str]:
    """This process's environment without any of the script's settings, plus these."""
    known = {name.upper() for name in train_gpt.Settings.__dataclass_fields__}
    return {k: v for k, v in os.environ.items() if k not in known} | {"OMP_NUM_THREADS": "1"} | settings


# ----- the server


def become(job: dict, rank: int) -> None:
    """In a forked process: be `python script arguments`, or what torchrun starts as this rank."""
    for number, name in enumerate((os.devnull, job["out"], job["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_APPEND), number)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environ"] | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if job["ranks"] > 1 else {}))
    sys.argv = [job["script"], *job["arguments"]]
    if Path(job["script"]) == TRAIN:
        sys.exit(train_gpt.main())
    runpy.run_path(job["script"], run_name="__main__")
    sys.exit()


def serve() -> None:
    """For every job, a line of JSON, tell the processes that do it, then how each ended."""
    import torch._dynamo  # noqa: F401  # or the first optimizer of each process would, for two seconds

    gc.freeze()  # else each process visits all of it when it ends, for a second
    for line in sys.stdin:
        job, pids, codes = json.loads(line), [], {}
        for rank in range(job["ranks"]):
            pids.append(os.fork())
            if pids[-1] == 0:
                become(job, rank)
        print(json.dumps(pids), flush=True)
        while len(codes) < len(pids):
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
            for other in set(pids) - set(codes) if codes[pid] else ():  # as torchrun: without one the others must end
                os.kill(other, signal.SIGTERM)
        print(json.dumps([codes[pid] for pid in pids]), flush=True)


# ----- its client


class Server:
    """Started when the first run is asked for; ends with this process."""

    process = None

    def ask(self, job: dict) -> list[int]:
        if self.process is None:
            self.process = subprocess.Popen([sys.executable, __file__], env=clean_environment({}), bufsize=0,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        return self.answer()

    def answer(self) -> list[int]:
        if not select.select([self.process.stdout], [], [], LONGEST)[0]:
            raise TimeoutError(f"a run has not ended in {LONGEST} s")
        return json.loads(self.process.stdout.readline())


SERVER = Server()


class ForkedRun:
    """A run under way, of one process or of several. One at a time."""

    def __init__(self, settings: dict[str, str], *arguments: str, script: Path = TRAIN, processes: int = 0,
                 cwd: Path | None = None):
        environ, self.folder = clean_environment(settings), tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self.folder.name, name) for name in ("out", "err"))
        self.out.touch(), self.err.touch()
        if processes > 1:
            self.store = train_gpt.dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environ |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port),
                        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        self.pids = SERVER.ask({"script": str(script), "arguments": arguments, "environ": environ,
                                "ranks": max(1, processes), "cwd": str(cwd or Path.cwd()), "out": str(self.out),
                                "err": str(self.err)})

    def finish(self) -> subprocess.CompletedProcess:
        try:
            codes = SERVER.answer()
        except TimeoutError:
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)
            SERVER.answer()
            raise
        return subprocess.CompletedProcess(self.pids, next(filter(None, codes), 0), self.out.read_text(),
                                           self.err.read_text())


if __name__ == "__main__":
    serve()
