//! The sessions of a node: opened with links of their own and a state, given work, and ended, by the rules that a real
//! rank's session has. A step's passes are in [`pass`].

mod pass;

use crate::durable::{Answer, Refusal, Wish};
use crate::node::number_of;
use crate::process::{Action, Connection, Errand, Process, Purpose, Timer};
use crate::weights::{self, Content, LAYERS, Numbers, PARTS, RUNS, Share};
use ashlar_protocol::data::{LinkHello, LinkPurpose, TrainingLink};
use ashlar_protocol::membership::Assignment;
use ashlar_protocol::training::{ExportedFile, OpenSession, SessionStart, TrainingReport, TrainingWork};
use ashlar_vocabulary::{AdapterId, BlobId, SessionId};
use pass::Doing;
use std::collections::{BTreeMap, VecDeque};

/// How long links may take to stand.
const LINKS_US_MAX: u64 = 60_000_000;
/// How long the scheduler may take to close a session that another rank has left.
const CLOSING_US: u64 = 1_000_000;
/// Links that wait for a session that this rank has not been told of.
const WAITING_MAX: usize = 32;
/// The files of an adapter.
const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// What travels between the ranks of a session.
#[derive(Debug, Clone)]
pub(crate) enum Payload {
    /// Rows on their way to the next stage.
    Rows { step: u64, rows: Vec<u64> },
    /// Their gradients on the way back.
    Gradient { step: u64, rows: Vec<u64> },
    /// A replica's gradients of the weights.
    Sum { step: u64, gradients: Numbers },
}

/// All sessions of a rank.
pub(crate) struct Sessions {
    /// How long a pass through this rank's layers takes.
    pass_us: u64,
    open: BTreeMap<SessionId, Session>,
    waiting: VecDeque<(SessionId, TrainingLink, Connection)>,
    /// What is to be told to the scheduler.
    reports: Vec<(SessionId, TrainingReport)>,
}

/// One session.
pub(crate) struct Session {
    open: OpenSession,
    share: Share,
    links: Links,
    /// Shards to start from: those that have come.
    shards: Vec<Option<Content>>,
    state: Numbers,
    steps: u64,
    works: VecDeque<TrainingWork>,
    doing: Doing,
    /// What has come from other ranks, who may be ahead.
    rows: VecDeque<(u64, Vec<u64>)>,
    gradients: VecDeque<(u64, Vec<u64>)>,
    sums: VecDeque<(u64, Numbers)>,
}

/// Connections of a session, and which there have to be.
struct Links {
    first: bool,
    last: bool,
    alone: bool,
    previous: Option<Connection>,
    next: Option<Connection>,
    peer: Option<Connection>,
}

/// Why a session ends.
pub(crate) enum End {
    /// The scheduler hears of it.
    Failed { message: String, retry: bool },
    /// Something that must never happen.
    Violation(String),
}

fn lost(what: &str) -> End {
    End::Failed { message: what.to_owned(), retry: true }
}

fn violation(what: impl Into<String>) -> End {
    End::Violation(what.into())
}

impl Links {
    fn all(&self) -> impl Iterator<Item = Connection> {
        [self.previous, self.next, self.peer].into_iter().flatten()
    }

    fn stand(&self) -> bool {
        (self.first || self.previous.is_some())
            && (self.last || self.next.is_some())
            && (self.alone || self.peer.is_some())
    }

    fn place_of(&mut self, link: TrainingLink) -> Option<&mut Option<Connection>> {
        match link {
            TrainingLink::Stage => Some(&mut self.previous),
            TrainingLink::Replica { .. } => Some(&mut self.peer),
            TrainingLink::Group { .. } => None,
        }
    }
}

impl Sessions {
    pub(crate) fn new(pass_us: u64) -> Sessions {
        Sessions { pass_us, open: BTreeMap::new(), waiting: VecDeque::new(), reports: Vec::new() }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.open.len()
    }

    /// What there is to say to the scheduler.
    pub(crate) fn take_reports(&mut self) -> Vec<(SessionId, TrainingReport)> {
        std::mem::take(&mut self.reports)
    }

