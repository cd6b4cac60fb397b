"""Sweeps against `interactions`, token by token; what is killed, damaged, refused and searched."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from models import CONFIGS, random_model
from safetensors.torch import load_file

import bilinear_lens as bl
import bilinear_lens.analysis.sweep as module
from bilinear_lens.analysis.cluster import TaskError
from bilinear_lens.analysis.shards import SCHEMA, Manifest

SHE_TO = (" she", " he", " named", " girl", " boy", " the", ".", "!")

DRIVER = """
import errno, json, os, resource, signal, sys
from pathlib import Path
import bilinear_lens as bl
import bilinear_lens.analysis.sweep as module

folder, points, limits = json.loads(sys.argv[1])
folder, module.SIZE, replace = Path(folder), 16, Path.replace
model = bl.HookedBilinearTransformer.from_pretrained(folder / "model")
kwargs = {"k": 3, "n_tokens": 4, "vectors": True, "resume": True}
for point in points:
    calls = []
    def replace_or_die(self, target):
        calls.append(self)
        if len(calls) > point:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)
    child = os.fork()
    if child == 0:
        Path.replace = replace_or_die
        bl.sweep(model, out=folder / f"killed-{point}", **kwargs)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == signal.SIGKILL
    assert list((folder / f"killed-{point}").rglob("*.part"))
messages = []
for limit in limits:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        bl.sweep(model, out=folder / f"full-{limit}", **kwargs)
    except ValueError as error:
        messages.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps([messages, [str(file) for file in folder.glob("full-*/**/*.part")]]))
"""
"""Sweeps killed as a file gets its name, in a fork each, and sweeps on a disk that fills up."""

TINY: dict[str, Any] = {"k": 3, "n_tokens": 4}


@pytest.fixture(autouse=True)
def one_thread():
    """How many threads there are may change last digits, and files are compared by their bytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SIZE", 16)


def fresh(name: str = "llama", seed: int = 0, **kwargs) -> bl.HookedBilinearTransformer:
    """37 tokens, three layers, 24 coordinates."""
    return bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[name], seed), **kwargs)


tiny = cache(fresh)
"""The same, which tests leave alone."""


def swept(*args, **kwargs) -> bl.Sweep:
    found = bl.sweep(*args, **kwargs)
    assert found is not None
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but logs, by its bytes."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    names = {str(file.relative_to(folder)): file for file in files}
    return {name: file.read_bytes() for name, file in names.items() if name[:5] != "logs/"}


def everything(sweep: bl.Sweep) -> pd.DataFrame:
    return sweep.query("SELECT * FROM sweep ORDER BY layer, token_id, eigenvector")


def vectors_of(sweep: bl.Sweep, token: int, layer: int) -> torch.Tensor:
    """The eigenvectors on disk, a row each."""
    place = sweep.manifest.outputs.index(token)
    for shard in sweep.manifest.shards:
        if shard.layer == layer and shard.start <= place < shard.stop:
            found = load_file(sweep.manifest.vectors_path(sweep.path, shard))["vectors"]
            return found[place - shard.start]
    raise AssertionError("in no shard")


def assert_agrees(
    sweep: bl.Sweep, model: bl.HookedBilinearTransformer, tokens: list[int], layer: int
) -> None:
    """The sweep's rows of some tokens are those that `interactions` gives."""
    manifest, compared = sweep.manifest, 0
    for token in tokens:
        table = bl.interactions(
            model,
            token,
            layer=layer,
            k=manifest.k,
            n_tokens=manifest.n_tokens,
            contrast=manifest.contrast,  # pyright: ignore[reportArgumentType]
        )
        rows, listed = sweep.rows(token, layer), table.to_pandas()
        assert rows.eigenvector.tolist() == list(range(manifest.k))
        assert (rows.token == model.token_labels[token]).all()
        values = table.spectrum.values
        scale = values[0].abs().item()
        assert rows.value.to_numpy() == pytest.approx(values.numpy(), rel=1e-4)
        assert rows.share.to_numpy() == pytest.approx(table.shares.numpy(), rel=1e-3, abs=1e-6)
        assert rows.norm.to_numpy() == pytest.approx(table.interaction.norm().item(), rel=1e-4)
        if manifest.effective_rank:
            assert rows.effective_rank.to_numpy() == pytest.approx(table.effective_rank, rel=1e-3)
        assert rows.residual.max() <= manifest.tol
        whole = model.bilinear_tensor(layer).eigh(table.direction, manifest.k + 1).values
        gaps = (values[:, None] - whole).abs() / scale
        gaps = gaps.masked_fill(torch.eye(manifest.k, manifest.k + 1, dtype=torch.bool), 1)
        oracle = table.spectrum.projections(table.tokens.directions)
        for i in range(manifest.k):
            row = rows.iloc[i]
            vector = vectors_of(sweep, token, layer)[i] if manifest.vectors else None
            if vector is not None:
                assert vector.norm().item() == pytest.approx(1, abs=1e-5)
                error = (table.interaction @ vector - values[i] * vector).norm().item() / scale
                assert row.residual == pytest.approx(error, rel=0.5, abs=3e-6)
            if gaps[i].min() < 0.01:
                continue  # two eigenvectors turn into each other for an error that small
            compared += 1
            if vector is not None:
                torch.testing.assert_close(vector, table.spectrum.vectors[:, i], rtol=0, atol=2e-3)
            for end, sign in (("top", "+"), ("bottom", "-")):
                theirs = listed[(listed.eigenvector == i) & (listed.end == sign)]
                ids, ours = list(row[f"{end}_ids"]), row[f"{end}_projections"]
                close = 2e-3 * oracle[:, i].abs().max().item()
                assert ours == pytest.approx(theirs.projection.to_numpy(), rel=2e-3, abs=close)
                # tokens of equal projections may change places
                assert ours == pytest.approx(oracle[ids, i].numpy(), rel=2e-3, abs=close)
                assert len(set(ids)) == manifest.n_tokens
                assert list(row[f"{end}_tokens"]) == [model.token_labels[id] for id in ids]
    assert compared >= len(tokens) * manifest.k / 3


