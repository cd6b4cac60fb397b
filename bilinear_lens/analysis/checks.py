"""What analyses refuse: inputs that are no finite vectors, and labels that do not fit them."""

from torch import Tensor


def check_inputs(inputs: Tensor, d_in: int) -> None:
    """Refuse inputs that are not finite floats `[n, d_in]`.

    Raises:
        ValueError: if they are something else, or there are none.
    """
    if inputs.ndim != 2 or inputs.shape[1] != d_in or not len(inputs):
        raise ValueError(
            f"The inputs are {list(inputs.shape)}; give at least one as a vector, [n, {d_in}]: "
            "images.flatten(1)."
        )
    if not inputs.is_floating_point():
        raise ValueError(
            f"The inputs are {inputs.dtype}; give floats, pixels from 0 to 1: inputs.float() / 255."
        )
    if not inputs.isfinite().all():
        raise ValueError("The inputs hold NaN or infinite values: remove or repair those.")


def check_labels(labels: Tensor, n: int, n_classes: int) -> None:
    """Refuse labels that are not n class numbers.

    Raises:
        ValueError: if there are more or fewer, or one is out of range.
    """
    if labels.shape != (n,):
        raise ValueError(f"There are {n} inputs and labels {list(labels.shape)}: one for each.")
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(
            f"Labels run from {labels.min()} to {labels.max()} ({labels.dtype}); they must be "
            f"integers from 0 to {n_classes - 1}."
        )
