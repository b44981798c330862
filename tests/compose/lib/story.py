"""What people do with the containers, and what happens to these: each a step, each checked."""

import os
import pathlib
import shutil
import time

from . import client, observability
from .client import Load, Response, Stream, chat
from .cluster import Cluster
from .images import ROOT
from .steps import Failed, Story, until

SEEDS = (1, 2, 3)
TOKENS = 300


class Tale:
    """The steps, and what later ones need of earlier ones."""

    def __init__(self, story: Story, cluster: Cluster, work: pathlib.Path):
        self.story, self.cluster, self.url, self.work = story, cluster, cluster.url, work
        self.answers = {}
        self.texts = {}

    def bring_up(self):
        with self.story.step("up: Redis, scheduler, two nodes, gateway"):
            began = time.monotonic()
            self.cluster.up()
            self.cluster.wait_ready()
            self.story.note(f"ready {time.monotonic() - began:.1f} s after `up` was typed")
            self.cluster.wait_healthy()
            self.story.note(f"all healthy after {time.monotonic() - began:.1f} s")

    def alone(self):
        """Everything in one container, as in the README."""
        name, port = "ashlar-test_alone", self.cluster.port + 2
        with self.story.step("one container: `ashlar up`"):
            began = time.monotonic()
            self.cluster.daemon.run(
                "run", "--detach", "--name", name, "--label", self.cluster.label, "--publish", f"127.0.0.1:{port}:8080",
                "--read-only", "--tmpfs", "/tmp", "--memory", "2g", "--cap-drop", "ALL",
                self.cluster.image, "up", "--listen", "0.0.0.0:8080", "--plain-http", "--state", "/tmp/state",
            )
            url = f"http://127.0.0.1:{port}"
            self.cluster.wait_ready(url=url)
            self.story.note(f"ready {time.monotonic() - began:.1f} s after `docker run`")
            self.cluster.expect(client.status(url, "/v1/models") == 401, "a client needs no key")
            client.use_key(self.cluster.daemon.run("exec", name, "cat", "/tmp/state/admin.key", quiet=True))
            self.cluster.expect(chat(url, "What is 12 + 34?") == "46", "12 + 34 is not 46")
            client.use_key(self.cluster.admin_key())
            self.cluster.daemon.run("rm", "--force", name)

    def keys(self):
        with self.story.step("keys: made, used, revoked"):
            for path, wanted in (("/ready", 200), ("/", 200), ("/v1/models", 401), ("/admin/cluster", 401), ("/metrics", 401)):
                seen = client.status(self.url, path)
                self.cluster.expect(seen == wanted, f"{path} answers {seen} without a key")
            metrics = (self.cluster.secrets / "metrics_key").read_text().strip()
            seen = [client.status(self.url, path, metrics) for path in ("/metrics", "/v1/files", "/admin/cluster")]
            self.cluster.expect(seen == [200, 403, 403], f"the key for metrics is answered with {seen}")
            made = self.new_key("story", self.url)
            seen = client.status(self.url, "/admin/cluster", made["key"])
            self.cluster.expect(seen == 403, f"a key for inference is answered with {seen} at /admin/cluster")
            took = self.revoke(made, self.url)
            key = self.key_from_container()
            self.cluster.expect(self.statuses(key, self.url) == [200], "`ashlar keys create` in the container made no key")
            self.revoke({"id": key.split("_")[1], "key": key}, self.url)
            self.story.note(f"401 without a key, 403 with one for something else; a new key answers; refused {took:.2f} s after it was revoked")

    def key_from_container(self) -> str:
        """As the README makes one."""
        container = self.cluster.compose("ps", "-q", "gateway").split()[-1]
        words = (self.cluster.daemon.docker, "exec", "-e", "OPENAI_API_KEY", container, "ashlar", "keys", "create", "notebooks")
        env = dict(self.cluster.settings(), OPENAI_API_KEY=self.cluster.admin_key())
        # It prints a key: not for the log.
        return self.story.run(*words, env=env, quiet=True).split()[-1]

    def statuses(self, key: str, *urls) -> list:
        """What each gateway answers to this key."""
        return [client.status(url, "/v1/models", key) for url in urls]

    def new_key(self, name: str, *urls) -> dict:
        """A key for inference, made at the first gateway, that all of them answer."""
        made = client.call(urls[0] + "/admin/keys", {"name": name})
        until(1, "every gateway knows the new key", lambda: self.statuses(made["key"], *urls) == [200] * len(urls), pause=0.02)
        for url in urls:
            self.cluster.expect(chat(url, "What is 12 + 34?", key=made["key"]) == "46", "12 + 34 is not 46")
        return made

    def revoke(self, made: dict, *urls) -> float:
        """Revokes a key at the first gateway; how long it took until every gateway refused it, at most a second."""
        began = time.monotonic()
        client.call(urls[0] + f"/admin/keys/{made['id']}", method="DELETE")
        until(1, "every gateway refuses the key", lambda: self.statuses(made["key"], *urls) == [401] * len(urls), pause=0.02)
        took = time.monotonic() - began
        self.cluster.expect(took < 1, f"a revoked key was let in for {took:.2f} s")
        return took

    def check_hardening(self):
        with self.story.step("hardening: what containers may do"):
            for service in ("gateway", "scheduler", "node", "redis"):
                for name in self.cluster.containers(service):
                    seen = self.cluster.inspect(name)
                    host, config = seen["HostConfig"], seen["Config"]
                    self.cluster.expect(host["ReadonlyRootfs"], f"{name} may write its root file system")
                    self.cluster.expect(host["CapDrop"] == ["ALL"], f"{name} has capabilities")
                    self.cluster.expect("no-new-privileges:true" in host["SecurityOpt"], f"{name} may gain privileges")
                    self.cluster.expect(config["User"] not in ("", "root", "0"), f"{name} runs as root")
                    self.cluster.expect(host["Memory"] > 0, f"{name} has no memory limit")
                    published = [port for port in (host["PortBindings"] or {}).values() if port]
                    self.cluster.expect(bool(published) == (service == "gateway"), f"{name} publishes {published}")
            for node in client.cluster(self.url)["nodes"]:
                self.cluster.expect(node["memory"] < 1 << 30, f"a node in a container of 1 GiB offers {node['memory']} bytes")
            gateway = self.cluster.containers("gateway")[0]
            node = self.cluster.name_of_node(self.cluster.containers("node")[0])
            for host, port in ((node, 7410), ("redis", 6379)):
                reached = self.cluster.daemon.run(
                    "exec", gateway, "bash", "-c", f"exec 3<>/dev/tcp/{host}/{port} && echo reached", check=False
                )
                self.cluster.expect("reached" not in reached, f"the gateway reaches {host}:{port}")
            self.story.note("read-only, not root, no capabilities, limits; a gateway reaches neither nodes nor Redis")

    def undisturbed(self):
        with self.story.step("chat and stream, undisturbed"):
            self.answers = {question: chat(self.url, question) for question in client.QUESTIONS}
            self.cluster.expect(self.answers["What is 12 + 34?"] == "46", f"answers are {self.answers}")
            began = time.monotonic()
            streams = {seed: Stream(self.url, seed, TOKENS) for seed in SEEDS}
            self.texts = {seed: stream.finish() for seed, stream in streams.items()}
            self.story.note(f"{len(SEEDS)} streams of {TOKENS} tokens in {time.monotonic() - began:.1f} s")

    def disturbed(self, name: str, disturb, mend=None):
        """Streams go on while something is done to the cluster, and have the text that they had undisturbed."""
        with self.story.step(name):
            streams = {seed: Stream(self.url, seed, TOKENS) for seed in SEEDS}
            for stream in streams.values():
                stream.wait_for(20)
            disturb()
            for seed, stream in streams.items():
                self.cluster.expect(stream.finish() == self.texts[seed], f"seed {seed} gave another text")
            pause = max(stream.longest_pause for stream in streams.values())
            self.story.note(f"{len(streams)} streams finished with the same text; longest pause {pause:.2f} s")
            if mend:
                mend()
            self.cluster.wait_ready()
            for question, answer in self.answers.items():
                self.cluster.expect(chat(self.url, question) == answer, f"another answer to {question!r}")

    def kills(self):
        kill = lambda service: self.cluster.daemon.kill(self.cluster.containers(service)[0])
        self.disturbed("SIGKILL of a node's container, mid-stream", lambda: kill("node"))
        self.disturbed("SIGKILL of the scheduler's container, mid-stream", lambda: kill("scheduler"))
        self.disturbed(
            "Redis stopped, mid-stream", lambda: self.cluster.compose("stop", "redis"),
            lambda: self.cluster.compose("start", "redis"),
        )

    def tune(self):
        with self.story.step("a fine-tuning job through the API"):
            job = client.tune(self.url, "compose")
            model = job["fine_tuned_model"]
            before = chat(self.url, "Double every letter of stone.")
            after = chat(self.url, "Double every letter of stone.", model)
            self.story.note(f"{job['trained_tokens']} tokens; {model} answers {after!r}, the base {before!r}")

    def observe(self):
        with self.story.step("Prometheus on the running cluster"):
            def load():
                streams = [Stream(self.url, seed, 60) for seed in SEEDS]
                for stream in streams:
                    stream.finish()
            observability.check(self.story, self.url, self.cluster.port + 10, self.cluster.secrets, load)

    def examples(self):
        environment = dict(
            os.environ, OPENAI_BASE_URL=self.url + "/v1", OPENAI_API_KEY=self.cluster.admin_key(), npm_config_update_notifier="false"
        )
        for name, run in (("Python", self.python), ("Node", self.node), ("async-openai (Rust)", self.rust)):
            with self.story.step(f"example: {name}"):
                printed = run(environment)
                self.cluster.expect(" 46" in printed and "enots" in printed and "ssttoonnee" in printed, f"it printed {printed}")
                self.story.note("chat, stream, a fine-tuned model that has learnt")

    def python(self, environment) -> str:
        folder, example = self.work / "openai-python", ROOT / "examples/openai-python"
        if not (folder / "bin/python").exists():
            self.story.run("python3", "-m", "venv", folder)
            self.story.run(folder / "bin/pip", "install", "--quiet", "--requirement", example / "requirements.txt")
        return self.story.run(folder / "bin/python", example / "example.py", env=environment)

    def node(self, environment) -> str:
        folder, example = self.work / "openai-node", ROOT / "examples/openai-node"
        shutil.copytree(example, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules"))
        if not (folder / "node_modules").exists():
            self.story.run("npm", "install", "--no-audit", "--no-fund", cwd=folder)
        return self.story.run("npm", "start", "--silent", cwd=folder, env=environment)

    def rust(self, environment) -> str:
        compiled = os.environ.get("ASHLAR_EXAMPLE_BIN")
        if compiled:
            return self.story.run(compiled, env=environment)
        words = ["cargo", "run", "--quiet", "--release", "--package", "ashlar-tests", "--example", "async_openai"]
        return self.story.run(*words, cwd=ROOT, env=environment, seconds=3600)

    def scale(self):
        def out():
            began = time.monotonic()
            self.cluster.up("--no-recreate", "--scale", "node=4")
            self.cluster.wait_replicas(2, 4)
            self.story.note(f"4 nodes, 2 replicas after {time.monotonic() - began:.1f} s")

        def back():
            began = time.monotonic()
            self.cluster.up("--no-recreate", "--scale", "node=2")
            self.cluster.wait_replicas(1, 2)
            self.story.note(f"2 nodes, 1 replica after {time.monotonic() - began:.1f} s")

        self.disturbed("scale out to four nodes, mid-stream", out)
        self.disturbed("scale in to two nodes, mid-stream", back)

    def upgrade(self):
        with self.story.step("rolling upgrade under load"):
            self.cluster.wait_replicas(1, 2)
            self.refuses_upgrade()
            load = Load([self.url], 6, TOKENS, self.texts)
            time.sleep(1)
            self.cluster.image = "ashlar-test:b"
            options = [option for file in self.cluster.files for option in ("--file", str(file))]
            self.story.run(
                ROOT / "docker/upgrade", "--compose", " ".join(self.cluster.compose_words), *options,
                "--url", self.url, env=self.cluster.settings(), seconds=400,
            )
            time.sleep(1)
            self.story.note(load.stop())
            for service in ("gateway", "scheduler", "node"):
                for name in self.cluster.containers(service):
                    image = self.cluster.inspect(name)["Config"]["Image"]
                    self.cluster.expect(image == "ashlar-test:b", f"{name} runs {image}")
            self.cluster.wait_replicas(1, 2)

    def refuses_upgrade(self):
        """With a key that may not see the cluster, nothing is begun."""
        key = (self.cluster.secrets / "metrics_key").read_text()
        printed = self.story.run(
            ROOT / "docker/upgrade", "--url", self.url, env=dict(self.cluster.settings(), OPENAI_API_KEY=key), check=False, seconds=30,
        )
        self.cluster.expect("refuses the API key" in printed, f"docker/upgrade with the key for metrics printed {printed}")

    def high_availability(self):
        with self.story.step("profile ha: two gateways, a standby scheduler, four nodes"):
            began = time.monotonic()
            self.cluster.up(profiles=["ha"])
            self.cluster.wait_replicas(2, 4)
            self.cluster.wait_ready(url=self.cluster.url_b)
            self.story.note(f"2 replicas, both gateways ready after {time.monotonic() - began:.1f} s")
        both = (self.url, self.cluster.url_b)
        with self.story.step("keys at both gateways"):
            kept, gone = self.new_key("kept", *both), self.new_key("gone", *both)
            took = self.revoke(gone, *both)
            self.story.note(f"made at one, answered by both; revoked at one, refused by both after {took:.2f} s")
        with self.story.step("a gateway killed, mid-stream: its stored response is followed at the other one"):
            undisturbed = Response(self.url, TOKENS)
            self.cluster.expect(undisturbed.read(), "the undisturbed response did not complete")
            others = {seed: Stream(self.cluster.url_b, seed, TOKENS) for seed in SEEDS}
            for stream in others.values():
                stream.wait_for(20)
            response = Response(self.url, TOKENS)
            kill = lambda: self.cluster.daemon.kill(self.cluster.containers("gateway")[0])
            self.cluster.expect(not response.read(after=20, act=kill), "the response was complete before the gateway was killed")
            here = len(response.events)
            response.follow(self.cluster.url_b)
            self.cluster.expect(response.read(), "the response did not complete at the other gateway")
            self.cluster.expect(response.text() == undisturbed.text(), "the response has another text")
            for seed, stream in others.items():
                self.cluster.expect(stream.finish() == self.texts[seed], f"seed {seed} gave another text")
            self.story.note(
                f"{here} events from the first gateway, {len(response.events) - here} from the other, none missing, the same text; "
                "streams of the other gateway untouched"
            )
            self.cluster.wait_ready()
        self.disturbed(
            "the leading scheduler killed, with a standby",
            lambda: self.cluster.daemon.kill(self.leader()),
        )
        with self.story.step("keys, told by the next scheduler"):
            for key, wanted in ((kept, 200), (gone, 401)):
                seen = self.statuses(key["key"], *both)
                self.cluster.expect(seen == [wanted, wanted], f"the key {key['name']} is answered with {seen}")
            self.revoke(kept, *both)
            self.story.note("what was let in still is; what was revoked is not")
        with self.story.step("back to the default"):
            for service in ("gateway-b", "scheduler-b", "node-b"):
                for name in self.cluster.containers(service):
                    self.cluster.daemon.run("stop", "--time", "20", name)
                    self.cluster.daemon.run("rm", name)
            self.cluster.wait_replicas(1, 2)

    def leader(self) -> str:
        """The scheduler that said last that it leads."""
        said = {}
        for service in ("scheduler", "scheduler-b"):
            for name in self.cluster.containers(service):
                lines = self.cluster.daemon.run("logs", "--timestamps", name, quiet=True).splitlines()
                leading = [line for line in lines if "lead" in line.lower()]
                if leading:
                    said[leading[-1][:30]] = name
        self.story.note(f"of {sorted(said.values())}")
        return said[max(said)] if said else self.cluster.containers("scheduler")[0]

    def take_down(self):
        with self.story.step("down, with volumes"):
            self.cluster.compose("down", "--volumes", "--remove-orphans", profiles=["ha"])
            self.cluster.expect(self.cluster.left() == [], f"still there: {self.cluster.left()}")
            self.story.note("no container, network or volume is left")

    def encrypted(self):
        self.cluster.files.insert(1, ROOT / "docker/compose.tls.yaml")
        with self.story.step("compose.tls.yaml: everything between the roles encrypted"):
            began = time.monotonic()
            self.cluster.up()
            self.cluster.wait_ready()
            self.story.note(f"ready {time.monotonic() - began:.1f} s after `up` was typed")
            for question, answer in self.answers.items():
                self.cluster.expect(chat(self.url, question) == answer, f"another answer to {question!r}")
            streams = {seed: Stream(self.url, seed, TOKENS) for seed in SEEDS}
            for seed, stream in streams.items():
                self.cluster.expect(stream.finish() == self.texts[seed], f"seed {seed} gave another text")
            self.story.note("the same answers and texts")
            self.refuses_strangers()
            self.cluster.logs(self.story.folder)
            self.cluster.compose("down", "--volumes", "--remove-orphans")
            self.cluster.expect(self.cluster.left() == [], f"still there: {self.cluster.left()}")

    def refuses_strangers(self):
        """A node without an identity does not get in."""
        network = f"{self.cluster.project_network('data')}"
        config = "allow_plaintext = true\nname = \"stranger\"\nscheduler = \"scheduler:7401\"\nlisten = \"0.0.0.0:7410\"\n"
        config += "advertise_host = \"stranger\"\nstate = \"/tmp\"\n"
        stranger = "ashlar-test_stranger"
        label = self.cluster.label
        self.cluster.daemon.run(
            "run", "--detach", "--name", stranger, "--label", label, "--network", network, "--entrypoint", "bash", self.cluster.image,
            "-c", f"printf '%s' '{config}' > /tmp/node.toml && exec ashlar node --config /tmp/node.toml",
        )
        said = lambda: "identity" in self.cluster.daemon.run("logs", stranger, quiet=True, check=False)
        until(20, "the stranger says why it is refused", said)
        names = [node["node"] for node in client.cluster(self.url)["nodes"]]
        self.cluster.expect(sorted(names) == ["node-0", "node-1"], f"nodes are {names}")
        self.story.note("a node without an identity is refused")
        self.cluster.daemon.run("rm", "--force", stranger)
