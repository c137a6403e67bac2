"""Trust in a device, earned once: on first use its graphs are held against the CPU device, and the verdict is kept.

One JSON file a verdict in the user's cache folder, by what could change it: device, versions, driver, model, precision,
and edgert's own code for it.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from edgert.devices.onnx_runtime import Settings, runtime
from edgert.devices.selection import Selection
from edgert.devices.split import SplitDevice
from edgert.devices.verification import (
    NOTED_TOKENS,
    PROMPT_TOKENS,
    RANDOM_ROWS,
    Findings,
    Source,
    Step,
    compare,
)
from edgert.engine import Engine, Session
from edgert.errors import DeviceError
from edgert.quant import jit
from edgert.storage.aside import written_aside
from edgert.types import Floats
from edgert.weights import Progress

# Plain prose: where a model is sure of what it has learnt by heart, rounding alone moves its predictions tenfold.
PROMPT = """To make bread, you need only four things: flour, water, salt, and yeast. First, mix the yeast with a little
warm water and wait for ten minutes until it begins to foam. Then put the flour and the salt in a large bowl, add the
yeast and the rest of the water, and stir until all of the flour is wet. Turn the dough out onto a table and knead it
for ten minutes, until it is smooth and elastic. Put it back in the bowl, cover it with a cloth, and let it rise in a
warm place for about an hour, until it has doubled in size. Then shape it into a loaf, place it in a pan, cover it
again, and let it rise for another half hour. While the dough is rising, heat the oven. Bake the bread for thirty to
forty minutes, until the top is golden brown.""".replace("\n", " ")
# Of several kinds: what values a device rounds to is seen on it.
RANGES_TEXT = """In 1969 the first message crossed a network of four computers; of "login", only two letters arrived.
def area(radius: float) -> float: return 3.14159 * radius ** 2  # in square metres
Water boils at 100 degrees Celsius at sea level, and at about 93 on a mountain of 2,000 metres. Why is that?
Hello! Can you help me plan a trip to Lisbon? Of course: how many days do you have, and what do you like to eat?
{"name": "Ada", "age": 36, "tags": ["a", "b"], "ok": true} Er sagte nichts. Elle est partie hier soir. 12 + 30 = 42."""
_MOST_NAMED = 3  # kinds of nodes that another provider ran, in an error
_FLOAT32 = 1e-5  # most that a product of float32 may be off; of TF32 and fp16 it is some 3e-4, of bf16 2e-3
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-qnn")
_DRIVERS = ("/proc/driver/nvidia/version", "/etc/nv_tegra_release")


@dataclass(frozen=True)
class Verdict:
    """What verification found of a device with a model. errors: shares by kind of graph. fallen: operators that another
    provider ran. product_error: of a product of float32. problems: why the device is not trusted; empty if it is."""

    device: str
    runtime: str
    driver: str
    model: str
    precision: str
    date: str
    errors: dict[str, float]
    divergence: float
    fallen: dict[str, int]
    product_error: float
    problems: tuple[str, ...]

    @property
    def line(self) -> str:
        """The figures in a line."""
        if self.problems:
            return "; ".join(self.problems)
        kind, worst = max(self.errors.items(), key=lambda one: one[1], default=("graphs", 0.0))
        return f"largest error {100 * worst:.2g} % ({kind}), predictions diverge by {self.divergence:.1e} nats a token"


def folder() -> Path:
    """$XDG_CACHE_HOME/edgert/verdicts, or ~/.cache/edgert/verdicts; RuntimeError for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgert" / "verdicts"


def verdicts() -> Iterator[Verdict]:
    """All that are kept, the newest first; what is damaged is left out."""
    found = []
    with contextlib.suppress(OSError, RuntimeError):
        for path in folder().glob("*.json"):
            verdict = _read(path)
            if verdict is not None:
                found.append((path.stat().st_mtime_ns, verdict))
    yield from (verdict for _, verdict in sorted(found, key=lambda one: one[0], reverse=True))


def is_trusted(device: str) -> bool:
    """Whether a device was verified with what is installed now, on some model, and not refused since."""
    with contextlib.suppress(DeviceError):  # nothing is installed, or no longer
        runtime()
        return next((not one.problems for one in verdicts() if one.device == device and is_present(one)), False)
    return False


def is_present(verdict: Verdict) -> bool:
    """Whether a verdict is about what is installed now. DeviceError where nothing is."""
    return (verdict.runtime, verdict.driver) == (runtime_version(), _driver())


def _read(path: Path) -> Verdict | None:
    try:
        document = json.loads(path.read_text())
        return Verdict(**(document | {"problems": tuple(document["problems"])}))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def runtime_version() -> str:
    """The package of ONNX Runtime that is installed, and its version."""
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return f"onnxruntime {runtime().__version__}"  # built by hand


def _driver() -> str:
    """The first line of what the system says of an NVIDIA driver or a Jetson's release; empty elsewhere."""
    for name in _DRIVERS:
        with contextlib.suppress(OSError):
            return Path(name).read_text().partition("\n")[0]
    return ""


