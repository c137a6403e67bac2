"""What a person reads of a deployment: what was found, what is done, how it runs there, beside what was planned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from deploy_board import Finding, size
from deploy_forecast import PROMPT, Forecast, compared, figure
from deploy_steps import Action

_WIDTH = 14


def findings(found: Iterable[Finding]) -> Iterator[str]:
    """A line for each finding, with what is in the way below it."""
    for one in found:
        yield f"  {one.name:<{_WIDTH}}{_plain(one.value)}"
        if one.problem:
            yield f"  {'':<{_WIDTH}}{'REFUSED: ' if one.refused else '-> '}{_plain(one.line)}"


def expectation(expected: Forecast) -> Iterator[str]:
    """The forecast, before anything is copied."""
    if expected.reason:
        yield f"  {'plan':<{_WIDTH}}none: {_plain(expected.reason)}"
        return
    rate, first = expected.tokens_per_s, expected.ttft_s
    ends = f"{figure(min(rate))} to {figure(max(rate))}"
    text = f"{figure(rate[1])} tokens a second ({ends}), first token of {PROMPT} after {figure(first[1])} s"
    yield f"  {'plan':<{_WIDTH}}{text}, bound by {expected.bound} ({expected.board})"


def planned(todo: Sequence[Action], commands: Sequence[str] = ()) -> Iterator[str]:
    """What would be done, in order."""
    if not todo:
        yield "nothing to do: the board is as it should be"
        return
    for place, action in enumerate(todo, 1):
        yield f"  {place}. {action.text}"
        if action.name == "service":
            yield from (f"       {command}" for command in commands)


def proofs(release: Mapping[str, Any], expected: Forecast) -> Iterator[str]:
    """What verify, doctor, warm-up and bench said on the board."""
    told = release.get("proofs", {})
    if "verify" in told:
        yield f"  {'verify':<{_WIDTH}}sound, in {told['verify']['took_s']:.0f} s"
    if "doctor" in told:
        yield from _doctor(told["doctor"])
    if "warmup" in told:
        warm = told["warmup"]
        counts = f"{warm['compiled']} kernels compiled, {warm['found']} found"
        yield f"  {'warmup':<{_WIDTH}}{counts}, in {warm['took_s']:.0f} s"
    for line in compared(expected.as_dict(), told.get("bench", {})):
        yield f"  {'bench':<{_WIDTH}}{_plain(line)}"


def _doctor(told: Mapping[str, Any]) -> Iterator[str]:
    """Flash as it was measured, and the findings that ask for something."""
    chosen = told.get("settings", {})
    rate = chosen.get("bytes_per_s") or 0.0
    lanes, chunk = chosen.get("lanes"), chosen.get("chunk_bytes") or 0
    yield f"  {'doctor':<{_WIDTH}}flash reads {rate / 1e9:.2f} GB/s with {lanes} lanes of {chunk >> 10} KiB"
    for finding in told.get("findings", ()):
        if finding.get("remedy"):
            said = f"{finding['name']}: {finding['value']} {finding.get('reason', '')} -> {finding['remedy']}"
            yield f"  {'':<{_WIDTH}}{_plain(said)}"


def ending(root: str, release: str, scope: str, running: bool, serves: bool, sent: int, kept: int) -> Iterator[str]:
    """Where it is, and how to use it."""
    if sent or kept:
        there = f", {size(kept)} were there" if kept else ""
        yield f"  {'copied':<{_WIDTH}}{size(sent)}{there}"
    if scope == "none":
        yield f"  {'service':<{_WIDTH}}none"
    else:
        state = "running" if running else "enabled, not started: systemd does not run there now"
        does = "serves" if serves else "readies the model at boot; this edgert has no `edgert serve`"
        yield f"  {'service':<{_WIDTH}}edgert.service ({scope}): {state}; {does}"
        if scope == "user":
            yield f"  {'':<{_WIDTH}}-> it starts at boot, not only at login, after: sudo loginctl enable-linger"
    yield f"  {'in use':<{_WIDTH}}release {release}"
    yield f"  {'to chat':<{_WIDTH}}{root}/current/env/bin/edgert chat {root}/current/model.edge"


def _plain(text: str) -> str:
    """Without what a board could do to a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
