//! Slices of the model in this node's memory: the one that serves, and one that is prepared for a place to come.

use crate::beat::Beat;
use crate::config::{CacheConfig, NodeConfig};
use crate::copies::{Copies, Wanted};
use crate::executor::{Command, Shared};
use crate::files::{Errand, Files};
use crate::links::{LinkBreaker, Wish};
use ashlar_grammar::GrammarCompiler;
use ashlar_kernels::Kernels;
use ashlar_model::{RankSlice, StageModel};
use ashlar_protocol::membership::{Assignment, FromNode, HeldSlice};
use ashlar_tokenizer::Tokenizer;
use ashlar_vocabulary::{ModelDigest, ReplicaRevision};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tracing::{info, warn};

/// How often at most it is told how far loading is.
const REPORT_INTERVAL: Duration = Duration::from_millis(200);

/// Weights in memory, kept from one layout to the next if they stay the same.
pub(crate) struct Loaded {
    pub(crate) directory: PathBuf,
    pub(crate) model: Arc<StageModel>,
    pub(crate) compiler: Option<GrammarCompiler>,
    digest: ModelDigest,
    held: HeldSlice,
    /// Writes the packed copy of these weights, where one is kept; ends with them.
    _copies: Copies,
}

/// What this node has in memory of the model, and how it comes there.
pub(crate) struct Slices {
    loader: Loader,
    commands: SyncSender<Command>,
    shared: Shared,
    breaker: LinkBreaker,
    serving: Option<Loaded>,
    preparation: Option<Preparation>,
    /// Ordered while another preparation was under way, which cannot be interrupted.
    ordered: Option<Box<Assignment>>,
}

/// A slice on its way into memory beside the one that serves, or there.
struct Preparation {
    revision: ReplicaRevision,
    digest: ModelDigest,
    slice: RankSlice,
    coming: Receiver<Result<Loaded, String>>,
    come: Option<Loaded>,
    /// Whether it is still wanted; the thread looks while it fetches files.
    wanted: Arc<AtomicBool>,
}

/// Brings slices into memory; one for each thread that does.
#[derive(Clone)]
struct Loader {
    config: NodeConfig,
    kernels: Arc<Kernels>,
    out: mpsc::Sender<FromNode>,
    files: Files,
}

impl Slices {
    /// Nothing in memory.
    pub(crate) fn new(
        config: NodeConfig,
        kernels: Arc<Kernels>,
        out: mpsc::Sender<FromNode>,
        commands: SyncSender<Command>,
        shared: Shared,
        (files, breaker): (Files, LinkBreaker),
    ) -> Slices {
        let loader = Loader { config, kernels, out, files };
        Slices { loader, commands, shared, breaker, serving: None, preparation: None, ordered: None }
    }

    /// The slice that serves.
    pub(crate) fn serving(&self) -> Option<&Loaded> {
        self.serving.as_ref()
    }

    /// Brings the assignment's slice into memory to serve, unless it is there. Beats meanwhile; files are fetched only as long as
    /// the scheduler wants it.
    ///
    /// # Errors
    /// What is wrong with the assignment, or with the weights.
    pub(crate) fn load(&mut self, assignment: &Assignment, beat: &Beat, wish: Wish) -> Result<(), String> {
        let slice = slice_of(assignment)?;
        let breaker = self.breaker.clone();
        let errand = Errand::Serve { beat, breaker: &breaker, wish };
        let is_it =
            |digest: &ModelDigest, other: &RankSlice| *digest == assignment.model_digest && *other == slice;
        let serving = self.serving.as_ref();
        if serving.is_some_and(|loaded| is_it(&loaded.digest, loaded.model.slice())) {
            self.withdraw();
            return Ok(());
        }
        // Before anything else takes memory.
        self.serving = None;
        self.shared.set(None);
        self.ordered = None;
        let prepared = match self.preparation.take_if(|coming| is_it(&coming.digest, &coming.slice)) {
            Some(preparation) => preparation.wait(&errand),
            None => None,
        };
        self.withdraw();
        let loaded = match prepared {
            Some(loaded) => loaded,
            None => self.loader.load(assignment, slice, &self.loader.kernels, &errand)?,
        };
        self.shared.set(Some(loaded.held.clone()));
        self.serving = Some(loaded);
        Ok(())
    }

    /// Lets go of what is in memory of another model than the one of which a slice is ordered: the node has come from that one, and has
    /// no place.
    pub(crate) fn forget_other_model(&mut self, ordered: &Assignment) {
        if self.serving.take_if(|loaded| loaded.digest != ordered.model_digest).is_some() {
            self.shared.set(None);
        }
    }

    /// Begins to bring a slice into memory beside the one that serves, on a thread of its own.
    pub(crate) fn prepare(&mut self, assignment: Option<Box<Assignment>>) {
        self.withdraw();
        let Some(assignment) = assignment else { return };
        if self.preparation.is_some() {
            // It cannot be interrupted; what it brings is let go of.
            self.ordered = Some(assignment);
            return;
        }
        let revision = assignment.revision;
        if let Err(problem) = self.begin(*assignment) {
            self.answer(revision, Err(problem));
        }
    }

    /// Looks what a preparation has come to.
    pub(crate) fn look(&mut self) {
        let Some(preparation) = &mut self.preparation else { return };
        let outcome = match preparation.coming.try_recv() {
            Ok(outcome) => outcome,
            Err(TryRecvError::Empty) => return,
            Err(TryRecvError::Disconnected) if preparation.come.is_some() => return,
            Err(TryRecvError::Disconnected) => Err("the thread that loads it has ended".to_owned()),
        };
        let revision = preparation.revision;
        let (wanted, failed) = (preparation.wanted.load(Ordering::Relaxed), outcome.is_err());
        match outcome {
            Ok(loaded) => {
                preparation.come = Some(loaded);
                if wanted {
                    self.answer(revision, Ok(()));
                }
            }
            Err(problem) if wanted => self.answer(revision, Err(problem)),
            Err(_) => {}
        }
        if failed || !wanted {
            self.preparation = None;
        }
        if self.preparation.is_none() {
            let ordered = self.ordered.take();
            self.prepare(ordered);
        }
    }

