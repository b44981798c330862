//! A child process kept alive: killed when it hangs, started again with growing pauses, told to end by closing its standard
//! input.

use crate::roles::EXIT_PERMANENT;
use crate::settings;
use anyhow::{Context, Result};
use ashlar_service_kit::drain::{CRASHED_VARIABLE, SUPERVISED_VARIABLE};
use ashlar_service_kit::watchdog;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};

const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// A child that lived this long starts again after the shortest pause.
const STEADY: Duration = Duration::from_secs(2);
const LOG_TAIL_LINES: usize = 12;

/// A role to keep alive.
#[derive(Debug, Clone)]
pub(crate) struct Role {
    /// What people call it (`gateway`, `node-0`).
    pub(crate) name: String,
    /// Sub-command of this binary.
    pub(crate) command: &'static str,
    /// Its configuration.
    pub(crate) config: PathBuf,
    /// Where its standard error goes.
    pub(crate) log: PathBuf,
    /// After how much silence it is killed, once it has said that it lives; `None` waits for ever.
    pub(crate) silence_max: Option<Duration>,
    /// The network namespace in which it runs; `None`: that of its supervisor.
    pub(crate) network: Option<PathBuf>,
}

/// What a supervised role tells.
#[derive(Debug)]
pub(crate) enum Notice {
    /// It runs, with this process id.
    Started { name: String, pid: u32 },
    /// It ended unasked and will be started again.
    Ended { name: String, how: String },
    /// It ended and starting it again would not help; the end of its log.
    GaveUp { name: String, log_tail: String },
}

/// A supervised role.
#[derive(Debug)]
pub(crate) struct Supervised {
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Supervised {
    /// Starts supervising.
    pub(crate) fn start(role: Role, notices: mpsc::Sender<Notice>) -> Supervised {
        let (stop, stopped) = watch::channel(false);
        Supervised { stop, task: tokio::spawn(supervise(role, notices, stopped)) }
    }

    /// Asks the child to drain and end; waits for it, then kills it after `grace`.
    pub(crate) async fn end(self, grace: Duration) {
        let _ = self.stop.send(true);
        let abort = self.task.abort_handle();
        if tokio::time::timeout(grace, self.task).await.is_err() {
            // The child was started with `kill_on_drop`: ending its task kills it.
            abort.abort();
            eprintln!("a role did not end within {} s and was killed", grace.as_secs());
        }
    }
}

async fn supervise(role: Role, notices: mpsc::Sender<Notice>, mut stop: watch::Receiver<bool>) {
    let mut pause = PAUSE_MIN;
    let mut crashed = None;
    loop {
        let started = Instant::now();
        let mut killed = false;
        let mut ear = role.silence_max.and_then(|max| Ear::open(max, role.network.is_some()));
        let how = match spawn(&role, ear.as_ref(), crashed.take()) {
            Err(error) => format!("{error:#}"),
            Ok(mut child) => {
                let pid = child.id().unwrap_or_default();
                let _ = notices.send(Notice::Started { name: role.name.clone(), pid }).await;
                let mut memory = OutOfMemory::watch();
                // Held open for as long as the child shall live; `wait` would close it.
                let stdin = child.stdin.take();
                let mut hung = None;
                let ended = tokio::select! {
                    status = child.wait() => Some(status),
                    _ = stop.changed() => None,
                    limit = silence(&mut ear) => {
                        hung = Some(limit);
                        let _ = child.start_kill();
                        Some(child.wait().await)
                    }
                    never = memory.keep_looking() => match never {},
                };
                let Some(status) = ended else {
                    drop(stdin);
                    let _ = child.wait().await;
                    return;
                };
                crashed = status.as_ref().ok().and_then(crash);
                killed = hung.is_some() || status.as_ref().is_ok_and(is_killed);
                let out_of_memory = hung.is_none() && killed && memory.has_killed();
                if out_of_memory {
                    // What it was doing may be why, unlike where somebody killed it.
                    crashed = Some(rustix::process::Signal::KILL.as_raw());
                }
                match (hung, status) {
                    (None, Ok(_)) if out_of_memory => {
                        "killed by the system for want of memory: let it use less (--memory, --max-context), or give it more"
                            .to_owned()
                    }
                    (Some(limit), _) => format!("killed, as it said nothing for {} ms", limit.as_millis()),
                    (None, Ok(status)) if status.code() == Some(i32::from(EXIT_PERMANENT)) => {
                        let log_tail = tail(&role.log);
                        let _ = notices.send(Notice::GaveUp { name: role.name, log_tail }).await;
                        return;
                    }
                    (None, Ok(status)) => status.to_string(),
                    (None, Err(error)) => error.to_string(),
                }
            }
        };
        let _ = notices.send(Notice::Ended { name: role.name.clone(), how }).await;
        // Whoever kills it does not mean that it cannot run.
        let steady = killed || started.elapsed() > STEADY;
        pause = if steady { PAUSE_MIN } else { (pause * 2).min(PAUSE_MAX) };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = stop.changed() => return,
        }
    }
}

/// How often is looked whether the system has killed for want of memory: somebody else's process, killed so long before one of ours was
/// by somebody, would be taken for it.
const MEMORY_LOOK: Duration = Duration::from_millis(500);

/// Whether the system kills processes because it runs out of memory. It does not say which: that one of ours ends by a kill at the
/// same time has to do.
#[derive(Debug)]
struct OutOfMemory {
    /// So often, when last looked.
    kills: Option<u64>,
}

impl OutOfMemory {
    fn watch() -> OutOfMemory {
        OutOfMemory { kills: out_of_memory_kills() }
    }

