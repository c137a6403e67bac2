"""Training of the routed experts: next-token loss plus load balance, and the perplexity on held-out text.

The dense model stays frozen. A run can be cut off and continued from a checkpoint, which holds the data too;
their order depends on seed and step alone.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from upcycle_data import Data
from upcycle_model import DenseModel, RoutedExperts

from edgert.errors import ModelFileError, OptionError

LEARNING_RATES = {"gate": 6e-4, "up": 6e-4, "down": 1.2e-3, "router": 1.5e-3}  # at their highest
WARM_UP_STEPS = 20
LAST_RATE = 0.05  # of the highest, where the cosine ends
BALANCE_WEIGHT = 0.01
GRADIENT_NORM = 1.0  # clipped to this
REPORT_STEPS = 20
CHECKPOINT_SECONDS = 300


@dataclass(frozen=True)
class Plan:
    """How long and on what batches to train; one of `minutes` and `steps` ends it."""

    batch: int
    seed: int
    minutes: float | None
    steps: int | None

    def done(self, step: int, seconds: float) -> float:
        """The part of the training that lies behind, 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.minutes is not None
        return min(1.0, seconds / (60 * self.minutes))


@dataclass
class Measured:
    """Held-out figures of one model."""

    perplexity: dict[str, float] = field(default_factory=dict)  # by source
    evenness: float | None = None  # entropy of expert use over its maximum, mean over layers
    largest_share: float | None = None  # of the choices that fall on one expert, mean over layers


class Trainer:
    """Routed experts in training, with the optimiser's state and the place in the data."""

    def __init__(self, model: DenseModel, experts: RoutedExperts, data: Data, plan: Plan) -> None:
        self.model, self.experts, self.data, self.plan = model, experts, data, plan
        self.step, self.seconds, self.mean_loss = 0, 0.0, math.nan
        groups: list[dict[str, Any]] = [
            {"params": [getattr(experts, name)], "highest": rate} for name, rate in LEARNING_RATES.items()
        ]
        self._optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    def run(self, report: Callable[[str], None], checkpoint: Path | None) -> None:
        """Train to the end of the plan; the state goes to `checkpoint` now and then, and at the end."""
        saved, n_tokens, since = self.seconds, 0, self.seconds
        while self.plan.done(self.step, self.seconds) < 1:
            start = time.perf_counter()
            loss, balance = self.advance()
            self.seconds += time.perf_counter() - start
            self.mean_loss = loss if math.isnan(self.mean_loss) else 0.95 * self.mean_loss + 0.05 * loss
            n_tokens += self.plan.batch * self.data.training.shape[1]
            done = self.plan.done(self.step, self.seconds)
            if (self.step - 1) % REPORT_STEPS == 0 or done >= 1:
                rate = n_tokens / (self.seconds - since)
                n_tokens, since = 0, self.seconds
                report(
                    f"step {self.step}: loss {loss:.4f} (mean {self.mean_loss:.4f}), "
                    f"balance {balance:.3f}, {rate:.0f} tokens/s, {done:.0%}"
                )
            if checkpoint and (done >= 1 or self.seconds - saved > CHECKPOINT_SECONDS):
                self.save(checkpoint)
                saved = self.seconds

    def advance(self) -> tuple[float, float]:
        """One update; the loss per token (nats) before it and the balance term."""
        rows = self.data.batch(self.step, self.plan.batch, self.plan.seed)
        ids = torch.from_numpy(rows).to(self.model.device)  # (batch, n_context)
        self._set_rates()
        states, routing = self.model.hidden(ids, self.experts)
        assert routing is not None
        loss = token_loss(self.model, states, ids).mean()
        self._optimiser.zero_grad(set_to_none=True)
        (loss + BALANCE_WEIGHT * routing.balance).backward()
        torch.nn.utils.clip_grad_norm_(self.experts.parameters(), GRADIENT_NORM)
        self._optimiser.step()
        self.step += 1
        return loss.item(), routing.balance.item()

    def _set_rates(self) -> None:
        cosine = 0.5 + 0.5 * math.cos(math.pi * self.plan.done(self.step, self.seconds))
        scale = min(1.0, (self.step + 1) / WARM_UP_STEPS) * (LAST_RATE + (1 - LAST_RATE) * cosine)
        for group in self._optimiser.param_groups:
            group["lr"] = group["highest"] * scale

    def _sizes(self) -> dict[str, int]:
        """What a checkpoint must agree on with this run, by the option's name."""
        e = self.experts
        return {
            "layers": len(e.gate),
            "experts": e.n_expert,
            "width": e.d_expert,
            "top-k": e.top_k,
            "batch": self.plan.batch,
            "seed": self.plan.seed,
        }

    def save(self, path: Path) -> None:
        """Write the state, data included, to `path`, aside first."""
        held_out = {name: torch.from_numpy(rows) for name, rows in self.data.held_out.items()}
        state = {
            "sizes": self._sizes(),
            "progress": [self.step, self.seconds, self.mean_loss],
            "training": torch.from_numpy(self.data.training),
            "held_out": held_out,
            "experts": self.experts.state_dict(),
            "optimiser": self._optimiser.state_dict(),
        }
        aside = path.with_name(f"{path.name}.part")
        torch.save(state, aside)
        os.replace(aside, path)

    def resume(self, saved: Checkpoint) -> None:
        """Go on from `saved`; OptionError if it is of a run with other sizes."""
        for name, value in self._sizes().items():
            if (before := saved.state["sizes"][name]) != value:
                raise OptionError(
                    f"{saved.path}: {name} was {before}, this run has {value}; resume with the options of the first run"
                )
        self.experts.load_state_dict(saved.state["experts"])
        self._optimiser.load_state_dict(saved.state["optimiser"])
        self.step, self.seconds, self.mean_loss = saved.state["progress"]


