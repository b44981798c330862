"""Trains the demo model and writes it as a Hugging Face folder.

    python train.py --out ../demo

The same seed, number of workers and version of PyTorch are meant to give the same weights. A step's questions
depend on the seed and the step alone, so a run that was interrupted goes on from its checkpoint
as if it had not been.
"""

import argparse
import math
import os
import random
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import save_file

import generate
import tokenizer
import model as model_module
from model import CONFIG, Llama


def chunks(examples, overhead=40):
    """Splits examples, sorted by length, into groups so that padding costs little."""
    examples = sorted(examples, key=lambda e: len(e[0]))
    n, step = len(examples), 4
    cuts = list(range(0, n, step)) + [n]
    best = {0: (0, None)}
    for j in cuts[1:]:
        longest = len(examples[j - 1][0])
        best[j] = min((best[i][0] + (j - i) * longest + overhead, i) for i in cuts if i < j)
    at, groups = n, []
    while at:
        start = best[at][1]
        groups.append(examples[start:at])
        at = start
    return groups


def tensors(group):
    """Inputs, the positions that predict a token of an answer, those tokens and their weights."""
    longest = len(group[-1][0])
    ids = torch.full((len(group), longest), generate.PAD)
    loss = torch.zeros((len(group), longest))
    for row, (tokens, mask) in enumerate(group):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        loss[row, : len(tokens)] = torch.tensor(mask, dtype=torch.float32)
    loss = loss[:, 1:]
    where = loss > 0
    return ids[:, :-1], where, ids[:, 1:][where], loss[where]


@torch.no_grad()
def accuracy(model, items):
    """Share of the items per task whose whole answer greedy decoding gives."""
    right, total = {}, {}
    for start in range(0, len(items), 60):
        part = items[start : start + 60]
        group = sorted(((*generate.encode(i["messages"], i["answer"]), i) for i in part), key=lambda g: len(g[0]))
        for tokens, _, item in group:
            total[item["task"]] = total.get(item["task"], 0) + 1
        # Only the last answer counts here; earlier ones are given.
        rows = [(t, [0] * (len(t) - len(i["answer"].encode()) - 1) + [1] * (len(i["answer"].encode()) + 1)) for t, _, i in group]
        ids, where, targets, _ = tensors(rows)
        hit = torch.zeros(where.shape, dtype=torch.bool)
        hit[where] = model([ids], where.reshape(-1)).argmax(-1) == targets
        for row, (_, _, item) in enumerate(group):
            right[item["task"]] = right.get(item["task"], 0) + int(bool((hit[row] | ~where[row]).all()))
    return {task: right[task] / total[task] for task in total}


def export(model, folder):
    os.makedirs(folder, exist_ok=True)
    weights = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    tokenizer.write_json(folder, "config.json", CONFIG)
    tokenizer.write(folder, CONFIG["max_position_embeddings"])


def share(examples, workers):
    """Deals the examples, sorted by length, out to the workers."""
    examples = sorted(examples, key=lambda e: len(e[0]))
    return [examples[w::workers] for w in range(workers)]


def schedule(step, args):
    """The share of the full rate: up in a line, down in a cosine, level, and down in a line at the end."""
    step = min(step, args.hold) if step <= (args.cool_down or step) else step
    if args.cool_down and step > args.cool_down:
        left = (args.steps - step) / (args.steps - args.cool_down)
        return schedule(args.cool_down, args) * left
    warm = min(1.0, (step + 1) / args.warm_up)
    done = max(0, step - args.warm_up) / max(1, args.cosine - args.warm_up)
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--warm-up", type=int, default=100)
    parser.add_argument("--cool-down", type=int, default=2200, help="from this step on, go straight down to nothing at the last step")
    parser.add_argument("--hold", type=int, default=1200, help="keep the rate from this step on")
    parser.add_argument("--cosine", type=int, default=2400, help="steps that the cosine of the rate spans")
    parser.add_argument("--decay", type=float, default=0.02)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--report", type=int, default=100, help="steps between reports and checkpoints")
    parser.add_argument("--checkpoint", default="checkpoint.pt")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--fast", action=argparse.BooleanOptionalAction, default=True, help="products in bfloat16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (args, "file://" + os.path.join(folder, "meet")), nprocs=args.workers)


def work(worker, args, meet):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meet, rank=worker, world_size=args.workers)
    say = print if worker == 0 else lambda *_, **__: None
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    model = Llama()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98))
    say(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)

    parameters = list(model.parameters())
    first = 0
    if os.path.exists(args.checkpoint):
        saved = torch.load(args.checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
        say(f"going on from step {first}", flush=True)

    model_module.FAST = args.fast
    if args.compile:
        model.compile()

    # Other held-out questions than those of eval.jsonl.
    items = generate.evaluation(args.seed + 1000, 60)
    began, tokens = time.time(), 0
    for step in range(first, args.steps):
        rate = args.rate * schedule(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate

        rng = random.Random(f"{args.seed}:{step}")
        examples = [generate.training_example(rng, step) for _ in range(generate.phase(step)[1])]
        answers = sum(sum(mask) for _, mask in examples)
        optimizer.zero_grad(set_to_none=True)
        parts = [tensors(group) for group in chunks(share(examples, args.workers)[worker])]
        ids, where, targets, weights = zip(*parts)
        logits = model(ids, torch.cat([w.reshape(-1) for w in where]))
        loss = (F.cross_entropy(logits, torch.cat(targets), reduction="none") * torch.cat(weights)).sum() / answers
        loss.backward()
        total = loss.item()
        tokens += sum(i.numel() for i in ids) * args.workers
        # One sum over the workers: all the gradients, and the loss.
        flat = torch.cat([p.grad.reshape(-1) for p in parameters] + [torch.tensor([total])])
        dist.all_reduce(flat)
        for p, g in zip(parameters, flat[:-1].split([p.numel() for p in parameters])):
            p.grad.copy_(g.view_as(p))
        total = flat[-1].item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        if (step + 1) % 20 == 0:
            spent = time.time() - began
            say(f"step {step + 1} loss {total:.4f} rate {rate:.2e} {spent:.0f} s "
                  f"({spent / (step + 1 - first):.2f} s/step, {tokens / spent:.0f} tokens/s)", flush=True)
        if worker == 0 and ((step + 1) % args.report == 0 or step + 1 == args.steps):
            model.eval()
            shares = accuracy(model, items)
            model.train()
            say("  held out: " + ", ".join(f"{t} {100 * s:.0f} %" for t, s in shares.items()), flush=True)
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
                       args.checkpoint + ".new")
            os.replace(args.checkpoint + ".new", args.checkpoint)
            export(model, args.out)


if __name__ == "__main__":
    main()
