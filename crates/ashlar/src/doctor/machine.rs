//! What this machine has, as far as it matters to a node.

use crate::findings::Finding;
use ashlar_kernels::measure::Reader;
use ashlar_kernels::{Isa, Kernels, available_threads};
use ashlar_service_kit::memory;
use ashlar_vocabulary::Bytes;
use rustix::process::{Resource, getrlimit};
use std::path::Path;
use std::time::{Duration, SystemTime};

const GIB: u64 = 1 << 30;
/// A gateway with all its connections, each with a client; a node with many links and files.
const OPEN_FILES_MIN: u64 = 4096;
/// Several times what a last-level cache holds.
const WORKING_SET: usize = 256 << 20;
const MEASURED: Duration = Duration::from_millis(300);
/// Every token reads every weight: a small model of 4 GB would give one token a second.
const BANDWIDTH_MIN: f64 = 4e9;
/// When this was written; certificates of clusters are younger.
const CLOCK_MIN: Duration = Duration::from_secs(1_790_000_000);

/// Looks at the machine whose files are below `root`, on which a node keeps its state in `state`.
pub(super) fn examine(root: &Path, state: &Path) -> Vec<Finding> {
    let mut findings = vec![cores(), instructions(&Isa::available())];
    findings.push(memory_of(memory::available_memory(), number_of(root, "proc/meminfo", "MemAvailable:")));
    findings.extend(swap(
        number_of(root, "proc/meminfo", "SwapTotal:"),
        number_of(root, "proc/meminfo", "SwapFree:"),
    ));
    let file = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    findings.extend(load(file("proc/loadavg").as_deref(), available_threads()));
    findings.extend(huge_pages(file("sys/kernel/mm/transparent_hugepage/enabled").as_deref()));
    findings.extend(governor(file("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").as_deref()));
    findings.push(clock(
        file("sys/devices/system/clocksource/clocksource0/current_clocksource").as_deref(),
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default(),
    ));
    findings.push(open_files(getrlimit(Resource::Nofile).current));
    findings.push(disk(state));
    findings
}

/// How fast it reads its memory, with all threads.
pub(super) fn measure() -> Finding {
    let kernels = Kernels::new(Isa::best(), available_threads());
    let speed = Reader::new(&kernels, WORKING_SET).bytes_per_s(&kernels, MEASURED);
    let what = format!("memory is read at {:.1} GB/s by {} threads", speed / 1e9, kernels.threads());
    if speed < BANDWIDTH_MIN {
        return Finding::warning(
            what,
            "Each token reads all the weights: expect few tokens a second, quantise the model (`quantize`), or use more machines.",
        );
    }
    Finding::good(what)
}

fn cores() -> Finding {
    let threads = available_threads();
    let online = std::fs::read_to_string("/proc/cpuinfo").ok();
    let online = online.map_or(0, |text| text.lines().filter(|line| line.starts_with("processor")).count());
    let what = format!("{threads} compute threads");
    if online > threads {
        return Finding::good(format!(
            "{what}: affinity or a control group leaves this process so many of {online} cores"
        ));
    }
    Finding::good(what)
}

fn instructions(available: &[Isa]) -> Finding {
    let names: Vec<_> = available.iter().map(Isa::to_string).collect();
    let what = format!("instruction sets: {}", names.join(", "));
    if available.len() <= 1 {
        return Finding::warning(
            what,
            "Neither AVX2 nor AVX-512 is there, so products take several times as long: a virtual machine may have to be told to \
             hand them on (for QEMU -cpu host).",
        );
    }
    Finding::good(what)
}

/// What can be taken, and what could be if no control group limited it.
fn memory_of(available: Option<Bytes>, unlimited: Option<u64>) -> Finding {
    let Some(available) = available else {
        return Finding::warning(
            "the system does not say how much memory is available",
            "Set `memory_bytes` in the configuration of each node.",
        );
    };
    let mut what = format!("{available} of memory available");
    if let Some(unlimited) = unlimited.filter(|unlimited| *unlimited / 100 * 95 > available.0) {
        what += &format!(", for a control group limits this process: the machine has {}", Bytes(unlimited));
    }
    match available.0 {
        0..536_870_912 => Finding::problem(
            what,
            "That holds no model: end other programs, or raise the limit of the container (mem_limit, resources.limits.memory).",
        ),
        536_870_912..2_147_483_648 => {
            Finding::warning(what, "Only small models fit: `ashlar plan --model …` says what a model takes.")
        }
        _ => Finding::good(what),
    }
}

fn swap(total: Option<u64>, free: Option<u64>) -> Option<Finding> {
    let (total, used) = (total?, total?.saturating_sub(free?));
    if total == 0 {
        return Some(Finding::good("no swap: what does not fit is refused, not slow"));
    }
    let what = format!("{} of {} swap in use", Bytes(used), Bytes(total));
    Some(if used > GIB / 4 {
        Finding::warning(
            what,
            "Weights that are swapped out stall every step: end other programs, or turn swap off (swapoff -a).",
        )
    } else {
        Finding::good(what)
    })
}

fn load(text: Option<&str>, threads: usize) -> Option<Finding> {
    let load: f64 = text?.split(' ').next()?.parse().ok()?;
    let what = format!("load {load:.1} on {threads} threads");
    Some(if load > 1.5 * threads as f64 {
        Finding::warning(
            what,
            "Others compute on these cores, and each stage waits for the slowest of its threads: end them, or give nodes cores of \
             their own (`pin`, cpuset).",
        )
    } else {
        Finding::good(what)
    })
}

