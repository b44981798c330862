//! A network of its own for each role of a cluster on one machine, as if on machines of their own, so that they can be cut off from
//! each other: network namespaces on one bridge (Linux, root; the commands `ip` and `nsenter`).
//!
//! The gateway stays in the namespace of whoever starts the cluster, so that clients reach it where they always do. The bridge has
//! a namespace of its own, where no packet filter of the machine sees what passes. Nobody asks for hardware addresses:
//! everybody has those of the others in a permanent table, and who is not to reach somebody gets an address there that nobody has.
//! So packets are lost on the way without a word, in one direction or both, and no packet filter is needed.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Who stays in the namespace of whoever starts the cluster.
const OUTSIDE: &str = "gateway";
/// Clusters that may be on one machine, and roles in one of them: both are a byte of an address.
const NUMBER_MAX: u8 = 254;
const MACHINES_MAX: usize = 250;
const NAMESPACES: &str = "/run/netns";
/// Ports of a scheduler, for nodes and for gateways: it has its address for itself.
const SCHEDULER_PORTS: [u16; 2] = [7401, 7402];
/// Nobody has this hardware address.
const NOBODY: &str = "02:a5:00:00:00:00";

/// Who has which address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Layout {
    number: u8,
    machines: Vec<Machine>,
}

/// What one role has for a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Machine {
    name: String,
    address: Ipv4Addr,
    hardware: String,
    device: String,
    /// `None`: that of whoever starts the cluster.
    namespace: Option<String>,
}

/// In which direction somebody is cut off from all the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Nothing goes in or out.
    Both,
    /// Nothing goes in: it hears nobody, and is heard.
    Deaf,
    /// Nothing goes out: it hears everybody, and is not heard.
    Mute,
}

/// The networks of a running cluster; dropping it removes them.
#[derive(Debug)]
pub(crate) struct Network {
    layout: Layout,
    state: PathBuf,
    /// Held for as long as the number is in use.
    _lock: File,
}

impl Network {
    /// Makes a network for each of these roles, among them the gateway. Two clusters have different numbers; `None` takes the first
    /// that is free. What a cluster that was killed has left under the number is removed.
    pub(crate) fn create(state: &Path, number: Option<u8>, names: &[String]) -> Result<Network> {
        if names.len() > MACHINES_MAX {
            bail!("--separate has addresses for {MACHINES_MAX} roles: start fewer");
        }
        let (number, lock) = match number {
            Some(number) => (number, lock(number)?.with_context(|| taken(number))?),
            None => first_free()?,
        };
        let network = Network { layout: Layout::new(number, names), state: state.to_owned(), _lock: lock };
        network.layout.remove();
        network.layout.make().context(
            "cannot make networks of their own for the roles: --separate takes Linux, root, and the commands `ip` and `nsenter`",
        )?;
        let text = serde_json::to_string(&network.layout)?;
        fs::write(file(state), text).with_context(|| format!("cannot write {}", file(state).display()))?;
        Ok(network)
    }

    /// The address of a role's machine.
    pub(crate) fn address(&self, name: &str) -> Result<Ipv4Addr> {
        Ok(self.layout.machine(name)?.address)
    }

    /// Where a scheduler listens for nodes and for gateways.
    pub(crate) fn scheduler(&self, name: &str) -> Result<[SocketAddr; 2]> {
        let address = self.address(name)?;
        Ok(SCHEDULER_PORTS.map(|port| (address, port).into()))
    }

    /// The namespace in which a role is to run; `None`: in this one.
    pub(crate) fn namespace(&self, name: &str) -> Option<PathBuf> {
        let machine = self.layout.machine(name).ok()?;
        machine.namespace.as_ref().map(|namespace| Path::new(NAMESPACES).join(namespace))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        forget(&self.state);
        self.layout.remove();
    }
}

fn file(state: &Path) -> PathBuf {
    state.join("network.json")
}

