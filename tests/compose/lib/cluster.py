"""The cluster of docker/compose.yaml under a project name of its own, and what one does to it."""

import json
import pathlib
import shlex
import time

from . import client
from .daemon import Daemon
from .images import ROOT
from .steps import Failed, Story, until

PROJECT = "ashlar-test"


class Cluster:
    """`docker-compose` on the files of docker/, and containers by their service."""

    def __init__(self, story: Story, daemon: Daemon, work: pathlib.Path, compose: str, port: int):
        self.story, self.daemon, self.compose_words = story, daemon, shlex.split(compose)
        self.url, self.url_b = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"
        self.image = "ashlar-test:a"
        self.secrets = work / "secrets"
        self.files = [ROOT / "docker/compose.yaml", ROOT / "tests/compose/slow.yaml"]
        self.port = port

    def admin_key(self) -> str:
        """The first API key."""
        return (self.secrets / "admin_key").read_text().strip()

    def settings(self) -> dict:
        # A key of whoever runs this is not for this cluster.
        inherited = {name: value for name, value in self.daemon.env.items() if name != "OPENAI_API_KEY"}
        return dict(
            inherited, COMPOSE_PROJECT_NAME=PROJECT, ASHLAR_IMAGE=self.image, ASHLAR_SECRETS=str(self.secrets),
            ASHLAR_LISTEN=f"127.0.0.1:{self.port}", ASHLAR_LISTEN_B=f"127.0.0.1:{self.port + 1}", ASHLAR_NODE_MEMORY="1g",
            ASHLAR_IDENTITIES=str(self.secrets.parent / "identities"), COMPOSE_INTERACTIVE_NO_CLI="1",
            PYTHONWARNINGS="ignore",
        )

    def compose(self, *words, profiles=(), **how) -> str:
        """`docker-compose …` with our files."""
        options = [option for file in self.files for option in ("--file", file)]
        options += [option for profile in profiles for option in ("--profile", profile)]
        return self.story.run(*self.compose_words, *options, *words, env=self.settings(), **how)

    def up(self, *words, profiles=()):
        self.compose("up", "--detach", "--no-build", *words, profiles=profiles)

    def containers(self, service: str, running=True) -> list:
        """Names of a service's containers, oldest first."""
        options = [] if running else ["--all"]
        lines = self.daemon.run(
            "ps", *options, "--filter", f"label=com.docker.compose.project={PROJECT}",
            "--filter", f"label=com.docker.compose.service={service}", "--format", "{{.CreatedAt}}\t{{.Names}}", quiet=True,
        ).splitlines()
        return [line.split("\t")[1] for line in sorted(lines)]

    def inspect(self, container: str) -> dict:
        return json.loads(self.daemon.run("inspect", container, quiet=True))[0]

    def name_of_node(self, container: str) -> str:
        """A node's name is its container's host name."""
        return self.inspect(container)["Config"]["Hostname"]

    def wait_ready(self, seconds=90, url=None) -> float:
        began = time.monotonic()
        until(seconds, "/ready", lambda: client.ready(url or self.url))
        return time.monotonic() - began

    def wait_replicas(self, replicas: int, nodes: int, seconds=90) -> float:
        """Until so many replicas serve and so many nodes are there."""
        def there():
            view = client.cluster(self.url)
            serving = sum(replica["ready"] for replica in view.get("replicas", []))
            return serving == replicas and len(view.get("nodes", [])) == nodes
        began = time.monotonic()
        until(seconds, f"{replicas} replicas on {nodes} nodes", there)
        return time.monotonic() - began

    def wait_healthy(self, seconds=60):
        """Until Docker calls every container healthy."""
        def unwell():
            names = self.daemon.run(
                "ps", "--all", "--filter", f"label=com.docker.compose.project={PROJECT}", "--format", "{{.Names}}\t{{.Status}}",
                quiet=True,
            ).splitlines()
            return [name for name in names if "(healthy)" not in name and "Exited (0)" not in name]
        until(seconds, "all containers healthy", lambda: not unwell(), pause=0.5)

    def down(self):
        """Everything of the project goes, whatever profile or file it came from."""
        mine = f"label=com.docker.compose.project={PROJECT}"
        containers = self.daemon.run("ps", "--all", "--quiet", "--filter", mine, quiet=True).split()
        if containers:
            self.daemon.run("rm", "--force", "--volumes", *containers)
        for kind in ("volume", "network"):
            left = self.daemon.run(kind, "ls", "--quiet", "--filter", mine, quiet=True).split()
            if left:
                self.daemon.run(kind, "rm", *left)

    def left(self) -> list:
        """What there still is of the project."""
        mine = f"label=com.docker.compose.project={PROJECT}"
        lists = [("ps", "--all"), ("volume", "ls"), ("network", "ls")]
        return [line for words in lists for line in self.daemon.run(*words, "--quiet", "--filter", mine, quiet=True).split()]

    def logs(self, folder: pathlib.Path):
        """Each container's log, kept."""
        mine = f"label=com.docker.compose.project={PROJECT}"
        for name in self.daemon.run("ps", "--all", "--filter", mine, "--format", "{{.Names}}", quiet=True).split():
            text = self.daemon.run("logs", name, check=False, quiet=True)
            (folder / f"{name}.log").write_text(text, encoding="utf-8")

    @property
    def label(self) -> str:
        """What containers of ours bear."""
        return f"com.docker.compose.project={PROJECT}"

    def project_network(self, name: str) -> str:
        return f"{PROJECT}_{name}"

    def expect(self, true: bool, what: str):
        if not true:
            raise Failed(what)
