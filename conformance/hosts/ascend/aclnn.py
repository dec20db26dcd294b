"""aclnn's operators in host memory: the C functions that op-plugin calls, a record of each call, and what it computes.

Every operator that the installed torch_npu knows has its two functions. Those of the table are computed on the CPU, as torch
does, and the four of sparse attention as the vendor's documents say; any other is an error that names it.
"""

from __future__ import annotations

import ctypes
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dsa_portable.conformance.hosts.ascend import documents
from dsa_portable.conformance.hosts.ascend.stubs import HostUnavailable


class _Torch:
    """torch, which is imported after the libraries that are made from this table."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module("torch"), name)


torch: Any = _Torch()


@dataclass(frozen=True)
class Operator:
    """Kinds of the arguments in their order, and the results of those that are no outputs; `names` of all, where they matter.

    T tensor or none, O output, I both, L list of tensors, S scalar or none, s string, i int64, c int8, b bool, d double.
    """

    kinds: str
    compute: Callable[..., Any]
    names: tuple[str, ...] = ()


def _vendor(operator: str, kinds: str, names: str) -> Operator:
    """An operator of sparse attention: reference.py's function of that name, by keywords."""
    each = tuple(names.split())
    given = [name for name, kind in zip(each, kinds, strict=True) if kind != "O"]

    def compute(*arguments: Any) -> Any:
        function = getattr(import_module("dsa_portable.conformance.hosts.ascend.reference"), operator)
        return function(**dict(zip(given, arguments, strict=True)))

    return Operator(kinds, compute, each)


