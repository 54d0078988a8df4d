"""Kills a lab run with SIGKILL at random moments, resumes it each time, and compares it with one that nobody killed.

    OMP_NUM_THREADS=1 python benchmarks/kill.py --kills 200 --of_two_processes 40 --out docs/results/kills.md

Of so many kills, those `of_two_processes` hit a run of two (gloo): one of them, or both, at random. The campaign goes
on until as many resumes as kills are done: a kill before the first checkpoint leaves nothing to resume. The last run
comes to its end. Half of the kills fall anywhere in a run, half within a save: the campaign waits for `.writing` and
then for a random part of the time that a save takes. After each kill the newest whole checkpoint must be at least as
new as the newest before it (else it is lost), and weights, optimizer, scheduler and random generators in it must have
the SHA-256 of the undisturbed run at that step (else it is mixed). Each run that comes to its end must have that
run's metrics and weights. Runs are forks of this process, which has imported everything, so that an attempt costs no
start of Python; they save each step and live for two or three, so that little is computed for a kill.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

import vigor.trainer  # noqa: F401 - once, for all forks
from vigor import checkpoint
from vigor.cli import main
from vigor.runfolder import RunFolder

COMPARED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "rng_state_1.pth")
TIMED = ("time/", "step_time", "train_")


@dataclass
class Tally:
    kills: int = 0
    within_a_save: int = 0
    before_the_first_checkpoint: int = 0
    resumes: int = 0
    passed_over: int = 0
    lost: int = 0
    mixed: int = 0
    runs_ended: int = 0
    runs_equal: int = 0


def settings(run: Path, steps: int, processes: int) -> list[str]:
    backend = {"ddp_backend": "gloo"} if processes > 1 else {}
    flags = {
        "output_dir": run, "max_steps": steps, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2,
        "per_device_train_batch_size": 16 // processes, "max_completion_length": 24, "lab_eval_prompts": 0,
        "steps_per_generation": 2, "gradient_accumulation_steps": 1, **backend,
    }  # fmt: skip
    return ["train", "--config", "lab", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]


def start(argv: list[str], processes: int, log: Path) -> list[int]:
    """Forks the processes of a run; returns their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                    LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                )  # fmt: skip
            with log.open("a") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            status = 99
            try:
                status = main(argv)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(status)
        children.append(child)
    return children


def alive(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def end(children: list[int], victims: list[int], grace: float) -> None:
    """Kills the victims, leaves the others a moment to do harm, and kills them too."""
    for child in victims:
        os.kill(child, signal.SIGKILL)
    if len(victims) < len(children):
        time.sleep(grace)
    for child in children:
        if child not in victims and alive(child):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def wait_to_kill(children: list[int], writing: Path, rng: random.Random, run_seconds: float, save: float) -> bool:
    """Waits for the moment; False if the run came to its end before."""
    saves, inside, deadline = rng.randint(1, 2), False, time.monotonic() + rng.uniform(0, run_seconds / 2)
    aims = rng.random() < 0.5
    while all(map(alive, children)):
        if aims:
            if writing.is_dir() and not inside:
                saves -= 1
                if saves == 0:
                    time.sleep(rng.choice((0.0, save / 5, save)) * rng.random())  # how long a save takes varies
                    return all(map(alive, children))
            inside = writing.is_dir()
        elif time.monotonic() > deadline:
            return True
        time.sleep(0.0005)
    return False


def digests(path: Path) -> dict[str, str]:
    files = json.loads((path / checkpoint.MANIFEST).read_text("utf-8"))["files"]
    return {name: files[name]["sha256"] for name in COMPARED if name in files}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if not name.startswith(TIMED)}
        for record in RunFolder(run).read_metrics()
    ]


def straight(folder: Path, steps: int, processes: int) -> tuple[dict[str, dict[str, str]], float]:
    """The undisturbed run: the hashes of each of its checkpoints, and its seconds."""
    began = time.monotonic()
    argv = [*settings(folder, steps, processes), "--save_total_limit", str(steps)]
    children = start(argv, processes, folder.with_suffix(".log"))
    for child in children:
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise SystemExit(folder.with_suffix(".log").read_text())
    return {path.name: digests(path) for path in (folder / "checkpoints").iterdir()}, time.monotonic() - began


