//! Processes seen from outside: signals, children, memory (Linux's `/proc`).

use std::fs;
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
