//! Adapters of this rank's slice: read, cut and packed on a thread of their own while the compute thread goes on, then handed
//! to it.
//!
//! A sequence keeps its adapter in memory until the ranks are told of its end, whatever is unloaded meanwhile.

use crate::executor::Command;
use ashlar_kernels::{Isa, Kernels};
use ashlar_model::StageModel;
use ashlar_model::adapter::Adapter;
use ashlar_model::peft::{self, PeftAdapter};
use ashlar_protocol::membership::AdapterRefusal;
use ashlar_store::blobs::{self, BlobError, BlobOptions, Blobs, Manifest};
use ashlar_vocabulary::{AdapterId, ReplicaRevision, SequenceId};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender};

/// Loads that may wait for the thread: the scheduler keeps fewer under way.
const QUEUE: usize = 64;
/// Longest `adapter_config.json`.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Longest `adapter_model.safetensors`.
const TENSORS_BYTES_MAX: u64 = 4 << 30;

/// The end of a load, on its way to the compute thread.
#[derive(Debug)]
pub struct AdapterLoad {
    /// The layout for which it was loaded.
    pub revision: ReplicaRevision,
    /// What was loaded.
    pub adapter: AdapterId,
    /// The scheduler's number of the load: one that was given up says nothing.
    pub load: u64,
    share: Result<Arc<Adapter>, AdapterRefusal>,
}

/// What the thread is asked for.
struct Order {
    revision: ReplicaRevision,
    adapter: AdapterId,
    load: u64,
    model: Arc<StageModel>,
}

/// What another attempt would meet again.
fn never(message: impl Into<String>) -> AdapterRefusal {
    AdapterRefusal { message: message.into(), retry: false }
}

/// What may be over the next time.
fn not_now(message: impl Into<String>) -> AdapterRefusal {
    AdapterRefusal { message: message.into(), retry: true }
}

/// What is missing or damaged stays so; a store that does not answer comes back.
fn of_blobs(error: &BlobError) -> AdapterRefusal {
    let lasts =
        matches!(error, BlobError::NotFound(_) | BlobError::Corrupt { .. } | BlobError::TooLarge { .. });
    AdapterRefusal { message: error.to_string(), retry: !lasts }
}

/// What the compute thread knows of adapters.
#[derive(Debug)]
pub(crate) struct Adapters {
    blobs: Option<String>,
    isa: Isa,
    commands: SyncSender<Command>,
    loader: Option<SyncSender<Order>>,
    /// By adapter, the load that is wanted.
    loading: BTreeMap<AdapterId, u64>,
    loaded: BTreeMap<AdapterId, Arc<Adapter>>,
    sequences: BTreeMap<SequenceId, Arc<Adapter>>,
}

impl Adapters {
    /// None yet; blobs are at this address.
    pub(crate) fn new(blobs: Option<String>, isa: Isa, commands: SyncSender<Command>) -> Adapters {
        Adapters {
            blobs,
            isa,
            commands,
            loader: None,
            loading: BTreeMap::new(),
            loaded: BTreeMap::new(),
            sequences: BTreeMap::new(),
        }
    }

    /// Has an adapter loaded for a model; [`Command::AdapterLoaded`] tells of the end.
    pub(crate) fn begin(
        &mut self,
        revision: ReplicaRevision,
        adapter: AdapterId,
        load: u64,
        model: Arc<StageModel>,
    ) -> Result<(), AdapterRefusal> {
        if self.loader.is_none() {
            let address = self.blobs.clone().ok_or_else(|| {
                never(
                    "this node has no blob store: set `blobs` in its configuration to the one of the gateway",
                )
            })?;
            self.loader = Some(start(address, self.isa, self.commands.clone()).map_err(not_now)?);
        }
        let order = Order { revision, adapter, load, model };
        let loader = self.loader.as_ref().ok_or_else(|| not_now("no thread loads adapters"))?;
        match loader.try_send(order) {
            Ok(()) => {
                self.loading.insert(adapter, load);
                Ok(())
            }
            Err(mpsc::TrySendError::Full(_)) => {
                Err(not_now(format!("{QUEUE} adapters are being loaded already")))
            }
            Err(mpsc::TrySendError::Disconnected(_)) => {
                self.loader = None;
                Err(not_now("the thread that loads adapters has ended: try again"))
            }
        }
    }

