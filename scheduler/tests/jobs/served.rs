//! What is served under a name, as the adapters' core and gateways would have it: it outlives schedulers.

use crate::world::World;
use ashlar_protocol::admin::{AdminFailure, AdminFailureKind, Comparison};
use ashlar_protocol::serving::CompareAdapters;
use ashlar_scheduler::engine::GatewayId;
use ashlar_scheduler::jobs::{Effect, Event};
use ashlar_vocabulary::{AdapterId, JobId};
use std::collections::VecDeque;

/// One name.
pub(crate) struct Served {
    /// What is stored under it; the first is generation 1.
    pub(crate) generations: Vec<AdapterId>,
    /// Which generation is served; 0 is none.
    pub(crate) generation: u64,
    /// What was asked for and is not answered.
    asked: VecDeque<Effect>,
    comparing: VecDeque<(GatewayId, CompareAdapters)>,
    /// What candidates and what is served come to, or why they are not compared.
    pub(crate) figures: Result<(f64, f64), String>,
    /// How often something was compared.
    pub(crate) compared: u32,
}

impl Default for Served {
    fn default() -> Served {
        Served {
            generations: Vec::new(),
            generation: 0,
            asked: VecDeque::new(),
            comparing: VecDeque::new(),
            figures: Ok((0.75, 0.5)),
            compared: 0,
        }
    }
}

impl Served {
    pub(crate) fn ask(&mut self, effect: Effect) {
        match effect {
            Effect::Compare { gateway, name, compare } => {
                assert_eq!(name, NAME);
                self.comparing.push_back((gateway, *compare));
            }
            effect => self.asked.push_back(effect),
        }
    }

    pub(crate) fn gateway_dies(&mut self, gateway: GatewayId) {
        self.comparing.retain(|(with, _)| *with != gateway);
    }

    /// What it has done stays, what it was asked for is forgotten, or was done and nobody heard of it.
    pub(crate) fn scheduler_dies(&mut self) {
        while self.answer().is_some() {}
        self.comparing.clear();
    }

    /// Does the next thing that was asked for.
    fn answer(&mut self) -> Option<Event> {
        let refused =
            |message: &str| AdminFailure { kind: AdminFailureKind::Conflict, message: message.to_owned() };
        let event = match self.asked.pop_front()? {
            Effect::StoreCandidate { job, load } => {
                assert!(load.hold_back && load.name == NAME);
                let known = self.generations.iter().position(|adapter| *adapter == load.adapter);
                let place = known.unwrap_or(self.generations.len());
                if known.is_none() {
                    self.generations.push(load.adapter);
                }
                Event::CandidateStored { job, outcome: Ok(place as u64 + 1) }
            }
            Effect::Promote { job, name, generation, expected_generation } => {
                assert_eq!(name, NAME);
                let outcome = match self.generation {
                    served if served == generation => Ok(()),
                    served if served == expected_generation => {
                        self.generation = generation;
                        Ok(())
                    }
                    _ => Err(refused("another one is served")),
                };
                Event::Promoted { job, outcome }
            }
            other => panic!("{other:?}"),
        };
        Some(event)
    }
}

/// What jobs of the world's suffix are served as.
pub(crate) const NAME: &str = "ft:demo:ashlar:mine";

impl World {
    /// Does one thing that a candidate waits for; whether there was one.
    pub(crate) fn promote_one(&mut self) -> bool {
        if let Some(event) = self.served.answer() {
            self.event(event);
            return true;
        }
        let Some((gateway, compare)) = self.served.comparing.pop_front() else { return false };
        self.served.compared += 1;
        assert_eq!(compare.served, None, "the director knows what is served");
        let generation = self.served.generation;
        let outcome = self.served.figures.clone().map(|(candidate, served)| Comparison {
            candidate,
            served,
            against: (generation > 0).then_some(generation),
            count: 10,
        });
        self.event(Event::Compared { gateway, job: compare.job, outcome: Box::new(outcome) });
        true
    }

    /// Who compares something, and for which jobs.
    pub(crate) fn comparing(&self) -> Vec<(GatewayId, JobId)> {
        self.served.comparing.iter().map(|(gateway, compare)| (*gateway, compare.job)).collect()
    }
}
