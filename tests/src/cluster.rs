//! A real cluster: `ashlar up` as a child process, with everything it starts.

use crate::http::{self, Answer, EventStream};
use crate::{processes, until};
use serde_json::Value;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// The machine may be busy; a cluster on an idle one is ready within a second.
pub const START_LIMIT: Duration = Duration::from_secs(60);
/// `up` gives streams 40 seconds and each role some more.
const END_LIMIT: Duration = Duration::from_secs(70);

/// A running `ashlar up`. Dropping it kills it and all that it has started.
#[derive(Debug)]
pub struct Cluster {
    up: Child,
    address: String,
    /// Holds state, logs and configurations; removed at the end.
    state: TempDir,
}

/// How a process ended, and all that it and its roles have said.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status; `None` if it had to be killed.
    pub status: Option<ExitStatus>,
    /// What it wrote to standard error and output, and the roles' logs.
    pub said: String,
}

impl Cluster {
    /// The demo model over two nodes.
    #[track_caller]
    pub fn demo() -> Cluster {
        Cluster::start(&[])
    }

    /// `ashlar up` with these arguments, ready to serve.
    #[track_caller]
    pub fn start(args: &[&str]) -> Cluster {
        let cluster = Cluster::launch(args);
        cluster.await_ready(START_LIMIT);
        cluster
    }

    /// `ashlar up` with these arguments, not waited for. A free port may be taken by somebody else before `up` has it:
    /// then another is tried.
    #[track_caller]
    pub fn launch(args: &[&str]) -> Cluster {
        for _ in 0..4 {
            let mut cluster = Cluster::spawn(args);
            let listens = until(START_LIMIT, || {
                let over = cluster.up.try_wait().ok().flatten().is_some();
                (over || !cluster.pids().is_empty()).then_some(!over)
            });
            if listens == Some(true) {
                return cluster;
            }
            let said = cluster.said();
            assert!(
                said.contains("cannot listen on"),
                "`ashlar up {}` did not start:\n{said}",
                args.join(" ")
            );
        }
        panic!("no free port was left free");
    }

    /// [`Cluster::start`], with `folder` of the state directory (`.` is all of it) on a disk of its own that has so many bytes. That
    /// takes the right to mount: where it is missing, says so and returns `None`: the test is to return.
    #[track_caller]
    pub fn start_on_small_disk(test: &str, args: &[&str], folder: &str, bytes: u64) -> Option<Cluster> {
        let may_mount = Command::new("unshare").args(["--mount", "true"]).stderr(Stdio::null()).status();
        if !may_mount.is_ok_and(|status| status.success()) {
            eprintln!("SKIPPED {test}: mounting a small disk takes root");
            return None;
        }
        let cluster = Cluster::spawn_on(args, Some((folder, bytes)));
        cluster.await_ready(START_LIMIT);
        Some(cluster)
    }

    #[track_caller]
    fn spawn(args: &[&str]) -> Cluster {
        Cluster::spawn_on(args, None)
    }

