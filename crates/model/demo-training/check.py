"""Asks the exported model every question of eval.jsonl through Transformers and counts exact answers.

    python check.py ../demo
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder):
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    text = "".join(chr(c) for c in range(32, 127)) + "\n  two  spaces\t\u00e9\u4f60\U0001f600"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text, "the tokenizer does not round-trip"

    right, total, began = {}, {}, time.time()
    with open(f"{folder}/eval.jsonl", encoding="utf-8") as f:
        for line in f:
            item = json.loads(line)
            prompt = tokenizer.apply_chat_template(
                item["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                out = model.generate(**prompt, max_new_tokens=160, do_sample=False)
            answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True)
            task = item["task"]
            total[task] = total.get(task, 0) + 1
            right[task] = right.get(task, 0) + (answer == item["answer"])
            if answer != item["answer"]:
                print(f"{task}: {item['messages'][-1]['content']!r}: {answer!r}, not {item['answer']!r}")
    for task in total:
        print(f"{task}: {right[task]} of {total[task]} ({100 * right[task] / total[task]:.1f} %)")
    print(f"{time.time() - began:.0f} s")
    return all(right[t] >= 0.95 * total[t] for t in total)


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1]) else 1)
