//! What a drill does to a process.

use super::target::Target;
use crate::bench::random::Random;
use crate::network::Cut;
use crate::processes::{self, Processes, Signal};
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Longest wait for a killed process to be started again.
const RESTART_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// A kind of process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    /// Shard nodes.
    Node,
    /// The scheduler.
    Scheduler,
    /// The gateway.
    Gateway,
}

/// What happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, and SIGCONT later.
    Freeze,
    /// It neither hears the others nor is heard. Takes `ashlar up --separate`, as the next two do.
    Partition,
    /// It hears none of the others, and is heard.
    Deaf,
    /// It hears the others, and none of them hears it.
    Mute,
}

impl Role {
    /// All of them, as they are listed.
    pub(super) const ALL: [Role; 3] = [Role::Node, Role::Scheduler, Role::Gateway];

    pub(super) fn of(name: &str) -> Role {
        match name {
            name if name.starts_with("gateway") => Role::Gateway,
            name if name.starts_with("scheduler") => Role::Scheduler,
            _ => Role::Node,
        }
    }
}

impl Kind {
    /// All of them, as they are listed.
    pub(super) const ALL: [Kind; 5] = [Kind::Kill, Kind::Freeze, Kind::Partition, Kind::Deaf, Kind::Mute];

    /// As options and reports have it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Kind::Kill => "kill",
            Kind::Freeze => "freeze",
            Kind::Partition => "partition",
            Kind::Deaf => "deaf",
            Kind::Mute => "mute",
        }
    }

    /// For people who watch.
    pub(super) fn describe(self) -> &'static str {
        match self {
            Kind::Kill => "killing",
            Kind::Freeze => "freezing",
            Kind::Partition => "cutting off",
            Kind::Deaf => "making deaf",
            Kind::Mute => "making mute",
        }
    }

    /// How it cuts a process off from the others; `None` if it does something else.
    pub(super) fn cut(self) -> Option<Cut> {
        match self {
            Kind::Kill | Kind::Freeze => None,
            Kind::Partition => Some(Cut::Both),
            Kind::Deaf => Some(Cut::Deaf),
            Kind::Mute => Some(Cut::Mute),
        }
    }
}

/// Nothing that serves needs the enrolment endpoint.
pub(super) fn is_drilled(name: &str) -> bool {
    name != "enrolment"
}

/// For how long faults last that end by themselves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lengths {
    pub(super) freeze: Duration,
    pub(super) cut: Duration,
}

/// What will happen.
pub(super) struct Fault {
    /// To which process.
    pub(super) name: String,
    pid: u32,
    pub(super) kind: Kind,
    /// After how long.
    pub(super) after: Duration,
}

impl Fault {
    /// The next one. As many random numbers are taken whoever runs.
    pub(super) fn choose(
        roles: &[Role],
        kinds: &[Kind],
        processes: &Processes,
        random: &mut Random,
    ) -> Option<Fault> {
        let (role, process, kind) = (random.next(), random.next(), random.next());
        let after = Duration::from_millis(random.between(50, 1_000));
        let pick = |number: u64, count: usize| usize::try_from(number % count.max(1) as u64).unwrap_or(0);
        let role = roles.get(pick(role, roles.len()))?;
        let candidates: Vec<_> =
            processes.iter().filter(|(name, _)| is_drilled(name) && Role::of(name) == *role).collect();
        let (name, pid) = candidates.get(pick(process, candidates.len()))?;
        let kind = *kinds.get(pick(kind, kinds.len()))?;
        Some(Fault { name: (*name).clone(), pid: **pid, kind, after })
    }

    /// Whether clients of a gateway lose their connections by it. Who is cut off from the cluster is not so from its clients.
    pub(super) fn cuts_clients(&self) -> bool {
        Role::of(&self.name) == Role::Gateway && self.kind.cut().is_none()
    }

    /// Lets it happen, and end.
    pub(super) async fn inflict(&self, target: &Target, lengths: Lengths) -> Result<()> {
        match self.kind.cut() {
            Some(cut) => self.cut_off(target, cut, lengths.cut).await,
            None if self.kind == Kind::Kill => self.kill(target).await,
            None => self.freeze(target, lengths.freeze).await,
        }
    }

    async fn kill(&self, target: &Target) -> Result<()> {
        processes::signal(&target.state, &self.name, self.pid, Signal::Kill)?;
        let began = Instant::now();
        // Its supervisor has seen it and started another one.
        while processes::read(&target.state)?.get(&self.name).is_none_or(|pid| *pid == self.pid) {
            if began.elapsed() > RESTART_MAX {
                bail!("{} was not started again within {} s", self.name, RESTART_MAX.as_secs());
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    async fn freeze(&self, target: &Target, length: Duration) -> Result<()> {
        processes::signal(&target.state, &self.name, self.pid, Signal::Stop)?;
        tokio::time::sleep(length).await;
        // A supervisor may have killed it meanwhile.
        let _ = processes::signal(&target.state, &self.name, self.pid, Signal::Continue);
        Ok(())
    }

    async fn cut_off(&self, target: &Target, cut: Cut, length: Duration) -> Result<()> {
        let network = target.network()?;
        let (layout, name) = (network.clone(), self.name.clone());
        let done = tokio::task::spawn_blocking(move || layout.cut(&name, cut)).await.context("a task");
        if matches!(done, Ok(Ok(()))) {
            tokio::time::sleep(length).await;
        }
        // Even if only half of it was done.
        let layout = network.clone();
        let healed = tokio::task::spawn_blocking(move || layout.heal()).await.context("a task")?;
        done?.and(healed)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_same_faults_follow_from_a_seed_whoever_runs() {
        let processes: Processes =
            ["gateway", "scheduler", "node-0", "enrolment"].map(|name| (name.to_owned(), 7)).into();
        let (mut random, mut other) = (Random::new(1, 0), Random::new(1, 0));
        for _ in 0..50 {
            // Those that a log has are taken as if nobody ran.
            assert!(Fault::choose(&Role::ALL, &Kind::ALL, &Processes::new(), &mut other).is_none());
            let fault = Fault::choose(&Role::ALL, &Kind::ALL, &processes, &mut random).unwrap();
            assert_ne!(fault.name, "enrolment");
            let clients_notice = fault.name == "gateway" && [Kind::Kill, Kind::Freeze].contains(&fault.kind);
            assert_eq!(fault.cuts_clients(), clients_notice);
        }
        assert_eq!(random.next(), other.next());
    }
}
