"""The import line: what each part of the package may import, and a control that a breach shows."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bilinear_lens"

ALGEBRA = {"basis", "eigensolver", "kernels", "spectrum", "subspace", "tensor"}
MAY_IMPORT = {
    **dict.fromkeys(ALGEBRA, ALGEBRA),
    "models": ALGEBRA | {"models"},
    "analysis": ALGEBRA | {"models", "analysis"},
    "training": ALGEBRA | {"models", "training"},
    "views": ALGEBRA | {"views"},
    "pages": ALGEBRA | {"models", "analysis", "views"},
    "cli": ALGEBRA | {"models", "analysis", "training", "views", "pages", "cli", "__init__"},
    "__init__": ALGEBRA | {"models", "analysis", "training"},
}
"""To the left of each part; `pages` puts models, analyses and views together for `cli`."""

ONLY_IN = {
    "transformer_lens": {"models", "analysis", "training"},
    "circuitsvis": {"views"},
    "plotly": {"views"},
    "datasets": {"models.checkpoints", "training"},
    "huggingface_hub": {"models.checkpoints", "models.hub", "training"},
    "sparsify": {"training.saes"},
    "PIL": {"training.images"},
    "datatrove": {"analysis.cluster"},
    "ray": {"analysis.cluster"},
    "loguru": {"analysis.cluster"},
    "duckdb": {"analysis.search"},
    "pyarrow": {"analysis.search", "analysis.shards", "analysis.sweep"},
    "typer": {"cli"},
    "rich": {"cli"},
}
"""Libraries that stay in one place; "part.module" is one file of a part."""

ALGEBRA_MAY_USE = {"torch", "einops", "jaxtyping", "bilinear_lens"}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "core", "base", "misc"}


def imported(source: str) -> set[str]:
    """Dotted names that a module imports, wherever the statement stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def breaches(module: str, source: str) -> list[str]:
    """What is wrong with the imports of `module`, such as `models.components`."""
    part, found = module.split(".")[0], []
    for name in imported(source):
        library, *inner = name.split(".")
        if library == "bilinear_lens":
            target = inner[0] if inner else "__init__"
            if not ((PACKAGE / f"{target}.py").exists() or (PACKAGE / target).is_dir()):
                target = "__init__"  # a public name
            allowed = target in MAY_IMPORT[part]
        elif library in ONLY_IN:
            allowed = {part, module} & ONLY_IN[library]
        else:
            allowed = part not in ALGEBRA or library in ALGEBRA_MAY_USE | sys.stdlib_module_names
        if not allowed:
            found.append(f"{module} imports {name}")
    return found


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
    }


def test_no_module_crosses_the_line():
    assert [
        fault for name, path in modules().items() for fault in breaches(name, path.read_text())
    ] == []


def test_every_part_is_in_the_table():
    assert {name.split(".")[0] for name in modules()} == set(MAY_IMPORT)
    assert not {Path(name).stem for name in modules()} & FORBIDDEN_NAMES


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tensor", "import bilinear_lens.models.transformer"),
        ("tensor", "def f():\n    import pandas"),
        ("models.transformer", "from bilinear_lens.analysis import ablation"),
        ("analysis.ablation", "from bilinear_lens.training.text import pack"),
        ("training.text", "from bilinear_lens.analysis.ablation import text_windows"),
        ("views.plots", "from bilinear_lens.models.transformer import HookedBilinearTransformer"),
        ("views.plots", "import bilinear_lens as bl"),
        ("views.plots", "import transformer_lens"),
        ("analysis.ablation", "import plotly.graph_objects as go"),
        ("models.transformer", "from huggingface_hub import snapshot_download"),
        ("pages.reports", "from bilinear_lens.training.text import pack"),
        ("models.classifier", "from bilinear_lens.training.images import load_images"),
        ("analysis.masks", "from bilinear_lens.training.images import load_images"),
    ],
)
def test_a_crossing_is_seen(module, source):
    assert breaches(module, source)


def test_what_the_line_allows_is_allowed():
    assert not breaches("analysis.ablation", "from bilinear_lens.models.transformer import Token")
    assert not breaches("models.checkpoints", "from huggingface_hub import snapshot_download")
    assert not breaches(
        "tensor", "import math\nimport torch\nfrom bilinear_lens.basis import Basis"
    )
