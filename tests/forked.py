"""Runs of Python without the seconds that its start and PyTorch's import take each time: a server that has imported
PyTorch, and nothing of this project, forks a process for each.

That process has the command line, environment, folder and files of its run alone. Only the start is left out; tests
that are about it call run_script(fresh=True).
"""

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "train_gpt.py"
LONGEST = 900  # seconds: only guards against waiting for ever
PLAIN = {  # what is on by default, off
    "CASEOPS_ENABLED": "0", "NUM_LOOPS": "0", "LOOP_START": "3", "LOOP_END": "5", "PARALLEL_START_LAYER": "99",
    "PARALLEL_MODE": "gptj", "VARLEN_ENABLED": "0", "SMEAR_GATE_ENABLED": "0", "SPARSE_ATTN_GATE_ENABLED": "0",
    "SPARSE_ATTN_GATE_SCALE": "1", "WARMDOWN_FRAC": "0.72", "MIN_LR": "0", "MUON_NS": "quintic",
    "MUON_ROW_NORMALIZE": "0", "BETA2": "0.95", "TTT_MODE": "none", "TTT_LORA_RANK": "96", "TTT_BETA2": "0.999",
    "PHASED_TTT_PREFIX_DOCS": "2000", "TTT_BUCKET_WINDOW": "512",
    "EVAL_STRIDE": "64", "EVAL_STAGES": "all", "QUANT_TRELLIS": "0", "NGRAM_TILT_ENABLED": "0", "TOKEN_ORDER": "16",
    "HEDGE_ENABLED": "0", "EMA_BLEND": "0", "KEY_OFFSET": "0", "VE_ENABLED": "0", "MUON_QK_HEADS": "0"}


def clean_environment(settings: dict[str, str]) -> dict[str, str]:
    """This process's environment without any of the script's settings, plus these."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import train_gpt

    known = {name.upper() for name in train_gpt.Settings.__dataclass_fields__}
    return {k: v for k, v in os.environ.items() if k not in known} | {"OMP_NUM_THREADS": "1"} | settings


# ----- the server


def become(job: dict, environ: dict[str, str]) -> None:
    """In a forked process: be `python` with the job's arguments, a script and its own, or -c, code and its own."""
    for number, name in enumerate(job["files"]):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY), number)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environ"] | environ)
    first, *rest = job["arguments"]
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        sys.exit()
    sys.argv, sys.path[0] = [first, *rest], os.path.dirname(os.path.realpath(first))
    if os.path.realpath(first) == str(TRAIN):
        import train_gpt

        sys.exit(train_gpt.main())
    runpy.run_path(first, run_name="__main__")
    sys.exit()


def start_ranks(job: dict, port: int) -> list[int]:
    """Fork the job's process, or as torchrun does as many as it has ranks; their ids."""
    pids, count = [], job["ranks"]
    for rank in range(count or 1):
        pids.append(os.fork())
        if pids[-1] == 0:
            become(job, {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": "0",
                         "TORCHELASTIC_USE_AGENT_STORE": "True"} if count else {})
    return pids


def wait_for(pids: list[int]) -> list[int]:
    """How each ended. As under torchrun, all must end when one fails."""
    codes = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        for other in set(pids) - set(codes) if codes[pid] else ():
            os.kill(other, signal.SIGTERM)
    return [codes[pid] for pid in pids]


def serve() -> None:
    """For every job, a line of JSON, tell the processes that do it, then how each ended."""
    import torch._dynamo  # noqa: F401  # or the first optimizer of each process would, for two seconds

    gc.freeze()  # else each process visits all of it when it ends, for a second
    for line in sys.stdin:
        job, store = json.loads(line), None
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            pids = start_ranks(job, port)
            if job["ranks"]:  # where they meet; it has a thread, so that it comes after the forks
                store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False,
                                                   master_listen_fd=os.dup(listener.fileno()))
        print(json.dumps(pids), flush=True)
        codes = wait_for(pids)
        del store
        print(json.dumps(codes), flush=True)


# ----- its clients


class Server:
    """Started when the first run is asked for; ends with this process."""

    process = None

    def start(self) -> subprocess.Popen:
        if self.process is None:
            self.process = subprocess.Popen([sys.executable, __file__], env=clean_environment({}), bufsize=0,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self.process

    def ask(self, job: dict) -> list[int]:
        self.start().stdin.write(json.dumps(job).encode() + b"\n")
        return self.answer()

    def answer(self) -> list[int]:
        if not select.select([self.process.stdout], [], [], LONGEST)[0]:
            raise TimeoutError(f"a run has not ended in {LONGEST} s")
        return json.loads(self.process.stdout.readline())


SERVER = Server()


class ForkedRun:
    """A run under way, of one process or, as torchrun has it, of several. One at a time."""

    def __init__(self, settings: dict[str, str], *arguments: str, processes: int = 0, cwd: Path | None = None):
        self.folder = tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self.folder.name, name) for name in ("out", "err"))
        self.out.touch(), self.err.touch()
        self.pids = SERVER.ask({"arguments": arguments, "environ": clean_environment(settings), "ranks": processes,
                                "cwd": str(cwd or Path.cwd()), "files": [os.devnull, str(self.out), str(self.err)]})

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


# What run scripts may call as their Python: it passes its arguments on to the server. Of torchrun it knows what the
# scripts call it with.
STAND_IN = """#!{python} -IS
import json, os, sys
arguments, ranks, (ask, answer) = sys.argv[1:], 0, map(int, os.environ["FORKED"].split())
if arguments[0] == "-m":
    run, alone, count, *arguments = arguments[1:]
    if (run, alone) != ("torch.distributed.run", "--standalone") or not count.startswith("--nproc_per_node="):
        sys.exit(f"the tests' interpreter cannot {{sys.argv[1:]}}")
    ranks = int(count.partition("=")[2])
job = {{"arguments": arguments, "environ": dict(os.environ), "ranks": ranks, "cwd": os.getcwd(),
       "files": [f"/proc/{{os.getpid()}}/fd/{{i}}" for i in range(3)]}}
os.write(ask, json.dumps(job).encode() + b"\\n")
lines = os.fdopen(answer, closefd=False)
lines.readline()
codes = json.loads(lines.readline())
sys.exit(any(codes) if ranks else codes[0] % 256)
"""


def stand_in(folder: Path) -> dict:
    """For subprocess.run: what makes PYTHON such a program, written into this folder."""
    path, server = folder / "python", SERVER.start()
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    pipes = server.stdin.fileno(), server.stdout.fileno()
    return {"env": {"PYTHON": str(path), "FORKED": "{} {}".format(*pipes)}, "pass_fds": pipes}


if __name__ == "__main__":
    serve()
