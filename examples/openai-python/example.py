"""OpenAI's Python client against Ashlar: a chat, a stream, and a small fine-tuning job.

    pip install -r requirements.txt
    OPENAI_BASE_URL=http://127.0.0.1:8080/v1 python example.py
"""

import io
import json
import os
import time

from openai import OpenAI

MODEL = "ashlar-demo"
client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8080/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none is needed"),
)


def chat(question, model=MODEL):
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0
    )
    return answer.choices[0].message.content


def stream(question):
    parts = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": question}], temperature=0, stream=True
    )
    return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)


def examples():
    """Words, and the same with every letter doubled."""
    words = ["stone", "arch", "wall", "quarry", "mortar", "vault", "pillar", "lintel"]
    for word in words * 4:
        yield {
            "messages": [
                {"role": "user", "content": f"Double every letter of {word}."},
                {"role": "assistant", "content": "".join(letter * 2 for letter in word)},
            ]
        }


def tune():
    lines = "\n".join(json.dumps(example) for example in examples())
    file = client.files.create(file=("doubling.jsonl", io.BytesIO(lines.encode())), purpose="fine-tune")
    hyperparameters = {"n_epochs": 8, "batch_size": 8, "learning_rate_multiplier": 10}
    method = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    job = client.fine_tuning.jobs.create(
        model=MODEL, training_file=file.id, suffix="python", seed=7, method=method
    )
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    if job.status != "succeeded":
        raise SystemExit(f"the job {job.status}: {job.error}")
    for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=100).data):
        print("  ", event.message)
    return job.fine_tuned_model


print("models:", ", ".join(model.id for model in client.models.list()))
print("chat:  ", chat("What is 12 + 34?"))
print("stream:", stream("Reverse the word stone."))
tuned = tune()
print("tuned: ", tuned)
print("chat:  ", chat("Double every letter of stone.", tuned))
