"""What a deployment has to do, as data: what is wanted, what is there, and the actions between the two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from deploy_board import MIB, size

# Room beside what is copied: compiled kernels, logs, a file that `edgert doctor` measures on; and the compiled Python
# files of an environment, as a share of its wheels' content.
SPARE_BYTES, COMPILED_SHARE = 512 * MIB, 0.35
ONLINE_BYTES = 700 * MIB  # of dependencies that the board fetches by itself, unpacked


class Action(NamedTuple):
    """One thing to do. name: env, bundle, release, switch, service or prune; n_bytes: what it takes on the drive."""

    name: str
    text: str
    n_bytes: int = 0


@dataclass(frozen=True)
class State:
    """What is on the board: names by kind, releases with what they hold, and where the links point."""

    envs: Collection[str] = ()
    models: Collection[str] = ()
    releases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    incoming: Mapping[str, int] = field(default_factory=dict)
    current: str | None = None
    previous: str | None = None
    service: str = ""  # what is not as it should be; empty: all is

    @property
    def scope(self) -> str:
        """Whose service the release in use has."""
        return str(self.releases.get(self.current or "", {}).get("scope", "none"))

    @classmethod
    def of(cls, told: Mapping[str, Any], service: str = "") -> State:
        """From the agent's answer."""
        names = ("envs", "models", "releases", "incoming", "current", "previous")
        return cls(**{name: told[name] for name in names}, service=service)


@dataclass(frozen=True)
class Wanted:
    """What is to be on the board. Ids follow from contents, so the same is never made twice."""

    env: str
    model: str  # the bundle's folder
    unit: str  # the service's file
    scope: str
    wheel_bytes: int  # of the wheels to copy
    unpacked: int  # what they become
    bundle_bytes: int

    @property
    def release(self) -> str:
        """The id of this environment with this bundle and this service."""
        return identity(self.env, self.model, self.unit, self.scope)


def identity(*parts: Any) -> str:
    """A short name that follows from contents."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def actions(state: State, wanted: Wanted) -> list[Action]:
    """What is to be done, in order; nothing, if the board is as it should be."""
    found = []
    if wanted.env not in state.envs:
        there = _there(state, f"wheels-{wanted.env}/")
        n_bytes = wanted.wheel_bytes - there + int(wanted.unpacked * (1 + COMPILED_SHARE))
        text = f"copy {_amount(wanted.wheel_bytes, there)} of wheels, make the environment {wanted.env}"
        found.append(Action("env", text, n_bytes))
    if wanted.model not in state.models:
        there = _there(state, f"{wanted.model}/")
        text = f"copy {_amount(wanted.bundle_bytes, there)} of the bundle {wanted.model}"
        found.append(Action("bundle", text, wanted.bundle_bytes - there))
    if wanted.release not in state.releases:
        text = f"verify the bundle, look at the machine, compile the kernels, measure; then release {wanted.release}"
        found.append(Action("release", text, SPARE_BYTES))
    if state.current != wanted.release:
        before = f" instead of {state.current}" if state.current else ""
        found.append(Action("switch", f"put release {wanted.release} in use{before}"))
    if wanted.scope != "none" and (state.service or state.current != wanted.release):
        reason = state.service or "it is another release's"
        found.append(Action("service", f"install the {wanted.scope} service ({reason})"))
    elif state.scope != wanted.scope:
        found.append(Action("service", f"remove the {state.scope} service of {state.current}"))
    if stale := superfluous(state, wanted.release, wanted):
        found.append(Action("prune", f"remove {', '.join(stale)}"))
    return found


def superfluous(state: State, release: str, wanted: Wanted | None = None) -> list[str]:
    """Paths below the root that nothing needs once a release is in use: all but it and the one before it."""
    before = state.current if state.current != release else state.previous
    kept = {name for name in (release, before) if name}
    used = [state.releases[name] for name in kept if name in state.releases]
    envs = {one["env"] for one in used} | ({wanted.env} if wanted else set())
    models = {one["model"] for one in used} | ({wanted.model} if wanted else set())
    coming = {f"wheels-{wanted.env}", wanted.model} if wanted else set()
    return [
        *(f"releases/{name}" for name in sorted(state.releases) if name not in kept),
        *(f"envs/{name}" for name in sorted(state.envs) if name not in envs),
        *(f"models/{name}" for name in sorted(state.models) if name not in models),
        *sorted({f"incoming/{path.partition('/')[0]}" for path in state.incoming if path.split("/")[0] not in coming}),
    ]


def room_needed(todo: Collection[Action]) -> tuple[int, str]:
    """Bytes that actions take on the drive, and what for."""
    parts = [(action.name, action.n_bytes) for action in todo if action.n_bytes > 0]
    names = {"env": "environment", "bundle": "bundle", "release": "kernels and measuring"}
    return sum(n_bytes for _, n_bytes in parts), " + ".join(f"{names[name]} {size(n)}" for name, n in parts)


def _there(state: State, prefix: str) -> int:
    """Bytes of what was copied of something already."""
    return sum(n_bytes for path, n_bytes in state.incoming.items() if path.startswith(prefix))


def _amount(n_bytes: int, there: int) -> str:
    return f"{size(n_bytes - there)}" + (f" (the rest of {size(n_bytes)})" if there else "")
