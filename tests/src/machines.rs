//! Machines that join a cluster: `ashlar node` as it runs elsewhere, over an address that others could reach, too.

use crate::cluster::{START_LIMIT, binary, free_port};
use crate::{Cluster, until};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// Where texts are completed.
pub const COMPLETIONS: &str = "/v1/completions";

/// A port with a free one above it, for the scheduler.
fn join_port() -> u16 {
    let found = until(START_LIMIT, || {
        let port = free_port();
        let above = TcpListener::bind(("0.0.0.0", port.checked_add(1)?));
        (above.is_ok() && TcpListener::bind(("0.0.0.0", port)).is_ok()).then_some(port)
    });
    found.expect("two free ports in a row")
}

/// A cluster that machines may join at a port on every address of this machine.
pub fn open_cluster(args: &[&str]) -> (Cluster, u16) {
    let port = join_port();
    let listen = format!("0.0.0.0:{port}");
    let args: Vec<&str> =
        [&["--join-listen", &listen, "--memory", "512MiB", "--threads", "1"], args].concat();
    (Cluster::launch(&args), port)
}

/// The token in a line that says what to run, which names this port.
#[track_caller]
pub fn token_in(said: &str, port: u16) -> String {
    let line = said
        .lines()
        .find(|line| line.trim_start().starts_with("ashlar node --join "))
        .expect("a line to paste");
    let words: Vec<&str> = line.split_whitespace().collect();
    let ["ashlar", "node", "--join", address, "--token", token, ..] = words[..] else { panic!("{line}") };
    assert!(address.ends_with(&format!(":{port}")), "{line}");
    token.to_owned()
}

/// The token that `up` prints.
#[track_caller]
pub fn first_token(cluster: &Cluster, port: u16) -> String {
    until(START_LIMIT, || cluster.up_said().contains("--token").then_some(())).expect("a token");
    token_in(&cluster.up_said(), port)
}

/// `ashlar node` as it runs on another machine. Dropping it kills it.
#[derive(Debug)]
pub struct Machine {
    /// The process.
    pub node: Child,
    /// Its disk: state and log.
    pub folder: TempDir,
}

impl Machine {
    /// Joins with a token, under a name.
    pub fn join(port: u16, token: &str, name: &str) -> Machine {
        Machine::join_with(port, token, name, &[])
    }

    /// The same, with more arguments.
    pub fn join_with(port: u16, token: &str, name: &str, args: &[&str]) -> Machine {
        let address = format!("127.0.0.1:{port}");
        let folder = tempfile::tempdir().expect("a temporary directory");
        Machine::start(folder, &[&["--join", &address, "--token", token, "--name", name], args].concat())
    }

    /// With the state in `folder`.
    pub fn start(folder: TempDir, args: &[&str]) -> Machine {
        let log = File::options().create(true).append(true).open(folder.path().join("stderr"));
        let log = log.expect("a log");
        let node = Command::new(binary())
            .args(["node", "--memory", "512MiB", "--threads", "1", "--state"])
            .arg(folder.path().join("state"))
            .args(args)
            .env("ASHLAR_SUPERVISED", "1")
            .env_remove("ASHLAR_LOG")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("`ashlar` cannot be started");
        Machine { node, folder }
    }

    /// All that it has said.
    pub fn said(&self) -> String {
        fs::read_to_string(self.folder.path().join("stderr")).unwrap_or_default()
    }

    /// Waits until it says something.
    #[track_caller]
    pub fn says(&self, what: &str) {
        if until(START_LIMIT, || self.said().contains(what).then_some(())).is_none() {
            panic!("never said `{what}`:\n{}", self.said());
        }
    }

    /// Kills it, as a power cut would; what is left is its disk.
    pub fn killed(mut self) -> TempDir {
        self.node.kill().expect("it runs");
        self.node.wait().expect("it ends");
        let empty = tempfile::tempdir().expect("a temporary directory");
        std::mem::replace(&mut self.folder, empty)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.node.kill();
        let _ = self.node.wait();
        if std::thread::panicking() {
            eprintln!("--- a machine that joined\n{}", self.said());
        }
    }
}

/// What the model answers, with everything that could differ.
#[track_caller]
pub fn answer(cluster: &Cluster) -> Value {
    let asked = json!({
        "prompt": "The capital of France is", "temperature": 1, "seed": 3, "max_tokens": 24, "ignore_eos": true,
        "logprobs": 5,
    });
    let mut answered = cluster.post(COMPLETIONS, &asked).ok();
    answered["choices"].take()
}
