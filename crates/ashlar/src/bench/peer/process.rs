//! A shell command with a time limit, whose output is kept.
//!
//! The command runs in a process group of its own, led by a shell that also waits for its standard input to end: closing
//! it ends the whole group. So a time limit reaches what the command started, and nothing of it is left when this process
//! is interrupted.

use anyhow::{Context, Result, bail};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

/// What is kept of each stream: its end.
const KEPT_BYTES_MAX: usize = 1 << 20;
/// What an error quotes.
const TAIL_LINES: usize = 12;
const POLL: Duration = Duration::from_millis(20);
/// How long streams may stay open after the command has ended.
const STREAMS_GRACE: Duration = Duration::from_secs(2);

/// Leads the group. `$0` is the command; descriptor 3 is open for as long as we want it to run.
const LEADER: &str = r#"exec 3<&0 </dev/null
{ read -r _ <&3; kill -KILL "-$$"; } >/dev/null 2>&1 &
watch=$!
sh -c "$0" 3<&-
code=$?
kill -KILL "$watch" 2>/dev/null
exit "$code""#;

/// What a command wrote.
#[derive(Debug)]
pub(super) struct Said {
    /// Standard output.
    pub(super) output: String,
    /// Standard error.
    errors: String,
}

impl Said {
    /// The last lines, of standard error if there are any.
    pub(super) fn tail(&self) -> String {
        let text = if self.errors.trim().is_empty() { &self.output } else { &self.errors };
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        match lines.len() {
            0 => "(nothing)".to_owned(),
            count => lines[count.saturating_sub(TAIL_LINES)..].join("\n"),
        }
    }
}

/// Runs `command` in a shell. An error if it fails or takes longer than `limit`.
pub(super) fn run(command: &str, limit: Duration) -> Result<Said> {
    let started = Instant::now();
    let mut child = Command::new("sh")
        .args(["-c", LEADER, command])
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start a shell for the peer")?;
    let alive = child.stdin.take();
    let (output, errors) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let ended: Option<ExitStatus> = loop {
        if let Some(status) = child.try_wait().context("cannot wait for the peer")? {
            break Some(status);
        }
        if started.elapsed() > limit {
            break None;
        }
        thread::sleep(POLL);
    };
    drop(alive);
    if ended.is_none() {
        child.wait().context("cannot wait for the peer")?;
    }
    let said = Said { output: text(&output), errors: text(&errors) };
    match ended {
        Some(status) if status.success() => Ok(said),
        Some(status) => bail!("the peer failed ({status}); the end of what it said:\n{}", said.tail()),
        None => bail!(
            "the peer took longer than {} s and was ended (see --against-timeout-s); the end of what it said:\n{}",
            limit.as_secs(),
            said.tail()
        ),
    }
}

/// Reads a stream to its end on a thread of its own, so that a full pipe never stops the command.
fn collect(stream: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    let Some(mut stream) = stream else { return receiver };
    thread::spawn(move || {
        let (mut kept, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            kept.extend_from_slice(&buffer[..count]);
            // Twice the bound, so that moving bytes is rare.
            if kept.len() > 2 * KEPT_BYTES_MAX {
                kept.drain(..kept.len() - KEPT_BYTES_MAX);
            }
        }
        kept.drain(..kept.len().saturating_sub(KEPT_BYTES_MAX));
        // Nobody listens any more if the command was given up.
        let _ = sender.send(kept);
    });
    receiver
}

/// What a stream held; nothing if something that left the group still holds it open.
fn text(stream: &Receiver<Vec<u8>>) -> String {
    String::from_utf8_lossy(&stream.recv_timeout(STREAMS_GRACE).unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn both_streams_are_kept_and_quotes_survive() {
        let said = run("echo \"it's $((1 + 1))\"; echo 'no' >&2", LONG).unwrap();
        assert_eq!((said.output.as_str(), said.tail().as_str()), ("it's 2\n", "no"));
        assert_eq!(run("true", LONG).unwrap().tail(), "(nothing)");
    }

    #[test]
    fn a_command_that_reads_its_input_finds_it_empty() {
        assert_eq!(run("cat; echo done", LONG).unwrap().output, "done\n");
    }

    #[test]
    fn only_the_end_of_a_long_output_is_kept() {
        let said = run("yes | head -c 5000000; echo end", LONG).unwrap();
        assert!(said.output.ends_with("end\n") && said.output.len() <= KEPT_BYTES_MAX);
    }

    #[test]
    fn a_time_limit_ends_what_the_command_started() {
        let started = Instant::now();
        let error =
            run("echo started; sleep 60 & sleep 60; echo never", Duration::from_millis(300)).unwrap_err();
        assert!(
            error.to_string().contains("longer than 0 s") && error.to_string().contains("started"),
            "{error}"
        );
        // Streams end only when every process that holds them has.
        assert!(started.elapsed() < Duration::from_secs(2), "the children were left running");
    }
}
