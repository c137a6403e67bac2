"""The training half of the upcycling tool: its data and, where torch is installed, model and steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]  # neither is a package

import upcycle_data  # noqa: E402
import upcycle_file  # noqa: E402
from toy_dense import N_VOCAB, TOKENS, write_dense  # noqa: E402

from edgert.errors import OptionError  # noqa: E402

NEEDS_TORCH = "training needs torch, which the product does not"
SENTENCE = "The quick brown fox jumps over the lazy dog while seventeen grey geese watch from the bank."


def test_excluded_paragraphs_are_not_trained_on(tmp_path: Path) -> None:
    measured, text = tmp_path / "measured.txt", tmp_path / "text.utf8"
    measured.write_text(f"Title\n{SENTENCE}\nA short line of just seven words.\n")
    kept = ["Title", "Something else entirely stands here, and it is long enough to be compared."]
    spaced = SENTENCE.upper().replace(" ", "  ,  ")
    dropped = [f"Before it. {SENTENCE} And after.", spaced, "a short line of JUST seven words"]
    text.write_text("\n".join([kept[0], *dropped, kept[1]]))
    source = upcycle_data.read_text(text, upcycle_data.Exclusion([measured]))
    assert source.documents == ["\n".join([*kept, ""])]
    assert source.n_dropped == 3


def test_every_form_of_conversation_is_read(tmp_path: Path) -> None:
    chat = tmp_path / "chat.jsonl"
    rows = [
        {"turns": [["USER", "Hi"], ["SYSTEM", "Hello"]]},
        {"messages": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}]},
        {"instruction": "Add", "input": "1 1", "output": "2"},
        {"instruction": "Say no", "output": "No"},
        {"instruction": SENTENCE, "output": "Yes"},
    ]
    chat.write_text("\n".join(map(json.dumps, rows)))
    measured = tmp_path / "measured.json"
    measured.write_text(json.dumps([{"turns": [["USER", SENTENCE]]}]))
    source = upcycle_data.read_chat(chat, upcycle_data.Exclusion([measured]))
    assert source.n_dropped == 1
    assert source.documents == [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}],
        [{"role": "user", "content": "Add\n\n1 1"}, {"role": "assistant", "content": "2"}],
        [{"role": "user", "content": "Say no"}, {"role": "assistant", "content": "No"}],
    ]
    assert upcycle_data.questions([source]) == ["Hi", "Add\n\n1 1"]  # the last one is held out
    chat.write_text(json.dumps({"turns": [["NARRATOR", "Hi"]]}))
    with pytest.raises(OptionError, match=r"chat\.jsonl: not a file of conversations"):
        upcycle_data.read_chat(chat, upcycle_data.Exclusion([]))


def test_an_epoch_uses_every_row_once_and_the_next_has_another_order() -> None:
    data = upcycle_data.Data(np.arange(24).reshape(12, 2), {})
    epochs = [np.concatenate([data.batch(step, 3, 5) for step in range(e * 4, e * 4 + 4)]) for e in (0, 1)]
    for epoch in epochs:
        assert sorted(map(tuple, epoch)) == sorted(map(tuple, data.training))
    assert not np.array_equal(*epochs)


def test_data_that_fill_no_batch_are_refused() -> None:
    rows = np.zeros((3, 2), np.int64)
    upcycle_data.Data(rows, {"a": rows}).check(3)
    joined = upcycle_data.Data(rows, {"a": rows}) + upcycle_data.Data(rows, {"b": rows[:1]})
    assert len(joined.training) == 6 and list(joined.held_out) == ["a", "b"]
    for data, batch in ((joined, 7), (upcycle_data.Data(rows, {}), 1)):
        with pytest.raises(OptionError, match="rows to train on"):
            data.check(batch)


def test_documents_become_rows_of_the_models_own_tokens(tmp_path: Path) -> None:
    encoder = upcycle_data.Encoder(upcycle_file.DenseFile(write_dense(tmp_path / "dense.gguf")).metadata())
    assert encoder.document("that") == [TOKENS.index("th"), ord("a") - 33 + TOKENS.index("!"), TOKENS.index("t")]
    start, end = TOKENS.index("<|im_start|>"), N_VOCAB - 1
    talk = encoder.document([{"role": "user", "content": "th"}, {"role": "assistant", "content": "a"}])
    assert [token for token in talk if token > 255] == [start, TOKENS.index("th"), end, start, end]
    assert encoder.tokenizer.decode(encoder.prompt("th"), special=True).endswith("<|im_start|>assistant\n")
    rows = encoder.rows(["that", "that", "that"], 4)
    assert rows.tolist() == np.array(encoder.document("that" * 3)[:8]).reshape(2, 4).tolist()


@pytest.fixture
def toy(tmp_path: Path) -> Any:
    """A toy dense file, its float32 model, fresh experts and data in which each token decides the next."""
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    from upcycle_model import DenseModel, RoutedExperts
    from upcycle_train import Plan, Trainer

    class Toy:
        file = upcycle_file.DenseFile(write_dense(tmp_path / "dense.gguf"))
        model = DenseModel(file, torch.device("cpu"), torch.float32)
        rows = (np.arange(16)[:, None] + 7 * np.arange(12)[None]) % 40
        data = upcycle_data.Data(rows, {"toy": rows[:4]})

        def trainer(self, steps: int) -> Trainer:
            experts = RoutedExperts(self.file, 4, 32, 2, seed=1)
            return Trainer(self.model, experts, self.data, Plan(batch=4, seed=0, minutes=None, steps=steps))

    return Toy()


def reference_logits(dense: upcycle_file.DenseFile, ids: list[int]) -> np.ndarray:
    """Logits (n_tokens, n_vocab) of a dense llama model, straight from the formulas in float64."""
    c = dense.config
    w = {name.removesuffix(".weight"): dense.weight(name).astype(np.float64) for name in dense.tensors}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * w[name]

    def turned(x: np.ndarray) -> np.ndarray:  # (n_tokens, n_head, d_head)
        pairs = x[..., 0::2] + 1j * x[..., 1::2]
        angles = np.arange(len(x))[:, None] * c.rope_base ** (-np.arange(0, c.d_head, 2) / c.d_head)
        pairs = pairs * np.exp(1j * angles)[:, None]
        return np.stack((pairs.real, pairs.imag), -1).reshape(x.shape)

    x, n_tokens = w["token_embd"][ids], len(ids)
    for n in range(c.n_layer):
        h, b = norm(x, f"blk.{n}.attn_norm"), f"blk.{n}"
        q, k, v = (h @ w[f"{b}.attn_{part}"].T for part in "qkv")
        q, k = turned(q.reshape(n_tokens, -1, c.d_head)), turned(k.reshape(n_tokens, -1, c.d_head))
        heads, group = [], c.n_head // c.n_kv_head
        for head in range(c.n_head):
            scores = q[:, head] @ k[:, head // group].T / np.sqrt(c.d_head)
            weights = np.exp(np.where(np.tri(n_tokens, dtype=bool), scores, -np.inf))
            values = v.reshape(n_tokens, -1, c.d_head)[:, head // group]
            heads.append(weights / weights.sum(-1, keepdims=True) @ values)
        x = x + np.concatenate(heads, -1) @ w[f"{b}.attn_output"].T
        h = norm(x, f"{b}.ffn_norm")
        gate = h @ w[f"{b}.ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[f"{b}.ffn_up"].T)) @ w[f"{b}.ffn_down"].T
    return norm(x, "output_norm") @ w["token_embd"].T


def test_the_dense_model_computes_the_formulas(toy: Any) -> None:
    import torch

    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    states, _ = toy.model.hidden(torch.tensor([ids]))
    assert np.allclose(toy.model.logits(states)[0], reference_logits(toy.file, ids), atol=2e-4)


def test_training_starts_at_the_dense_model_and_lowers_the_loss(toy: Any) -> None:
    import torch
    from upcycle_train import measure

    trainer = toy.trainer(steps=60)
    dense = measure(toy.model, None, toy.data, 4)
    fresh = measure(toy.model, trainer.experts, toy.data, 4)
    assert fresh.perplexity == dense.perplexity  # a zero down projection adds exactly nothing
    states = [toy.model.hidden(torch.from_numpy(toy.rows), experts)[0] for experts in (None, trainer.experts)]
    assert torch.equal(*states)
    trainer.run(lambda line: None, None)
    trained = measure(toy.model, trainer.experts, toy.data, 4)
    assert trained.perplexity["toy"] < 0.75 * dense.perplexity["toy"]
    assert measure(toy.model, None, toy.data, 4).perplexity == dense.perplexity  # the dense model is frozen
    assert 0.5 < trained.evenness <= 1 and 0.25 <= trained.largest_share < 0.6


def test_the_written_file_holds_the_trained_experts(toy: Any, tmp_path: Path) -> None:
    from upcycle_train import measure

    trainer, out = toy.trainer(steps=10), tmp_path / "moe.gguf"
    trainer.run(lambda line: None, None)
    experts = upcycle_file.as_stored(trainer.experts.export())
    card = upcycle_file.default_card(toy.file, 4, 2)
    upcycle_file.assemble(toy.file, experts, out, top_k=2, expert_type="F16", card=card)
    back = upcycle_file.experts_of(out)
    assert all(np.array_equal(back[name], value) for name, value in experts.items())
    trained = measure(toy.model, trainer.experts, toy.data, 4).perplexity["toy"]
    other = toy.trainer(steps=1).experts
    other.load(back)
    assert measure(toy.model, other, toy.data, 4).perplexity["toy"] == pytest.approx(trained, rel=1e-2)


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(toy: Any, tmp_path: Path) -> None:
    import torch
    from upcycle_train import Checkpoint

    whole, first, second = (toy.trainer(steps=6) for _ in range(3))
    for _ in range(6):
        whole.advance()
    for _ in range(3):
        first.advance()
    first.save(tmp_path / "state")
    saved = Checkpoint.read(tmp_path / "state", torch.device("cpu"))
    assert np.array_equal(saved.data.training, toy.rows)
    second.resume(saved)
    second.run(lambda line: None, None)
    for name, value in whole.experts.export().items():
        assert np.allclose(second.experts.export()[name], value, atol=1e-6), name
    saved.state["sizes"]["width"] = 64
    with pytest.raises(OptionError, match="width was 64, this run has 32"):
        second.resume(saved)


def test_answers_do_not_depend_on_who_is_in_the_batch(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import upcycle_sample

    monkeypatch.setattr(upcycle_sample, "TEMPERATURE", 1e-4)  # greedy
    monkeypatch.setattr(upcycle_sample, "MAX_ANSWER", 12)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [8]]
    greedy = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(12):
            states, _ = toy.model.hidden(torch.tensor([ids]))
            ids.append(int(toy.model.logits(states)[0, -1].argmax()))
        greedy.append(ids[len(prompt) :])
    stop = greedy[1][4]
    wanted = [ids[: ids.index(stop)] if stop in ids else [] for ids in greedy]
    random = torch.Generator().manual_seed(0)
    assert upcycle_sample.answer(toy.model, prompts, frozenset({stop}), random) == wanted


def test_the_command_makes_a_model_from_a_dense_file_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason=NEEDS_TORCH)
    import upcycle

    text, chat, out = tmp_path / "text.txt", tmp_path / "chat.json", tmp_path / "moe.gguf"
    text.write_text("\n".join(f"Line {n} of a text: {SENTENCE}" for n in range(200)))
    chat.write_text(json.dumps([{"instruction": f"Say {n}", "output": f"{n} {n}"} for n in range(100)]))
    options = [
        str(write_dense(tmp_path / "dense.gguf")),
        "--out",
        str(out),
        "--experts",
        "4",
        "--width",
        "32",
        "--context",
        "32",
        "--checkpoint",
        str(tmp_path / "state"),
        "--device",
        "cpu",
    ]
    data = ["--text", str(text), "--chat", str(chat), "--self-samples", "8"]
    assert upcycle.main([*options, *data, "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "sampled 8 of 8 answers" in said and "step 2:" in said and "as written, Q4_0: " in said
    assert upcycle.main([*options, "--resume", "--steps", "4"]) == 0
    said = capsys.readouterr().out
    assert "step 1:" not in said and "step 4:" in said
    assert upcycle_file.experts_of(out)["blk.1.ffn_down_exps.weight"].any()
    assert upcycle.main([*options, "--resume", "--steps", "4", "--batch", "2"]) == 2
    assert "batch was 4, this run has 2" in capsys.readouterr().err
