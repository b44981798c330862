//! A rank's steps of serving: computed with a KV cache that remembers what was written where, and the slices of the head.

use super::{Current, Node, Order, Trouble};
use crate::durable::Wish;
use crate::oracle;
use crate::process::{Action, Activations, Connection, Errand, Logits, Message, Timer};
use ashlar_protocol::membership::FromNode;
use ashlar_protocol::step::{Boundary, RowDigests, SampledToken, StepResult, StepTiming};
use ashlar_shard_node::sequencer::{BLOCK_TOKENS, Effect, Event, StepWork};
use ashlar_vocabulary::{SequenceId, StageIndex};
use std::collections::BTreeMap;

impl Node {
    /// Computes this rank's slice of the head: between whatever else it does, from the rows alone.
    pub(super) fn answer(&mut self, connection: Connection, asked: Activations, actions: &mut Vec<Action>) {
        let Some(place) = self.place.as_ref().filter(|place| place.sampler == Some(connection)) else {
            return;
        };
        let Some(head) = place.assignment.head.filter(|_| asked.revision == place.assignment.revision) else {
            return self.fail("rows of another layout".to_owned(), actions);
        };
        let slice = asked.rows.iter().map(|row| oracle::slice(*row, head.index as u64)).collect();
        let logits = Logits { revision: asked.revision, step: asked.step, slice, of: head.of };
        self.head_slices += 1;
        actions.push(Action::Send(connection, Message::Logits(logits)));
    }

    /// Takes a slice of the logits that this rank, which samples, waits for; with the last one the step is complete.
    pub(super) fn take_slice(
        &mut self,
        connection: Connection,
        logits: Logits,
        actions: &mut Vec<Action>,
    ) -> Result<(), Trouble> {
        let Some(place) = &mut self.place else { return Ok(()) };
        let index = place.head_ranks.iter().find(|(_, link)| **link == connection).map(|(index, _)| *index);
        let (Some(index), revision) = (index, place.assignment.revision) else { return Ok(()) };
        let wanted = place.head_ranks_wanted();
        let unasked = || Trouble::Layout(format!("logits of step {} that nobody waits for", logits.step));
        let current = place.current.as_mut().filter(|current| current.work.step == logits.step);
        let Some(Current { work, rows: Some(rows), logits: Some(slices), .. }) = current else {
            return Err(unasked());
        };
        if logits.revision != revision || slices.contains_key(&index) {
            return Err(unasked());
        }
        let expected = sampled_rows(work, rows).map(|row| oracle::slice(row, u64::from(index)));
        if !expected.eq(logits.slice.iter().copied()) {
            let step = logits.step;
            return Err(Trouble::Violation(format!(
                "step {step}: slice {index} of the logits is of other rows"
            )));
        }
        slices.insert(index, logits.slice);
        if slices.len() == wanted {
            self.complete(actions);
        }
        Ok(())
    }

    /// Does what is wanted next: begins a step, and computes it once its activations are there.
    pub(super) fn work(&mut self, actions: &mut Vec<Action>) -> Result<(), Trouble> {
        loop {
            let Some(place) = &mut self.place else { return Ok(()) };
            if place.current.is_some() {
                return self.compute(actions);
            }
            let plan = match place.orders.pop_front() {
                None => return Ok(()),
                Some(Order::Step(plan)) => *plan,
                Some(Order::Load(adapter, load)) => {
                    place.adapters.begin(adapter, load);
                    let errand = Errand::Adapter(place.assignment.revision, adapter, load);
                    actions.push(Action::Call(errand, Wish::Get(adapter.0)));
                    continue;
                }
                Some(Order::Unload(adapter)) => {
                    place.adapters.unload(adapter);
                    continue;
                }
            };
            let mut effects = Vec::new();
            self.sequencer.handle(Event::Plan(plan), &mut effects);
            for effect in effects {
                match effect {
                    Effect::Begin(new) => {
                        place.seeds.insert(new.id, new.sampling.seed);
                        if new.audit_logits_from.is_some() {
                            place.audited.insert(new.id);
                        }
                        if new.adapter.is_some_and(|adapter| !place.adapters.bind(new.id, adapter)) {
                            let what = format!("sequence {} begins with an adapter that is not here", new.id);
                            return Err(Trouble::Violation(what));
                        }
                    }
                    Effect::End(id) => {
                        place.seeds.remove(&id);
                        place.audited.remove(&id);
                        place.adapters.unbind(id);
                    }
                    Effect::Observe(..) => {}
                    Effect::Compute(work) => {
                        place.current = Some(Current { work, rows: None, logits: None, compute_us: 0 });
                    }
                    Effect::Diverged(reason) => return Err(Trouble::Layout(reason)),
                }
            }
        }
    }

