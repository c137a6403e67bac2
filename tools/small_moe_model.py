"""A small `qwen3moe` in torch, made to be trained on a CPU: only the experts that a token is routed to are computed.

Knows the arithmetic and the names of the weights in a GGUF, nothing about data or optimisers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from small_moe_file import Sizes
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class Routing:
    """What the routers of all layers did in one pass."""

    balance: Tensor  # scalar, summed over layers: of each at least 1, and that when its experts are used evenly
    usage: Tensor  # (n_layer, n_expert): how many tokens each expert got


class SmallMoe(nn.Module):
    """The whole model; weights float32."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        super().__init__()
        self.sizes = sizes
        random = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(sizes.n_vocab, sizes.d_model, generator=random) * 0.02)
        self.layers = nn.ModuleList(Layer(sizes, random) for _ in range(sizes.n_layer))
        self.norm = nn.Parameter(torch.ones(sizes.d_model))
        frequency = sizes.rope_base ** (-torch.arange(0, sizes.d_head, 2) / sizes.d_head)
        angle = torch.arange(sizes.n_context)[:, None] * frequency  # (n_context, d_head / 2)
        self.register_buffer("cosine", torch.cat((angle.cos(), angle.cos()), -1), persistent=False)
        self.register_buffer("sine", torch.cat((-angle.sin(), angle.sin()), -1), persistent=False)

    def hidden(self, ids: Tensor) -> tuple[Tensor, Routing]:
        """Normed states (batch, n_tokens, d_model) of the rows `ids` (batch, n_tokens)."""
        n_tokens = ids.shape[1]
        rotation = (self.cosine[:n_tokens], self.sine[:n_tokens])
        x, balances, usages = functional.embedding(ids, self.embedding), [], []
        for layer in self.layers:
            x = x + layer.attend(x, rotation)
            y, balance, usage = layer.route(x)
            x = x + y
            balances.append(balance)
            usages.append(usage)
        return self._norm(x), Routing(torch.stack(balances).sum(), torch.stack(usages))

    def losses(self, ids: Tensor) -> tuple[Tensor, Routing]:
        """Nats of each next token, (batch, n_tokens - 1)."""
        states, routing = self.hidden(ids)
        logits = functional.linear(states[:, :-1].flatten(0, 1), self.embedding)
        losses = functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        return losses.view(len(ids), -1), routing

    def _norm(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.norm, self.sizes.norm_eps)

    @torch.no_grad()
    def export(self) -> dict[str, np.ndarray]:
        """The weights, float32, under their GGUF names."""
        named = {"token_embd.weight": self.embedding, "output_norm.weight": self.norm}
        for n, layer in enumerate(self.layers):
            gate, up = layer.gate_up.chunk(2, 1)
            parts = {
                "attn_norm": layer.attn_norm,
                "attn_q": layer.q,
                "attn_k": layer.k,
                "attn_v": layer.v,
                "attn_q_norm": layer.q_norm,
                "attn_k_norm": layer.k_norm,
                "attn_output": layer.output,
                "ffn_norm": layer.ffn_norm,
                "ffn_gate_inp": layer.router,
                "ffn_gate_exps": gate,
                "ffn_up_exps": up,
                "ffn_down_exps": layer.down,
            }
            named |= {f"blk.{n}.{name}.weight": value for name, value in parts.items()}
        return {name: value.float().numpy().copy() for name, value in named.items()}


