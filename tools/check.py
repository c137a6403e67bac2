"""Everything that a change must pass, for a person and for CI alike; and README's map, drawn from the files.

python tools/check.py               format, lint, types, map, tests
python tools/check.py --no-tests    the same without the tests
python tools/check.py --write-map   put the present map into README
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("edgert", "experts", "storage", "devices", "quant", "tools", "tests")
TOP = {"pyproject.toml", "README.md", *FOLDERS}
MAP = re.compile(r"(?<=\n```map\n).*?(?=```\n)", re.DOTALL)
NOT_PYTHON = {
    ".ci/run": "what a change must pass, from nothing",
    "edgert/LICENSE": "Apache-2.0",
    "edgert/demo/NOTICE.md": "the embedded model: origin, licence, figures, how to make it again",
    "edgert/demo/smollm2-moe-q4_0.gguf": "the embedded model",
    "edgert/tasks/everyday.jsonl": "48 everyday questions with choices, for proofs where lm_eval is installed",
    "pyproject.toml": "the package: folders and their import names, dependencies, settings of the checks",
    "tests/golden/": "tiny random models with llama.cpp's answers",
    "tools/smollm2_moe.json": "name and description of the embedded model",
}


def tracked() -> list[str]:
    """Files of the project: what git knows, and what it would know after `git add`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return sorted(name for name in set(listed) if name and (ROOT / name).exists())


def first_sentence(path: Path) -> str:
    """What the docstring of a Python file says first."""
    text = ast.get_docstring(ast.parse(path.read_text())) or "?"
    return re.split(r"(?<=\w)\.(?=\s)", " ".join(text.split("\n\n")[0].split()) + " ", maxsplit=1)[0].strip(" .")


def draw_map() -> str:
    """One line a file, folder after folder."""
    names = [name for name in tracked() if name.endswith(".py")] + list(NOT_PYTHON)
    order = {folder: place for place, folder in enumerate(FOLDERS)}
    names.sort(key=lambda name: (order.get(name.partition("/")[0], -1), name.count("/"), name))
    width = max(len(name) for name in names if name.endswith(".py")) + 2
    lines = [f"{name:<{width}}{NOT_PYTHON.get(name) or first_sentence(ROOT / name)}" for name in names]
    return "\n".join(line if len(line) <= 140 else line[:137] + "..." for line in lines) + "\n"


def map_problems() -> list[str]:
    """What is wrong with README's map and with the top folder."""
    problems = []
    drawn = MAP.search((ROOT / "README.md").read_text())
    if drawn is None or drawn.group() != draw_map():
        problems.append("README's map differs from the files: python tools/check.py --write-map")
    folders = tuple(name for name in NOT_PYTHON if name.endswith("/"))
    plain = [name for name in tracked() if not name.endswith((".py", "py.typed", "README.md")) and name[0] != "."]
    problems += [
        f"tools/check.py does not say what {name} is"
        for name in plain
        if name not in NOT_PYTHON and not name.startswith(folders)
    ]
    top = {name.partition("/")[0] for name in tracked() if not name.startswith(".")}
    return problems + [f"{name} does not belong at the top" for name in sorted(top - TOP)]


def write_map() -> None:
    """Put the present map into README."""
    readme = ROOT / "README.md"
    readme.write_text(MAP.sub(lambda _: draw_map(), readme.read_text()))


def main() -> int:
    """Run all checks; the number of those that failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write-map", action="store_true", help="put the present map into README, and no more")
    parser.add_argument("--no-tests", action="store_true", help="all checks but the tests")
    args = parser.parse_args()
    if args.write_map:
        write_map()
        return 0
    python = sys.executable
    commands = {
        "format": [python, "-m", "ruff", "format", "--check", "."],
        "lint": [python, "-m", "ruff", "check", "."],
        "types": [python, "tools/typecheck.py", python, "-m", "mypy", "-p", "edgert"],
    }
    if not args.no_tests:
        commands["tests"] = [python, "-m", "pytest", "-q"]
    failed = 0
    for name, command in commands.items():
        print(f"== {name}", flush=True)
        failed += subprocess.run(command, cwd=ROOT).returncode != 0
    print("== map")
    problems = map_problems()
    print("\n".join(problems) or "README's map equals the files")
    return failed + bool(problems)


if __name__ == "__main__":
    sys.exit(main())
