"""The backend's process with a planted copy of its package: `python -m ... PARENT FOLDER BACKEND RECORDINGS`.

Packages in FOLDER come before those that were installed in PARENT; everything else is execute/worker.py.
"""

from __future__ import annotations

import sys
from importlib import import_module

from dsa_portable.conformance.execute import worker


def main() -> None:
    """Serve cases until stdin closes."""
    parent, folder = sys.argv.pop(1), sys.argv.pop(1)
    import_module(parent).__path__.insert(0, folder)
    worker.main()


if __name__ == "__main__":
    main()
