//! The actor: connect, relay, and when the connection ends connect again. What is in flight stays in flight.

use super::{CallAnswer, CallError, Command, EventSender, Link, SchedulerClientSettings, Terms};
use crate::access::KeyTable;
use crate::transcript::TranscriptEvent;
use ashlar_identity::stream::{ReadHalf, Stream, WriteHalf};
use ashlar_identity::{Role, Transport};
use ashlar_protocol::admin::JobError;
use ashlar_protocol::frame::{self, FrameError};
use ashlar_protocol::models::ModelsView;
use ashlar_protocol::serving::{
    ChoiceId, ClusterSnapshot, CompareAdapters, FromScheduler, PrepareJob, SCHEDULER_BEAT_MS, ToScheduler,
};
use ashlar_service_kit::Retries;
use ashlar_vocabulary::LeaseTerm;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::task::JoinSet;

/// Longest wait for a refused scheduler to read why.
const LAST_WORD_TIMEOUT: Duration = Duration::from_secs(1);
/// Messages that may wait for a scheduler that does not read.
const OUTBOX_MESSAGES_MAX: usize = 8_192;
const INBOX_MESSAGES_MAX: usize = 256;
/// A scheduler that says nothing for this long is lost.
const SILENCE_MAX: Duration = Duration::from_millis(5 * SCHEDULER_BEAT_MS);
const RECONNECT_MIN: Duration = Duration::from_millis(20);

pub(super) struct Actor {
    settings: SchedulerClientSettings,
    commands: mpsc::UnboundedReceiver<Command>,
    publish: watch::Sender<Link>,
    in_flight: HashMap<ChoiceId, InFlight>,
    calls: HashMap<u64, CallAnswer>,
    last_call: u64,
    terms: Terms,
    /// Deployed models of which the scheduler has told before its first snapshot.
    models: Option<Arc<ModelsView>>,
    /// Since when there is no scheduler.
    lost: Option<Instant>,
    /// Of connecting; each is to the next address.
    retries: Retries,
}

struct InFlight {
    events: EventSender,
    _permit: OwnedSemaphorePermit,
}

/// An open connection: a task per direction, because reading a frame must not be interrupted.
struct Connection {
    inbound: mpsc::Receiver<Result<FromScheduler, FrameError>>,
    outbound: mpsc::Sender<ToScheduler>,
    outbox: VecDeque<ToScheduler>,
    _reader: JoinSet<()>,
    writer: JoinSet<()>,
}

/// What a connection waits for.
enum Happened {
    Command(Option<Command>),
    Message(Option<Result<FromScheduler, FrameError>>),
}

/// Why a connection was given up.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("cannot reach the scheduler at {address}: {reason}")]
    Connect { address: String, reason: String },
    #[error("lost the scheduler: {0}")]
    Frame(#[from] FrameError),
    #[error("the scheduler says nothing: it is hung, stopped, or cut off")]
    Silent,
    #[error("the scheduler does not read: {OUTBOX_MESSAGES_MAX} messages are waiting for it")]
    OutboxFull,
    #[error("the scheduler's term {theirs} is over, term {seen} has been seen")]
    StaleTerm { theirs: LeaseTerm, seen: LeaseTerm },
}

impl Actor {
    pub(super) fn new(
        settings: SchedulerClientSettings,
        commands: mpsc::UnboundedReceiver<Command>,
        publish: watch::Sender<Link>,
    ) -> Actor {
        let retries = Retries::new(settings.addresses.clone(), RECONNECT_MIN, settings.reconnect_max);
        Actor {
            settings,
            commands,
            publish,
            in_flight: HashMap::new(),
            calls: HashMap::new(),
            last_call: 0,
            terms: Terms::default(),
            models: None,
            lost: Some(Instant::now()),
            retries,
        }
    }

