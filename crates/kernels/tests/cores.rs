//! Threads and the cores they run on: what a process may use, and one core for each thread on request.
#![cfg(target_os = "linux")]

use ashlar_kernels::{ThreadPool, available_cores, available_threads};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Barrier, Mutex};

/// The cores that each thread of a job may use; every thread takes one task.
fn cores_of_threads(pool: &ThreadPool) -> BTreeSet<Vec<usize>> {
    let (all, found) = (Barrier::new(pool.threads()), Mutex::new(BTreeSet::new()));
    pool.run(pool.threads(), &|_| {
        all.wait();
        found.lock().expect("no task panics").insert(available_cores());
    });
    found.into_inner().expect("no task panicked")
}

#[test]
fn a_pool_on_cores_has_one_thread_on_each_and_frees_its_caller_afterwards() {
    let cores = available_cores();
    assert!(!cores.is_empty());
    let pool = ThreadPool::on_cores(&cores).expect("this process may use them");
    assert_eq!(available_cores(), cores, "making a pool confines nobody");
    let pinned = pool.pin_caller();
    assert!(pinned.is_some());
    assert_eq!(cores_of_threads(&pool), cores.iter().map(|&core| vec![core]).collect());
    drop(pinned);
    assert_eq!(available_cores(), cores);
    // Where threads are not pinned there is nothing to do.
    assert!(ThreadPool::new(2).pin_caller().is_none());
}

#[test]
fn cores_that_the_process_may_not_use_are_refused() {
    let cores = available_cores();
    let missing = (0..).find(|core| !cores.contains(core)).expect("no machine has all numbers");
    for refused in [vec![missing], vec![cores[0], missing], vec![usize::MAX]] {
        let error = ThreadPool::on_cores(&refused).expect_err("the core is not ours");
        assert!(error.to_string().contains("choose among the cores"), "{error}");
        assert_eq!(available_cores(), cores, "a refusal leaves the caller free");
    }
}

/// Not a check: the tests below run it in a process of its own.
#[test]
fn says_how_many_threads_it_may_use() {
    println!("threads: {}.", available_threads());
}

/// Its answer in a process that is started as `command`.
fn threads_of_a_child(mut command: Command) -> usize {
    command.args(["--exact", "says_how_many_threads_it_may_use", "--nocapture"]);
    let output = command.output().expect("the child starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = text.split("threads: ").nth(1).and_then(|rest| rest.split('.').next());
    number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no answer: {output:?}"))
}

fn this_program() -> PathBuf {
    std::env::current_exe().expect("the test has a file")
}

#[test]
fn a_process_confined_to_a_core_uses_one_thread() {
    let one = ThreadPool::on_cores(&available_cores()[..1]).expect("it is ours");
    // A process starts where the thread that starts it may run.
    let _here = one.pin_caller();
    assert_eq!(threads_of_a_child(Command::new(this_program())), 1);
}

/// A control group whose processes together get as much time as one core has.
struct OneCoreGroup(PathBuf);

impl OneCoreGroup {
    fn new() -> io::Result<OneCoreGroup> {
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let path_of = |controller: &str| {
            let mut groups = own.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
            groups.find(|(names, _)| names.split(',').any(|name| name == controller)).map(|(_, path)| path)
        };
        // Version 1 names its controllers, version 2 has one tree for all.
        let (root, path, limits) = match (path_of("cpu"), path_of("")) {
            (Some(path), _) => (
                "/sys/fs/cgroup/cpu",
                path,
                [("cpu.cfs_period_us", "100000"), ("cpu.cfs_quota_us", "100000")],
            ),
            (None, path) => ("/sys/fs/cgroup", path.unwrap_or("/"), [("cpu.max", "100000 100000"); 2]),
        };
        let folder = Path::new(root).join(path.trim_start_matches('/'));
        let folder = folder.join(format!("ashlar-test-{}", std::process::id()));
        fs::create_dir(&folder)?;
        let group = OneCoreGroup(folder);
        for (file, limit) in limits {
            fs::write(group.0.join(file), limit)?;
        }
        Ok(group)
    }
}

impl Drop for OneCoreGroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_process_with_the_quota_of_a_core_uses_one_thread() {
    let group = match OneCoreGroup::new() {
        Ok(group) => group,
        Err(error) => {
            return eprintln!("SKIPPED: a quota of processor time: no control group can be made ({error})");
        }
    };
    let mut command = Command::new("sh");
    command
        .args(["-c", r#"echo $$ > "$0" && exec "$@""#])
        .arg(group.0.join("cgroup.procs"))
        .arg(this_program());
    assert_eq!(threads_of_a_child(command), 1);
}
