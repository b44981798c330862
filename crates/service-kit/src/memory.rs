//! What this process uses and what it may still take, from /proc and control groups of both versions.

use ashlar_vocabulary::Bytes;
use std::path::{Path, PathBuf};

/// Physical memory that this process holds; `None` where the system does not say.
pub fn resident_bytes() -> Option<Bytes> {
    kilobytes_of(Path::new("/proc/self/status"), "VmRSS:")
}

/// Memory that this process can still take without swapping or being killed: the system's estimate of available memory,
/// or less where a cgroup limits the process or a parent of it. `None` where the system does not say.
pub fn available_memory() -> Option<Bytes> {
    available_beneath(Path::new("/"))
}

fn available_beneath(root: &Path) -> Option<Bytes> {
    let system = kilobytes_of(&root.join("proc/meminfo"), "MemAvailable:")?;
    Some(cgroup_room(root).map_or(system, |room| room.min(system)))
}

/// The least room in the process's cgroups and their ancestors; `None` without a limit. Where both versions are mounted, the
/// memory controller is in one of them.
fn cgroup_room(root: &Path) -> Option<Bytes> {
    let membership = std::fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let unified = membership.lines().find_map(|line| line.strip_prefix("0::"));
    let memory = membership.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let controllers = parts.next()?;
        controllers.split(',').any(|controller| controller == "memory").then(|| parts.next())?
    });
    let rooms = [
        unified.and_then(|path| least_room(&root.join("sys/fs/cgroup"), path, &VERSION_2)),
        memory.and_then(|path| least_room(&root.join("sys/fs/cgroup/memory"), path, &VERSION_1)),
    ];
    rooms.into_iter().flatten().min()
}

/// What a version of control groups calls its files.
struct Names {
    max: &'static str,
    current: &'static str,
    /// The line of `memory.stat` with the pages of files that can be dropped.
    droppable: &'static str,
}

const VERSION_2: Names = Names { max: "memory.max", current: "memory.current", droppable: "inactive_file " };
const VERSION_1: Names = Names {
    max: "memory.limit_in_bytes",
    current: "memory.usage_in_bytes",
    droppable: "total_inactive_file ",
};

fn least_room(mount: &Path, path: &str, names: &Names) -> Option<Bytes> {
    // Within a container the path may lie outside what is mounted; then the mount's own root is the cgroup.
    let own: PathBuf = mount.join(path.trim_start_matches('/'));
    let start = if own.is_dir() { own } else { mount.to_owned() };
    start
        .ancestors()
        .take_while(|folder| folder.starts_with(mount))
        .filter_map(|folder| room_of(folder, names))
        .min()
}

/// What one cgroup has left: its limit without what is in use. Pages of files that can be dropped are not in use.
fn room_of(folder: &Path, names: &Names) -> Option<Bytes> {
    let number =
        |name: &str| -> Option<u64> { std::fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok() };
    let max = number(names.max)?;
    let current = number(names.current)?;
    let stat = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let droppable = stat
        .lines()
        .find_map(|line| line.strip_prefix(names.droppable)?.trim().parse::<u64>().ok())
        .unwrap_or(0);
    Some(Bytes(max.saturating_sub(current.saturating_sub(droppable))))
}

/// The value of a `name   123 kB` line.
fn kilobytes_of(file: &Path, name: &str) -> Option<Bytes> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Bytes(kilobytes * 1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("temporary folder");
        for (path, text) in files {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().expect("has a parent")).expect("folder");
            std::fs::write(path, text).expect("file");
        }
        folder
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    1000 kB\n");

    #[test]
    fn without_a_cgroup_the_system_decides() {
        let tree = tree(&[MEMINFO]);
        assert_eq!(available_beneath(tree.path()), Some(Bytes(1000 * 1024)));
    }

    #[test]
    fn an_unlimited_cgroup_limits_nothing() {
        let tree = tree(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/a\n"),
            ("sys/fs/cgroup/a/memory.max", "max\n"),
            ("sys/fs/cgroup/a/memory.current", "5\n"),
        ]);
        assert_eq!(available_beneath(tree.path()), Some(Bytes(1000 * 1024)));
    }

    #[test]
    fn the_tightest_ancestor_decides_and_file_pages_count_as_room() {
        let tree = tree(&[
            MEMINFO,
            ("proc/self/cgroup", "1:name=x:/y\n0::/a/b\n"),
            ("sys/fs/cgroup/a/memory.max", "100000\n"),
            ("sys/fs/cgroup/a/memory.current", "90000\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 70000\ninactive_file 20000\n"),
            ("sys/fs/cgroup/a/b/memory.max", "500000\n"),
            ("sys/fs/cgroup/a/b/memory.current", "1000\n"),
        ]);
        assert_eq!(available_beneath(tree.path()), Some(Bytes(30_000)));
    }

    #[test]
    fn in_a_container_the_mount_itself_is_the_cgroup() {
        let tree = tree(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/docker/123\n"),
            ("sys/fs/cgroup/memory.max", "4096\n"),
            ("sys/fs/cgroup/memory.current", "5000\n"),
        ]);
        assert_eq!(available_beneath(tree.path()), Some(Bytes(0)));
    }

    #[test]
    fn a_limit_of_the_first_version_counts_in_a_container_too() {
        let tree = tree(&[
            MEMINFO,
            ("proc/self/cgroup", "5:cpu,cpuacct:/docker/1\n4:hugetlb,memory:/docker/1\n0::/docker/1\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "100000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "60000\n"),
            ("sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 20000\n"),
        ]);
        assert_eq!(available_beneath(tree.path()), Some(Bytes(60_000)));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_uses_and_has_memory() {
        assert!(resident_bytes().expect("Linux says") > Bytes(100 * 1024));
        assert!(available_memory().expect("Linux says") > Bytes(0));
    }
}
