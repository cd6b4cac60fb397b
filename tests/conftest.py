"""What several test files share."""

from collections.abc import Iterator

import jaxtyping
import pytest


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
