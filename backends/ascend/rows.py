"""A batch in the vendor's terms: prefix sums without a leading 0, lengths, a block table that can be followed anywhere."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsa_portable.arrays import beside, on_host, to_numpy
from dsa_portable.batch import Batch


class Requests(NamedTuple):
    """Of the vendor's requests: where query rows end, where keys end (TND) or how many there are (PA_BSND), and the pages."""

    layout: str
    query_ends: torch.Tensor
    keys: torch.Tensor
    block_table: torch.Tensor | None


def requests_of(batch: Batch, q: torch.Tensor, places: int) -> Requests:
    """The requests over `places` flat keys or pages.

    TND knows neither padding rows nor gaps between keys: both become requests of their own, of rows without keys and of keys
    without rows, unless host lengths show that there are none. Nothing is read from the device.
    """
    cu_seqlens_q, seqlens_k = (beside(array, q).contiguous() for array in (batch.cu_seqlens_q, batch.seqlens_k))
    ends = cu_seqlens_q[1:]
    rows = ends.new_full((1,), len(q))
    if batch.block_table is not None:
        page_size = int(batch.page_size or 0)
        pages = torch.arange(batch.block_table.shape[1], dtype=torch.int32, device=q.device)
        needed = (seqlens_k + (page_size - 1)) // page_size
        # What stands behind a request's pages may be anything, and the vendor may fetch ahead.
        table = torch.where(pages[None, :] < needed[:, None], beside(batch.block_table, q), 0)
        if _no_padding(batch, len(q)):
            return Requests("PA_BSND", ends, seqlens_k, table)
        none = torch.zeros_like(rows)
        no_pages = table.new_zeros((1, table.shape[1]))
        return Requests("PA_BSND", _joined(ends, rows), _joined(seqlens_k, none), _joined(table, no_pages))
    starts = beside(batch.cu_seqlens_k, q).contiguous()
    if _no_padding(batch, len(q)) and _no_gaps(batch, places):
        return Requests("TND", ends, starts[1:], None)
    key_ends = _joined((starts[:-1] + seqlens_k)[:, None], starts[1:, None], dim=1).reshape(-1)
    query_ends = _joined(ends[:, None], ends[:, None], dim=1).reshape(-1)
    return Requests("TND", _joined(query_ends, rows), _joined(key_ends, ends.new_full((1,), places)), None)


def _joined(first: torch.Tensor, second: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return torch.cat([first, second], dim=dim)


def _no_padding(batch: Batch, rows: int) -> bool:
    return on_host(batch.cu_seqlens_q) and int(to_numpy(batch.cu_seqlens_q)[-1]) == rows


def _no_gaps(batch: Batch, places: int) -> bool:
    if batch.cu_seqlens_k is None or not (on_host(batch.seqlens_k) and on_host(batch.cu_seqlens_k)):
        return False
    starts, lengths = to_numpy(batch.cu_seqlens_k), to_numpy(batch.seqlens_k)
    return bool((starts[1:] - starts[:-1] == lengths).all()) and int(starts[-1]) == places


def slots_of(batch: Batch, indices: torch.Tensor) -> torch.Tensor:
    """int32 [Tq, topk], places in the flat form of the keys; -1 for what names no key of the row's request."""
    found: torch.Tensor = batch.to_flat(indices) if batch.block_table is None else batch.to_slots(indices)
    return found
