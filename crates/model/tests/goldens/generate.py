"""Makes small models with random weights, and what Transformers computes with them.

    python generate.py            (PyTorch and Transformers; a few seconds)

Each folder holds a model in the Hugging Face form (config.json and safetensors) and golden.json:

    input_ids   one prompt, as [[id, ...]]
    shape       [positions, vocabulary]
    logits      base64 of the little-endian f32 logits of every position of the prompt
    greedy      the ids of a greedy continuation of the prompt
    margin      the smallest distance between the best and the second-best logit along the continuation

Attention is eager and everything is computed in float32; weights stored as bf16 or f16 are widened
first. Weights, biases and norms are random and large enough that mistakes show in the logits.
"""

import base64
import json
import os
import shutil

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

HERE = os.path.dirname(os.path.abspath(__file__))
CONTINUATION = 16

COMMON = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=96,
    vocab_size=160,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def rope(theta, **more):
    return {"rope_type": "default", "rope_theta": theta, **more}


# name: (config, dtype of the file, length of the prompt, size of a shard)
MODELS = {
    "llama": (LlamaConfig(**COMMON, rope_parameters=rope(10000.0)), torch.float32, 32, None),
    "llama-bias": (
        LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True, rope_parameters=rope(10000.0)),
        torch.float32, 24, None,
    ),
    "llama3-rope": (
        LlamaConfig(
            **COMMON | dict(num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512),
            rope_parameters=rope(
                500000.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
        torch.float32, 40, None,
    ),
    "llama-bf16": (LlamaConfig(**COMMON | dict(intermediate_size=172), rope_parameters=rope(10000.0)), torch.bfloat16, 32, None),
    "llama-f16": (LlamaConfig(**COMMON | dict(tie_word_embeddings=True), rope_parameters=rope(10000.0)), torch.float16, 32, None),
    "llama-sharded": (LlamaConfig(**COMMON | dict(num_hidden_layers=3), rope_parameters=rope(10000.0)), torch.float32, 24, "100KB"),
    "qwen2": (
        Qwen2Config(**COMMON | dict(tie_word_embeddings=True, vocab_size=320, rms_norm_eps=1e-6), rope_parameters=rope(1000000.0)),
        torch.float32, 32, None,
    ),
    "qwen3": (
        Qwen3Config(**COMMON | dict(num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-6, tie_word_embeddings=True), head_dim=24, rope_parameters=rope(1000000.0)),
        torch.float32, 32, None,
    ),
    "mistral": (
        MistralConfig(**COMMON, head_dim=8, sliding_window=8, rope_parameters=rope(10000.0)),
        torch.float32, 40, None,
    ),
}


def randomise(model, seed):
    g = torch.Generator().manual_seed(seed)

    def normal(p, std, mean=0.0):
        p.copy_(torch.randn(p.shape, generator=g) * std + mean)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                normal(p, 0.2, 1.0)
            elif name.endswith("bias"):
                normal(p, 0.3)
            elif "embed_tokens" in name:
                normal(p, 0.4)
            else:
                normal(p, 1.2 / p.shape[1] ** 0.5)


def main():
    for seed, (name, (config, dtype, length, shard)) in enumerate(MODELS.items(), start=100):
        folder = os.path.join(HERE, name)
        shutil.rmtree(folder, ignore_errors=True)
        config._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config).eval().float()
        randomise(model, seed)
        model = model.to(dtype)
        model.config.dtype = dtype
        model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
        extra = os.path.join(folder, "generation_config.json")
        if os.path.exists(extra):
            os.remove(extra)
        spell_out(os.path.join(folder, "config.json"))

        # Loaded again, so that the golden is of the files as they lie there.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        g = torch.Generator().manual_seed(seed + 1000)
        # A prompt whose continuation is clear-cut and holds no end token.
        while True:
            ids = torch.randint(3, config.vocab_size, (1, length), generator=g)
            greedy, margin = continuation(model, ids)
            if margin > 0.03 and config.eos_token_id not in greedy:
                break
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0]
        golden = {
            "input_ids": ids.tolist(),
            "shape": list(logits.shape),
            "logits": base64.b64encode(logits.contiguous().numpy().astype("<f4").tobytes()).decode(),
            "greedy": greedy,
            "margin": round(margin, 6),
        }
        with open(os.path.join(folder, "golden.json"), "w") as f:
            json.dump(golden, f, separators=(",", ":"))
            f.write("\n")
        size = sum(os.path.getsize(os.path.join(folder, n)) for n in os.listdir(folder))
        print(f"{name}: {size} bytes, logits std {logits.std():.2f}, margin {margin:.4f}, greedy {greedy}")


@torch.no_grad()
def continuation(model, ids):
    greedy, margin = [], float("inf")
    for _ in range(CONTINUATION):
        best = model(ids, use_cache=False).logits[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        greedy.append(int(best.indices[0]))
        ids = torch.cat((ids, best.indices[:1].view(1, 1)), dim=1)
    return greedy, margin


def spell_out(path):
    """Writes the configuration as published checkpoints have it: rope_theta and rope_scaling of their own."""
    with open(path) as f:
        config = json.load(f)
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    config["rope_scaling"] = parameters if parameters["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype", "float32")
    with open(path, "w") as f:
        json.dump(config, f, indent=2, sort_keys=True)
        f.write("\n")


if __name__ == "__main__":
    main()