@pytest.fixture(scope="module")
def one_layer(model, tmp_path_factory) -> bl.Sweep:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    outputs = [*SHE_TO, *range(300, 332)]
    out = tmp_path_factory.mktemp("sweeps") / "one"
    kwargs = {"k": 6, "n_tokens": 7, "effective_rank": True, "vectors": True}
    found = swept(model, out=out, outputs=outputs, **kwargs)
    torch.set_num_threads(before)
    return found


@pytest.fixture(scope="module")
def four_layers() -> bl.HookedBilinearTransformer:
    return bl.HookedBilinearTransformer.from_pretrained("tinystories-4l")


def test_rows_are_those_of_the_interactions(model, one_layer):
    assert_agrees(one_layer, model, one_layer.manifest.outputs[::2], 0)


def test_more_outputs_than_coordinates_and_layers_out_of_order(four_layers, tmp_path):
    """More directions than `d_out` have their matrices from one table, and norms from a Gram."""
    outputs = list(range(1000, 1200))
    kwargs = {"k": 4, "n_tokens": 5, "effective_rank": True, "vectors": True}
    sweep = swept(four_layers, out=tmp_path / "out", outputs=outputs, layers=[3, 1], **kwargs)
    for layer in (1, 3):
        assert_agrees(sweep, four_layers, outputs[::29], layer)
    assert len(sweep) == 400 and len(everything(sweep)) == 1600
    assert sweep.summary().layers.layer.tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"layer=0 is not in this sweep, of \[3, 1\]"):
        sweep.table(1000)


@pytest.mark.parametrize(
    ("name", "contrast"),
    [
        ("llama", 7),
        ("llama-biases", "mean"),
        ("llama-biases", 7),
        ("gemma2-tied", "mean"),
        ("olmo2", None),
    ],
)
def test_rows_of_other_architectures(name, contrast, tmp_path, small_shards):
    """With biases, with a norm after the MLP, without one before it."""
    model = tiny(name)
    sweep = swept(
        model, out=tmp_path / "out", contrast=contrast, vectors=True, effective_rank=True, **TINY
    )
    outputs = [token for token in range(37) if token != contrast]
    assert sweep.manifest.outputs == outputs  # a token against itself is nothing
    for layer in range(3):
        assert_agrees(sweep, model, outputs[layer::6], layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision(dtype, model, tmp_path):
    other = bl.HookedBilinearTransformer.from_pretrained("tinystories-1l", dtype=dtype)
    sweep = swept(other, out=tmp_path / "out", outputs=[*SHE_TO], **TINY)
    assert_agrees(sweep, other, sweep.manifest.outputs, 0)
    single = swept(model, out=tmp_path / "single", outputs=[*SHE_TO], **TINY)
    first, second = everything(sweep).value, everything(single).value
    digits = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-4}[dtype]
    assert first.to_numpy() == pytest.approx(second.to_numpy(), rel=digits)
    assert sweep.manifest.fingerprint != single.manifest.fingerprint
    assert sweep.manifest.dtype == ("float64" if dtype == torch.float64 else "float32")


