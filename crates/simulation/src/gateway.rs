//! A gateway: the real transcripts, and clients that know what the model should say.

use crate::oracle;
use crate::owner::{Owner, Want};
use crate::plan::RequestLog;
use crate::process::{Action, Connection, Input, Message, Process, Purpose, Timer};
use crate::random::Random;
use ashlar_gateway::scheduler_client::Terms;
use ashlar_gateway::transcript::{Effect, End, TokenDecoder, Transcript, TranscriptEvent, TranscriptSpec};
use ashlar_protocol::access::Charge;
use ashlar_protocol::serving::{
    ChoiceId, FailureKind, FinishReason, FromScheduler, SCHEDULER_BEAT_MS, Submit, ToScheduler,
};
use ashlar_vocabulary::{AdapterId, KeyId, ModelDigest, RequestId, SamplingParams, TokenId};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// A scheduler that says nothing for this long is lost, in microseconds.
const SILENCE_US_MAX: u64 = 5 * SCHEDULER_BEAT_MS * 1_000;
/// How often a gateway looks whether it is.
const LISTEN_US: u64 = 250_000;

/// The model that everybody serves.
pub(crate) const DIGEST: ModelDigest = ModelDigest([9; 32]);

/// A client's request, and what becomes of it.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) arrival_us: u64,
    /// When its client goes away, if it does.
    pub(crate) departure_us: Option<u64>,
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) max_new_tokens: u32,
    /// Ends on the token that the model says at this index.
    pub(crate) stop_token_at: Option<usize>,
    /// Ends on the text of the token that the model says at this index.
    pub(crate) stop_string_at: Option<usize>,
    pub(crate) seed: u64,
    pub(crate) tenant_salt: u64,
    pub(crate) priority: i32,
    pub(crate) deadline_ms: u64,
    /// Whether its client comes back for it when the gateway is lost.
    pub(crate) kept: bool,
    /// What it is to be served with, if not with the model alone.
    pub(crate) want: Option<Want>,
    /// The adapter that it was promised when it arrived, and what that comes to.
    pub(crate) promise: Option<(AdapterId, u64)>,
    /// Tokens that the client has received.
    pub(crate) received: Vec<TokenId>,
    pub(crate) outcome: Option<Outcome>,
    /// Whether a gateway has taken it that was to keep it.
    pub(crate) begun: bool,
}

/// How a request ended for its client.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Outcome {
    Finished(FinishReason),
    Failed(FailureKind),
    ClientLeft,
    GatewayDied,
}

/// A gateway process. Its clients outlive it.
pub(crate) struct Gateway {
    number: usize,
    serving: Option<Connection>,
    /// When it last heard of the scheduler.
    heard_us: u64,
    /// Whether the scheduler has shown over this connection that it leads.
    greeted: bool,
    terms: Terms,
    transcripts: BTreeMap<ChoiceId, (usize, Transcript<Decoder>)>,
    pub(crate) requests: Vec<Request>,
    /// Requests whose clients have come back before the gateway knew of any model.
    resuming: Vec<usize>,
    /// Who wants something trained.
    owner: Option<Owner>,
    /// What is written down of each request, where somebody wants to know.
    logs: Option<Vec<RequestLog>>,
}

struct Decoder;

fn text_of(token: TokenId) -> String {
    format!("<{token}>")
}

impl TokenDecoder for Decoder {
    fn push(&mut self, token: TokenId) -> String {
        text_of(token)
    }

    fn finish(&mut self) -> String {
        String::new()
    }
}

impl Request {
    /// One without anything unusual.
    pub(crate) fn plain(
        arrival_us: u64,
        prompt: Vec<TokenId>,
        max_new_tokens: u32,
        deadline_ms: u64,
    ) -> Request {
        Request {
            arrival_us,
            departure_us: None,
            seed: u64::from(prompt.first().copied().unwrap_or_default()),
            prompt,
            max_new_tokens,
            stop_token_at: None,
            stop_string_at: None,
            tenant_salt: 0,
            priority: 0,
            deadline_ms,
            kept: false,
            want: None,
            promise: None,
            received: Vec::new(),
            outcome: None,
            begun: false,
        }
    }