    /// What was prepared is of no use any more.
    pub(crate) fn withdraw(&mut self) {
        self.ordered = None;
        if let Some(preparation) = &mut self.preparation {
            preparation.wanted.store(false, Ordering::Relaxed);
        }
        self.preparation.take_if(|preparation| preparation.come.is_some());
    }

    fn begin(&mut self, assignment: Assignment) -> Result<(), String> {
        let slice = slice_of(&assignment)?;
        let (send, coming) = sync_channel(1);
        let (loader, commands) = (self.loader.clone(), self.commands.clone());
        let wanted = Arc::new(AtomicBool::new(true));
        let preparation = Preparation {
            revision: assignment.revision,
            digest: assignment.model_digest,
            slice: slice.clone(),
            coming,
            come: None,
            wanted: wanted.clone(),
        };
        let load = move || {
            // One thread of its own: those that serve have more urgent work.
            let packer = Arc::new(Kernels::new(loader.kernels.isa(), 1));
            let outcome = loader.load(&assignment, slice, &packer, &Errand::Prepare { wanted: &wanted });
            let _ = send.send(outcome);
            // The compute thread looks by itself before long, should its queue be full.
            let _ = commands.try_send(Command::Prepared);
        };
        let thread = std::thread::Builder::new().name("prepare".into()).spawn(load);
        thread.map_err(|error| format!("no thread for loading it: {error}"))?;
        self.preparation = Some(preparation);
        Ok(())
    }

    fn answer(&self, revision: ReplicaRevision, outcome: Result<(), String>) {
        if let Err(problem) = &outcome {
            warn!(%revision, "cannot prepare a slice: {problem}");
        }
        // The queue is drained by the control connection; without one, messages are of no use to anybody.
        let _ = self.loader.out.blocking_send(FromNode::Prepared { revision, outcome });
    }
}

impl Preparation {
    /// Waits for what is under way, beating; nothing if it comes to nothing.
    fn wait(self, errand: &Errand<'_>) -> Option<Loaded> {
        if self.come.is_some() {
            return self.come;
        }
        loop {
            errand.beat();
            if !errand.is_wanted() {
                self.wanted.store(false, Ordering::Relaxed);
            }
            match self.coming.recv_timeout(Beat::interval() / 2) {
                Ok(outcome) => return outcome.map_err(|problem| warn!("preparing failed: {problem}")).ok(),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }
}

impl Loader {
    fn load(
        &self,
        assignment: &Assignment,
        slice: RankSlice,
        packer: &Arc<Kernels>,
        errand: &Errand<'_>,
    ) -> Result<Loaded, String> {
        let revision = assignment.revision;
        let mut last_report: Option<Instant> = None;
        let started = Instant::now();
        let mut progress = |loaded, total| {
            errand.beat();
            let due = last_report.is_none_or(|at| at.elapsed() > REPORT_INTERVAL);
            if due || loaded == total {
                last_report = Some(Instant::now());
                let _ = self.out.blocking_send(FromNode::Loading { revision, loaded, total });
            }
        };
        let trains = self.config.blobs.is_some();
        let directory = self.files.locate(assignment, &slice, trains, errand, &mut progress)?;
        let (precision, digest) = (assignment.precision, assignment.model_digest);
        let wanted = Wanted { directory: &directory, precision, slice: slice.clone() };
        let mut copies = Copies::new(self.config.cache.as_ref().and_then(CacheConfig::place));
        let model = copies.load(wanted, packer, &self.kernels, &mut progress);
        let model = model.map_err(|error| error.to_string())?;
        let samples = slice.last && slice.tensor_rank == 0;
        let compiler = if samples { compiler(&directory, &model) } else { None };
        info!(
            layers = %slice.layers, rank = slice.tensor_rank, weights = %model.bytes(),
            "loaded in {:.1} s", started.elapsed().as_secs_f32()
        );
        let held = HeldSlice {
            model_digest: digest,
            layers: slice.layers,
            tensor_rank: assignment.tensor_rank,
            tensor_parallel_size: assignment.tensor_parallel_size,
            head: assignment.head,
        };
        Ok(Loaded { digest, directory, model, compiler, held, _copies: copies })
    }
}

/// The slice of the model that belongs to a place.
fn slice_of(assignment: &Assignment) -> Result<RankSlice, String> {
    let slice = RankSlice {
        layers: assignment.layers,
        first: assignment.stage.0 == 0,
        last: assignment.stage.0 + 1 == assignment.num_stages,
        tensor_rank: assignment.tensor_rank.0 as usize,
        tensor_parallel_size: assignment.tensor_parallel_size as usize,
        head: assignment.head,
    };
    if assignment.sampler.is_some() != (slice.head.is_some() && !slice.last) {
        return Err("the rank that samples is named where no slice of the head is, or the reverse".into());
    }
    Ok(slice)
}

fn compiler(directory: &Path, model: &StageModel) -> Option<GrammarCompiler> {
    let tokenizer =
        Tokenizer::open(directory).map_err(|error| warn!("grammars are unavailable: {error}")).ok()?;
    GrammarCompiler::new(&tokenizer, model.config().shape.vocab_size)
        .map_err(|error| warn!("grammars are unavailable: {error}"))
        .ok()
}
