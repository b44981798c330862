//! Sessions, steps, votes.

use super::events::Effect;
use super::job::{self, Held, Job, Next, Phase};
use super::lifecycle::error;
use super::room::{Allotment, Verdict};
use super::session::{Doing, Session};
use super::{Jobs, replicas};
use crate::cluster::NodeConnection;
use ashlar_protocol::admin::JobEventKind;
use ashlar_protocol::membership::ToNode;
use ashlar_protocol::training::{SessionStart, StepMetrics, TrainingReport, TrainingSettings, TrainingWork};
use ashlar_vocabulary::{BlobId, JobId, ReplicaId, SessionId};

/// Sessions of one term: `term × SESSIONS_PER_TERM + n`, so that they rise over all terms.
const SESSIONS_PER_TERM: u64 = 1_000_000;
/// Sessions lost without progress before a job fails.
const FAILURES_MAX: u32 = 8;
/// The pause before a lost session is opened again; it doubles with each that is lost without progress.
const RETRY_MS: u64 = 1_000;
/// The longest such pause.
const RETRY_MS_MAX: u64 = 60_000;
/// A session of which no rank says anything for this long is given up, unless its steps take long.
const SILENCE_MS_MAX: u64 = 1_800_000;
/// How much longer than the others a step may take.
const SLOW_STEP_FACTOR: f64 = 20.0;
/// Steps without a usable gradient, one after the other, before a job fails.
const SKIPPED_MAX: u32 = 3;

impl Jobs {
    /// Opens a session on the replicas that serve, if there are any and they have room.
    pub(super) fn open_session(&mut self, id: JobId) {
        // A step that is not committed yet changes where it starts.
        if self.jobs.get(id).is_none_or(|job| job.held.is_some()) {
            return;
        }
        let Some(allotment) = self.allot(id) else { return };
        let replicas = replicas::choose(self.replicas.values());
        let Some(job) = self.jobs.get_mut(id) else { return };
        job.go_back();
        let Some(settings) = &job.record.settings else { return };
        let settings = TrainingSettings {
            keep_activations: allotment.keep_activations,
            micro_batch_rows: allotment.micro_batch_rows,
            ..settings.clone()
        };
        self.sessions_made += 1;
        let session = SessionId(self.config.term.0 * SESSIONS_PER_TERM + self.sessions_made);
        let start = match job.record.steps {
            0 => SessionStart::New,
            steps => SessionStart::Resume { steps, shards: job.record.shards.clone() },
        };
        let messages = replicas::open(&replicas, (session, id), &settings, &start);
        let ranks = messages.iter().map(|(connection, _)| *connection).collect();
        let stay = Session::new(session, ranks, &replicas, allotment, self.now);
        job.phase = Phase::Training(Box::new(stay));
        self.sessions.insert(session, id);
        self.room_changes += 1;
        let to_one = |(connection, message)| Effect::ToNodes(vec![connection], Box::new(message));
        self.effects.extend(messages.into_iter().map(to_one));
    }

    /// What a job's session may take now. A job that has to wait, and one that will never fit, hears so.
    pub(super) fn allot(&mut self, id: JobId) -> Option<Allotment> {
        let unix_s = self.unix_s;
        if self.jobs.get(id)?.waits_since == Some(self.room_changes) {
            return None;
        }
        let verdict = self.room_for(id)?;
        let job = self.jobs.get_mut(id)?;
        let why = match verdict {
            Verdict::Fits(allotment) => {
                job.waits_since = None;
                return Some(allotment);
            }
            // What it has learnt is not given up: other nodes may come back, or its owner may end it.
            Verdict::Never(why) if job.record.steps > 0 => why,
            Verdict::Never(why) => {
                self.fail(id, error("does_not_fit", why));
                return None;
            }
            Verdict::Waits(why) => why,
        };
        if job.waits_since.replace(self.room_changes).is_none() {
            job.happened(unix_s, JobEventKind::WaitsForMemory(job::short(why)));
        }
        None
    }

    /// Closes a job's session, if it has one. What its ranks say later is not heard.
    pub(super) fn close_session(&mut self, id: JobId) {
        let Some(session) = self.jobs.get(id).and_then(Job::session) else { return };
        let (ranks, message) = session.tell(TrainingWork::Close);
        self.sessions.remove(&session.id);
        self.room_changes += 1;
        self.effects.push(Effect::ToNodes(ranks, message));
    }