def test_files_say_what_they_are_of(tmp_path, small_shards, capsys):
    model = tiny()
    out = tmp_path / "deep" / "out"
    sweep = swept(model, out=out, layers=[2, 0], outputs=list(range(5, 37)), tol=1e-4, **TINY)
    assert "64/64" in capsys.readouterr().err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest == {
        "model": "LlamaForCausalLM",
        "source": None,
        "fingerprint": model.fingerprint(),
        "folded": True,
        "layers": [2, 0],
        "outputs": list(range(5, 37)),
        "contrast": "mean",
        "k": 3,
        "n_tokens": 4,
        "tol": 1e-4,
        "dtype": "float32",
        "effective_rank": False,
        "vectors": False,
        "shard_size": 16,
        "bilinear_lens": "0.1.0",
        "torch": torch.__version__,
    }
    assert sorted(contents(out)) == [
        "manifest.json",
        *(
            f"shards/layer-00{layer}-00000{start}.parquet"
            for layer in (0, 2)
            for start in ("00", "16")
        ),
        "tokens.parquet",
    ]
    for shard in sweep.manifest.shards:
        table = pq.read_table(sweep.manifest.path(out, shard))
        assert table.schema.equals(SCHEMA)
        frame = table.to_pandas()
        assert set(frame.layer) == {shard.layer}
        assert frame.eigenvector.tolist() == [0, 1, 2] * 16
        ids = sweep.manifest.outputs[shard.start : shard.stop]
        assert frame.token_id.tolist() == [token for token in ids for _ in range(3)]
        assert frame.effective_rank.isna().all()
        assert {len(found) for found in frame.top_tokens} == {4}
    assert pq.read_table(out / "tokens.parquet")["token"].to_pylist() == model.token_labels
    assert "32 outputs of 2 layers, top 3" in repr(sweep) and len(sweep) == 64


def test_little_memory_gives_the_same_lists(tmp_path, model, one_layer, monkeypatch):
    """The vocabulary in blocks, of which the last may be smaller than what is listed."""
    blocks = []
    whole = type(model).token_directions
    monkeypatch.setattr(
        type(model), "token_directions", lambda self, ids: (blocks.append(ids), whole(self, ids))[1]
    )
    cases = [
        (model, one_layer, {"k": 6, "n_tokens": 7, "outputs": one_layer.manifest.outputs}, 2**23),
        (
            tiny(),
            swept(tiny(), out=tmp_path / "tiny", k=3, n_tokens=17),
            {"k": 3, "n_tokens": 17},
            38000,
        ),
    ]
    for i, (each, expected, kwargs, memory) in enumerate(cases):
        blocks.clear()
        sweep = swept(each, out=tmp_path / str(i), memory=memory, **kwargs)
        assert len(set(blocks)) > 2
        assert {token for block in blocks for token in block} == set(range(each.cfg.d_vocab))
        ours, theirs = everything(sweep), everything(expected)
        for name in ("top", "bottom"):
            first = np.stack(ours[f"{name}_projections"].tolist())
            second = np.stack(theirs[f"{name}_projections"].tolist())
            np.testing.assert_allclose(first, second, rtol=2e-3, atol=2e-3)
            same = np.stack(ours[f"{name}_ids"].tolist()) == np.stack(
                theirs[f"{name}_ids"].tolist()
            )
            assert same.mean() > 0.99
    assert 17 > max(map(len, blocks)) > len(blocks[-1])


def test_too_little_memory_says_how_much_is_needed(tmp_path):
    with pytest.raises(ValueError, match="memory=1000") as error:
        bl.sweep(tiny(), out=tmp_path / "out", memory=1000, **TINY)
    needed = int(str(error.value).split("give at least ")[1].split()[0])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="too little"):
        bl.sweep(tiny(), out=tmp_path / "out", memory=needed - 8, **TINY)
    assert len(swept(tiny(), out=tmp_path / "out", memory=needed, **TINY)) == 111


def test_what_a_sweep_depends_on_changes_it(tmp_path, model):
    def values(name: str, model: bl.HookedBilinearTransformer, **kwargs) -> np.ndarray:
        kwargs = {"outputs": [" she"]} | TINY | kwargs
        return swept(model, out=tmp_path / name, **kwargs).rows(kwargs["outputs"][0]).value

    mean, alone = values("mean", model), values("alone", model, contrast=None)
    pair, swapped = (
        values("pair", model, contrast=" he"),
        values("swapped", model, outputs=[" he"], contrast=" she"),
    )
    among = values("among", model, outputs=[" she", *range(50, 60)])
    np.testing.assert_allclose(mean, among, rtol=1e-4)
    np.testing.assert_allclose(pair, -swapped, rtol=1e-4)
    for other in (alone, pair):
        assert not np.allclose(mean, other, rtol=0.01)


def test_a_fingerprint_is_of_weights_and_tokens():
    model, again, other = fresh(), fresh(), tiny(seed=1)
    assert model.fingerprint() == again.fingerprint() != other.fingerprint()
    again.token_labels[3] = "three"
    assert model.fingerprint() != again.fingerprint()
    with torch.no_grad():
        weight = model.blocks[1].mlp.out.weight
        weight[2, 3] = torch.nextafter(weight[2, 3], torch.tensor(9.0))
    assert model.fingerprint() != tiny().fingerprint()


