"""Which of a CPU's two libraries multiplies float32 matrices."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def fast_float32() -> Iterator[None]:
    """Float32 products by oneDNN instead of MKL, where oneDNN keeps float32's digits.

    MKL takes slow paths on processors that are not Intel's; oneDNN's are twice as fast there.
    PyTorch gives float32 products to oneDNN only if it may round them to bfloat16, which it does on
    processors with matrix units (AMX) and leaves be on others: hence the trial.
    """
    if not _onednn_keeps_digits():
        yield
        return
    with _onednn():
        yield


@contextmanager
def _onednn() -> Iterator[None]:
    settings = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@cache
def _onednn_keeps_digits() -> bool:
    if not torch.backends.mkldnn.is_available():  # pyright: ignore[reportAttributeAccessIssue]
        return False
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(2, 256, 256, generator=generator, dtype=torch.float32, device="cpu")
    with _onednn():
        for other in (matrices.mT, matrices[..., :16]):
            for factors in ((matrices, other), (matrices[0], other[0])):
                product, exact = (
                    torch.matmul(*factors),
                    torch.matmul(*(f.double() for f in factors)),
                )
                if (product - exact).norm() > 1e-6 * exact.norm():
                    return False
    return True