    /// This term ends.
    pub(super) fn close_all(&mut self) {
        let open: Vec<JobId> = self.sessions.values().copied().collect();
        for id in open {
            self.close_session(id);
            if let Some(job) = self.jobs.get_mut(id) {
                job.phase = Phase::Waiting { due: crate::time::Millis(u64::MAX) };
            }
        }
    }

    /// Every session on a replica that is lost is lost.
    pub(super) fn replica_down(&mut self, replica: ReplicaId, reason: &str) {
        self.replicas.remove(&replica);
        self.adapters_held.remove(&replica);
        self.room_changes += 1;
        let hit = |id: &JobId| {
            let session = self.jobs.get(*id).and_then(Job::session);
            session.is_some_and(|session| session.uses(replica))
        };
        let hit: Vec<JobId> = self.sessions.values().copied().filter(hit).collect();
        for id in hit {
            self.interrupt(id, reason.to_owned());
        }
    }

    /// Gives up a session; the job goes on from its committed step with another one.
    pub(super) fn interrupt(&mut self, id: JobId, reason: String) {
        if let Some(job) = self.jobs.get_mut(id) {
            // Another layout would prepare the step in other pieces.
            let prepared: Vec<BlobId> = job.session().into_iter().flat_map(Session::prepared).collect();
            let steps = job.record.steps + 1;
            job.progress.superseded.extend(prepared.into_iter().map(|shard| (steps, shard)));
        }
        self.close_session(id);
        let (now, unix_s) = (self.now, self.unix_s);
        let Some(job) = self.jobs.get_mut(id) else { return };
        let reason = job::short(reason);
        self.effects.push(Effect::Note(format!("job {id} is interrupted: {reason}")));
        job.failures += 1;
        if job.failures > FAILURES_MAX {
            let text =
                format!("its session was lost {FAILURES_MAX} times without progress, at last: {reason}");
            return self.fail(id, error("training_interrupted", text));
        }
        let pause_ms = (RETRY_MS << (job.failures - 1).min(16)).min(RETRY_MS_MAX);
        job.phase = Phase::Waiting { due: now.plus(pause_ms) };
        job.happened(unix_s, JobEventKind::Interrupted(reason));
        if job.progress.pause {
            self.stop_here(id);
        }
    }

    /// Pauses a job that only somebody can help who makes room: what it has learnt stays, and it goes on when it is resumed.
    fn wait_for_owner(&mut self, id: JobId, reason: String) {
        let unix_s = self.unix_s;
        let Some(job) = self.jobs.get_mut(id) else { return };
        let reason = job::short(format!("{reason}; the job is paused: resume it once there is room"));
        self.effects.push(Effect::Warn(format!("job {id} is paused: {reason}")));
        job.happened(unix_s, JobEventKind::Interrupted(reason));
        self.stop_here(id);
    }

    pub(super) fn interrupt_if_silent(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(id) else { return };
        let slow = job.progress.step_ms.unwrap_or_default() * SLOW_STEP_FACTOR;
        let limit = SILENCE_MS_MAX.max(slow as u64);
        let waits = |session: &Session| session.doing != Doing::Idle && self.now.since(session.heard) > limit;
        if job.session().is_some_and(waits) {
            self.interrupt(id, format!("no rank has said anything for {limit} ms"));
        }
    }