class Layer(nn.Module):
    """Attention with q and k normed per head, and the routed experts."""

    def __init__(self, sizes: Sizes, random: torch.Generator) -> None:
        super().__init__()
        self.sizes = s = sizes
        residual = (2 * s.n_layer) ** -0.5  # keeps the sum over the layers as large as one of them

        def matrix(*shape: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=random) * (0.5 * scale / math.sqrt(shape[-1])))

        self.attn_norm, self.ffn_norm = nn.Parameter(torch.ones(s.d_model)), nn.Parameter(torch.ones(s.d_model))
        self.q_norm, self.k_norm = nn.Parameter(torch.ones(s.d_head)), nn.Parameter(torch.ones(s.d_head))
        self.q = matrix(s.n_head * s.d_head, s.d_model)
        self.k = matrix(s.n_kv_head * s.d_head, s.d_model)
        self.v = matrix(s.n_kv_head * s.d_head, s.d_model)
        self.output = matrix(s.d_model, s.n_head * s.d_head, scale=residual)
        self.router = matrix(s.n_expert, s.d_model)
        self.gate_up = matrix(s.n_expert, 2 * s.d_expert, s.d_model)
        self.down = matrix(s.n_expert, s.d_model, s.d_expert, scale=residual)

    def attend(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """What attention adds to x (batch, n_tokens, d_model)."""
        s = self.sizes
        x = functional.rms_norm(x, x.shape[-1:], self.attn_norm, s.norm_eps)
        q, k, v = (
            functional.linear(x, weight).unflatten(-1, (-1, s.d_head)).transpose(1, 2)
            for weight in (self.q, self.k, self.v)
        )  # (batch, n_head or n_kv_head, n_tokens, d_head)
        q = rotate(functional.rms_norm(q, q.shape[-1:], self.q_norm, s.norm_eps), rotation)
        k = rotate(functional.rms_norm(k, k.shape[-1:], self.k_norm, s.norm_eps), rotation)
        k, v = (each.repeat_interleave(s.n_head // s.n_kv_head, 1) for each in (k, v))
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return functional.linear(seen.transpose(1, 2).flatten(2), self.output)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the experts add to x (batch, n_tokens, d_model); the balance term; tokens of each expert.

        The balance term is Switch Transformer's (arXiv 2101.03961, equation 4) over all top_k choices.
        """
        s, shape = self.sizes, x.shape
        x = functional.rms_norm(x, x.shape[-1:], self.ffn_norm, s.norm_eps).flatten(0, 1)  # (n, d_model)
        probability = functional.linear(x, self.router).softmax(-1)  # (n, n_expert)
        best, ids = probability.topk(s.top_k)  # (n, top_k)
        usage = torch.bincount(ids.flatten(), minlength=s.n_expert)
        balance = s.n_expert * (usage / ids.numel() * probability.mean(0)).sum()
        weights = best / best.sum(-1, keepdim=True)
        y: Any = RunExperts.apply(x, self.gate_up, self.down, ids, weights, usage.tolist())
        return y.view(shape), balance, usage


class RunExperts(torch.autograd.Function):
    """The weighted sum of each token's experts: rows are sorted by expert, so that each is one matrix product.

    By hand, because autograd would build a gradient of all experts for every one, and add where it can gather.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, usage: list[int]
    ) -> Tensor:
        """x (n, d_model), ids and weights (n, top_k), usage: rows of each expert; returns (n, d_model)."""
        order = ids.flatten().argsort(stable=True)  # (n * top_k,): choices in the order of their experts
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        rows = x[order // ids.shape[1]]  # (n * top_k, d_model)
        weight = weights.flatten()[order][:, None]
        inner, outer = x.new_empty(len(order), gate_up.shape[1]), torch.empty_like(rows)
        parts = (each.split(usage) for each in (rows, inner, outer, weight))
        for row, between, out, share, first, second in zip(*parts, gate_up, down, strict=True):
            gate, up = torch.mm(row, first.T, out=between).chunk(2, -1)
            torch.mm(functional.silu(gate).mul_(up).mul_(share), second.T, out=out)
        ctx.usage = usage
        ctx.save_for_backward(rows, inner, gate_up, down, order, back, weight)
        return outer[back].view(*ids.shape, -1).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        """The gradients of x, gate_up, down and weights."""
        rows, inner, gate_up, down, order, back, weight = ctx.saved_tensors
        usage, top_k = ctx.usage, len(order) // len(grad)
        outer, d_rows, d_weight = grad[order // top_k], torch.empty_like(rows), torch.empty_like(weight)
        d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        split = (each.split(usage) for each in (rows, inner, outer, weight, d_rows, d_weight))
        for expert, (row, between, d_out, share, d_row, d_share) in enumerate(zip(*split, strict=True)):
            gate, up = between.chunk(2, -1)
            active = functional.silu(gate)
            product = active * up
            d_product = d_out @ down[expert]
            torch.sum(d_product * product, -1, keepdim=True, out=d_share)
            torch.mm(d_out.T, product.mul_(share), out=d_down[expert])
            d_product.mul_(share)
            d_gate = torch.ops.aten.silu_backward(d_product * up, gate)
            d_between = torch.cat((d_gate, d_product.mul_(active)), -1)
            torch.mm(d_between, gate_up[expert], out=d_row)
            torch.mm(d_between.T, row, out=d_gate_up[expert])
        d_x = d_rows[back].view(-1, top_k, d_rows.shape[1]).sum(1)
        return d_x, d_gate_up, d_down, None, d_weight[back].view(-1, top_k), None


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x (..., n_tokens, d_head) by the rotation of its positions, halves paired (neox)."""
    cosine, sine = rotation
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat((second, first), -1) * sine
