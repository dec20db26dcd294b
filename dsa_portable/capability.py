"""The former name of what stands in dsa_portable.contract, and of dsa_portable.operators.FEATURES, until 0.2.0."""

from typing import Any

from dsa_portable.deprecated import moved

_contract, _operators = (moved(__name__, f"dsa_portable.{module}") for module in ("contract", "operators"))


def __getattr__(name: str) -> Any:
    return (_operators if name == "FEATURES" else _contract)(name)
