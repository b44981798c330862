//! The processes of a cluster that `ashlar up` runs, for whoever else on this machine wants to know them: a file in the state
//! directory, replaced whole whenever one starts or ends.

use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Roles by name (`gateway`, `scheduler`, `node-0`, …), with their process ids.
pub(crate) type Processes = BTreeMap<String, u32>;

fn file(state: &Path) -> PathBuf {
    state.join("processes.json")
}

/// Says which processes run now.
pub(crate) fn write(state: &Path, processes: &Processes) -> Result<()> {
    let (path, new) = (file(state), state.join("processes.json.new"));
    let text = serde_json::to_string(processes)?;
    fs::write(&new, text)
        .and_then(|()| fs::rename(&new, &path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Which processes run now.
pub(crate) fn read(state: &Path) -> Result<Processes> {
    let path = file(state);
    let text = fs::read_to_string(&path).with_context(|| {
        format!("cannot read {}: is `ashlar up` running, and is this its --state directory?", path.display())
    })?;
    serde_json::from_str(&text).with_context(|| format!("{} is not what `ashlar up` writes", path.display()))
}

/// What is done to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    /// It is gone.
    Kill,
    /// It stands still.
    Stop,
    /// It goes on.
    Continue,
}

/// Sends a signal to a role of the cluster, if its process is still the one that it was.
pub(crate) fn signal(state: &Path, name: &str, pid: u32, signal: Signal) -> Result<()> {
    // The number may be another process's by now.
    let config = state.join("config").join(format!("{name}.toml"));
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let ours = command.split(|byte| *byte == 0).any(|word| word == config.as_os_str().as_encoded_bytes());
    if !ours {
        bail!("process {pid} is not the {name} of {}", state.display());
    }
    let id = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).context("a process id")?;
    let signal = match signal {
        Signal::Kill => rustix::process::Signal::KILL,
        Signal::Stop => rustix::process::Signal::STOP,
        Signal::Continue => rustix::process::Signal::CONT,
    };
    rustix::process::kill_process(id, signal).with_context(|| format!("cannot signal process {pid}"))
}
