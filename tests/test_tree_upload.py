"""Arrays of any type come out of one buffer as they went in."""

import numpy as np
import pytest
import torch

from stars_fast.tree.upload import aligned, packed, uploaded, views

ARRAYS = [
    np.array([[1, -2, 3]], dtype=np.int32),
    np.array([True, False, True, True, False]),
    np.array([2**62, -1], dtype=np.int64),
    np.array([], dtype=np.float32),
    np.arange(6, dtype=np.float64).reshape(3, 2).T,
    np.array([np.inf, 0.1], dtype=np.float32),
]


def test_what_is_packed_is_found_again_each_at_16_bytes():
    buffer = packed(ARRAYS)
    found = views(buffer, ARRAYS)
    for array, tensor in zip(ARRAYS, found, strict=True):
        assert tensor.dtype == torch.from_numpy(array).dtype
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert (tensor.is_contiguous() and (tensor.data_ptr() - buffer.data_ptr()) % 16 == 0) or not array.size


def test_a_cpu_takes_the_arrays_themselves():
    assert [one.data_ptr() for one in uploaded(ARRAYS[:3], torch.device("cpu"))] == [a.ctypes.data for a in ARRAYS[:3]]


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.bool_])
@pytest.mark.parametrize("count", [1, 3, 5, 16, 33])
def test_every_row_of_a_table_begins_at_a_multiple_of_16_bytes(dtype, count):
    rows = [[True] * count, [False] * count, [True] * count]
    table = aligned(rows, dtype)
    assert table[:, :count].tolist() == rows and table.dtype == dtype
    column, *sent = views(packed([np.zeros(count, np.int32), table]), [np.zeros(count, np.int32), table])
    assert all((row.data_ptr() - column.data_ptr()) % 16 == 0 for row in sent[0])
