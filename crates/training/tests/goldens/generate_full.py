"""Trains all weights of small models with PyTorch, and keeps what came out.

    python generate_full.py       (PyTorch and Transformers; half a minute)

The models are those of crates/model/tests/goldens, whose weights training starts from, widened to float32. Each folder full-NAME
here holds

    gradient.safetensors   the gradient of the mean loss over all samples by all weights at the start, computed in float64; of a
                           tied table once
    golden.json            as generate.py has it

Everything else is as in generate.py. Weight decay leaves biases and the weights of norms alone.
"""

import base64
import copy
import json
import os
import random
import shutil

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from generate import HERE, MODELS, sample_loss

STEPS = 40
OPTIMIZER = dict(learning_rate=1e-3, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.1, max_norm=1.0)
JOBS = ["llama", "llama-f16", "llama-bias", "qwen2", "qwen3"]


def gradient(model, samples, folder):
    model = copy.deepcopy(model).double()
    (sum(sample_loss(model, *s) for s in samples) / sum(sum(s[1]) for s in samples)).backward()
    found = {name: p.grad.float().contiguous() for name, p in model.named_parameters()}
    save_file(found, os.path.join(folder, "gradient.safetensors"), metadata={"format": "pt"})


def run(name):
    folder = os.path.join(HERE, "full-" + name)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    rng = random.Random("full " + name)
    model = AutoModelForCausalLM.from_pretrained(
        os.path.join(MODELS, name), dtype=torch.float32, attn_implementation="eager"
    )
    vocabulary = model.config.vocab_size
    samples = []
    for _ in range(12):
        length = rng.randrange(2, 48)
        tokens = [rng.randrange(3, vocabulary) for _ in range(length)]
        mask = [0] + [int(rng.random() < 0.6) for _ in range(length - 1)]
        mask[-1] = 1
        samples.append((tokens, mask))
    gradient(model, samples, folder)
    batches = [[(7 * step + index) % len(samples) for index in range(1 + step % 5)] for step in range(STEPS)]
    o = OPTIMIZER
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": o["weight_decay"]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=o["learning_rate"], betas=(o["beta1"], o["beta2"]), eps=o["epsilon"])
    losses, norms = [], []
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        count = sum(sum(samples[i][1]) for i in batch)
        total = 0.0
        for i in batch:
            loss = sample_loss(model, *samples[i]) / count
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, o["max_norm"]).item())
        losses.append(total)
        optimizer.step()
    model.eval()
    prompt = [rng.randrange(3, vocabulary) for _ in range(24)]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0]
    golden = {
        "samples": [{"tokens": t, "targets": m} for t, m in samples],
        "batches": batches,
        "optimizer": OPTIMIZER,
        "losses": losses,
        "norms": norms,
        "prompt": prompt,
        "logits": base64.b64encode(logits.numpy().astype("<f4").tobytes()).decode(),
    }
    with open(os.path.join(folder, "golden.json"), "w") as file:
        json.dump(golden, file)
        file.write("\n")
    print(f"{name}: {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in JOBS:
        run(job)
