//! The compute thread: loads an assignment's slice, then applies plans strictly in order.

use crate::adapters::{AdapterLoad, Adapters};
use crate::beat::Beat;
use crate::boundary_log::BoundaryLog;
use crate::config::NodeConfig;
use crate::digests::Digests;
use crate::fence::Fence;
use crate::files::{Files, Shelf};
use crate::head::{HeadService, Wake};
use crate::links::{Inbound, LinkBreaker, LinkSettings, Links, PendingLinks, Waiting, Wish};
use crate::logits::{sample_row, wanted_logits};
use crate::rows::{adapted_rows, contexts, not_finite, spoil};
use crate::sampling::Samplers;
use crate::sequencer::{self, Effect, Event, Sequencer, StepWork};
use crate::slices::Slices;
use crate::spans::Spans;
use crate::training::{self, Sessions};
use ashlar_identity::Transport;
use ashlar_kernels::Kernels;
use ashlar_model::stage::LOGIT_ROWS_MAX;
use ashlar_model::{KvCache, StageInput, Workspace};
use ashlar_protocol::membership::{Assignment, FromNode, HeldSlice, KEPT_BLOCKS_MAX};
use ashlar_protocol::step::{StepPlan, StepResult, StepTiming};
use ashlar_vocabulary::{AdapterId, Bytes, ReplicaRevision, SequenceId, StageIndex, StepId, TokenId};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tracing::{info, warn};

/// What reaches the compute thread.
#[derive(Debug)]
pub enum Command {
    /// Take this place, as long as the scheduler wants that.
    Assign(Box<Assignment>, Wish),
    /// Give the place up.
    Release {
        /// Whether the same place may be taken again: the scheduler was lost.
        for_now: bool,
    },
    /// Bring this place's slice into memory beside the one that serves, or let it be.
    Prepare(Option<Box<Assignment>>),
    /// A preparation may have ended.
    Prepared,
    /// Execute a step.
    Step(Box<StepPlan>),
    /// Load this rank's share of an adapter, beside the steps.
    LoadAdapter {
        /// The layout for which it is wanted.
        revision: ReplicaRevision,
        /// Which.
        adapter: AdapterId,
        /// The scheduler's number of the load, which the answer repeats.
        load: u64,
    },
    /// A load has ended.
    AdapterLoaded(AdapterLoad),
    /// Forget an adapter.
    UnloadAdapter(AdapterId),
    /// Another rank has connected.
    Link(Inbound),
    /// The rank that samples has sent rows for this rank's slice of the head; their link has them.
    HeadRows,
    /// End the thread.
    Shutdown,
}

/// How long links of a new layout may take to stand once the weights are loaded.
const LINK_TIMEOUT: Duration = Duration::from_secs(60);

/// How often the group's agreement is looked at: it takes a few messages over a fast link.
const AGREEMENT_POLL: Duration = Duration::from_millis(2);

/// What the rest of the node may know of the compute thread.
#[derive(Debug, Default, Clone)]
pub struct Shared {
    held: Arc<Mutex<Option<HeldSlice>>>,
}

impl Shared {
    /// The slice in memory, if any.
    pub fn held(&self) -> Option<HeldSlice> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set(&self, held: Option<HeldSlice>) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = held;
    }
}

/// A place in a replica, with everything to work there.
struct Place {
    assignment: Assignment,
    samples: bool,
    cache: KvCache,
    /// What was handed on, where that is to be kept.
    log: Option<BoundaryLog>,
    work: Workspace,
    input: Vec<f32>,
    samplers: Samplers,
    /// Sequences whose prompt tokens are scored; every rank of the last stage must agree on the rows it multiplies.
    scored: BTreeSet<SequenceId>,
    /// Of sequences that are audited.
    digests: Digests,
    spans: Spans,
    links: PlaceLinks,
}

/// What is left of a place: its cache of keys and values, and what it handed on.
struct Former {
    assignment: Assignment,
    cache: KvCache,
    log: Option<BoundaryLog>,
}

enum PlaceLinks {
    Pending(Box<PendingLinks>, Instant),
    Up(Box<Links>),
}

