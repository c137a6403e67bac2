"""Train a small Mixture-of-Experts model from scratch on a folder of text, as a subject for quantisation studies.

A `qwen3moe` of 15 million weights, 5 million of them used by a token, with a vocabulary of its own; seed, data and
steps determine it. Two cores take 45 minutes (OMP_WAIT_POLICY=PASSIVE keeps that from growing tenfold where others
use them too). Needs torch, which the product does not:

    python tools/train_small_moe.py --data TEXTS --out small-moe-f16.gguf --checkpoint small-moe.pt
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from small_moe_file import Corpus, Sizes, Texts, Vocabulary, write

from edgert.errors import EdgertError, ModelFileError, OptionError

if TYPE_CHECKING:
    from small_moe_model import SmallMoe

STEPS = 2400
TOKENS_PER_STEP = 4096
ROWS = (
    (0.6, 256),
    (0.9, 512),
    (1.0, 1024),
)  # up to which part of the training rows are so long: short ones are cheaper
LEARNING_RATE = 2e-3  # at its highest; from there it falls in a line to 0
WARM_UP_STEPS = 100
WEIGHT_DECAY = 0.1  # of matrices
BALANCE_WEIGHT = 0.001  # of every layer, as Qwen3-MoE was trained with
GRADIENT_NORM = 1.0  # clipped to this
REPORT_STEPS = 20
CHECKPOINT_SECONDS = 300
MEASURED_ROW = 256


@dataclass
class Measured:
    """Held-out figures."""

    loss: dict[str, float]  # nats a token, by source
    evenness: float  # entropy of expert use over its maximum, mean over layers
    largest_share: float  # of the choices that fall on one expert, the largest of all layers
    smallest_share: float  # likewise the smallest

    def __str__(self) -> str:
        sources = ", ".join(f"{name} {loss:.3f}" for name, loss in self.loss.items())
        return (
            f"held-out loss {sources}; evenness of expert use {self.evenness:.3f}, "
            f"largest share {self.largest_share:.1%}, smallest {self.smallest_share:.2%}"
        )


class Trainer:
    """The model in training, with the optimiser's state and the place in the data."""

    def __init__(self, model: SmallMoe, corpus: Corpus, steps: int, seed: int) -> None:
        import torch

        self.model, self.corpus, self.steps, self.seed = model, corpus, steps, seed
        self.step, self.mean_loss = 0, math.nan
        matrices = [p for p in model.parameters() if p.dim() > 1]
        norms = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
        self._optimiser = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)

    def run(self, report: Callable[[str], None], save: Callable[[], None]) -> None:
        """Train to the end of the plan, calling `save` now and then and at the end."""
        saved = since = time.perf_counter()
        n_steps = 0
        while self.step < self.steps:
            loss, balance = self.advance()
            n_steps += 1
            self.mean_loss = loss if math.isnan(self.mean_loss) else 0.95 * self.mean_loss + 0.05 * loss
            now, done = time.perf_counter(), self.step == self.steps
            if self.step % REPORT_STEPS == 0 or done:
                rate = n_steps * TOKENS_PER_STEP / (now - since)
                n_steps, since = 0, now
                report(
                    f"step {self.step}: loss {loss:.4f} (mean {self.mean_loss:.4f}), "
                    f"balance {balance:.3f}, {rate:.0f} tokens/s"
                )
            if done or now - saved > CHECKPOINT_SECONDS:
                save()
                saved = time.perf_counter()

    def advance(self) -> tuple[float, float]:
        """One update; the loss per token (nats) before it and the mean balance term of a layer."""
        import torch

        done = self.step / self.steps
        n_row = next(length for end, length in ROWS if done < end)
        ids = torch.from_numpy(self.corpus.batch(self.step, TOKENS_PER_STEP, n_row, self.seed))
        scale = min((self.step + 1) / WARM_UP_STEPS, (1 - done) / (1 - min(WARM_UP_STEPS / self.steps, 0.5)), 1.0)
        for group in self._optimiser.param_groups:
            group["lr"] = LEARNING_RATE * scale
        losses, routing = self.model.losses(ids)
        loss = losses.mean()
        self._optimiser.zero_grad(set_to_none=True)
        (loss + BALANCE_WEIGHT * routing.balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self._optimiser.step()
        self.step += 1
        return loss.item(), routing.balance.item() / self.model.sizes.n_layer

    def _plan(self) -> dict[str, Any]:
        """What a checkpoint must agree on with this run."""
        return {**asdict(self.model.sizes), "steps": self.steps, "seed": self.seed, "tokens": self.corpus.n_tokens}

    def save(self, path: Path) -> None:
        """Write the state to `path`, aside first."""
        import torch

        state = {
            "plan": self._plan(),
            "progress": [self.step, self.mean_loss],
            "model": self.model.state_dict(),
            "optimiser": self._optimiser.state_dict(),
        }
        aside = path.with_name(f"{path.name}.part")
        torch.save(state, aside)
        os.replace(aside, path)

    def resume(self, path: Path) -> None:
        """Go on from the state in `path`; OptionError if it is of another run."""
        import torch

        try:
            state = torch.load(path, weights_only=True)
            plan = state["plan"]
        except Exception as error:  # torch raises many kinds for a file that is not its own
            raise ModelFileError(f"{path}: not a checkpoint ({error!r}); leave out --resume") from None
        for name, value in self._plan().items():
            if plan.get(name) != value:
                raise OptionError(f"{path}: {name} was {plan.get(name)}, this run has {value}; repeat the first run's")
        self.model.load_state_dict(state["model"])
        self._optimiser.load_state_dict(state["optimiser"])
        self.step, self.mean_loss = state["progress"]


def measure(model: SmallMoe, held_out: dict[str, Corpus]) -> Measured:
    """Loss on the held-out text of every source and of all, and how evenly the experts are used there."""
    import torch

    losses, usage = {}, torch.zeros(model.sizes.n_layer, model.sizes.n_expert, dtype=torch.long)
    with torch.no_grad():
        for name, corpus in held_out.items():
            parts = []
            whole = torch.from_numpy(corpus.rows(MEASURED_ROW))
            for rows in whole.split(8) if len(whole) else ():
                loss, routing = model.losses(rows)
                parts.append(loss.flatten())
                usage += routing.usage
            if parts:
                losses[name] = torch.cat(parts).double()
    if not losses:
        raise OptionError(f"--data: no source has {MEASURED_ROW} tokens held out to measure on; give more text")
    share = usage.double() / usage.sum(1, keepdim=True)  # (n_layer, n_expert)
    entropy = -(share * share.clamp_min(1e-12).log()).sum(1)
    losses["all"] = torch.cat(list(losses.values()))
    return Measured(
        {name: float(loss.mean()) for name, loss in losses.items()},
        float(entropy.mean()) / math.log(model.sizes.n_expert),
        float(share.max()),
        float(share.min()),
    )


def train(args: argparse.Namespace, sizes: Sizes) -> None:
    """Train vocabulary and weights; write the file, and say its held-out figures, now and then and at the end."""
    from small_moe_model import SmallMoe

    texts = Texts.read(args.data, args.exclude)
    vocabulary = Vocabulary.train(texts.training, sizes.n_vocab)
    if len(vocabulary.tokens) != sizes.n_vocab:
        raise OptionError(f"--data: gives {len(vocabulary.tokens)} tokens of a vocabulary of {sizes.n_vocab}; add text")
    corpus = Corpus.encode(texts.training, vocabulary)
    held_out = {name: Corpus.encode(documents, vocabulary) for name, documents in texts.held_out.items()}
    n_epoch = args.steps * TOKENS_PER_STEP / corpus.n_tokens
    say(f"{len(corpus.documents):,} documents, {corpus.n_tokens:,} tokens, {n_epoch:.1f} epochs")
    model = SmallMoe(sizes, args.seed)
    trainer = Trainer(model, corpus, args.steps, args.seed)
    if args.resume:
        trainer.resume(args.checkpoint)

    def save() -> None:
        about = f"Trained from scratch for {trainer.step} steps of {TOKENS_PER_STEP} tokens, to study quantisation."
        write(args.out, sizes, vocabulary, model.export(), about)
        if args.checkpoint:
            trainer.save(args.checkpoint)
        say(f"wrote {args.out}: {args.out.stat().st_size:,} bytes; {measure(model, held_out)}")

    trainer.run(say, save)


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; OptionError for what contradicts."""
    first_line, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser("train_small_moe.py", description=first_line)
    parser.add_argument("--data", type=Path, required=True, help="folder of *.utf8, *.txt, *.json and *.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="GGUF file, written now and then and at the end")
    parser.add_argument(
        "--exclude", type=Path, nargs="+", default=[], metavar="FILE", help="text to measure on: not trained on"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {TOKENS_PER_STEP} tokens (default {STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default 0)")
    parser.add_argument("--checkpoint", type=Path, help="save the state there now and then")
    parser.add_argument("--resume", action="store_true", help="continue from --checkpoint")
    args = parser.parse_args(argv)
    if args.resume and not args.checkpoint:
        raise OptionError("--resume: name the file to continue from with --checkpoint")
    for path in filter(None, (args.out, args.checkpoint)):
        if not path.parent.is_dir():
            raise OptionError(f"{path}: the folder {path.parent} does not exist; make it first")
    return args


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; the exit status is 2 for what the caller can mend."""
    try:
        train(options(argv), Sizes())
    except EdgertError as error:
        print(f"train_small_moe.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
