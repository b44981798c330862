//! Who or what makes a session slow: a node that computes far longer than the others, or links that take longer than computing.

use crate::cluster::NodeConnection;
use ashlar_protocol::training::TrainingTiming;
use ashlar_vocabulary::NodeId;
use std::collections::BTreeMap;

/// A node is slow that computes for so many times as long as the next one, …
const SLOW_NODE_FACTOR: u64 = 3;
/// Links are slow if a step takes so many times as long as all its computing, one after the other, would, …
const SLOW_LINKS_FACTOR: u64 = 2;
/// … and by so much: small steps have pauses of their own, …
const NOTABLE_US: u64 = 200_000;
/// … in so many steps in a row.
const STEPS: u32 = 3;

/// What a session's ranks have spent, as far as it matters for that.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Stragglers {
    nodes: BTreeMap<NodeConnection, NodeId>,
    /// Of the present step.
    step: BTreeMap<NodeConnection, TrainingTiming>,
    /// What the last steps in a row showed, and how many they were.
    seen: Option<(Cause, u32)>,
    /// Said once per session and cause.
    said: Vec<Cause>,
}

#[derive(Debug, Clone, PartialEq)]
enum Cause {
    Node(NodeConnection),
    Links,
}

impl Stragglers {
    pub(super) fn new(nodes: BTreeMap<NodeConnection, NodeId>) -> Stragglers {
        Stragglers { nodes, ..Stragglers::default() }
    }

    /// Takes a rank's time for the present step.
    pub(super) fn take(&mut self, rank: NodeConnection, timing: TrainingTiming) {
        self.step.insert(rank, timing);
    }

    /// The present step is complete; what is to be said of it.
    pub(super) fn step_is_done(&mut self) -> Option<String> {
        let times = std::mem::take(&mut self.step);
        let cause = cause(&times);
        self.seen = cause.map(|cause| {
            let before = self.seen.take().filter(|(seen, _)| *seen == cause).map_or(0, |(_, steps)| steps);
            (cause, before + 1)
        });
        let (cause, _) = self.seen.clone().filter(|(_, steps)| *steps >= STEPS)?;
        if self.said.contains(&cause) {
            return None;
        }
        self.said.push(cause.clone());
        Some(self.describe(&cause, &times))
    }

    fn describe(&self, cause: &Cause, times: &BTreeMap<NodeConnection, TrainingTiming>) -> String {
        let seconds = |us: u64| us as f64 / 1e6;
        match cause {
            Cause::Node(rank) => {
                let own = times.get(rank).map_or(0, |timing| timing.compute_us);
                let others = times.iter().filter(|(other, _)| *other != rank);
                let next = others.map(|(_, timing)| timing.compute_us).max().unwrap_or_default();
                let name = self.nodes.get(rank).map(ToString::to_string).unwrap_or_default();
                format!(
                    "node {name} computes {:.1} s of each step, the others {:.1} s at most: they wait for it",
                    seconds(own),
                    seconds(next)
                )
            }
            Cause::Links => {
                let computing = times.values().map(|timing| timing.compute_us).sum();
                let longest = times.values().map(length_us).max().unwrap_or_default();
                format!(
                    "a step takes {:.1} s of which all nodes together compute {:.1} s: a link between them is slow",
                    seconds(longest),
                    seconds(computing)
                )
            }
        }
    }
}

fn length_us(timing: &TrainingTiming) -> u64 {
    timing.compute_us + timing.wait_us + timing.exchange_us
}

fn cause(times: &BTreeMap<NodeConnection, TrainingTiming>) -> Option<Cause> {
    let mut computing: Vec<(u64, NodeConnection)> =
        times.iter().map(|(rank, timing)| (timing.compute_us, *rank)).collect();
    computing.sort_unstable();
    if let [.., (next, _), (slowest, rank)] = computing[..]
        && slowest > SLOW_NODE_FACTOR * next + NOTABLE_US
    {
        return Some(Cause::Node(rank));
    }
    let all: u64 = computing.iter().map(|(us, _)| us).sum();
    let longest = times.values().map(length_us).max()?;
    (longest > SLOW_LINKS_FACTOR * all + NOTABLE_US).then_some(Cause::Links)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stragglers() -> Stragglers {
        let nodes = [(1, "a"), (2, "b")].map(|(rank, name)| (NodeConnection(rank), NodeId(name.to_owned())));
        Stragglers::new(nodes.into_iter().collect())
    }

    /// What is said after each of `steps` steps of two ranks that compute and wait for so many milliseconds.
    fn said(stragglers: &mut Stragglers, steps: usize, times: [(u64, u64); 2]) -> Vec<Option<String>> {
        let step = |_| {
            for (rank, (compute, wait)) in (1..).zip(times) {
                let timing = TrainingTiming {
                    compute_us: compute * 1000,
                    wait_us: wait * 1000,
                    ..TrainingTiming::default()
                };
                stragglers.take(NodeConnection(rank), timing);
            }
            stragglers.step_is_done()
        };
        (0..steps).map(step).collect()
    }

    #[test]
    fn a_node_that_computes_far_longer_is_named_once() {
        let mut stragglers = stragglers();
        let said = said(&mut stragglers, 6, [(1_000, 8_000), (8_000, 1_000)]);
        let told: Vec<usize> = (0..6).filter(|step| said[*step].is_some()).collect();
        assert_eq!(told, [2]);
        let text = said[2].as_deref().unwrap_or_default();
        assert!(text.contains("node b computes 8.0 s") && text.contains("1.0 s at most"), "{text}");
    }

    #[test]
    fn links_that_take_longer_than_all_computing_are_told() {
        let said = said(&mut stragglers(), 4, [(1_000, 9_000), (1_000, 8_500)]);
        let text = said[2].as_deref().unwrap_or_default();
        assert!(text.contains("takes 10.0 s") && text.contains("compute 2.0 s"), "{text}");
        assert_eq!(said.iter().flatten().count(), 1);
    }

    #[test]
    fn stages_that_wait_for_one_another_in_turn_and_short_steps_are_as_they_should_be() {
        assert!(said(&mut stragglers(), 9, [(1_000, 2_500), (2_500, 1_000)]).iter().all(Option::is_none));
        assert!(said(&mut stragglers(), 9, [(5, 60), (60, 5)]).iter().all(Option::is_none));
        // Now and then is not always.
        let mut one = stragglers();
        for _ in 0..5 {
            assert_eq!(said(&mut one, 2, [(1_000, 9_000), (1_000, 8_500)]), [None, None]);
            assert_eq!(said(&mut one, 1, [(1_000, 1_000), (1_000, 1_000)]), [None]);
        }
    }
}
