//! What of the model's transitions may be seen from outside, in the simulation's words.

use super::Action;
use super::state::{FromRank, State, ToRank};
use ashlar_simulation::Observed;

/// What is seen when `action` leads from one state to another.
pub fn observe(action: Action, from: &State, to: &State) -> Vec<Observed> {
    let said = |rank: usize| to.ranks[rank].outbox.iter().skip(from.ranks[rank].outbox.len());
    match action {
        Action::Obey(node, ToRank::Assign(term, holder, revision)) => {
            let assigned = Observed::Assigned { node, term, holder: holder.name().to_owned(), revision };
            let refused = said(node).filter_map(|message| match message {
                FromRank::Refused(term) => Some(Observed::Refused { node, term: *term }),
                _ => None,
            });
            [assigned].into_iter().chain(refused).collect()
        }
        Action::Obey(node, ToRank::Release) => vec![Observed::Left { node }],
        Action::Obey(node, ToRank::Step(term, revision, step)) => {
            let answered = said(node).filter_map(|message| match message {
                FromRank::Result(term, revision, step, _) => {
                    Some(Observed::Answered { node, term: Some(*term), revision: *revision, step: *step })
                }
                _ => None,
            });
            [Observed::Told { node, term, revision, step }].into_iter().chain(answered).collect()
        }
        Action::CrashRank(node) => vec![Observed::NodeDied { node }],
        Action::GatewayJoins(scheduler) => {
            let leader = from.schedulers[scheduler].leads.as_ref();
            let refused = (to.gateway.scheduler.is_none()).then(|| to.gateway.terms.highest());
            leader
                .map(|leader| Observed::Heard { gateway: 0, term: leader.term, refused })
                .into_iter()
                .collect()
        }
        Action::CrashGateway => vec![Observed::GatewayDied { gateway: 0 }],
        _ => Vec::new(),
    }
}
