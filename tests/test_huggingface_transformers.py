"""Against `transformers` itself, where it and torch are installed (no extra asks for them): models that it made and
saved, of each class and each kind of rotation, have the logits that it computes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_models import decoded, write_tokenizer
from models import golden_path
from test_huggingface import logits_of

from edgert.architectures import supported
from edgert.huggingface import HuggingFaceFolder

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of other people's imports
    torch: Any = pytest.importorskip("torch", reason="torch is not installed")
    transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")

COMMON = {
    **{"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 512, "num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.12},
}
LOCAL = {"num_local_experts": 5, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3}
QWEN = EXPERTS | {"moe_intermediate_size": 40}
SCALES = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}
LATENT = {
    **{"num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    **{"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 20, "first_k_dense_replace": 1},
}
GROUPS = {"n_group": 4, "topk_group": 2, "n_shared_experts": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # class, its configuration, rotation
    ("Mixtral", LOCAL, {}),
    ("Mixtral", LOCAL | {"head_dim": 32}, {}),
    ("Olmoe", EXPERTS | {"eos_token_id": 2}, {}),
    ("Qwen2Moe", QWEN | {"shared_expert_intermediate_size": 56}, {}),
    ("Qwen3Moe", QWEN | {"norm_topk_prob": True, "tie_word_embeddings": True, "head_dim": 32}, {}),
    ("Qwen3Moe", QWEN | {"norm_topk_prob": True}, {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}),
    ("GraniteMoe", LOCAL, {}),
    ("GraniteMoeShared", LOCAL | SCALES | {"shared_intermediate_size": 24}, {}),
    ("Llama", {"attention_bias": True}, LLAMA3 | ORIGINAL),
    ("Llama", {"tie_word_embeddings": True}, {"rope_type": "linear", "factor": 3.0}),
    ("Mistral", {"sliding_window": None}, {}),
    ("GptOss", LOCAL | {"head_dim": 16, "sliding_window": 12}, YARN | {"truncate": True}),
    ("DeepseekV2", LATENT | {"q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 2}, {}),
    ("DeepseekV2", LATENT | {"q_lora_rank": 24, "topk_method": "greedy", "n_shared_experts": 1}, {}),
    ("DeepseekV3", LATENT | GROUPS | {"q_lora_rank": 24}, {}),
    ("DeepseekV3", LATENT | GROUPS | {"q_lora_rank": None}, YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}),
]


def saved(folder: Path, name: str, options: dict[str, Any], rope: dict[str, Any], stacked: bool) -> Any:
    """A random model, saved in several shards; 40 tokens and their logits."""
    if rope:
        new = transformers.__version__ >= "5"
        options = options | ({"rope_parameters": rope | {"rope_theta": 5e4}} if new else {"rope_scaling": rope})
    config = getattr(transformers, f"{name}Config")(**(COMMON | options))
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().float()
    tokens = np.random.default_rng(5).integers(0, 300, 40)
    with torch.no_grad():
        for part, values in model.named_parameters():
            if values.ndim == 1:
                values.copy_(torch.randn_like(values) * 0.3 + ("norm" in part))
        logits = model(torch.tensor(tokens)[None]).logits[0].numpy()
    model.save_pretrained(folder, max_shard_size="60KB", **({"save_original_format": False} if stacked else {}))
    write_tokenizer(folder, decoded(golden_path("olmoe-f32"))[0])
    return tokens.tolist(), logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stacked", [False, True], ids=["as saved", "as in memory"])
@pytest.mark.parametrize(("name", "options", "rope"), CASES)
def test_logits_equal(name: str, options: dict[str, Any], rope: dict[str, Any], stacked: bool, tmp_path: Path) -> None:
    if stacked and transformers.__version__ < "5":
        pytest.skip("transformers 4 has one tensor for each expert")
    tokens, expected = saved(tmp_path, name, options, rope, stacked)
    file = HuggingFaceFolder.open(tmp_path)
    assert len(file.parts) > 5
    if file.metadata["general.architecture"] not in supported():
        pytest.skip(f"the architecture {file.metadata['general.architecture']} does not run yet")
    assert np.abs(logits_of(file, tokens) - expected).max() < 1e-4 < np.abs(expected).std()
