"""The files of a sweep: a manifest that says what it is of, and shards, each whole or absent."""

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

MANIFEST, TOKENS = "manifest.json", "tokens.parquet"

OF, VECTORS = b"sweep", b"vectors"
"""Under which a shard's metadata has the digest of what it is of, and of its eigenvectors' file."""

_ENDS = [
    pa.field(f"{end}_{what}", pa.list_(kind))
    for end in ("top", "bottom")
    for what, kind in (("ids", pa.int32()), ("tokens", pa.string()), ("projections", pa.float32()))
]
SCHEMA = pa.schema(
    [
        ("layer", pa.int16()),
        ("token_id", pa.int32()),
        ("token", pa.string()),
        ("eigenvector", pa.int16()),
        ("value", pa.float32()),
        ("share", pa.float32()),
        ("residual", pa.float32()),
        ("norm", pa.float32()),
        ("effective_rank", pa.float32()),
        *_ENDS,
    ]
)
"""A row for each layer, output token and eigenvector.

- `share`: of `||Q||_F^2`, signed like the eigenvalue; `norm`: `||Q||_F`, of the output's
  interaction
- `residual`: `||Q v - value v||`, relative to `||Q||_2`
- `effective_rank`: of the output's whole spectrum; null unless asked for
- `top_...` and `bottom_...`: the tokens of the "+" and the "-" end, the outermost first, with
  `projections` v . e; an eigenvector is signed so that the largest projection is positive
"""


class Shard(NamedTuple):
    layer: int
    start: int
    stop: int
    """Into the manifest's outputs."""

    @property
    def name(self) -> str:
        return f"layer-{self.layer:03d}-{self.start:07d}"


@dataclass(frozen=True)
class Manifest:
    """What a sweep is of."""

    model: str
    source: str | None
    """The name or folder that the model can be loaded from."""
    fingerprint: str
    """Of its weights and tokens."""
    folded: bool
    layers: list[int]
    outputs: list[int]
    """Token ids."""
    contrast: str | int | None
    """"mean", a token's id, or nothing."""
    k: int
    n_tokens: int
    tol: float
    dtype: str
    effective_rank: bool
    vectors: bool
    shard_size: int
    """Outputs in a shard."""
    bilinear_lens: str
    torch: str
    """Versions."""

    @cached_property
    def shards(self) -> list[Shard]:
        return [
            Shard(layer, start, min(start + self.shard_size, len(self.outputs)))
            for layer in self.layers
            for start in range(0, len(self.outputs), self.shard_size)
        ]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a sweep's folder.

        Raises:
            ValueError: if there is none, or another version of this package wrote it otherwise.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder} holds no sweep: there is no {MANIFEST} in it.")
        try:
            return cls(**json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            expected = ", ".join(field.name for field in fields(cls))
            raise ValueError(f"{path} is no manifest of a sweep, with {expected}.") from error

    def begin(self, folder: Path, labels: list[str], *, resume: bool) -> None:
        """Make the folder of this sweep, or check that it is this sweep's.

        Raises:
            ValueError: if it holds another sweep, or this one and not `resume`, or other files; if
                it cannot be written.
        """
        source = self.source
        if folder.is_file():
            raise ValueError(f"{folder} is a file: give a new folder.")
        if (folder / MANIFEST).exists():
            there = self.read(folder)
            theirs, source = asdict(there), source or there.source
            other = {
                name: (theirs[name], mine)
                for name, mine in asdict(self).items()
                if theirs[name] != mine and name != "source"
            }
            if other:
                told = "; ".join(
                    f"{name} {_brief(there)} there, {_brief(here)} here"
                    for name, (there, here) in other.items()
                )
                raise ValueError(f"{folder} holds another sweep ({told}): choose another folder.")
            if not resume:
                raise ValueError(
                    f"{folder} holds this sweep already: resume it (resume=True, --resume), or "
                    "choose another folder."
                )
        elif any(not file.match(f"{MANIFEST}.*.part") for file in folder.glob("*")):
            raise ValueError(f"{folder} holds other files: choose a new folder.")
        with writing(folder / MANIFEST) as part:  # first: from here on the folder can be resumed
            folder.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(asdict(self) | {"source": source}, indent=1))
        with writing(folder / TOKENS) as part:
            for name in ("shards", "vectors") if self.vectors else ("shards",):
                (folder / name).mkdir(exist_ok=True)
            for left_over in [*folder.glob("*.part"), *folder.glob("*/*.part")]:
                if _abandoned(left_over):
                    left_over.unlink()
            pq.write_table(
                pa.table({"token_id": range(len(labels)), "token": labels}),
                part,
                write_page_checksum=True,
            )

    def digest(self, shard: Shard) -> bytes:
        """What a shard must be of, to be this sweep's."""
        of = asdict(self) | {"source": None}
        return hashlib.sha256(json.dumps([of, shard.name]).encode()).hexdigest().encode()

    def path(self, folder: Path, shard: Shard) -> Path:
        return folder / "shards" / f"{shard.name}.parquet"

    def vectors_path(self, folder: Path, shard: Shard) -> Path:
        return folder / "vectors" / f"{shard.name}.safetensors"

    def fault(self, folder: Path, shard: Shard) -> str | None:
        """What is wrong with a shard on disk, if anything: all of it is read, with checksums."""
        path = self.path(folder, shard)
        if not path.is_file():
            return "is missing"
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                rows, schema = file.metadata.num_rows, file.schema_arrow
                # what is added after the first rows stands with the file's, not with the schema's
                metadata = (schema.metadata or {}) | (file.metadata.metadata or {})
                for group in range(file.num_row_groups):
                    file.read_row_group(group)
            if self.vectors:
                vectors = self.vectors_path(folder, shard)
                with safe_open(vectors, "pt") as tensors:
                    tensors.get_slice("vectors")
                if metadata.get(VECTORS) != checksum(vectors):
                    return f"is damaged (the checksum of {vectors} is another)"
        except (pa.ArrowException, OSError, SafetensorError) as error:
            return f"is damaged ({' '.join(str(error).split())[:80]})"
        if not schema.equals(SCHEMA):
            return "is damaged (it has other columns)"
        if metadata.get(OF) != self.digest(shard):
            return "is another sweep's, or another shard"
        expected = (shard.stop - shard.start) * self.k
        return None if rows == expected else f"has {rows} rows, not {expected}"


def checksum(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().encode()


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` at the end, if nothing went wrong.

    Raises:
        ValueError: if it cannot be written.
    """
    part = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"Cannot write {path}: {why}. What is whole there stays: make room "
            "or choose another folder, and resume."
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


def _abandoned(part: Path) -> bool:
    """Whether the process that wrote a temporary file is gone; of other machines we cannot know."""
    *_, process, _ = part.name.split(".")
    if f".{socket.gethostname()}.{process}.part" not in part.name or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, and is somebody else's
        return False
    return int(process) == os.getpid()


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]}..."
