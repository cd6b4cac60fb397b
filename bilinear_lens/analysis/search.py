"""What can be asked of a sweep: tables of tokens, outputs that listen for a token, summaries."""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Literal, NamedTuple

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from bilinear_lens.analysis.interactions import InteractionTable, interactions
from bilinear_lens.analysis.shards import TOKENS, Manifest
from bilinear_lens.models import vocabulary
from bilinear_lens.models.transformer import HookedBilinearTransformer
from bilinear_lens.models.vocabulary import Token


class Summary(NamedTuple):
    """A sweep in three tables."""

    layers: pd.DataFrame
    """For each layer: how many outputs, and medians over them."""
    outputs: pd.DataFrame
    """A row for each layer and output, the most low-rank first."""
    inputs: pd.DataFrame
    """A row for each layer and input direction, named by its outermost tokens, the most shared
    first: of how many outputs it is an eigenvector, and its mean share of their interactions."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep on disk. Questions go to its Parquet files through DuckDB."""

    path: Path
    manifest: Manifest
    labels: list[str]
    """Of all tokens, by id."""
    loaded: HookedBilinearTransformer | None = None
    """The model that it is of, where one was at hand."""

    def __len__(self) -> int:
        return len(self.manifest.layers) * len(self.manifest.outputs)

    def __repr__(self) -> str:
        manifest = self.manifest
        return (
            f"Sweep({manifest.model}: {len(manifest.outputs)} outputs of {len(manifest.layers)} "
            f"layers, top {manifest.k}, in {self.path})"
        )

    @cached_property
    def model(self) -> HookedBilinearTransformer:
        """The model that the sweep is of.

        Raises:
            ValueError: if it cannot be found, or is not the one.
        """
        if self.loaded is not None:
            return self.loaded
        source = self.manifest.source
        if source is None:
            raise ValueError(
                "The sweep was made of a model in memory: give it, "
                f"load_sweep({str(self.path)!r}, model)."
            )
        try:
            model = HookedBilinearTransformer.from_pretrained(source)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"The sweep was made of {source!r}: give that model, "
                f"load_sweep({str(self.path)!r}, model). {error.args[0]}"
            ) from error
        _check_model(model, self.manifest, self.path)
        return model

    def query(self, sql: str, parameters: dict[str, object] | None = None) -> pd.DataFrame:
        """Ask in SQL; the table is called `sweep` and has the columns of `shards.SCHEMA`.

        Raises:
            ValueError: if DuckDB refuses it.
        """
        files = [self.manifest.path(self.path, shard) for shard in self.manifest.shards]
        shards = [escape(str(file)) for file in files]  # DuckDB takes them for patterns
        with duckdb.connect() as connection:
            try:
                connection.read_parquet(shards, hive_partitioning=False).create_view("sweep")
                return connection.execute(sql, parameters).df()
            except duckdb.Error as error:
                raise ValueError(f"DuckDB: {error}") from error

    def table(self, token: Token, layer: int = 0) -> InteractionTable:
        """The same as `interactions` gives, made again from the model's weights.

        Raises:
            ValueError: if the sweep does not hold it, or is of another model.
        """
        manifest = self.manifest
        values = self.rows(token, layer)["value"]
        table = interactions(
            self.model,
            self._id(token),
            layer=layer,
            k=manifest.k,
            n_tokens=manifest.n_tokens,
            contrast=manifest.contrast,  # pyright: ignore[reportArgumentType]
        )
        error = abs(table.spectrum.values.cpu().numpy() - values).max()
        if error > 1e-3 * values.abs().max():
            raise ValueError(f"The eigenvalues in {self.path} are not this model's.")
        return table

    def rows(self, token: Token, layer: int = 0) -> pd.DataFrame:
        """What the sweep says of one output: a row for each eigenvector.

        Raises:
            ValueError: if the sweep does not hold it.
        """
        self._check_layer(layer)
        self._check_output(token)
        return self.query(
            "SELECT * FROM sweep WHERE layer = $layer AND token_id = $token ORDER BY eigenvector",
            {"layer": layer, "token": self._id(token)},
        )

    def search(
        self,
        token: Token,
        *,
        end: Literal["+", "-", "either"] = "either",
        role: Literal["input", "output"] = "input",
        layer: int | None = None,
        limit: int = 50,
    ) -> pd.DataFrame:
        """Where a token stands: what listens for it, or what it listens for as an output.

        Args:
            end: the end of the eigenvectors that lists the token, or whose tokens are listed.
            role: "input" gives the eigenvectors that list the token; "output" the tokens that its
                own eigenvectors list.
            layer: by default all.
            limit: how many rows.

        Returns:
            A row for each pair of an output and an input, by the magnitude of `contribution`: what
            the input alone makes the layer write along the output, `value * projection^2`.

        Raises:
            ValueError: if the token is unknown, or an argument is not one of those above.
        """
        sides = {"+": ["top"], "-": ["bottom"], "either": ["top", "bottom"]}
        if end not in sides or role not in ("input", "output") or limit < 1:
            raise ValueError(
                f"end={end!r} must be one of {list(sides)}, role={role!r} input or output, and "
                f"limit={limit} at least 1."
            )
        if layer is not None:
            self._check_layer(layer)
        if role == "output":
            self._check_output(token)
        parts = []
        for side in sides[end]:
            listed = "token_id = $token" if role == "output" else f"{side}_ids[i] = $token"
            parts.append(
                f"""SELECT layer, token_id, token AS output, {side}_tokens[i] AS input,
                '{"+" if side == "top" else "-"}' AS "end", eigenvector, value, share,
                {side}_projections[i] AS projection, i
                FROM sweep, range(1, {self.manifest.n_tokens + 1}) AS places(i) WHERE {listed}"""
            )
        return self.query(
            f"""SELECT layer, output, input, "end", eigenvector, value, share, projection,
            value * projection * projection AS contribution FROM ({" UNION ALL ".join(parts)})
            WHERE $layer IS NULL OR layer = $layer
            ORDER BY abs(contribution) DESC, layer, token_id, eigenvector, "end", i
            LIMIT $limit""",
            {"token": self._id(token), "layer": layer, "limit": limit},
        )

    def summary(self) -> Summary:
        """The most low-rank outputs, and the input directions that most outputs share."""
        outputs = self.query(
            """SELECT layer, token AS output, token_id, any_value(effective_rank) AS effective_rank,
            sum(abs(share)) AS top_share, any_value(norm) AS norm, max(residual) AS residual
            FROM sweep GROUP BY layer, token_id, token
            ORDER BY effective_rank ASC NULLS LAST, top_share DESC, layer, token_id"""
        )
        layers = outputs.groupby("layer").agg(
            outputs=("token_id", "count"),
            effective_rank=("effective_rank", "median"),
            top_share=("top_share", "median"),
            norm=("norm", "median"),
            residual=("residual", "max"),
        )
        inputs = self.query(
            """SELECT layer, top_tokens[1] AS "+ end", bottom_tokens[1] AS "- end",
            count(DISTINCT token_id) AS outputs, avg(abs(share)) AS mean_share FROM sweep
            GROUP BY 1, 2, 3 ORDER BY outputs DESC, mean_share DESC, layer, "+ end", "- end"
            """
        )
        return Summary(layers.reset_index(), outputs, inputs)

    def _id(self, token: Token) -> int:
        if not isinstance(token, str):
            return vocabulary.token_id(token, self.labels, None)
        ids = [i for i, label in enumerate(self.labels) if label == token]
        if not ids:
            near = get_close_matches(token, self.labels, n=5, cutoff=0.5)
            raise ValueError(
                f"{token!r} is no token of this sweep's model (most words begin with a space); "
                f"near ones: {near}."
            )
        if len(ids) > 1:
            raise ValueError(f"{len(ids)} tokens read {token!r}; give an id of {ids}.")
        return ids[0]

    def _check_layer(self, layer: int) -> None:
        if layer not in self.manifest.layers:
            raise ValueError(f"layer={layer!r} is not in this sweep, of {self.manifest.layers}.")

    def _check_output(self, token: Token) -> None:
        if self._id(token) not in self.manifest.outputs:
            raise ValueError(
                f"{token!r} is not among the {len(self.manifest.outputs)} outputs of this sweep."
            )


