"""Several processes: each step's text is shared out, results are written once and are the same."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import loaded_with_report
from test_bilinearize import EVERYTHING, arguments, assert_same_weights, bilinearize, llama, windows
from test_evaluation import FIGURES, study

HEAD = f"""
import shutil, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from dataclasses import replace
import torch
from accelerate.state import DistributedType, PartialState
from test_bilinearize import EVERYTHING, arguments, bilinearize, llama, windows
from test_evaluation import study
"""


def run_in_two(script: str, folder: Path) -> None:
    file = folder / "script.py"
    file.write_text(HEAD + script)
    done = subprocess.run(
        [Path(sys.executable).with_name("torchrun"), "--nproc-per-node", "2", file, folder],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_make_one_study(tmp_path):
    """The same as one process with batches twice as large."""
    script = """
made, again = (
    study(sys.argv[1] + "/two", args={"per_device_train_batch_size": 2}, resume=resume)
    for resume in (False, True)
)
assert made.equals(again)
"""
    run_in_two(script, tmp_path)
    one = study(tmp_path / "one", args={"per_device_train_batch_size": 4})
    names = [sorted(path.name for path in (tmp_path / each).iterdir()) for each in ("one", "two")]
    files = ["original.json", "replaced.json", "run.json"]
    assert names[0] == names[1] == ["bilinearized-0", "continued-0", *files]
    for row in one.to_dict("records")[2:]:
        folder = tmp_path / "two" / f"{row['method']}-{row['seed']:.0f}"
        figures = json.loads((folder / "figures.json").read_text())
        for name in FIGURES:
            assert figures[name] == pytest.approx(row[name], rel=1e-4)
        ours, _ = loaded_with_report(folder)
        theirs, _ = loaded_with_report(tmp_path / "one" / folder.name)
        assert_same_weights(ours, theirs, atol=1e-5)
    with pytest.raises(ValueError, match=r"another run: world_size \(\d, not \d\) differ"):
        study(tmp_path / "two", args={"per_device_train_batch_size": 2}, resume=True)


@pytest.mark.slow
def test_fsdp_gives_whole_weights_and_resumes(tmp_path):
    """Accelerate keeps FSDP from CPUs, so the script tells it that these are another device."""
    script = """
out = sys.argv[1] + "/run"
more = {"fsdp": True, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
args = arguments(out, per_device_train_batch_size=2, **more)
assert args.device.type == "cpu"
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
for name in ("whole", "resumed"):
    model = bilinearize(
        llama(),
        windows(),
        recipe=replace(EVERYTHING, least_squares=SHIFTS, anneal=ANNEAL),
        args=args,
        resume=name == "resumed",
    )
    torch.save(model.state_dict(), f"{sys.argv[1]}/{name}-{args.process_index}.pt")
    torch.distributed.barrier()
    if args.process_index == 0:
        assert {"pytorch_model_fsdp.bin"} <= {p.name for p in last(out).iterdir()}
        shutil.rmtree(out + "/checkpoint-6", ignore_errors=True)
    torch.distributed.barrier()
"""
    script = "from bilinear_lens.training.runs import last_checkpoint as last\n" + script
    for shifts, anneal in ((False, 0.8), (True, 0.0)):
        folder = tmp_path / f"{shifts}"
        folder.mkdir()
        filled = script.replace("SHIFTS", str(shifts)).replace("ANNEAL", str(anneal))
        run_in_two(filled, folder)
        recipe = replace(EVERYTHING, least_squares=shifts, anneal=anneal)
        plain = bilinearize(
            llama(), windows(), recipe=recipe, args=arguments(tmp_path / f"one-{shifts}")
        )
        for name in ("whole-0", "whole-1", "resumed-0", "resumed-1"):
            weights = torch.load(folder / f"{name}.pt")
            assert_same_weights(weights, plain, atol=1e-5)
