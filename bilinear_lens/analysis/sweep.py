"""The eigenvector tables of a whole vocabulary: every output token, every layer, to Parquet.

A sweep is cut into shards, of a layer and a block of output tokens each. A shard is one file, whole
or absent, and that alone says what is still to do.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from operator import index
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from bilinear_lens.analysis.cluster import check_executor, run_tasks
from bilinear_lens.analysis.search import Sweep, load_sweep
from bilinear_lens.analysis.shards import OF, SCHEMA, VECTORS, Manifest, Shard, checksum, writing
from bilinear_lens.eigensolver import Eigensolver, TooLittleMemory
from bilinear_lens.kernels import fast_float32
from bilinear_lens.models.transformer import HookedBilinearTransformer
from bilinear_lens.models.vocabulary import Token
from bilinear_lens.spectrum import Spectrum, coordinates, effective_ranks

SIZE = 1024
"""Outputs in a shard: seconds to minutes of work, which is what a killed run loses."""

STEP = 256
"""Outputs between two moves of the progress bar, or fewer with little memory."""


def sweep(
    model: HookedBilinearTransformer | str | Path,
    *,
    out: str | Path,
    layers: Sequence[int] | None = None,
    outputs: Sequence[Token] | None = None,
    k: int = 8,
    n_tokens: int = 10,
    contrast: Token | Literal["mean"] | None = "mean",
    effective_rank: bool = False,
    vectors: bool = False,
    tol: float = 1e-5,
    memory: int = 2**30,
    resume: bool = False,
    executor: Literal["local", "ray", "slurm"] | None = None,
    workers: int = 1,
    partition: str | None = None,
    time: str | None = None,
) -> Sweep | None:
    """Decompose the interactions of many outputs, and list the tokens at their eigenvectors' ends.

    The tables of `interactions`, for every token and layer; see `Sweep` for what can be asked of
    them. Each eigenpair comes with its residual.

    Args:
        model: a model, or the name or folder of one; worker processes load it from there.
        out: a new folder, for a manifest and Parquet shards (`shards.SCHEMA`).
        layers: by default all.
        outputs: tokens; by default the whole vocabulary.
        k: how many eigenvectors of each.
        n_tokens: how many tokens at each end of an eigenvector.
        contrast: what outputs are measured against, as in `output_direction`.
        effective_rank: also that of each output's whole spectrum, which takes all eigenvalues.
        vectors: also write the eigenvectors, as safetensors.
        tol: the largest residual, as in `BilinearTensor.eigh`.
        memory: bytes of working space beside the model, whatever the vocabulary; each worker's.
        resume: go on with the sweep in `out`, which must be this one; damaged shards are redone.
        executor: run shards in other processes, as in `cluster.run_tasks`, like the arguments
            below. Without one they run here.

    Returns:
        The sweep; with "slurm" None, because it has only been submitted.

    Raises:
        ValueError: if a token, a layer, k or n_tokens is out of range; if `out` holds something
            else, or cannot be written; if `memory` is too little for one direction.
    """
    out = Path(out)
    if not isinstance(model, HookedBilinearTransformer):
        model = HookedBilinearTransformer.from_pretrained(model)
    source = model.source
    if executor is not None and source is None:
        raise ValueError(
            "Worker processes load the model themselves: save it (model.save_pretrained(folder)) "
            "and give sweep the folder."
        )
    manifest = Manifest(
        model=model.cfg.model_name,
        source=source,
        fingerprint=model.fingerprint(),
        folded=model.folded,
        layers=_whole("layers", *(range(model.cfg.n_layers) if layers is None else layers)),
        outputs=_outputs(model, outputs, contrast),
        contrast=contrast if contrast in ("mean", None) else model.token_id(contrast),
        k=_whole("k", k)[0],
        n_tokens=_whole("n_tokens", n_tokens)[0],
        tol=float(tol),
        dtype=str(model.bilinear_tensor(0).left.dtype).removeprefix("torch."),
        effective_rank=effective_rank,
        vectors=vectors,
        shard_size=SIZE,
        bilinear_lens=version("bilinear-lens"),
        torch=torch.__version__,
    )
    _check(model, manifest)
    if executor is not None:
        check_executor(executor, workers, partition, time)
    elif workers != 1:
        raise ValueError(f"workers={workers} are for an executor: give executor='local', too.")
    writer = Writer(model, manifest, out, int(memory))
    writer.solver(manifest.layers[0])  # refuses too little memory before anything is written
    manifest.begin(out, model.token_labels, resume=resume)
    todo = []
    for number, shard in enumerate(manifest.shards):
        fault = manifest.fault(out, shard)
        if fault is not None:
            todo.append(number)
            if fault != "is missing":
                tqdm.write(f"{manifest.path(out, shard)} {fault}: it is made again.")
    sizes = [manifest.shards[number].stop - manifest.shards[number].start for number in todo]
    total = len(manifest.layers) * len(manifest.outputs)
    with tqdm(total=total, initial=total - sum(sizes), desc="sweep", unit=" outputs") as bar:
        if executor is None:
            for number in todo:
                writer(manifest.shards[number], bar.update)
        elif todo:
            assert source is not None
            start, done = bar.n, [0, *np.cumsum(sizes).tolist()]
            run_tasks(
                Task(source, out.resolve(), int(memory)),
                todo,
                executor=executor,
                workers=workers,
                logs=out / "logs",
                partition=partition,
                time=time,
                progress=lambda n: bar.update(start + done[n] - bar.n),
            )
    return None if todo and executor == "slurm" else replace(load_sweep(out), loaded=model)


def _whole(name: str, *given: object) -> list[int]:
    """Whole numbers, NumPy's too, for the manifest."""
    try:
        return [index(number) for number in given]  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise ValueError(f"{name} must be whole numbers, not {given!r}.") from None


