//! Machines that join a cluster: real processes, which meet over an address that others could reach, too.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use ashlar_identity::{Authority, Fingerprint, Identity, Role, Token};
use ashlar_tests::cluster::{START_LIMIT, binary, free_port};
use ashlar_tests::machines::{COMPLETIONS, Machine, answer, first_token, open_cluster, token_in};
use ashlar_tests::{Cluster, Ended, eventually, processes, run_to_end, until};
use serde_json::json;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

/// A process that is refused ends at once.
const REFUSED_LIMIT: Duration = Duration::from_secs(60);

/// A token that `ashlar token create` prints.
#[track_caller]
fn another_token(cluster: &Cluster, port: u16, args: &[&str]) -> String {
    let state = cluster.state();
    let args = [&["token", "create", "--state", state.to_str().unwrap()], args].concat();
    let made = run_to_end(&args, &[], REFUSED_LIMIT);
    assert!(made.status.is_some_and(|status| status.success()), "{}", made.said);
    token_in(&made.said, port)
}

/// Joining that must not succeed: what it says. It is not worth another try.
#[track_caller]
fn refused(args: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    refused_in(folder.path(), args)
}

#[track_caller]
fn refused_in(folder: &Path, args: &[&str]) -> String {
    let state = folder.join("state");
    let args = [&["node", "--state", state.to_str().unwrap()], args].concat();
    let Ended { status, said } = run_to_end(&args, &[], REFUSED_LIMIT);
    assert_eq!(status.and_then(|status| status.code()), Some(2), "{said}");
    said
}

#[test]
fn a_node_enrols_with_a_token_and_serves() {
    let alone = Cluster::start(&["--stages", "2"]);
    let expected = answer(&alone);
    drop(alone);
    let (cluster, port) = open_cluster(&["--stages", "2", "--nodes", "1"]);
    let token = first_token(&cluster, port);
    let machine = Machine::join(port, &token, "far");
    cluster.await_ready(START_LIMIT);
    assert_eq!(answer(&cluster), expected, "the same bits, wherever a stage is");
    // From its disk it comes back without a token, as the node that it was.
    let disk = machine.killed();
    eventually("the cluster sees that it is gone", START_LIMIT, || cluster.get("/ready").status == 503);
    let machine = Machine::start(disk, &[]);
    cluster.await_ready(START_LIMIT);
    assert_eq!(answer(&cluster), expected);
    let view = cluster.view();
    let names: Vec<&str> =
        view["nodes"].as_array().unwrap().iter().filter_map(|node| node["node"].as_str()).collect();
    assert!(names.contains(&"far") && names.contains(&"node-0"), "{names:?}");
    assert!(
        !machine.said().contains("panicked") && !cluster.said().contains("panicked"),
        "{}",
        cluster.said()
    );
    assert!(
        !machine.said().contains(&token[8..])
            && !cluster.said().replace(&cluster.up_said(), "").contains(&token[8..])
    );
}

/// A group of ranks exchanges twice per layer: over encrypted sockets, or, where they are on one machine after all, through memory.
#[test]
fn a_tensor_parallel_group_spans_machines() {
    let group = ["--stages", "1", "--tp", "2"];
    let alone = Cluster::start(&group);
    let expected = answer(&alone);
    drop(alone);
    for (shared, way) in [("false", "exchange over sockets"), ("true", "exchange through shared memory")] {
        let shared = format!("links.shared_memory={shared}");
        let args = [&group[..], &["--nodes", "1", "--set-node", &shared]].concat();
        let (cluster, port) = open_cluster(&args);
        let _machine = Machine::join(port, &first_token(&cluster, port), "far");
        cluster.await_ready(START_LIMIT);
        assert_eq!(answer(&cluster), expected, "{way}");
        assert!(cluster.said().contains(way), "{}", cluster.said());
    }
}

/// What is known of failures holds for encrypted connections, too: their end is seen at once, and nothing is lost.
#[test]
fn requests_outlive_killed_processes_of_an_encrypted_cluster() {
    let (cluster, _) = open_cluster(&["--stages", "2", "--tp", "2"]);
    cluster.await_ready(START_LIMIT);
    let long = json!({
        "prompt": "Write", "temperature": 1, "seed": 7, "n": 4, "max_tokens": 480, "ignore_eos": true,
    });
    let ask = || cluster.post(COMPLETIONS, &long).ok()["choices"].take();
    let expected = ask();
    for role in ["node-0", "node-3", "scheduler"] {
        let pid = cluster.pid(role);
        let answered = std::thread::scope(|scope| {
            let asking = scope.spawn(ask);
            eventually("it runs", START_LIMIT, || cluster.metric("vllm:num_requests_running") > 0.0);
            assert!(processes::signal(pid, "KILL"));
            asking.join().unwrap()
        });
        assert_eq!(answered, expected, "{role}");
        eventually("it is started again", START_LIMIT, || cluster.pid(role) != pid);
        cluster.await_ready(START_LIMIT);
    }
    assert!(!cluster.said().contains("panicked"), "{}", cluster.said());
}

