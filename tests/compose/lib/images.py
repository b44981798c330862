"""Images: the bases that Dockerfile and compose.yaml name, made here where none can be pulled, and Ashlar's own."""

import os
import pathlib
import shutil
import subprocess

from .daemon import Daemon
from .steps import Failed, Story

ROOT = pathlib.Path(__file__).resolve().parents[3]
DEBIAN = "debian:bookworm-slim"
REDIS = "redis:7-bookworm"
RUST = "rust:1-bookworm"
BINARY = "ashlar-test-binary"
MIRROR = "http://deb.debian.org/debian"
# What a slim image does without.
FAT = ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/cache/apt", "var/lib/apt/lists", "var/log"]


class Images:
    """Makes what is missing; what has been made before is kept below `work`."""

    def __init__(self, story: Story, daemon: Daemon, work: pathlib.Path):
        self.story, self.daemon, self.work = story, daemon, work

    def base(self, name: str, make):
        """Has a base image: it is there, or pulled, or made."""
        if self.daemon.has_image(name):
            self.story.note(f"{name} is there")
            return
        pulled = subprocess.run(
            [self.daemon.docker, "pull", "--quiet", name], env=self.daemon.env, timeout=600,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
        )
        if pulled.returncode == 0:
            self.story.note(f"{name} pulled")
            return
        make()
        self.story.note(f"{name} made here")

    def bases(self, builder: bool):
        """All base images; the one that compiles only where it is asked for."""
        self.base(DEBIAN, self.make_debian)
        self.base(REDIS, self.make_redis)
        if builder:
            self.base(RUST, self.make_rust)

    def root(self, name: str, include: str) -> pathlib.Path:
        """A Debian in a folder, with some packages."""
        folder = self.work / name
        if not (folder / "complete").exists():
            if os.geteuid() != 0:
                raise Failed("base images can only be made as root")
            shutil.rmtree(folder, ignore_errors=True)
            self.work.mkdir(parents=True, exist_ok=True)
            words = ["debootstrap", "--variant=minbase"] + ([f"--include={include}"] if include else [])
            self.story.run(*words, "bookworm", folder, MIRROR, seconds=1200)
            (folder / "complete").touch()
        return folder

    def load(self, folder: pathlib.Path, name: str, *changes: str):
        """A folder as an image."""
        options = [word for change in changes for word in ("--change", change)]
        leave_out = ["--exclude=./complete"] + [f"--exclude=./{path}/*" for path in FAT]
        tar = subprocess.Popen(["tar", "-C", str(folder), "-cf", "-", *leave_out, "."], stdout=subprocess.PIPE)
        words = [self.daemon.docker, "import", *options, "-", name]
        self.story.write("$ " + " ".join(words))
        loaded = subprocess.run(words, stdin=tar.stdout, env=self.daemon.env, stdout=subprocess.DEVNULL, check=False)
        if tar.wait() != 0 or loaded.returncode != 0:
            raise Failed(f"{name} could not be imported")

    def make_debian(self):
        self.load(self.root("debian", ""), DEBIAN, 'CMD ["bash"]')

    def make_redis(self):
        folder = self.root("redis", "redis-server,redis-tools")
        (folder / "data").mkdir(exist_ok=True)
        self.story.run("chroot", folder, "chown", "redis:redis", "/data")
        self.load(folder, REDIS, "VOLUME /data", "WORKDIR /data", 'CMD ["redis-server"]')

    def make_rust(self):
        folder = self.root("rust", "gcc,libc6-dev,binutils,ca-certificates,curl")
        home = folder / "usr/local/cargo"
        if not (home / "bin/cargo").exists():
            toolchain = pathlib.Path(self.story.run("rustc", "--print", "sysroot", cwd=ROOT).strip())
            home.mkdir(parents=True, exist_ok=True)
            target = folder / "usr/local/rust"
            shutil.rmtree(target, ignore_errors=True)
            for part in ("bin", "lib"):
                shutil.copytree(toolchain / part, target / part, symlinks=True)
            # Crates that this machine has are not fetched again.
            registry = pathlib.Path(os.environ.get("CARGO_HOME", pathlib.Path.home() / ".cargo")) / "registry"
            for part in ("index", "cache"):
                if (registry / part).is_dir():
                    shutil.copytree(registry / part, home / "registry" / part, symlinks=True, dirs_exist_ok=True)
            (home / "bin").symlink_to("/usr/local/rust/bin")
        self.load(
            folder, RUST, "ENV CARGO_HOME=/usr/local/cargo CARGO_NET_OFFLINE=true",
            "ENV PATH=/usr/local/cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 'CMD ["bash"]',
        )

    def ashlar(self, tags, binary):
        """Builds the image under several tags: with a binary that is there, or by compiling it."""
        options = []
        if binary:
            folder = self.work / "binary"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            # As the Dockerfile does.
            self.story.run("strip", "--strip-debug", "-o", folder / "ashlar", binary)
            self.load(folder, BINARY, 'CMD ["/ashlar"]')
            options = ["--build-arg", f"BINARY={BINARY}"]
        for tag in tags:
            self.daemon.run(
                "build", "--file", ROOT / "docker/Dockerfile", "--tag", tag, *options,
                "--label", f"org.ashlar.tag={tag}", ROOT, seconds=3 * 3600,
            )

    def megabytes(self, name: str) -> float:
        return int(self.daemon.run("image", "inspect", "--format", "{{.Size}}", name)) / 1e6
