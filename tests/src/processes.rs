//! Processes seen from outside: signals, children, memory (Linux's `/proc`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Sends a signal by name (`KILL`, `STOP`, `CONT`, `INT`); false when there is no such process.
pub fn signal(pid: u32, name: &str) -> bool {
    Command::new("kill")
        .args([format!("-{name}"), pid.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// A limit on the memory that a process takes from now on; lifted when dropped, should the process live then.
#[derive(Debug)]
pub struct MemoryLimit(PathBuf);

impl MemoryLimit {
    /// Limits a process to so many bytes beside what it has already. `None` where that is not allowed, or there are no control groups.
    pub fn impose(pid: u32, bytes: u64) -> Option<MemoryLimit> {
        let name = format!("ashlar-test-{pid}");
        // Version 1, then version 2, where what a process has already stays with its former group, too.
        [("memory", "memory.limit_in_bytes"), ("", "memory.max")].into_iter().find_map(
            |(hierarchy, limit)| {
                let group = Path::new("/sys/fs/cgroup").join(hierarchy).join(&name);
                fs::create_dir(&group).ok()?;
                let limited = fs::write(group.join(limit), bytes.to_string())
                    .and_then(|()| fs::write(group.join("cgroup.procs"), pid.to_string()));
                let made = MemoryLimit(group);
                limited.is_ok().then_some(made)
            },
        )
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        // Who is still in it keeps it; a test that fails may leave it behind.
        let _ = fs::remove_dir(&self.0);
    }
}

/// Whether the process exists and is not a zombie.
pub fn alive(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| state != "Z" && state != "X")
}

/// Process ids of the living children.
pub fn children(parent: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| stat(*pid).is_some_and(|(state, of)| of == parent && state != "Z"))
        .collect()
}

/// Resident bytes (`VmRSS`) of a process.
pub fn resident_bytes(pid: u32) -> Option<u64> {
    kibibytes(pid, "VmRSS:")
}

/// Makes [`resident_bytes_max`] begin anew from what is resident now; false where the system does not allow it.
pub fn forget_resident_max(pid: u32) -> bool {
    // See proc_pid_clear_refs(5).
    fs::write(format!("/proc/{pid}/clear_refs"), "5").is_ok()
}

/// The most that was ever resident (`VmHWM`).
pub fn resident_bytes_max(pid: u32) -> Option<u64> {
    kibibytes(pid, "VmHWM:")
}

fn kibibytes(pid: u32, field: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
}

/// State and parent. The name in parentheses may contain anything, so it is skipped from its end.
fn stat(pid: u32) -> Option<(String, u32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.to_owned();
    Some((state, fields.next()?.parse().ok()?))
}
