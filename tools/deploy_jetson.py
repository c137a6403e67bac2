"""Puts a packed model onto a Jetson, or another board, over SSH, and proves that it works there.

python tools/deploy_jetson.py HOST MODEL.edge                    check the board, install, copy, prove, start at boot
python tools/deploy_jetson.py HOST MODEL.edge --dry-run          say what is found and what would be done
python tools/deploy_jetson.py HOST --rollback                    go back to what was in use before

HOST is a name of ~/.ssh/config, or user@address; keys only, and its host key must be known. Needs fabric and packaging:
pip install "edgert[deploy]". Nothing in use changes until all is copied, checked and measured; a second run changes
nothing; one that was interrupted goes on where it was. Exits with 0, with 2 and one line where something is in the way.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deploy_report
import deploy_service
from deploy_board import (
    DeployError,
    Facts,
    Finding,
    Python,
    judge,
    judge_memory,
    judge_room,
    probe_command,
    read_facts,
    usual_budget,
)
from deploy_bundle import LocalBundle, find_bundle, read_bundle
from deploy_forecast import forecast
from deploy_house import WheelHouse, given_wheels
from deploy_install import Installer, change_service, put_in_use, service_state
from deploy_link import Link
from deploy_steps import State, Wanted, actions, identity, room_needed
from deploy_wheels import Target, python_of


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", metavar="HOST", help="the board: a name of ~/.ssh/config, or user@address:port")
    parser.add_argument("model", metavar="MODEL.edge", nargs="?", type=Path, help="a bundle, made by `edgert pack`")
    parser.add_argument("--dry-run", action="store_true", help="change nothing; say what would be done")
    parser.add_argument("--rollback", action="store_true", help="put the release before back in use")
    parser.add_argument("--memory", metavar="SIZE", help="what edgert may use there, such as 5GiB")
    parser.add_argument("--context", metavar="N", type=int, help="tokens of prompt and answers together")
    parser.add_argument("--cpus", metavar="N", type=int, help="processors that the service may use; all if not set")
    parser.add_argument("--ort-wheel", metavar="FILE", type=Path, help="NVIDIA's onnxruntime-gpu for this JetPack")
    parser.add_argument("--wheels", metavar="FOLDER", type=Path, help="take edgert and all else from these wheels")
    parser.add_argument("--offline", action="store_true", help="the board fetches nothing, even if it could")
    whose = "whose systemd starts it; auto: the system's where sudo asks for no password, else the user's"
    parser.add_argument("--service", choices=deploy_service.SCOPES, default="auto", help=whose)
    parser.add_argument("--folder", metavar="PATH", default="~/edgert-board", help="where on the board; ~/edgert-board")
    parser.add_argument("--any-board", action="store_true", help="also what is no Jetson, such as a Raspberry Pi")
    return parser


def main() -> int:
    """The command; its exit status."""
    parser = options()
    chosen = parser.parse_args()
    if (chosen.model is None) != chosen.rollback:
        parser.error("give MODEL.edge, or --rollback without one")
    try:
        with tempfile.TemporaryDirectory(prefix="edgert-deploy-") as scratch:
            (rollback if chosen.rollback else deploy)(chosen, Path(scratch))
    except DeployError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what is in use on the board is as it was; the same command goes on", file=sys.stderr)
        return 130
    return 0


# ---- deploying -------------------------------------------------------------------------------------------------------
def deploy(chosen: argparse.Namespace, scratch: Path) -> None:
    """All of it. DeployError: one line."""
    for path in (chosen.ort_wheel, chosen.wheels):
        if path is not None and not path.exists():
            raise DeployError(f"{path}: no such file or folder")
    find_bundle(chosen.model)
    with Link(chosen.host) as link:
        seen = look(link, chosen)
        say(chosen.host, deploy_report.findings(seen.found))
        refuse(seen.found)
        bundle = read_bundle(chosen.model, chosen.context, seen.facts.cores, _progress)
        budget, memory = judged_memory(chosen.memory, seen.facts, bundle)
        say("", deploy_report.findings([memory]))
        refuse([memory])
        expected = forecast(bundle.path, seen.facts, budget, chosen.context)
        say("", deploy_report.expectation(expected))
        installer = prepare(link, chosen, scratch, bundle, seen, budget)
        todo = actions(installer.state, installer.wanted)
        needed, what = room_needed(todo)
        room = judge_room(int(link.ask("free", path=installer.root)), needed, what)
        if needed:
            say("", deploy_report.findings([room]))
        refuse([room])
        if chosen.dry_run:
            say("would be done", deploy_report.planned(todo, _commands(installer)))
            return
        if todo:
            installer.do_all()
        else:
            installer.verify_again()
            print("nothing to do: the board is as it should be")
        report(installer, expected)


@dataclass(frozen=True)
class Look:
    """What a board is. root: the folder in full; python: the interpreter to use, None where there is none."""

    facts: Facts
    root: str
    found: tuple[Finding, ...]
    python: Python | None


def look(link: Link, chosen: argparse.Namespace) -> Look:
    """Ask a board what it is."""
    facts = read_facts(link.run(probe_command(chosen.folder)).output)
    wanted = python_of(chosen.ort_wheel) if chosen.ort_wheel else None
    found = judge(facts, any_board=chosen.any_board, wanted=wanted)
    root = f"{facts.home}/{chosen.folder[2:]}" if chosen.folder.startswith("~/") else chosen.folder
    if not root.startswith("/"):
        raise DeployError(f"--folder {chosen.folder}: write a full path, or one that starts with ~/")
    python = facts.python(wanted)
    if python:
        link.python = python.path
    return Look(facts, root.rstrip("/"), tuple(found), python)


def judged_memory(text: str | None, facts: Facts, bundle: LocalBundle) -> tuple[int, Finding]:
    """The budget in bytes, of --memory or as usual, and whether the board has it."""
    stated = memory_of(text)
    budget = stated or usual_budget(facts, bundle.whole)
    return budget, judge_memory(facts, budget, bundle.floor, stated is not None)


def memory_of(text: str | None) -> int | None:
    """Bytes of --memory. DeployError: no size, or a share."""
    from edgert.errors import OptionError
    from edgert.memory import parse_size

    if text is not None and ("%" in text or (text.startswith("0.") and text[-1].isdigit())):
        raise DeployError(f"--memory {text}: a share would be of this machine; write for example 5GiB")
    try:
        return None if text is None else parse_size(text)
    except OptionError as problem:
        raise DeployError(f"--{problem}") from problem


def refuse(found: Sequence[Finding]) -> None:
    """DeployError: something is in the way."""
    problems = [one.line for one in found if one.refused]
    if problems:
        raise DeployError(f"{problems[0]}" + (f" (and {len(problems) - 1} more, above)" if problems[1:] else ""))


def prepare(
    link: Link, chosen: argparse.Namespace, scratch: Path, bundle: LocalBundle, seen: Look, budget: int
) -> Installer:
    """What is wanted, what is there, and the hands between; nothing on the board changes."""
    facts, root, python = seen.facts, seen.root, seen.python
    assert python is not None  # judged
    told = link.ask("state", root=root)
    if not told["ours"] and not told["empty"]:
        raise DeployError(f"{link.host}: {root} holds something else; name another --folder")
    if not told["writable"]:
        raise DeployError(f"{link.host}: {facts.user} may not write to {root}; name another --folder")
    target = Target(python.version, facts.machine, facts.glibc)
    given = given_wheels(chosen.wheels, chosen.ort_wheel, scratch, target, _progress)
    offline = "as asked" if chosen.offline or chosen.wheels else ""
    house = WheelHouse(link, scratch / "house", given, target, chosen.ort_wheel, offline, _progress)
    scope = deploy_service.choose_scope(chosen.service, facts)
    deploy_service.check_folder(scope, root)
    unit = deploy_service.Unit(
        f"{root}/current", bundle.name, facts.user, budget, chosen.context, chosen.cpus, house.edgert.serves
    )
    env = identity([wheel.digest for wheel in given], house.installs, python.version, facts.machine)
    state = State.of(told, service_state(link, facts, scope, unit.text(scope)))
    if env not in state.envs:  # else no wheel is needed
        house.make(closed=chosen.wheels is not None)
    wanted = Wanted(env, bundle.folder, unit.text(scope), scope, house.size, house.unpacked, bundle.size)
    return Installer(link, root, facts, python, wanted, bundle, unit, house, state, _progress)


def _commands(installer: Installer) -> list[str]:
    """Of the service, for a person."""
    source = f"{installer.root}/current/{deploy_service.NAME}"
    scope = installer.wanted.scope
    if scope == "none":
        return []
    return [deploy_service.shown(one) for one in deploy_service.install_commands(scope, installer.facts, source)]


def report(installer: Installer, expected: Any) -> None:
    """The end: how it runs there, and how to use it."""
    wanted, link = installer.wanted, installer.link
    release = link.ask("state", root=installer.root)["releases"][wanted.release]
    say(f"on {release.get('board') or link.host}, {release['made']}", deploy_report.proofs(release, expected))
    running = deploy_service.is_running(wanted.scope, installer.facts)
    copied = installer.copied
    say(
        "",
        deploy_report.ending(
            installer.root, wanted.release, wanted.scope, running, installer.unit.serves, copied.sent, copied.kept
        ),
    )


# ---- going back ------------------------------------------------------------------------------------------------------
def rollback(chosen: argparse.Namespace, scratch: Path) -> None:
    """Put the release before in use again. DeployError: there is none."""
    with Link(chosen.host) as link:
        seen = look(link, chosen)
        facts, root = seen.facts, seen.root
        if seen.python is None:
            raise DeployError(f"{link.host}: it has no Python that could have run edgert: nothing was deployed there")
        told = link.ask("state", root=root)
        before, now = told["previous"], told["current"]
        if before is None or before not in told["releases"]:
            raise DeployError(f"{link.host}: there is no release before {now or 'the first'} in {root}")
        scope, scope_now = (told["releases"].get(name, {}).get("scope", "none") for name in (before, now))
        if chosen.dry_run:
            print(
                f"would put {before} in use instead of {now}" + f", and restart the {scope} service" * (scope != "none")
            )
            return
        link.hold(root)
        put_in_use(link, root, before, now)
        try:
            change_service(link, facts, root, scope_now, scope)
        except DeployError:
            with contextlib.suppress(DeployError):  # of a connection that is lost
                put_in_use(link, root, now, before)
                change_service(link, facts, root, scope, scope_now)
            raise
        print(f"release {before} is in use again, {now} is the one before; --rollback again returns to it")


# ---- telling ---------------------------------------------------------------------------------------------------------
def say(title: str, lines: Iterator[str]) -> None:
    """A block of the report."""
    _end_progress()
    if title:
        print(f"== {title}")
    for line in lines:
        print(line, flush=True)


_last = [""]
_drawn = [0.0]


def _progress(what: str, fraction: float) -> None:
    """What goes on: one line that changes on a terminal, a line for each stage elsewhere."""
    stage = what.partition(",")[0]
    if sys.stderr.isatty():
        if time.monotonic() - _drawn[0] > 0.2 or stage != _last[0]:
            print(f"\r\x1b[K{what}" + f" {fraction:.0%}" * (fraction > 0), end="", file=sys.stderr, flush=True)
            _drawn[0] = time.monotonic()
    elif stage != _last[0]:
        print(stage, file=sys.stderr, flush=True)
    _last[0] = stage


def _end_progress() -> None:
    if sys.stderr.isatty() and _last[0]:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    _last[0] = ""


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