def test_a_layer_that_writes_nothing_shares_nothing(tmp_path):
    plain = random_model(CONFIGS["llama"])
    with torch.no_grad():
        plain.model.layers[1].mlp.down_proj.weight.zero_()
    model = bl.HookedBilinearTransformer.from_hf(plain)
    sweep = swept(model, out=tmp_path / "out", **TINY)
    rows = sweep.query("SELECT * FROM sweep WHERE layer = 1")
    assert not rows[["value", "share", "residual", "norm"]].to_numpy().any()
    assert (sweep.query("SELECT * FROM sweep WHERE layer != 1").share != 0).all()
    with pytest.raises(ValueError, match="Layer 1 writes nothing"):
        sweep.table(5, 1)


def test_killed_sweeps_and_full_disks_leave_what_is_whole(tmp_path, small_shards):
    """`kill -9` as the manifest, the tokens, or a shard gets its name; then the same bytes."""
    tiny().save_pretrained(tmp_path / "model")
    model = bl.HookedBilinearTransformer.from_pretrained(tmp_path / "model")
    kwargs = {**TINY, "vectors": True}
    expected = contents(swept(model, out=tmp_path / "whole", **kwargs).path)
    files = {
        kind: next(name for name in sorted(expected) if kind in name)
        for kind in ("shards", "vectors")
    }
    sizes = {kind: len(expected[name]) for kind, name in files.items()}
    # a disk on which neither fits, and one on which the vectors do
    assert len(expected["tokens.parquet"]) + 500 < sizes["vectors"] < sizes["shards"] - 500
    points, limits = [0, 1, 2, 3, 12, 19], [sizes["vectors"] - 300, sizes["vectors"] + 300]
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([str(tmp_path), points, limits])],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    messages, left_over = json.loads(run.stdout.splitlines()[-1])
    assert not left_over
    for message, kind in zip(messages, ("shards", "shards"), strict=True):
        assert message.startswith(f"Cannot write {tmp_path}") and files[kind] in message
        assert "File too large" in message and "make room" in message and "resume" in message
    for name in [f"killed-{point}" for point in points] + [f"full-{limit}" for limit in limits]:
        out = tmp_path / name
        left = {file: data for file, data in contents(out).items() if file[-5:] != ".part"}
        assert left.items() <= expected.items()
        if left:
            with pytest.raises(ValueError, match=r"is missing(, and \d more)?: .*resume=True"):
                bl.load_sweep(out)
            with pytest.raises(ValueError, match="holds this sweep already: resume it"):
                bl.sweep(model, out=out, **kwargs)
        bl.sweep(model, out=out, resume=True, **kwargs)
        assert contents(out) == expected


def test_a_disk_that_fills_up_costs_one_shard(tmp_path, small_shards, monkeypatch, capsys):
    model, write, calls = tiny(), pq.ParquetWriter.write_table, []

    def until_full(self, table, **kwargs):
        calls.append(table)
        write(self, table, **kwargs)
        if len(calls) == 5:  # the tokens, and four shards
            raise OSError(errno.ENOSPC, "No space left on device")

    expected = contents(swept(model, out=tmp_path / "whole", **TINY).path)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", until_full)
        with pytest.raises(ValueError, match=r"Cannot write .*No space left.*resume"):
            bl.sweep(model, out=out, **TINY)
    assert len(contents(out)) == 5 and contents(out).items() < expected.items()
    times = {file: file.stat().st_mtime_ns for file in out.glob("shards/*")}
    capsys.readouterr()
    sweep = swept(model, out=out, resume=True, **TINY)
    assert contents(out) == expected
    assert all(file.stat().st_mtime_ns == before for file, before in times.items())
    assert "111/111" in capsys.readouterr().err
    swept(model, out=out, resume=True, **TINY)  # and again, with nothing to do
    assert all(file.stat().st_mtime_ns == before for file, before in times.items())
    assert len(everything(sweep)) == 333


@pytest.mark.skipif(
    importlib.util.find_spec("datatrove") is None, reason="datatrove, of the extra, is not there"
)
def test_workers_write_the_same_bytes_after_one_has_died(tmp_path, small_shards, monkeypatch):
    tiny().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    kwargs = {**TINY, "vectors": True}
    expected = contents(swept("model", out="whole", **kwargs).path)
    kwargs |= {"out": "out", "executor": "local", "workers": 2}
    over = threading.Event()

    def kill_one() -> None:
        while not over.wait(0.02):
            for child in psutil.Process().children():
                child.kill()
                return

    thread = threading.Thread(target=kill_one)
    thread.start()
    try:
        with pytest.raises(TaskError, match=r"killed by SIGKILL.*run the same again"):
            bl.sweep("model", **kwargs)
    finally:
        over.set()
        thread.join()
    sweep = swept("model", **kwargs, resume=True)
    assert contents(sweep.path) == expected
    monkeypatch.chdir("/")  # the model is found from elsewhere
    assert_agrees(bl.load_sweep(tmp_path / "out"), tiny(), [3, 30], 1)
    assert bl.load_sweep(tmp_path / "out").table(3, 1).model == "model"


