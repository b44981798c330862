//! Packed copies of this node's slices: loaded from where there is one, otherwise written beside serving.

use ashlar_kernels::Kernels;
use ashlar_model::{
    CachePlace, CopyWriteError, LoadError, Origin, PackedCopy, RankSlice, StageModel, digest,
};
use ashlar_vocabulary::{Bytes, Precision};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;
use tracing::{info, warn};

/// Loads slices, and keeps copies of them if asked to.
#[derive(Debug)]
pub(crate) struct Copies {
    place: Option<CachePlace>,
    writer: Option<Writer>,
    /// Set once a copy could not be written: that is said once, and not tried again.
    unwritable: Arc<AtomicBool>,
}

/// What is to be loaded.
#[derive(Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) directory: &'a Path,
    pub(crate) precision: Precision,
    pub(crate) slice: RankSlice,
}

impl Copies {
    /// Copies in `place`, or none.
    pub(crate) fn new(place: Option<CachePlace>) -> Copies {
        Copies { place, writer: None, unwritable: Arc::default() }
    }

    /// Loads a slice, packed by `packer`, that computes with `kernels`. Where it had to be packed, a thread of its own writes the copy from the same memory: serving does not
    /// wait for the disk.
    pub(crate) fn load(
        &mut self,
        wanted: Wanted<'_>,
        packer: &Arc<Kernels>,
        kernels: &Arc<Kernels>,
        progress: &mut dyn FnMut(Bytes, Bytes),
    ) -> Result<Arc<StageModel>, LoadError> {
        self.stop();
        let Wanted { directory, precision, slice } = wanted;
        let Some(place) = &self.place else {
            let model = StageModel::load(directory, precision, slice, packer.clone(), progress)?;
            return Ok(Arc::new(model.computing_with(kernels.clone())));
        };
        // Of the weights: what the cache of keys and values holds is no matter here.
        let digest = digest::model_digest(directory, precision.quantization)?;
        let copy = PackedCopy::new(place, directory, &digest, precision, slice);
        let (model, origin) = copy.load_or_pack(packer, progress)?;
        let model = Arc::new(model.computing_with(kernels.clone()));
        if origin == Origin::Files && !self.unwritable.load(Ordering::Relaxed) {
            self.writer = Writer::start(copy, model.clone(), self.unwritable.clone());
        }
        Ok(model)
    }

    /// Ends the writing of a copy: it holds a slice that is given up.
    pub(crate) fn stop(&mut self) {
        self.writer = None;
    }
}

/// A copy on its way to the disk. Dropping it ends it and waits until it has let the slice go.
#[derive(Debug)]
struct Writer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    fn start(copy: PackedCopy, model: Arc<StageModel>, unwritable: Arc<AtomicBool>) -> Option<Writer> {
        let stop = Arc::new(AtomicBool::new(false));
        let asked = stop.clone();
        let thread = std::thread::Builder::new()
            .name("packed-copy".into())
            .spawn(move || write(&copy, &model, &asked, &unwritable))
            .map_err(|error| warn!("no thread for writing the packed copy of the weights: {error}"))
            .ok()?;
        Some(Writer { stop, thread: Some(thread) })
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the thread itself, and concerns nothing but the copy.
            let _ = thread.join();
        }
    }
}

fn write(copy: &PackedCopy, model: &StageModel, stop: &AtomicBool, unwritable: &AtomicBool) {
    let started = Instant::now();
    match copy.write(model, &|| stop.load(Ordering::Relaxed)) {
        Ok(bytes) => info!(
            "wrote the packed copy {} ({bytes}) in {:.1} s: the next start reads it",
            copy.path().display(),
            started.elapsed().as_secs_f32()
        ),
        Err(reason @ (CopyWriteError::Stopped | CopyWriteError::Busy(_))) => info!("{reason}"),
        Err(error @ CopyWriteError::Failed { .. }) => {
            unwritable.store(true, Ordering::Relaxed);
            warn!("{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use ashlar_kernels::Isa;
    use ashlar_model::ModelConfig;
    use std::path::PathBuf;

    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../crates/model/tests/goldens/llama-f16");

    fn load(copies: &mut Copies) -> Arc<StageModel> {
        let directory = Path::new(GOLDEN);
        let slice = RankSlice::whole(&ModelConfig::from_dir(directory).unwrap().shape);
        let wanted = Wanted { directory, precision: Precision::default(), slice };
        let kernels = Arc::new(Kernels::new(Isa::best(), 1));
        copies.load(wanted, &kernels, &kernels, &mut |_, _| {}).unwrap()
    }

    /// Lets a copy be written to its end.
    fn finish(copies: &mut Copies) {
        let thread = copies.writer.as_mut().and_then(|writer| writer.thread.take());
        thread.map(JoinHandle::join).transpose().unwrap();
    }

    #[test]
    fn the_first_load_writes_a_copy_and_the_second_reads_it() {
        let directory = tempfile::tempdir().unwrap();
        let mut copies = Copies::new(Some(CachePlace::Directory(directory.path().to_owned())));
        let packed = load(&mut copies);
        finish(&mut copies);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        let read = load(&mut copies);
        assert!(copies.writer.is_none(), "there is nothing to write");
        assert_eq!(read.bytes(), packed.bytes());
    }

    #[test]
    fn giving_a_slice_up_ends_its_writer_and_frees_its_memory() {
        let directory = tempfile::tempdir().unwrap();
        let mut copies = Copies::new(Some(CachePlace::Directory(directory.path().to_owned())));
        let model = load(&mut copies);
        copies.stop();
        assert_eq!(Arc::strong_count(&model), 1);
    }

    #[test]
    fn a_place_that_cannot_be_written_to_is_tried_once() {
        let file = PathBuf::from(GOLDEN).join("config.json");
        let mut copies = Copies::new(Some(CachePlace::Directory(file.join("copies"))));
        load(&mut copies);
        finish(&mut copies);
        assert!(copies.unwritable.load(Ordering::Relaxed));
        load(&mut copies);
        assert!(copies.writer.is_none());
    }

    #[test]
    fn without_a_place_nothing_is_kept() {
        let mut copies = Copies::new(None);
        let model = load(&mut copies);
        assert!(copies.writer.is_none() && Arc::strong_count(&model) == 1);
    }
}
