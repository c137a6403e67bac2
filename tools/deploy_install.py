"""Doing what deploy_steps.py lists. What is in use changes last, by one link, and goes back if the service fails."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import deploy_service
from deploy_board import DeployError, Facts, Python, plain
from deploy_bundle import LocalBundle, LocalFile, Progress, local_file
from deploy_copy import Copied, copy_files
from deploy_forecast import GENERATE, PROMPT
from deploy_house import WheelHouse
from deploy_link import Link, LostConnectionError, Ran
from deploy_service import Unit, active_command, is_running, start_command, stop_command
from deploy_steps import Action, State, Wanted, actions, superfluous

_LONG_S = 3 * 3600.0  # a first compilation on an emulated or a very small board
_ENV = {
    "PIP_NO_INPUT": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PYTHONNOUSERSITE": "1",
    "LC_ALL": "C.UTF-8",
    "NO_COLOR": "1",
    "COLUMNS": "200",
}
_CHECK = "import edgert.model, numba, numpy, tokenizers; print('sound')"
_SETTLES_S = 3.0  # after which a service that was started counts as running


@dataclass
class Installer:
    """Brings one board to what is wanted. proofs: what was found on the way, for the report."""

    link: Link
    root: str
    facts: Facts
    python: Python
    wanted: Wanted
    bundle: LocalBundle
    unit: Unit
    house: WheelHouse
    state: State
    progress: Progress
    proofs: dict[str, Any] = field(default_factory=dict)
    copied: Copied = field(default_factory=Copied)
    resting: list[str] = field(default_factory=list)  # stops the service in use; the board starts it again

    def do_all(self) -> None:
        """Bring the board to what is wanted, alone. DeployError: what failed; what is in use is as it was."""
        now = State.of(self.link.ask("state", root=self.root))
        scope = now.scope
        running = is_running(scope, self.facts) and self.link.run(active_command(scope, self.facts)).status == 0
        self.link.hold(self.root, start_command(scope, self.facts) if running else ())
        self.resting = stop_command(scope, self.facts) if running else []
        self.link.ask("begin", root=self.root)
        broken = service_state(self.link, self.facts, self.wanted.scope, self.wanted.unit)
        self.state = State.of(self.link.ask("state", root=self.root), broken)
        for action in actions(self.state, self.wanted):
            self.do(action)

    def verify_again(self) -> None:
        """Whether the bundle in use is still sound; reads only. DeployError: it is not."""
        told = self.edgert("verify", f"{self.root}/models/{self.wanted.model}", "--json", failing=True)
        if not told.get("sound"):
            problems = "; ".join(told.get("problems", ["it says nothing"])[:2])
            raise DeployError(
                f"{self.link.host}: the bundle in use is damaged ({problems}); see to its drive, remove "
                f"{self.root}/models/{self.wanted.model} there and run again"
            )

    def do(self, action: Action) -> None:
        """One action. DeployError: it failed, and what is in use is as it was."""
        {
            "env": self.make_env,
            "bundle": self.copy_bundle,
            "release": self.make_release,
            "switch": self.switch,
            "service": self.change_service,
            "prune": self.prune,
        }[action.name]()

    # ---- the environment ---------------------------------------------------------------------------------------------
    def make_env(self) -> None:
        """A virtual environment with edgert in it, whole or not at all."""
        house = f"{self.root}/incoming/wheels-{self.wanted.env}"
        wheels = [local_file(path, path.name) for path in self.house.files()]
        self._copy(wheels, house)
        env = f"{self.root}/envs/{self.wanted.env}"
        with self._removed_if_it_fails(env):
            self.progress("making the environment", 0.0)
            self._run([self.python.path, "-m", "venv", "--without-pip", "--clear", env], "making the environment")
            pip = next(f"{house}/{file.name}/pip" for file in wheels if file.name.startswith("pip-"))
            wanted = [f"{house}/{name}" if ".whl" in name else name for name in self.house.installs]
            index = ["--no-index"] if self.house.offline else []
            command = [f"{env}/bin/python", pip, "install", "--quiet", *index, "--find-links", house, *wanted]
            self._run(command, "installing the wheels")
            self._run([f"{env}/bin/python", "-c", _CHECK], "importing edgert")
            listed = self._run([f"{env}/bin/python", "-m", "pip", "list", "--format=json"], "listing what is installed")
            versions = {one["name"]: one["version"] for one in json.loads(listed.output.strip().splitlines()[-1])}
            self.link.ask("write", path=f"{env}/complete.json", text=json.dumps(versions, indent=1) + "\n")
        self.link.ask("remove", paths=[house])

    # ---- the bundle --------------------------------------------------------------------------------------------------
    def copy_bundle(self) -> None:
        """All files of the bundle, in place when the last is there."""
        coming = f"{self.root}/incoming/{self.wanted.model}"
        self._copy(self.bundle.files, coming)
        self.link.ask("publish", source=coming, target=f"{self.root}/models/{self.wanted.model}")

    def _copy(self, files: Sequence[LocalFile], folder: str) -> None:
        total, done, began = max(sum(file.size for file in files), 1), 0, time.monotonic()

        def told(name: str, n_bytes: int) -> None:
            nonlocal done
            done += n_bytes
            self.progress(f"copying {name}, {done / (time.monotonic() - began + 0.01) / 1e6:.0f} MB/s", done / total)

        result = copy_files(self.link, files, folder, told)
        self.copied = Copied(self.copied.sent + result.sent, self.copied.kept + result.kept)

    # ---- the release -------------------------------------------------------------------------------------------------
    def make_release(self) -> None:
        """Prove that bundle and environment work together here; then they are a release."""
        folder = f"{self.root}/releases/{self.wanted.release}"
        with self._removed_if_it_fails(folder):
            self.link.ask("remove", paths=[folder])
            self.link.ask("cut", sizes={f"{folder}/{deploy_service.NAME}": 0})
            self.link.ask("link", path=f"{folder}/env", target=f"../../envs/{self.wanted.env}")
            self.link.ask("link", path=f"{folder}/model.edge", target=f"../../models/{self.wanted.model}")
            self.link.ask("write", path=f"{folder}/{deploy_service.NAME}", text=self.wanted.unit)
            self.prove()
            told = {
                "env": self.wanted.env,
                "model": self.wanted.model,
                "scope": self.wanted.scope,
                "unit": self.wanted.unit,
                "board": self.facts.model,
                "l4t": self.facts.l4t,
                "made": time.strftime("%Y-%m-%d %H:%M:%S"),
                "proofs": self.proofs,
            }
            self.link.ask("write", path=f"{folder}/release.json", text=json.dumps(told, indent=1) + "\n")

    def prove(self) -> None:
        """verify, doctor, warm-up and bench, as the board does them."""
        bundle, options = f"{self.root}/models/{self.wanted.model}", self.unit.options
        if self.resting:  # there may not be memory for both
            self.progress("stopping the service for a while", 0.0)
            self.link.run(self.resting)
        verified = self.edgert("verify", bundle, "--json", failing=True)
        if not verified.get("sound"):
            self.link.ask("remove", paths=[bundle])
            problems = "; ".join(verified.get("problems", ["it says nothing"])[:2])
            raise DeployError(f"{self.link.host}: the bundle is damaged there ({problems}); it was removed: run again")
        self.proofs["verify"] = verified
        self.proofs["doctor"] = self.edgert("doctor", bundle, "--json")
        self.proofs["warmup"] = self.edgert("warmup", bundle, *options, "--json")
        sizes = ["--prompt", str(PROMPT), "--generate", str(GENERATE), "--repetitions", "3"]
        self.proofs["bench"] = self.edgert("bench", bundle, *options[:2], *sizes, "--json")

    def edgert(self, *words: str, failing: bool = False) -> dict[str, Any]:
        """What a command of the new environment prints as JSON. failing: its answer counts whatever its status."""
        self.progress(f"edgert {words[0]} on the board", 0.0)
        ran = self.link.run_watched(
            [f"{self.root}/envs/{self.wanted.env}/bin/edgert", *words], timeout=_LONG_S, env=_ENV
        )
        lines = ran.output.strip()
        with contextlib.suppress(ValueError):
            if failing or ran.status == 0:
                return {**plain(json.loads(lines[lines.index("{") :])), "took_s": round(ran.seconds, 1)}
        raise self._failed(f"edgert {words[0]}", ran)

    # ---- what is in use ----------------------------------------------------------------------------------------------
    def switch(self) -> None:
        """Let `current` point to the release, and `previous` to what it pointed to."""
        put_in_use(self.link, self.root, self.wanted.release, self.state.current)

    def change_service(self) -> None:
        """Put the unit in place and start it; if it does not run, what was before comes back."""
        try:
            change_service(self.link, self.facts, self.root, self.state.scope, self.wanted.scope)
        except LostConnectionError:
            raise
        except DeployError as problem:
            self._back()
            raise DeployError(f"{problem}; what was in use before is in use again") from problem

    def _back(self) -> None:
        """As before the switch."""
        before, earlier = self.state.current, self.state.previous
        if before == self.wanted.release:
            return
        self.link.ask("link", path=f"{self.root}/current", target=before and f"releases/{before}")
        self.link.ask("link", path=f"{self.root}/previous", target=earlier and f"releases/{earlier}")
        with contextlib.suppress(DeployError):
            change_service(self.link, self.facts, self.root, self.wanted.scope, self.state.scope)

    def prune(self) -> None:
        """Remove what neither this release nor the one before needs."""
        stale = superfluous(self.state, self.wanted.release, self.wanted)
        self.link.ask("remove", paths=[f"{self.root}/{path}" for path in stale])

    # ---- within ------------------------------------------------------------------------------------------------------
    def _run(self, argv: list[str], what: str) -> Ran:
        ran = self.link.run_watched(argv, timeout=_LONG_S, env=_ENV)
        if ran.status:
            raise self._failed(what, ran)
        return ran

    def _failed(self, what: str, ran: Ran) -> DeployError:
        words = ran.last_words
        if "No space left" in ran.errors + ran.output or "Errno 28" in ran.errors + ran.output:
            words = "the drive is full; free some room, or name a --folder on another drive"
        return DeployError(f"{self.link.host}: {what} failed: {words}")

    @contextlib.contextmanager
    def _removed_if_it_fails(self, path: str) -> Iterator[None]:
        """Leave nothing half made; where the connection is lost, the next deployment removes it."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(DeployError):
                self.link.ask("remove", paths=[path])
            raise