def test_tasks_are_the_shards_that_are_left(tmp_path, small_shards, monkeypatch, capsys):
    """An executor gets the numbers of missing shards, and what it needs; Slurm returns at once."""
    expected = contents(swept("tinystories-1l", out=tmp_path / "a", outputs=range(48), **TINY).path)
    given: dict[str, Any] = {}

    def run(task, numbers, *, progress, **kwargs):
        given.update(kwargs, numbers=list(numbers))
        if kwargs["executor"] != "slurm":
            for i, number in enumerate(numbers):
                task(number)
                progress(i + 1)

    monkeypatch.setattr(module, "run_tasks", run)
    monkeypatch.setattr(module, "check_executor", lambda *given: None)
    kwargs = {"out": tmp_path / "b", "outputs": range(48), **TINY}
    slurm: dict[str, Any] = {"executor": "slurm", "partition": "cpu", "time": "1:00:00"}
    assert bl.sweep("tinystories-1l", **kwargs, **slurm, workers=5) is None
    assert given == slurm | {"numbers": [0, 1, 2], "workers": 5, "logs": tmp_path / "b" / "logs"}
    assert bl.sweep("tinystories-1l", **kwargs, executor="local", resume=True) is not None
    assert contents(tmp_path / "b") == expected
    (tmp_path / "b/shards/layer-000-0000016.parquet").unlink()
    capsys.readouterr()
    assert bl.sweep("tinystories-1l", **kwargs, executor="ray", resume=True) is not None
    assert given["numbers"] == [1] and contents(tmp_path / "b") == expected
    assert "48/48" in capsys.readouterr().err
    given.clear()
    assert bl.sweep("tinystories-1l", **kwargs, executor="ray", resume=True) is not None
    assert not given  # there was nothing to do


def test_a_worker_with_another_model_writes_nothing(tmp_path, small_shards):
    sweep = swept(tiny(), out=tmp_path / "out", **TINY)
    before = contents(sweep.path)
    with pytest.raises(ValueError, match=r"tinystories-1l is not the model that .* was begun with"):
        module.Task("tinystories-1l", sweep.path, 2**30)(0)
    assert contents(sweep.path) == before


def cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


def emptied(data: bytes) -> bytes:
    return b""


def flipped(data: bytes) -> bytes:
    """One bit in the middle, of data and neither header nor footer."""
    place = len(data) // 3
    return data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]


@pytest.mark.parametrize("kind", ["shards", "vectors"])
@pytest.mark.parametrize("damage", [cut_short, emptied, flipped, None])
def test_damage_is_named_and_mended(kind, damage, tmp_path, small_shards, capsys):
    model, out = tiny(), tmp_path / "out"
    kwargs = {**TINY, "vectors": True}
    sweep = swept(model, out=out, **kwargs)
    expected = contents(out)
    shard = sweep.manifest.shards[4]
    (file,) = out.glob(f"{kind}/{shard.name}.*")
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    assert contents(out) != expected
    times = {
        path: path.stat().st_mtime_ns for path in out.glob("*/*") if shard.name not in str(path)
    }
    with pytest.raises(ValueError, match=f"{shard.name}.* is .*resume=True"):
        bl.load_sweep(out)
    capsys.readouterr()
    bl.sweep(model, out=out, resume=True, **kwargs)
    told = capsys.readouterr().out
    assert (shard.name in told and "is made again" in told) or (damage is None and kind == "shards")
    assert contents(out) == expected and len(times) == 16
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())


