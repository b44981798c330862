"""Prometheus for real, with the repository's rules, and every expression of every panel and alert asked of it."""

import json
import pathlib
import re
import subprocess
import time
import urllib.parse

import yaml

from . import client
from .images import ROOT
from .steps import Failed, Story, until

HERE = ROOT / "docker/observability"
METRIC = re.compile(r"\b(?:vllm:|ashlar_|gen_ai_)[a-z0-9_]+|\bup\b")


def panels() -> list:
    """(dashboard and panel, expression) of every target and annotation."""
    found = []
    for path in sorted((HERE / "grafana/dashboards").glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                found.append((f"{board['title']}, {panel['title']}", target["expr"].replace("$__rate_interval", "30s")))
        for note in board["annotations"]["list"]:
            found.append((f"{board['title']}, {note['name']}", note["expr"]))
    return found


def alerts() -> list:
    """(alert, expression)."""
    groups = yaml.safe_load((HERE / "prometheus/rules.yml").read_text())["groups"]
    return [(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]


class Prometheus:
    """A Prometheus of our own that scrapes one gateway."""

    def __init__(self, story: Story, gateway: str, port: int, secrets: pathlib.Path):
        self.story, self.url, self.folder = story, f"http://127.0.0.1:{port}", story.folder / "prometheus"
        self.folder.mkdir(exist_ok=True)
        config = yaml.safe_load((HERE / "prometheus/prometheus.yml").read_text())
        config["rule_files"] = [str(HERE / "prometheus/rules.yml")]
        config["scrape_configs"][0]["authorization"] = {"credentials_file": str(secrets / "metrics_key")}
        config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
        config["scrape_configs"][0].pop("dns_sd_configs")
        config["scrape_configs"][0]["static_configs"] = [{"targets": [gateway.removeprefix("http://")]}]
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with open(self.folder / "log", "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={self.folder}/prometheus.yml", f"--storage.tsdb.path={self.folder}/data",
                 f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)

    def ask(self, path: str, **parameters):
        return client.call(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", seconds=10)["data"]

    def query(self, expression: str) -> list:
        """The result of an instant query; one that Prometheus does not accept is an error."""
        try:
            return self.ask("query", query=expression)["result"]
        except OSError as error:
            raise Failed(f"Prometheus refuses `{expression}`: {error}") from error

    def scraped(self) -> bool:
        try:
            return bool(self.query('up{job="ashlar"} == 1'))
        except (Failed, OSError):
            return False

    def stop(self):
        self.process.terminate()
        self.process.wait(20)


def check(story: Story, gateway: str, port: int, secrets: pathlib.Path, load):
    """Scrapes a cluster under load and asks everything. `load()` makes some."""
    # The key is a file that only the container has.
    story.run("promtool", "check", "config", "--syntax-only", HERE / "prometheus/prometheus.yml")
    story.run("promtool", "check", "rules", HERE / "prometheus/rules.yml")
    story.run("promtool", "test", "rules", ROOT / "tests/compose/rules-test.yml")
    prometheus = Prometheus(story, gateway, port, secrets)
    try:
        until(30, "Prometheus has scraped the gateway", prometheus.scraped)
        began = time.monotonic()
        while time.monotonic() - began < 16:
            load()
        known = set(prometheus.ask("label/__name__/values"))
        unknown, empty = set(), []
        for name, expression in panels() + alerts():
            unknown |= {metric for metric in METRIC.findall(expression) if metric not in known}
        for name, expression in panels():
            if not prometheus.query(expression) and " > 0" not in expression:
                empty.append(name)
        for _, expression in alerts():
            prometheus.query(expression)
        firing = [alert["labels"]["alertname"] for alert in prometheus.ask("alerts")["alerts"] if alert["state"] == "firing"]
        rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
        unwell = [rule["name"] for rule in rules if rule["health"] != "ok"]
        if unknown or empty or firing or unwell:
            raise Failed(f"unknown metrics {sorted(unknown)}; panels without data {empty}; firing {firing}; rules unwell {unwell}")
        story.note(f"{len(panels())} expressions of panels have data; {len(rules)} alerts evaluate, none fires")
    finally:
        prometheus.stop()