    /// Runs until every handle is gone.
    pub(super) async fn run(mut self) {
        let mut last_problem = String::new();
        loop {
            let problem = match self.connect().await {
                Ok(Some(connection)) => {
                    last_problem.clear();
                    self.retries.succeeded();
                    match self.relay(connection).await {
                        Some(error) => error.to_string(),
                        None => return,
                    }
                }
                Ok(None) => return,
                Err(error) => error.to_string(),
            };
            self.disconnected(&problem);
            let pause = self.retries.over();
            if problem != last_problem {
                tracing::warn!(%problem, "no scheduler; trying again");
                last_problem = problem;
            }
            if !self.keep_until(tokio::time::sleep(pause)).await {
                return;
            }
        }
    }

    /// Connects and greets, keeping choices meanwhile; `None` when every handle is gone.
    async fn connect(&mut self) -> Result<Option<Connection>, LinkError> {
        let address = self.retries.address().to_owned();
        let patience = self.retries.patience();
        let transport = self.settings.transport.clone();
        let (done, mut socket) = tokio::sync::oneshot::channel();
        let attempt = async move {
            let _ = done.send(tokio::time::timeout(patience, open(&address, &transport)).await);
        };
        if !self.keep_until(attempt).await {
            return Ok(None);
        }
        match socket.try_recv() {
            Ok(Ok(Ok(socket))) => Ok(Some(Connection::start(socket))),
            Ok(Ok(Err(error))) => Err(self.connect_error(error.to_string())),
            _ => Err(self.connect_error(format!("no answer within {} ms", patience.as_millis()))),
        }
    }

    fn connect_error(&self, reason: String) -> LinkError {
        LinkError::Connect { address: self.retries.address().to_owned(), reason }
    }

    /// Drives `until`, keeping choices as they come and refusing calls; false when every handle is gone.
    async fn keep_until(&mut self, until: impl Future<Output = ()>) -> bool {
        tokio::pin!(until);
        loop {
            tokio::select! {
                () = &mut until => return true,
                command = self.commands.recv() => match command {
                    None => return false,
                    Some(Command::Resubmit(_) | Command::Prepared { .. } | Command::Compared { .. }) => {}
                    Some(Command::Submit { submit, events, permit }) => {
                        self.in_flight.insert(submit.id, InFlight { events, _permit: permit });
                    }
                    Some(Command::Cancel(id)) => {
                        self.in_flight.remove(&id);
                    }
                    Some(Command::Call { answer, .. }) => {
                        let problem = self.publish.borrow().problem.clone();
                        let _ = answer.send(Err(CallError::Unavailable(problem)));
                    }
                },
            }
        }
    }

    /// Relays both ways until the connection ends; `None` when every handle is gone.
    async fn relay(&mut self, mut connection: Connection) -> Option<LinkError> {
        let mut silent_at = tokio::time::Instant::now() + SILENCE_MAX;
        loop {
            let has_mail = !connection.outbox.is_empty();
            let happened = tokio::select! {
                command = self.commands.recv() => Happened::Command(command),
                message = tokio::time::timeout_at(silent_at, connection.inbound.recv()) => match message {
                    Ok(message) => {
                        silent_at = tokio::time::Instant::now() + SILENCE_MAX;
                        Happened::Message(message)
                    }
                    Err(_) => return Some(LinkError::Silent),
                },
                sent = connection.outbound.reserve(), if has_mail => match sent {
                    Ok(permit) => {
                        if let Some(message) = connection.outbox.pop_front() {
                            permit.send(message);
                        }
                        continue;
                    }
                    Err(_) => Happened::Message(None),
                },
            };
            let done = match happened {
                Happened::Command(None) => return None,
                Happened::Command(Some(command)) => self.command(command, &mut connection),
                Happened::Message(None) => Err(LinkError::Frame(FrameError::Closed)),
                Happened::Message(Some(Err(error))) => Err(LinkError::Frame(error)),
                Happened::Message(Some(Ok(message))) => self.message(message, &mut connection),
            };
            if let Err(error) = done {
                if let LinkError::StaleTerm { seen: term, .. } = error {
                    connection.close_with(ToScheduler::Refused { term }).await;
                }
                return Some(error);
            }
        }
    }