    fn continuation(&self) -> Vec<TokenId> {
        let adapter = self.promise.map(|(_, digest)| digest);
        oracle::continuation(&self.prompt, adapter, self.seed, self.max_new_tokens as usize)
    }

    /// All tokens that the client should receive.
    fn expected(&self) -> (Vec<TokenId>, FinishReason) {
        let mut tokens = self.continuation();
        let stops = [self.stop_token_at, self.stop_string_at];
        let stops = stops.iter().flatten().filter_map(|&at| tokens.get(at).copied());
        let first = stops.filter_map(|stop| tokens.iter().position(|token| *token == stop)).min();
        match first {
            Some(at) => {
                tokens.truncate(at);
                (tokens, FinishReason::Stop)
            }
            None => (tokens, FinishReason::Length),
        }
    }

    /// As it is submitted at `now_us`, when `forced` has been received.
    fn submit(&self, now_us: u64, id: ChoiceId, forced: Vec<TokenId>) -> Message {
        let waited_ms = now_us.saturating_sub(self.arrival_us) / 1_000;
        // Tenants ask on their own account.
        let charge = (self.tenant_salt > 0).then_some(Charge {
            key: KeyId(self.tenant_salt),
            requests: 1,
            prompt_tokens: self.prompt.len() as u32,
            resumed: !forced.is_empty(),
        });
        let submit = Submit {
            adapter: self.promise.map(|(adapter, _)| adapter),
            id,
            model_digest: DIGEST,
            prompt: self.prompt.clone(),
            forced,
            max_new_tokens: self.max_new_tokens,
            stop_tokens: self.stop_at(self.stop_token_at).into_iter().collect(),
            sampling: SamplingParams { seed: self.seed, ..SamplingParams::default() },
            tenant_salt: self.tenant_salt,
            charge,
            priority: self.priority,
            deadline_ms: self.deadline_ms.saturating_sub(waited_ms).max(1),
            forced_logprobs: Vec::new(),
            kept: self.kept,
            traceparent: None,
        };
        Message::ToScheduler(ToScheduler::Submit(Box::new(submit)))
    }

    fn stop_at(&self, at: Option<usize>) -> Option<TokenId> {
        at.and_then(|at| self.continuation().get(at).copied())
    }

    /// Whether what the client received is what the model says.
    fn verify(&self) -> Result<(), String> {
        let (expected, reason) = self.expected();
        if !expected.starts_with(&self.received) {
            return Err(format!("received {:?}, the model says {expected:?}", self.received));
        }
        if let Some(Outcome::Finished(finished)) = self.outcome
            && (finished, self.received.len()) != (reason, expected.len())
        {
            return Err(format!(
                "finished as {finished:?} after {} tokens, should be {reason:?} after {}",
                self.received.len(),
                expected.len()
            ));
        }
        Ok(())
    }
}

impl Gateway {
    pub(crate) fn new(number: usize, requests: Vec<Request>, owner: Option<Owner>) -> Gateway {
        Gateway {
            number,
            serving: None,
            heard_us: 0,
            greeted: false,
            terms: Terms::default(),
            transcripts: BTreeMap::new(),
            requests,
            resuming: Vec::new(),
            owner,
            logs: None,
        }
    }

    /// A gateway that writes down what becomes of its requests.
    pub(crate) fn logging(number: usize) -> Gateway {
        Gateway { logs: Some(Vec::new()), ..Gateway::new(number, Vec::new(), None) }
    }

    /// Whether owners have asked for everything, and were answered.
    pub(crate) fn is_content(&self) -> bool {
        self.owner.as_ref().is_none_or(Owner::is_content)
    }

