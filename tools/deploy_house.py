"""The wheels of one deployment: those given, pip's own, and all dependencies where the board cannot fetch them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deploy_board import DeployError
from deploy_bundle import Progress
from deploy_link import Link
from deploy_steps import ONLINE_BYTES
from deploy_wheels import Target, Wheel, build_edgert, check_wheel, fetch, lacking, read_wheel

_INDEX = "https://pypi.org/simple/pip/"


def given_wheels(
    folder: Path | None, ort_wheel: Path | None, scratch: Path, target: Target, progress: Progress
) -> list[Wheel]:
    """Wheels that decide what the environment is: edgert's, built now, or all of a folder; and NVIDIA's.

    DeployError: one is not for the board, or edgert's is not there.
    """
    paths = [ort_wheel] if ort_wheel else []
    paths += sorted(folder.glob("*.whl")) if folder else []
    for path in paths:  # before anything is built
        check_wheel(path, target)
    if folder is None:
        progress("building edgert's wheel", 0.0)
        scratch.joinpath("built").mkdir()
        paths.append(build_edgert(scratch / "built"))
    wheels = [read_wheel(path) for path in paths]
    if not any(wheel.name == "edgert" for wheel in wheels):
        raise DeployError(f"{folder} holds no wheel of edgert; make one with: pip wheel --no-deps .")
    return wheels


class WheelHouse:
    """What goes to the board. installs: what pip is asked for there; a wheel by its file's name."""

    def __init__(
        self,
        link: Link,
        folder: Path,
        given: Sequence[Wheel],
        target: Target,
        ort_wheel: Path | None,
        offline: str,
        progress: Progress,
    ) -> None:
        self._link, self._folder, self._given, self._target = link, folder, given, target
        self._progress, self._why = progress, offline
        self.edgert = next(wheel for wheel in given if wheel.name == "edgert")
        extra = "[server]" if self.edgert.serves else ""
        self._asked = [f"edgert{extra}", "pip", *(["onnx"] if ort_wheel else [])]
        self.installs = [self.edgert.path.name + extra, *self._asked[1:]]
        if ort_wheel:
            self._asked.append(next(wheel.name for wheel in given if wheel.path == ort_wheel))
            self.installs.append(ort_wheel.name)
        self.offline = bool(offline)
        self.size = self.unpacked = 0

    def make(self, *, closed: bool = False) -> None:
        """Ask the board for its network, and fetch what it cannot. closed: nothing but the given wheels.

        DeployError: a wheel is missing, or is for something else.
        """
        self._folder.mkdir()
        self._why = self._why or self._link.ask("network", url=_INDEX)
        self.offline = bool(self._why)
        if closed and (missing := lacking(self._given, self._asked, self._target)):
            raise DeployError(f"--wheels lacks {', '.join(missing)} for {self._target}")
        what = f"all that it needs, for the board has no network ({self._why})" if self.offline else "pip"
        self._progress(f"fetching {what}", 0.0)
        asked = self._asked if self.offline else ["pip"]
        fetch(asked, [wheel.path for wheel in self._given], self._target, self._folder)
        wheels = []
        for path in self.files():
            check_wheel(path, self._target)
            wheels.append(read_wheel(path))
        self.size = sum(wheel.path.stat().st_size for wheel in wheels)
        self.unpacked = sum(wheel.unpacked for wheel in wheels) + (0 if self.offline else ONLINE_BYTES)

    def files(self) -> list[Path]:
        """All of them, the small ones first."""
        return sorted(self._folder.glob("*.whl"), key=lambda path: path.stat().st_size)
