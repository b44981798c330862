//! A pool of threads for kernels: the caller takes part, idle workers spin briefly and then sleep.
//!
//! A job is published by raising the epoch in one atomic word; workers *join* an open job by counting themselves into
//! the same word. When the tasks have run out the caller closes the job and waits for those that joined: a worker that
//! was asleep, or that another process kept from its core, never delays a job it took no task of.
//!
//! A pool may work in the background: then its tasks give way to whatever raises a flag.
//!
//! On request every thread has a core of its own. Workers stay on theirs for life; the caller only while it says so, since
//! threads that it starts would otherwise be confined to its core, too.

use crate::background::{YieldFlag, lower_priority};
use crate::cores::{PinError, PinnedThread};
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::fmt;
use std::panic::{AssertUnwindSafe, RefUnwindSafe, UnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long an idle worker spins before it sleeps: longer than the gap between two kernels of one forward pass.
const SPIN: Duration = Duration::from_micros(80);
/// Joined workers are counted in the low bits of the state.
const JOINED: u64 = (1 << 16) - 1;
/// Set while a job may be joined.
const OPEN: u64 = 1 << 16;
/// The epoch lies above.
const EPOCH_SHIFT: u32 = 17;

thread_local! {
    /// Whether this thread is already inside a job; a nested job then runs on this thread alone.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// A fixed set of threads that share the tasks of one job at a time.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held while a job runs: jobs of several callers take turns.
    turn: Mutex<()>,
    /// The caller's core, where threads are pinned.
    callers_core: Option<usize>,
    /// What tasks give way to, where the pool works in the background.
    urgent: Option<YieldFlag>,
}

impl ThreadPool {
    /// A pool of `threads` threads (at least 1), the caller included: `threads − 1` workers are started.
    ///
    /// # Panics
    /// If the operating system refuses a thread.
    pub fn new(threads: usize) -> ThreadPool {
        let mut pool = ThreadPool::of_caller(None);
        (1..threads).for_each(|_| pool.start_worker());
        pool
    }

    /// A pool of one thread on each of `cores` (at least one): the first is the caller's, see [`ThreadPool::pin_caller`].
    ///
    /// # Errors
    /// If the calling thread may not use one of the cores, or threads cannot be pinned on this system.
    ///
    /// # Panics
    /// If `cores` is empty, or the operating system refuses a thread.
    pub fn on_cores(cores: &[usize]) -> Result<ThreadPool, PinError> {
        let (&callers, workers) = cores.split_first().expect("a pool has at least one thread");
        drop(PinnedThread::to(callers)?);
        let mut pool = ThreadPool::of_caller(Some(callers));
        for &core in workers {
            // A thread starts where the one that starts it may run: so a refusal is known here.
            let _here = PinnedThread::to(core)?;
            pool.start_worker();
        }
        Ok(pool)
    }

    /// A pool of `threads` threads for work that gives way: its workers have the lowest priority, and nobody begins a task
    /// while `urgent` is raised. The caller lowers its own priority, see [`lower_priority`].
    ///
    /// # Panics
    /// If the operating system refuses a thread.
    pub fn in_background(threads: usize, urgent: YieldFlag) -> ThreadPool {
        let mut pool = ThreadPool::of_caller(None);
        pool.urgent = Some(urgent);
        (1..threads).for_each(|_| pool.start_worker());
        pool
    }

    fn of_caller(callers_core: Option<usize>) -> ThreadPool {
        ThreadPool {
            shared: Arc::default(),
            workers: Vec::new(),
            turn: Mutex::default(),
            callers_core,
            urgent: None,
        }
    }

    fn start_worker(&mut self) {
        let shared = Arc::clone(&self.shared);
        let name = format!("kernels-{}", self.workers.len() + 1);
        let in_background = self.urgent.is_some();
        let worker = thread::Builder::new().name(name).spawn(move || {
            if in_background {
                lower_priority();
            }
            shared.serve();
        });
        self.workers.push(worker.expect("the operating system must grant the pool its threads"));
    }

    /// Keeps the calling thread on the core that the pool has for its caller, until the guard is dropped; `None` if the
    /// pool's threads are not pinned, or the thread may not use that core any more.
    ///
    /// It costs two system calls: once for many jobs is right, once per job is not.
    pub fn pin_caller(&self) -> Option<PinnedThread> {
        self.callers_core.and_then(|core| PinnedThread::to(core).ok())
    }

    /// Threads that take part in a job, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// How long callers have been computing tasks, all jobs since the pool began. Starting the other threads and waiting for
    /// them is not counted, nor what callers do between jobs.
    pub fn callers_time_in_tasks(&self) -> Duration {
        Duration::from_nanos(self.shared.callers_nanos.load(Ordering::Relaxed))
    }

    /// Calls `f(0)`, …, `f(tasks − 1)`, each once, in any order and on any thread, and returns when all are done.
    ///
    /// A job started inside a task runs on that task's thread alone. If a task panics, tasks not yet begun are dropped
    /// and the panic continues in the caller; the pool stays usable.
    pub fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        match &self.urgent {
            None => self.run_all(tasks, f),
            Some(urgent) => self.run_all(tasks, &|task| {
                urgent.give_way();
                f(task);
            }),
        }
    }

    fn run_all(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        if INSIDE.get() {
            return (0..tasks).for_each(f);
        }
        if tasks <= 1 || self.workers.is_empty() {
            let started = Instant::now();
            (0..tasks).for_each(f);
            return self.shared.count(started);
        }
        let turn = lock(&self.turn);
        let outcome = self.shared.publish(Job { f: erase(f), tasks });
        drop(turn);
        if let Err(payload) = outcome {
            resume_unwind(payload);
        }
    }
}