def test_a_shard_of_something_else_is_named(tmp_path, small_shards):
    model, out = tiny(), tmp_path / "out"
    sweep = swept(model, out=out, **TINY)
    expected = contents(out)
    first, last = (sweep.manifest.path(out, sweep.manifest.shards[i]) for i in (0, 2))
    for change, message in [
        (lambda: first.write_bytes(last.read_bytes()), "is another sweep's, or another shard"),
        (lambda: pq.write_table(pq.read_table(first).drop(["norm"]), first), "has other columns"),
    ]:
        change()
        with pytest.raises(ValueError, match=f"{first.name} .*{message}"):
            bl.load_sweep(out)
        swept(model, out=out, resume=True, **TINY)
        assert contents(out) == expected


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("there", "message"),
    [
        ("another model", "holds another sweep .fingerprint .* there, .* here.: choose another"),
        ("another k", "holds another sweep .k 2 there, 3 here.: choose another folder"),
        ("other files", "holds other files: choose a new folder"),
        ("hidden files", "holds other files: choose a new folder"),
        ("no manifest", "manifest.json is no manifest of a sweep, with model, source"),
        ("an old manifest", "manifest.json is no manifest of a sweep, with model, source"),
        ("not text", "manifest.json is no manifest of a sweep, with model, source"),
        ("a file", "is a file: give a new folder"),
        ("a file above", "Cannot write .*choose another folder"),
        ("no permission", "Cannot write .*Permission denied.*choose another folder"),
    ],
)
def test_what_is_there_stays(there, message, resume, tmp_path, monkeypatch):
    out = tmp_path / "out"
    manifest = out / "manifest.json"
    if there == "a file":
        out.write_text("mine")
    elif there == "a file above":
        (tmp_path / "mine").write_text("mine")
        out = tmp_path / "mine" / "out"
    else:
        out.mkdir()
    if there == "another model":
        bl.sweep(tiny(seed=1), out=out, **TINY)
    elif there == "another k":
        bl.sweep(tiny(), out=out, k=2, n_tokens=4)
    elif there == "other files":
        (out / "thesis.tex").write_text("mine")
    elif there == "hidden files":
        (out / ".thesis.part").write_text("mine")
    elif there == "no manifest":
        manifest.write_text("[1, 2")
    elif there == "an old manifest":
        manifest.write_text('{"model": "llama"}')
    elif there == "not text":
        manifest.write_bytes(b"\xff\xfe\x00")
    elif there == "no permission":

        def refuse(self, *args, **kwargs):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "write_text", refuse)
    before, places = contents(tmp_path), sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        bl.sweep(tiny(), out=out, resume=resume, **TINY)
    assert contents(tmp_path) == before and sorted(tmp_path.rglob("*")) == places


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": [99]}, "Token id 99 must be between 0 and 36"),
        ({"outputs": [-1]}, "Token id -1 must be"),
        ({"outputs": ["girl"]}, "'girl'"),
        ({"outputs": "#5"}, r"outputs='#5' must be a list of tokens: give \['#5'\]"),
        ({"outputs": []}, "at least one layer and one output"),
        ({"outputs": [4, 3, 4]}, r"outputs holds \[4\] more than once"),
        ({"outputs": [4, 3], "contrast": 3}, "outputs holds the contrast, token 3"),
        ({"contrast": 99}, "Token id 99 must be"),
        ({"layers": [0, 3]}, "layer=3 must be between 0 and 2"),
        ({"layers": [-1]}, "layer=-1 must be"),
        ({"layers": []}, "at least one layer and one output"),
        ({"layers": [1, 1]}, r"layers holds \[1\] more than once"),
        ({"k": 0}, "k=0 must be between 1 and d_in=24"),
        ({"k": 25}, "k=25 must be between 1 and d_in=24"),
        ({"n_tokens": 0}, "n_tokens=0 must be between 1 and 37"),
        ({"n_tokens": 38}, "n_tokens=38 must be between 1 and 37"),
        ({"memory": 0}, "memory=0 bytes is too little"),
        ({"executor": "local"}, r"save it \(model.save_pretrained\(folder\)\) and give"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(change, message, tmp_path, as_users):
    with pytest.raises(ValueError, match=message):
        bl.sweep(tiny(), out=tmp_path / "out", **TINY | change)
    assert not list(tmp_path.iterdir())


def test_raw_weights_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="load the model with fold=True"):
        bl.sweep(tiny(fold=False), out=tmp_path / "out", **TINY)
    assert not list(tmp_path.iterdir())


def test_unknown_words_come_with_near_ones(model, one_layer, tmp_path):
    with pytest.raises(ValueError, match=r"' girlfriends' is not one token.*' girl'"):
        bl.sweep(model, out=tmp_path / "out", outputs=[" girlfriends"], **TINY)
    assert not list(tmp_path.iterdir())
    for ask in (one_layer.rows, one_layer.table, one_layer.search):
        with pytest.raises(ValueError, match=r"' girlfriends' is no token .*' friends'"):
            ask(" girlfriends")
        with pytest.raises(ValueError, match="Token id 4096 must be"):
            ask(4096)
    for ask in (one_layer.rows, one_layer.table, lambda t: one_layer.search(t, role="output")):
        with pytest.raises(ValueError, match="' dog' is not among the 40 outputs"):
            ask(" dog")
    with pytest.raises(ValueError, match=r"layer=1 is not in this sweep, of \[0\]"):
        one_layer.search(" she", layer=1)


def test_without_the_extra_the_executor_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove", None)
    kwargs = {"out": tmp_path / "out", "outputs": [5], **TINY}
    with pytest.raises(ValueError, match=r"needs datatrove.* pip install 'bilinear-lens.cluster.'"):
        bl.sweep("tinystories-1l", executor="local", **kwargs)
    assert len(swept("tinystories-1l", resume=True, **kwargs)) == 1  # and here it can


def test_a_table_is_made_again_from_the_weights(model, one_layer):
    sweep = bl.load_sweep(one_layer.path, model)
    ours, theirs = sweep.table(" she"), bl.interactions(model, " she", layer=0, k=6, n_tokens=7)
    pd.testing.assert_frame_equal(ours.to_pandas(), theirs.to_pandas())
    assert repr(ours) == repr(theirs)
    id = model.token_id(" she")
    pd.testing.assert_frame_equal(sweep.rows(" she"), sweep.rows(id))


