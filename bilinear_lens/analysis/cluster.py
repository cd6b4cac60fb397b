"""Numbered tasks in worker processes, on Ray or on Slurm: datatrove's executors, under watch."""

import importlib.util
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from time import sleep
from typing import Any, Literal

import torch

WORKER = "import sys, dill; dill.load(sys.stdin.buffer)()"
"""A worker's program: it has no main script to import again, so scripts need no guard."""

POLL = 0.2
"""Seconds between two looks at the workers."""

AGAIN = "What is done stays done: run the same again for the rest."


class TaskError(ValueError):
    """Tasks that failed, or a worker that died."""


def run_tasks(
    task: Callable[[int], None],
    numbers: Sequence[int],
    *,
    executor: Literal["local", "ray", "slurm"],
    workers: int,
    logs: Path,
    partition: str | None = None,
    time: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Call `task(number)` for each number in other processes, `workers` at a time.

    A run knows nothing of earlier ones: give the numbers that are still to do, and let a task
    write to a temporary name, then `os.replace`, for its process may end at any time. A task has
    as many threads as torch has here, divided among the workers.

    Args:
        task: picklable.
        executor: "local" starts worker processes. "ray" uses the cluster of RAY_ADDRESS or `ray
            start`, or else starts Ray on this machine until the tasks are done. "slurm" submits a
            job array and returns, with the tasks still to run; sbatch reads what else it needs
            from the environment, such as SBATCH_ACCOUNT or SBATCH_MEM_PER_CPU.
        logs: where the run gets a folder, on a disk that all machines share.
        partition: of Slurm.
        time: of Slurm, the limit for each task, such as "2:00:00".
        progress: called with the number of complete tasks when that changes; not with Slurm.

    Returns:
        The run's folder: `logs/task_00000.log` there is of `numbers[0]`.

    Raises:
        ValueError: if there are no tasks or workers, or the executor is not there.
        TaskError: if tasks failed, when all others are done; if a worker was killed, at once.
    """
    if not numbers:
        raise ValueError("There are no tasks to run.")
    check_executor(executor, workers, partition, time)
    n, workers = len(numbers), min(workers, len(numbers))
    threads = max(1, torch.get_num_threads() // workers)
    run = logs.resolve() / datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
    run.mkdir(parents=True)
    common: dict[str, Any] = {
        "pipeline": [partial(_step, task, tuple(numbers), threads)],
        "tasks": n,
        "logging_dir": str(run),
    }
    if executor == "slurm":
        _submit({**common, "partition": partition, "time": time}, workers, threads)
        return run
    shares = [range(n * i // workers, n * (i + 1) // workers) for i in range(workers)]
    jobs = [partial(_local, common, share) for share in shares]
    if executor == "ray":
        jobs, shares = [partial(_ray, common, workers, threads)], [range(0)]
    codes = _watch(jobs, threads, run, progress)
    _check_outcome(run, numbers, shares, codes)
    return run


def check_executor(executor: str, workers: int, partition: str | None, time: str | None) -> None:
    """Refuse what `run_tasks` would, before anything is begun.

    Raises:
        ValueError: if there is no worker, or the executor is not there.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1.")
    if executor not in ("local", "ray", "slurm"):
        raise ValueError(f"There is no executor {executor!r}: local, ray or slurm.")
    for library in ["datatrove", "ray"] if executor == "ray" else ["datatrove"]:
        if importlib.util.find_spec(library) is None:
            raise ValueError(
                f"The executor {executor!r} needs {library}; install it with: "
                "pip install 'bilinear-lens[cluster]'"
            )
    if executor == "slurm" and not (partition and time):
        raise ValueError(f"Slurm needs partition ({partition!r}) and time limit ({time!r}).")
    if executor == "slurm" and shutil.which("sbatch") is None:
        raise ValueError("There is no sbatch on PATH: submit from a machine of a Slurm cluster.")


def _watch(
    jobs: list[Callable[[], None]],
    threads: int,
    run: Path,
    progress: Callable[[int], object] | None,
) -> list[int | None]:
    """Run each job in a Python of its own, until all end well or one does not; exit codes.

    Processes rather than a pool: a pool waits for ever for a worker that was killed.
    """
    import dill

    env = {**os.environ, **_environment(threads), "RAY_USAGE_STATS_ENABLED": "0"}
    workers: list[subprocess.Popen[bytes]] = []
    completed = 0
    try:
        for i, job in enumerate(jobs):
            with (run / f"worker_{i}.log").open("wb") as log:
                worker = subprocess.Popen(
                    [sys.executable, "-c", WORKER],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=env,
                    start_new_session=True,
                )
            workers.append(worker)
            assert worker.stdin is not None
            with suppress(BrokenPipeError):
                worker.stdin.write(dill.dumps(partial(_work, job), recurse=True))
                worker.stdin.flush()  # and open, for the worker to see that we live
        while True:
            codes = [worker.poll() for worker in workers]
            done = len(list((run / "completions").glob("*")))
            if done > completed and progress is not None:
                progress(done)
            completed = done
            if None not in codes or any(codes):
                return codes
            sleep(POLL)
    finally:
        for worker in workers:
            with suppress(ProcessLookupError, PermissionError):  # nobody is left
                os.killpg(worker.pid, signal.SIGKILL)
            with suppress(BrokenPipeError), worker:
                pass  # closes its pipe, and waits


def _check_outcome(
    run: Path, numbers: Sequence[int], shares: list[range], codes: list[int | None]
) -> None:
    """Raise if tasks are not complete, from what workers and tasks left behind."""
    n = len(numbers)
    todo = [rank for rank in range(n) if not (run / f"completions/{rank:05d}").exists()]
    if not todo:
        return
    for i, code in enumerate(codes):
        if code:
            log, where = run / f"worker_{i}.log", ""
            begun = [rank for rank in shares[i] if _log(run, rank).exists()]
            if begun:
                log, where = _log(run, begun[-1]), f" in task {numbers[begun[-1]]}"
            why = f": {_last_line(log)}" if code > 0 else ""
            raise TaskError(f"A worker {_ending(code)}{where}{why}. Its log: {log}. {AGAIN}")
    log, failed = _log(run, todo[0]), [numbers[rank] for rank in todo]
    raise TaskError(
        f"{len(todo)} of {n} tasks failed: {', '.join(map(str, failed[:9]))}"
        f"{', ...' * (len(todo) > 9)}. Task {failed[0]}: {_last_line(log)}. "
        f"Its log: {log}. {AGAIN}"
    )


def _environment(threads: int) -> dict[str, str]:
    """What worker processes must have: our imports, and their number of threads."""
    return {
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }


def _submit(common: dict[str, Any], workers: int, threads: int) -> None:
    from datatrove.executor import SlurmPipelineExecutor
    from loguru import logger

    python = shlex.quote(str(Path(sys.executable).parent))
    exports = [f"{name}={shlex.quote(value)}" for name, value in _environment(threads).items()]
    logger.disable("datatrove")
    try:
        SlurmPipelineExecutor(
            workers=workers,
            cpus_per_task=threads,
            srun_args={"cpus-per-task": threads},  # srun does not take it from sbatch
            env_command=" ".join(["export", f'PATH={python}:"$PATH"', *exports]),
            qos="",  # the cluster's own default, not datatrove's
            job_name="bilinear-lens",
            **common,
        ).run()
    except subprocess.CalledProcessError as error:  # of sbatch, which has said why
        raise TaskError(f"sbatch ended with exit code {error.returncode}.") from error
    finally:
        logger.enable("datatrove")


def _log(run: Path, rank: int) -> Path:
    return run / f"logs/task_{rank:05d}.log"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it left no message")


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    memory = " (if memory ran out, take fewer workers)" * (code == -signal.SIGKILL)
    return f"was killed by {signal.Signals(-code).name}{memory}"


# What follows runs in the workers.


def _work(job: Callable[[], None]) -> None:
    """A worker's job, given up when the process that started it is gone."""

    def follow() -> None:
        os.read(0, 1)  # not of sys.stdin, whose lock a fork would take along
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()
    job()


def _step(
    task: Callable[[int], None],
    numbers: tuple[int, ...],
    threads: int,
    data: object,
    rank: int,
    world_size: int,
) -> None:
    """The step of datatrove's pipeline."""
    torch.set_num_threads(threads)
    task(numbers[rank])


def _local(common: dict[str, Any], share: range) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.utils.stats import PipelineStats

    class Executor(LocalPipelineExecutor):
        def _run_for_rank(self, *args: Any, **kwargs: Any) -> PipelineStats:
            with suppress(Exception):  # in the task's log already, and other tasks go on
                return super()._run_for_rank(*args, **kwargs)
            return PipelineStats()

    Executor(workers=1, local_tasks=len(share), local_rank_offset=share.start, **common).run()


def _ray(common: dict[str, Any], workers: int, threads: int) -> None:
    import ray
    from datatrove.executor import RayPipelineExecutor

    try:
        ray.init(num_cpus=workers * threads, include_dashboard=False)
    except ValueError:  # a cluster runs, and has its own number
        ray.init()
    largest = max([1, *(int(node["Resources"].get("CPU", 0)) for node in ray.nodes())])
    env = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    env["TMPDIR"] = common["logging_dir"]  # where datatrove logs first: users and runs would meet
    common["pipeline"] = [partial(_watched, *common["pipeline"])]
    RayPipelineExecutor(
        workers=workers,
        cpus_per_task=min(threads, largest),  # Ray waits for ever for what no node has
        mem_per_cpu_gb=0,
        ray_remote_kwargs={"runtime_env": {"env_vars": env}},
        **common,
    ).run()


def _watched(step: Callable[..., None], data: object, rank: int, world_size: int) -> None:
    """A step in a process of its own, whose death is an error.

    Within Ray's worker datatrove has a pool, which would wait for ever. A fork, as that pool is:
    no torch thread has run in either.
    """
    ray_worker = os.getppid()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(step, rank, world_size, sender, ray_worker))
    process.start()
    sender.close()
    while not receiver.poll(POLL):
        if os.getppid() != ray_worker:
            process.kill()
            os._exit(1)
    try:
        error = receiver.recv()
    except EOFError:
        process.join()
        error = f"The task's process {_ending(process.exitcode or 0)}"
    process.join()
    if error:
        raise TaskError(error)


def _report(
    step: Callable[..., None], rank: int, world_size: int, sender: Connection, ray_worker: int
) -> None:
    def follow() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        with suppress(ProcessLookupError):  # it would wait for its pool: Ray starts another
            os.kill(ray_worker, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    try:
        step(None, rank, world_size)
        sender.send("")
    except Exception:
        sender.send(traceback.format_exc())
