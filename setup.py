"""What pyproject.toml cannot say: a wheel carries the commit that it was built from, as reports name it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def git(*arguments: str) -> str:
    """What git prints, or nothing where this is no checkout."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


class WithCommit(build_py):
    """Writes conformance/commit.json into what is built, never into the sources."""

    def run(self) -> None:
        super().run()
        if self.editable_mode or not (ROOT / ".git").exists() or not (commit := git("rev-parse", "HEAD")):
            return
        target = Path(self.build_lib, "dsa_portable", "conformance", "commit.json")
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        target.write_text(json.dumps({"commit": commit, "dirty": dirty}) + "\n", encoding="utf-8")


setup(cmdclass={"build_py": WithCommit})