    /// A rank says something about a session.
    pub(super) fn report(&mut self, from: NodeConnection, session: SessionId, report: TrainingReport) {
        let Some(id) = self.sessions.get(&session).copied() else {
            // A session that nobody wants any more still takes memory there.
            if !matches!(report, TrainingReport::Failed { .. } | TrainingReport::NoRoom { .. }) {
                let close = ToNode::Training { session, work: TrainingWork::Close };
                self.effects.push(Effect::ToNodes(vec![from], Box::new(close)));
            }
            return;
        };
        let (now, unix_s) = (self.now, self.unix_s);
        let Some(job) = self.jobs.get_mut(id) else { return };
        let Phase::Training(open) = &mut job.phase else { return };
        if !open.has(from) {
            return;
        }
        open.heard = now;
        let root = open.is_root(from);
        match report {
            TrainingReport::Opened { .. } => {
                if open.opened(from) {
                    open.doing = Doing::Idle;
                    job.happened(unix_s, JobEventKind::Started);
                    self.advance(id);
                }
            }
            TrainingReport::Prepared { step, shard, metrics, timing } => match &open.doing {
                Doing::Step(votes) if votes.step == step => {
                    open.stragglers.take(from, timing);
                    if let Some((votes, shards)) = open.vote(from, shard, metrics) {
                        self.step_is_done(id, votes.metrics, shards, now.since(votes.since));
                    }
                }
                _ => self.interrupt(id, format!("a rank has prepared step {step}, which was not asked for")),
            },
            TrainingReport::Evaluated { loss, accuracy } if root && open.doing == Doing::Evaluating => {
                open.doing = Doing::Idle;
                job.evaluated(unix_s, loss, accuracy);
                self.advance(id);
            }
            TrainingReport::Exported { adapter, files, usable } if root && open.doing == Doing::Exporting => {
                open.doing = Doing::Idle;
                match usable {
                    Ok(()) => self.checkpoint(id, adapter, files),
                    Err(why) => self.fail(id, error("no_effect", why)),
                }
                self.advance(id);
            }
            TrainingReport::ModelExported { manifest, files, usable }
                if root && open.doing == Doing::Exporting =>
            {
                open.doing = Doing::Idle;
                match usable {
                    Ok(()) => self.model_exported(id, manifest, files),
                    Err(why) => self.fail(id, error("no_effect", why)),
                }
                self.advance(id);
            }
            TrainingReport::Evaluated { .. }
            | TrainingReport::Exported { .. }
            | TrainingReport::ModelExported { .. } => {}
            TrainingReport::NoRoom { message } => self.wait_for_owner(id, message),
            TrainingReport::Failed { message, retry: true } => self.interrupt(id, message),
            TrainingReport::Failed { message, retry: false } => {
                self.fail(id, error("training_failed", message))
            }
        }
    }

    /// Every rank has voted for the present step.
    fn step_is_done(&mut self, id: JobId, metrics: Option<StepMetrics>, shards: Vec<BlobId>, took_ms: u64) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        let settings = job.record.settings.as_ref();
        let is_durable = settings.is_none_or(|settings| settings.is_durable(job.record.steps + 1));
        let Some(metrics) = metrics.filter(|_| shards.is_empty() != is_durable) else {
            return self.interrupt(id, "the ranks did not say what a step came to".to_owned());
        };
        job.held = Some(Held { metrics, shards, took_ms });
        if let Phase::Training(session) = &mut job.phase {
            session.doing = Doing::Idle;
            if let Some(why) = session.stragglers.step_is_done() {
                self.effects.push(Effect::Warn(format!("job {id} is slowed down: {why}")));
                job.happened(self.unix_s, JobEventKind::Slowed(job::short(why)));
            }
        }
        self.commit(id);
    }

    /// Commits a step that can be, and goes on.
    pub(super) fn commit(&mut self, id: JobId) {
        let unix_s = self.unix_s;
        let Some(job) = self.jobs.get_mut(id) else { return };
        let committed = job.commit_held(unix_s);
        if let Some(last) = job.record.last.filter(|_| committed) {
            self.trained.0 += 1;
            self.trained.1 += last.tokens;
        }
        let request = &job.record.request;
        if committed && request.training_minutes_max.is_some() {
            let request = request.clone();
            if let Some(why) = self.trained_enough(&request) {
                return self.fail(id, error("quota_exceeded", why));
            }
        }
        let Some(job) = self.jobs.get(id) else { return };
        if committed && job.progress.skipped > SKIPPED_MAX {
            let text =
                format!("{SKIPPED_MAX} steps and one more had no finite loss: lower the learning rate");
            return self.fail(id, error("loss_not_finite", text));
        }
        self.advance(id);
    }

    /// Gives an idle session its next piece of work.
    pub(super) fn advance(&mut self, id: JobId) {
        let now = self.now;
        let Some(job) = self.jobs.get_mut(id) else { return };
        let next = job.next();
        let Phase::Training(session) = &mut job.phase else { return };
        if session.doing != Doing::Idle || job.held.is_some() {
            return;
        }
        if job.progress.pause {
            return self.stop_here(id);
        }
        session.heard = now;
        let work = match next {
            Next::Finish => return self.publish(id),
            Next::Step(step) => {
                session.begin_step(step, now);
                TrainingWork::Step { step }
            }
            Next::Evaluate => {
                session.doing = Doing::Evaluating;
                TrainingWork::Evaluate
            }
            Next::Export => {
                session.doing = Doing::Exporting;
                TrainingWork::Export { shards: job.record.shards.clone() }
            }
        };
        let (ranks, message) = session.tell(work);
        self.effects.push(Effect::ToNodes(ranks, message));
    }
}