def put_in_use(link: Link, root: str, release: str, before: str | None) -> None:
    """Switch to a release in one step; `previous` first, so that there is always a way back."""
    if before is not None and before != release:
        link.ask("link", path=f"{root}/previous", target=f"releases/{before}")
    link.ask("link", path=f"{root}/current", target=f"releases/{release}")


def start_service(link: Link, facts: Facts, scope: str, source: str) -> None:
    """Install and start a unit. DeployError: a command failed, or the service does not stay."""
    for command in deploy_service.install_commands(scope, facts, source):
        ran = link.run(command, timeout=1200)
        if ran.status and "reset-failed" not in command:
            raise DeployError(f"{link.host}: {deploy_service.shown(command)} failed: {ran.last_words}")
    if deploy_service.is_running(scope, facts):
        time.sleep(_SETTLES_S)
        ran = link.run(deploy_service.active_command(scope, facts))
        if ran.output.strip() != "active":
            raise DeployError(f"{link.host}: {deploy_service.NAME} is {ran.output.strip()}: see journalctl -u edgert")


def change_service(link: Link, facts: Facts, root: str, before: str, scope: str) -> None:
    """From one release's service to another's: of the system, of the user, or none."""
    if before not in ("none", scope):
        for command in deploy_service.remove_commands(before, facts):
            link.run(command)
    if scope != "none":
        start_service(link, facts, scope, f"{root}/current/{deploy_service.NAME}")


def service_state(link: Link, facts: Facts, scope: str, unit: str) -> str:
    """What is not as it should be with the service; empty if all is."""
    if scope == "none":
        return ""
    if link.ask("read", path=deploy_service.unit_path(scope, facts)) != unit:
        return "its unit is not there, or another"
    if link.run(deploy_service.enabled_command(scope, facts)).output.strip() != "enabled":
        return "it is not enabled"
    if deploy_service.is_running(scope, facts):
        if link.run(deploy_service.active_command(scope, facts)).output.strip() != "active":
            return "it does not run"
    return ""
