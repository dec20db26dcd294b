"""The schemas of torch_npu's sparse attention operators, as its wheels declare them, and which generation of them is installed.

Texts are byte for byte those of torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml in the wheel. A wheel's version says
little, because post releases carry a later generation than the release that follows them: a generation is told by arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dsa_portable.errors import DeviceUnavailable, InvalidArgument

LIGHTNING_INDEXER = "npu_lightning_indexer"
QUANT_LIGHTNING_INDEXER = "npu_quant_lightning_indexer"
SPARSE_FLASH_ATTENTION = "npu_sparse_flash_attention"
KV_QUANT_SPARSE_FLASH_ATTENTION = "npu_kv_quant_sparse_flash_attention"

_A = {
    LIGHTNING_INDEXER: (
        "npu_lightning_indexer(Tensor query, Tensor key, Tensor weights, *, Tensor? actual_seq_lengths_query=None, "
        'Tensor? actual_seq_lengths_key=None, Tensor? block_table=None, str layout_query="BSND", str layout_key="BSND", '
        "int sparse_count=2048, int sparse_mode=3, int pre_tokens=9223372036854775807, int next_tokens=9223372036854775807, "
        "bool return_value=False) -> (Tensor, Tensor)"
    ),
    QUANT_LIGHTNING_INDEXER: (
        "npu_quant_lightning_indexer(Tensor query, Tensor key, Tensor weights, Tensor query_dequant_scale, "
        "Tensor key_dequant_scale, int query_quant_mode, int key_quant_mode, *, Tensor? actual_seq_lengths_query=None, "
        'Tensor? actual_seq_lengths_key=None, Tensor? block_table=None, str layout_query="BSND", str layout_key="BSND", '
        "int sparse_count=2048, int sparse_mode=3, int pre_tokens=9223372036854775807, "
        "int next_tokens=9223372036854775807) -> Tensor"
    ),
    SPARSE_FLASH_ATTENTION: (
        "npu_sparse_flash_attention(Tensor query, Tensor key, Tensor value, Tensor sparse_indices, float scale_value, *, "
        "Tensor? block_table=None, Tensor? actual_seq_lengths_query=None, Tensor? actual_seq_lengths_kv=None, "
        "Tensor? query_rope=None, Tensor? key_rope=None, int sparse_block_size=1, "
        'str layout_query="BSND", str layout_kv="BSND", int sparse_mode=3, int pre_tokens=9223372036854775807, '
        "int next_tokens=9223372036854775807, int attention_mode=0, bool return_softmax_lse=False) -> (Tensor, Tensor, Tensor)"
    ),
    KV_QUANT_SPARSE_FLASH_ATTENTION: (
        "npu_kv_quant_sparse_flash_attention(Tensor query, Tensor key, Tensor value, Tensor sparse_indices, float scale_value, "
        "int key_quant_mode, int value_quant_mode, *, Tensor? key_dequant_scale=None, Tensor? value_dequant_scale=None, "
        "Tensor? block_table=None, Tensor? actual_seq_lengths_query=None, Tensor? actual_seq_lengths_kv=None, "
        'int sparse_block_size=1, str layout_query="BSND", str layout_kv="BSND", int sparse_mode=3, '
        "int pre_tokens=9223372036854775807, int next_tokens=9223372036854775807, int attention_mode=0, "
        "int quant_scale_repo_mode=1, int tile_size=128, int rope_head_dim=64) -> Tensor"
    ),
}
_B = {
    **_A,
    QUANT_LIGHTNING_INDEXER: _A[QUANT_LIGHTNING_INDEXER].replace(") ->", ", int? query_dtype=None, int? key_dtype=None) ->"),
    KV_QUANT_SPARSE_FLASH_ATTENTION: _A[KV_QUANT_SPARSE_FLASH_ATTENTION].replace(
        ") ->", ", int? key_dtype=None, int? value_dtype=None) ->"
    ),
}
_C = {
    **_B,
    SPARSE_FLASH_ATTENTION: _B[SPARSE_FLASH_ATTENTION]
    .replace("Tensor value", "Tensor? value")
    .replace(") ->", ", Tensor? sinks=None) ->"),
}

# Generation -> operator -> schema. 2.6.0, 2.7.1 and 2.8.0 have none of the operators; later wheels of the same releases do:
#   A  2.6.0.post5, 2.7.1.post2, 2.8.0.post2, 2.9.0
#   B  2.8.0.post5, 2.9.1, 2.10.0, 2.11.0
#   C  2.7.1.post11, 2.9.0.post9, 2.10.0.post7, 2.11.0.post3, 2.12.0.post3, 2.13.0, 2.14.0
GENERATIONS: Mapping[str, Mapping[str, str]] = {"A": _A, "B": _B, "C": _C}
OPERATORS = tuple(_A)
# Of a torch_npu whose schemas stand in no row, and that takes every call of ours all the same.
UNLISTED = "unlisted"


def arguments(schema: str) -> tuple[str, ...]:
    """The names of a schema's arguments, in order."""
    return tuple(part.partition("=")[0].split()[-1] for part in _parts(schema)[:-1] if part != "*")


