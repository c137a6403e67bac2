"""Numbers of a report as a person reads them."""

from __future__ import annotations


def per_cent(share: float, decimals: int = 1) -> str:
    """A share: 0.256 is '25.6 %'."""
    return f"{100 * share:.{decimals}f} %"


def rise(share: float) -> str:
    """A change of perplexity with its sign: '+1.93 %'."""
    return f"{100 * share:+.2f} %"


def times(ratio: float) -> str:
    """A ratio: 2.34 is '2.3 times'."""
    return f"{ratio:.1f} times"


def count(number: int, noun: str) -> str:
    """'1 expert', '1,234 experts'."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def clean(words: object) -> str:
    """Words without characters that a page may not hold."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(words))


def shorten(name: str, most: int) -> str:
    """A name of at most so many characters, none of which a page may not hold."""
    name = clean(name)
    return name if len(name) <= most else f"{name[: most - 1]}\u2026"


def size(n_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves one or more."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:,.0f} {unit}" if unit == "bytes" else f"{n_bytes:,.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:,.2f} GiB"


def rate(bytes_per_s: float) -> str:
    """Bytes a second in decimal units, as drives are sold: '80 MB/s', '2.0 GB/s'."""
    return f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.0f} MB/s"


def speed(tokens_per_s: float) -> str:
    """Tokens a second with about three digits: '105', '83.0', '1.25'."""
    return f"{tokens_per_s:,.{0 if tokens_per_s >= 100 else 1 if tokens_per_s >= 10 else 2}f}"


def increase(share: float) -> str:
    """An increase of perplexity: '2.00 %', or '37 times' where it is beyond all use."""
    return f"{100 * share:.2f} %" if share < 10 else f"{share + 1:,.0f} times"
