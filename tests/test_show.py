"""`dsa-portable show`: what is kept of a failure, told again from the file."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsa_portable.conformance.execute import arrays_file
from dsa_portable.conformance.report.show import ArtefactError, show

ATTEND, INDEX = "attend-bf16-decode-lse", "index-e4m3-f32-f32-decode-out"


def kept(folder: Path, case: str, **arrays: object) -> Path:
    """A file as a run leaves one; `__` stands for the dot in names, `_0_` for the first call of several."""
    path = folder / "failed" / f"{case}.npz"
    path.parent.mkdir(exist_ok=True)
    named = {name.replace("_0_", "0.").replace("__", "."): np.asarray(array) for name, array in arrays.items()}
    arrays_file.save(path, {"inputs.q": np.zeros((2, 1), ml_dtypes.bfloat16), **named})
    return path


def test_elements_outside_their_bounds_are_named_with_expected_and_got(tmp_path: Path) -> None:
    out = np.array([[[0, 0]], [[1, 3]]], ml_dtypes.bfloat16)
    judged = {"judged__row": 1, "judged__true_out": [[1.0, 2.0]], "judged__bound": [[0.25, 0.5]]}
    path = kept(tmp_path, ATTEND, outputs__out=out, **judged)
    text = show(path)
    assert f"case    {ATTEND}\n" in text
    assert "  inputs.q         bfloat16  [2, 1]\n" in text
    assert "  outputs.out[1]: 1 of 2 outside its bound\n    [0, 1]  got 3, expected 2 within 0.5\n" in text
    assert "there is no report.json" in text
    load = "from dsa_portable.conformance.execute import arrays_file\n  " + f"arrays = arrays_file.load({str(path)!r})\n"
    assert load in text


def test_without_bounds_the_truth_is_compared_in_the_dtype_of_the_output(tmp_path: Path) -> None:
    out = np.array([[[1 / 3, np.nan, 5]]], ml_dtypes.bfloat16)
    text = show(kept(tmp_path, ATTEND, outputs__out=out, judged__row=0, judged__true_out=[[1 / 3, 2.0, 5.0]]))
    assert "1 of 3 not the truth, rounded to its dtype\n    [0, 1]  got nan, expected 2\n" in text


def test_of_several_calls_the_one_that_failed_is_shown(tmp_path: Path) -> None:
    arrays = {"judged__row": 0, "judged__call": 0, "judged__true_lse": [1.0], "judged__bound": [0.1]}
    text = show(kept(tmp_path, ATTEND, _0_outputs__lse=np.float32([[2.0]]), **arrays))
    assert "outputs.lse[0]: 1 of 1 outside its bound\n    [0]  got 2, expected 1 within 0.1\n" in text


def test_a_selection_names_what_was_left_out_and_what_was_chosen(tmp_path: Path) -> None:
    """Positions count from the row's first visible one."""
    arrays = {"judged__first_position": 100, "judged__true_scores": [5.0, 1.0, 4.0, 3.0], "judged__bound": [0.1] * 4}
    text = show(kept(tmp_path, INDEX, outputs__indices=np.int32([[100, 103, -1]]), judged__row=0, **arrays))
    assert "outputs.indices[0]: 1 left out\n    position 102  true score 4\n" in text
    assert "outputs.indices[0]: 1 chosen for them\n    position 103  true score 3\n" in text


def test_a_failure_without_a_row_says_so(tmp_path: Path) -> None:
    assert "differences\n  none: no row was compared with a truth" in show(kept(tmp_path, INDEX))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", None])
def test_what_is_no_such_file_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.npz"
    if content is None:
        np.savez(path, a=np.zeros(3))
    else:
        path.write_bytes(content)
    with pytest.raises(ArtefactError, match="is not what a run kept of a failed case; pass failed/ID") as refusal:
        show(path)
    assert "\n" not in str(refusal.value)
