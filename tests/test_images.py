"""Labelled images: the digits, idx files, datasets, folders; and files that are none of these."""

import gzip
import struct
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

import bilinear_lens as bl
from bilinear_lens.models.checkpoints import built_in
from bilinear_lens.training.images import N_DIGITS_TRAIN, read_idx, read_image

DATA = Path(__file__).parents[2] / "shared" / "data"
HEIGHT, WIDTH = 3, 5


def fault(call, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ---- digits


def test_digits_are_split_into_two_parts_that_make_up_the_file():
    train, test = bl.load_images(), bl.load_images("digits", "test")
    assert (len(train), len(test)) == (N_DIGITS_TRAIN, 360)
    text = gzip.decompress((files("bilinear_lens.training") / "digits/digits.csv.gz").read_bytes())
    rows = np.array([row.split(",") for row in text.decode().split()], dtype=int)
    images = torch.cat([train.images, test.images])
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    np.testing.assert_array_equal(images.flatten(1).numpy() * 16, rows[:, :-1])
    np.testing.assert_array_equal(torch.cat([train.labels, test.labels]).numpy(), rows[:, -1])
    assert (images.min(), images.max()) == (0, 1)
    known = {image.numpy().tobytes() for image in train.images}
    assert len(known) == N_DIGITS_TRAIN
    assert not any(image.numpy().tobytes() in known for image in test.images)


def test_digits_show_their_labels():
    """A zero has a hole where a one has its stroke."""
    train = bl.load_images()
    assert train.names == tuple("0123456789") and train.labels.dtype == torch.int64
    counts = torch.bincount(train.labels)
    assert len(counts) == 10 and counts.min() > 130
    zero, one = (train.images[train.labels == digit].mean(0)[0] for digit in (0, 1))
    assert zero[3:5, 3:5].max() < 0.3 < 0.6 < one[3:5, 3:5].min()
    assert repr(train) == "LabelledImages(1437 of 1 x 8 x 8, classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)"


# ---- idx files


def idx(values: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


def write_idx(folder: Path, *, n: int = 7, n_labels: int = 7, gz: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, prefix in enumerate(("train", "t10k")):
        for name, values in (
            ("images-idx3", pixels(seed, n, HEIGHT, WIDTH)),
            ("labels-idx1", np.arange(n_labels, dtype=np.uint8) % 3),
        ):
            raw = idx(values)
            file = folder / f"{prefix}-{name}-ubyte{'.gz' if gz else ''}"
            file.write_bytes(gzip.compress(raw) if gz else raw)
    return folder


@pytest.mark.parametrize("gz", [False, True])
def test_idx_files_plain_and_compressed(gz, tmp_path):
    folder = write_idx(tmp_path, gz=gz)
    for seed, split in enumerate(("train", "test")):
        images = bl.load_images(folder, split)
        expected = torch.from_numpy(pixels(seed, 7, HEIGHT, WIDTH))[:, None]
        assert torch.equal(images.images * 255, expected.float())
        assert images.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert images.names == ("0", "1", "2")
    assert torch.equal(bl.load_images(str(folder)).images, bl.load_images(folder).images)


def test_idx_files_that_are_damaged_are_named(tmp_path):
    file = write_idx(tmp_path) / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    cases = {
        "has 100 bytes; its header [7, 3, 5] asks for 121: it is cut short": whole[:100],
        "has 10 bytes; its header [] asks for 16": whole[:10],
        "has 122 bytes; its header [7, 3, 5] asks for 121": whole + b"\0",
        "begins with nothing, not with 00000803": b"",
        "begins with 00000801, not with 00000803": idx(np.arange(7, dtype=np.uint8)),
        "begins with 00000d03": b"\0\0\x0d\x03" + whole[4:],
        "begins with 1f8b0800": gzip.compress(whole, mtime=0),
    }
    for expected, raw in cases.items():
        file.write_bytes(raw)
        message = fault(lambda: bl.load_images(tmp_path))
        assert expected in message and str(file) in message
    file.write_bytes(whole)
    assert len(bl.load_images(tmp_path)) == 7


def test_compressed_idx_files_that_are_damaged_are_named(tmp_path):
    file = write_idx(tmp_path, gz=True) / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    flipped, wrong_sum = bytearray(whole), bytearray(whole)
    flipped[12] ^= 255
    wrong_sum[-6] ^= 255
    for raw in (whole[:50], whole[:3], bytes(flipped), bytes(wrong_sum), b"no gzip", whole + b"x"):
        file.write_bytes(raw)
        message = fault(lambda: bl.load_images(tmp_path))
        assert f"Cannot read {file}" in message and "fetch it again" in message
    file.write_bytes(gzip.compress(gzip.decompress(whole)[:-5]))
    assert "cut short" in fault(lambda: bl.load_images(tmp_path))


def test_idx_folders_that_do_not_fit_are_named(tmp_path):
    uneven = write_idx(tmp_path / "uneven", n_labels=5)
    assert "7 images but 5 labels" in fault(lambda: bl.load_images(uneven))
    empty = write_idx(tmp_path / "empty", n=0, n_labels=0)
    assert "no images" in fault(lambda: bl.load_images(empty))
    folder = write_idx(tmp_path / "folder")
    (folder / "t10k-labels-idx1-ubyte").unlink()
    message = fault(lambda: bl.load_images(folder, "test"))
    assert "has no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz" in message
    assert len(bl.load_images(folder)) == 7
    assert "Cannot read" in fault(lambda: read_idx(tmp_path / "nothing", axes=1))


@pytest.mark.parametrize("split", ["validation", "", "Train"])
def test_unknown_splits_are_named(split, tmp_path):
    for source in ("digits", write_idx(tmp_path)):
        message = fault(lambda source=source: bl.load_images(source, split))
        assert f"split={split!r}" in message and '"train" or "test"' in message


@pytest.mark.skipif(not (DATA / "mnist").is_dir(), reason="needs shared/data/mnist beside the repo")
def test_the_built_in_classifier_is_as_good_as_its_card():
    test = bl.load_images(DATA / "mnist", "test")
    accuracy = bl.HookedBilinearClassifier.from_pretrained("mnist-1l").accuracy(
        test.images, test.labels
    )
    card = (built_in("mnist-1l") / "README.md").read_text()
    assert f"test split: {accuracy:.4f}" in card.replace("\n", " ")


@pytest.mark.skipif(not (DATA / "mnist").is_dir(), reason="needs shared/data/mnist beside the repo")
def test_the_real_mnist():
    test, train = (bl.load_images(DATA / "mnist", split) for split in ("test", "train"))
    assert test.images.shape == (10_000, 1, 28, 28) and test.names == tuple("0123456789")
    assert train.images.shape == (60_000, 1, 28, 28)
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert train.images.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert train.images.std().item() == pytest.approx(0.3081, abs=1e-4)


# ---- datasets


def picture(seed: int = 0, mode: str = "L", size: Sequence[int] = (HEIGHT, WIDTH)):
    if mode == "L":
        return PIL.Image.fromarray(pixels(seed, *size))
    if mode == "I;16":
        return PIL.Image.fromarray(pixels(seed, *size).astype(np.uint16) * 200)
    return PIL.Image.fromarray(pixels(seed, *size, 3)).convert(mode)


def a_dataset(pictures: list, labels: list, feature: Any = None, **columns: Any) -> Dataset:
    feature = ClassLabel(names=["cat", "dog", "owl"]) if feature is None else feature
    features = {"image": Image(), "label": feature, **{name: f for name, (f, _) in columns.items()}}
    data = {"image": pictures, "label": labels, **{name: v for name, (_, v) in columns.items()}}
    return Dataset.from_dict(data, features=Features(features))


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P", "RGBA"])
def test_datasets_of_grey_and_coloured_pictures(mode):
    pictures = [picture(seed, mode) for seed in range(4)]
    images = bl.load_images(a_dataset(pictures, [2, 0, 0, 1]))
    grey = mode in ("L", "1")
    assert images.images.shape == (4, 1 if grey else 3, HEIGHT, WIDTH)
    assert images.labels.tolist() == [2, 0, 0, 1] and images.names == ("cat", "dog", "owl")
    for found, given in zip(images.images, pictures, strict=True):
        expected = np.asarray(given.convert("L" if grey else "RGB")) / np.float32(255)
        expected = expected[None] if grey else expected.transpose(2, 0, 1)
        np.testing.assert_array_equal(found.numpy(), expected)
    assert images.images.max() <= 1 and images.images.std() > 0.2


def test_a_palette_is_looked_up():
    """A picture's numbers are places in its palette, and no brightness."""
    image = PIL.Image.new("P", (WIDTH, HEIGHT), 1)
    image.putpalette([0, 0, 0, 255, 0, 51])
    found = bl.load_images(a_dataset([image], [0])).images
    assert found[0, :, 0, 0].tolist() == pytest.approx([1, 0, 0.2])


def test_pictures_of_several_sizes_or_depths_are_named():
    two = a_dataset([picture(), picture(size=(WIDTH, HEIGHT))], [0, 1])
    message = fault(lambda: bl.load_images(two))
    assert "2 sizes" in message and "(1, 3, 5)" in message and "(1, 5, 3)" in message
    mixed = a_dataset([picture(), picture(mode="RGB")], [0, 1])
    assert "(3, 3, 5)" in fault(lambda: bl.load_images(mixed))
    deep = a_dataset([picture(), picture(mode="I;16")], [0, 1])
    message = fault(lambda: bl.load_images(deep))
    assert "image 1 of column 'image'" in message and "'I;16'" in message and "grey" in message


def test_columns_may_be_named_and_must_be_where_there_are_several():
    pictures, labels = [picture(0), picture(1)], [0, 1]
    other = [picture(2), picture(3)]
    plain = a_dataset(pictures, labels)
    two = a_dataset(pictures, labels, mask=(Image(), other))
    message = fault(lambda: bl.load_images(two))
    assert "2 columns of images (['image', 'mask'])" in message and "as image_column" in message
    images = bl.load_images(two, image_column="image")
    assert torch.equal(images.images, bl.load_images(plain).images)
    assert not torch.equal(images.images, bl.load_images(two, image_column="mask").images)
    fine = a_dataset(pictures, labels, fine=(ClassLabel(names=["a", "b"]), [1, 0]))
    message = fault(lambda: bl.load_images(fine))
    assert "2 columns of labels (['label', 'fine'])" in message and "as label_column" in message
    assert bl.load_images(fine, label_column="fine").labels.tolist() == [1, 0]
    without = plain.remove_columns("label")
    assert "0 columns of labels ([])" in fault(lambda: bl.load_images(without))
    assert "0 columns of images" in fault(lambda: bl.load_images(plain.remove_columns("image")))
    for name in ("image_column", "label_column"):
        kwargs: Any = {name: "colour"}
        message = fault(lambda kwargs=kwargs: bl.load_images(plain, **kwargs))
        assert "no column 'colour'" in message and "['image', 'label']" in message


@pytest.mark.parametrize(
    ("labels", "kind", "numbers", "names"),
    [
        (["owl", "cat", "owl"], "string", [1, 0, 1], ("cat", "owl")),
        (["owl", "cat", "owl"], "large_string", [1, 0, 1], ("cat", "owl")),
        ([9, 10, 2], "int64", [1, 2, 0], ("2", "9", "10")),
        ([True, False, True], "bool", [1, 0, 1], ("False", "True")),
    ],
)
def test_labels_that_name_no_classes_are_numbered_in_order(labels, kind, numbers, names):
    dataset = a_dataset([picture(seed) for seed in range(3)], labels, Value(kind))
    assert "0 columns of labels" in fault(lambda: bl.load_images(dataset))
    images = bl.load_images(dataset, label_column="label")
    assert images.labels.tolist() == numbers and images.names == names


def test_pictures_without_a_label_are_named():
    pictures = [picture(0), picture(1)]
    for labels, feature in (([0, -1], None), ([0, None], None), (["a", None], Value("string"))):
        dataset = a_dataset(pictures, labels, feature)
        message = fault(lambda dataset=dataset: bl.load_images(dataset, label_column="label"))
        assert "without a label (column 'label')" in message and "filter" in message
    floats = a_dataset(pictures, [0.5, 1.0], Value("float32"))
    message = fault(lambda: bl.load_images(floats, label_column="label"))
    assert "float32" in message and "strings or integers" in message


def test_pictures_that_are_missing_damaged_or_none_are_named():
    message = fault(lambda: bl.load_images(a_dataset([picture(), None], [0, 1])))
    assert "image 1 of column 'image'" in message and "NoneType" in message
    plain = a_dataset([picture(), picture(1)], [0, 1])
    raw = plain.cast_column("image", Image(decode=False))
    message = fault(lambda: bl.load_images(raw))
    assert "dict, not a picture" in message and "datasets.Image()" in message
    png = raw[0]["image"]["bytes"]
    for damaged in (png[:60], b"nonsense"):
        dataset = a_dataset([{"bytes": png}, {"bytes": damaged}], [0, 1])
        message = fault(lambda dataset=dataset: bl.load_images(dataset))
        assert "Cannot read image 1" in message
    text = a_dataset([picture()], [0], name=(Value("string"), ["a.png"]))
    message = fault(lambda: bl.load_images(text, image_column="name"))
    assert "str, not a picture" in message
    empty = plain.select([])
    assert "no images" in fault(lambda: bl.load_images(empty))


def test_a_datasets_format_and_selection_do_not_matter():
    plain = a_dataset([picture(seed) for seed in range(3)], [0, 1, 2])
    expected = bl.load_images(plain)
    for formatted in (plain.with_format("torch"), plain.with_format("numpy")):
        images = bl.load_images(formatted)
        assert torch.equal(images.images, expected.images)
        assert torch.equal(images.labels, expected.labels)
        assert formatted.format["type"] in ("torch", "numpy")  # the caller's own is left alone
    assert torch.equal(bl.load_images(plain.select([2, 0])).images, expected.images[[2, 0]])


def test_sources_of_another_kind_are_named(as_users):
    plain = a_dataset([picture()], [0])
    both: Any = DatasetDict({"train": plain, "test": plain})
    message = fault(lambda: bl.load_images(both, "test"))
    assert "DatasetDict" in message and "source['test']" in message
    number: Any = 5
    assert "int" in fault(lambda: bl.load_images(number))


# ---- folders and names


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """So that nothing is left in the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def save_picture(file: Path, seed: int = 0, **kwargs: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, **kwargs).save(file)
    return file


def test_a_folder_of_pictures_for_each_class(tmp_path, own_cache):
    folder = tmp_path / "animals"
    for seed, name in enumerate(("cat/1.png", "cat/2.png", "owl/1.png", "dog/1.png")):
        save_picture(folder / name, seed)
    for source in (folder, str(folder)):
        images = bl.load_images(source)
        assert images.names == ("cat", "dog", "owl") and images.labels.tolist() == [0, 0, 1, 2]
        expected = torch.from_numpy(np.stack([pixels(i, HEIGHT, WIDTH) for i in (0, 1, 3, 2)]))
        assert torch.equal(images.images[:, 0] * 255, expected.float())
    save_picture(folder / "owl" / "2.png", 5)
    assert len(bl.load_images(folder)) == 5
    message = fault(lambda: bl.load_images(folder, "test"))
    assert "split 'test'" in message and str(folder) in message
    (folder / "owl" / "3.png").write_bytes(b"no picture")
    message = fault(lambda: bl.load_images(folder))
    assert "Cannot read image 5" in message and "3.png" in message


def test_a_folder_with_a_folder_for_each_split(tmp_path, own_cache):
    for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/a/2.png", "test/b/1.png"):
        save_picture(tmp_path / "both" / name)
    assert len(bl.load_images(tmp_path / "both")) == 2
    assert bl.load_images(tmp_path / "both", "test").labels.tolist() == [0, 0, 1]


def test_folders_that_are_empty_or_not_there(tmp_path, own_cache):
    (tmp_path / "empty").mkdir()
    missing = tmp_path / "nothing"
    for source in (tmp_path / "empty", missing, str(missing), "./nothing", "archive.zip"):
        message = fault(lambda source=source: bl.load_images(source))
        assert repr(str(source)) in message and "a folder with idx files" in message
    assert "no such folder" in fault(lambda: bl.load_images(missing))


@pytest.mark.parametrize("name", ["nobody/nothing", "mnist"])
def test_a_dataset_that_is_not_here_without_a_network(name, own_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = fault(lambda: bl.load_images(name))
    assert f"Cannot load the images {name!r}" in message and '"digits"' in message


# ---- a single picture


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_picture_file_becomes_a_models_input(mode, tmp_path):
    file = save_picture(tmp_path / "one.png", mode=mode)
    shape = (1 if mode == "L" else 3, HEIGHT, WIDTH)
    image = read_image(file, shape)
    expected = bl.load_images(a_dataset([picture(mode=mode)], [0])).images[0]
    assert image.dtype == torch.float32 and torch.equal(image, expected)
    model = bl.HookedBilinearClassifier.from_config(input_shape=shape, n_classes=2, d_model=7)
    assert model(image).shape == (2,)
    assert torch.equal(read_image(str(file), list(shape)), image)


def test_a_picture_is_turned_as_its_file_says(tmp_path):
    """As in datasets, which turn pictures when they are decoded."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture().save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png", (1, WIDTH, HEIGHT))
    upright = torch.from_numpy(pixels(0, HEIGHT, WIDTH)).float() / 255
    assert torch.equal(image[0], upright.rot90(-1))
    raw = (tmp_path / "turned.png").read_bytes()
    images = bl.load_images(a_dataset([{"bytes": raw}], [0]))
    assert torch.equal(images.images[0], image)


def test_picture_files_that_do_not_fit_are_named(tmp_path):
    file = save_picture(tmp_path / "one.png")
    message = fault(lambda: read_image(file, (1, 28, 28)))
    assert str(file) in message and "[1, 3, 5]" in message and "[1, 28, 28]" in message
    assert "[3, 3, 5]" in fault(lambda: read_image(file, (3, 3, 5)))
    assert "[15]" in fault(lambda: read_image(file, (15,)))
    whole = file.read_bytes()
    for raw in (b"", b"nonsense", whole[: len(whole) // 2], whole[:40]):
        file.write_bytes(raw)
        message = fault(lambda: read_image(file, (1, 3, 5)))
        assert f"Cannot read {file} as a picture" in message
    assert "nothing.png" in fault(lambda: read_image(tmp_path / "nothing.png", (1, 3, 5)))
    assert "Cannot read" in fault(lambda: read_image(tmp_path, (1, 3, 5)))
    deep = save_picture(tmp_path / "deep.png", mode="I;16")
    assert "'I;16'" in fault(lambda: read_image(deep, (1, 3, 5)))