    #[track_caller]
    fn spawn_on(args: &[&str], small_disk: Option<(&str, u64)>) -> Cluster {
        let state = tempfile::Builder::new().prefix("ashlar-test-").tempdir().expect("a temporary directory");
        let address = format!("127.0.0.1:{}", free_port());
        let mut command = match small_disk {
            None => command(&state, Command::new(binary())),
            Some((folder, bytes)) => {
                // `.` drops out: a directory that is still to be made has none.
                let place: PathBuf = state.path().join("state").join(folder).components().collect();
                fs::create_dir_all(&place).expect("a directory");
                // In a mount namespace of its own, which ends with its processes; `exec` keeps the process id.
                let script = "mount -t tmpfs -o size=$2 tmpfs \"$1\" && shift 2 && exec \"$@\"";
                let mut command = Command::new("unshare");
                command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]);
                command.arg(place).arg(bytes.to_string()).arg(binary());
                self::command(&state, command)
            }
        };
        let up = command
            .arg("up")
            .args(["--listen", &address, "--state"])
            .arg(state.path().join("state"))
            .args(args)
            .spawn()
            .expect("`ashlar` cannot be started");
        Cluster { up, address, state }
    }

    /// `host:port` of the HTTP API.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The process id of `up` itself.
    pub fn up_pid(&self) -> u32 {
        self.up.id()
    }

    /// A path as the cluster's processes see it, where they have a disk of their own.
    pub fn inside(&self, path: &Path) -> PathBuf {
        let path = path.strip_prefix("/").unwrap_or(path);
        PathBuf::from(format!("/proc/{}/root", self.up.id())).join(path)
    }

    /// Fills the disk on which a folder of the state directory lies, to the last byte; the file that does so.
    #[track_caller]
    pub fn fill_disk(&self, folder: &str) -> PathBuf {
        let path = self.inside(&self.state().join(folder)).join("filler");
        let mut file = File::create(&path).expect("a file on the small disk");
        for piece in [vec![0_u8; 64 << 10], vec![0]] {
            while file.write_all(&piece).is_ok() {}
        }
        path
    }

    /// The state directory given to `up`.
    pub fn state(&self) -> PathBuf {
        self.state.path().join("state")
    }

    /// GET.
    #[track_caller]
    pub fn get(&self, path: &str) -> Answer {
        http::get(&self.address, path).unwrap_or_else(|error| panic!("GET {path}: {error}\n{}", self.said()))
    }

    /// POST of JSON.
    #[track_caller]
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        http::post(&self.address, path, body.to_string().as_bytes())
            .unwrap_or_else(|error| panic!("POST {path}: {error}\n{}", self.said()))
    }

    /// POST of JSON, answered by a stream.
    #[track_caller]
    pub fn stream(&self, path: &str, body: &Value) -> EventStream {
        let stream = http::stream(&self.address, path, body.to_string().as_bytes())
            .unwrap_or_else(|error| panic!("POST {path}: {error}\n{}", self.said()));
        let status = stream.status;
        if status != 200 {
            panic!("POST {path}: status {status}, {:?}", stream.rest());
        }
        stream
    }

    /// Waits until a request would be computed.
    #[track_caller]
    pub fn await_ready(&self, limit: Duration) {
        let ready = || http::get(&self.address, "/ready").is_ok_and(|answer| answer.status == 200);
        if until(limit, || ready().then_some(())).is_none() {
            panic!("not ready within {limit:?}:\n{}", self.said());
        }
    }

    /// The scheduler's view of the cluster.
    #[track_caller]
    pub fn view(&self) -> Value {
        self.get("/admin/cluster").ok()["cluster"].take()
    }

    /// A series of `/metrics` without regard to its labels; 0 where there is none.
    #[track_caller]
    pub fn metric(&self, name: &str) -> f64 {
        let page = self.get("/metrics").text();
        page.lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// The current process id of each role, by its name (`gateway`, `scheduler`, `node-0`, …).
    pub fn pids(&self) -> HashMap<String, u32> {
        let mut pids = HashMap::new();
        for line in self.up_said().lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let [name, "pid", pid] = words[..]
                && let Ok(pid) = pid.parse()
            {
                pids.insert(name.to_owned(), pid);
            }
        }
        pids
    }

    /// The current process id of one role.
    #[track_caller]
    pub fn pid(&self, role: &str) -> u32 {
        *self.pids().get(role).unwrap_or_else(|| panic!("no {role}:\n{}", self.said()))
    }

    /// What `up` itself has said.
    pub fn up_said(&self) -> String {
        fs::read_to_string(self.state.path().join("stderr")).unwrap_or_default()
    }

    /// All that anybody has said.
    pub fn said(&self) -> String {
        let own = said(self.state.path());
        // Where the state lies on a disk of its own, only its processes see the logs.
        let inside = self.inside(self.state.path());
        let logs = self.state().join("logs");
        if logs.exists() || !inside.exists() { own } else { own + &said(&inside) }
    }

    /// Sends SIGINT to `up`, as Ctrl-C does.
    pub fn interrupt(&self) {
        processes::signal(self.up.id(), "INT");
    }

    /// Waits until `up` has ended by itself.
    pub fn ended(mut self) -> Ended {
        let status = until(END_LIMIT, || self.up.try_wait().ok().flatten());
        Ended { status, said: self.said() }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let children = processes::children(self.up.id());
        // First the supervisor, so that nothing is started again.
        let _ = self.up.kill();
        let _ = self.up.wait();
        for child in children {
            processes::signal(child, "KILL");
        }
        if std::thread::panicking() {
            eprintln!("{}", self.said());
        }
    }
}

/// Runs `ashlar` with these arguments and environment until it ends, at most `limit`; then kills it.
#[track_caller]
pub fn run_to_end(args: &[&str], environment: &[(&str, &str)], limit: Duration) -> Ended {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut child = command(&directory, Command::new(binary()))
        .args(args)
        .envs(environment.iter().copied())
        .spawn()
        .expect("`ashlar` cannot be started");
    let status = until(limit, || child.try_wait().ok().flatten());
    let children = processes::children(child.id());
    let _ = child.kill();
    let _ = child.wait();
    for child in children {
        processes::signal(child, "KILL");
    }
    Ended { status, said: said(directory.path()) }
}

/// The binary under test.
#[track_caller]
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("ASHLAR_BIN") {
        return PathBuf::from(path);
    }
    // Tests run from `target/PROFILE/deps`.
    let own = std::env::current_exe().expect("the path of this test");
    let target = own.ancestors().nth(3).unwrap_or(Path::new("target"));
    let binary = target.join("release").join(format!("ashlar{}", std::env::consts::EXE_SUFFIX));
    assert!(
        binary.is_file(),
        "there is no {}: run `cargo build --release -p ashlar` first, or set ASHLAR_BIN",
        binary.display()
    );
    binary
}

/// A port that nobody listens on now.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().map(|address| address.port()).expect("its number")
}

/// A command that runs `ashlar`, told to end when this process does, writing into `directory`.
fn command(directory: &TempDir, mut command: Command) -> Command {
    let file = |name: &str| -> io::Result<File> { File::create(directory.path().join(name)) };
    command
        .env("ASHLAR_SUPERVISED", "1")
        // The answers shall not depend on who runs the tests.
        .env_remove("ASHLAR_LOG")
        .stdin(Stdio::piped())
        .stdout(file("stdout").expect("a file for its output"))
        .stderr(file("stderr").expect("a file for its messages"));
    command
}

fn said(directory: &Path) -> String {
    let mut said = String::new();
    let mut add = |path: PathBuf| {
        if let Ok(text) = fs::read_to_string(&path)
            && !text.is_empty()
        {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            said.push_str(&format!("--- {name}\n{text}\n"));
        }
    };
    add(directory.join("stdout"));
    add(directory.join("stderr"));
    let logs = fs::read_dir(directory.join("state/logs")).into_iter().flatten().flatten();
    logs.for_each(|entry| add(entry.path()));
    said
}
