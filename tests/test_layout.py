"""Each folder has one import name, and imports point one way."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # an extra of the test and dev sets

import pytest

from edgert.architectures import supported

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_DIR = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
BARE = set(PACKAGE_DIR.values()) - {"edgert"}  # names that must never be imported as they stand
LEAVES = {"edgert.errors", "edgert.types"}
MAY_IMPORT = {
    "edgert.quant": LEAVES,
    "edgert.storage": {"edgert.quant"} | LEAVES,
    "edgert.devices": {"edgert.quant"} | LEAVES,
    "edgert.experts": {"edgert.devices", "edgert.quant", "edgert.storage"} | LEAVES,
    "edgert": {"edgert"},
}
FILES = [(name, path) for name, folder in PACKAGE_DIR.items() for path in (ROOT / folder).rglob("*.py")]


def imported(path: Path) -> set[str]:
    """Every module that the file at `path` imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize(("package", "path"), FILES, ids=lambda value: str(value).removeprefix(str(ROOT)))
def test_imports_point_down(package: str, path: Path) -> None:
    allowed = MAY_IMPORT[package] | {package}
    for name in imported(path):
        assert name.partition(".")[0] not in BARE, f"import edgert.{name}, not {name}"
        if name.partition(".")[0] == "edgert":
            below = any(name == a or name.startswith(f"{a}.") for a in allowed)
            assert below, f"{package} may not import {name}"


def test_architectures_are_told_apart_in_their_own_files_alone() -> None:
    """What differs between them is a field of their configuration, or of their row of a table."""
    for _, path in FILES:
        if path.parent.name == "architectures":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                parts = list(ast.walk(node))
                named = any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in parts)
                architecture = any(isinstance(part, ast.Attribute) and part.attr == "architecture" for part in parts)
                family = any(isinstance(part, ast.Name) and part.id == "FAMILIES" for part in parts)
                assert not (named and (architecture or family)), f"{path}:{node.lineno}"
                texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
                assert not any(text.endswith("ForCausalLM") for text in texts), f"{path}:{node.lineno}"
            if isinstance(node, ast.Dict):
                keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
                assert not keys & set(supported()), f"{path}:{node.lineno}: a table by architecture"


@pytest.mark.parametrize(("package", "folder"), PACKAGE_DIR.items())
def test_a_folder_has_one_import_name(package: str, folder: str) -> None:
    assert importlib.import_module(package).__name__ == package
    assert (ROOT / folder / "__init__.py").is_file()
    shadow = ROOT / "edgert" / package.rpartition(".")[2]
    assert package == "edgert" or not (shadow.exists() or shadow.with_suffix(".py").exists())


def test_nothing_else_is_installed_at_the_top() -> None:
    top = importlib.metadata.distribution("edgert").read_text("top_level.txt")
    assert top.split() == ["edgert"]


def test_the_export_list_is_true_and_sorted() -> None:
    edgert = importlib.import_module("edgert")
    assert edgert.__all__ == sorted(edgert.__all__)
    for name in edgert.__all__:
        assert getattr(edgert, name)
