import pytest
import torch

from fastpo.precision import DTYPES, autocast, autocast_dtype


@pytest.mark.parametrize("precision", DTYPES)
def test_matrix_products_are_computed_in_the_precision(precision):
    ones = torch.ones(2, 2)
    with autocast(torch.device("cpu"), precision):
        assert (ones @ ones).dtype == DTYPES[precision]
    assert autocast_dtype(precision) == (None if precision == "fp32" else DTYPES[precision])