    fn command(&mut self, command: Command, connection: &mut Connection) -> Result<(), LinkError> {
        match command {
            Command::Submit { submit, events, permit } => {
                self.in_flight.insert(submit.id, InFlight { events, _permit: permit });
                connection.post(ToScheduler::Submit(submit))
            }
            Command::Resubmit(submit) if self.in_flight.contains_key(&submit.id) => {
                connection.post(ToScheduler::Submit(submit))
            }
            Command::Resubmit(_) => Ok(()),
            Command::Cancel(id) => match self.in_flight.remove(&id) {
                Some(_) => connection.post(ToScheduler::Cancel(id)),
                None => Ok(()),
            },
            Command::Call { tenant, request, answer } => {
                // Those that nobody waits for any more go with the next one.
                self.calls.retain(|_, waiting| !waiting.is_closed());
                self.last_call += 1;
                self.calls.insert(self.last_call, answer);
                connection.post(ToScheduler::Admin { call: self.last_call, tenant, request })
            }
            Command::Prepared { job, outcome } => connection.post(ToScheduler::Prepared { job, outcome }),
            Command::Compared { job, outcome } => connection.post(ToScheduler::Compared { job, outcome }),
        }
    }

    /// Hands a job on to whoever validates its files, or says why nobody does.
    fn prepare(&mut self, job: Box<PrepareJob>, connection: &mut Connection) -> Result<(), LinkError> {
        let id = job.request.id;
        let message = match &self.settings.jobs {
            None => "this gateway has no blob store: set `blobs` in the configuration of every role",
            Some(jobs) => match jobs.try_send(job) {
                Ok(()) => return Ok(()),
                Err(_) => "too many jobs wait to be validated: create this one again later",
            },
        };
        let error = JobError { code: "server_error".to_owned(), message: message.to_owned(), param: None };
        connection.post(ToScheduler::Prepared { job: id, outcome: Box::new(Err(error)) })
    }

    /// Hands a comparison on to whoever makes it, or says why nobody does.
    fn compare(&mut self, asked: Box<CompareAdapters>, connection: &mut Connection) -> Result<(), LinkError> {
        let job = asked.job;
        let message = match &self.settings.comparisons {
            None => "this gateway has no blob store: set `blobs` in the configuration of every role",
            Some(comparisons) => match comparisons.try_send(asked) {
                Ok(()) => return Ok(()),
                Err(_) => "too many adapters wait to be compared with what is served",
            },
        };
        connection.post(ToScheduler::Compared { job, outcome: Box::new(Err(message.to_owned())) })
    }

    fn message(&mut self, message: FromScheduler, connection: &mut Connection) -> Result<(), LinkError> {
        match message {
            FromScheduler::Cluster(snapshot) => self.cluster(*snapshot),
            FromScheduler::Models(models) => {
                self.models(Arc::new(*models));
                Ok(())
            }
            FromScheduler::Keys(keys) => {
                let keys = Some(Arc::new(KeyTable::new(keys)));
                self.publish.send_modify(|link| link.keys = keys);
                Ok(())
            }
            FromScheduler::Admin { call, reply } => {
                if let Some(answer) = self.calls.remove(&call) {
                    let _ = answer.send(Ok(*reply));
                }
                Ok(())
            }
            FromScheduler::Prepare(job) => self.prepare(job, connection),
            FromScheduler::Compare(asked) => self.compare(asked, connection),
            FromScheduler::Adopt(response) => {
                // One that is not taken up is offered again.
                let _ = self.settings.adoptions.as_ref().map(|adoptions| adoptions.try_send(response));
                Ok(())
            }
            FromScheduler::Tokens(history) => {
                let id = history.id;
                let mut events = history.into_events().map(TranscriptEvent::Token);
                events.try_for_each(|event| self.relay_to_choice(id, event, connection))
            }
            message => match TranscriptEvent::of(message) {
                Some((id, event)) => self.relay_to_choice(id, event, connection),
                None => Ok(()),
            },
        }
    }

