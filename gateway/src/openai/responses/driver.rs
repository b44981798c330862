//! Driving a response: from its tokens to its events, and to what is stored of it.
//!
//! A driver is a task of its own, so that a response outlives the connection over which it was asked for. Several gateways may drive the
//! same response: they follow the same tokens, make the same events, and store the same answer.

use super::events::ResponseEvents;
use super::live::{Ended, Listener, Live};
use super::request::{Prepared, StoredRequest};
use super::stored;
use crate::access::Caller;
use crate::app::{App, Phase, reached};
use crate::generation::{Generation, GenerationSpec, Output, PromptSpec, TokenCounts};
use crate::openai::answer::AnswerParser;
use crate::openai::error::ApiError;
use crate::openai::respond::{check_min_tokens, token_budget};
use crate::transcript::End;
use ashlar_protocol::admin::AdminRequest;
use ashlar_protocol::responses::{ResponseCall, ResponseOutcome, ResponseRecord, ResponseStatus};
use ashlar_protocol::serving::{FailureKind, RequestFailure};
use ashlar_tokenizer::TextStart;
use ashlar_vocabulary::{BlobId, RequestId};
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tracing::Instrument;

/// Attempts to store an answer, and the pause between two.
const ATTEMPTS_MAX: u32 = 60;
const RETRY: Duration = Duration::from_secs(1);
/// How long the end of a response waits until it is stored.
const STORED_WITHIN: Duration = Duration::from_millis(500);

/// Why this gateway drives a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// A client has asked for it here, or the scheduler: if nobody listens any more, this gateway decides what becomes of it.
    Owner,
    /// A client listens here to what another gateway may drive, too.
    Follower,
}

/// What a driver works on.
pub(super) struct Drive {
    pub(super) app: Arc<App>,
    pub(super) prepared: Prepared,
    pub(super) role: Role,
    /// Where the request is stored, if it is.
    pub(super) request: Option<BlobId>,
    /// The name under which it is computed: its own, or another one where the same is computed once more.
    pub(super) computed_as: RequestId,
    /// Whether it has begun elsewhere: it has been paid for.
    pub(super) is_known: bool,
    pub(super) traceparent: Option<String>,
}

/// How the driving ended; its last events are not sent yet.
enum Driven {
    Ended(ResponseStatus, Ended, Vec<Bytes>),
    /// Others go on, or nobody shall.
    LetGo,
}

impl Drive {
    /// Begins to drive, unless this gateway does already, for a listener who has heard the events before `next`. Without one it might end at
    /// once.
    pub(super) fn start(self, next: usize) -> Result<Listener, ApiError> {
        let id = self.computed_as;
        let in_progress = self.prepared.object.in_progress();
        let is_stored = self.request.is_some();
        let (live, is_new) = self
            .app
            .responses
            .enter(id, || Live::new(id, in_progress, is_stored.then(|| self.app.caller.owner())))?;
        let listener = live.listen(next);
        if is_new {
            tokio::spawn(self.run(live).instrument(tracing::Span::current()));
        }
        Ok(listener)
    }

    /// The record of this response.
    fn record(&self, outcome: Option<ResponseOutcome>) -> Option<ResponseRecord> {
        let StoredRequest { id, created_at, .. } = self.prepared.stored;
        let background = self.prepared.background;
        let (owner, key) = (self.app.caller.owner(), self.app.caller.key_id());
        self.request.map(|request| ResponseRecord {
            id,
            created_at,
            background,
            request,
            outcome,
            owner,
            key,
        })
    }

    async fn run(mut self, live: Arc<Live>) {
        let id = live.id;
        let app = self.app.clone();
        match self.drive(&live).await {
            Driven::LetGo => live.end(Ended::HandedOver),
            Driven::Ended(status, ended, last) => {
                let mut frames = live.all_frames();
                frames.extend(last.iter().cloned());
                let mut storing = Box::pin(self.store_answer(id, status, &ended, &frames));
                // Whoever has heard the end may go on from it at once. A store that is away does not keep it back for long.
                let stored = tokio::time::timeout(STORED_WITHIN, &mut storing).await.is_ok();
                live.push(last, true);
                live.end(ended.clone());
                if !stored {
                    storing.await;
                }
            }
        }
        app.responses.leave(id);
    }