def generation_of(find: Callable[[str], str | None]) -> str:
    """The generation whose arguments and results the installed operators have, whatever their namespace; UNLISTED for others.

    `find` gives an operator's schema, or None without one. Raises DeviceUnavailable where an operator is missing, or where one
    lacks an argument that the adapter names, requires one that it does not know, or returns something else.
    """
    found = {operator: find(operator) for operator in OPERATORS}
    if missing := [operator for operator, schema in found.items() if schema is None]:
        raise DeviceUnavailable(f"torch_npu has no {' and no '.join(missing)}; install one that has, such as torch-npu 2.13.0.")
    installed = {operator: _parts(schema) for operator, schema in found.items() if schema is not None}
    known = {name: {operator: _parts(schema) for operator, schema in texts.items()} for name, texts in GENERATIONS.items()}
    for name, generation in known.items():
        if generation == installed:
            return name
    if all(_serves(installed[operator], known["A"][operator]) for operator in OPERATORS):
        return UNLISTED
    kinds = "; ".join(_kind(operator, installed[operator], known) for operator in OPERATORS)
    raise DeviceUnavailable(
        f"torch_npu's operators are of no generation that is accepted, {', '.join(known)}: {kinds}; "
        "install a torch-npu of one of them, such as 2.13.0."
    )


def _serves(installed: tuple[str, ...], first: tuple[str, ...]) -> bool:
    """Whether calls by name that were right in the first generation are right still: what came later is optional."""
    names = {_argument(part) for part in first}
    present = {_argument(part) for part in installed}
    required = {_argument(part) for part in installed[:-1] if "=" not in part}
    return names <= present and required <= names and installed[-1] == first[-1]


def _argument(part: str) -> str:
    return part.partition("=")[0].split()[-1]


def _parts(schema: str) -> tuple[str, ...]:
    """A schema's arguments as declared, `*` among them, and last its results. Raises InvalidArgument for other text."""
    inside, arrow, results = schema.partition("(")[2].rpartition(") -> ")
    if not arrow:
        raise InvalidArgument(f"{schema!r} is no operator schema; pass one that reads name(arguments) -> results.")
    parts: list[str] = []
    depth = 0
    for part in inside.split(", ") if inside else ():
        # A default such as [1, 2] goes on after its comma.
        parts[-1:] = [f"{parts[-1]}, {part}"] if depth else [*parts[-1:], part]
        depth += part.count("[") - part.count("]")
    return (*parts, f"-> {results}")


def _kind(operator: str, installed: tuple[str, ...], known: Mapping[str, Mapping[str, tuple[str, ...]]]) -> str:
    """Which generations an operator is of, or how it differs from the newest one's."""
    if same := [name for name, generation in known.items() if generation[operator] == installed]:
        return f"{operator} is of {', '.join(same)}"
    newest, generation = list(known.items())[-1]
    more = [part for part in installed if part not in generation[operator]]
    less = [part for part in generation[operator] if part not in installed]
    if not more and not less:
        return f"{operator} has another order than {newest}'s"
    return f"{operator} has {', '.join(more) or 'nothing'} where {newest} has {', '.join(less) or 'nothing'}"