    fn relay_to_choice(
        &mut self,
        id: ChoiceId,
        event: TranscriptEvent,
        connection: &mut Connection,
    ) -> Result<(), LinkError> {
        let last = event.is_last();
        let Some(in_flight) = self.in_flight.get(&id) else { return Ok(()) };
        let delivered = in_flight.events.try_send((id, event)).is_ok();
        if delivered && !last {
            return Ok(());
        }
        self.in_flight.remove(&id);
        if delivered || last {
            return Ok(());
        }
        tracing::info!(request = %id.request, choice = id.choice, "client reads too slowly; dropped");
        connection.post(ToScheduler::Cancel(id))
    }

    fn cluster(&mut self, snapshot: ClusterSnapshot) -> Result<(), LinkError> {
        let stale = |seen| LinkError::StaleTerm { theirs: snapshot.term, seen };
        self.terms.hear(snapshot.term).map_err(stale)?;
        // The first snapshot over a connection makes it one that is used.
        let new = self.lost.take().is_some();
        let models = self.models.take().or(new.then(Arc::default));
        self.publish.send_modify(|link| {
            (link.connected, link.given_up) = (true, false);
            link.cluster = Some(Arc::new(snapshot));
            if let Some(models) = models {
                link.models = models;
            }
            link.problem.clear();
            link.epoch += u64::from(new);
        });
        Ok(())
    }

    fn models(&mut self, models: Arc<ModelsView>) {
        match self.lost {
            // What they were with the scheduler before stands until all is known of this one.
            Some(_) => self.models = Some(models),
            None => self.publish.send_modify(|link| link.models = models),
        }
    }

    fn disconnected(&mut self, problem: &str) {
        self.models = None;
        let given_up = self.lost.get_or_insert_with(Instant::now).elapsed() >= self.settings.patience;
        self.publish.send_modify(|link| {
            (link.connected, link.given_up) = (false, given_up);
            link.problem = problem.to_owned();
        });
        for (_, answer) in self.calls.drain() {
            let _ = answer.send(Err(CallError::Unavailable(problem.to_owned())));
        }
    }
}

impl Connection {
    fn start(socket: Stream) -> Connection {
        let (read, write) = socket.into_split();
        let (inbound_sender, inbound) = mpsc::channel(INBOX_MESSAGES_MAX);
        let (outbound, outbound_receiver) = mpsc::channel(1);
        let (mut reader, mut writer) = (JoinSet::new(), JoinSet::new());
        reader.spawn(read_messages(read, inbound_sender));
        writer.spawn(write_messages(write, outbound_receiver));
        Connection { inbound, outbound, outbox: VecDeque::new(), _reader: reader, writer }
    }

    /// Sends one more message, if the other side still reads, and closes.
    async fn close_with(self, message: ToScheduler) {
        let Connection { outbound, mut writer, .. } = self;
        let last = async {
            let _ = outbound.send(message).await;
            drop(outbound);
            writer.join_next().await;
        };
        let _ = tokio::time::timeout(LAST_WORD_TIMEOUT, last).await;
    }

    fn post(&mut self, message: ToScheduler) -> Result<(), LinkError> {
        if self.outbox.len() >= OUTBOX_MESSAGES_MAX {
            return Err(LinkError::OutboxFull);
        }
        self.outbox.push_back(message);
        Ok(())
    }
}

async fn open(address: &str, transport: &Transport) -> Result<Stream, FrameError> {
    let socket = TcpStream::connect(address).await?;
    // Token events are small and late ones are useless: never wait to fill a segment.
    frame::tune(&socket)?;
    let mut socket = transport.connect(socket, Role::Scheduler).await?;
    frame::greet(&mut socket, "gateway").await?;
    Ok(socket)
}

async fn read_messages(socket: ReadHalf, sender: mpsc::Sender<Result<FromScheduler, FrameError>>) {
    let mut socket = tokio::io::BufReader::new(socket);
    loop {
        let message = frame::read(&mut socket).await;
        let failed = message.is_err();
        if sender.send(message).await.is_err() || failed {
            return;
        }
    }
}

async fn write_messages(mut socket: WriteHalf, mut messages: mpsc::Receiver<ToScheduler>) {
    while let Some(message) = messages.recv().await {
        if frame::write(&mut socket, &message).await.is_err() {
            return;
        }
    }
}