def _code() -> str:
    """A digest of edgert's own code for graphs, and of what holds them against the CPU device."""
    from edgert import devices

    digest, folder_of_devices = hashlib.sha256(), Path(next(iter(devices.__path__)))
    for path in (*sorted(folder_of_devices.glob("onnx_*.py")), folder_of_devices / "verification.py", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def installed(device: str) -> list[str]:
    """What a device's answers and speed hang on beside model and options: edgert's code, and ONNX Runtime if used.

    DeviceError where a device needs ONNX Runtime and nothing is installed.
    """
    return [jit.source_stamp(), *((runtime_version(), _driver(), _code()) if "onnx:" in device else ())]


def key_of(*facts: object) -> str:
    """The name of a file that is kept by these facts, 32 hexadecimal digits."""
    return hashlib.sha256("\n".join(map(str, facts)).encode(errors="surrogateescape")).hexdigest()[:32]


class Verifier:
    """Verifies one model on one device, or finds that this was done before."""

    def __init__(
        self, selection: Selection, model: str, formats: Sequence[str], *, kv_type: str, activations: str
    ) -> None:
        self._selection, self._kv_type, self._activations = selection, kv_type, activations
        self._verdict = Verdict(
            device=selection.name,
            runtime=runtime_version(),
            driver=_driver(),
            model=model,
            precision=f"{activations} inputs, {kv_type} cache",
            date=datetime.date.today().isoformat(),
            errors={},
            divergence=0.0,
            fallen={},
            product_error=0.0,
            problems=(),
        )
        self._key = key_of(selection.name, model, *formats, kv_type, activations, *installed(selection.name))

    def kept(self) -> Verdict | None:
        """The verdict that was found before, if it is kept."""
        with contextlib.suppress(RuntimeError):
            return _read(folder() / f"{self._key}.json")
        return None

    def ensure(
        self, engine: Engine, session: Session, source: Source, tokens: list[int], threads: int | None, report: Progress
    ) -> Verdict:
        """The verdict, found now if it is not kept. DeviceError: the device is not to be trusted, and not forced."""
        kept = self.kept()
        verdict = kept or self._verify(engine, session, source, tokens, threads, report)
        if kept is None:
            self._keep(verdict)
        if verdict.problems and not self._selection.forced:
            raise DeviceError(
                f"{verdict.device} ({verdict.runtime}) is not to be trusted with this model: {verdict.line}; "
                f"use another --device, or --device {verdict.device}! to use it all the same"
            )
        return verdict

    def _verify(
        self, engine: Engine, session: Session, source: Source, tokens: list[int], threads: int | None, report: Progress
    ) -> Verdict:
        device, stage = engine.device, f"verifying {self._selection.name} against the CPU, once"
        assert isinstance(device, SplitDevice)
        report(stage, 0.0)
        room = session.cache.n_context
        prompt = engine.embed(tokens[: min(PROMPT_TOKENS, room)])
        rows = min(RANDOM_ROWS, room), engine.config.d_model
        random = np.random.default_rng(20).standard_normal(rows, dtype=np.float32)
        texts = [_seen(engine, device, session, prompt), _seen(engine, device, session, random)]
        found = compare(
            texts,
            engine.config,
            source,
            kv_type=self._kv_type,
            activations=self._activations,
            threads=threads,
            attention=self._selection.attention != "cpu",
            progress=lambda fraction: report(stage, fraction),
        )
        return self._judged(found, _fallen(device.settings), max(map(_product_error, device.settings)))

    def _judged(self, found: Findings, fallen: dict[str, int], product_error: float) -> Verdict:
        problems = found.problems(self._activations)
        if not product_error <= _FLOAT32:
            problems.append(f"products of float32 are off by {product_error:.1g}: it computes in fewer bits than asked")
        if fallen:
            most = sorted(fallen.items(), key=lambda one: -one[1])[:_MOST_NAMED]
            counted = ", ".join(f"{count} of {name}" for name, count in most)
            more = f", and {len(fallen) - len(most)} other kinds" if len(fallen) > len(most) else ""
            problems.append(f"it leaves nodes to another provider: {counted}{more}")
        return replace(
            self._verdict,
            errors=found.errors,
            divergence=found.divergence,
            fallen=fallen,
            product_error=product_error,
            problems=tuple(problems),
        )

    def _keep(self, verdict: Verdict) -> None:
        """Write the verdict; a folder that cannot be written means that it is found again next time."""
        with contextlib.suppress(OSError, RuntimeError):
            folder().mkdir(mode=0o700, parents=True, exist_ok=True)
            with written_aside(folder() / f"{self._key}.json") as aside:
                aside.write_text(json.dumps(asdict(verdict), indent=1))


def _seen(engine: Engine, device: SplitDevice, session: Session, rows: Floats) -> list[Step]:
    """Run rows (n, d_model) as a text of their own: a chunk and a single one that are noted, the rest in chunks."""
    noted = min(len(rows), NOTED_TOKENS)
    starts = [0, noted - 1, *range(noted, len(rows), device.chunk)] if noted > 1 else [0]
    steps: list[Step] = []
    embed = engine.embed
    session.tokens.clear()
    try:
        for part in np.split(rows, starts[1:]):
            engine.embed = lambda ids, part=part: part  # type: ignore[misc]   # bound early
            device.witness = [] if len(session.tokens) < noted else None
            engine.step([0] * len(part), session)
            layers, device.witness = device.witness or [], None
            last = device.state() if layers else part
            steps.append(Step(part, layers, last, np.concatenate([made.copy() for made in engine.logits(len(part))])))
    finally:
        engine.embed, device.witness = embed, None
        session.tokens.clear()
    return steps


def _product_error(settings: Settings) -> float:
    from edgert.devices.onnx_placement import product_error

    return product_error(settings)


def _fallen(settings: Sequence[Settings]) -> dict[str, int]:
    from edgert.devices.onnx_placement import fallen

    found: dict[str, int] = {}
    for one in settings:
        for name, count in fallen(sorted(one.graphs), one).items():
            found[name] = found.get(name, 0) + count
    return found
