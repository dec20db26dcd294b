"""What arrays.py promises for NumPy; tests/torch/test_torch_arrays.py has the torch half."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from dsa_portable import arrays


@pytest.mark.parametrize("name", arrays.NUMPY_DTYPES)
def test_every_dtype_goes_by_the_contracts_name(name: str) -> None:
    array = np.zeros((2, 3), arrays.NUMPY_DTYPES[name])
    assert arrays.dtype_name(array) == name
    assert arrays.describe(array) == f"{name} [2, 3] on cpu"
    assert arrays.cast(np.ones(2, np.float32), name).dtype == arrays.NUMPY_DTYPES[name]


def test_another_byte_order_is_another_dtype() -> None:
    """Kernels read bytes: what NumPy calls float32 in the other order must not pass as float32."""
    swapped = np.zeros(2, np.dtype(np.float32).newbyteorder("S"))
    assert swapped.dtype.name == "float32"
    assert arrays.dtype_name(swapped) != "float32"


@pytest.mark.parametrize("value", [[1, 2], 3, 2.5, np.float32(1), None, "cpu", (np.zeros(2),)])
def test_what_is_no_array(value: object) -> None:
    assert not arrays.is_array(value)
    assert arrays.as_kind(value, "torch") is value
    assert arrays.describe(value).startswith(type(value).__name__)


def test_numpy_arrays_live_on_the_host() -> None:
    array = np.zeros(2)
    assert arrays.is_array(array)
    assert (arrays.kind(array), arrays.device_name(array), arrays.device_of(array)) == ("numpy", "cpu", "cpu")
    assert arrays.on_host(array)
    assert arrays.namespace(array) is np
    assert not arrays.is_torch(array)


def test_descriptions_stay_short() -> None:
    assert len(arrays.describe(list(range(10**6)))) < 80


@pytest.mark.parametrize(
    "helper", [arrays.to_numpy, lambda a: arrays.as_kind(a, "numpy"), lambda a: arrays.beside(a, np.zeros(0))]
)
def test_the_same_memory(helper: Any) -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)[:, ::2]
    assert np.shares_memory(helper(array), array)
    assert helper(array).tolist() == [[0, 2], [3, 5]]


@pytest.mark.parametrize(
    ("value", "integer"),
    [(3, 3), (-1, -1), (np.int64(3), 3), (np.uint8(3), 3), (2**70, 2**70)]
    + [(v, None) for v in (True, np.True_, 3.0, np.float32(3), "3", None, np.array(3), np.array([3]), [3])],
)
def test_as_int(value: object, integer: int | None) -> None:
    found = arrays.as_int(value)
    assert found == integer
    assert type(found) is type(integer)


def test_row_numbers() -> None:
    rows = arrays.row_numbers(3, np.zeros(1))
    assert rows.tolist() == [0, 1, 2]
    assert rows.dtype == np.int32


def test_without_torch_a_tensor_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert not arrays.is_torch(np.zeros(2))
    with pytest.raises(ImportError, match="torch"):
        arrays.from_numpy(np.zeros(2))
