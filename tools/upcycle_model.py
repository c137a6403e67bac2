"""The model that is upcycled, in torch: the frozen dense llama model and the routed experts beside it.

The experts start as copies of random neurons of their layer with a down projection of zero, so that the whole
starts as exactly the dense model. Activations between layers are float32, products are in the weights' type.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from upcycle_file import DenseConfig, DenseFile, Experts

Cache = list[tuple[Tensor, Tensor]]  # per layer: keys and values, (batch, n_kv_head, n_past, d_head)


class RoutedExperts(nn.Module):
    """What is trained: all layers' experts and routers, float32; d_routed is n_expert * d_expert."""

    def __init__(self, dense: DenseFile, n_expert: int, d_expert: int, top_k: int, seed: int) -> None:
        super().__init__()
        self.n_expert, self.d_expert, self.top_k = n_expert, d_expert, top_k
        c, random = dense.config, np.random.default_rng(seed)
        gate, up = np.empty((2, c.n_layer, n_expert * d_expert, c.d_model), np.float32)
        for layer in range(c.n_layer):
            chosen = _random_neurons(random, c.d_ff, n_expert * d_expert)
            gate[layer] = dense.weight(f"blk.{layer}.ffn_gate.weight")[chosen]
            up[layer] = dense.weight(f"blk.{layer}.ffn_up.weight")[chosen]
        router = random.standard_normal((c.n_layer, n_expert, c.d_model), np.float32) * np.float32(0.05)
        self.gate = nn.Parameter(torch.from_numpy(gate))  # (n_layer, d_routed, d_model)
        self.up = nn.Parameter(torch.from_numpy(up))  # (n_layer, d_routed, d_model)
        self.down = nn.Parameter(torch.zeros(c.n_layer, c.d_model, n_expert * d_expert))
        self.router = nn.Parameter(torch.from_numpy(router))  # (n_layer, n_expert, d_model)

    def layers(self) -> list[ExpertLayer]:
        """One view per layer; unbound at once, so that the backward pass joins the gradients once."""
        parts = (self.gate.unbind(), self.up.unbind(), self.down.unbind(), self.router.unbind())
        return [ExpertLayer(*layer, self.top_k) for layer in zip(*parts, strict=True)]

    def export(self) -> dict[str, np.ndarray]:
        """The experts as arrays under their GGUF names, float32."""
        shape = (self.n_expert, self.d_expert, -1)
        experts: dict[str, np.ndarray] = {}
        for n in range(len(self.gate)):
            gate, up, down, router = (part[n].detach().cpu() for part in (self.gate, self.up, self.down, self.router))
            experts[f"blk.{n}.ffn_gate_inp.weight"] = router.numpy()
            experts[f"blk.{n}.ffn_gate_exps.weight"] = gate.view(shape).numpy()
            experts[f"blk.{n}.ffn_up_exps.weight"] = up.view(shape).numpy()
            experts[f"blk.{n}.ffn_down_exps.weight"] = down.view(-1, *shape[:2]).transpose(0, 1).numpy()
        return experts

    @torch.no_grad()
    def load(self, experts: Experts) -> None:
        """Take the values of `experts`, of the same sizes."""
        for n in range(len(self.gate)):
            gate, up, down, router = (
                torch.from_numpy(experts[f"blk.{n}.ffn_{part}.weight"].astype(np.float32))
                for part in ("gate_exps", "up_exps", "down_exps", "gate_inp")
            )
            self.gate[n].copy_(gate.reshape_as(self.gate[n]))
            self.up[n].copy_(up.reshape_as(self.up[n]))
            self.down[n].copy_(down.transpose(0, 1).reshape_as(self.down[n]))
            self.router[n].copy_(router)