    async fn drive(&mut self, live: &Live) -> Driven {
        let Prepared { stored, request, reading, object, .. } = &self.prepared;
        let parser = AnswerParser::new(reading, stored.id, 0);
        let (top, text) = (request.sampling.params.top_logprobs, self.app.text.clone());
        let mut events = ResponseEvents::new(object.clone(), stored.id, parser, top, text);
        live.push(events.take(), false);

        let mut generation = match self.begin() {
            Ok(generation) => generation,
            Err(error) => {
                let failure = failure_of(&error);
                let (status, object) = events.fail(&failure, TokenCounts::default());
                return Driven::Ended(status, Ended::Failed(error, Arc::new(object)), events.take());
            }
        };
        let mut phase = self.app.phase.clone();
        let mut link = self.app.scheduler.watch();
        let mut epoch = link.borrow().epoch;
        let patience = self.patience();
        // One wait over all outputs: begun anew with each it would never end.
        let abandoned = live.abandoned(patience.unwrap_or_default());
        tokio::pin!(abandoned);
        let mut has_output = false;
        loop {
            let output = tokio::select! {
                biased;
                () = reached(&mut phase, Phase::Ending), if self.request.is_some() => return Driven::LetGo,
                () = &mut abandoned, if patience.is_some() => {
                    if self.request.is_none() || self.role == Role::Follower {
                        return Driven::LetGo;
                    }
                    let failure = RequestFailure {
                        kind: FailureKind::Cancelled,
                        message: "nobody listened".to_owned(),
                        retry_after_ms: None,
                    };
                    let (status, object) = events.fail(&failure, generation.counts());
                    return Driven::Ended(status, Ended::With(Arc::new(object)), events.take());
                }
                // A scheduler that has just begun may not have heard of it.
                Ok(new) = changed(&mut link, epoch) => {
                    epoch = new;
                    self.announce();
                    continue;
                }
                output = generation.next() => output,
            };
            match output {
                Some(Output::Delta { delta, .. }) => {
                    events.delta(&delta);
                    has_output = true;
                    live.push(events.take(), true);
                }
                Some(Output::End { end: End::Finished { reason, .. }, .. }) => {
                    let (status, object) = events.end(reason, generation.counts());
                    return Driven::Ended(status, Ended::With(Arc::new(object)), events.take());
                }
                Some(Output::End { end: End::Failed(failure), .. }) => {
                    let (status, object) = events.fail(&failure, generation.counts());
                    let object = Arc::new(object);
                    let ended = match has_output || failure.kind == FailureKind::Cancelled {
                        true => Ended::With(object),
                        false => Ended::Failed(failure.into(), object),
                    };
                    return Driven::Ended(status, ended, events.take());
                }
                None => return Driven::LetGo,
            }
        }
    }

    /// How long it goes on when nobody listens; `None` for ever.
    fn patience(&self) -> Option<Duration> {
        match (self.request.is_some(), self.role) {
            (false, _) | (true, Role::Follower) => Some(Duration::ZERO),
            (true, Role::Owner) if self.prepared.background => None,
            (true, Role::Owner) => Some(Duration::from_millis(self.app.config.resume_grace_ms)),
        }
    }

    fn begin(&self) -> Result<Generation, ApiError> {
        let Prepared { served, request, prompt, constraint, special, .. } = &self.prepared;
        let cluster = self.app.cluster()?;
        let max = (request.max_tokens, request.max_tokens_param);
        let budget = token_budget(cluster.max_context_tokens, prompt.len(), max.0, max.1, "input")?;
        check_min_tokens(request.sampling.params.min_tokens, budget)?;
        let mut sampling = request.sampling.params.clone();
        sampling.grammar.clone_from(constraint);
        let spec = GenerationSpec {
            id: self.computed_as,
            adapter: served.adapter,
            prompts: vec![PromptSpec { tokens: prompt.as_slice().into(), max_new_tokens: budget }],
            n: 1,
            sampling,
            stop_strings: request.sampling.stop_strings.clone(),
            include_stop: request.sampling.include_stop,
            stop_tokens: request.sampling.stop_tokens.clone(),
            special: *special,
            start: TextStart::Beginning,
            priority: request.sampling.priority,
            kept: self.request.is_some(),
            resumed: self.is_known,
            traceparent: self.traceparent.clone(),
        };
        Generation::start(&self.app, &cluster, spec)
    }

