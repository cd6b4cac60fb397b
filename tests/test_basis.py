"""Labelled directions."""

import pytest
import torch

from bilinear_lens import Basis

BASIS = Basis(torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, -3, 1], [1, 1, 1]]), ["a", " b", "c", "c"])


def test_directions_by_label_and_by_row():
    assert BASIS[" b"].tolist() == BASIS[1].tolist() == [0, 2, 0]
    smaller = BASIS[[" b", 3]]
    assert smaller.labels == [" b", "c"]
    assert smaller.directions.tolist() == [[0, 2, 0], [1, 1, 1]]
    assert len(BASIS) == 4 and "4 directions of size 3" in repr(BASIS)


def test_nearest_shows_both_ends():
    vector = torch.tensor([0.5, 1, 0])
    assert BASIS.nearest(vector, k=3) == [("c", -3.0), (" b", 2.0), ("c", 1.5)]


def test_bad_input_is_named(as_users):
    with pytest.raises(KeyError, match=r"near ones: .*' b'"):
        BASIS[" bb"]
    with pytest.raises(KeyError, match=r"give a row of \[2, 3\]"):
        BASIS["c"]
    with pytest.raises(IndexError, match="Row 4 must be between 0 and 3"):
        BASIS[4]
    with pytest.raises(ValueError, match=r"\[2, 3\] and 1 labels"):
        Basis(torch.zeros(2, 3), ["a"])
    with pytest.raises(ValueError, match="NaN"):
        Basis(torch.full((1, 3), float("nan")), ["a"])
    with pytest.raises(ValueError, match=r"needs \[3\]"):
        BASIS.nearest(torch.zeros(2))
    with pytest.raises(ValueError, match="k=5"):
        BASIS.nearest(torch.zeros(3), k=5)
