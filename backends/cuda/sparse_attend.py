"""sparse_attend in Triton: a program per row, block of heads and part of the entries; parts are merged in fixed order."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
import triton

from dsa_portable.arrays import dtype_name
from dsa_portable.backends.cuda import configurations, device
from dsa_portable.backends.cuda.kernels.sparse_attend import attend_rows, merge_parts
from dsa_portable.backends.cuda.launch import launch, scratch
from dsa_portable.backends.cuda.plan import execute
from dsa_portable.backends.cuda.rows import NO_PART, asking_for, find, parts_of, scratch_bytes
from dsa_portable.formats import layout
from dsa_portable.operators.sparse_attend import AttendRequest


def sparse_attend(request: AttendRequest) -> Any:
    """Output, or (output, lse) with `return_lse`; see dsa_portable.sparse_attend."""
    q = request.q.contiguous()
    device.require(q, "sparse_attend")
    with device.of(q):
        return execute(request, q, _attend)


@cache
def hopper_kernels() -> Any:
    """The module of the Hopper kernels, which a Triton with another Gluon cannot import."""
    return import_module("dsa_portable.backends.cuda.kernels.sparse_attend_hopper")


def _attend(request: AttendRequest, q: torch.Tensor, results: list[torch.Tensor]) -> None:
    if len(q):
        _Call(request, q, results).run()


class _Call:
    """One call: what all of its launches share."""

    def __init__(self, request: AttendRequest, q: torch.Tensor, results: list[torch.Tensor]) -> None:
        self.request, self.q, self.out = request, q, results[0]
        self.lse = results[1] if request.return_lse else None
        self.heads, self.topk = request.dims["Hq"], request.dims["topk"]
        self.parts = configurations.parts(self.topk)
        self.architecture = device.architecture(q.device)
        self.hopper = configurations.hopper(
            self.architecture, dtype_name(q), triton.__version__, packed=request.kv_layout is not None
        )
        self.cache = parts_of(request.kv, request.kv_layout)
        self.scratch_bytes = scratch_bytes()
        self.sink = None if request.attn_sink is None else request.attn_sink.contiguous()
        self.indices = request.indices.contiguous()
        self.topk_length = None if request.topk_length is None else request.topk_length.contiguous()
        self.rows = find(request.batch, q, visible=False)

    def run(self) -> None:
        """All rows at once, or slabs of them where their parts need scratch."""
        attend = self._attend_hopper if self.hopper else self._attend
        if self.parts == 1:
            attend((None, None, None), 0, len(self.q))
            return
        per_row = 4 * self.parts * self.heads * (self.request.value_dim + 2)
        slab = max(1, min(len(self.q), self.scratch_bytes // per_row))
        shape = (slab, self.parts, self.heads)
        with asking_for("sparse_attend", slab * per_row):
            parts = tuple(scratch(self.q, torch.float32, *size) for size in ((*shape, self.request.value_dim), shape, shape))
        for first in range(0, len(self.q), slab):
            count = min(slab, len(self.q) - first)
            attend(parts, first, count)
            self._merge(parts, first, count)

    def _attend(self, parts: tuple[torch.Tensor | None, ...], first: int, count: int) -> None:
        request, rows, architecture = self.request, self.rows, self.architecture
        configuration = configurations.attend(
            architecture, dtype_name(self.q), self.heads, packed=request.kv_layout is not None
        )
        values, scale = self.cache["values"], self.cache.get("scale", NO_PART)
        rope_dim = request.dims["Dqk"] - request.value_dim
        # In a cache of one dtype the rotated numbers stand behind the values.
        rope = self.cache.get("rope", values._replace(first=request.value_dim))
        assert values.numbers is not None
        decode = dtype_name(values.numbers) == "float8_e4m3fn" and not configurations.native_fp8(architecture)
        launch(
            attend_rows,
            (-(-self.heads // configuration.blocks["BLOCK_H"]), count, self.parts),
            configuration,
            self.q,
            values.numbers.view(torch.uint8) if decode else values.numbers,
            scale.numbers,
            rope.numbers if rope_dim else None,
            self.indices,
            self.topk_length,
            self.sink,
            rows.owner,
            rows.end,
            rows.cu_seqlens_k,
            rows.block_table,
            self.out,
            self.lse,
            *parts,
            request.softmax_scale,
            self.heads,
            self.topk,
            first,
            rows.table_stride,
            rows.page_size,
            values.page_stride,
            scale.page_stride,
            rope.page_stride,
            VALUE_DIM=request.value_dim,
            ROPE_DIM=rope_dim,
            SCALE_TILE=layout(request.kv_layout).tile if request.kv_layout else 0,
            KV_SLOT=values.slot_stride,
            SCALE_FIRST=scale.first,
            SCALE_SLOT=scale.slot_stride,
            ROPE_FIRST=rope.first,
            ROPE_SLOT=rope.slot_stride,
            DECODE_E4M3=decode,
            PARTS=self.parts,
        )

    def _attend_hopper(self, parts: tuple[torch.Tensor | None, ...], first: int, count: int) -> None:
        assert self.hopper is not None
        request, rows, values, scale = self.request, self.rows, self.cache["values"], self.cache.get("scale", NO_PART)
        rope = self.cache.get("rope", values._replace(first=request.value_dim))
        assert values.numbers is not None
        e4m3 = dtype_name(values.numbers) == "float8_e4m3fn"
        head_blocks = -(-self.heads // hopper_kernels().BLOCK_H.value)
        tiles = count * self.parts * head_blocks
        launch(
            hopper_kernels().attend_rows_hopper,
            (min(tiles, device.multiprocessors(self.q.device)),),
            self.hopper,
            # Copies of 16 bytes.
            self.q if self.q.data_ptr() % 16 == 0 else self.q.clone(),
            values.numbers.view(torch.uint8) if e4m3 else values.numbers,
            self.indices,
            self.topk_length,
            self.sink,
            rows.owner,
            rows.end,
            rows.cu_seqlens_k,
            rows.block_table,
            self.out,
            self.lse,
            *parts,
            request.softmax_scale,
            self.heads,
            # Twice, as Triton proves the alignment of the one, and makes a constant of no 1 of the other.
            self.topk,
            self.topk,
            first,
            tiles,
            rows.table_stride,
            0,
            ROPE_DIM=request.dims["Dqk"] - request.value_dim,
            SCALE_TILE=layout(request.kv_layout).tile if request.kv_layout else 0,
            E4M3=e4m3,
            KV_SLOT=values.slot_stride,
            SCALE_FIRST=scale.first,
            SCALE_SLOT=scale.slot_stride,
            ROPE_FIRST=rope.first,
            ROPE_SLOT=rope.slot_stride,
            PAGE_SIZE=rows.page_size,
            WIDE=request.kv.numel() >= 1 << 31,
            HEAD_BLOCKS=head_blocks,
            PARTS=self.parts,
        )

    def _merge(self, parts: tuple[torch.Tensor | None, ...], first: int, count: int) -> None:
        launch(
            merge_parts,
            (-(-self.heads // configurations.MERGE.blocks["BLOCK_H"]), count),
            configurations.MERGE,
            *parts,
            self.sink,
            self.out,
            self.lse,
            self.request.softmax_scale,
            self.heads,
            first,
            VALUE_DIM=self.request.value_dim,
            PARTS=self.parts,
        )