#[test]
fn a_node_whose_state_another_process_uses_does_not_start() {
    let cluster = Cluster::demo();
    let config = cluster.state().join("config/node-0.toml");
    let Ended { status, said } =
        run_to_end(&["node", "--config", config.to_str().unwrap()], &[], REFUSED_LIMIT);
    assert_eq!(status.and_then(|status| status.code()), Some(2), "{said}");
    let pid = cluster.pid("node-0");
    assert!(said.contains(&format!("process {pid}")) && said.contains("node-0.lock"), "{said}");
}

#[test]
fn a_token_holds_once_for_its_cluster_and_in_its_time() {
    let (cluster, port) = open_cluster(&["--stages", "1", "--nodes", "1"]);
    let address = format!("127.0.0.1:{port}");
    let join = |token: &str, name: &str| refused(&["--join", &address, "--token", token, "--name", name]);
    let token = first_token(&cluster, port);
    let ours: Token = token.parse().unwrap();

    let said = join("hello", "a");
    assert!(said.contains("this is not a token"), "{said}");
    let said = join(&token[..token.len() - 2], "a");
    assert!(said.contains("cut off"), "{said}");
    let said = join(&Token::generate(ours.cluster()).unwrap().reveal(), "a");
    assert!(said.contains("nobody knows this token") && said.contains("token create"), "{said}");
    let said = join(&Token::generate(Fingerprint([9; 32])).unwrap().reveal(), "a");
    assert!(said.contains("another cluster answers") && said.contains("not sent"), "{said}");
    let said = join(&token, "node-0");
    assert!(said.contains("taken") && said.contains("--name"), "{said}");
    let said = join(&token, "No Name");
    assert!(said.contains("lowercase letters"), "{said}");

    // None of these has used it up.
    let machine = Machine::join(port, &token, "far");
    machine.says("joined the cluster");
    let said = join(&token, "other");
    assert!(said.contains("used already") && said.contains("token create"), "{said}");
    let said = refused_in(machine.folder.path(), &["--join", &address]);
    assert!(said.contains(&format!("process {}", machine.node.id())) && said.contains("--state"), "{said}");

    // `up` may be started anew, or the endpoint killed: what was used stays used.
    let endpoint = cluster.pid("enrolment");
    assert!(processes::signal(endpoint, "KILL"));
    eventually("the endpoint is started again", START_LIMIT, || cluster.pid("enrolment") != endpoint);
    eventually("the endpoint is back", START_LIMIT, || std::net::TcpStream::connect(&address).is_ok());
    let said = join(&token, "other");
    assert!(said.contains("used already"), "{said}");

    let made = SystemTime::now();
    let short = another_token(&cluster, port, &["--valid", "1s"]);
    until(START_LIMIT, || made.elapsed().is_ok_and(|age| age > Duration::from_secs(3)).then_some(()))
        .unwrap();
    let said = join(&short, "late");
    assert!(said.contains("expired"), "{said}");
}

#[test]
fn a_lost_machines_name_goes_to_another_one_with_a_token_for_it() {
    let (cluster, port) = open_cluster(&["--stages", "1", "--nodes", "1"]);
    let lost = Machine::join(port, &first_token(&cluster, port), "far");
    lost.says("joined the cluster");
    let disk = lost.killed();
    let token = another_token(&cluster, port, &["--name", "far"]);
    Machine::join(port, &token, "far").says("joined the cluster");
    // Found again after all, its key is of no use any more.
    let said = refused_in(disk.path(), &[]);
    assert!(said.contains("another one has taken the name"), "{said}");
}

#[test]
fn a_node_that_cannot_ask_where_its_cluster_is_goes_by_what_it_remembers() {
    let (cluster, port) = open_cluster(&["--stages", "1", "--nodes", "1"]);
    let machine = Machine::join(port, &first_token(&cluster, port), "far");
    machine.says("joined the cluster");
    let disk = machine.killed();
    // Nobody listens there.
    let nowhere = format!("127.0.0.1:{}", free_port());
    let machine = Machine::start(disk, &["--join", &nowhere]);
    machine.says("going on with what this node remembers");
    machine.says("joined scheduler=");
}

