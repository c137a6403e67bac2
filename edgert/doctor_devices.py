"""What `edgert doctor` says of devices beside the CPU: providers of ONNX Runtime, how far each is trusted, and why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edgert.device_speed import all_speeds
from edgert.devices.onnx_runtime import available
from edgert.errors import DeviceError
from edgert.findings import Finding
from edgert.verifying import verdicts


def device_findings() -> Iterator[Finding]:
    """Providers of ONNX Runtime, with the verdicts that verification gave them, and what auto takes."""
    try:
        providers = available()
    except DeviceError:
        yield Finding(
            "devices", "ONNX Runtime", "not installed", "for devices beside the CPU: pip install edgert[onnx]"
        )
        return
    known = list(verdicts())
    for provider in providers:
        name = f"onnx:{provider.name}"
        own = [verdict for verdict in known if name in verdict.device]
        if not own:
            proven = "" if provider.proven else ", and edgert's own tests have not run on it"
            yield Finding("devices", name, "unverified", f"it is held against the CPU on its first use{proven}")
        for verdict in own:
            model = verdict.model.partition(" ModelConfig(")[0]
            what = f"{verdict.device} with {model}, {verdict.precision}, {verdict.runtime}, {verdict.date}"
            value = "refused" if verdict.problems else "verified"
            remedy = "use another --device, or another version of ONNX Runtime" if verdict.problems else ""
            yield Finding("devices", name, value, f"{what}: {verdict.line}", remedy)
    for speeds in all_speeds():
        yield Finding("devices", "auto", speeds.fastest, f"for {Path(speeds.path).name}; {speeds.reason}")