_INDEX = "query key weights {} actual_seq_lengths_query actual_seq_lengths_key block_table {} layout_query layout_key"
_WINDOW = "sparse_mode pre_tokens next_tokens"
_LENGTHS = "block_table actual_seq_lengths_query actual_seq_lengths_kv"
_SFA = (
    f"query key value sparse_indices {_LENGTHS} query_rope key_rope {{}} scale_value sparse_block_size layout_query layout_kv "
    f"{_WINDOW} attention_mode return_softmax_lse out softmax_max softmax_sum"
)
_KVQ = (
    f"query key value sparse_indices key_dequant_scale value_dequant_scale {_LENGTHS} scale_value key_quant_mode "
    f"value_quant_mode sparse_block_size layout_query layout_kv {_WINDOW} attention_mode quant_scale_repo_mode tile_size "
    "rope_head_dim out"
)
OPERATORS: Mapping[str, Operator] = {
    "aclnnLightningIndexer": _vendor(
        "npu_lightning_indexer",
        "TTTTTTssiiiibOO",
        f"{_INDEX.format('', '')} sparse_count {_WINDOW} return_value sparse_indices sparse_values",
    ),
    "aclnnQuantLightningIndexer": _vendor(
        "npu_quant_lightning_indexer",
        "TTTTTTTTiissiiiiO",
        _INDEX.format("query_dequant_scale key_dequant_scale", "query_quant_mode key_quant_mode")
        + f" sparse_count {_WINDOW} sparse_indices",
    ),
    "aclnnSparseFlashAttention": _vendor("npu_sparse_flash_attention", "TTTTTTTTTdissiiiibOOO", _SFA.format("")),
    "aclnnSparseFlashAttentionV2": _vendor("npu_sparse_flash_attention", "TTTTTTTTTTdissiiiibOOO", _SFA.format("sinks")),
    "aclnnKvQuantSparseFlashAttention": _vendor("npu_kv_quant_sparse_flash_attention", "TTTTTTTTTdiiissiiiiiiiO", _KVQ),
    "aclnnAdd": Operator("TTSO", lambda a, b, alpha: torch.add(a, b, alpha=alpha)),
    "aclnnAdds": Operator("TSSO", lambda a, b, alpha: torch.add(a, b, alpha=alpha)),
    "aclnnArange": Operator("SSSO", lambda start, end, step: torch.arange(start, end, step)),
    "aclnnBatchMatMul": Operator("TTOc", lambda a, b, mode: torch.bmm(a, b)),
    "aclnnBitwiseAndTensor": Operator("TTO", lambda a, b: torch.bitwise_and(a, b)),
    "aclnnBitwiseNot": Operator("TO", lambda a: torch.bitwise_not(a)),
    "aclnnCat": Operator("LiO", lambda tensors, dim: torch.cat(tensors, dim)),
    "aclnnClamp": Operator("TSSO", lambda a, low, high: torch.clamp(a, low, high)),
    "aclnnFloorDivide": Operator("TTO", lambda a, b: torch.floor_divide(a, b)),
    "aclnnFloorDivides": Operator("TSO", lambda a, b: torch.floor_divide(a, b)),
    "aclnnGeScalar": Operator("TSO", lambda a, b: torch.ge(a, b)),
    "aclnnGeTensor": Operator("TTO", lambda a, b: torch.ge(a, b)),
    "aclnnIndex": Operator("TLO", lambda a, places: a[tuple(places)]),
    "aclnnIndexSelect": Operator("TiTO", lambda a, dim, places: torch.index_select(a, dim, places)),
    "aclnnInplaceCopy": Operator("IT", lambda a, b: b.expand_as(a)),
    "aclnnInplaceFillScalar": Operator("IS", lambda a, value: torch.full_like(a, value)),
    "aclnnInplaceOne": Operator("I", lambda a: torch.ones_like(a)),
    "aclnnInplaceZero": Operator("I", lambda a: torch.zeros_like(a)),
    "aclnnLog": Operator("TO", lambda a: torch.log(a)),
    "aclnnLtScalar": Operator("TSO", lambda a, b: torch.lt(a, b)),
    "aclnnLtTensor": Operator("TTO", lambda a, b: torch.lt(a, b)),
    "aclnnMatmul": Operator("TTOc", lambda a, b, mode: torch.matmul(a, b)),
    "aclnnMinimum": Operator("TTO", lambda a, b: torch.minimum(a, b)),
    "aclnnMul": Operator("TTO", lambda a, b: torch.mul(a, b)),
    "aclnnMuls": Operator("TSO", lambda a, b: torch.mul(a, b)),
    "aclnnRelu": Operator("TO", lambda a: torch.relu(a)),
    "aclnnRemainderTensorScalar": Operator("TSO", lambda a, b: torch.remainder(a, b)),
    "aclnnRemainderTensorTensor": Operator("TTO", lambda a, b: torch.remainder(a, b)),
    "aclnnSWhere": Operator("TTTO", lambda condition, a, b: torch.where(condition, a, b)),
    "aclnnSearchSorted": Operator(
        "TTbbTO", lambda a, b, int32, right, sorter: torch.searchsorted(a, b, out_int32=int32, right=right, sorter=sorter)
    ),
    "aclnnSigmoid": Operator("TO", lambda a: torch.sigmoid(a)),
    "aclnnSort": Operator("TbibOO", lambda a, stable, dim, down: tuple(torch.sort(a, dim=dim, stable=stable, descending=down))),
    "aclnnSub": Operator("TTSO", lambda a, b, alpha: torch.sub(a, b, alpha=alpha)),
    "aclnnSubs": Operator("TSSO", lambda a, b, alpha: torch.sub(a, b, alpha=alpha)),
}
# Kind -> C type of the argument, and where the call keeps it; what is not here is a pointer to one of hostrt.c's structures.
PARAMETERS = {
    "s": ("const char *", "pointer"),
    "i": ("int64_t ", "integer"),
    "c": ("int8_t ", "integer"),
    "b": ("_Bool ", "integer"),
    "d": ("double ", "number"),
}
STRUCTURE = ("void *", "pointer")
WORKSPACE = "GetWorkspaceSize"
# aclDataType -> torch's name of a tensor's dtype, and C's of a scalar's.
DTYPES = {
    0: "float32",
    1: "float16",
    2: "int8",
    3: "int32",
    4: "uint8",
    6: "int16",
    9: "int64",
    11: "float64",
    12: "bool",
    27: "bfloat16",
    36: "float8_e4m3fn",
}
SCALARS: Mapping[int, Any] = {
    0: ctypes.c_float,
    3: ctypes.c_int32,
    9: ctypes.c_int64,
    11: ctypes.c_double,
    12: ctypes.c_bool,
}
# Calls that are remembered.
MOST_CALLS = 10_000
# hostrt.c has these limits too.
MOST_DIMENSIONS, MOST_ARGUMENTS = 8, 32
# ACLNN_ERR_INNER: what an operator answers that is not in the table, or whose computation raises.
ERROR = 561000