    fn compute(&mut self, actions: &mut Vec<Action>) -> Result<(), Trouble> {
        let Some(place) = &mut self.place else { return Ok(()) };
        let Some(current) = &mut place.current else { return Ok(()) };
        if current.rows.is_some() {
            return Ok(());
        }
        let (revision, step) = (place.assignment.revision, current.work.step);
        let stage = place.assignment.stage;
        let own = current.work.rows_of(stage);
        let wanted_next = current.work.rows_of(StageIndex(stage.0 + 1)).len();
        let expects = stage.0 > 0 && !own.is_empty();
        let mut input = None;
        if expects {
            let Some(arrived) = place.arrived.pop_front() else { return Ok(()) };
            if arrived.revision != revision || arrived.step != step {
                return Err(Trouble::Layout(format!("activations of step {} in step {step}", arrived.step)));
            }
            input = Some(arrived.rows);
        }
        let mut rows = Vec::with_capacity(current.work.rows.len());
        // Everything before a row is looked at, or only what is right before it: what stands there rests on all the rest.
        let thorough = self.plan.as_ref().is_none_or(|plan| step.0.is_multiple_of(plan.check_every));
        let mut known: Option<(SequenceId, Vec<u64>)> = None;
        let mut last: Option<(SequenceId, u64)> = None;
        for row in &current.work.rows {
            let sequence = self.sequencer.sequence(row.sequence);
            let sequence =
                sequence.ok_or_else(|| Trouble::Violation("computes an unknown sequence".into()))?;
            let position = row.position as usize;
            let place_of = |position: usize| {
                let block = sequence.block_table.get(position / BLOCK_TOKENS);
                block.map(|block| (block.0, position % BLOCK_TOKENS))
            };
            let fresh = known.as_ref().is_none_or(|(id, _)| *id != row.sequence);
            if fresh && thorough {
                let states = oracle::states(&sequence.tokens, place.adapters.of(row.sequence));
                for (before, state) in states.iter().enumerate().take(position) {
                    let found = place_of(before).and_then(|place_of| place.kv.get(place_of));
                    if found != Some(*state) {
                        let id = row.sequence;
                        return Err(Trouble::Violation(format!(
                            "step {step}: sequence {id} reads KV of position {before} that is not its own"
                        )));
                    }
                }
                known = Some((row.sequence, states));
            }
            if rows.len() >= own.len() {
                // Others fill again what this stage has kept.
                let expected = known.as_ref().and_then(|(_, states)| states.get(position)).copied();
                let kept = place_of(position).and_then(|at| place.kv.get(at));
                if thorough && kept != expected {
                    return Err(Trouble::Violation(format!(
                        "step {step}: a stage is thought to have position {position} and has not"
                    )));
                }
                if rows.len() < wanted_next && place.next.is_some() {
                    let log = place.log.as_ref().map(|(log, _)| log);
                    let handed_on = place_of(position).and_then(|at| log?.get(at));
                    rows.push(handed_on.ok_or_else(|| {
                        Trouble::Violation(format!("step {step}: position {position} is not in the log"))
                    })?);
                }
                continue;
            }
            let state = match thorough {
                true => known.as_ref().and_then(|(_, states)| states.get(position)).copied(),
                false => {
                    let before = match (last, position.checked_sub(1)) {
                        (Some((id, state)), _) if id == row.sequence => Some(state),
                        (_, Some(before)) => place_of(before).and_then(|place_of| place.kv.get(place_of)),
                        (_, None) => Some(oracle::beginning(place.adapters.of(row.sequence))),
                    };
                    before.map(|before| oracle::after(before, row.token))
                }
            };
            last = state.map(|state| (row.sequence, state));
            let (Some(state), Some(at)) = (state, place_of(position)) else {
                return Err(Trouble::Violation(format!("step {step}: position {position} has no place")));
            };
            place.kv.insert(at, state);
            if let Some((log, _)) = &mut place.log {
                log.insert(at, state);
            }
            rows.push(state);
        }
        if input.is_some_and(|input| Some(&input[..]) != rows.get(..own.len())) {
            return Err(Trouble::Violation(format!("step {step}: the stages disagree about its rows")));
        }
        let after_us = match &place.pace {
            Some(pace) => pace.step_us(own),
            None if own.is_empty() => 10,
            None => self.step_us + 20 * own.len() as u64,
        };
        current.compute_us = if place.pace.is_some() { after_us } else { self.step_us };
        current.rows = Some(rows);
        actions.push(Action::Wake { after_us, timer: Timer::Computed(revision, step) });
        Ok(())
    }

