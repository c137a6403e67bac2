"""Wheels for a board: whether they fit it, whatever their names say, and what is lacking beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("fabric", reason="fabric is not installed: pip install edgert[deploy]")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from board_server import write_wheel
from deploy_board import DeployError
from deploy_wheels import Target, check_wheel, lacking, python_of, read_wheel

TARGET = Target((3, 10), "aarch64", (2, 35))
ARM_LIBRARY = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\xb7\x00"
X86_LIBRARY = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\x3e\x00"


@pytest.mark.parametrize(
    "tag",
    [
        "py3-none-any",
        "cp310-cp310-manylinux_2_28_aarch64",
        "cp39-abi3-manylinux_2_17_aarch64.manylinux2014_aarch64",
        "cp310-cp310-linux_aarch64",
    ],
)
def test_wheels_for_the_board_pass(tag: str, tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "onnxruntime_gpu", tag, {"a/b.so": ARM_LIBRARY, "a/c.so.1": ARM_LIBRARY})
    check_wheel(path, TARGET)
    assert python_of(path) == ((3, 10) if "cp310-cp310" in tag else None)


@pytest.mark.parametrize(
    "tag",
    [
        "cp310-cp310-linux_x86_64",
        "cp312-cp312-linux_aarch64",
        "cp310-cp310-manylinux_2_38_aarch64",
        "cp310-cp310-win_arm64",
    ],
)
def test_wheels_for_something_else_are_refused_by_name(tag: str, tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "onnxruntime_gpu", tag, {})
    with pytest.raises(DeployError, match=rf"is for {tag}; the board is Python 3.10 on aarch64 with glibc 2.35"):
        check_wheel(path, TARGET)


def test_a_wheel_that_lies_is_refused_by_its_libraries(tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "onnxruntime_gpu", "cp310-cp310-linux_aarch64", {"a/b.so": X86_LIBRARY})
    with pytest.raises(DeployError, match=r"a/b\.so in it is compiled for x86_64, whatever the wheel is called"):
        check_wheel(path, TARGET)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_wheel_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    path.write_bytes(content)
    with pytest.raises(DeployError, match="is no wheel"):
        check_wheel(path, TARGET)
        read_wheel(path)
    with pytest.raises(DeployError, match="is no wheel"):
        read_wheel(path.rename(tmp_path / "thing.whl"))


def test_dependencies_are_those_of_the_board_not_of_this_machine(tmp_path: Path) -> None:
    requires = (
        'Requires-Dist: tomli>=2; python_version < "3.11"\n'
        'Requires-Dist: winloop; sys_platform == "win32"\n'
        'Requires-Dist: arms; platform_machine == "aarch64"\n'
        'Requires-Dist: starlette>=0.40; extra == "server"\n'
        "Requires-Dist: numpy>=1.26\n"
    )
    wheel = read_wheel(write_wheel(tmp_path, "edgert", "py3-none-any", {}, requires))
    assert lacking([wheel], ["edgert"], TARGET) == ["arms", "numpy>=1.26", "tomli>=2"]
    newer = Target((3, 12), "x86_64", (2, 39))
    assert lacking([wheel], ["edgert[server]"], newer) == ["numpy>=1.26", "starlette>=0.40"]
    old = read_wheel(write_wheel(tmp_path, "numpy", "py3-none-any", {}))
    assert lacking([wheel, old], ["edgert"], newer) == ["numpy>=1.26"]


def test_a_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    one = write_wheel(tmp_path, "edgert", "py3-none-any", {"x.py": b"1"})
    two = write_wheel(tmp_path / "a", "edgert", "py3-none-any", {"x.py": b"1"})
    assert read_wheel(one).digest == read_wheel(two).digest
    other = write_wheel(tmp_path / "a", "edgert", "py3-none-any", {"x.py": b"2"})
    assert read_wheel(one).digest != read_wheel(other).digest and not read_wheel(one).serves
    serving = write_wheel(tmp_path / "a", "edgert", "py3-none-any", {"edgert/cli/serve.py": b""})
    assert read_wheel(serving).serves and read_wheel(serving).digest != read_wheel(one).digest