@dataclass
class ExpertLayer:
    """The routed experts of one layer."""

    gate: Tensor  # (d_routed, d_model)
    up: Tensor  # (d_routed, d_model)
    down: Tensor  # (d_model, d_routed)
    router: Tensor  # (n_expert, d_model)
    top_k: int

    def __call__(self, x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """For normed x, float32 (n, d_model): output (n, d_model), balance term, tokens of each expert.

        All experts are computed and the unchosen ones weighted with 0: together they are narrower than the
        dense layer, and a grouped product would only pay for many more experts. The balance term is that of
        Switch Transformer (arXiv 2101.03961, equation 4) less its minimum: 0 when the use is even.
        """
        n_expert = len(self.router)
        scores = functional.linear(x, self.router)  # (n, n_expert)
        best, ids = scores.topk(self.top_k)  # (n, top_k)
        weights = torch.zeros_like(scores).scatter(1, ids, best.softmax(-1))  # (n, n_expert)
        x = x.to(kind)
        hidden = functional.silu(functional.linear(x, self.gate.to(kind)))
        hidden = hidden * functional.linear(x, self.up.to(kind))  # (n, d_routed)
        hidden = hidden.view(len(x), n_expert, -1) * weights.to(kind)[:, :, None]
        usage = torch.zeros(n_expert, dtype=ids.dtype, device=ids.device)  # bincount would wait for the GPU
        usage = usage.scatter_add(0, ids.flatten(), torch.ones_like(ids.flatten()))
        balance = n_expert * (usage / ids.numel() * scores.softmax(-1).mean(0)).sum() - 1
        return functional.linear(hidden.flatten(1), self.down.to(kind)), balance, usage


@dataclass
class Routing:
    """What the routers of all layers did in one pass."""

    balance: Tensor  # scalar: mean balance term, 0 when all experts are used evenly
    usage: Tensor  # (n_layer, n_expert): how many tokens each expert got


class DenseModel:
    """The dense model, frozen; it runs with routed experts beside its feed-forward layers or without."""

    def __init__(self, dense: DenseFile, device: torch.device, kind: torch.dtype) -> None:
        self.config, self.device, self.kind = dense.config, device, kind
        self._weights = {
            name: torch.from_numpy(dense.weight(name)).to(device, torch.float32 if "norm" in name else kind)
            for name in dense.tensors
        }
        self._embedding = self._weights["token_embd.weight"]  # (n_vocab, d_model)
        self._head = self._weights["token_embd.weight" if dense.tied else "output.weight"]

    def hidden(self, ids: Tensor, experts: RoutedExperts | None = None) -> tuple[Tensor, Routing | None]:
        """Final normed states (batch, n_tokens, d_model) for token ids (batch, n_tokens), and the routing."""
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return self._run(ids, _rotation(self.config, positions), None, None, experts)

    def step(self, ids: Tensor, positions: Tensor, visible: Tensor, cache: Cache) -> Tensor:
        """Logits (batch, n_vocab) of the last of these new tokens (batch, n_new), which join the cache.

        positions (batch, n_new): each token's place in its text; visible (batch, 1, n_new, n_past + n_new):
        what it may attend to. An empty cache starts a text.
        """
        x, _ = self._run(ids, _rotation(self.config, positions), visible, cache, None)
        return self.logits(x[:, -1])

    def logits(self, x: Tensor) -> Tensor:
        """Logits (..., n_vocab), float32, of final states (..., d_model)."""
        return functional.linear(x.to(self.kind), self._head).float()

    def _run(
        self,
        ids: Tensor,
        rotation: Tensor,
        visible: Tensor | None,
        cache: Cache | None,
        experts: RoutedExperts | None,
    ) -> tuple[Tensor, Routing | None]:
        x = functional.embedding(ids, self._embedding).float()  # (batch, n_tokens, d_model)
        balances, usages = [], []
        layers = experts.layers() if experts is not None else [None] * self.config.n_layer
        for n, layer in enumerate(layers):
            x = x + self._attend(n, self._norm(x, f"blk.{n}.attn_norm"), rotation, visible, cache)
            normed = self._norm(x, f"blk.{n}.ffn_norm")
            x = x + self._feed_forward(n, normed)
            if layer is not None:
                routed, balance, usage = layer(normed.flatten(0, 1), self.kind)
                x = x + routed.view_as(x)
                balances.append(balance)
                usages.append(usage)
        routing = Routing(torch.stack(balances).mean(), torch.stack(usages)) if balances else None
        return self._norm(x, "output_norm"), routing

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self._weights[f"{name}.weight"]
        return functional.rms_norm(x, weight.shape, weight, self.config.norm_eps)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x.to(self.kind), self._weights[f"{name}.weight"])

    def _attend(self, n: int, x: Tensor, rotation: Tensor, visible: Tensor | None, cache: Cache | None) -> Tensor:
        c, (batch, n_tokens, _) = self.config, x.shape
        q = self._linear(x, f"blk.{n}.attn_q").view(batch, n_tokens, c.n_head, c.d_head).transpose(1, 2)
        k = self._linear(x, f"blk.{n}.attn_k").view(batch, n_tokens, c.n_kv_head, c.d_head).transpose(1, 2)
        v = self._linear(x, f"blk.{n}.attn_v").view(batch, n_tokens, c.n_kv_head, c.d_head).transpose(1, 2)
        q, k = _rotate(q, rotation), _rotate(k, rotation)
        if cache is not None:
            if len(cache) > n:
                k, v = torch.cat((cache[n][0], k), 2), torch.cat((cache[n][1], v), 2)
            cache[n : n + 1] = [(k, v)]
        repeats = c.n_head // c.n_kv_head
        out = functional.scaled_dot_product_attention(
            q,
            k.repeat_interleave(repeats, 1),
            v.repeat_interleave(repeats, 1),
            attn_mask=visible,
            is_causal=visible is None,
        )
        return self._linear(out.transpose(1, 2).flatten(2), f"blk.{n}.attn_output")

    def _feed_forward(self, n: int, x: Tensor) -> Tensor:
        gate, up = self._linear(x, f"blk.{n}.ffn_gate"), self._linear(x, f"blk.{n}.ffn_up")
        return self._linear(functional.silu(gate) * up, f"blk.{n}.ffn_down")


def _random_neurons(random: np.random.Generator, d_ff: int, n: int) -> np.ndarray:
    """n neurons of a layer of d_ff, each used once before any is used again."""
    rounds = -(-n // d_ff)
    return np.concatenate([random.permutation(d_ff) for _ in range(rounds)])[:n]


def _rotation(config: DenseConfig, positions: Tensor) -> Tensor:
    """Cosines and sines (2, batch, 1, n_tokens, d_head / 2) of the angles at positions (batch, n_tokens)."""
    pairs = torch.arange(0, config.d_head, 2, device=positions.device).float() / config.d_head
    angles = positions[:, None, :, None] * config.rope_base**-pairs
    return torch.stack((angles.cos(), angles.sin()))


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the neighbouring pairs (2i, 2i + 1) of each head, as llama's GGUF files order them."""
    cos, sin = rotation.to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
