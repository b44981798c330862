"""Fine-tunes small models with PEFT, and keeps what came out.

    python generate.py            (PyTorch, Transformers and PEFT; half a minute)

The models are those of crates/model/tests/goldens. Each folder here holds

    adapter_config.json, initial.safetensors   the adapter before training, as PEFT writes it
    final.safetensors                          the adapter after the last step
    point.safetensors, gradient.safetensors    an adapter without zeros, and the gradient of the mean loss over all samples
                                               there, computed in float64
    golden.json
        samples    token ids and, for each, whether it is a target of the token before it
        batches    per step, which samples make up its batch
        optimizer  AdamW's numbers and the largest norm of a gradient
        losses     per step, the mean over all targets of its batch
        norms      per step, the gradient's norm before clipping
        prompt, logits (base64 of little-endian f32)   with the final adapter

Everything is float32 with eager attention. A step's loss is the mean over the targets of the whole batch; each sample goes
through the model alone, so that nothing is padded.
"""

import base64
import copy
import json
import os
import random
import shutil

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
MODELS = os.path.join(HERE, "..", "..", "..", "model", "tests", "goldens")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 120
OPTIMIZER = dict(learning_rate=1e-3, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01, max_norm=0.5)

# name: (rank, alpha, rsLoRA, targets)
JOBS = {
    "llama": (4, 8, False, ALL),
    "qwen2": (3, 16, True, ["q_proj", "v_proj", "down_proj"]),
    "qwen3": (8, 16, False, ["q_proj", "k_proj", "o_proj", "up_proj"]),
    "mistral": (2, 4, False, ALL),
}


def adapter_of(model):
    """The adapter's tensors under the names of PEFT's files."""
    state = model.state_dict()
    return {
        name.replace(".default.", "."): tensor.detach().clone().contiguous()
        for name, tensor in state.items()
        if "lora_" in name
    }


def sample_loss(model, tokens, targets):
    """The sum over the targets of one sample."""
    logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
    return (losses * torch.tensor(targets[1:], dtype=losses.dtype)).sum()


def point_and_gradient(model, samples, folder):
    """The gradient at an adapter whose B is not zero."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    save_file(adapter_of(model), os.path.join(folder, "point.safetensors"), metadata={"format": "pt"})
    model = model.double()
    (sum(sample_loss(model, *s) for s in samples) / sum(sum(s[1]) for s in samples)).backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.grad
    gradient = {name: tensor.float() for name, tensor in adapter_of(model).items()}
    save_file(gradient, os.path.join(folder, "gradient.safetensors"), metadata={"format": "pt"})


def run(name, rank, alpha, rank_stabilized, targets):
    folder = os.path.join(HERE, name)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    rng = random.Random(name)
    torch.manual_seed(7)
    base = AutoModelForCausalLM.from_pretrained(
        os.path.join(MODELS, name), dtype=torch.float32, attn_implementation="eager"
    )
    vocabulary = base.config.vocab_size
    config = LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=rank_stabilized, target_modules=targets, lora_dropout=0.0,
        bias="none", task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    model.peft_config["default"].inference_mode = True
    model.peft_config["default"].base_model_name_or_path = name
    model.peft_config["default"].save_pretrained(folder)
    save_file(adapter_of(model), os.path.join(folder, "initial.safetensors"), metadata={"format": "pt"})
    samples = []
    for _ in range(12):
        length = rng.randrange(2, 48)
        tokens = [rng.randrange(3, vocabulary) for _ in range(length)]
        # The first token is nobody's target; at least one other is.
        mask = [0] + [int(rng.random() < 0.6) for _ in range(length - 1)]
        mask[-1] = 1
        samples.append((tokens, mask))
    point_and_gradient(model, samples, folder)
    batches = [[(7 * step + index) % len(samples) for index in range(1 + step % 5)] for step in range(STEPS)]
    trainable = [p for p in model.parameters() if p.requires_grad]
    o = OPTIMIZER
    optimizer = torch.optim.AdamW(
        trainable, lr=o["learning_rate"], betas=(o["beta1"], o["beta2"]), eps=o["epsilon"],
        weight_decay=o["weight_decay"],
    )
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
        norms.append(torch.nn.utils.clip_grad_norm_(trainable, o["max_norm"]).item())
        losses.append(total)
        optimizer.step()
    model.eval()
    save_file(adapter_of(model), os.path.join(folder, "final.safetensors"), metadata={"format": "pt"})
    prompt = [rng.randrange(3, vocabulary) for _ in range(24)]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0]
        plain = sum(sample_loss(model, *s) for s in samples).item()
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
    print(f"{name}: {losses[0]:.4f} -> {losses[-1]:.4f}, sum over samples {plain:.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job, settings in JOBS.items():
        run(job, *settings)
