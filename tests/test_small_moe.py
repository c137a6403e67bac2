"""The tool that trains a small MoE: its text, vocabulary and file and, where torch is installed, model and steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools")]  # it is no package

import small_moe_file  # noqa: E402
import train_small_moe  # noqa: E402
from small_moe_file import Corpus, Sizes, Texts, Vocabulary  # noqa: E402

import edgert  # noqa: E402
from edgert.errors import ModelFileError, OptionError  # noqa: E402
from edgert.storage.gguf_file import GgufFile  # noqa: E402
from edgert.tokenizer import Tokenizer  # noqa: E402

NEEDS_TORCH = "training needs torch, which the product does not"
TINY = Sizes(n_layer=2, d_model=64, n_head=4, n_kv_head=2, d_head=32, n_expert=4, top_k=2, d_expert=32, n_vocab=300)
TEXT = "The geese that they saw there thought that these other 12345 geese weren't    theirs.\n\n\tIt's naïve -- 鹅!\n"


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    """What byte-pair encoding makes of TEXT."""
    return Vocabulary.train([TEXT] * 2, TINY.n_vocab)


def random_weights() -> dict[str, np.ndarray]:
    """Weights of a TINY model, its norms near 1."""
    random = np.random.default_rng(5)
    return {
        name: (random.standard_normal(shape) * 0.1 + (len(shape) == 1)).astype(np.float32)
        for name, shape in TINY.shapes().items()
    }


@pytest.fixture(scope="module")
def written(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TINY model of random weights as a file."""
    path = tmp_path_factory.mktemp("small") / "tiny.gguf"
    small_moe_file.write(path, TINY, vocabulary, random_weights(), "made by a test")
    return path


def test_matrices_are_f16_and_the_rest_exact(written: Path) -> None:
    with GgufFile.open(written) as file:
        kinds = {name: tensor.type.name for name, tensor in file.tensors.items()}
    assert set(kinds) == set(TINY.shapes())  # the head is tied: no output.weight
    exact = {name for name in kinds if "norm" in name or "gate_inp" in name}
    assert {name for name, kind in kinds.items() if kind == "F32"} == exact
    assert {kind for name, kind in kinds.items() if name not in exact} == {"F16"}


def test_rows_fill_the_blocks_of_every_format() -> None:
    assert all(shape[-1] % 256 == 0 for shape in Sizes().shapes().values() if len(shape) > 1)


def test_edgert_loads_it_and_goes_on_from_a_text(written: Path) -> None:
    with edgert.load(written, activations="f32") as model:
        assert model.logits([5, 6, 7]).shape == (3, TINY.n_vocab)
        assert model.generate("The geese", max_tokens=4, temperature=0)


def test_edgert_splits_text_into_the_tokens_that_were_trained_on(written: Path, vocabulary: Vocabulary) -> None:
    assert len(vocabulary.tokens) == TINY.n_vocab and vocabulary.tokens[:3] == list(small_moe_file.SPECIAL)
    with GgufFile.open(written) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    for text in (TEXT, TEXT.upper(), "  they'll\r\n x", "<|im_start|>user\nthat<|im_end|>\n"):
        ids = vocabulary.tokenizer().encode(text).ids
        assert tokenizer.encode(text, special=True) == ids
        assert len(ids) < len(text.encode())
        assert tokenizer.decode(ids, special=True) == text


def test_a_folder_is_read_and_a_part_of_every_source_held_out(tmp_path: Path) -> None:
    articles = "".join(f'<doc id="{n}">\nArticle {n}\n{"word " * 900}\n</doc>\n' for n in range(4))
    talks = [{"instruction": f"Question {n}", "output": "Answer"} for n in range(200)]
    (tmp_path / "wiki.utf8").write_text(articles)
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    (tmp_path / "notes.md").write_text("not read")
    texts = Texts.read(tmp_path)
    assert {name: len(documents) for name, documents in texts.held_out.items()} == {"talks.json": 2, "wiki.utf8": 1}
    assert len(texts.training) == 198 + 3
    assert "<|im_start|>user\nQuestion 0<|im_end|>\n<|im_start|>assistant\nAnswer<|im_end|>\n" == texts.training[0]
    assert texts.training[198].startswith("Article 0\n") and "doc" not in "".join(texts.training)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(OptionError, match="to train on"):
            Texts.read(folder)


def test_an_epoch_uses_every_token_once_and_the_next_has_another_order() -> None:
    corpus = Corpus([np.arange(first, first + 8) for first in range(0, 64, 8)])
    epochs = [np.stack([corpus.batch(step, 16, 8, seed=1) for step in range(e * 4, e * 4 + 4)]) for e in (0, 1)]
    for epoch in epochs:
        assert sorted(epoch.flatten().tolist()) == list(range(64))
    assert not np.array_equal(*epochs)
    assert corpus.batch(0, 16, 4, seed=1).shape == (4, 4)
    assert corpus.rows(10).shape == (6, 10)