def test_a_sweep_of_another_model_is_refused(model, one_layer, tmp_path):
    with pytest.raises(ValueError, match="is a sweep of tinystories-1l with other weights"):
        bl.load_sweep(one_layer.path, tiny())
    changed = bl.HookedBilinearTransformer.from_pretrained("tinystories-1l")
    with torch.no_grad():
        changed.blocks[0].mlp.out.weight[0, 0] += 0.01
    with pytest.raises(ValueError, match="with other weights or tokens than tinystories-1l has"):
        bl.load_sweep(one_layer.path, changed)
    assert bl.load_sweep(one_layer.path).table(" she").output == "' she' - mean"
    nowhere = replace(one_layer.manifest, source=None)
    with pytest.raises(ValueError, match="model in memory: give it, load_sweep"):
        replace(one_layer, manifest=nowhere, loaded=None).table(" she")
    gone = replace(one_layer.manifest, source="gone-model")
    with pytest.raises(ValueError, match="made of 'gone-model': give that model, load_sweep"):
        replace(one_layer, manifest=gone, loaded=None).table(" she")
    other = replace(one_layer.manifest, source="tinystories-4l")
    with pytest.raises(ValueError, match="other weights or tokens than tinystories-4l has"):
        replace(one_layer, manifest=other, loaded=None).table(" she")
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match=r"holds no sweep: there is no manifest.json"):
            bl.load_sweep(path)


def test_eigenvalues_that_are_not_the_models_are_refused(tmp_path):
    model = tiny()
    sweep = swept(model, out=tmp_path / "out", **TINY)
    path = sweep.manifest.path(sweep.path, sweep.manifest.shards[0])
    table = pq.read_table(path)
    place = table.column_names.index("value")
    field = table.schema.field(place)
    values = table["value"].to_numpy() * 1.01
    pq.write_table(table.set_column(place, field, [values.astype(np.float32)]), path)
    with pytest.raises(ValueError, match=r"eigenvalues in .* are not this model's"):
        sweep.table(5, 0)
    assert sweep.table(5, 1).layer == 1


def listing(sweep: bl.Sweep, layer: int | None = None) -> pd.DataFrame:
    """All pairs of an output and an input, by loops over all rows."""
    found = []
    for row in everything(sweep).to_dict("records"):
        for name, end in (("top", "+"), ("bottom", "-")):
            for i in range(sweep.manifest.n_tokens):
                projection = np.float32(row[f"{name}_projections"][i])
                found.append(
                    {
                        "layer": row["layer"],
                        "output": row["token"],
                        "input": row[f"{name}_tokens"][i],
                        "end": end,
                        "eigenvector": row["eigenvector"],
                        "value": row["value"],
                        "share": row["share"],
                        "projection": projection,
                        "contribution": np.float32(row["value"]) * projection * projection,
                        "token_id": row["token_id"],
                        "input_id": row[f"{name}_ids"][i],
                        "place": i,
                    }
                )
    frame = pd.DataFrame(found)
    if layer is not None:
        frame = frame[frame.layer == layer]
    frame["size"] = -frame.contribution.abs()
    by = ["size", "layer", "token_id", "eigenvector", "end", "place"]
    return frame.sort_values(by)  # pyright: ignore[reportCallIssue]


@pytest.fixture(scope="module")
def two_layers(four_layers, tmp_path_factory) -> bl.Sweep:
    out = tmp_path_factory.mktemp("sweeps") / "two"
    outputs = [*SHE_TO, *range(300, 312)]
    return swept(four_layers, out=out, layers=[1, 3], outputs=outputs, k=5, n_tokens=9)


@pytest.mark.parametrize("layer", [None, 3])
@pytest.mark.parametrize("end", ["+", "-", "either"])
def test_search_finds_the_rows_that_a_loop_finds(two_layers, end, layer):
    everywhere = listing(two_layers, layer)
    some = everywhere if end == "either" else everywhere[everywhere.end == end]
    frequent = int(some.input_id.mode()[0])
    never = next(id for id in range(4096) if id not in set(some.input_id))
    for token in (frequent, never, " girl"):
        id = two_layers.labels.index(token) if isinstance(token, str) else token
        for role, column in (("input", "input_id"), ("output", "token_id")):
            if role == "output" and id not in two_layers.manifest.outputs:
                continue
            expected = some.loc[some[column] == id]
            for limit in (3, 10**6):
                found = two_layers.search(token, end=end, role=role, layer=layer, limit=limit)
                rows = expected.loc[:, list(found.columns)][:limit].reset_index(drop=True)
                pd.testing.assert_frame_equal(found, rows, check_dtype=False, rtol=1e-6)
    assert len(some[some.input_id == frequent]) > 3
    assert two_layers.search(never, end=end, layer=layer).empty
    assert len(two_layers.search(" girl", role="output", end=end, layer=layer)) == min(
        50, 5 * 9 * (1 + (end == "either")) * (1 + (layer is None))
    )