def source(package: Path) -> str:
    """C of both functions of every operator that the torch_npu in this folder calls.

    Raises HostUnavailable where it does not call one of the table: it is another torch_npu than the table was written for.
    """
    found = re.findall(rb"\0(aclnn\w+)" + WORKSPACE.encode() + rb"\0", (package / "lib" / "libtorch_npu.so").read_bytes())
    names = {name.decode() for name in found}
    if missing := sorted(set(OPERATORS) - names):
        raise HostUnavailable(
            f"this torch_npu does not call {', '.join(missing)}, which the host runtime computes; install torch-npu 2.13.0."
        )
    return "\n".join(map(_functions, sorted(names)))


def _functions(name: str) -> str:
    if name not in OPERATORS:
        error = f'(void) {{ return unmodelled("{name}", {ERROR}); }}'
        return f"int {name}{WORKSPACE}{error}\nint {name}{error}"
    arguments = [PARAMETERS.get(kind, STRUCTURE) for kind in OPERATORS[name].kinds]
    parameters = "".join(f"{type_}a{i}, " for i, (type_, _) in enumerate(arguments))
    stores = " ".join(f"call->arguments[{i}].{member} = a{i};" for i, (_, member) in enumerate(arguments))
    return (
        f"int {name}{WORKSPACE}({parameters}uint64_t *size, void **executor) {{\n"
        f'    struct call *call = begun("{name}"); {stores.replace(".pointer = ", ".pointer = (void *)")}\n'
        "    return recorded(call, size, executor);\n}\n"
        f"int {name}(void *workspace, uint64_t size, void *executor, void *stream) {{ return computed(executor); }}"
    )


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("rank", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * MOST_DIMENSIONS),
        ("strides", ctypes.c_int64 * MOST_DIMENSIONS),
        ("offset", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("places", ctypes.c_int64),
        ("data", ctypes.c_void_p),
    )


class _List(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int64), ("tensors", ctypes.POINTER(ctypes.c_void_p)))


class _Scalar(ctypes.Structure):
    _fields_ = (("dtype", ctypes.c_int64), ("value", ctypes.c_char * 8))


class _Argument(ctypes.Union):
    _fields_ = (("pointer", ctypes.c_void_p), ("integer", ctypes.c_int64), ("number", ctypes.c_double))


class _Call(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("arguments", _Argument * MOST_ARGUMENTS))


@dataclass(frozen=True)
class Seen:
    """A tensor as it reached aclnn; the offset is in elements, from where its storage begins."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    offset: int


@dataclass(frozen=True)
class Call:
    """An operator and its arguments in their order, outputs too: Seen or none, lists of them, numbers and text."""

    operator: str
    arguments: tuple[Any, ...]

    def named(self) -> dict[str, Any]:
        """The arguments by the names of torch_npu's own operator; of the four of sparse attention."""
        return dict(zip(OPERATORS[self.operator].names, self.arguments, strict=True))


