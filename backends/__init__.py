"""The built-in backends, one folder each; they register through the same entry points as anybody else's."""

from dsa_portable.deprecated import backends, make_callable

make_callable(__name__, backends)