    /// What a kill leaves: the clients, whose requests in progress are over.
    pub(crate) fn killed(&self, now_us: u64) -> Gateway {
        let (mut requests, mut logs) = (self.requests.clone(), self.logs.clone());
        for (index, transcript) in self.transcripts.values() {
            let lost = requests.get_mut(*index).filter(|request| !request.kept);
            if let (Some(request), false) = (lost, transcript.ended()) {
                request.outcome.get_or_insert(Outcome::GatewayDied);
                let log = logs.as_mut().and_then(|logs| logs.get_mut(*index));
                log.into_iter().for_each(|log| log.end(Outcome::GatewayDied, now_us));
            }
        }
        Gateway { logs, ..Gateway::new(self.number, requests, self.owner.as_ref().map(Owner::killed)) }
    }

    pub(crate) fn handle(
        &mut self,
        now_us: u64,
        input: Input,
        random: &mut Random,
        actions: &mut Vec<Action>,
    ) -> Result<(), String> {
        match input {
            Input::Timer(Timer::Start) => {
                self.reach_scheduler(actions);
                actions.push(Action::Wake { after_us: LISTEN_US, timer: Timer::Listen });
                self.owner.iter().for_each(|owner| owner.start(now_us, actions));
                for (index, request) in self.requests.iter().enumerate() {
                    if let Some(after_us) = request.arrival_us.checked_sub(now_us) {
                        actions.push(Action::Wake { after_us, timer: Timer::Arrival(index) });
                    } else if request.outcome.is_none() {
                        // It came while no gateway was there: nobody took it.
                        actions.push(Action::Wake { after_us: 0, timer: Timer::Arrival(index) });
                    }
                }
            }
            Input::Timer(Timer::Reconnect) if self.serving.is_none() => self.reach_scheduler(actions),
            Input::Timer(Timer::Arrival(index)) => self.arrival(now_us, index, actions)?,
            Input::Timer(Timer::Departure(index)) => {
                let id = self.id(index);
                self.feed(now_us, id, TranscriptEvent::ClientGone, actions)?;
            }
            Input::Timer(Timer::Plan(index)) => {
                let serving = self.serving;
                self.owner.iter_mut().for_each(|owner| owner.due(index, serving, actions));
            }
            Input::Timer(Timer::Prepared(job)) => {
                self.owner.iter().for_each(|owner| owner.prepared(job, self.serving, actions));
            }
            Input::Timer(Timer::Listen) => {
                actions.push(Action::Wake { after_us: LISTEN_US, timer: Timer::Listen });
                if let Some(serving) = self.serving.filter(|_| now_us > self.heard_us + SILENCE_US_MAX) {
                    actions.push(Action::Close(serving));
                    self.disconnected(random, actions);
                }
            }
            Input::Timer(_) => {}
            Input::Opened { connection, .. } => {
                (self.serving, self.greeted, self.heard_us) = (Some(connection), false, now_us);
            }
            Input::Refused(_) => self.try_again(random, actions),
            Input::Message(connection, Message::FromScheduler(message)) => {
                if self.serving == Some(connection) {
                    self.heard_us = now_us;
                    self.hear(now_us, connection, message, random, actions)?;
                }
            }
            Input::Message(..) | Input::Answered(..) => {
                return Err("a gateway received a foreign message".to_owned());
            }
            Input::Closed(connection) if self.serving == Some(connection) => {
                self.disconnected(random, actions);
            }
            Input::Closed(_) => {}
        }
        Ok(())
    }

    /// Verifies every client, once all is over: each request has ended, and with what the model says.
    pub(crate) fn verify_all(&self) -> Result<(), String> {
        for (index, request) in self.requests.iter().enumerate() {
            let label = || format!("gateway {} request {index}", self.number);
            request.verify().map_err(|why| format!("{}: {why}", label()))?;
            if request.outcome.is_none() {
                return Err(format!("{} never ended", label()));
            }
        }
        Ok(())
    }