#[test]
fn a_model_that_is_not_the_clusters_is_refused_before_the_node_runs() {
    let (cluster, port) = open_cluster(&["--stages", "1", "--nodes", "1"]);
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(cluster.state().join("models/ashlar-demo")).unwrap().flatten() {
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let config = folder.path().join("config.json");
    let other = fs::read_to_string(&config).unwrap().replacen('{', "{\"of_another\": 1,", 1);
    fs::write(&config, other).unwrap();
    let (address, token) = (format!("127.0.0.1:{port}"), first_token(&cluster, port));
    let model = folder.path().to_str().unwrap();
    let said = refused(&["--join", &address, "--token", &token, "--name", "far", "--model", model]);
    assert!(said.contains("another model than the cluster serves") && said.contains("--model"), "{said}");
}

#[test]
fn two_machines_with_one_identity_are_told_so_and_the_first_goes_on() {
    let (cluster, port) = open_cluster(&["--stages", "2", "--nodes", "1"]);
    let first = Machine::join(port, &first_token(&cluster, port), "far");
    cluster.await_ready(START_LIMIT);
    let expected = answer(&cluster);
    let copy = tempfile::tempdir().unwrap();
    for folder in ["state", "state/identity"] {
        fs::create_dir_all(copy.path().join(folder)).unwrap();
        for entry in fs::read_dir(first.folder.path().join(folder)).unwrap().flatten() {
            if entry.path().is_file() {
                fs::copy(entry.path(), copy.path().join(folder).join(entry.file_name())).unwrap();
            }
        }
    }
    let second = Machine::start(copy, &[]);
    second.says("another process is node far already");
    second.says("stop one of the two");
    assert_eq!(answer(&cluster), expected, "nothing was disturbed");
    assert_eq!(cluster.metric("ashlar_replays_total"), 0.0);
    drop(second);
}

#[test]
fn who_has_no_certificate_of_the_cluster_takes_no_part() {
    let (cluster, port) = open_cluster(&["--stages", "1", "--nodes", "1"]);
    cluster.await_ready(START_LIMIT);
    let folder = tempfile::tempdir().unwrap();
    let strangers = Authority::open_or_create(&folder.path().join("ca")).unwrap();
    let identity = folder.path().join("identity");
    strangers.credentials(&Identity::new(Role::Node, "node-0").unwrap()).unwrap().save(&identity).unwrap();
    let start = |name: &str, keys: &str| {
        let scheduler = port + 1;
        let text = format!(
            "name = \"{name}\"\nscheduler = \"127.0.0.1:{scheduler}\"\nmemory_bytes = 1000000\nthreads = 1\n{keys}"
        );
        let file = folder.path().join(format!("{name}.toml"));
        fs::write(&file, text).unwrap();
        let state = tempfile::tempdir().unwrap();
        let log = File::create(state.path().join("stderr")).unwrap();
        let node = Command::new(binary())
            .args(["node", "--config", file.to_str().unwrap()])
            .current_dir(state.path())
            .env("ASHLAR_SUPERVISED", "1")
            .stdin(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        Machine { node, folder: state }
    };
    let plain = start("plain", "");
    plain.says("this process has no identity");
    let other = start("node-0", &format!("identity = \"{}\"", identity.display()));
    other.says("it belongs to another cluster");
    eventually("the scheduler says whom it has refused", START_LIMIT, || {
        cluster.said().contains("refused a connection")
    });
    // The node of that name has not been disturbed.
    assert_eq!(cluster.metric("ashlar_replays_total"), 0.0);
    answer(&cluster);
}

#[test]
fn nothing_listens_beyond_this_machine_in_the_clear_unless_it_is_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("node.toml");
    let keys = "name = \"a\"\nscheduler = \"127.0.0.1:1\"\nlisten = \"0.0.0.0:0\"\nmemory_bytes = 1000000\nthreads = 1\n";
    fs::write(&file, format!("{keys}state = \"{}\"\n", folder.path().display())).unwrap();
    let Ended { status, said } =
        run_to_end(&["node", "--config", file.to_str().unwrap()], &[], REFUSED_LIMIT);
    assert_eq!(status.and_then(|status| status.code()), Some(2), "{said}");
    assert!(
        said.contains("no identity") && said.contains("--join") && said.contains("allow_plaintext"),
        "{said}"
    );
}

#[test]
fn a_node_that_is_of_no_cluster_says_how_to_join_one() {
    let said = refused(&[]);
    assert!(said.contains("ashlar token create") && said.contains("--join"), "{said}");
    let nowhere = tempfile::tempdir().unwrap();
    let made =
        run_to_end(&["token", "create", "--state", nowhere.path().to_str().unwrap()], &[], REFUSED_LIMIT);
    assert!(made.said.contains("--join-listen"), "{}", made.said);
}
