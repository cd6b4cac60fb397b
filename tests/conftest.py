"""What several test files share."""

import os
import shlex
import sys
from collections.abc import Iterator

import jaxtyping
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def model():
    """The smallest model that ships; tests leave its weights alone."""
    import bilinear_lens as bl  # not above: this file is read before type checks are installed

    return bl.HookedBilinearTransformer.from_pretrained("tinystories-1l")


@pytest.fixture
def as_users() -> Iterator[None]:
    """Without the tests' type checks, which would see a wrong shape before our own errors do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command line in a folder of its own; gives exit code, output and errors."""
    from bilinear_lens import cli

    monkeypatch.chdir(tmp_path)

    def command(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bilinear-lens", *shlex.split(line)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return command