/// A cluster that has no networks of its own says so by having no such file.
pub(crate) fn forget(state: &Path) {
    let _ = fs::remove_file(file(state));
}

/// The networks of the cluster with this state directory, if its roles have any of their own.
pub(crate) fn read(state: &Path) -> Result<Option<Layout>> {
    let path = file(state);
    match fs::read_to_string(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        text => {
            let text = text.with_context(|| format!("cannot read {}", path.display()))?;
            let layout = serde_json::from_str(&text)
                .with_context(|| format!("{} is not what `ashlar up --separate` writes", path.display()))?;
            Ok(Some(layout))
        }
    }
}

fn taken(number: u8) -> String {
    format!("another cluster has --separate={number}: choose another number, or none")
}

/// The number for this process; `None` if it is another's.
fn lock(number: u8) -> Result<Option<File>> {
    let path = format!("/run/ashlar-{number}.lock");
    let file = File::create(&path)
        .with_context(|| format!("cannot write {path}: --separate takes Linux and root"))?;
    Ok(file.try_lock().is_ok().then_some(file))
}

fn first_free() -> Result<(u8, File)> {
    for number in 1..=NUMBER_MAX {
        if let Some(file) = lock(number)? {
            return Ok((number, file));
        }
    }
    bail!("{NUMBER_MAX} clusters have networks of their own on this machine: end one of them")
}

impl Layout {
    /// Addresses are of 198.18.0.0/15, which is set aside for measurements within a laboratory (RFC 2544).
    fn new(number: u8, names: &[String]) -> Layout {
        let machine = |(place, name): (u8, &String)| {
            let outside = name == OUTSIDE;
            Machine {
                name: name.clone(),
                address: Ipv4Addr::new(198, 18, number, place),
                hardware: format!("02:a5:00:00:{number:02x}:{place:02x}"),
                device: if outside { format!("ashlar{number}") } else { "ashlar".into() },
                namespace: (!outside).then(|| format!("ashlar-{number}-{name}")),
            }
        };
        // The outside comes first, so that it has the same address whoever else there is.
        let mut names: Vec<_> = names.iter().collect();
        names.sort_by_key(|name| *name != OUTSIDE);
        Layout { number, machines: (1..=NUMBER_MAX).zip(names).map(machine).collect() }
    }

    fn machine(&self, name: &str) -> Result<&Machine> {
        let found = self.machines.iter().find(|machine| machine.name == name);
        found.with_context(|| format!("{name} has no network of its own"))
    }

    fn hub(&self) -> String {
        format!("ashlar-{}-bridge", self.number)
    }

    fn make(&self) -> Result<()> {
        let hub = self.hub();
        run(None, "netns", &format!("add {hub}"))?;
        let mut ports = vec!["link add bridge type bridge".to_owned(), "link set bridge up".to_owned()];
        for (number, machine) in self.machines.iter().enumerate() {
            let Machine { address, hardware, device, namespace, .. } = machine;
            if let Some(namespace) = namespace {
                run(None, "netns", &format!("add {namespace}"))?;
                batch(Some(namespace), &["link set lo up".to_owned()])?;
            }
            batch(
                namespace.as_deref(),
                &[
                    format!(
                        "link add {device} address {hardware} type veth peer name port{number} netns {hub}"
                    ),
                    format!("addr add {address}/24 dev {device}"),
                    format!("link set {device} up"),
                ],
            )?;
            ports.push(format!("link set port{number} master bridge"));
            ports.push(format!("link set port{number} up"));
        }
        batch(Some(&hub), &ports)?;
        self.heal()
    }

