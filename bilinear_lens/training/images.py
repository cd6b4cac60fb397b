"""Labelled images: digits that ship with the package, idx files, folders, and `datasets`."""

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from datasets import ClassLabel, Dataset, Image, Value, load_dataset
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

HUB_NAMES = {"mnist": "ylecun/mnist", "fashion-mnist": "zalando-datasets/fashion_mnist"}
N_DIGITS_TRAIN = 1437
_IDX_PREFIXES = {"train": "train", "test": "t10k"}
_IDX_UNSIGNED_BYTE = 0x08


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images from 0 to 1, and their classes."""

    images: Float[Tensor, "n channels height width"]
    labels: Int[Tensor, " n"]
    names: tuple[str, ...]
    """The classes, by number."""

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.images.shape[1:]))
        return f"LabelledImages({len(self)} of {shape}, classes {', '.join(self.names)})"


def load_images(
    source: str | Path | Dataset = "digits",
    split: str = "train",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
) -> LabelledImages:
    """Labelled images, grey or RGB, all of one size.

    Args:
        source: "digits" (8 x 8, ships with the package); a folder with the four idx files of MNIST
            or Fashion-MNIST, plain or .gz; a folder of images in a folder for each class; a
            `datasets.Dataset`, whole, whatever `split` says; or the name of one, for which alone
            the network is used: "mnist", "fashion-mnist", "ylecun/mnist", ...
        split: "train", "test", or what the dataset calls its parts.
        image_column: where a dataset has several columns of images.
        label_column: likewise of classes. A column of strings or integers that names no classes
            is numbered in the order of what is found in it.

    Raises:
        ValueError: if the source or split is unknown, a file is cut short or no idx file, images
            cannot be read or differ in size, or there are no labels.
    """
    if isinstance(source, Dataset):
        return _from_dataset(source, image_column, label_column)
    if not isinstance(source, str | Path):
        raise ValueError(
            f"Cannot load images from a {type(source).__name__}: give a datasets.Dataset, such as "
            f"one part of a DatasetDict, source[{split!r}]; or a name or folder."
        )
    if source == "digits":
        return _digits(split)
    folder = Path(source)
    if folder.is_dir() and list(folder.glob("*-idx?-ubyte*")):
        return _from_idx(folder, split)
    try:
        if folder.is_dir():
            dataset = load_dataset("imagefolder", data_dir=str(folder), split=split)
        elif isinstance(source, Path) or folder.suffix or str(source).startswith((".", "/", "~")):
            raise ValueError("there is no such folder")
        else:
            dataset = load_dataset(HUB_NAMES.get(source, source), split=split)
    except Exception as error:  # the library raises a dozen kinds
        reason = str(error).rstrip(".")
        raise ValueError(
            f'Cannot load the images {str(source)!r}, split {split!r}: {reason}. Give "digits", a '
            "folder with idx files or a folder of images for each class, or a dataset's name."
        ) from error
    return _from_dataset(dataset, image_column, label_column)


def _digits(split: str) -> LabelledImages:
    _check_split(split)
    file = files("bilinear_lens.training") / "digits" / "digits.csv.gz"
    text = gzip.decompress(file.read_bytes()).decode()
    rows = torch.tensor([[int(value) for value in row.split(",")] for row in text.split()])
    rows = rows[:N_DIGITS_TRAIN] if split == "train" else rows[N_DIGITS_TRAIN:]
    images = rows[:, :-1].view(-1, 1, 8, 8).float() / 16
    return LabelledImages(images, rows[:, -1], tuple("0123456789"))


def _from_idx(folder: Path, split: str) -> LabelledImages:
    _check_split(split)
    images = read_idx(_idx_file(folder, f"{_IDX_PREFIXES[split]}-images-idx3-ubyte"), axes=3)
    labels = read_idx(_idx_file(folder, f"{_IDX_PREFIXES[split]}-labels-idx1-ubyte"), axes=1).long()
    if len(images) != len(labels):
        raise ValueError(f"{folder} has {len(images)} images but {len(labels)} labels: {split}.")
    if not len(images):
        raise ValueError(f"{folder} has no images: {split}.")
    n_classes = int(labels.max()) + 1
    return LabelledImages(images[:, None].float() / 255, labels, tuple(map(str, range(n_classes))))


def _idx_file(folder: Path, name: str) -> Path:
    found = [file for file in (folder / name, folder / f"{name}.gz") if file.exists()]
    if not found:
        raise ValueError(f"{folder} has no {name} or {name}.gz.")
    return found[0]


def read_idx(file: str | Path, *, axes: int) -> Tensor:
    """The bytes of an idx file, the format of MNIST, plain or gzip.

    Args:
        axes: how many the file must have: 3 for images, 1 for labels.

    Raises:
        ValueError: if the file is cut short, goes on too long, or has another magic number.
    """
    file = Path(file)
    try:
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"Cannot read {file}: {error}: fetch it again.") from error
    magic = bytes([0, 0, _IDX_UNSIGNED_BYTE, axes])
    if raw[:4] != magic:
        raise ValueError(
            f"{file} begins with {raw[:4].hex() or 'nothing'}, not with {magic.hex()}: it is no "
            f"idx file of bytes with {axes} axes."
        )
    head = 4 + 4 * axes
    shape = struct.unpack(f">{axes}I", raw[4:head]) if len(raw) >= head else ()
    if not shape or len(raw) != head + math.prod(shape):
        raise ValueError(
            f"{file} has {len(raw)} bytes; its header {list(shape)} asks for "
            f"{head + math.prod(shape) if shape else head}: it is cut short or damaged, fetch it "
            "again."
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy())


def _check_split(split: str) -> None:
    if split not in _IDX_PREFIXES:
        raise ValueError(f'split={split!r} must be "train" or "test".')


def _from_dataset(
    dataset: Dataset, image_column: str | None, label_column: str | None
) -> LabelledImages:
    image_column = _column(dataset, Image, image_column, "images", "image_column")
    label_column = _column(dataset, ClassLabel, label_column, "labels", "label_column")
    if not len(dataset):
        raise ValueError("The dataset has no images.")
    dataset = dataset.with_format(None)
    labels, names = _labels(dataset, label_column)
    images = []
    try:
        for image in tqdm(dataset[image_column], desc="Reading images", unit="image"):
            images.append(_pixels(image))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three
        raise ValueError(
            f"Cannot read image {len(images)} of column {image_column!r}: {error}"
        ) from error
    _check_sizes(images)
    return LabelledImages(torch.from_numpy(np.stack(images)).float() / 255, labels, names)


def _labels(dataset: Dataset, column: str) -> tuple[Int[Tensor, " n"], tuple[str, ...]]:
    """The number of each image's class, and the classes' names."""
    feature, labels = dataset.features[column], list(dataset[column])
    is_class = isinstance(feature, ClassLabel)
    kinds = ("int", "uint", "bool", "string", "large_string")
    if not is_class and not (isinstance(feature, Value) and feature.dtype.startswith(kinds)):
        raise ValueError(
            f"Column {column!r} holds {feature}: labels are a ClassLabel, strings or integers."
        )
    if None in labels or (is_class and min(labels) < 0):
        raise ValueError(
            f"The dataset has images without a label (column {column!r}): remove them with "
            "dataset.filter."
        )
    if is_class:
        return torch.tensor(labels), tuple(feature.names)
    numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
    return torch.tensor([numbers[label] for label in labels]), tuple(map(str, numbers))


def _column(dataset: Dataset, kind: type, given: str | None, what: str, argument: str) -> str:
    """The column of a kind, or the one that was named."""
    columns = list(dataset.column_names)
    if given is not None:
        if given not in columns:
            raise ValueError(f"The dataset has no column {given!r}; it has {columns}.")
        return given
    found = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise ValueError(
            f"The dataset has {len(found)} columns of {what} ({found}) among {columns}: name one "
            f"as {argument}."
        )
    return found[0]


def _pixels(image) -> np.ndarray:
    """A picture as bytes `[channels, height, width]`."""
    if not isinstance(image, PIL.Image.Image):
        raise ValueError(
            f"It is a {type(image).__name__}, not a picture: cast the column to datasets.Image(), "
            "and remove rows without one."
        )
    if image.mode not in ("1", "L", "P", "RGB", "RGBA"):
        raise ValueError(
            f"An image has mode {image.mode!r}: convert it to 8-bit grey (L) or RGB first"
        )
    grey = image.mode in ("1", "L")
    pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def _check_sizes(images: Sequence[np.ndarray]) -> None:
    shapes = sorted({image.shape for image in images})
    if len(shapes) != 1:
        raise ValueError(
            f"The images have {len(shapes)} sizes, such as {shapes[:3]} (channels, height, width): "
            "resize and convert them to one."
        )


def read_image(file: str | Path, input_shape: Sequence[int]) -> Float[Tensor, "c h w"]:
    """A picture file (png, jpg, ...) as a model's input.

    Raises:
        ValueError: if there is no such file, it is no picture, or the model takes another size or
            other channels.
    """
    try:
        with PIL.Image.open(file) as image:
            pixels = _pixels(PIL.ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read {file} as a picture: {error}.") from error
    if pixels.shape != tuple(input_shape):
        raise ValueError(
            f"{file} is {list(pixels.shape)} (channels, height, width); the model takes "
            f"{list(input_shape)}: resize or convert it first."
        )
    return torch.from_numpy(pixels.copy()).float() / 255
