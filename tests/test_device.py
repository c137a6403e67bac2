"""The CPU device against the reference device, bit for bit: odd sizes, few or no experts, mixed formats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_kernels import random_matrix

from edgert.devices.base import (
    AttentionWeights,
    ConvolutionWeights,
    DeltaWeights,
    ExpertBiases,
    ExpertWeights,
    LatentWeights,
    LayerWeights,
    Linear,
    Norm,
)
from edgert.devices.cpu import CpuDevice
from edgert.devices.reference import ReferenceDevice
from edgert.engine import Engine, Session
from edgert.experts.residency import AllResident
from edgert.quant.formats import FORMATS, Matrix
from edgert.types import DeltaConfig, Floats, LatentConfig, LayerConfig, ModelConfig, RopeConfig, RouterConfig

N_CONTEXT, N_TOKENS = 96, 34


def config(
    d_model: int, d_ff: int, heads: tuple[int, int], d_head: int, experts: tuple[int, int], shared: int, **other: Any
) -> ModelConfig:
    """Two layers; heads: of queries and of keys; experts: how many, and how many of them are used."""
    router = RouterConfig(*experts, **other.pop("routing", {})) if experts[0] else None
    n_rotated = d_head - other["d_value"] if "d_value" in other else d_head // 4 * 2  # the former of latent attention
    rope = RopeConfig("neox" if d_model % 2 else "norm", n_rotated)
    sizes = {"d_head": d_head, "d_value": d_head, "n_vocab": 53, "n_context": 4096, "eps": 1e-5}
    sizes |= {name: other.pop(name) for name in ("d_value",) if name in other}
    scales = {"attention_scale": 0.1, "residual_scale": 0.7, "logit_scale": 0.5}
    return ModelConfig(
        "x", 2, d_model, *heads, rope=rope, router=router, d_expert=d_ff, d_shared=shared, **sizes, **scales, **other
    )


class Weights:
    """Random weights of a configuration: formats of gate, up, down and everything else."""

    def __init__(self, c: ModelConfig, gate: str, up: str, down: str, rest: str) -> None:
        self._seed = 0

        def matrix(name: str, n_out: int, n_in: int) -> Matrix:
            self._seed += 1
            return random_matrix(FORMATS[name], n_out, n_in, self._seed)

        def vector(n: int) -> Floats:
            self._seed += 1
            return (1 + 0.1 * np.random.default_rng(self._seed).standard_normal(n)).astype(np.float32)

        def expert(width: int) -> ExpertWeights:
            return ExpertWeights(
                matrix(gate, width, c.d_model), matrix(up, width, c.d_model), matrix(down, c.d_model, width)
            )

        q, kv = c.n_heads * c.d_head, c.n_kv_heads * c.d_head

        def linear(n_out: int, n_in: int) -> Linear:
            return Linear(matrix(rest, n_out, n_in))

        def attention(kind: LayerConfig) -> AttentionWeights:
            normed = kind.normed and c.qk_norm == "head"
            return AttentionWeights(
                query=Linear(matrix(rest, q, c.d_model), vector(q)),
                key=linear(kv, c.d_model),
                value=linear(kv, c.d_model),
                output=Linear(matrix("f16", c.d_model, q)),
                query_norm=vector(c.d_head) if normed else None,
                key_norm=vector(c.d_head) if normed else None,
                gate=linear(q, c.d_model) if c.query_gate else None,
                sinks=vector(c.n_heads) if c.sinks else None,
            )

        def latent(kind: LayerConfig) -> LatentWeights:
            assert c.latent is not None
            rank, plain, out = c.latent.query_rank, c.latent.d_plain, c.latent.d_output
            return LatentWeights(
                query=linear(c.n_heads * (plain + c.rope.n_rotated), rank or c.d_model),
                latent=linear(c.d_value + c.rope.n_rotated, c.d_model),
                latent_norm=vector(c.d_value),
                key_up=matrix(rest, c.n_heads * c.d_value, plain),
                value_up=matrix(rest, c.n_heads * out, c.d_value),
                output=linear(c.d_model, c.n_heads * out),
                query_down=linear(rank, c.d_model) if rank else None,
                query_norm=vector(rank) if rank else None,
            )

        def convolution(kind: LayerConfig) -> ConvolutionWeights:
            taps = vector(c.n_taps * c.d_model).reshape(c.n_taps, c.d_model)
            return ConvolutionWeights(linear(3 * c.d_model, c.d_model), taps, linear(c.d_model, c.d_model))

        def delta(kind: LayerConfig) -> DeltaWeights:
            d = c.delta
            assert d is not None
            return DeltaWeights(
                input=linear(d.d_channels, c.d_model),
                gate=linear(d.d_values, c.d_model),
                beta=Linear(matrix("f32", d.n_value_heads, c.d_model)),
                alpha=Linear(matrix("f32", d.n_value_heads, c.d_model)),
                taps=vector(d.n_taps * d.d_channels).reshape(d.n_taps, d.d_channels),
                decay=-vector(d.n_value_heads),
                step_bias=vector(d.n_value_heads),
                norm=vector(d.d_state),
                output=linear(c.d_model, d.d_values),
            )

        kinds = {"attention": latent if c.latent else attention, "convolution": convolution, "delta": delta}

        def norm() -> Norm:
            return Norm(vector(c.d_model), vector(c.d_model) if c.norm_bias else None)

        def biases() -> ExpertBiases:
            assert c.router is not None
            widths = (c.d_expert, c.d_expert, c.d_model)
            return ExpertBiases(*(vector(c.router.n_expert * n).reshape(c.router.n_expert, n) for n in widths))

        def layer(index: int) -> LayerWeights:
            routed, width, kind = c.has_experts(index), c.d_always(index), c.layer(index)
            router, n_expert = None, c.router.n_expert if c.router else 0
            if routed:
                router = Linear(matrix("f32", n_expert, c.d_model), vector(n_expert) if c.expert_bias else None)
            return LayerWeights(
                mixer_norm=norm(),
                mixer=kinds[kind.mixer](kind),
                feed_forward_norm=norm(),
                router=router,
                choice_bias=vector(n_expert) if routed and c.router and c.router.biased else None,
                shared=expert(width) if width else None,
                shared_gate=matrix("f32", 1, c.d_model) if c.shared_gate and routed else None,
                expert_biases=biases() if routed and c.expert_bias else None,
            )

        self.layers = [layer(index) for index in range(c.n_layers)]
        self.experts = [
            [expert(c.d_expert) for _ in range(c.router.n_expert if c.router and c.has_experts(index) else 0)]
            for index in range(c.n_layers)
        ]
        self.norm, self.head = norm(), matrix(rest, c.n_vocab, c.d_model)
        self.embedding = np.random.default_rng(5).standard_normal((c.n_vocab, c.d_model)).astype(np.float32)

    def engine(self, device: Any, kv_type: str) -> tuple[Engine, Session]:
        """An engine over a device with these weights."""
        for layer in self.layers:
            device.add_layer(layer)
        tables: list[Any] = []
        for experts in self.experts:
            table = device.new_table(len(experts)) if experts else None
            for index, expert in enumerate(experts):
                table[index] = device.pack_expert(expert)
            tables.append(table)
        device.set_head(self.norm, Linear(self.head))
        session = Session(device.new_cache(N_CONTEXT, kv_type))
        return Engine(device.config, device, AllResident(device, tables), lambda ids: self.embedding[ids]), session


def logits(engine: Engine, session: Session, chunk: int) -> Floats:
    """Of every position of one sequence."""
    session.tokens.clear()
    ids = [(7 * i * i + 3) % 53 for i in range(N_TOKENS)]
    return np.concatenate([rows.copy() for n in engine.prefill(ids, session, chunk=chunk) for rows in engine.logits(n)])


CONVOLUTION, DELTA, GATED = LayerConfig("convolution", False), LayerConfig("delta"), LayerConfig(normed=True)
TEMPERED = LayerConfig(rotates=False, normed=False, tempered=True)
NORMED: dict[str, Any] = {"norm_bias": True, "qk_norm": "head", "norm_late": True}
HEADS: dict[str, Any] = {"query_gate": True, "qk_norm": "head", "shared_gate": True}
GROUPED: dict[str, Any] = {"routing": {"n_groups": 2, "n_groups_used": 1, "gating": "sigmoid", "biased": True}}
LATE: dict[str, Any] = {"routing": {"late": True, "normalise": False}}
ON_INPUTS: dict[str, Any] = {"routing": {"late": True, "gating": "sigmoid", "on_inputs": True}, "temperature": (0.1, 7)}
CASES = {
    "odd-floats": (config(40, 24, (3, 1), 12, (5, 2), 9, shared_gate=True), ("f16", "bf16", "f16", "f16")),
    "one-expert": (config(33, 17, (2, 2), 8, (1, 1), 0), ("f32", "f32", "bf16", "f32")),
    "dense": (config(96, 0, (3, 3), 32, (0, 0), 64), ("int4", "int8", "f16", "int4")),
    "int4-int8": (config(64, 64, (4, 2), 16, (4, 2), 32), ("int4", "int8", "int4", "int4")),
    "int8-float": (config(64, 32, (4, 2), 16, (9, 4), 0), ("int8", "f16", "int5-min", "int4")),
    "halves": (config(64, 32, (4, 1), 16, (3, 3), 0), ("int4", "int2-g16-min", "iq4-nl", "int6-g16")),
    "gelu": (config(64, 32, (4, 2), 16, (4, 2), 0, activation="gelu"), ("int4", "int4", "int4", "int4")),
    "oss": (config(64, 32, (4, 2), 16, (4, 2), 32, activation="swiglu-oss"), ("mxfp4", "mxfp4", "mxfp4", "int8")),
    "window": (
        config(64, 32, (4, 2), 16, (4, 2), 0, layers=(LayerConfig(window=9),) * 2),
        ("int4", "int4", "int4", "int4"),
    ),
    "latent": (
        config(64, 32, (3, 1), 64 + 8, (4, 2), 0, d_value=64, latent=LatentConfig(32, 32, 96), **GROUPED),
        ("int4", "int4", "int4", "int4"),
    ),
    "latent-floats": (
        config(40, 24, (5, 1), 16 + 12, (4, 2), 9, d_value=16, latent=LatentConfig(7, 32)),
        ("f16", "f16", "f16", "f32"),
    ),
    "convolution": (
        config(40, 24, (3, 1), 12, (5, 2), 0, n_taps=4, d_dense=17, layers=(CONVOLUTION, LayerConfig()), **NORMED),
        ("f16", "bf16", "f16", "f16"),
    ),
    "delta": (
        config(64, 32, (4, 2), 16, (4, 2), 32, delta=DeltaConfig(2, 6, 32, 3), layers=(DELTA, GATED), **HEADS),
        ("int4", "int8", "int4", "int4"),
    ),
    "delta-in-turn": (
        config(64, 32, (4, 2), 16, (4, 2), 0, delta=DeltaConfig(3, 6, 16, 2, True), layers=(DELTA, DELTA)),
        ("f32", "f32", "f32", "f16"),
    ),
    "sinks": (
        config(64, 33, (4, 2), 16, (5, 3), 0, sinks=True, expert_bias=True, activation="swiglu-oss", **LATE),
        ("f16", "f16", "f16", "int4"),
    ),
    "on-inputs": (
        config(64, 32, (4, 2), 16, (5, 3), 32, **ON_INPUTS, layers=(LayerConfig(span=5), TEMPERED), qk_norm="unit"),
        ("int4", "int4", "int4", "int4"),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("activations", ["int8", "f32"])
def test_the_devices_agree(name: str, activations: str) -> None:
    c, formats = CASES[name]
    weights = Weights(c, *formats)
    kv_type = "int8" if name in ("dense", "window") else "f16"
    expected = logits(*weights.engine(ReferenceDevice(c, N_CONTEXT, activations=activations), kv_type), 64)
    assert np.isfinite(expected).all()
    for threads, chunk in ((1, 34), (3, 13), (2, 1)):
        engine, session = weights.engine(CpuDevice(c, N_CONTEXT, threads=threads, activations=activations), kv_type)
        assert np.array_equal(logits(engine, session, chunk), expected), (threads, chunk)
        engine.every_layer = True  # outputs kept apart
        assert np.array_equal(logits(engine, session, chunk), expected), (threads, chunk, "layer by layer")
        engine.every_layer = False
        assert np.array_equal(logits(engine, session, 7), expected), (threads, "in chunks of 7")
        engine.device.close()


@pytest.mark.parametrize("name", [name for name, (c, _) in CASES.items() if c.router])
@pytest.mark.parametrize("activations", ["int8", "f32"])
def test_the_devices_show_the_same_rows_to_whoever_observes(name: str, activations: str) -> None:
    c, formats = CASES[name]
    weights = Weights(c, *formats)
    seen: list[list[tuple[Any, ...]]] = []
    devices = (
        (ReferenceDevice(c, N_CONTEXT, activations=activations), 64),
        (CpuDevice(c, N_CONTEXT, threads=3, activations=activations), 34),
        (CpuDevice(c, N_CONTEXT, threads=2, activations=activations), 3),
        (CpuDevice(c, N_CONTEXT, threads=2, activations=activations), 1),
    )
    for device, chunk in devices:
        engine, session = weights.engine(device, "f16")
        seen.append([[], []])

        def observe(layer: int, device: Any = device) -> None:
            routed, inputs = device.routed(layer), device.inputs(layer)
            hidden = np.empty((routed.tokens.size, c.d_expert), np.float32)
            hidden[routed.slots] = device.hidden(layer)
            assert inputs.shape == (len(routed.routes.ids), c.d_model)
            seen[-1][layer].append((routed.routes.ids.copy(), inputs.copy(), hidden))

        engine.observe = observe
        logits(engine, session, chunk)
        engine.observe = None
        device.close()
    expected = [[np.concatenate(rows) for rows in zip(*layer, strict=True)] for layer in seen[0]]
    for layers in seen[1:]:
        for layer, rows in zip(layers, expected, strict=True):
            for found, right in zip(zip(*layer, strict=True), rows, strict=True):
                assert np.array_equal(np.concatenate(found), right)
