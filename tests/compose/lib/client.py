"""A client of the gateway, as its users have: chats, streams, files, jobs. Nothing but Python's own library."""

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
import uuid

from .steps import Failed

MODEL = "ashlar-demo"
QUESTIONS = ["What is 12 + 34?", "Reverse the word stone.", "What is the capital of France?"]


def use_key(key: str):
    """From now on every request shows this API key."""
    opener = urllib.request.build_opener()
    opener.addheaders = [("authorization", f"Bearer {key.strip()}")]
    urllib.request.install_opener(opener)


def call(url: str, body=None, kind="application/json", method=None, seconds=120, key=None):
    """One request, with another key than the usual one where one is given; errors of HTTP are raised."""
    data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
    headers = {"content-type": kind} if data is not None else {}
    if key:
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data=data, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=seconds) as response:
        return json.load(response)


def ready(url: str) -> bool:
    """Whether a request would be computed now."""
    try:
        return call(url + "/ready", seconds=3).get("status") == "ready"
    except (OSError, ValueError, http.client.HTTPException):
        return False


def cluster(url: str) -> dict:
    """The cluster as the gateway sees it; empty where it does not answer."""
    try:
        return call(url + "/admin/cluster", seconds=5).get("cluster") or {}
    except (OSError, ValueError, http.client.HTTPException):
        return {}


def status(url: str, path: str, key=None) -> int:
    """The status of an answer, with another key than the usual one, or without any."""
    opener = urllib.request.build_opener()
    opener.addheaders = [("authorization", f"Bearer {key}")] if key else []
    try:
        return opener.open(url + path, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


def chat(url: str, question: str, model=MODEL, key=None) -> str:
    """A greedy answer."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0}
    return call(url + "/v1/chat/completions", body, key=key)["choices"][0]["message"]["content"]


def long_request(seed: int, tokens: int) -> dict:
    """A completion that goes on for so many tokens, always with the same text."""
    return {
        "model": MODEL, "prompt": "Once upon a time", "max_tokens": tokens, "min_tokens": tokens,
        "temperature": 1, "seed": seed, "stream": True,
    }


class Stream:
    """A completion that is read as it comes, on a thread of its own."""

    def __init__(self, url: str, seed: int, tokens: int):
        self.url, self.seed, self.tokens = url, seed, tokens
        self.text = ""
        self.chunks = 0
        self.longest_pause = 0.0
        self.refused = 0
        self.problem = None
        self.done = threading.Event()
        self.begun = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            response = self._open()
            last = time.monotonic()
            for raw in response:
                line = raw.decode().strip()
                if not line.startswith("data: "):
                    continue
                now = time.monotonic()
                self.longest_pause, last = max(self.longest_pause, now - last), now
                if line == "data: [DONE]":
                    return
                event = json.loads(line[6:])
                if "error" in event:
                    self.problem = str(event["error"])
                    return
                self.text += event["choices"][0]["text"] if event["choices"] else ""
                self.chunks += 1
                self.begun.set()
            self.problem = "the stream broke off"
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            self.problem = f"{type(error).__name__}: {error}"
        finally:
            self.begun.set()
            self.done.set()

    def _open(self):
        """As OpenAI's clients do: a connection that is refused, or a 503, is tried again. What has begun is not."""
        body = json.dumps(long_request(self.seed, self.tokens)).encode()
        end = time.monotonic() + 60
        while True:
            request = urllib.request.Request(
                self.url + "/v1/completions", data=body, headers={"content-type": "application/json"}
            )
            try:
                return urllib.request.urlopen(request, timeout=120)
            except urllib.error.HTTPError as error:
                if error.code != 503 or time.monotonic() > end:
                    raise
            except (ConnectionError, urllib.error.URLError, http.client.HTTPException):
                if time.monotonic() > end:
                    raise
            self.refused += 1
            time.sleep(0.1)

    def wait_for(self, chunks: int, seconds=60):
        """Until so many chunks are here."""
        end = time.monotonic() + seconds
        while self.chunks < chunks and not self.done.is_set():
            if time.monotonic() > end:
                raise Failed(f"a stream has {self.chunks} chunks after {seconds} s")
            time.sleep(0.01)
        if self.done.is_set() and self.chunks < chunks:
            raise Failed(f"a stream ended after {self.chunks} chunks: {self.problem}")

    def finish(self, seconds=180) -> str:
        """The whole text."""
        if not self.done.wait(seconds):
            raise Failed(f"a stream hangs after {self.chunks} chunks")
        if self.problem:
            raise Failed(f"a stream failed after {self.chunks} chunks: {self.problem}")
        return self.text


class Response:
    """A stored response whose events are read at one gateway, and further ones at another."""

    BODY = {
        "model": MODEL, "input": "Write", "instructions": "Go on for long.", "temperature": 1, "seed": 7, "stream": True,
    }

    def __init__(self, url: str, tokens: int):
        self.events = []
        body = json.dumps(dict(self.BODY, max_output_tokens=tokens, min_tokens=tokens)).encode()
        self.request = urllib.request.Request(
            url + "/v1/responses", data=body, headers={"content-type": "application/json"}
        )

    def read(self, after=None, act=None) -> bool:
        """Reads events until the connection ends; acts once so many are here. Whether the response has ended."""
        try:
            with urllib.request.urlopen(self.request, timeout=120) as response:
                for raw in response:
                    line = raw.decode().strip()
                    if line.startswith("data: {"):
                        self.events.append(json.loads(line[6:]))
                        if len(self.events) == after:
                            act()
        except (OSError, http.client.HTTPException):
            pass
        # Incomplete is what OpenAI calls one that ends at its limit of tokens, as this one does.
        return bool(self.events) and self.events[-1]["type"] in ("response.completed", "response.incomplete")

    def follow(self, url: str):
        """From now on at another gateway, after the last event that is here."""
        identifier, last = self.events[0]["response"]["id"], self.events[-1]["sequence_number"]
        self.request = urllib.request.Request(f"{url}/v1/responses/{identifier}?stream=true&starting_after={last}")

    def text(self) -> str:
        """What it says, of events that have to be numbered without a gap."""
        numbers = [event["sequence_number"] for event in self.events]
        if numbers != list(range(len(numbers))):
            raise Failed(f"events are missing, or there twice: {numbers[:3]}…{numbers[-3:]}")
        return "".join(event["delta"] for event in self.events if event["type"] == "response.output_text.delta")


class Load:
    """Clients that stream one text after the other until they are told to stop, and what became of it."""

    def __init__(self, urls, clients: int, tokens: int, expected):
        self.urls, self.tokens, self.expected = urls, tokens, expected
        self.lock = threading.Lock()
        self.finished = 0
        self.refused = 0
        self.longest_pause = 0.0
        self.problems = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._client, args=(number,), daemon=True) for number in range(clients)]
        for thread in self.threads:
            thread.start()

    def _client(self, number: int):
        turn = number
        while not self.over.is_set():
            seed = sorted(self.expected)[turn % len(self.expected)]
            stream = Stream(self.urls[turn % len(self.urls)], seed, self.tokens)
            stream.done.wait(300)
            with self.lock:
                self.refused += stream.refused
                self.longest_pause = max(self.longest_pause, stream.longest_pause)
                if stream.problem or not stream.done.is_set():
                    self.problems.append(stream.problem or "it hangs")
                elif stream.text != self.expected[seed]:
                    self.problems.append(f"seed {seed}: another text")
                else:
                    self.finished += 1
            turn += 1

    def stop(self) -> str:
        """Lets every client finish its stream; what was seen, or the failure."""
        self.over.set()
        for thread in self.threads:
            thread.join(300)
        if self.problems:
            raise Failed(f"{len(self.problems)} of {self.finished + len(self.problems)} streams: {self.problems[:3]}")
        return (
            f"{self.finished} streams, all with their undisturbed text; longest pause {self.longest_pause:.1f} s, "
            f"{self.refused} connections tried again"
        )