    /// A step's layers have been computed: the rank that samples asks for the slices of the logits that others hold.
    pub(super) fn hand_out(&mut self, actions: &mut Vec<Action>) {
        let Some(place) = &mut self.place else { return };
        let revision = place.assignment.revision;
        let wanted = place.head_ranks_wanted();
        if let Some(Current { work, rows: Some(rows), logits: logits @ None, .. }) = &mut place.current {
            let asked: Vec<u64> = sampled_rows(work, rows).collect();
            if wanted > 0 && !asked.is_empty() {
                *logits = Some(BTreeMap::new());
                for link in place.head_ranks.values() {
                    let asked = Activations { revision, step: work.step, rows: asked.clone() };
                    actions.push(Action::Send(*link, Message::HeadRows(asked)));
                }
                return;
            }
        }
        self.complete(actions);
    }

    /// Passes a computed step on: to the next stage, and to the scheduler.
    fn complete(&mut self, actions: &mut Vec<Action>) {
        let Some(place) = &mut self.place else { return };
        let Some(Current { work, rows: Some(mut rows), compute_us, .. }) = place.current.take() else {
            return;
        };
        let (assignment, revision, step) = (&place.assignment, place.assignment.revision, work.step);
        let timing = StepTiming { compute_us, ..StepTiming::default() };
        self.sequencer.handle(Event::Computed(step), &mut Vec::new());
        let sampled = work.samples.iter().filter_map(|&(id, row)| {
            Some(SampledToken {
                id,
                position: work.rows.get(row)?.position + 1,
                token: oracle::sample(*rows.get(row)?, *place.seeds.get(&id)?),
                logprobs: None,
                grammar_complete: false,
            })
        });
        let boundary = Boundary::Layers(assignment.layers.end as u32);
        let rows_audited = work
            .rows_of(assignment.stage)
            .iter()
            .zip(&rows)
            .filter(|(row, _)| place.audited.contains(&row.sequence));
        let digests: Vec<RowDigests> = rows_audited
            .filter(|_| assignment.tensor_rank.0 == 0)
            .map(|(row, state)| RowDigests {
                id: row.sequence,
                boundary,
                start: row.position,
                digests: vec![*state],
            })
            .collect();
        let last = assignment.stage.0 + 1 == assignment.num_stages;
        let message = if last && assignment.tensor_rank.0 == 0 {
            FromNode::StepResult(StepResult {
                term: assignment.term,
                revision,
                step,
                sampled: sampled.collect(),
                prompt_logprobs: Vec::new(),
                failed: Vec::new(),
                timing,
            })
        } else {
            FromNode::StepDone { revision, step, timing }
        };
        rows.truncate(work.rows_of(StageIndex(assignment.stage.0 + 1)).len());
        if let Some(next) = place.next.filter(|_| !rows.is_empty()) {
            actions.push(Action::Send(next, Message::Activations(Activations { revision, step, rows })));
        }
        if !digests.is_empty() {
            self.tell(FromNode::Digests { revision, digests }, actions);
        }
        self.tell(message, actions);
    }
}

/// States of the rows whose logits are wanted.
fn sampled_rows<'w>(work: &'w StepWork, rows: &'w [u64]) -> impl Iterator<Item = u64> + 'w {
    work.samples.iter().filter_map(|&(_, row)| rows.get(row).copied())
}