    /// Looks now and then.
    async fn keep_looking(&mut self) -> std::convert::Infallible {
        loop {
            tokio::time::sleep(MEMORY_LOOK).await;
            self.kills = out_of_memory_kills();
        }
    }

    /// Whether it has killed since then.
    fn has_killed(&self) -> bool {
        self.kills.zip(out_of_memory_kills()).is_some_and(|(before, now)| now > before)
    }
}

/// How many processes the system has killed for want of memory since it runs, its own and those of containers; `None` where it does not
/// say.
fn out_of_memory_kills() -> Option<u64> {
    parse_out_of_memory_kills(&fs::read_to_string("/proc/vmstat").ok()?)
}

fn parse_out_of_memory_kills(vmstat: &str) -> Option<u64> {
    vmstat.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

/// The signal by which a process crashed by itself; being killed is none.
fn crash(status: &std::process::ExitStatus) -> Option<i32> {
    use rustix::process::Signal;
    use std::os::unix::process::ExitStatusExt;
    let crashes = [Signal::SEGV, Signal::BUS, Signal::ABORT, Signal::ILL, Signal::FPE];
    status.signal().filter(|signal| crashes.iter().any(|crash| crash.as_raw() == *signal))
}

fn is_killed(status: &std::process::ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt;
    status.signal() == Some(rustix::process::Signal::KILL.as_raw())
}

fn spawn(role: &Role, ear: Option<&Ear>, crashed: Option<i32>) -> Result<Child> {
    let binary = std::env::current_exe().context("cannot find this program's own file")?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&role.log)
        .with_context(|| format!("cannot open {}", role.log.display()))?;
    let mut command = match &role.network {
        None => Command::new(binary),
        Some(network) => {
            // It becomes the role: the process id stays.
            let mut command = Command::new("nsenter");
            command.arg(format!("--net={}", network.display())).arg(binary);
            command
        }
    };
    if let Some(ear) = ear {
        command
            .env(watchdog::SOCKET_VARIABLE, ear.name())
            .env(watchdog::LIMIT_VARIABLE, ear.silence_max.as_micros().to_string());
    }
    if let Some(signal) = crashed {
        command.env(CRASHED_VARIABLE, signal.to_string());
    }
    // What this command was told goes to them in files: no variable shall set one key of all of them, such as a port.
    for (name, _) in std::env::vars_os().filter(|(name, _)| settings::is_variable(name)) {
        command.env_remove(name);
    }
    command
        .arg(role.command)
        .arg("--config")
        .arg(&role.config)
        .env(SUPERVISED_VARIABLE, "1")
        // Ctrl-C reaches only the supervisor, which ends the roles in order.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {}", role.name))
}

/// Hears a child's signs of life.
struct Ear {
    #[cfg(target_os = "linux")]
    socket: tokio::net::UnixDatagram,
    place: Place,
    silence_max: Duration,
}

/// Where the socket is.
#[cfg_attr(not(target_os = "linux"), expect(dead_code))]
enum Place {
    /// An abstract name.
    Name(String),
    /// A file, removed at the end: abstract names end with their network.
    File(PathBuf),
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Place::File(path) = self {
            let _ = fs::remove_file(path);
        }
    }
}

impl Ear {
    #[cfg(target_os = "linux")]
    fn open(silence_max: Duration, other_network: bool) -> Option<Ear> {
        use std::os::linux::net::SocketAddrExt;
        use std::os::unix::net::{SocketAddr, UnixDatagram};
        use std::sync::atomic::{AtomicU64, Ordering};
        static OPENED: AtomicU64 = AtomicU64::new(0);
        let number = OPENED.fetch_add(1, Ordering::Relaxed);
        let name = format!("ashlar-{}-{number}", std::process::id());
        let place =
            if other_network { Place::File(std::env::temp_dir().join(name)) } else { Place::Name(name) };
        let address = match &place {
            Place::Name(name) => SocketAddr::from_abstract_name(name),
            Place::File(path) => {
                // What a process of the same number has left.
                let _ = fs::remove_file(path);
                SocketAddr::from_pathname(path)
            }
        };
        let socket = UnixDatagram::bind_addr(&address.ok()?).ok()?;
        socket.set_nonblocking(true).ok()?;
        let socket = tokio::net::UnixDatagram::from_std(socket).ok()?;
        Some(Ear { socket, place, silence_max })
    }

    #[cfg(not(target_os = "linux"))]
    fn open(_: Duration, _: bool) -> Option<Ear> {
        None
    }

    /// What the child is told.
    fn name(&self) -> std::ffi::OsString {
        match &self.place {
            Place::Name(name) => format!("@{name}").into(),
            Place::File(path) => path.into(),
        }
    }

    async fn beat(&self) {
        #[cfg(target_os = "linux")]
        {
            let _ = self.socket.recv(&mut [0; 64]).await;
        }
        #[cfg(not(target_os = "linux"))]
        std::future::pending().await
    }
}

/// Ends when a child that has said that it lives says so no longer; after how much silence.
async fn silence(ear: &mut Option<Ear>) -> Duration {
    let Some(ear) = ear else { return std::future::pending().await };
    // It may take its time to start.
    ear.beat().await;
    while tokio::time::timeout(ear.silence_max, ear.beat()).await.is_ok() {}
    ear.silence_max
}

fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_for_want_of_memory_are_counted_where_the_system_tells_them() {
        let vmstat = "nr_free_pages 71\noom_kill_disable 5\noom_kill 3\nswap_ra 0\n";
        assert_eq!(parse_out_of_memory_kills(vmstat), Some(3));
        assert_eq!(parse_out_of_memory_kills("nr_free_pages 71\n"), None);
        assert!(!OutOfMemory { kills: None }.has_killed(), "what nobody counts is no reason");
    }
}