def examples(count: int) -> str:
    """A training file: words with every letter doubled."""
    lines = []
    for number in range(count):
        letters = [chr(ord("a") + (number * 7 + place * (number % 5 + 3)) % 26) for place in range(3 + number % 4)]
        word = "".join(letters)
        messages = [
            {"role": "user", "content": f"Double every letter of {word}."},
            {"role": "assistant", "content": "".join(letter * 2 for letter in letters)},
        ]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines) + "\n"


def upload(url: str, text: str) -> str:
    """Uploads a training file; its id."""
    edge = uuid.uuid4().hex
    body = (
        f'--{edge}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        f'--{edge}\r\ncontent-disposition: form-data; name="file"; filename="train.jsonl"\r\n\r\n{text}'
        f"\r\n--{edge}--\r\n"
    )
    return call(url + "/v1/files", body.encode(), f"multipart/form-data; boundary={edge}")["id"]


def tune(url: str, suffix: str, seconds=300) -> dict:
    """A small fine-tuning job, to its end."""
    hyperparameters = {"n_epochs": 8, "batch_size": 8}
    job = call(url + "/v1/fine_tuning/jobs", {
        "model": MODEL, "training_file": upload(url, examples(64)), "suffix": suffix, "seed": 7,
        "learning_rate": 5e-3,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    })
    end = time.monotonic() + seconds
    while job["status"] not in ("succeeded", "failed", "cancelled"):
        if time.monotonic() > end:
            raise Failed(f"the job is still {job['status']}")
        time.sleep(0.5)
        job = call(url + "/v1/fine_tuning/jobs/" + job["id"])
    if job["status"] != "succeeded":
        raise Failed(f"the job {job['status']}: {job.get('error')}")
    return job