    /// Opens a session on a rank that has taken `place`.
    pub(crate) fn open(
        &mut self,
        open: OpenSession,
        place: Option<&Assignment>,
        actions: &mut Vec<Action>,
    ) -> Result<(), String> {
        let id = open.session;
        if self.open.contains_key(&id) {
            return Ok(());
        }
        let Some(place) = place.filter(|place| place.revision == open.revision) else {
            let message = "this rank has left the layout that the session is for".to_owned();
            self.reports.push((id, TrainingReport::Failed { message, retry: true }));
            return Ok(());
        };
        if open.replicas > 2 {
            return Err("more than two replicas train together: the simulation knows one peer".to_owned());
        }
        let rank = place.tensor_rank.0 as usize;
        let parts = PARTS / place.tensor_parallel_size as usize;
        let runs = RUNS / open.replicas as usize;
        let share = Share {
            layers: place.layers.start..place.layers.end,
            parts: rank * parts..(rank + 1) * parts,
            runs: open.replica as usize * runs..(open.replica as usize + 1) * runs,
        };
        let links = Links {
            first: place.stage.0 == 0,
            last: open.next.is_none(),
            alone: open.replicas == 1,
            previous: None,
            next: None,
            peer: None,
        };
        let connect = |address: Option<&String>, link| {
            let to = address.and_then(|address| number_of(address)).map(Process::Node);
            let purpose = Purpose::Link(open.revision, LinkPurpose::Training { session: id, link });
            to.map(|to| Action::Connect { to, purpose })
        };
        actions.extend(connect(open.next.as_ref(), TrainingLink::Stage));
        if open.replica > 0 {
            actions.extend(connect(open.peers.first(), TrainingLink::Replica { replica: open.replica }));
        }
        let mut session = Session {
            share,
            links,
            shards: Vec::new(),
            state: Numbers::new(),
            steps: 0,
            works: VecDeque::new(),
            doing: Doing::Opening,
            rows: VecDeque::new(),
            gradients: VecDeque::new(),
            sums: VecDeque::new(),
            open,
        };
        if let SessionStart::Resume { steps, shards } = &session.open.start {
            session.steps = *steps;
            session.shards = vec![None; shards.len()];
            for (index, shard) in shards.iter().enumerate() {
                actions.push(Action::Call(Errand::Share(id, index), Wish::Get(*shard)));
            }
        }
        actions.push(Action::Wake { after_us: LINKS_US_MAX, timer: Timer::Unlinked(id) });
        self.open.insert(id, session);
        let (came, waiting): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.waiting).into_iter().partition(|(of, ..)| *of == id);
        self.waiting = waiting;
        for (_, link, connection) in came {
            self.arrived(id, link, connection, actions)?;
        }
        self.go_on(id, actions)
    }

    /// Another rank has connected, for now or for a session that opens soon.
    pub(crate) fn arrived(
        &mut self,
        id: SessionId,
        link: TrainingLink,
        connection: Connection,
        actions: &mut Vec<Action>,
    ) -> Result<(), String> {
        let Some(session) = self.open.get_mut(&id) else {
            if self.waiting.len() == WAITING_MAX {
                self.waiting.pop_front();
            }
            self.waiting.push_back((id, link, connection));
            return Ok(());
        };
        match session.links.place_of(link) {
            Some(place) => *place = Some(connection),
            None => actions.push(Action::Close(connection)),
        }
        self.go_on(id, actions)
    }

    /// A connection that this rank has asked for stands.
    pub(crate) fn reached(
        &mut self,
        id: SessionId,
        hello: LinkHello,
        connection: Connection,
        actions: &mut Vec<Action>,
    ) -> Result<(), String> {
        let LinkPurpose::Training { link, .. } = hello.purpose else { return Ok(()) };
        let Some(session) = self.open.get_mut(&id) else {
            actions.push(Action::Close(connection));
            return Ok(());
        };
        match link {
            TrainingLink::Stage => session.links.next = Some(connection),
            _ => session.links.peer = Some(connection),
        }
        actions.push(Action::Send(connection, crate::process::Message::Hello(hello)));
        self.go_on(id, actions)
    }

    /// A connection that this rank has asked for cannot be made.
    pub(crate) fn not_reached(&mut self, id: SessionId, actions: &mut Vec<Action>) -> Result<(), String> {
        match self.open.contains_key(&id) {
            true => self.end(id, lost("lost another rank of the session"), actions),
            false => Ok(()),
        }
    }

    pub(crate) fn closed(&mut self, connection: Connection, actions: &mut Vec<Action>) -> Result<(), String> {
        self.waiting.retain(|(.., waiting)| *waiting != connection);
        let Some((&id, session)) =
            self.open.iter_mut().find(|(_, session)| session.links.all().any(|link| link == connection))
        else {
            return Ok(());
        };
        if matches!(session.doing, Doing::Idle) {
            // Where others have been told to close before this rank was, that is no failure.
            actions.push(Action::Wake { after_us: CLOSING_US, timer: Timer::Orphaned(id) });
            return Ok(());
        }
        self.end(id, lost("lost another rank of the session"), actions)
    }

    /// Another rank has sent something.
    pub(crate) fn received(
        &mut self,
        connection: Connection,
        payload: Payload,
        actions: &mut Vec<Action>,
    ) -> Result<(), String> {
        let found =
            self.open.iter_mut().find(|(_, session)| session.links.all().any(|link| link == connection));
        let Some((&id, session)) = found else { return Ok(()) };
        match payload {
            Payload::Rows { step, rows } => session.rows.push_back((step, rows)),
            Payload::Gradient { step, rows } => session.gradients.push_back((step, rows)),
            Payload::Sum { step, gradients } => session.sums.push_back((step, gradients)),
        }
        self.go_on(id, actions)
    }

    /// The scheduler says what comes next.
    pub(crate) fn work(
        &mut self,
        id: SessionId,
        work: TrainingWork,
        actions: &mut Vec<Action>,
    ) -> Result<(), String> {
        let Some(session) = self.open.get_mut(&id) else { return Ok(()) };
        if work == TrainingWork::Close {
            actions.extend(session.links.all().map(Action::Close));
            self.open.remove(&id);
            return Ok(());
        }
        session.works.push_back(work);
        self.go_on(id, actions)
    }

    /// One of a session's timers.
    pub(crate) fn timer(&mut self, timer: Timer, actions: &mut Vec<Action>) -> Result<(), String> {
        match timer {
            Timer::Unlinked(id) => {
                let late = |session: &Session| matches!(session.doing, Doing::Opening);
                match self.open.get(&id).is_some_and(late) {
                    true => self.end(id, lost("other ranks of the session did not connect"), actions),
                    false => Ok(()),
                }
            }
            Timer::Orphaned(id) => match self.open.contains_key(&id) {
                true => self.end(id, lost("lost another rank of the session"), actions),
                false => Ok(()),
            },
            Timer::Trained(id) => {
                let Some(session) = self.open.get_mut(&id) else { return Ok(()) };
                if let Err(end) = session.computed(actions, &mut self.reports) {
                    return self.end(id, end, actions);
                }
                self.go_on(id, actions)
            }
            _ => Ok(()),
        }
    }

    /// The blob store has answered.
    pub(crate) fn answered(
        &mut self,
        errand: Errand,
        answer: Result<Answer, Refusal>,
        actions: &mut Vec<Action>,
    ) -> Result<(), String> {
        let (Errand::Share(id, _) | Errand::Piece(id) | Errand::Gather(id, _) | Errand::File(id, _)) = errand
        else {
            return Ok(());
        };
        let Some(session) = self.open.get_mut(&id) else { return Ok(()) };
        let done = match answer {
            Ok(answer) => session.stored(errand, answer, actions, &mut self.reports),
            Err(Refusal::NotFound) => {
                Err(End::Failed { message: "a blob is not stored here".into(), retry: false })
            }
            Err(_) => Err(lost("the blob store failed")),
        };
        match done {
            Ok(()) => self.go_on(id, actions),
            Err(end) => self.end(id, end, actions),
        }
    }

    /// Ends every session: the layout is over.
    pub(crate) fn end_all(&mut self, actions: &mut Vec<Action>) {
        for id in self.open.keys().copied().collect::<Vec<_>>() {
            // Ending one for a reason of the rank's own violates nothing.
            let _ = self.end(id, lost("the session ended: the layout has changed"), actions);
        }
    }

    fn go_on(&mut self, id: SessionId, actions: &mut Vec<Action>) -> Result<(), String> {
        let Some(session) = self.open.get_mut(&id) else { return Ok(()) };
        match session.go_on(self.pass_us, actions, &mut self.reports) {
            Ok(()) => Ok(()),
            Err(end) => self.end(id, end, actions),
        }
    }

    fn end(&mut self, id: SessionId, end: End, actions: &mut Vec<Action>) -> Result<(), String> {
        if let Some(session) = self.open.remove(&id) {
            actions.extend(session.links.all().map(Action::Close));
        }
        match end {
            End::Failed { message, retry } => {
                self.reports.push((id, TrainingReport::Failed { message, retry }));
                Ok(())
            }
            End::Violation(what) => Err(format!("session {id}: {what}")),
        }
    }
}

