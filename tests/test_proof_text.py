"""The text that bits are chosen by and the text that proves them: never the same, or calibrated on, or endless."""

from __future__ import annotations

import numpy as np
import pytest

from edgert.errors import OptionError
from edgert.experts.profile import Domain, Profile
from edgert.proof_text import ProofText, proof_text

CHUNK = 64


def profile(n_held_out: int, n_domains: int = 1) -> Profile:
    """A profile of random text."""
    random, nothing = np.random.default_rng(3), np.zeros((1, 2, 4), np.float32)
    domains = []
    for place in range(n_domains):
        tokens, held_out = (random.integers(0, 4000, n * CHUNK).astype(np.int32) for n in (8, n_held_out))
        ids = np.zeros((1, len(tokens), 1), np.uint8)
        domains.append(Domain(f"text {place}", tokens, held_out, ids, ids.astype(np.float16)))
    return Profile(
        model="made",
        digest="0",
        chunk=CHUNK,
        record_bytes=np.full((1, 2), 4096),
        domains=tuple(domains),
        shares={domain.name: 1 / n_domains for domain in domains},
        own_text=False,
        input_moments=nothing,
        hidden_moments=nothing,
        recall={},
    )


def test_no_chunk_both_chooses_and_proves_and_every_text_does_both() -> None:
    found = proof_text(profile(5, n_domains=2), None, "", selects=True)
    assert len(found.select) == len(found.prove) == 5
    assert not {tuple(chunk) for chunk in found.select} & {tuple(chunk) for chunk in found.prove}
    assert "the half that bits were not chosen by" in found.name
    first = {tuple(chunk) for chunk in profile(5, n_domains=2).domains[0].held_out.reshape(-1, CHUNK).tolist()}
    assert all(any(tuple(chunk) in first for chunk in part) for part in (found.select, found.prove))


def test_where_nothing_is_chosen_all_of_it_proves() -> None:
    assert proof_text(profile(5), None, "", selects=False) == ProofText(
        [], profile(5).domains[0].held_out.reshape(-1, CHUNK).tolist(), "text that the profile kept back"
    )


def test_a_text_that_is_given_proves_whole_where_the_profile_kept_some_to_choose_by() -> None:
    text = np.random.default_rng(9).integers(0, 4000, (6, CHUNK)).tolist()
    found = proof_text(profile(3), text, "book.txt", selects=True)
    assert (len(found.select), found.prove, found.name) == (3, text, "book.txt")
    halved = proof_text(profile(0), text, "book.txt", selects=True)
    assert (halved.select, halved.prove) == (text[::2], text[1::2])


@pytest.mark.parametrize(("n_held_out", "selects"), [(0, False), (1, False), (1, True), (3, True)])
def test_too_little_text_is_refused_with_what_it_takes(n_held_out: int, selects: bool) -> None:
    least = 4 if selects else 2
    with pytest.raises(
        OptionError, match=rf"kept back {n_held_out} chunks? of 64 tokens, and it takes {least} .*--held"
    ):
        proof_text(profile(n_held_out), None, "", selects=selects)
    for n in range(2):
        with pytest.raises(OptionError, match=rf"a.txt has {n} chunks? .*takes 2"):
            proof_text(profile(4), [list(range(CHUNK))] * n, "a.txt", selects=selects)


def test_text_that_was_calibrated_on_proves_nothing() -> None:
    known, fresh = profile(4), np.random.default_rng(9).integers(0, 4000, (9, CHUNK)).tolist()
    seen = known.domains[0].tokens[5 : 5 + CHUNK].tolist()
    with pytest.raises(OptionError, match=r"^a.txt proves nothing: \d+% of it .*another --proof FILE$"):
        proof_text(known, [seen, *fresh[:3]], "a.txt", selects=False)
    assert len(proof_text(known, [*fresh, fresh[0]], "a.txt", selects=False).prove) == 10


def test_chunks_that_were_calibrated_on_are_left_out_of_a_text() -> None:
    known, fresh = profile(4), np.random.default_rng(9).integers(0, 4000, (19, CHUNK)).tolist()
    seen = known.domains[0].tokens[5 : 5 + CHUNK].tolist()
    found = proof_text(known, [*fresh[:7], seen, *fresh[7:]], "a.txt", selects=True)
    assert found.prove == fresh and found.name == "a.txt, without 1 chunk that bits were calibrated on or chosen by"


def test_a_long_text_is_measured_on_some_of_its_chunks_evenly_spread() -> None:
    text = np.random.default_rng(9).integers(0, 4000, (300, CHUNK)).tolist()
    found = proof_text(profile(4), text, "long.txt", selects=False)
    assert len(found.prove) == 128 and found.prove[0] == text[0] and found.prove[64] == text[150]
    assert found.name == "long.txt, 128 of 300 chunks"