    /// As far as it is there.
    fn remove(&self) {
        let prefix = format!("ashlar-{}-", self.number);
        let entries = fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
        for name in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
            if name.starts_with(&prefix) {
                let _ = run(None, "netns", &format!("delete {name}"));
            }
        }
        // It goes with its other end, but later.
        let _ = run(None, "link", &format!("delete ashlar{}", self.number));
    }

    /// Everybody reaches everybody.
    pub(crate) fn heal(&self) -> Result<()> {
        for machine in &self.machines {
            self.point(machine, |_| true)?;
        }
        Ok(())
    }

    /// Cuts a role's machine off from all the others.
    pub(crate) fn cut(&self, name: &str, cut: Cut) -> Result<()> {
        let one = self.machine(name)?;
        if cut != Cut::Deaf {
            self.point(one, |_| false)?;
        }
        if cut != Cut::Mute {
            for machine in self.machines.iter().filter(|machine| *machine != one) {
                self.point(machine, |other| other != one)?;
            }
        }
        Ok(())
    }

    /// Says whom `from` reaches from now on.
    fn point(&self, from: &Machine, reaches: impl Fn(&Machine) -> bool) -> Result<()> {
        batch(from.namespace.as_deref(), &self.pointers(from, reaches))
    }

    fn pointers(&self, from: &Machine, reaches: impl Fn(&Machine) -> bool) -> Vec<String> {
        let others = self.machines.iter().filter(|machine| *machine != from);
        let pointer = |to: &Machine| {
            let hardware = if reaches(to) { &to.hardware } else { NOBODY };
            format!("neigh replace {} lladdr {hardware} dev {} nud permanent", to.address, from.device)
        };
        others.map(pointer).collect()
    }
}

/// Runs `ip` in a namespace, or in this one.
fn ip(namespace: Option<&str>) -> Command {
    let mut command = Command::new("ip");
    if let Some(namespace) = namespace {
        command.args(["-n", namespace]);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn run(namespace: Option<&str>, object: &str, words: &str) -> Result<()> {
    let output =
        ip(namespace).arg(object).args(words.split(' ')).output().context("cannot run the command `ip`")?;
    check(&output, &format!("ip {object} {words}"))
}

/// Several commands, at one start of `ip`.
fn batch(namespace: Option<&str>, commands: &[String]) -> Result<()> {
    let mut child = ip(namespace).args(["-batch", "-"]).spawn().context("cannot run the command `ip`")?;
    if let Some(mut stdin) = child.stdin.take() {
        // If it has gone, it says why.
        let _ = stdin.write_all((commands.join("\n") + "\n").as_bytes());
    }
    check(&child.wait_with_output()?, &commands.join("; "))
}

fn check(output: &std::process::Output, what: &str) -> Result<()> {
    if !output.status.success() {
        bail!("`{what}`: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn layout() -> Layout {
        Layout::new(7, &["scheduler".to_owned(), "node-0".to_owned(), "gateway".to_owned()])
    }

    #[test]
    fn the_gateway_has_the_first_address_and_stays_outside() {
        let layout = layout();
        let gateway = layout.machine("gateway").unwrap();
        assert_eq!((gateway.address, &gateway.namespace), (Ipv4Addr::new(198, 18, 7, 1), &None));
        let node = layout.machine("node-0").unwrap();
        assert_eq!(node.namespace.as_deref(), Some("ashlar-7-node-0"));
        assert!(layout.machine("node-9").unwrap_err().to_string().contains("node-9"));
        // A device's name has at most 15 bytes.
        assert!(Layout::new(NUMBER_MAX, &["gateway".to_owned()]).machines[0].device.len() <= 15);
        let text = serde_json::to_string(&layout).unwrap();
        assert_eq!(serde_json::from_str::<Layout>(&text).unwrap(), layout);
    }

    #[test]
    fn whoever_is_not_to_be_reached_has_an_address_that_nobody_has() {
        let layout = layout();
        let (gateway, node) = (layout.machine("gateway").unwrap(), layout.machine("node-0").unwrap());
        let pointers = layout.pointers(gateway, |other| other != node);
        assert_eq!(
            pointers,
            [
                "neigh replace 198.18.7.2 lladdr 02:a5:00:00:07:02 dev ashlar7 nud permanent",
                "neigh replace 198.18.7.3 lladdr 02:a5:00:00:00:00 dev ashlar7 nud permanent",
            ]
        );
    }
}