@dataclass(frozen=True)
class Checkpoint:
    """A state that Trainer.save has written."""

    path: Path
    state: dict[str, Any]
    data: Data

    @classmethod
    def read(cls, path: Path, device: torch.device) -> Checkpoint:
        """Read `path`; ModelFileError if it is not such a file."""
        try:
            state = torch.load(path, map_location=device, weights_only=True)
            held_out = {name: rows.cpu().numpy() for name, rows in state["held_out"].items()}
            data = Data(state["training"].cpu().numpy(), held_out)
        except Exception as error:  # torch raises many kinds for a file that is not its own
            raise ModelFileError(f"{path}: not a checkpoint ({error!r}); leave out --resume") from None
        return cls(path, state, data)


def token_loss(model: DenseModel, states: Tensor, ids: Tensor) -> Tensor:
    """Loss in nats of each next token, (batch * (n_tokens - 1),), from final states and the rows' ids."""
    logits = model.logits(states[:, :-1]).flatten(0, 1)
    return functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def measure(model: DenseModel, experts: RoutedExperts | None, data: Data, batch: int) -> Measured:
    """Perplexity on the held-out rows of every source, and how evenly the experts are used there."""
    measured, usage = Measured(), 0
    for name, rows in data.held_out.items():
        losses = []
        for first in range(0, len(rows), batch):
            ids = torch.from_numpy(rows[first : first + batch]).to(model.device)
            states, routing = model.hidden(ids, experts)
            losses.append(token_loss(model, states, ids))
            usage = usage if routing is None else usage + routing.usage
        measured.perplexity[name] = math.exp(torch.cat(losses).double().mean())
    if isinstance(usage, Tensor):
        share = usage.double() / usage.sum(1, keepdim=True)  # (n_layer, n_expert)
        entropy = -(share * share.clamp_min(1e-12).log()).sum(1)
        measured.evenness = float((entropy / math.log(share.shape[1])).mean())
        measured.largest_share = float(share.max(1).values.mean())
    return measured
