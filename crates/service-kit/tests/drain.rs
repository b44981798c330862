//! Signals and the end of the parent, in a real process: this test starts itself again as the child.
#![cfg(unix)]

use ashlar_service_kit::{Shutdown, ShutdownReason};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

/// Not a test by itself: what the children of the tests below run.
#[test]
fn child() {
    let Ok(mode) = std::env::var("ASHLAR_DRAIN_TEST") else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    let status = runtime.block_on(async {
        let shutdown = Shutdown::listen().expect("listening");
        eprintln!("ready");
        let reason = shutdown.clone().requested().await;
        eprintln!("draining: {reason}");
        if mode == "slow" {
            std::future::pending::<()>().await;
        }
        match reason {
            ShutdownReason::ParentGone => 3,
            _ => 0,
        }
    });
    std::process::exit(status);
}

fn start(mode: &str, supervised: &str) -> (Child, impl Iterator<Item = String>) {
    let mut child = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "child", "--nocapture"])
        .env("ASHLAR_DRAIN_TEST", mode)
        .env("ASHLAR_SUPERVISED", supervised)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines().map_while(Result::ok);
    assert!(lines.any(|line| line == "ready"));
    (child, lines)
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([name, &child.id().to_string()]).status().expect("kill ran");
    assert!(status.success());
}

#[test]
fn the_first_signal_drains() {
    for (name, reason) in [("-TERM", "draining: SIGTERM"), ("-INT", "draining: SIGINT")] {
        let (mut child, mut lines) = start("quick", "0");
        signal(&child, name);
        assert!(lines.any(|line| line == reason));
        assert_eq!(child.wait().expect("ended").code(), Some(0));
    }
}

#[test]
fn the_second_signal_ends_at_once() {
    let (mut child, mut lines) = start("slow", "0");
    signal(&child, "-TERM");
    assert!(lines.any(|line| line.starts_with("draining")));
    signal(&child, "-INT");
    assert_eq!(child.wait().expect("ended").code(), Some(130));
}

#[test]
fn a_supervised_child_drains_when_its_parent_is_gone() {
    let (mut child, mut lines) = start("quick", "1");
    drop(child.stdin.take());
    assert!(lines.any(|line| line == "draining: the supervisor is gone"));
    assert_eq!(child.wait().expect("ended").code(), Some(3));
}

#[tokio::test]
async fn the_first_reason_stays_and_late_listeners_hear_it() {
    let shutdown = Shutdown::manual();
    assert_eq!(shutdown.reason(), None);
    shutdown.request(ShutdownReason::Requested);
    shutdown.request(ShutdownReason::Terminate);
    assert_eq!(shutdown.clone().requested().await, ShutdownReason::Requested);
}