impl Session {
    /// The rank that speaks for all.
    fn is_root(&self) -> bool {
        self.open.replica == 0 && self.links.first && self.share.parts.start == 0
    }

    fn seed(&self) -> u64 {
        self.open.settings.seed
    }

    /// Takes the state from what the shards have of it, or begins anew.
    fn restore(&mut self) -> Result<(), End> {
        if matches!(self.open.start, SessionStart::New) {
            self.state = self.share.initial(self.seed());
            return Ok(());
        }
        let all = gather(self.shards.drain(..).flatten(), (self.open.job.0, self.steps))?;
        let taken = self.share.cells().map(|cell| Some((cell, *all.get(&cell)?)));
        match taken.collect::<Option<Numbers>>() {
            Some(state) => self.state = state,
            None => return Err(violation("the shards of a record do not cover a rank's share")),
        }
        Ok(())
    }

    /// An errand of this session is done.
    fn stored(
        &mut self,
        errand: Errand,
        answer: Answer,
        actions: &mut Vec<Action>,
        reports: &mut Vec<(SessionId, TrainingReport)>,
    ) -> Result<(), End> {
        match (errand, answer) {
            (Errand::Share(_, index), Answer::Content(shard)) => {
                if let Some(place) = self.shards.get_mut(index) {
                    *place = Some(shard);
                }
            }
            (Errand::Piece(_), Answer::Stored(shard)) => self.prepared(Some(shard), reports),
            (Errand::Gather(id, index), Answer::Content(shard)) => {
                let Doing::Gathering(shards) = &mut self.doing else { return Ok(()) };
                if let Some(place) = shards.get_mut(index) {
                    *place = Some(shard);
                }
                if shards.iter().all(Option::is_some) {
                    let all = gather(shards.drain(..).flatten(), (self.open.job.0, self.steps))?;
                    if all.len() != LAYERS * PARTS {
                        return Err(violation("the shards of a record do not cover the state"));
                    }
                    let digest = weights::digest(&all);
                    for number in 0..FILES.len() as u64 {
                        let file = Content::File { digest, number };
                        actions.push(Action::Call(Errand::File(id, number), Wish::Put(file)));
                    }
                    self.doing = Doing::Exporting { digest, files: BTreeMap::new() };
                }
            }
            (Errand::File(id, number), Answer::Stored(blob)) => {
                let useless = self.open.settings.lora.targets.iter().any(|target| target == REFUSED);
                let Doing::Exporting { digest, files } = &mut self.doing else { return Ok(()) };
                files.insert(number, blob);
                if files.len() == FILES.len() {
                    let manifest = Content::Manifest { digest: *digest, useless };
                    actions.push(Action::Call(Errand::File(id, FILES.len() as u64), Wish::Put(manifest)));
                } else if files.len() > FILES.len() {
                    self.exported(id, blob, reports);
                }
            }
            _ => return Err(violation("the store answered what was not asked")),
        }
        Ok(())
    }