class Recorder:
    """What the libraries call, twice for an operator; `calls` are the last that were made, in their order.

    A call that the documents forbid on the chip is refused as its tiling would refuse it.
    """

    def __init__(self, library: ctypes.CDLL, chip: str) -> None:
        self._chip = chip
        self.calls: deque[Call] = deque(maxlen=MOST_CALLS)
        self._library = library
        # Between an operator's two calls: its arguments, by the address of the call.
        self._begun: dict[int, list[Any]] = {}
        # Kept, as the library keeps nothing but the address.
        self.function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Call), ctypes.c_int)(self._answer)

    def _answer(self, pointer: Any, computed: int) -> int:
        call = pointer.contents
        name = call.name.decode()
        try:
            if computed:
                _compute(OPERATORS[name], self._begun.pop(ctypes.addressof(call)))
            else:
                arguments = [_argument(*pair) for pair in zip(OPERATORS[name].kinds, call.arguments, strict=False)]
                self.calls.append(Call(name, tuple(map(_seen, arguments))))
                if sentence := OPERATORS[name].names and documents.forbidden(name, self.calls[-1].named(), self._chip):
                    self._library.dsa_host_say(f"{name} on {self._chip}: the documents say that {sentence}".encode())
                    return documents.ERROR
                self._begun[ctypes.addressof(call)] = arguments
        except Exception as exc:
            self._library.dsa_host_say(f"{name}: {type(exc).__name__}: {exc}".encode())
            return ERROR
        return 0


def _argument(kind: str, argument: _Argument) -> Any:
    if kind in "TOI":
        return _tensor(argument.pointer)
    if kind == "L":
        found = _List.from_address(argument.pointer)
        return [_tensor(found.tensors[i]) for i in range(found.count)]
    if kind == "S":
        if not argument.pointer:
            return None
        scalar = _Scalar.from_address(argument.pointer)
        return _known(SCALARS, scalar.dtype).from_buffer_copy(scalar, _Scalar.value.offset).value
    if kind == "s":
        return ctypes.string_at(argument.pointer).decode()
    return argument.number if kind == "d" else bool(argument.integer) if kind == "b" else argument.integer


def _known(table: Mapping[int, Any], dtype: int) -> Any:
    if dtype not in table:
        raise ValueError(f"aclDataType {dtype} is not modelled")
    return table[dtype]


def _tensor(address: int | None) -> Any:
    """The operator's own memory as a CPU tensor; raises where it is said to reach past its storage."""
    if not address:
        return None
    found = _Tensor.from_address(address)
    if found.rank > MOST_DIMENSIONS:
        raise ValueError(f"a tensor has {found.rank} dimensions, but aclnn takes {MOST_DIMENSIONS}")
    shape, strides = tuple(found.sizes[: found.rank]), tuple(found.strides[: found.rank])
    dtype = getattr(torch, _known(DTYPES, found.dtype))
    if 0 in shape:
        return torch.empty_strided(shape, strides, dtype=dtype)
    last = found.offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if last >= found.places:
        raise ValueError(f"a tensor reaches element {last} of a storage of {found.places}")
    memory = (ctypes.c_char * ((last + 1) * dtype.itemsize)).from_address(found.data)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides, found.offset)


def _seen(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_seen(each) for each in argument]
    if not isinstance(argument, torch.Tensor):
        return argument
    dtype = str(argument.dtype).removeprefix("torch.")
    return Seen(tuple(argument.shape), argument.stride(), dtype, argument.storage_offset())


def _compute(operator: Operator, arguments: list[Any]) -> None:
    """Write the results to the outputs; a result of another shape is an error."""
    given = [argument for kind, argument in zip(operator.kinds, arguments, strict=True) if kind != "O"]
    outputs = [argument for kind, argument in zip(operator.kinds, arguments, strict=True) if kind in "OI"]
    with torch.no_grad():
        found = operator.compute(*given)
        for output, result in zip(outputs, found if isinstance(found, tuple) else (found,), strict=True):
            if output.shape != result.shape:
                raise ValueError(f"the result is {list(result.shape)}, but the output {list(output.shape)}")
            output.copy_(result)