    /// Tells the scheduler that the response has begun; beside the work, as nothing depends on when it hears.
    fn announce(&self) {
        if let Some(record) = self.record(None) {
            let scheduler = self.app.scheduler.clone();
            tokio::spawn(
                async move { scheduler.call(AdminRequest::Response(ResponseCall::Put(record))).await },
            );
        }
    }

    /// Stores what there is. Should this gateway be lost before, another one comes to the same.
    async fn store_answer(&self, id: RequestId, status: ResponseStatus, ended: &Ended, frames: &[Bytes]) {
        let (Some(blobs), Some(_)) = (self.app.responses.blobs(), self.request) else { return };
        let (Ended::With(object) | Ended::Failed(_, object)) = ended else { return };
        let bytes = stored::answer_bytes(object, frames);
        for attempt in 1..=ATTEMPTS_MAX {
            let stored = match blobs.put(&bytes).await {
                Ok(info) => {
                    let outcome = ResponseOutcome { status, answer: Some(info.id) };
                    let Some(record) = self.record(Some(outcome)) else { return };
                    let told =
                        self.app.scheduler.call(AdminRequest::Response(ResponseCall::Put(record))).await;
                    told.map(|_| ()).map_err(|error| error.to_string())
                }
                Err(error) => Err(error.to_string()),
            };
            match stored {
                Ok(()) => return,
                Err(reason) if attempt == ATTEMPTS_MAX => {
                    tracing::error!(%reason, response = %id, "an answer could not be stored");
                }
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        }
    }
}

/// Waits for a connection to the scheduler other than that of `epoch`.
async fn changed(
    link: &mut watch::Receiver<crate::scheduler_client::Link>,
    epoch: u64,
) -> Result<u64, watch::error::RecvError> {
    link.wait_for(|link| link.epoch != epoch).await.map(|link| link.epoch)
}

fn failure_of(error: &ApiError) -> RequestFailure {
    let kind = match error.status.as_u16() {
        429 => FailureKind::Overloaded,
        400..=499 => FailureKind::Invalid,
        _ => FailureKind::Unavailable,
    };
    RequestFailure { kind, message: error.message.clone(), retry_after_ms: None }
}

/// What serves a stored response: it is computed for whoever asked for it, whoever follows it now.
pub(super) fn of_record(app: &App, record: &ResponseRecord) -> Arc<App> {
    let keys = app.scheduler.link().keys;
    app.for_caller(Caller::of_response(record, keys.as_deref()), Arc::default())
}

/// A response in progress that nobody follows is taken up here; one that cannot be is over.
pub(super) async fn adopt(app: &Arc<App>, record: ResponseRecord) {
    let app = &of_record(app, &record);
    if app.responses.live(record.id, &app.caller).is_some() {
        return;
    }
    app.first_contact().await;
    let taken_up = match stored::prepared(app, &record).await {
        Ok(prepared) => {
            let request = Some(record.request);
            let (computed_as, role, traceparent) = (record.id, Role::Owner, None);
            let app = app.clone();
            let drive = Drive { app, prepared, role, request, computed_as, is_known: true, traceparent };
            drive.start(0).map(drop)
        }
        Err(error) => Err(error),
    };
    match taken_up {
        Ok(()) => tracing::info!(response = %record.id, "taking up a response that nobody follows"),
        // The scheduler offers it again.
        Err(error) if error.status.is_server_error() || error.status.as_u16() == 429 => {
            tracing::warn!(response = %record.id, %error, "a response cannot be taken up now");
        }
        Err(error) => {
            tracing::error!(response = %record.id, %error, "a response cannot be taken up: it has failed");
            let outcome = Some(ResponseOutcome { status: ResponseStatus::Failed, answer: None });
            let _ = app
                .scheduler
                .call(AdminRequest::Response(ResponseCall::Put(ResponseRecord { outcome, ..record })))
                .await;
        }
    }
}

/// Names a response that begins now.
pub(super) fn new_id() -> RequestId {
    RequestId(uuid::Uuid::new_v4().as_u128())
}
