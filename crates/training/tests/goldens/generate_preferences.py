"""Learns preferences with PEFT, and keeps what came out.

    python generate_preferences.py            (after generate.py; PyTorch, Transformers and PEFT; a few seconds)

Direct preference optimisation (Rafailov et al., 2023) of the models and adapters of generate.py: the reference is the same model
with its adapter disabled. Each folder gets

    preferences-final.safetensors      initial.safetensors after the last step
    preferences-gradient.safetensors   where it is asked for: the gradient at point.safetensors of the mean loss over all pairs,
                                       computed in float64
    preferences.json
        pairs      per pair the preferred answer and the other: token ids, and for each whether it is a target of the token
                   before it
        batches    per step, which pairs make up its batch
        beta, optimizer
        losses, norms                    per step: the mean over its pairs, and the gradient's norm before clipping
        accuracies, preferred, others    per step: the share of pairs with a positive margin, and mean rewards

Everything is float32 with eager attention; each answer goes through the model alone, so that nothing is padded.
"""

import json
import os
import random
import shutil
import tempfile

import torch
from generate import HERE, MODELS, adapter_of
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

STEPS = 40
BETA = 0.3
OPTIMIZER = dict(learning_rate=1e-3, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01, max_norm=0.5)
# name: whether the gradient in float64 is kept
JOBS = {"llama": False, "qwen2": True}


def load(name, adapter):
    """A model with one of its adapters, ready to be trained."""
    base = AutoModelForCausalLM.from_pretrained(
        os.path.join(MODELS, name), dtype=torch.float32, attn_implementation="eager"
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(os.path.join(HERE, name, "adapter_config.json"), folder)
        shutil.copy(os.path.join(HERE, name, adapter), os.path.join(folder, "adapter_model.safetensors"))
        return PeftModel.from_pretrained(base, folder, is_trainable=True)


def logprob(model, tokens, targets):
    """ln π of an answer: the sum over its targets."""
    logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
    return -(losses * torch.tensor(targets[1:], dtype=losses.dtype)).sum()


def rewards(model, pair):
    """What both answers have gained."""
    with torch.no_grad(), model.disable_adapter():
        reference = [logprob(model, *answer) for answer in pair]
    return [BETA * (logprob(model, *answer) - before) for answer, before in zip(pair, reference)]


def pair_loss(preferred, other):
    return -torch.nn.functional.logsigmoid(preferred - other)


def make_pairs(name, vocabulary):
    rng = random.Random(f"{name} preferences")
    token = lambda: rng.randrange(3, vocabulary)
    pairs = []
    for _ in range(10):
        prompt = [token() for _ in range(rng.randrange(1, 16))]
        answers = [[token() for _ in range(rng.randrange(1, 16))] for _ in range(2)]
        pairs.append([(prompt + answer, [0] * len(prompt) + [1] * len(answer)) for answer in answers])
    return pairs


def run(name, with_gradient):
    folder = os.path.join(HERE, name)
    model = load(name, "initial.safetensors")
    pairs = make_pairs(name, model.config.vocab_size)
    batches = [[(3 * step + index) % len(pairs) for index in range(1 + step % 4)] for step in range(STEPS)]
    trainable = [p for p in model.parameters() if p.requires_grad]
    o = OPTIMIZER
    optimizer = torch.optim.AdamW(
        trainable, lr=o["learning_rate"], betas=(o["beta1"], o["beta2"]), eps=o["epsilon"],
        weight_decay=o["weight_decay"],
    )
    out = {"losses": [], "norms": [], "accuracies": [], "preferred": [], "others": []}
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        loss, won, gained = 0.0, 0, [0.0, 0.0]
        for index in batch:
            preferred, other = rewards(model, pairs[index])
            own = pair_loss(preferred, other) / len(batch)
            own.backward()
            loss += own.item()
            won += int(preferred > other)
            gained = [gained[0] + preferred.item(), gained[1] + other.item()]
        out["norms"].append(torch.nn.utils.clip_grad_norm_(trainable, o["max_norm"]).item())
        out["losses"].append(loss)
        out["accuracies"].append(won / len(batch))
        out["preferred"].append(gained[0] / len(batch))
        out["others"].append(gained[1] / len(batch))
        optimizer.step()
    save_file(adapter_of(model), os.path.join(folder, "preferences-final.safetensors"), metadata={"format": "pt"})
    if with_gradient:
        point = load(name, "point.safetensors").double()
        (sum(pair_loss(*rewards(point, pair)) for pair in pairs) / len(pairs)).backward()
        for parameter in point.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.grad
        gradient = {name: tensor.float() for name, tensor in adapter_of(point).items()}
        save_file(
            gradient, os.path.join(folder, "preferences-gradient.safetensors"), metadata={"format": "pt"}
        )
    golden = {
        "pairs": [[{"tokens": t, "targets": m} for t, m in pair] for pair in pairs],
        "batches": batches,
        "beta": BETA,
        "optimizer": OPTIMIZER,
        **out,
    }
    with open(os.path.join(folder, "preferences.json"), "w") as file:
        json.dump(golden, file)
        file.write("\n")
    print(f"{name}: {out['losses'][0]:.4f} -> {out['losses'][-1]:.4f}, margin {out['preferred'][-1] - out['others'][-1]:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job, with_gradient in JOBS.items():
        run(job, with_gradient)