// A panic in a task is caught and handed on, and leaves no job behind.
impl UnwindSafe for ThreadPool {}
impl RefUnwindSafe for ThreadPool {}

impl fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThreadPool").field("threads", &self.threads()).finish()
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.sleep));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks, so that joining cannot fail.
            let _ = worker.join();
        }
    }
}

/// A job as the workers see it.
#[derive(Clone, Copy)]
struct Job {
    f: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

/// Forgets the lifetime of a task function; [`Shared::publish`] makes up for it.
fn erase<'a>(f: &'a (dyn Fn(usize) + Sync + 'a)) -> *const (dyn Fn(usize) + Sync + 'static) {
    // SAFETY: only the lifetime changes; the pointer is followed only by threads counted into the job's state, and
    // `publish` returns only when that count is zero and the job closed.
    unsafe {
        std::mem::transmute::<&'a (dyn Fn(usize) + Sync + 'a), &'static (dyn Fn(usize) + Sync + 'static)>(f)
    }
}

/// A counter with a cache line of its own.
#[derive(Default)]
#[repr(align(64))]
struct Line<T>(T);

#[derive(Default)]
struct Shared {
    /// Epoch, [`OPEN`] and the number of joined workers.
    state: Line<AtomicU64>,
    /// The next task to take.
    next: Line<AtomicUsize>,
    /// Written only while the job is closed and nobody is joined; read only by those who are.
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// What callers have spent on tasks.
    callers_nanos: AtomicU64,
    sleepers: AtomicUsize,
    stop: AtomicBool,
    sleep: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is the only part that is not already thread-safe; the state word orders its single writer against its
// readers (see the field), and the function it points to is `Sync`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Runs one job to its end, with the calling thread taking part. The caller holds the pool's turn.
    fn publish(&self, job: Job) -> Result<(), Box<dyn Any + Send>> {
        INSIDE.set(true);
        // SAFETY: the last job was closed and left by all before its `publish` returned, and jobs take turns.
        unsafe { *self.job.get() = Some(job) };
        self.next.0.store(0, Ordering::Relaxed);
        let epoch = (self.state.0.load(Ordering::Relaxed) >> EPOCH_SHIFT) + 1;
        self.state.0.store(epoch << EPOCH_SHIFT | OPEN, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.sleep));
            self.wake.notify_all();
        }
        let started = Instant::now();
        self.work(job);
        self.count(started);
        self.state.0.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while self.state.0.load(Ordering::Acquire) & JOINED != 0 {
            // Long waits mean that another process holds the worker's core: let it have ours.
            spins += 1;
            if spins.is_multiple_of(1 << 12) { thread::yield_now() } else { std::hint::spin_loop() }
        }
        INSIDE.set(false);
        lock(&self.panic).take().map_or(Ok(()), Err)
    }

    /// Adds what a caller has computed since `started`.
    fn count(&self, started: Instant) {
        let nanos = started.elapsed().as_nanos() as u64;
        self.callers_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// Takes tasks until none is left. Never unwinds.
    fn work(&self, job: Job) {
        // SAFETY: see `erase`: the caller either published the job or is counted into it.
        let f = unsafe { &*job.f };
        loop {
            let task = self.next.0.fetch_add(1, Ordering::Relaxed);
            if task >= job.tasks {
                return;
            }
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| f(task))) {
                self.next.0.store(job.tasks, Ordering::Relaxed);
                lock(&self.panic).get_or_insert(payload);
            }
        }
    }

    /// A worker's life.
    fn serve(&self) {
        INSIDE.set(true);
        let mut done = 0;
        while let Some(epoch) = self.join(done) {
            // SAFETY: we are counted in, so that the publisher neither changes the job nor returns.
            if let Some(job) = unsafe { *self.job.get() } {
                self.work(job);
            }
            self.state.0.fetch_sub(1, Ordering::Release);
            done = epoch;
        }
    }

    /// Waits for a job newer than `done` and counts itself in; `None` when the pool is dropped.
    fn join(&self, done: u64) -> Option<u64> {
        let mut spinning_since = Instant::now();
        loop {
            for _ in 0..64 {
                if self.stop.load(Ordering::Relaxed) {
                    return None;
                }
                if let Some(epoch) = self.try_join(done) {
                    return Some(epoch);
                }
                std::hint::spin_loop();
            }
            if spinning_since.elapsed() > SPIN {
                self.sleep_until_news(done);
                spinning_since = Instant::now();
            }
        }
    }

    fn news(&self, done: u64) -> Option<u64> {
        let state = self.state.0.load(Ordering::SeqCst);
        (state & OPEN != 0 && state >> EPOCH_SHIFT != done).then_some(state)
    }

    fn try_join(&self, done: u64) -> Option<u64> {
        let state = self.news(done)?;
        let joined = self.state.0.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed);
        joined.is_ok().then_some(state >> EPOCH_SHIFT)
    }

    /// Sleeps. No wake-up is lost: the sleeper counts itself before it looks, the publisher looks after publishing.
    fn sleep_until_news(&self, done: u64) {
        let mut guard = lock(&self.sleep);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.news(done).is_none() && !self.stop.load(Ordering::SeqCst) {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Locks; a panic elsewhere leaves nothing half-done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