    /// Keeps what was loaded, unless it is not wanted any more.
    pub(crate) fn finish(&mut self, ended: AdapterLoad) -> Option<Result<Arc<Adapter>, AdapterRefusal>> {
        if self.loading.get(&ended.adapter) != Some(&ended.load) {
            return None;
        }
        self.loading.remove(&ended.adapter);
        if let Ok(share) = &ended.share {
            self.loaded.insert(ended.adapter, share.clone());
        }
        Some(ended.share)
    }

    /// Forgets an adapter, loaded or not.
    pub(crate) fn unload(&mut self, adapter: AdapterId) {
        self.loading.remove(&adapter);
        self.loaded.remove(&adapter);
    }

    /// Forgets everything: another slice, or another layout, which says anew what is to be loaded.
    pub(crate) fn clear(&mut self) {
        self.loading.clear();
        self.loaded.clear();
        self.sequences.clear();
    }

    /// Gives a sequence its adapter; `false` if that is not loaded.
    pub(crate) fn begin_sequence(&mut self, sequence: SequenceId, adapter: AdapterId) -> bool {
        let share = self.loaded.get(&adapter).cloned();
        share.is_some_and(|share| {
            self.sequences.insert(sequence, share);
            true
        })
    }

    /// Takes it away.
    pub(crate) fn end_sequence(&mut self, sequence: SequenceId) {
        self.sequences.remove(&sequence);
    }

    /// Whether any sequence has an adapter.
    pub(crate) fn any_sequence(&self) -> bool {
        !self.sequences.is_empty()
    }

    /// A sequence's adapter.
    pub(crate) fn of_sequence(&self, sequence: SequenceId) -> Option<&Adapter> {
        self.sequences.get(&sequence).map(Arc::as_ref)
    }
}

/// Starts the thread; it ends with the sender of its orders.
fn start(address: String, isa: Isa, commands: SyncSender<Command>) -> Result<SyncSender<Order>, String> {
    let (orders, inbox) = mpsc::sync_channel::<Order>(QUEUE);
    let failed = |error: std::io::Error| format!("no thread to load adapters: {error}");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let run = move || {
        // Of its own: the compute thread's are not to wait for a turn.
        let kernels = Kernels::new(isa, 1);
        let mut opened: Option<Blobs> = None;
        while let Ok(order) = inbox.recv() {
            let Order { revision, adapter, load, model } = order;
            let share = runtime.block_on(async {
                let blobs = match opened.take() {
                    Some(blobs) => blobs,
                    None => {
                        let blobs = blobs::open(&address, &BlobOptions::default()).await;
                        blobs.map_err(|error| {
                            not_now(format!("the blob store of this node cannot be used: {error}"))
                        })?
                    }
                };
                let share = read_share(&blobs, adapter, &model, &kernels).await;
                opened = Some(blobs);
                share
            });
            let ended = AdapterLoad { revision, adapter, load, share: share.map(Arc::new) };
            if commands.send(Command::AdapterLoaded(ended)).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("adapters".into()).spawn(run).map_err(failed)?;
    Ok(orders)
}

/// Reads an adapter's files, and packs this rank's share.
async fn read_share(
    blobs: &Blobs,
    adapter: AdapterId,
    model: &StageModel,
    kernels: &Kernels,
) -> Result<Adapter, AdapterRefusal> {
    let manifest = blobs.get_manifest(adapter.0).await.map_err(|error| of_blobs(&error))?;
    let config = read(blobs, &manifest, peft::CONFIG_FILE, CONFIG_BYTES_MAX).await?;
    let tensors = read(blobs, &manifest, peft::WEIGHTS_FILE, TENSORS_BYTES_MAX).await?;
    let (shape, slice) = (&model.config().shape, model.slice());
    let whole =
        PeftAdapter::parse_effective(&config, &tensors, shape).map_err(|error| never(error.to_string()))?;
    drop(tensors);
    Ok(Adapter::pack(&whole.cut(shape, slice), shape, slice, kernels))
}

async fn read(blobs: &Blobs, manifest: &Manifest, name: &str, limit: u64) -> Result<Vec<u8>, AdapterRefusal> {
    let entry = manifest.get(name).ok_or_else(|| never(format!("the adapter has no {name}")))?;
    if entry.bytes > limit {
        return Err(never(format!("{name} has {} bytes, at most {limit} are read", entry.bytes)));
    }
    let mut reader = blobs.get(entry.blob).await.map_err(|error| of_blobs(&error))?;
    // As the bytes come: a length is only a claim.
    let mut bytes = Vec::new();
    while let Some(chunk) = reader.next().await.map_err(|error| of_blobs(&error))? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() as u64 > limit {
            return Err(never(format!("{name} has more than {limit} bytes")));
        }
    }
    Ok(bytes)
}
