"""Type-check the package under its import names, reporting the paths you edit.

A static checker runs no import hook, so it cannot see that the folder storage/
is imported as edgert.storage. This copies the sources to build/typing/ laid out
as they are installed, runs the checker there and translates its paths back.

    python tools/typecheck.py mypy -p edgert
    python tools/typecheck.py pyright edgert
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # an extra of the test and dev sets

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "typing"


def package_dir() -> dict[str, str]:
    """The mapping of import names to folders, from pyproject.toml."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    mapping: dict[str, str] = config["tool"]["setuptools"]["package-dir"]
    return mapping


def lay_out(mapping: dict[str, str]) -> None:
    """Copy the sources to TREE, each under its import name."""
    shutil.rmtree(TREE, ignore_errors=True)
    for name, folder in mapping.items():
        for source in (ROOT / folder).rglob("*"):
            if source.suffix in {".py", ".pyi", ".typed"}:
                copy = TREE.joinpath(*name.split("."), source.relative_to(ROOT / folder))
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, copy)


def translate(report: str, mapping: dict[str, str]) -> str:
    """Put the checkout's paths where the report has those of TREE."""
    report = report.replace(f"{TREE}{os.sep}", "")
    for name in sorted(mapping, key=len, reverse=True):
        report = report.replace(name.replace(".", os.sep) + os.sep, f"\0{mapping[name]}{os.sep}")
    return report.replace("\0", "")


def main(command: list[str]) -> int:
    """Run the checker over the laid-out tree and return its exit status."""
    mapping = package_dir()
    lay_out(mapping)
    env = {**os.environ, "MYPY_CACHE_DIR": str(ROOT / "build" / "mypy_cache")}
    run = subprocess.run(command, cwd=TREE, env=env, text=True, capture_output=True)
    print(translate(run.stdout + run.stderr, mapping), end="")
    return run.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