    /// Takes a request in that arrives later; the timer is the world's. Its index.
    pub(crate) fn expect(&mut self, request: Request) -> usize {
        let log = RequestLog {
            arrival_us: request.arrival_us,
            prompt_tokens: request.prompt.len(),
            ..RequestLog::default()
        };
        self.logs.iter_mut().for_each(|logs| logs.push(log.clone()));
        self.requests.push(request);
        self.requests.len() - 1
    }

    /// What it has written down.
    pub(crate) fn logs(&self) -> &[RequestLog] {
        self.logs.as_deref().unwrap_or_default()
    }

    fn id(&self, index: usize) -> ChoiceId {
        ChoiceId { request: RequestId(((self.number as u128) << 64) | index as u128), choice: 0 }
    }

    /// Whether it knows of a scheduler that leads.
    pub(crate) fn is_connected(&self) -> bool {
        self.serving.is_some() && self.greeted
    }

    fn reach_scheduler(&self, actions: &mut Vec<Action>) {
        actions.push(Action::Connect { to: Process::Scheduler, purpose: Purpose::Serving });
    }

    fn try_again(&self, random: &mut Random, actions: &mut Vec<Action>) {
        actions.push(Action::Wake { after_us: random.between(20_000, 200_000), timer: Timer::Reconnect });
    }

    fn arrival(&mut self, now_us: u64, index: usize, actions: &mut Vec<Action>) -> Result<(), String> {
        let id = self.id(index);
        let Some(request) = self.requests.get_mut(index) else { return Ok(()) };
        if self.terms == Terms::default() && (request.begun || self.logs.is_some()) {
            self.resuming.push(index);
            return Ok(());
        }
        if self.terms == Terms::default() {
            // It knows of no model yet.
            request.outcome = Some(Outcome::Failed(FailureKind::Unavailable));
            return Ok(());
        }
        // A name is turned into what it stands for once, when the request begins.
        if let (Some(want), Some(owner), false) = (&request.want, &self.owner, request.begun) {
            request.promise = owner.promise(want)?;
        }
        request.begun = request.kept;
        // Whoever comes back hears everything again.
        request.received.clear();
        let stop_tokens: Vec<TokenId> = request.stop_at(request.stop_token_at).into_iter().collect();
        let stop_strings = request.stop_at(request.stop_string_at).map(text_of).into_iter().collect();
        let spec = TranscriptSpec {
            id,
            prompt: Arc::from(request.prompt.as_slice()),
            stop_strings,
            include_stop: false,
            stop_tokens,
            min_tokens: 0,
            keep_logprobs: request.kept,
        };
        if let Some(departure) = request.departure_us {
            let after_us = departure.saturating_sub(now_us);
            actions.push(Action::Wake { after_us, timer: Timer::Departure(index) });
        }
        if let Some(log) = self.logs.as_mut().and_then(|logs| logs.get_mut(index)) {
            log.expected = request.continuation();
        }
        let transcript = Transcript::new(Duration::from_micros(now_us), spec, Decoder);
        let submit = request.submit(now_us, id, Vec::new());
        self.transcripts.insert(id, (index, transcript));
        // Without a scheduler it waits for one.
        actions.extend(self.serving.map(|serving| Action::Send(serving, submit)));
        Ok(())
    }

