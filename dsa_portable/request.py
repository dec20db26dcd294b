"""The former name of the requests in dsa_portable.operators, and of dsa_portable.contract.Request, until 0.2.0."""

from typing import Any

from dsa_portable.deprecated import moved

_contract, _operators = (moved(__name__, f"dsa_portable.{module}") for module in ("contract", "operators"))


def __getattr__(name: str) -> Any:
    return (_contract if name == "Request" else _operators)(name)
