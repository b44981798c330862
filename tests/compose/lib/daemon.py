"""A Docker daemon: the one that answers, or one of our own that is started by hand and ended again."""

import os
import pathlib
import shutil
import subprocess
import time

from .steps import Failed, Story

# Debian's packages, and a command of each.
PACKAGES = {
    "docker.io": "/usr/sbin/dockerd",
    "docker-compose": "docker-compose",
    "debootstrap": "debootstrap",
    "prometheus": "promtool",
}


def install(story: Story):
    """Installs what is missing, where we may and apt is there."""
    missing = [package for package, command in PACKAGES.items() if shutil.which(command) is None]
    if not missing:
        story.note("all packages are there")
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise Failed(f"missing: {', '.join(missing)}; install them, or run this as root on Debian")
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive", RUNLEVEL="1")
    story.run("apt-get", "update", env=env)
    story.run("apt-get", "install", "-y", "--no-install-recommends", *missing, env=env, seconds=1200)
    story.note(f"installed {', '.join(missing)}")


class Daemon:
    """Where `docker` and `docker-compose` go. One of our own has its data below `work`, and its own socket."""

    def __init__(self, story: Story, work: pathlib.Path):
        self.story = story
        self.folder = work / "dockerd"
        self.process = None
        self.host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        # Debian's client has BuildKit built in; a newer one elsewhere may need a plugin that is not there.
        self.docker = "/usr/bin/docker" if os.path.exists("/usr/bin/docker") else "docker"

    @property
    def env(self):
        return dict(os.environ, DOCKER_HOST=self.host, DOCKER_BUILDKIT="1")

    def answers(self) -> bool:
        asked = subprocess.run(
            [self.docker, "version", "--format", "{{.Server.Version}}"], env=self.env,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False,
        )
        self.version = asked.stdout.strip()
        return asked.returncode == 0

    def start(self):
        """Uses the daemon that answers; otherwise starts one."""
        if self.answers():
            self.story.note(f"a Docker daemon answers: {self.version}")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.host = f"unix://{self.folder}/docker.sock"
        if self.answers():
            self.story.note(f"the daemon of an earlier run answers: {self.version}")
            return
        dockerd = shutil.which("dockerd") or "/usr/sbin/dockerd"
        # The usual way first; then without rules of its own, for kernels that have none, and on any file system.
        for extra in ([], ["--iptables=false", "--ip6tables=false"], ["--iptables=false", "--storage-driver=vfs"]):
            if self._start(dockerd, extra):
                self.story.note(f"dockerd {self.version} started by hand {' '.join(extra)}".rstrip())
                return
        tail = (self.folder / "log").read_text(errors="replace").splitlines()[-5:]
        raise Failed("no Docker daemon can be started here:\n" + "\n".join(tail))

    def _start(self, dockerd, extra) -> bool:
        for left in ("pid", "docker.sock"):
            (self.folder / left).unlink(missing_ok=True)
        command = [
            dockerd, "--data-root", self.folder / "data", "--exec-root", self.folder / "exec",
            "--pidfile", self.folder / "pid", "--host", self.host, *extra,
        ]
        with open(self.folder / "log", "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command], stdout=log, stderr=log, start_new_session=True
            )
        for _ in range(100):
            if self.answers():
                return True
            if self.process.poll() is not None:
                break
            time.sleep(0.2)
        self.stop()
        return False

    def stop(self):
        """Ends a daemon of our own."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process = None

    def run(self, *words, **how) -> str:
        """`docker …`"""
        return self.story.run(self.docker, *words, env=self.env, **how)

    def has_image(self, name: str) -> bool:
        return self.run("image", "ls", "--quiet", name).strip() != ""

    def kill(self, container: str):
        """SIGKILL to a container's process, as when it crashes: `docker kill` would also stop it from being restarted."""
        pid = int(self.run("inspect", "--format", "{{.State.Pid}}", container))
        if pid <= 0:
            raise Failed(f"{container} does not run")
        os.kill(pid, 9)
