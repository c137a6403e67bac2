"""A report: what a profile knows of a model, alone or packed, as one HTML page that needs no network."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from edgert import report_bits, report_routing, report_runtime
from edgert.errors import StorageError
from edgert.experts.profile import Profile
from edgert.report_loss import Loss, loss_curve, proof_of
from edgert.report_numbers import hot_share, replayed
from edgert.report_page import Fact, Section, page
from edgert.report_speed import Machine, this_machine
from edgert.report_subject import Subject, open_subject
from edgert.report_svg import require_matplotlib
from edgert.report_words import count, increase, per_cent, rise, shorten, size
from edgert.storage.aside import written_aside

Progress = Callable[[str, float], None]


def write_report(path: Path, out: Path | None = None, progress: Progress = lambda stage, fraction: None) -> Path:
    """Write the report on a profile or a bundle to `out`, by default NAME.report.html beside it; where it was written.

    ModelFileError for what is neither, or damaged; UnsupportedError without matplotlib; StorageError if it cannot be
    written.
    """
    require_matplotlib()
    out = default_out(path) if out is None else out
    progress("reading the profile", 0.0)
    subject = open_subject(path)
    with _published(out) as aside:
        progress("measuring this machine", 0.05)
        machine = this_machine(path, int(subject.record_bytes.max()))
        aside.write_text(render(subject, machine, progress), encoding="utf-8")
    return out


@contextlib.contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A file to write that takes the place of `out` at the end; StorageError, at once, where none can be written."""
    try:
        with written_aside(out) as aside:
            aside.touch()
            yield aside
    except OSError as error:
        raise StorageError(f"{out} cannot be written ({error.strerror or error}); name another file with -o") from error


def default_out(path: Path) -> Path:
    """NAME.report.html beside NAME.profile.npz or NAME.edge."""
    path = path.resolve()
    name = path.name.removesuffix(".npz").removesuffix(".profile").removesuffix(".edge")
    return path.with_name(f"{name}.report.html")


def render(subject: Subject, machine: Machine, progress: Progress = lambda stage, fraction: None) -> str:
    """The page as text: the same for the same subject and machine."""
    profile = subject.profile
    found = replayed(profile, subject.record_bytes, lambda stage, fraction: progress(stage, 0.1 + 0.6 * fraction))
    progress("weighing bits against loss", 0.7)
    loss = loss_curve(subject)
    progress("drawing", 0.8)
    speed, facts = report_runtime.what_memory_gives(subject, found, machine)
    sections = [
        report_routing.maps(profile),
        report_routing.skew(profile),
        report_routing.transfer(profile),
        report_routing.reused(profile),
        report_routing.pairs(profile),
        report_runtime.policies(found),
        report_runtime.recall(profile.layers, profile.recall),
        speed,
        *_bits(subject, loss),
    ]
    kind = "bundle" if subject.bundle is not None else "profile"
    subtitle = (
        f"What {count(profile.n_tokens, 'token')} of text showed of its experts; from the {kind} {subject.path.name}"
    )
    footer = (
        f"Written by edgert {importlib.metadata.version('edgert')}. This file is complete in itself: it loads nothing "
        "from anywhere."
    )
    kept = [section for section in sections if section is not None]
    return page(subject.name, subtitle, [*_facts(subject, loss), *facts], kept, footer)


def _bits(subject: Subject, loss: Loss | None) -> list[Section | None]:
    """What is known of bits: by sensitivity, by measuring, and by the bundle."""
    found, measured = list[Section | None](), proof_of(subject)
    if loss is not None:
        found.append(report_bits.loss(subject, loss, measured))
    if measured is not None:
        found.append(report_bits.proof(measured, loss.chosen if loss is not None else None))
    bits = subject.bits() if loss is None else loss.bits
    return found if bits is None else [*found, report_bits.bits(subject, bits)]


def _facts(subject: Subject, loss: Loss | None) -> list[Fact]:
    """The summary's first entries."""
    profile, n_bytes = subject.profile, int(subject.record_bytes.sum())
    every, n_experts = profile.frequency()[profile.layers], len(profile.layers) * profile.n_expert
    texts = "written by the model itself" if profile.own_text else _names(profile)
    packed = subject.bits()
    bits = 8 * n_bytes / (n_experts * subject.weights_per_expert) if packed is None else float(np.nanmean(packed))
    facts = [
        Fact(
            "Experts",
            f"{len(profile.layers)} layers of {profile.n_expert}",
            f"a token uses {profile.top_k} a layer; {size(n_bytes)} on flash, {bits:.2f} bits per weight",
            "maps",
        ),
        Fact(
            "Calibrated on", f"{profile.n_tokens:,} tokens", texts, "transfer" if len(profile.domains) > 1 else "maps"
        ),
        Fact("Hottest tenth of the experts", per_cent(hot_share(every, 0.1)), "of the work; 10 % if even", "skew"),
    ]
    return [*facts, *_loss_facts(subject, loss, bits)]


def _loss_facts(subject: Subject, loss: Loss | None, bits: float) -> list[Fact]:
    """The loss that was measured, or else that is expected."""
    if (measured := proof_of(subject)) is not None:
        c = measured.comparison
        remark = f"of perplexity, +/- {per_cent(c.standard_error, 2)}, at {bits:.2f} bits per weight of the experts"
        return [Fact("Measured loss", rise(c.increase), remark, "proof")]
    if loss is None or loss.chosen is None:
        return []
    remark = "of this bundle's experts" if subject.bundle is not None else "of the experts, not proved yet"
    value = f"{loss.chosen.bits:.2f} bits per weight"
    return [Fact(f"Expected loss of {increase(loss.chosen.increase)}", value, remark, "loss")]


def _names(profile: Profile) -> str:
    names = ", ".join(shorten(domain.name, 30) for domain in profile.domains[:8])
    return names if len(profile.domains) <= 8 else f"{names} and {len(profile.domains) - 8} more"