def _outputs(
    model: HookedBilinearTransformer,
    outputs: Sequence[Token] | None,
    contrast: Token | Literal["mean"] | None,
) -> list[int]:
    """Token ids, in order; of a whole vocabulary without the contrast, against which it is zero."""
    if isinstance(outputs, (str, int)):
        raise ValueError(f"outputs={outputs!r} must be a list of tokens: give [{outputs!r}].")
    if outputs is not None:
        return [model.token_id(token) for token in outputs]
    ids = list(range(model.cfg.d_vocab))
    if contrast not in ("mean", None):
        ids.remove(model.token_id(contrast))
    return ids


def _check(model: HookedBilinearTransformer, manifest: Manifest) -> None:
    if not manifest.layers or not manifest.outputs:
        raise ValueError("A sweep needs at least one layer and one output.")
    for name in ("layers", "outputs"):
        given = getattr(manifest, name)
        twice = [number for number, times in Counter(given).items() if times > 1]
        if twice:
            raise ValueError(f"{name} holds {twice[:9]} more than once: give each once.")
    if manifest.contrast in manifest.outputs:
        raise ValueError(
            f"outputs holds the contrast, token {manifest.contrast}, which is zero against itself: "
            "leave it out."
        )
    if not 0 < manifest.tol < 1:
        raise ValueError(f"tol={manifest.tol} must lie between 0 and 1.")
    model.output_directions(manifest.outputs[:1])  # refuses weights that are not folded
    for name, weights in (("embedding", model.W_E), ("unembedding", model.W_U)):
        if not weights.isfinite().all():
            raise ValueError(f"The {name} holds NaN or infinite weights: reload or repair them.")
    for layer in manifest.layers:
        d_in = model.bilinear_tensor(layer).d_in
        if not 1 <= manifest.k <= d_in:
            raise ValueError(f"k={manifest.k} must be between 1 and d_in={d_in}.")
    if not 1 <= manifest.n_tokens <= model.cfg.d_vocab:
        raise ValueError(f"n_tokens={manifest.n_tokens} must be between 1 and {model.cfg.d_vocab}.")


