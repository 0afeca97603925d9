"""A scheduler for this machine that launch files meet in the place of Slurm.

`sbatch`, `srun` and `scontrol` are small programs in a folder of their own. Jobs run on two nodes,
which have host names of their own where the system allows that; the first task of each array is
taken away once, as a preemption does, and queued again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

__all__ = ["Scheduler", "can_name_hosts"]

_SBATCH = """import json, os, sys, uuid
args, options = sys.argv[1:], []
while args and args[0].startswith("--"):
    options.append(args.pop(0))
job = {{"options": options, "script": args[0], "args": args[1:], "env": dict(os.environ),
       "cwd": os.getcwd()}}
name = os.path.join({spool!r}, uuid.uuid4().hex)
open(name + ".new", "w").write(json.dumps(job))
os.rename(name + ".new", name + ".job")
print("1" if "--parsable" in options else "Submitted batch job 1")
"""
_SRUN = """import os, subprocess, sys
assert sys.argv[1].startswith("--cpus-per-task=") and sys.argv[2] == "--kill-on-bad-exit=1"
nodes = int(os.environ["SLURM_NNODES"])
jobs = [
    subprocess.Popen(sys.argv[3:])  # on one host name: processes have to find each other by it
    for i in range(nodes)
]
sys.exit(max(abs(j.wait()) for j in jobs))
"""
_ON_NODE = ["unshare", "--uts", "sh", "-c", 'hostname "$NODE"; exec "$@"', "sh"]


def _write_program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def can_name_hosts() -> bool:
    """Whether processes can have host names of their own here."""
    probe = [*_ON_NODE[:4], 'hostname node9 && [ "$(hostname)" = node9 ]']
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


class Scheduler:
    """Two nodes, a queue, and one preemption of each array."""

    def __init__(self, folder: Path, env: dict[str, str], *, preempt_after: float) -> None:
        self.spool, programs = folder / "spool", folder / "programs"
        self.spool.mkdir(parents=True)
        programs.mkdir()
        self.on_node = _ON_NODE if can_name_hosts() else []
        # Through a shell: a first line that names Python cannot, where its path has a blank.
        for name, text in {"sbatch": _SBATCH.format(spool=str(self.spool)), "srun": _SRUN}.items():
            code = programs / f"{name}.py"
            code.write_text(text)
            run = f'exec "{sys.executable}" "{code}" "$@"'
            _write_program(programs / name, run)
        _write_program(programs / "scontrol", "echo 127.0.0.1; echo 127.0.0.1")
        _write_program(programs / "squeue", "echo queued")
        binaries = Path(sys.executable).parent
        self.env = env | {"PATH": f"{programs}:{binaries}:/usr/local/bin:/usr/bin:/bin"}
        self.preempt_after = preempt_after
        self.preempted = 0
        self.ended: list[tuple[str, int]] = []
        """Script and exit status of every task that ended by itself."""
        self._lock = threading.Lock()

    def submit(self, script: Path, *args: str, **env: str) -> None:
        """What `sbatch script args` does."""
        subprocess.run(
            ["sbatch", str(script), *args],
            env=self.env | env,
            cwd=self.spool.parent,
            check=True,
            capture_output=True,
        )

    def run(self, expected: int, seconds: float = 240) -> None:
        """Run tasks until so many have ended well."""
        deadline = time.monotonic() + seconds
        threads: list[threading.Thread] = []
        while time.monotonic() < deadline:
            for path in self.spool.glob("*.job"):
                job = json.loads(path.read_text())
                path.unlink()
                for thread in self._threads(job):
                    thread.start()
                    threads.append(thread)
            with self._lock:
                if len(self.ended) >= expected or any(code for _, code in self.ended):
                    break
            time.sleep(0.05)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _threads(self, job: dict[str, Any]) -> list[threading.Thread]:
        script = Path(job["script"])
        asked = "\n".join([*re.findall(r"^#SBATCH (.*)$", script.read_text(), re.M)])
        asked += "\n" + "\n".join(job["options"])  # the command line goes before the file

        def option(name: str) -> str | None:
            found = re.findall(rf"^--{name}=(.*)$", asked, re.M)
            return str(found[-1]) if found else None

        nodes = int(option("nodes") or 1)
        env = job["env"] | {"SLURM_JOB_ID": "1", "SLURM_NNODES": str(nodes)}
        env |= {"SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "node[0-1]"}
        env["SLURM_CPUS_PER_TASK"] = option("cpus-per-task") or "1"
        array = option("array")
        if array is None:
            return [
                threading.Thread(
                    target=self._task, args=(script, job["args"], job["cwd"], env, False)
                )
            ]
        first, last = (int(n) for n in array.split("-"))
        return [
            threading.Thread(
                target=self._task,
                args=(
                    script,
                    job["args"],
                    job["cwd"],
                    env | {
                        "SLURM_ARRAY_TASK_ID": str(task), "NODE": f"node{task % 2}",
                        "SLURM_ARRAY_TASK_COUNT": str(last - first + 1),
                    },
                    task == first,
                ),
            )
            for task in range(first, last + 1)
        ]  # fmt: skip

    def _task(
        self, script: Path, args: list[str], cwd: str, env: dict[str, str], preempt: bool
    ) -> None:
        while True:
            on_node = self.on_node if "NODE" in env else []
            process = subprocess.Popen(
                [*on_node, "bash", str(script), *args], env=env, start_new_session=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd,
            )  # fmt: skip
            if preempt:
                preempt = False
                try:
                    process.wait(self.preempt_after)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
                    self.preempted += 1
                    continue
            out, _ = process.communicate()
            if process.returncode:
                print(out[-3000:])
            with self._lock:
                self.ended.append((script.name, process.returncode))
            return