    fn hear(
        &mut self,
        now_us: u64,
        connection: Connection,
        message: FromScheduler,
        random: &mut Random,
        actions: &mut Vec<Action>,
    ) -> Result<(), String> {
        match message {
            FromScheduler::Cluster(snapshot) => {
                if let Err(term) = self.terms.hear(snapshot.term) {
                    let refusal = ToScheduler::Refused { term };
                    actions.push(Action::Send(connection, Message::ToScheduler(refusal)));
                    // It hears this and ends every connection: closing here would outrun the message.
                    self.disconnected(random, actions);
                    return Ok(());
                }
                self.owner.iter_mut().for_each(|owner| owner.views.clone_from(&snapshot.adapters));
                for index in std::mem::take(&mut self.resuming) {
                    self.arrival(now_us, index, actions)?;
                }
                if !std::mem::replace(&mut self.greeted, true) {
                    let open: Vec<ChoiceId> = self.transcripts.keys().copied().collect();
                    for id in open {
                        self.feed(now_us, id, TranscriptEvent::SchedulerBack, actions)?;
                    }
                }
                Ok(())
            }
            FromScheduler::Admin { call, reply } => {
                let owner = self.owner.as_mut();
                owner.map_or(Ok(()), |owner| owner.replied(call, &reply, actions))
            }
            FromScheduler::Prepare(job) => {
                let id = job.request.id;
                self.owner.iter().for_each(|owner| owner.prepare(id, random, actions));
                Ok(())
            }
            FromScheduler::Tokens(history) => {
                let id = history.id;
                let mut events = history.into_events().map(TranscriptEvent::Token);
                events.try_for_each(|event| self.feed(now_us, id, event, actions))
            }
            message => match TranscriptEvent::of(message) {
                Some((id, event)) => self.feed(now_us, id, event, actions),
                None => Ok(()),
            },
        }
    }

    fn disconnected(&mut self, random: &mut Random, actions: &mut Vec<Action>) {
        self.serving = None;
        self.try_again(random, actions);
        self.owner.iter_mut().for_each(|owner| owner.disconnected(actions));
    }

    /// Gives an event to a transcript and performs what it wants.
    fn feed(
        &mut self,
        now_us: u64,
        id: ChoiceId,
        event: TranscriptEvent,
        actions: &mut Vec<Action>,
    ) -> Result<(), String> {
        let Some((index, transcript)) = self.transcripts.get_mut(&id) else { return Ok(()) };
        let index = *index;
        let Some(request) = self.requests.get_mut(index) else { return Ok(()) };
        let mut log = self.logs.as_mut().and_then(|logs| logs.get_mut(index));
        if event == TranscriptEvent::ClientGone && !transcript.ended() {
            request.outcome = Some(Outcome::ClientLeft);
        }
        let mut effects = Vec::new();
        transcript.handle(Duration::from_micros(now_us), event, &mut effects);
        for effect in effects {
            match effect {
                Effect::Deliver(delta) => {
                    request.received.extend(delta.tokens.iter().map(|token| token.token));
                    log.iter_mut().for_each(|log| log.delivered(delta.tokens.len(), now_us));
                }
                Effect::Cancel => {
                    let cancel = Message::ToScheduler(ToScheduler::Cancel(id));
                    actions.extend(self.serving.map(|serving| Action::Send(serving, cancel)));
                }
                Effect::Resubmit { forced } => {
                    let submit = request.submit(now_us, id, forced);
                    actions.extend(self.serving.map(|serving| Action::Send(serving, submit)));
                }
                Effect::End(End::Finished { reason, .. }) => {
                    request.outcome = Some(Outcome::Finished(reason));
                }
                Effect::End(End::Failed(failure)) => {
                    // Nobody is refused because something died. An adapter may prove not to be loadable.
                    let ours = match failure.kind {
                        // Repairs may take longer than requests wait.
                        FailureKind::Unavailable => request.promise.is_none() && log.is_none(),
                        FailureKind::Internal | FailureKind::Suspect | FailureKind::Leaving => true,
                        _ => false,
                    };
                    if ours {
                        return Err(format!("request {index} failed by our fault: {}", failure.message));
                    }
                    request.outcome = Some(Outcome::Failed(failure.kind));
                }
            }
        }
        if transcript.ended() {
            self.transcripts.remove(&id);
        }
        if let Some(log) = log {
            if let Some(outcome) = &request.outcome {
                log.end(outcome.clone(), now_us);
            }
            return log.verify(&request.received).map_err(|why| format!("gateway {}: {why}", self.number));
        }
        request.verify().map_err(|why| format!("gateway {}: {why}", self.number))
    }
}
