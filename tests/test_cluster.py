"""Tasks in worker processes, on Ray and on Slurm; what is killed, what fails, and what is left."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from cluster_task import WriteFile

from bilinear_lens.analysis.cluster import TaskError, run_tasks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("datatrove") is None, reason="datatrove, of the extra, is not there"
)

SCRIPT = """
from pathlib import Path
from cluster_task import WriteFile
from bilinear_lens.analysis.cluster import run_tasks
run_tasks(WriteFile(Path("."), seconds=0.3), range(2, 40), executor="local", workers=2,
          logs=Path("logs"))
"""
"""Without a guard against being imported again."""

SBATCH = """#!/bin/bash
[ -n "$REFUSE" ] && exit 3
script="${@: -1}"
echo "$@" >> "$LOG"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
cat "$script" >> "$LOG"
for i in $(seq 0 ${last:-0}); do
    output=$(mktemp)
    SLURM_ARRAY_TASK_ID=$i SLURM_JOB_ID=$i SLURM_NODELIST=here bash "$script" &> "$output" &
done
wait
echo "Submitted batch job 42"
"""

SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do [ "$1" == -n ] && shift; shift; done
"$@"
"""


@pytest.fixture
def threads():
    """Torch with five threads here, of which each of two workers gets two."""
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    torch.set_num_threads(before)


def written(folder: Path) -> dict[int, str]:
    return {int(file.stem): file.read_text() for file in folder.glob("*.txt")}


def calls(folder: Path, number: int) -> list[str]:
    return [file.read_text() for file in folder.glob(f"{number}.*.call")]


def ours(folder: Path) -> list[psutil.Process]:
    """Processes that work in a folder, but for those that ended."""
    found = []
    for process in psutil.process_iter(["cwd", "status"]):
        if process.info["cwd"] == str(folder) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "too late"
        time.sleep(0.05)


def test_a_killed_run_goes_on_where_it_was(tmp_path, threads, capfd):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, env=env)
    try:
        wait_for(lambda: len(written(tmp_path)) >= 3)
        assert len(ours(tmp_path)) >= 3
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    wait_for(lambda: not ours(tmp_path), 5)  # workers go with it
    before = written(tmp_path)
    assert 3 <= len(before) < 38
    times = {number: (tmp_path / f"{number}.txt").stat().st_mtime_ns for number in before}
    first = next(iter(before))
    (tmp_path / f"{first}.txt").unlink()  # a shard that is lost is written again
    missing = [number for number in range(2, 40) if number not in written(tmp_path)]
    raising = missing[len(missing) // 4]
    seen: list[int] = []
    task = WriteFile(tmp_path, raises=(raising,))
    kwargs = {"executor": "local", "workers": 2, "logs": tmp_path / "logs"}
    with pytest.raises(TaskError, match=f"1 of {len(missing)} tasks failed: {raising}.") as error:
        run_tasks(task, missing, **kwargs, progress=seen.append)
    message = str(error.value)
    assert f"Task {raising}: RuntimeError: no file for {raising}. Its log: " in message
    log = Path(message.split("Its log: ")[1].split(". What")[0])
    assert "Traceback" in log.read_text()
    assert written(tmp_path) == {
        number: f"{number} squared is {number**2}\n" for number in range(2, 40) if number != raising
    }
    assert seen == sorted(set(seen)) and seen[-1] == len(missing) - 1
    for number in set(before) - {first}:
        assert (tmp_path / f"{number}.txt").stat().st_mtime_ns == times[number]
    assert calls(tmp_path, missing[-1])[0] == "2 2"
    assert capfd.readouterr() == ("", "")


def test_a_killed_worker_is_an_error_at_once(tmp_path, capfd):
    task = WriteFile(tmp_path, seconds=0.3, kills=(5,))
    start = time.monotonic()
    with pytest.raises(TaskError, match=r"killed by SIGKILL .* in task 5. Its log: .*run the same"):
        run_tasks(task, range(3, 90), executor="local", workers=2, logs=tmp_path)
    assert time.monotonic() - start < 25
    assert {3, 4} <= set(written(tmp_path)) and 6 not in written(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_runs_tasks_and_names_those_that_fail(tmp_path, threads, monkeypatch, capfd):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    seen: list[int] = []
    task = WriteFile(tmp_path, kills=(4,), raises=(5,))
    with pytest.raises(TaskError, match=r"2 of 3 tasks failed: 4, 5. Task 4: .* killed by SIGKILL"):
        run_tasks(
            task, [4, 5, 6], executor="ray", workers=2, logs=tmp_path / "logs", progress=seen.append
        )
    (log,) = tmp_path.glob("logs/*/logs/task_00001.log")
    assert log.read_text().strip().endswith("RuntimeError: no file for 5")
    assert written(tmp_path) == {6: "6 squared is 36\n"} and seen == [1]
    assert calls(tmp_path, 6) == ["2 2"]
    assert [process for process in ours(tmp_path) if process.pid != os.getpid()] == []
    assert capfd.readouterr() == ("", "")


def test_slurm_gets_an_array_that_runs_them(tmp_path, monkeypatch, threads, capfd):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, content in {
        "sbatch": SBATCH,
        "srun": SRUN,
        "scontrol": '#!/bin/bash\necho "${@: -1}"',
    }.items():
        (commands / name).write_text(content)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    monkeypatch.setenv("LOG", str(tmp_path / "sbatch.log"))
    kwargs = {"executor": "slurm", "workers": 2, "logs": tmp_path / "logs"}
    kwargs |= {"partition": "cpu", "time": "1:00:00"}
    run = run_tasks(WriteFile(tmp_path, raises=(8,)), [7, 8], **kwargs)
    assert written(tmp_path) == {7: "7 squared is 49\n"} and calls(tmp_path, 7) == ["2 2"]
    assert [file.name for file in (run / "completions").iterdir()] == ["00000"]
    script = (tmp_path / "sbatch.log").read_text()
    for line in ("array=0-1%2", "partition=cpu", "time=1:00:00", "cpus-per-task=2"):
        assert f"#SBATCH --{line}\n" in script
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("REFUSE", "yes")
    with pytest.raises(TaskError, match="sbatch ended with exit code 3"):
        run_tasks(WriteFile(tmp_path), [7], **kwargs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numbers": []}, "no tasks"),
        ({"workers": 0}, "workers=0"),
        ({"executor": "dask"}, "no executor 'dask': local, ray or slurm"),
        ({"executor": "slurm", "time": "1:00"}, r"partition \(None\) and time limit \('1:00'\)"),
        ({"executor": "slurm", "time": "1:00", "partition": "cpu"}, "no sbatch on PATH"),
    ],
)
def test_what_cannot_run_is_refused(change, message, tmp_path, monkeypatch, as_users):
    monkeypatch.setenv("PATH", str(tmp_path))
    kwargs = {"numbers": [3], "executor": "local", "workers": 2, "logs": tmp_path} | change
    with pytest.raises(ValueError, match=message):
        run_tasks(WriteFile(tmp_path), **kwargs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("library", "executor"), [("datatrove", "local"), ("ray", "ray")])
def test_a_missing_extra_is_named(library, executor, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=f"needs {library}.* pip install 'bilinear-lens.cluster.'"):
        run_tasks(WriteFile(tmp_path), [3], executor=executor, workers=2, logs=tmp_path)