def load_sweep(
    path: str | Path, model: HookedBilinearTransformer | str | Path | None = None
) -> Sweep:
    """Open a sweep. All its files are read once, to be sure of them.

    Args:
        model: what it was made of, or its name or folder, for `Sweep.table`; by default it is
            loaded from where it came when that is asked for.

    Raises:
        ValueError: if `path` holds no sweep, a shard is missing or damaged, or `model` is another.
    """
    path = Path(path)
    manifest = Manifest.read(path)
    faults = []
    for shard in manifest.shards:
        fault = manifest.fault(path, shard)
        if fault is not None:
            faults.append(f"{manifest.path(path, shard)} {fault}")
    if faults:
        more = f", and {len(faults) - 1} more" * (len(faults) > 1)
        raise ValueError(f"{faults[0]}{more}: run the sweep again with resume=True (--resume).")
    if isinstance(model, (str, Path)):
        model = HookedBilinearTransformer.from_pretrained(model)
    if model is not None:
        _check_model(model, manifest, path)
    try:
        labels = pq.read_table(path / TOKENS, page_checksum_verification=True)["token"].to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(
            f"{path / TOKENS} is missing or damaged: run the sweep again with resume=True "
            "(--resume)."
        ) from error
    return Sweep(path, manifest, labels, model)


def _check_model(model: HookedBilinearTransformer, manifest: Manifest, path: Path) -> None:
    if model.fingerprint() != manifest.fingerprint:
        raise ValueError(
            f"{path} is a sweep of {manifest.model} with other weights or tokens than "
            f"{model.cfg.model_name} has: load the model that it was made of."
        )
