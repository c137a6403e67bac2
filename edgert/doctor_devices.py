"""What `edgert doctor` says of devices beside the CPU: providers of ONNX Runtime, how far each is trusted, and why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edgert.device_speed import all_speeds
from edgert.devices.onnx_runtime import available
from edgert.errors import DeviceError
from edgert.findings import Finding
from edgert.verifying import Verdict, is_present, verdicts


def device_findings() -> Iterator[Finding]:
    """Providers of ONNX Runtime, with the verdicts that verification gave them, and what auto takes."""
    try:
        providers = available()
    except DeviceError:
        yield Finding(
            "devices", "ONNX Runtime", "not installed", "for devices beside the CPU: pip install edgert[onnx]"
        )
        return
    known = _newest()
    for provider in providers:
        name = f"onnx:{provider.name}"
        own = [verdict for verdict in known if name in _parts(verdict.device)]
        if not own:
            proven = "" if provider.proven else ", and edgert's own tests have not run on it"
            yield Finding("devices", name, "unverified", f"it is held against the CPU on its first use{proven}")
        for verdict in own:
            model = verdict.model.partition(" ModelConfig(")[0]
            what = f"{verdict.device} with {model}, {verdict.precision}, {verdict.runtime}, {verdict.date}"
            value = "refused" if verdict.problems else "verified"
            if not is_present(verdict):
                reason = f"{value} before it or its driver changed ({what}); held against the CPU anew on its next use"
                yield Finding("devices", name, "unverified", reason)
                continue
            remedy = "use another --device, or another version of ONNX Runtime" if verdict.problems else ""
            yield Finding("devices", name, value, f"{what}: {verdict.line}", remedy)
    for speeds in all_speeds():
        yield Finding("devices", "auto", speeds.fastest, f"for {Path(speeds.path).name}; {speeds.reason}")


def _parts(device: str) -> list[str]:
    """The providers of a device's parts, without their forms."""
    return [part.rpartition("=")[2].partition("+")[0] for part in device.split(",")]


def _newest() -> list[Verdict]:
    """The newest verdict on each device with each model: edgert's own code, or a package, was another before."""
    found: dict[tuple[str, str, str], Verdict] = {}
    for verdict in verdicts():
        found.setdefault((verdict.device, verdict.model, verdict.precision), verdict)
    return list(found.values())
