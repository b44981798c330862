"""A small Llama in plain PyTorch, with the parameter names and the arithmetic of the usual checkpoints."""

import torch
import torch.nn.functional as F
from torch import nn

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 288,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 256,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-05,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
    "torch_dtype": "float32",
}


# Matrix products in bfloat16 (with float32 weights, sums and everything else): several times faster
# on processors that have instructions for it.
FAST = False


class Linear(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        if FAST and self.training:
            return F.linear(x.bfloat16(), self.weight.bfloat16()).float()
        return F.linear(x, self.weight)


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        self.q_proj = Linear(c["hidden_size"], self.heads * self.dim)
        self.k_proj = Linear(c["hidden_size"], self.kv_heads * self.dim)
        self.v_proj = Linear(c["hidden_size"], self.kv_heads * self.dim)
        self.o_proj = Linear(self.heads * self.dim, c["hidden_size"])

    def attend(self, q, k, v, shape):
        """Attention within rows of one length; padding is at the right, where nothing real looks."""
        n, t = shape
        q = q.view(n, t, self.heads, self.dim).transpose(1, 2)
        k, v = (x.view(n, t, self.heads, self.dim).transpose(1, 2) for x in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).reshape(n * t, self.heads * self.dim)


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c["hidden_size"], c["intermediate_size"])
        self.up_proj = Linear(c["hidden_size"], c["intermediate_size"])
        self.down_proj = Linear(c["intermediate_size"], c["hidden_size"])

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        self.mlp = Mlp(c)

    def before(self, x, cos, sin):
        """Queries, keys and values of all tokens, keys and values repeated for every query head."""
        a, h = self.self_attn, self.input_layernorm(x)
        q = rotate(a.q_proj(h).view(-1, a.heads, a.dim), cos, sin)
        k = rotate(a.k_proj(h).view(-1, a.kv_heads, a.dim), cos, sin)
        v = a.v_proj(h).view(-1, a.kv_heads, a.dim)
        group = a.heads // a.kv_heads
        return q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)

    def after(self, x, y):
        x = x + self.self_attn.o_proj(y)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])


class Llama(nn.Module):
    def __init__(self, c=CONFIG):
        super().__init__()
        self.model = Body(c)
        half = c["head_dim"] // 2
        frequencies = c["rope_theta"] ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.outer(torch.arange(c["max_position_embeddings"], dtype=torch.float32), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.before, self.after = Layer.before, Layer.after
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = c["initializer_range"]
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= (2 * c["num_hidden_layers"]) ** 0.5
                nn.init.normal_(p, std=std)

    def compile(self):
        self.before = torch.compile(Layer.before, dynamic=True)
        self.after = torch.compile(Layer.after, dynamic=True)

    def forward(self, groups, where):
        """Logits of the flattened positions where `where` holds. A group is rows of tokens of one length.

        All tokens go through the matrices together; only attention is done group by group.
        """
        positions = torch.cat([torch.arange(g.shape[1]).repeat(g.shape[0]) for g in groups])
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        sizes = [g.numel() for g in groups]
        x = self.model.embed_tokens(torch.cat([g.reshape(-1) for g in groups]))
        for layer in self.model.layers:
            q, k, v = (part.split(sizes) for part in self.before(layer, x, cos, sin))
            y = torch.cat([layer.self_attn.attend(*qkv, g.shape) for g, *qkv in zip(groups, q, k, v)])
            x = self.after(layer, x, y)
        return F.linear(self.model.norm(x[where]), self.model.embed_tokens.weight)
