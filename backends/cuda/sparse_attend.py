"""sparse_attend in Triton: a program per row and block of heads; the rows of decode requests are split and merged."""

from __future__ import annotations

from typing import Any

import torch

from dsa_portable.arrays import dtype_name
from dsa_portable.backends.cuda import configurations, device
from dsa_portable.backends.cuda.kernels.sparse_attend import attend_rows, merge_parts
from dsa_portable.backends.cuda.launch import launch
from dsa_portable.backends.cuda.rows import NO_PART, Rows, asking_for, deliver, find, parts_of, results_of, scratch_bytes
from dsa_portable.batch import DECODE_ROWS
from dsa_portable.formats import layout
from dsa_portable.request import AttendRequest


def sparse_attend(request: AttendRequest) -> Any:
    """Output, or (output, lse) with `return_lse`; see dsa_portable.sparse_attend."""
    q = request.q.contiguous()
    device.require(q, "sparse_attend")
    with device.of(q):
        results = results_of(request, q)
        if len(q):
            _Call(request, q, results).run()
        return deliver(request, results)


class _Call:
    """One call: what all of its launches share."""

    def __init__(self, request: AttendRequest, q: torch.Tensor, results: list[torch.Tensor]) -> None:
        self.request, self.q, self.out = request, q, results[0]
        self.lse = results[1] if request.return_lse else None
        self.heads, self.topk = request.dims["Hq"], request.dims["topk"]
        self.parts = configurations.parts(self.heads, self.topk)
        self.rows_per_request = min(DECODE_ROWS, max(1, request.batch.max_seqlen_q))
        self.constants = {"VALUE_DIM": request.value_dim, "PARTS": self.parts, "DECODE_ROWS": DECODE_ROWS}
        self.cache = parts_of("sparse_attend", "kv", request.kv, request.kv_layout)
        self.sink = None if request.attn_sink is None else request.attn_sink.contiguous()

    def run(self) -> None:
        """Whole rows, unless every request is a decode request; then, in slabs of scratch, the split ones and their merge."""
        rows = find(self.request.batch, self.q, visible=False)
        if self.parts == 1 or self.request.batch.max_seqlen_q > DECODE_ROWS:
            self._attend(rows, (None, None, None), len(self.q), 0)
        if self.parts == 1:
            return
        slots = max(1, self.request.batch.num_requests * self.rows_per_request)
        per_slot = 4 * self.parts * self.heads * (self.request.value_dim + 2)
        slab = max(1, min(slots, scratch_bytes() // per_slot))
        shape = (slab, self.parts, self.heads)
        with asking_for("sparse_attend", slab * per_slot):
            scratch = tuple(
                torch.empty(size, dtype=torch.float32, device=self.q.device)
                for size in ((*shape, self.request.value_dim), shape, shape)
            )
        for first in range(0, slots, slab):
            count = min(slab, slots - first)
            self._attend(rows, scratch, count, first)
            self._merge(rows, scratch, count, first)

    def _attend(self, rows: Rows, scratch: tuple[torch.Tensor | None, ...], count: int, first: int) -> None:
        request, architecture = self.request, device.architecture(self.q.device)
        configuration = configurations.attend(architecture, dtype_name(self.q), self.heads)
        values, scale = self.cache["values"], self.cache.get("scale", NO_PART)
        rope_dim = request.dims["Dqk"] - request.value_dim
        # In a cache of one dtype the rotated numbers stand behind the values.
        rope = self.cache.get("rope", values._replace(first=request.value_dim))
        assert values.numbers is not None
        decode = dtype_name(values.numbers) == "float8_e4m3fn" and not configurations.native_fp8(architecture)
        split = scratch[0] is not None
        launch(
            attend_rows,
            (-(-self.heads // configuration.blocks["BLOCK_H"]), count, self.parts if split else 1),
            configuration,
            self.q,
            values.numbers.view(torch.uint8) if decode else values.numbers,
            scale.numbers,
            rope.numbers if rope_dim else None,
            request.indices.contiguous(),
            None if request.topk_length is None else request.topk_length.contiguous(),
            self.sink,
            rows.owner,
            rows.cu_seqlens_q,
            rows.seqlens_k,
            rows.cu_seqlens_k,
            rows.block_table,
            self.out,
            self.lse,
            *scratch,
            request.softmax_scale,
            self.heads,
            self.topk,
            first,
            self.rows_per_request,
            request.batch.num_requests,
            rows.table_stride,
            rows.page_size,
            values.page_stride,
            scale.page_stride,
            rope.page_stride,
            ROPE_DIM=rope_dim,
            SCALE_TILE=layout(request.kv_layout).tile if request.kv_layout else 0,
            KV_SLOT=values.slot_stride,
            SCALE_FIRST=scale.first,
            SCALE_SLOT=scale.slot_stride,
            ROPE_FIRST=rope.first,
            ROPE_SLOT=rope.slot_stride,
            DECODE_E4M3=decode,
            SPLIT=split,
            **self.constants,
        )

    def _merge(self, rows: Rows, scratch: tuple[torch.Tensor | None, ...], count: int, first: int) -> None:
        launch(
            merge_parts,
            (-(-self.heads // configurations.MERGE.blocks["BLOCK_H"]), len(self.q)),
            configurations.MERGE,
            *scratch,
            self.sink,
            rows.owner,
            rows.cu_seqlens_q,
            self.out,
            self.lse,
            self.heads,
            first,
            count,
            self.rows_per_request,
            self.request.batch.num_requests,
            **self.constants,
        )
