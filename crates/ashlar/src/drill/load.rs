//! Streams that run again and again, each compared with what it was undisturbed.

use super::stream::{Hear, Hung, OutOfOrder, PAUSE, SILENCE_MAX, Shape};
use crate::http::{Client, StatusError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What clients noticed of one fault.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Noticed {
    /// For how long each of the streams stood still at most, in seconds.
    pub(super) stalls_s: Vec<f64>,
    /// Streams that ended meanwhile as they should.
    pub(super) completed: u64,
    /// Streams that were cut off with their gateway, and asked for again.
    pub(super) cut: u64,
    /// Connections that broke, and whose clients came back for the rest.
    #[serde(default)]
    pub(super) resumed: u64,
    /// Streams that were something else than undisturbed.
    pub(super) changed: u64,
    /// Streams that hung.
    pub(super) hung: u64,
    /// Refusals and broken connections that were not the gateway's death.
    pub(super) errors: Vec<String>,
}

impl Noticed {
    /// What was noticed afterwards, when no stream is waited for.
    pub(super) fn add(&mut self, rest: Noticed) {
        self.completed += rest.completed;
        self.cut += rest.cut;
        self.resumed += rest.resumed;
        self.changed += rest.changed;
        self.hung += rest.hung;
        self.errors.extend(rest.errors);
    }
}

/// What the streams and the one who disturbs them share.
#[derive(Debug, Default)]
struct Board {
    /// The fault of the moment, or, between two, the next one.
    fault: usize,
    /// Whether clients lose their connections by it.
    cuts: bool,
    noticed: BTreeMap<usize, Noticed>,
    /// Each stream since the fault began.
    streams: Vec<Since>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Since {
    /// Its longest silence.
    longest: Duration,
    /// Whether one that ran when the fault began has been compared. One that was cut off has to be the same when it is asked for again.
    compared: bool,
    /// Whether it was cut off with its gateway; however often it was then asked for in vain.
    cut: bool,
}

/// The streams.
pub(super) struct Load {
    board: Arc<Mutex<Board>>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

fn lock(board: &Mutex<Board>) -> MutexGuard<'_, Board> {
    board.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Load {
    /// Starts one stream per shape.
    pub(super) fn start(client: &Client, shapes: &[Shape]) -> Load {
        let board = Board { streams: vec![Since::default(); shapes.len()], ..Board::default() };
        let board = Arc::new(Mutex::new(board));
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for (index, shape) in shapes.iter().enumerate() {
            let worker = Worker { index, client: client.clone(), shape: shape.clone(), board: board.clone() };
            let mut stopped = stopped.clone();
            tasks.spawn(async move {
                tokio::select! {
                    () = worker.run() => {}
                    _ = stopped.wait_for(|stop| *stop) => {}
                }
            });
        }
        Load { board, stop, tasks }
    }

    /// From now on everything that is noticed is because of this fault.
    pub(super) fn begin_fault(&self, number: usize, cuts: bool) {
        let mut board = lock(&self.board);
        (board.fault, board.cuts) = (number, cuts);
        board.streams.fill(Since::default());
    }

    /// Waits until what ran when the fault began has ended, and been compared.
    pub(super) async fn all_have_ended_since(&self, number: usize) {
        let began = Instant::now();
        let ended =
            |board: &Board| board.fault != number || board.streams.iter().all(|stream| stream.compared);
        // Each of them either goes on or is found to hang.
        while !ended(&lock(&self.board)) && began.elapsed() < 4 * SILENCE_MAX {
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// What was noticed of it so far.
    pub(super) fn end_fault(&self, number: usize) -> Noticed {
        let mut board = lock(&self.board);
        board.fault = number + 1;
        let stalls_s = board.streams.iter().map(|stream| stream.longest.as_secs_f64()).collect();
        Noticed { stalls_s, ..board.noticed.remove(&number).unwrap_or_default() }
    }

    /// Ends the streams as they are; what was noticed after `faults` faults.
    pub(super) async fn stop(mut self, faults: usize) -> Noticed {
        self.stop.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
        Noticed { stalls_s: Vec::new(), ..self.end_fault(faults) }
    }
}

struct Worker {
    index: usize,
    client: Client,
    shape: Shape,
    board: Arc<Mutex<Board>>,
}

/// What a worker's stream tells.
struct Ear<'a> {
    worker: &'a Worker,
    last: Instant,
}

impl Hear for Ear<'_> {
    fn event(&mut self, at: Instant) {
        self.worker.hear(at.saturating_duration_since(self.last));
        self.last = at;
    }

    fn resumed(&mut self) {
        self.worker.note(|noticed| noticed.resumed += 1);
    }
}

impl Worker {
    async fn run(self) {
        // From the last word of one stream to the first of the next counts, too: that is how long a client waits.
        let mut ear = Ear { worker: &self, last: Instant::now() };
        loop {
            match self.shape.run(&self.client, &mut ear).await {
                Ok(right) => {
                    self.note(|noticed| match right {
                        true => noticed.completed += 1,
                        false => noticed.changed += 1,
                    });
                    self.compared();
                }
                Err(error) => {
                    self.failed(&error);
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    fn hear(&self, silence: Duration) {
        let mut board = lock(&self.board);
        if let Some(since) = board.streams.get_mut(self.index) {
            since.longest = since.longest.max(silence);
        }
    }

    fn compared(&self) {
        if let Some(since) = lock(&self.board).streams.get_mut(self.index) {
            since.compared = true;
        }
    }

    /// Whether it has been cut off already by this fault; from now on it has.
    fn cut_before(&self) -> bool {
        let mut board = lock(&self.board);
        board.streams.get_mut(self.index).is_some_and(|since| std::mem::replace(&mut since.cut, true))
    }

    fn note(&self, write: impl FnOnce(&mut Noticed)) {
        let mut board = lock(&self.board);
        let fault = board.fault;
        write(board.noticed.entry(fault).or_default());
    }

    fn failed(&self, error: &anyhow::Error) {
        let refused = error.downcast_ref::<StatusError>().is_some();
        let hung = error.downcast_ref::<Hung>().is_some();
        if error.is::<OutOfOrder>() {
            return self.note(|noticed| noticed.changed += 1);
        }
        let cut = !refused && !hung && lock(&self.board).cuts;
        let again = cut && self.cut_before();
        self.note(|noticed| match hung {
            true => noticed.hung += 1,
            false if cut => noticed.cut += u64::from(!again),
            false => noticed.errors.push(format!("{error:#}")),
        });
    }
}