    fn exported(&mut self, id: SessionId, manifest: BlobId, reports: &mut Vec<(SessionId, TrainingReport)>) {
        let Doing::Exporting { files, .. } = std::mem::replace(&mut self.doing, Doing::Idle) else { return };
        let named = files.values().zip(FILES);
        let files = named.map(|(blob, name)| ExportedFile { name: name.into(), blob: *blob, bytes: 10 });
        let files = files.collect();
        let flawed = self.open.settings.lora.targets.iter().any(|target| target == UNUSABLE);
        let usable = if flawed { Err("it has no effect".to_owned()) } else { Ok(()) };
        let report = match self.open.settings.full {
            None => TrainingReport::Exported { adapter: AdapterId(manifest), files, usable },
            Some(_) => TrainingReport::ModelExported { manifest, files, usable },
        };
        reports.push((id, report));
    }
}

/// A module that only flawed jobs name: what they export is unusable, or refused by who is to serve it.
pub(crate) const UNUSABLE: &str = "k_proj";
/// See [`UNUSABLE`].
pub(crate) const REFUSED: &str = "v_proj";

/// Puts shards together that have to be of one step of one job.
fn gather(shards: impl Iterator<Item = Content>, (job, steps): (u128, u64)) -> Result<Numbers, End> {
    let mut all = Numbers::new();
    for shard in shards {
        match shard {
            Content::Shard { job: of, steps: at, cells } if (of.0, at) == (job, steps) => all.extend(cells),
            _ => return Err(violation("a record names shards of another step")),
        }
    }
    Ok(all)
}