@dataclass(frozen=True)
class Task:
    """What a worker process calls, with the number of a shard."""

    source: str
    out: Path
    memory: int

    def __call__(self, number: int) -> None:
        writer = _writer(self)
        writer(writer.manifest.shards[number], lambda n: None)


@lru_cache(maxsize=1)
def _writer(task: Task) -> "Writer":
    manifest = Manifest.read(task.out)
    model = HookedBilinearTransformer.from_pretrained(task.source)
    if model.fingerprint() != manifest.fingerprint:
        raise ValueError(f"{task.source} is not the model that {task.out} was begun with.")
    return Writer(model, manifest, task.out, task.memory)


class Ends(NamedTuple):
    """The outermost tokens at both ends of eigenvectors, and their projections."""

    top: Int[Tensor, "n k n_tokens"]
    top_projections: Float[Tensor, "n k n_tokens"]
    bottom: Int[Tensor, "n k n_tokens"]
    bottom_projections: Float[Tensor, "n k n_tokens"]


class Writer:
    """Makes the shards of a sweep."""

    def __init__(
        self, model: HookedBilinearTransformer, manifest: Manifest, out: Path, memory: int
    ) -> None:
        self.model, self.manifest, self.out, self.memory = model, manifest, out, memory
        self.labels = pa.array(model.token_labels)
        # the vectors and what becomes of them, the best tokens so far and their table, in bytes
        each = manifest.k * (4 * 6 * model.cfg.d_model + 200 * manifest.n_tokens)
        self.step = min(STEP, max(1, memory // 16 // each))
        self._last: tuple[int, Eigensolver] | None = None

    def solver(self, layer: int) -> Eigensolver:
        """Of the last layer asked for; one at a time, because its table may take most of memory.

        Raises:
            ValueError: if memory is too little for one direction.
        """
        if self._last is None or self._last[0] != layer:
            self._last = None
            self._last = layer, self._solver(layer)
        return self._last[1]

    def _solver(self, layer: int) -> Eigensolver:
        tensor = self.model.bilinear_tensor(layer)
        try:
            return tensor.eigensolver(
                self.manifest.k,
                n=len(self.manifest.outputs),
                tol=self.manifest.tol,
                memory=self.memory * 3 // 4,
            )
        except TooLittleMemory as error:
            raise TooLittleMemory(self.memory, error.needed * 4 // 3 + 4) from error

    @torch.no_grad()
    def __call__(self, shard: Shard, progress: Callable[[int], object]) -> None:
        """Write one shard; `progress` is told of every few hundred outputs.

        Raises:
            ValueError: if it cannot be written.
        """
        metadata = SCHEMA.with_metadata({OF: self.manifest.digest(shard)})
        with (
            writing(self.manifest.path(self.out, shard)) as part,
            pq.ParquetWriter(part, metadata, write_page_checksum=True) as file,
        ):
            if not self.manifest.vectors:
                self._write(shard, progress, file, None)
                return
            left = self.model.bilinear_tensor(shard.layer).left
            vectors = left.new_empty(
                shard.stop - shard.start, self.manifest.k, left.shape[1], device="cpu"
            )
            self._write(shard, progress, file, vectors)
            path = self.manifest.vectors_path(self.out, shard)
            with writing(path) as tensors:
                save_file({"vectors": vectors}, tensors)
            file.add_key_value_metadata({VECTORS: checksum(path)})

    def _write(
        self,
        shard: Shard,
        progress: Callable[[int], object],
        file: pq.ParquetWriter,
        vectors: Tensor | None,
    ) -> None:
        manifest, solver = self.manifest, self.solver(shard.layer)
        for start in range(shard.start, shard.stop, self.step):
            outputs = manifest.outputs[start : min(start + self.step, shard.stop)]
            directions = self.model.output_directions(outputs, manifest.contrast, layer=shard.layer)
            spectrum = solver(directions)
            norms = solver.norms(directions)
            ranks = (
                effective_ranks(solver.all_values(directions)) if manifest.effective_rank else None
            )
            ends, flip = self.ends(spectrum)
            file.write_table(self._table(shard.layer, outputs, spectrum, norms, ranks, ends))
            if vectors is not None:
                first = start - shard.start
                vectors[first : first + len(outputs)] = (spectrum.vectors * flip[:, None]).mT
            progress(len(outputs))

    def ends(self, spectrum: Spectrum) -> tuple[Ends, Float[Tensor, "n k"]]:
        """The tokens at both ends, and the signs that make the largest projection positive.

        Tokens come in blocks, so that memory does not grow with the vocabulary.
        """
        n_tokens, d_vocab = self.manifest.n_tokens, self.model.cfg.d_vocab
        rows = spectrum.vectors.mT.flatten(0, 1)
        block = max(1, self.memory // 16 // (8 * (len(rows) + rows.shape[1])))
        none = rows.new_empty(len(rows), 0)
        best = {largest: (none, none.long()) for largest in (True, False)}
        for start in range(0, d_vocab, block):
            tokens = self.model.token_directions(range(start, min(start + block, d_vocab)))
            with fast_float32():
                projections = rows @ coordinates(tokens.to(rows), spectrum.d_in, spectrum.affine).mT
            for largest, (values, ids) in best.items():
                found = projections.topk(min(n_tokens, len(tokens)), largest=largest)
                values = torch.cat([values, found.values], dim=1)
                ids = torch.cat([ids, found.indices + start], dim=1)
                kept = values.topk(min(n_tokens, values.shape[1]), largest=largest)
                best[largest] = kept.values, ids.gather(1, kept.indices)
        shape = (*spectrum.values.shape, n_tokens)
        (highest, top), (lowest, bottom) = (
            (values.view(shape), ids.view(shape)) for values, ids in best.values()
        )
        turned = (-lowest[..., :1] > highest[..., :1]).expand(shape)
        ends = Ends(
            torch.where(turned, bottom, top),
            torch.where(turned, -lowest, highest),
            torch.where(turned, top, bottom),
            torch.where(turned, -highest, lowest),
        )
        return ends, torch.where(turned[..., 0], -1.0, 1.0).to(rows)

    def _table(
        self,
        layer: int,
        outputs: list[int],
        spectrum: Spectrum,
        norms: Float[Tensor, " n"],
        ranks: Float[Tensor, " n"] | None,
        ends: Ends,
    ) -> pa.Table:
        values, k = spectrum.values, spectrum.k
        # a layer whose weights are zero writes nothing, and shares nothing
        shares = (values.sign() * values**2 / norms[:, None] ** 2).nan_to_num()
        assert spectrum.residuals is not None
        ids = pa.array(np.repeat(np.array(outputs, dtype=np.int32), k))
        columns = {
            "layer": np.full(len(ids), layer, dtype=np.int16),
            "token_id": ids,
            "token": self.labels.take(ids),
            "eigenvector": np.tile(np.arange(k, dtype=np.int16), len(outputs)),
            "value": _numbers(values),
            "share": _numbers(shares),
            "residual": _numbers(spectrum.residuals),
            "norm": _numbers(norms).repeat(k),
            "effective_rank": pa.nulls(len(ids), pa.float32())
            if ranks is None
            else _numbers(ranks).repeat(k),
        }
        offsets = pa.array(np.arange(len(ids) + 1, dtype=np.int32) * self.manifest.n_tokens)
        for end, tokens, projections in (("top", *ends[:2]), ("bottom", *ends[2:])):
            flat = pa.array(tokens.flatten().int().cpu().numpy())
            for what, entries in (
                ("ids", flat),
                ("tokens", self.labels.take(flat)),
                ("projections", pa.array(_numbers(projections))),
            ):
                columns[f"{end}_{what}"] = pa.ListArray.from_arrays(offsets, entries)
        return pa.table(columns, schema=SCHEMA)


def _numbers(values: Tensor) -> np.ndarray:
    return values.flatten().float().cpu().numpy()