def test_what_contradicts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", str(tmp_path), "--out"]
    assert train_small_moe.main([*given, str(tmp_path / "a.gguf"), "--resume"]) == 2
    assert train_small_moe.main([*given, str(tmp_path / "none" / "a.gguf")]) == 2
    assert "--resume: name the file" in (said := capsys.readouterr().err) and "does not exist" in said


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes trainers of a TINY model on rows in which each token decides the next."""
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    from small_moe_model import SmallMoe

    monkeypatch.setattr(train_small_moe, "TOKENS_PER_STEP", 128)
    monkeypatch.setattr(train_small_moe, "ROWS", ((1.0, 16),))
    monkeypatch.setattr(train_small_moe, "WARM_UP_STEPS", 2)
    corpus = Corpus([(first + 7 * np.arange(32)) % 40 for first in range(40)])
    return lambda: train_small_moe.Trainer(SmallMoe(TINY, seed=1), corpus, steps=30, seed=2)


def test_training_lowers_the_loss(trainer: Any) -> None:
    training, lines = trainer(), []
    before = train_small_moe.measure(training.model, {"toy": Corpus([np.arange(300) * 7 % 40])})
    training.run(lines.append, lambda: lines.append("saved"))
    after = train_small_moe.measure(
        training.model, {"toy": Corpus([np.arange(300) * 7 % 40]), "none": Corpus([np.arange(9)])}
    )
    assert after.loss["toy"] < before.loss["toy"] - 1
    assert list(after.loss) == ["toy", "all"]
    assert 0 < after.evenness <= 1 and 0 <= after.smallest_share <= after.largest_share
    assert [line.split(":")[0] for line in lines] == ["step 20", "step 30", "saved"]


def test_a_resumed_run_goes_on_as_if_never_cut_off(trainer: Any, tmp_path: Path) -> None:
    whole, cut, resumed = trainer(), trainer(), trainer()
    path = tmp_path / "state.pt"
    expected = [whole.advance() for _ in range(4)]
    for _ in range(2):
        cut.advance()
    cut.save(path)
    resumed.resume(path)
    assert [resumed.advance() for _ in range(2)] == expected[2:]
    resumed.steps = 31
    with pytest.raises(OptionError, match="steps was 30, this run has 31"):
        resumed.resume(path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ModelFileError, match="leave out --resume"):
        resumed.resume(path)


def test_the_experts_and_their_gradients_are_those_of_the_formula() -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    from small_moe_model import RunExperts

    random = torch.Generator().manual_seed(3)
    shapes = ((7, 6), (5, 8, 6), (5, 6, 4), (7, 5))  # x, gate and up, down, scores
    x, gate_up, down, scores = (torch.randn(s, generator=random, dtype=torch.float64) for s in shapes)
    weights, ids = scores[:, :4].topk(2)  # the last expert gets no token
    usage = torch.bincount(ids.flatten(), minlength=5).tolist()
    inputs = [each.requires_grad_() for each in (x, gate_up, down, weights)]

    def run(x: Any, gate_up: Any, down: Any, weights: Any) -> Any:
        return RunExperts.apply(x, gate_up, down, ids, weights, usage)

    gate, up = torch.einsum("nd,efd->nef", x, gate_up).chunk(2, -1)  # (n, n_expert, d_expert)
    every = torch.einsum("nef,edf->ned", torch.nn.functional.silu(gate) * up, down)
    chosen = every.gather(1, ids[:, :, None].expand(-1, -1, 6)) * weights[:, :, None]
    assert torch.allclose(run(*inputs), chosen.sum(1))
    assert torch.autograd.gradcheck(run, inputs)


def test_edgert_computes_what_was_trained(vocabulary: Vocabulary, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    from small_moe_model import SmallMoe

    model = SmallMoe(TINY, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():  # as the file stores them; norms that are not all 1
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).half())
    path = tmp_path / "tiny.gguf"
    small_moe_file.write(path, TINY, vocabulary, model.export(), "made by a test")
    ids = [int(token) for token in np.random.default_rng(1).integers(3, TINY.n_vocab, size=24)]
    with torch.no_grad():
        states, _ = model.hidden(torch.tensor([ids]))
        expected = (states[0] @ model.embedding.T).numpy()
    with edgert.load(path, activations="f32", kv_type="f32") as loaded:
        assert np.allclose(loaded.logits(ids), expected, atol=1e-3)