fn huge_pages(text: Option<&str>) -> Option<Finding> {
    let text = text?;
    let chosen = text.split('[').nth(1)?.split(']').next()?;
    Some(match chosen {
        "never" => Finding::warning(
            "transparent huge pages are off",
            "Weights are then read through pages of 4 KiB, which is slower: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        chosen => Finding::good(format!("transparent huge pages: {chosen}")),
    })
}

fn governor(text: Option<&str>) -> Option<Finding> {
    let name = text?.trim();
    Some(match name {
        "powersave" | "conservative" => Finding::warning(
            format!("the cores' clock is governed by `{name}`"),
            "Short steps do not wake it: choose performance (cpupower frequency-set -g performance).",
        ),
        name => Finding::good(format!("the cores' clock is governed by `{name}`")),
    })
}

fn clock(source: Option<&str>, now: Duration) -> Finding {
    if now < CLOCK_MIN {
        return Finding::problem(
            "this machine's clock is years behind",
            "Certificates of other machines are not valid yet for it: set the clock (chrony, systemd-timesyncd).",
        );
    }
    match source.map(str::trim) {
        Some(slow @ ("hpet" | "acpi_pm" | "jiffies")) => Finding::warning(
            format!("the clock is read from {slow}"),
            "That takes microseconds each time: a machine whose TSC is stable can use it (boot with tsc=reliable).",
        ),
        Some(source) => Finding::good(format!("the clock is read from {source}")),
        None => Finding::good("the clock is plausible"),
    }
}

/// `None`: without a limit.
fn open_files(limit: Option<u64>) -> Finding {
    match limit {
        Some(limit) if limit < OPEN_FILES_MIN => Finding::warning(
            format!("at most {limit} open files and connections"),
            "With many clients a gateway needs more: ulimit -n 65536, LimitNOFILE= of a systemd unit, or `ulimits` of a container.",
        ),
        Some(limit) => Finding::good(format!("at most {limit} open files and connections")),
        None => Finding::good("open files are not limited"),
    }
}

fn disk(state: &Path) -> Finding {
    // It may not be there yet.
    let absolute = std::path::absolute(state).unwrap_or_else(|_| state.to_owned());
    let Some(place) = absolute.ancestors().find(|place| place.is_dir()) else {
        return Finding::problem(
            format!("{} cannot be on this machine", state.display()),
            "Name another --state.",
        );
    };
    let free = match rustix::fs::statvfs(place) {
        Ok(disk) => Bytes(disk.f_bavail.saturating_mul(disk.f_frsize)),
        Err(error) => {
            return Finding::problem(
                format!("cannot ask for free disk at {}: {error}", place.display()),
                "Name another --state.",
            );
        }
    };
    room(&format!("{free} of disk free for {}", absolute.display()), free)
}

fn room(what: &str, free: Bytes) -> Finding {
    match free.0 {
        0..268_435_456 => Finding::problem(
            what,
            "State, logs and checkpoints are written there: free some, or choose another directory (`state`, --state).",
        ),
        268_435_456..5_368_709_120 => Finding::warning(
            what,
            "Fetched models, packed copies and checkpoints take as much as the weights: free some, or choose another directory.",
        ),
        _ => Finding::good(what),
    }
}

/// The bytes of a `name   123 kB` line.
fn number_of(root: &Path, file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(root.join(file)).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

    use super::*;
    use crate::findings::Mark;

    #[test]
    fn little_memory_is_a_problem_and_a_limit_is_named() {
        let of = |available: u64, unlimited: u64| memory_of(Some(Bytes(available)), Some(unlimited));
        assert_eq!(of(GIB / 4, GIB / 4).mark, Mark::Problem);
        assert_eq!(of(GIB, 64 * GIB).mark, Mark::Warning);
        assert!(
            of(GIB, 64 * GIB).what.contains("a control group limits this process: the machine has 64.00 GiB")
        );
        assert_eq!(of(8 * GIB, 8 * GIB), Finding::good("8.00 GiB of memory available"));
        assert_eq!(memory_of(None, None).mark, Mark::Warning);
    }

    #[test]
    fn what_makes_steps_slow_is_warned_about() {
        assert_eq!(swap(Some(8 * GIB), Some(GIB)).unwrap().mark, Mark::Warning);
        assert_eq!(swap(Some(0), Some(0)).unwrap().mark, Mark::Good);
        assert_eq!(load(Some("9.50 1.00 1.00 2/300 77\n"), 4).unwrap().mark, Mark::Warning);
        assert_eq!(load(Some("0.50 1.00 1.00 2/300 77\n"), 4).unwrap().mark, Mark::Good);
        assert_eq!(huge_pages(Some("always madvise [never]\n")).unwrap().mark, Mark::Warning);
        assert_eq!(huge_pages(Some("always [madvise] never\n")).unwrap().mark, Mark::Good);
        assert_eq!(governor(Some("powersave\n")).unwrap().mark, Mark::Warning);
        assert_eq!(instructions(&[Isa::best()]).mark, Mark::Warning);
        assert_eq!(clock(Some("hpet\n"), CLOCK_MIN).mark, Mark::Warning);
        assert_eq!(clock(Some("tsc\n"), Duration::ZERO).mark, Mark::Problem);
    }

    #[test]
    fn limits_and_disk_are_compared_with_what_is_needed() {
        assert_eq!(open_files(Some(1024)).mark, Mark::Warning);
        assert_eq!(open_files(None).mark, Mark::Good);
        let marks = [GIB / 8, GIB, 100 * GIB].map(|free| room("disk", Bytes(free)).mark);
        assert_eq!(marks, [Mark::Problem, Mark::Warning, Mark::Good]);
        let folder = tempfile::tempdir().unwrap();
        let finding = disk(&folder.path().join("not/there/yet"));
        assert!(finding.what.contains("not/there/yet"), "{finding:?}");
    }
}
