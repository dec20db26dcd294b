"""The built-in backends, one folder each; they register through the same entry points as anybody else's."""

from dsa_portable.callable_module import make_callable
from dsa_portable.registry import backends

make_callable(__name__, backends)