def campaign(root: Path, kills: int, processes: int, steps: int, seed: int) -> Tally:
    rng, tally = random.Random(seed), Tally()
    expected, seconds = straight(root / "straight", steps, processes)
    last = root / "straight" / "model" / "model.safetensors"
    number, highest = 0, 0
    while (killing := min(tally.kills, tally.resumes) < kills) or highest:  # the last run comes to its end unharmed
        run, log = root / f"run-{number}", root / f"run-{number}.log"
        writing = run / "checkpoints" / checkpoint.WRITING
        argv = settings(run, steps, processes)
        if highest:
            argv.append("--resume")
            tally.resumes += 1
        children = start(argv, processes, log)
        if killing and wait_to_kill(children, writing, rng, seconds, save=0.1):
            victims = children if rng.random() < 0.34 else [rng.choice(children)]
            end(children, victims, grace=rng.uniform(0, 1))
            tally.kills += 1
            tally.within_a_save += writing.is_dir()
            path, rejected = checkpoint.newest(run / "checkpoints")
            tally.passed_over += len(rejected)
            step = 0 if path is None else checkpoint.step_of(path)
            tally.lost += step < highest
            tally.mixed += path is not None and digests(path) != expected[path.name]
            highest = step
            if path is None:
                tally.before_the_first_checkpoint += 1
                shutil.rmtree(run, ignore_errors=True)
            ended = path is not None and RunFolder(run).finished  # all its files were there, not all its processes gone
        else:
            ended = True
            statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            if any(statuses):
                raise SystemExit(f"a run ended with {statuses}, nobody having killed it:\n{log.read_text()[-4000:]}")
        if ended:
            tally.runs_ended += 1
            same = (run / "model" / "model.safetensors").read_bytes() == last.read_bytes()
            tally.runs_equal += same and metrics(run) == metrics(root / "straight")
            shutil.rmtree(run)
            number, highest = number + 1, 0
        print(json.dumps(asdict(tally)), flush=True)
    return tally


ROWS = (
    ("SIGKILLs", "kills"),
    ("of them within a save", "within_a_save"),
    ("of them before the first checkpoint", "before_the_first_checkpoint"),
    ("resumes", "resumes"),
    ("folders without a marker, passed over", "passed_over"),
    ("lost steps: the newest whole checkpoint is older than one before the kill", "lost"),
    ("mixed states: a checkpoint differs from the undisturbed run's at its step", "mixed"),
    ("runs that came to their end", "runs_ended"),
    ("of them equal to the undisturbed run, all metrics and weights, bit for bit", "runs_equal"),
)


def page(tallies: dict[int, Tally], args: argparse.Namespace, seconds: float) -> str:
    """The result as Markdown."""
    heads = [f"{n} process" + "es" * (n > 1) for n in tallies]
    found = [asdict(tally) for tally in tallies.values()]
    lines = [
        "# Results: kills\n",
        f"`benchmarks/kill.py --kills {args.kills} --of_two_processes {args.of_two_processes} --steps {args.steps} "
        f"--seed {args.seed}`: runs of {args.steps} steps of the lab that save each step, killed with SIGKILL at "
        f"random moments and resumed. {seconds / 60:.0f} minutes on {os.cpu_count()} vCPUs ({platform.machine()}) "
        f"shared with other work, one thread a process, torch {torch.__version__}, {date.today()}.\n",
        f"| | {' | '.join(heads)} |",
        f"|---|{'---:|' * len(heads)}",
        *(f"| {text} | {' | '.join(str(each[name]) for each in found)} |" for text, name in ROWS),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--of_two_processes", type=int, default=0, metavar="N")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result as a page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began, tallies = time.monotonic(), {}
    for processes, kills in ((1, args.kills - args.of_two_processes), (2, args.of_two_processes)):
        if kills > 0:
            with tempfile.TemporaryDirectory() as folder:
                tallies[processes] = campaign(Path(folder), kills, processes, args.steps, args.seed)
    written = page(tallies, args, time.monotonic() - began)
    print(written)
    if args.out:
        args.out.write_text(written, "utf-8")
    sys.exit(any(found.lost + found.mixed + found.runs_ended - found.runs_equal for found in tallies.values()))