def test_bad_questions_are_named(two_layers, as_users):
    for change in ({"end": "top"}, {"role": "both"}, {"limit": 0}):
        with pytest.raises(ValueError, match=r"must be one of .* role=.* input or output, .*limit"):
            two_layers.search(" girl", **change)
    with pytest.raises(ValueError, match=r"DuckDB: .*nothing"):
        two_layers.query("SELECT nothing FROM sweep")
    found = two_layers.query("SELECT count(*) AS n FROM sweep WHERE layer = $l", {"l": 3})
    assert found.n.tolist() == [100]


def test_tokens_that_read_the_same_are_told_apart_by_id(tmp_path):
    model = fresh()
    model.token_labels[4] = model.token_labels[9] = "twin"
    sweep = swept(model, out=tmp_path / "out", **TINY)
    with pytest.raises(ValueError, match=r"2 tokens read 'twin'; give an id of \[4, 9\]"):
        sweep.rows("twin")
    assert (sweep.rows(9).token == "twin").all() and (sweep.rows(9).token_id == 9).all()
    assert sweep.rows("#5").token_id.tolist() == [5] * 3  # names, where there is no tokenizer


def test_a_summary_is_what_pandas_makes_of_the_rows(one_layer, two_layers, tmp_path):
    """Of few tokens, an output has several eigenvectors with the same ends."""
    few = swept(tiny(), out=tmp_path / "few", k=20, n_tokens=1)
    for sweep in (one_layer, two_layers, few):
        rows, summary = everything(sweep), sweep.summary()
        rows["size"] = rows.share.abs().astype(float)
        outputs = (
            rows.groupby(["layer", "token", "token_id"])
            .agg(
                effective_rank=("effective_rank", "first"),
                top_share=("size", "sum"),
                norm=("norm", "first"),
                residual=("residual", "max"),
            )
            .reset_index()
            .rename(columns={"token": "output"})
        )
        by = ["effective_rank"] * sweep.manifest.effective_rank + ["top_share"]
        ascending = [True] * sweep.manifest.effective_rank + [False]
        outputs = outputs.sort_values(by, ascending=ascending, ignore_index=True)
        kwargs = {"check_dtype": False, "check_index_type": False, "rtol": 1e-6}
        pd.testing.assert_frame_equal(summary.outputs, outputs, **kwargs)
        layers = outputs.groupby("layer")[["effective_rank", "top_share", "norm"]].median()
        layers.insert(0, "outputs", outputs.groupby("layer").size())
        layers["residual"] = outputs.groupby("layer").residual.max()
        pd.testing.assert_frame_equal(summary.layers, layers.reset_index(), **kwargs)
        rows["+ end"] = [tokens[0] for tokens in rows.top_tokens]
        rows["- end"] = [tokens[0] for tokens in rows.bottom_tokens]
        inputs = (
            rows.groupby(["layer", "+ end", "- end"])
            .agg(outputs=("token_id", "nunique"), mean_share=("size", "mean"))
            .reset_index()
            .sort_values(["outputs", "mean_share"], ascending=False, ignore_index=True)
        )
        pd.testing.assert_frame_equal(summary.inputs, inputs, **kwargs)
        repeated = rows.duplicated(["layer", "token_id", "+ end", "- end"]).any()
        assert repeated == (sweep is few)
        assert summary.inputs.outputs.iloc[0] > 1 and len(outputs) == len(sweep)


def test_a_folder_is_a_name_and_not_a_pattern(tmp_path):
    """`run[1]` is not `run1`, and `layer=3` is no column."""
    first, second = tiny(), tiny(seed=1)
    for name, other in (("run[1]", "run1"), ("what?", "whata"), ("all*", "all of it")):
        sweep = swept(first, out=tmp_path / name, **TINY)
        values = everything(sweep).value
        others = everything(swept(second, out=tmp_path / other, **TINY)).value
        assert len(everything(sweep)) == 333 and not np.allclose(values, others, rtol=0.1)
        assert everything(bl.load_sweep(tmp_path / name)).value.equals(values)
    sweep = swept(first, out=tmp_path / "model=5" / "layer=3", **TINY)
    assert list(everything(sweep).columns) == SCHEMA.names
    assert set(everything(sweep).layer) == {0, 1, 2}


def test_shards_are_cut_as_the_manifest_says(tmp_path, small_shards, monkeypatch):
    sweep = swept(tiny(), out=tmp_path / "out", **TINY)
    assert len(sweep.manifest.shards) == 9
    monkeypatch.setattr(module, "SIZE", 1024)  # as in a worker, or in a later version
    assert len(Manifest.read(sweep.path).shards) == 9
    assert len(everything(bl.load_sweep(sweep.path))) == 333
    with pytest.raises(ValueError, match="shard_size 16 there, 1024 here"):
        bl.sweep(tiny(), out=sweep.path, resume=True, **TINY)