/// The compute thread's state.
pub struct Executor {
    config: NodeConfig,
    kernels: Arc<Kernels>,
    out: mpsc::Sender<FromNode>,
    beat: Beat,
    /// Its own queue, for links that wake it.
    commands: SyncSender<Command>,
    /// Whether a [`Command::HeadRows`] is in that queue: one is enough, and leaves the room to step plans.
    head_rows_queued: Arc<AtomicBool>,
    breaker: LinkBreaker,
    transport: Transport,
    fence: Fence,
    waiting: Waiting,
    sequencer: Sequencer,
    slices: Slices,
    /// Fine-tuning beside the steps: told of the place, and ended before weights are replaced.
    sessions: Sessions,
    adapters: Adapters,
    place: Option<Place>,
    /// The place before, while the same slice may be assigned again: what its blocks hold has not changed by that.
    former: Option<Former>,
    /// Steps with rows, for deliberate trouble.
    steps_computed: u64,
}

impl Executor {
    /// A rank without a place.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn new(
        config: NodeConfig,
        kernels: Arc<Kernels>,
        commands: SyncSender<Command>,
        out: mpsc::Sender<FromNode>,
        (breaker, transport): (LinkBreaker, Transport),
        shared: Shared,
        fence: Fence,
        sessions: Sessions,
        shelf: Shelf,
    ) -> Executor {
        let files = Files::new(&config, shelf, transport.clone());
        let slices = Slices::new(
            config.clone(),
            kernels.clone(),
            out.clone(),
            commands.clone(),
            shared,
            (files, breaker.clone()),
        );
        Executor {
            slices,
            adapters: Adapters::new(config.blobs.clone(), kernels.isa(), commands.clone()),
            config,
            kernels,
            beat: Beat::new(out.clone()),
            out,
            commands,
            head_rows_queued: Arc::default(),
            breaker,
            transport,
            fence,
            waiting: Waiting::default(),
            sequencer: Sequencer::default(),
            sessions,
            place: None,
            former: None,
            steps_computed: 0,
        }
    }

    /// Applies commands until told to stop.
    pub fn run(mut self, commands: &Receiver<Command>) {
        loop {
            match commands.recv_timeout(self.patience()) {
                Ok(Command::Assign(assignment, wish)) => self.assign(*assignment, wish),
                Ok(Command::Release { for_now }) => {
                    self.sessions.end_all("the layout was given up");
                    self.vacate(for_now);
                    self.adapters.clear();
                    self.slices.withdraw();
                }
                Ok(Command::Prepare(assignment)) => {
                    if let Some(ordered) = assignment.as_ref().filter(|_| self.place.is_none()) {
                        self.slices.forget_other_model(ordered);
                    }
                    self.slices.prepare(assignment);
                }
                Ok(Command::Step(plan)) => self.step(*plan),
                Ok(Command::LoadAdapter { revision, adapter, load }) => {
                    self.load_adapter(revision, adapter, load);
                }
                Ok(Command::AdapterLoaded(load)) => self.adapter_loaded(load),
                Ok(Command::UnloadAdapter(adapter)) => self.adapters.unload(adapter),
                Ok(Command::Link(inbound)) => self.waiting.keep(inbound),
                // Seen to below.
                Ok(Command::Prepared) => {}
                Ok(Command::HeadRows) => self.head_rows_queued.store(false, Ordering::Release),
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Command::Shutdown) | Err(RecvTimeoutError::Disconnected) => return,
            }
            // A beat cannot fail: its queue being full means that others speak.
            let _ = self.beat.tick();
            self.slices.look();
            self.finish_links();
            self.serve_head();
        }
    }

    /// How long to wait for a command.
    fn patience(&self) -> Duration {
        match self.place.as_ref().map(|place| &place.links) {
            Some(PlaceLinks::Pending(pending, _)) if pending.is_connected() => AGREEMENT_POLL,
            _ => Beat::interval(),
        }
    }

    fn send(&self, message: FromNode) {
        // The queue is drained by the control connection; without one, messages are of no use to anybody.
        let _ = self.out.blocking_send(message);
    }

    fn fail(&mut self, revision: ReplicaRevision, message: String) {
        self.fail_with(revision, message, false);
    }

    fn fail_with(&mut self, revision: ReplicaRevision, message: String, weights: bool) {
        warn!(%revision, "{message}");
        self.sessions.end_all("the layout failed");
        // Weights that cannot be used say nothing for a cache that was computed with them.
        self.vacate(!weights);
        self.breaker.break_all();
        self.send(FromNode::Failed { revision, message, weights });
    }

    fn load_adapter(&mut self, revision: ReplicaRevision, adapter: AdapterId, load: u64) {
        let current = self.place.as_ref().is_some_and(|place| place.assignment.revision == revision);
        let Some(loaded) = self.slices.serving().filter(|_| current) else { return };
        if let Err(refusal) = self.adapters.begin(revision, adapter, load, loaded.model.clone()) {
            self.send(FromNode::AdapterLoaded { revision, adapter, load, outcome: Err(refusal) });
        }
    }

    /// Installs what has been loaded, and says so. Its products' buffers are reserved here, before a step needs them.
    fn adapter_loaded(&mut self, ended: AdapterLoad) {
        let (revision, adapter, load) = (ended.revision, ended.adapter, ended.load);
        let Some(outcome) = self.adapters.finish(ended) else { return };
        let (Some(place), Some(loaded)) = (&mut self.place, self.slices.serving()) else { return };
        let outcome = outcome.map(|share| {
            let rows = place.assignment.max_num_batched_tokens as usize;
            let before = place.work.bytes();
            loaded.model.reserve_adapter(&share, rows, &mut place.work);
            share.bytes() + place.work.bytes().saturating_sub(before)
        });
        match &outcome {
            Ok(bytes) => info!(%revision, %adapter, %bytes, "adapter loaded"),
            Err(refusal) => warn!(%revision, %adapter, "adapter not loaded: {}", refusal.message),
        }
        self.send(FromNode::AdapterLoaded { revision, adapter, load, outcome });
    }

    fn assign(&mut self, assignment: Assignment, wish: Wish) {
        self.vacate(true);
        let beat = self.beat.clone();
        // A beat cannot fail: its queue being full means that others speak.
        self.sessions.leave("the layout has changed", &mut || drop(beat.tick()));
        self.adapters.clear();
        let revision = assignment.revision;
        match self.fence.accept(assignment.term, &assignment.holder) {
            Ok(true) => {}
            Ok(false) => return self.send(FromNode::Refused { revision, term: self.fence.term() }),
            Err(error) => return self.fail(revision, format!("cannot persist the lease term: {error}")),
        }
        self.former.take_if(|former| !sequencer::is_same_cache(&former.assignment, &assignment));
        let mut effects = Vec::new();
        let event = Event::Assigned {
            term: assignment.term,
            revision,
            kv_blocks: assignment.kv_blocks,
            max_rows: assignment.max_num_batched_tokens,
            cache_kept: self.former.is_some(),
        };
        self.sequencer.handle(event, &mut effects);
        if let Err(message) = self.slices.load(&assignment, &beat, wish) {
            return self.fail_with(revision, message, true);
        }
        match self.take_place(assignment) {
            Ok(place) => self.place = Some(place),
            Err(message) => self.fail(revision, message),
        }
    }

    /// Leaves the place; its cache is kept in case that it `may` be of use `again`.
    fn vacate(&mut self, may_return: bool) {
        if let Some(place) = self.place.take() {
            let Place { assignment, cache, log, .. } = place;
            self.former = Some(Former { assignment, cache, log });
        }
        if !may_return {
            self.former = None;
        }
    }

    fn take_place(&mut self, assignment: Assignment) -> Result<Place, String> {
        let loaded = self.slices.serving().ok_or("no weights")?;
        let ranks = assignment.tensor_parallel_size as usize;
        let settings = LinkSettings {
            faults: self.config.link_faults,
            shared_memory: self.config.links.shared_memory,
            spin: self.config.links.spin(ranks, self.kernels.threads()),
        };
        let model = &loaded.model;
        let links = PendingLinks::connect(&assignment, &model.config().shape, settings, &self.transport)
            .map_err(|error| format!("cannot reach another rank: {error}"))?;
        let last = model.slice().last;
        let rows = assignment.max_num_batched_tokens as usize;
        let blocks = assignment.kv_blocks as usize;
        let (cache, log) = match self.former.take() {
            Some(former) => (Some(former.cache), former.log),
            None => (None, None),
        };
        let shape = &model.config().shape;
        let row = (shape.activations, shape.hidden_size);
        let new_log = || BoundaryLog::new(row, blocks, rows, cache.is_none());
        let log = (assignment.boundary_log && !last).then(|| log.unwrap_or_else(new_log));
        Ok(Place {
            samples: last && assignment.tensor_rank.0 == 0,
            cache: cache.unwrap_or_else(|| model.kv_cache(blocks)),
            log,
            work: model.workspace(rows),
            input: Vec::new(),
            samplers: Samplers::new(model.config().shape.vocab_size, loaded.compiler.clone()),
            scored: BTreeSet::new(),
            digests: Digests::default(),
            spans: Spans::default(),
            links: PlaceLinks::Pending(Box::new(links), Instant::now()),
            assignment,
        })
    }

    fn finish_links(&mut self) {
        let Some(place) = &mut self.place else { return };
        let PlaceLinks::Pending(pending, since) = &mut place.links else { return };
        let revision = place.assignment.revision;
        if !pending.collect(&mut self.waiting) {
            if !pending.is_connected() && since.elapsed() > LINK_TIMEOUT {
                let message = format!("other ranks did not connect within {} s", LINK_TIMEOUT.as_secs());
                self.fail(revision, message);
            }
            return;
        }
        let Some(mut place) = self.place.take() else { return };
        let PlaceLinks::Pending(pending, _) = place.links else { return };
        let (commands, queued) = (self.commands.clone(), self.head_rows_queued.clone());
        let wake = Wake::new(move || {
            // Where the queue is full the thread has work, and looks for rows after each piece of it.
            if !queued.swap(true, Ordering::AcqRel) && commands.try_send(Command::HeadRows).is_err() {
                queued.store(false, Ordering::Release);
            }
        });
        match pending.finish(&self.breaker, &self.beat, wake) {
            Err(error) => self.fail(revision, format!("a link broke while it was made: {error}")),
            Ok(links) => {
                if let Some(transport) = links.group.transport() {
                    info!(%revision, "{transport}");
                }
                for (index, transport) in links.head_ranks.transports().enumerate() {
                    info!(%revision, "slice {index} of the head comes {transport}");
                }
                let of_links = links.bytes();
                place.links = PlaceLinks::Up(Box::new(links));
                let weights = self.slices.serving().map_or(Bytes(0), |loaded| loaded.model.bytes());
                let of_log = place.log.as_ref().map_or(Bytes(0), BoundaryLog::bytes);
                let reserved = weights + place.cache.bytes() + of_log + place.work.bytes() + of_links;
                let logged = place.log.as_ref().is_some_and(BoundaryLog::is_complete);
                if let Some(loaded) = self.slices.serving() {
                    let assignment = &place.assignment;
                    self.sessions.enter(training::Place {
                        term: assignment.term,
                        revision,
                        stage: assignment.stage.0 as usize,
                        num_stages: assignment.num_stages as usize,
                        model: loaded.model.clone(),
                        model_name: assignment.model.clone(),
                        directory: loaded.directory.clone(),
                    });
                }
                self.place = Some(place);
                let resident = ashlar_service_kit::memory::resident_bytes().unwrap_or_default();
                let kept = self.sequencer.names().take(KEPT_BLOCKS_MAX).collect();
                self.send(FromNode::Ready { revision, reserved, resident, kept, logged });
            }
        }
    }

    /// Computes this rank's slice of the head for rows that have arrived.
    fn serve_head(&mut self) {
        let (Some(place), Some(loaded)) = (&mut self.place, self.slices.serving()) else { return };
        let PlaceLinks::Up(links) = &mut place.links else { return };
        let Some(service) = &mut links.head_service else { return };
        let _on_core = self.kernels.pool().pin_caller();
        let urgent = self.sessions.urgent().clone();
        let _urgent = urgent.raise();
        if let Err(error) = service.serve(&loaded.model) {
            let revision = place.assignment.revision;
            self.fail(revision, format!("lost the rank that samples: {error}"));
        }
    }

    fn step(&mut self, plan: StepPlan) {
        let mut effects = Vec::new();
        self.sequencer.handle(Event::Plan(plan), &mut effects);
        let revision = self.sequencer.revision();
        for effect in effects {
            let Some(place) = &mut self.place else { return };
            match effect {
                Effect::Begin(new) => {
                    if let Some(adapter) = new.adapter
                        && !self.adapters.begin_sequence(new.id, adapter)
                    {
                        let reason = format!("plan refused: adapter {adapter} is not loaded");
                        return self.fail(revision, reason);
                    }
                    place.spans.begin(&new, &place.assignment);
                    place.digests.begin(&new);
                    if new.sampling.prompt_logprobs {
                        place.scored.insert(new.id);
                    }
                    if place.samples {
                        place.samplers.begin(*new);
                    }
                }
                Effect::Observe(id, tokens) => place.samplers.observe(id, &tokens),
                Effect::End(id) => {
                    self.adapters.end_sequence(id);
                    place.samplers.end(id);
                    place.spans.end(id);
                    place.scored.remove(&id);
                    place.digests.end(id);
                }
                Effect::Compute(work) => match self.compute(&work) {
                    Ok(message) => {
                        self.note_computed(work.step, &message);
                        self.send(message);
                    }
                    Err(message) => self.fail(revision, message),
                },
                Effect::Diverged(reason) => {
                    self.fail(revision, format!("plan refused: {reason}"));
                    self.former = None;
                }
            }
        }
    }

    /// What a step has written is known from now on, but for sequences that failed.
    fn note_computed(&mut self, step: StepId, message: &FromNode) {
        let mut effects = Vec::new();
        self.sequencer.handle(Event::Computed(step), &mut effects);
        if let FromNode::StepResult(result) = message {
            for failed in &result.failed {
                self.sequencer.handle(Event::Distrusted(failed.id), &mut effects);
            }
        }
        debug_assert!(effects.is_empty(), "nothing is to be done");
    }

    fn compute(&mut self, work: &StepWork) -> Result<FromNode, String> {
        let place = self.place.as_mut().ok_or("no assignment")?;
        let loaded = self.slices.serving().ok_or("no weights")?;
        let PlaceLinks::Up(links) = &mut place.links else { return Err("links are not up".into()) };
        let Links { previous, next, group, head_service, head_ranks } = &mut **links;
        let (model, beat) = (&loaded.model, &self.beat);
        let (revision, step) = (place.assignment.revision, work.step);
        // Only while it computes: threads that links and grammars start at other times are to run where they like.
        let _on_core = self.kernels.pool().pin_caller();
        let started = Instant::now();
        // What it did for the head between steps, and is to be seen somewhere.
        let head_before = head_service.as_mut().map_or(Duration::ZERO, HeadService::take_spent);
        let mut timing = StepTiming::default();
        let mut result = StepResult {
            term: place.assignment.term,
            revision,
            step,
            sampled: Vec::new(),
            prompt_logprobs: Vec::new(),
            failed: Vec::new(),
            timing,
        };
        let stage = place.assignment.stage;
        let own = work.rows_of(stage);
        let wanted_next = match next {
            Some(_) => work.rows_of(StageIndex(stage.0 + 1)),
            None => &[],
        };
        if !own.is_empty() {
            let rows = contexts(&self.sequencer, own);
            let tokens: Vec<TokenId> = own.iter().map(|row| row.token).collect();
            let input = match previous {
                None => StageInput::Tokens(&tokens),
                Some(previous) => {
                    place.input.resize(rows.len() * model.config().shape.hidden_size, 0.0);
                    previous
                        .receive(&self.kernels, step, &mut place.input, &mut || {
                            beat.tick()?;
                            head_service.as_mut().map_or(Ok(()), |service| service.serve(model))
                        })
                        .map_err(|error| format!("lost the previous stage: {error}"))?;
                    let served = head_service.as_mut().map_or(Duration::ZERO, HeadService::take_spent);
                    timing.wait_us = started.elapsed().saturating_sub(served).as_micros() as u64;
                    StageInput::Activations(&place.input)
                }
            };
            // From here on rows wait for this rank's cores; what trains on them gives way.
            let _urgent = self.sessions.urgent().raise();
            group.begin(step);
            head_ranks.begin(step);
            let mut served = Ok(());
            let adapted = adapted_rows(&self.adapters, own);
            model
                .forward_adapted(
                    &rows,
                    input,
                    &adapted,
                    &mut place.cache,
                    group,
                    &mut place.work,
                    &mut || {
                        let _ = beat.tick();
                        if let (Some(service), Ok(())) = (head_service.as_mut(), &served) {
                            served = service.serve(model);
                        }
                    },
                )
                .map_err(|error| error.to_string())?;
            self.steps_computed += 1;
            if self.config.compute_faults.hit(&self.config.name, self.steps_computed) {
                spoil(place.work.activations_mut(rows.len()), rows.len());
            }
            let made = place.work.activations(rows.len());
            let given = previous.is_some().then_some(place.input.as_slice());
            let sequences = not_finite(given, made, own, &self.adapters);
            if !sequences.is_empty() {
                warn!(%revision, %step, "what was computed of {} sequences is not finite", sequences.len());
                let _ = self.out.blocking_send(FromNode::NotFinite { revision, sequences });
            }
            if place.assignment.tensor_rank.0 == 0 {
                place.digests.see_rows(place.assignment.layers.end as u32, own, made);
            }
            served.map_err(|error| format!("lost the rank that samples: {error}"))?;
            if next.is_none() {
                let wanted = wanted_logits(&self.sequencer, &place.scored, &place.digests, work);
                for chunk in wanted.chunks(LOGIT_ROWS_MAX) {
                    let picked: Vec<usize> = chunk.iter().map(|wanted| wanted.row).collect();
                    let logits = model
                        .logits(&picked, group, head_ranks, &mut place.work)
                        .map_err(|error| error.to_string())?;
                    let Some(logits) = logits else { continue };
                    let vocab = model.config().shape.vocab_size;
                    for (wanted, logits) in chunk.iter().zip(logits.chunks_exact_mut(vocab)) {
                        let row = work.rows[wanted.row];
                        place.digests.see_logits(row, logits);
                        sample_row(&self.kernels, &mut place.samplers, row, wanted, logits, &mut result);
                    }
                }
            }
            timing.collective_us = (group.spent() + head_ranks.spent()).as_micros() as u64;
        }
        if let Some(next) = next
            && !wanted_next.is_empty()
        {
            let made = place.work.activations(own.len());
            let handed_on = match wanted_next.get(own.len()..) {
                // What only later stages compute was handed on before.
                Some(again) if !again.is_empty() => {
                    let log = place.log.as_mut().ok_or("plan refused: nothing that was handed on is kept")?;
                    place.input.clear();
                    place.input.extend_from_slice(made);
                    log.read(&self.kernels, &self.sequencer, again, &mut place.input);
                    &place.input
                }
                _ => made.get(..wanted_next.len() * model.config().shape.hidden_size).unwrap_or(made),
            };
            let sending = Instant::now();
            next.send(&self.kernels, step, handed_on)
                .map_err(|error| format!("lost the next stage: {error}"))?;
            timing.send_us = sending.elapsed().as_micros() as u64;
            timing.sent_bytes = next.bytes_of(handed_on.len());
        }
        if let Some(log) = place.log.as_mut().filter(|_| !own.is_empty()) {
            log.keep(&self.kernels, &self.sequencer, own, place.work.activations(own.len()));
        }
        // Within this step it counts as computing already.
        let _ = head_service.as_mut().map(HeadService::take_spent);
        let spent = (started.elapsed() + head_before).as_micros() as u64;
        timing.compute_us = spent.saturating_sub(timing.wait_us + timing.collective_us + timing.send_us);
        result.timing = timing;
        let digests = place.digests.take();
        if !digests.is_empty() {
            let _ = self.out.blocking_send(FromNode::Digests { revision, digests });
        }
        if !place.spans.is_empty() {
            let ids: BTreeSet<SequenceId> = work.rows.iter().map(|row| row.sequence).collect();
            ids.into_iter().for_each(|id| place.spans.step(id, &timing));
        }
        Ok(match place.samples {
            true => FromNode::StepResult(result),
            false => FromNode::StepDone { revision, step, timing },
        })
    }
}
