"""A story in steps: each is timed, everything that it runs goes to one log, and a table says how it went."""

import contextlib
import pathlib
import subprocess
import threading
import time


class Failed(Exception):
    """What was expected did not happen."""


class Story:
    """The steps so far, and the log of all they ran."""

    def __init__(self, folder: pathlib.Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.began = time.monotonic()
        self.rows = []
        self.notes = []
        self.log = open(folder / "run.log", "w", buffering=1, encoding="utf-8")
        self.lock = threading.Lock()

    def write(self, text: str):
        with self.lock:
            self.log.write(f"[{time.monotonic() - self.began:8.1f}] {text}\n")

    def say(self, text: str):
        """A line for whoever watches, and for the log."""
        print(text, flush=True)
        self.write(text)

    def note(self, text: str):
        """What was seen in the present step; it stands in the table."""
        self.notes.append(text)
        self.say(f"      {text}")

    @contextlib.contextmanager
    def step(self, name: str):
        """One step: a row of the table, whatever becomes of it."""
        self.say(f"=== {name}")
        self.notes = []
        began = time.monotonic()
        outcome = "FAILED"
        try:
            yield
            outcome = "ok"
        except Failed as failure:
            self.note(f"FAILED: {failure}")
            raise
        finally:
            seconds = time.monotonic() - began
            self.rows.append((name, seconds, outcome, "; ".join(self.notes)))
            self.say(f"    {outcome} after {seconds:.1f} s")

    def run(self, *command, check=True, seconds=600, cwd=None, env=None, stdin=None, quiet=False) -> str:
        """Runs a command to its end and gives what it printed."""
        words = [str(word) for word in command]
        self.write("$ " + " ".join(words))
        try:
            done = subprocess.run(
                words, cwd=cwd, env=env, input=stdin, text=True, timeout=seconds,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Failed(f"`{' '.join(words[:6])}` did not end within {seconds} s") from error
        if not quiet:
            for line in done.stdout.splitlines():
                self.write("  " + line)
        if check and done.returncode != 0:
            tail = "\n".join(done.stdout.splitlines()[-15:])
            raise Failed(f"`{' '.join(words[:8])}` ended with {done.returncode}:\n{tail}")
        return done.stdout

    def table(self) -> str:
        """The steps as a table in Markdown."""
        lines = ["| Step | Seconds | | Seen |", "|---|---|---|---|"]
        for name, seconds, outcome, seen in self.rows:
            lines.append(f"| {name} | {seconds:.1f} | {outcome} | {seen} |")
        return "\n".join(lines)

    def close(self):
        """Writes the table beside the log."""
        (self.folder / "table.md").write_text(self.table() + "\n", encoding="utf-8")
        self.log.close()


def until(seconds: float, what: str, ask, pause: float = 0.2):
    """Asks until the answer is true, and gives it."""
    end = time.monotonic() + seconds
    while True:
        answer = ask()
        if answer:
            return answer
        if time.monotonic() > end:
            raise Failed(f"not within {seconds:.0f} s: {what}")
        time.sleep(pause)
