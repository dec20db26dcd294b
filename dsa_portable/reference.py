"""The former name of `dsa_portable.caller`, until 0.2.0."""

from dsa_portable.deprecated import moved

__getattr__ = moved(__name__, "dsa_portable.caller")
