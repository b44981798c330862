//! Explicit-state checking: every state that a model can reach, breadth first, so that the way to a violation is a shortest one.
//!
//! Two kinds of properties: what holds in every state ([`Model::check`]), and that every state can be left for a good one without
//! any further fault ([`Model::is_settled`]), which is what "it recovers" means for a system whose faults end.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Something that can happen, and where it leads.
#[derive(Debug, Clone)]
pub struct Step<Action, State> {
    /// What.
    pub action: Action,
    /// The state after it.
    pub to: State,
    /// Whether it is a fault. Recovery must not depend on one.
    pub fault: bool,
}

/// A system of finitely many states.
pub trait Model {
    /// Equal states have equal hashes, and others may not: a state is known by 128 bits of its hash.
    type State: Clone + Hash;
    /// Names what happens, for traces.
    type Action: fmt::Debug;

    /// Where it begins.
    fn start(&self) -> Self::State;

    /// Appends everything that can happen in `state`, always in the same order.
    fn steps(&self, state: &Self::State, steps: &mut Vec<Step<Self::Action, Self::State>>);

    /// What must hold in every state.
    ///
    /// # Errors
    /// What does not hold.
    fn check(&self, state: &Self::State) -> Result<(), String>;

    /// Whether the system does what it is for. From every state such a one must be reachable without a fault.
    fn is_settled(&self, state: &Self::State) -> bool;
}

/// What was explored without finding a violation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Explored {
    /// Different states.
    pub states: usize,
    /// Transitions between them.
    pub transitions: usize,
    /// The longest of all shortest ways from the start.
    pub depth: usize,
    /// States that are settled.
    pub settled: usize,
}

impl fmt::Display for Explored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Explored { states, transitions, depth, settled } = self;
        write!(f, "{states} states, {transitions} transitions, depth {depth}, {settled} states settled")
    }
}

/// How to get to a state that must not be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counterexample {
    /// What does not hold there.
    pub what: String,
    /// A shortest way there from the start.
    pub trace: Vec<String>,
}

impl std::error::Error for Counterexample {}

impl fmt::Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, action) in self.trace.iter().enumerate() {
            writeln!(f, "{:3}. {action}", number + 1)?;
        }
        write!(f, "{} (after {} steps)", self.what, self.trace.len())
    }
}

/// What is kept of a state: how it was first reached.
struct Reached {
    from: u32,
    /// Which of the steps there.
    step: u32,
    depth: u32,
}

/// Explores every state of a model.
///
/// # Errors
/// A shortest [`Counterexample`]; also where there are more than `states_max` states, as then nothing has been shown.
pub fn explore<M: Model>(model: &M, states_max: usize) -> Result<Explored, Counterexample> {
    let mut known: HashMap<u128, u32> = HashMap::new();
    let mut reached: Vec<Reached> = Vec::new();
    let mut settled: Vec<u32> = Vec::new();
    // Transitions that are no faults, as (to, from).
    let mut healing: Vec<(u32, u32)> = Vec::new();
    let mut transitions = 0;
    let mut frontier: VecDeque<(u32, M::State)> = VecDeque::new();

    let start = model.start();
    known.insert(fingerprint(&start), 0);
    reached.push(Reached { from: 0, step: 0, depth: 0 });
    frontier.push_back((0, start));
    let mut steps = Vec::new();
    while let Some((from, state)) = frontier.pop_front() {
        if let Err(what) = model.check(&state) {
            return Err(Counterexample { what, trace: trace(model, &reached, from) });
        }
        if model.is_settled(&state) {
            settled.push(from);
        }
        model.steps(&state, &mut steps);
        transitions += steps.len();
        for (number, step) in steps.drain(..).enumerate() {
            let next = reached.len() as u32;
            let to = *known.entry(fingerprint(&step.to)).or_insert(next);
            if to == next {
                let depth = reached[from as usize].depth + 1;
                reached.push(Reached { from, step: number as u32, depth });
                frontier.push_back((to, step.to));
            }
            if !step.fault && to != from {
                healing.push((to, from));
            }
        }
        if reached.len() > states_max {
            let what = format!("more than {states_max} states: the bounds are too wide");
            return Err(Counterexample { what, trace: trace(model, &reached, from) });
        }
    }
    if let Some(stuck) = first_without_a_way(reached.len(), &settled, healing) {
        let what = "from here on it never recovers, though nothing more goes wrong".to_owned();
        return Err(Counterexample { what, trace: trace(model, &reached, stuck) });
    }
    let depth = reached.last().map_or(0, |last| last.depth as usize);
    Ok(Explored { states: reached.len(), transitions, depth, settled: settled.len() })
}

/// The first state from which no transitions lead to one of `good`.
fn first_without_a_way(states: usize, good: &[u32], mut edges: Vec<(u32, u32)>) -> Option<u32> {
    edges.sort_unstable();
    let mut recovers = vec![false; states];
    let mut todo = good.to_vec();
    good.iter().for_each(|state| recovers[*state as usize] = true);
    while let Some(state) = todo.pop() {
        let first = edges.partition_point(|(to, _)| *to < state);
        for (_, from) in edges[first..].iter().take_while(|(to, _)| *to == state) {
            if !std::mem::replace(&mut recovers[*from as usize], true) {
                todo.push(*from);
            }
        }
    }
    recovers.iter().position(|recovers| !recovers).map(|state| state as u32)
}

/// The way to a state, found anew from the start: only how each state was reached is kept, not the states.
fn trace<M: Model>(model: &M, reached: &[Reached], mut state: u32) -> Vec<String> {
    let mut numbers = Vec::new();
    while state != 0 {
        let Reached { from, step, .. } = reached[state as usize];
        numbers.push(step as usize);
        state = from;
    }
    let (mut at, mut steps, mut actions) = (model.start(), Vec::new(), Vec::new());
    for number in numbers.into_iter().rev() {
        model.steps(&at, &mut steps);
        let step = steps.swap_remove(number);
        actions.push(format!("{:?}", step.action));
        at = step.to;
        steps.clear();
    }
    actions
}

fn fingerprint(state: &impl Hash) -> u128 {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        salt.hash(&mut hasher);
        state.hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(0) << 64 | half(1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A counter that adds two or three and can fall into a hole.
    struct Counter {
        forbidden: u8,
        hole: bool,
    }

    impl Model for Counter {
        type State = u8;
        type Action = &'static str;

        fn start(&self) -> u8 {
            0
        }

        fn steps(&self, state: &u8, steps: &mut Vec<Step<&'static str, u8>>) {
            if *state < 20 {
                steps.push(Step { action: "two", to: state + 2, fault: false });
                steps.push(Step { action: "three", to: state + 3, fault: false });
                if self.hole {
                    steps.push(Step { action: "fall", to: 100, fault: true });
                }
            } else if *state == 100 {
                steps.push(Step { action: "luck", to: 20, fault: true });
            }
        }

        fn check(&self, state: &u8) -> Result<(), String> {
            if *state == self.forbidden { Err("forbidden".into()) } else { Ok(()) }
        }

        fn is_settled(&self, state: &u8) -> bool {
            (20..100).contains(state)
        }
    }

    #[test]
    fn every_state_is_explored_once() {
        let explored = explore(&Counter { forbidden: 99, hole: false }, 100);
        // 0, and 2 to 22.
        assert_eq!(explored, Ok(Explored { states: 22, transitions: 38, depth: 8, settled: 3 }));
    }

    #[test]
    fn a_violation_comes_with_a_shortest_trace() {
        let found = explore(&Counter { forbidden: 7, hole: false }, 100).unwrap_err();
        assert_eq!((found.what.as_str(), found.trace.len()), ("forbidden", 3));
    }

    #[test]
    fn a_state_that_only_luck_leads_out_of_is_found() {
        let found = explore(&Counter { forbidden: 99, hole: true }, 100).unwrap_err();
        assert_eq!(found.trace, ["\"fall\""]);
    }

    #[test]
    fn too_many_states_show_nothing() {
        assert!(explore(&Counter { forbidden: 99, hole: false }, 10).is_err());
    }
}
