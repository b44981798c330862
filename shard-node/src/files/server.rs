//! Handing the model's files out to nodes that were given none.

use super::shelf::{Offer, Shelf};
use ashlar_identity::Socket;
use ashlar_kernels::lower_priority;
use ashlar_model::partial::{RangeSet, read_present};
use ashlar_protocol::files::{
    CHUNK_BYTES_MAX, FILES_MAX, FileAnswer, FileEntry, FileQuestion, PRESENT_MAX, QUESTION_BYTES_MAX,
    RANGES_MAX,
};
use ashlar_protocol::frame::{self, FrameError};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tracing::{debug, warn};

/// Nodes that are served at a time: each takes a thread, and memory for one chunk.
const READERS_MAX: usize = 4;
/// How long a node may take between two questions, or to take an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Serves connections that ask for files. Clones share the count of those served.
#[derive(Debug, Default, Clone)]
pub(crate) struct FileServer {
    shelf: Shelf,
    readers: Arc<AtomicUsize>,
}

impl FileServer {
    /// Hands out what is on `shelf`.
    pub(crate) fn new(shelf: Shelf) -> FileServer {
        FileServer { shelf, readers: Arc::default() }
    }

    /// Answers until the peer has all it wants. Blocks: it is for a thread that is there for this connection.
    pub(crate) fn serve(&self, mut socket: Socket) {
        let Some(_reader) = Reader::admit(&self.readers) else {
            // It asks again. Its question is read first: closing with something unread would take the answer away, too.
            let question = frame::read_blocking_within::<FileQuestion>(&mut socket, QUESTION_BYTES_MAX);
            let _ = question.and_then(|_| frame::write_blocking(&mut socket, &FileAnswer::Busy));
            return;
        };
        // What is computed here comes first.
        lower_priority();
        match self.answer_all(&mut socket) {
            Ok(()) | Err(FrameError::Closed) => {}
            Err(error) => debug!("stopped handing files out: {error}"),
        }
    }

    fn answer_all(&self, socket: &mut Socket) -> Result<(), FrameError> {
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let mut open: Option<OpenModel> = None;
        loop {
            let question = frame::read_blocking_within(socket, QUESTION_BYTES_MAX)?;
            let answer = match (question, &mut open) {
                (FileQuestion::List { model }, open) => match self.shelf.find(model) {
                    Some(offer) => {
                        let found = OpenModel { offer, files: BTreeMap::new() };
                        open.insert(found).list()
                    }
                    None => FileAnswer::Unknown,
                },
                (FileQuestion::Read { name, ranges }, Some(model)) => model.read(&name, &ranges),
                (FileQuestion::Read { .. }, None) => {
                    FileAnswer::Refused("which model is to be named first".into())
                }
            };
            frame::write_blocking(socket, &answer)?;
            if matches!(answer, FileAnswer::Refused(_) | FileAnswer::Unknown) {
                return Ok(());
            }
        }
    }
}

/// One of the few who are served.
struct Reader<'a>(&'a AtomicUsize);

impl Reader<'_> {
    fn admit(count: &AtomicUsize) -> Option<Reader<'_>> {
        let reader = Reader(count);
        (count.fetch_add(1, Ordering::Relaxed) < READERS_MAX).then_some(reader)
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A model that a connection reads.
struct OpenModel {
    offer: Arc<Offer>,
    files: BTreeMap<String, OpenFile>,
}

struct OpenFile {
    path: PathBuf,
    file: File,
    /// What is here of it, as far as this connection has looked; `None` for all of it.
    present: Option<RangeSet>,
}

impl OpenModel {
    fn list(&self) -> FileAnswer {
        let mut ranges_left = PRESENT_MAX;
        let entry = |file: &ashlar_model::partial::ModelFile| {
            // A journal that cannot be read speaks for nothing.
            let present = read_present(&self.offer.files.folder.join(&file.name)).unwrap_or_default();
            let present = present.map(|present| {
                let ranges: Vec<(u64, u64)> =
                    present.iter().take(ranges_left).map(|range| (range.start, range.end)).collect();
                ranges_left -= ranges.len();
                ranges
            });
            FileEntry { name: file.name.clone(), bytes: file.bytes, present }
        };
        FileAnswer::Files(self.offer.files.files.iter().take(FILES_MAX).map(entry).collect())
    }

    fn read(&mut self, name: &str, ranges: &[(u64, u32)]) -> FileAnswer {
        let refused = |reason: &str| FileAnswer::Refused(reason.to_owned());
        // What is not among the model's files is not looked for.
        let Some(known) = self.offer.files.files.iter().find(|file| file.name == name) else {
            return refused("the model has no such file");
        };
        let total: u64 = ranges.iter().map(|&(_, length)| u64::from(length)).sum();
        if ranges.len() > RANGES_MAX || total > CHUNK_BYTES_MAX {
            return refused("that is too much at once");
        }
        let within = |&(start, length): &(u64, u32)| {
            start.checked_add(length.into()).is_some_and(|end| end <= known.bytes)
        };
        if !ranges.iter().all(within) {
            return refused("the file is shorter");
        }
        match self.bytes(name, ranges, total as usize) {
            Ok(Some(bytes)) => FileAnswer::Chunk { checksum: *blake3::hash(&bytes).as_bytes(), bytes },
            Ok(None) => FileAnswer::Absent,
            Err(error) => {
                warn!("cannot hand {name} out: {error}");
                FileAnswer::Absent
            }
        }
    }

    fn bytes(&mut self, name: &str, ranges: &[(u64, u32)], total: usize) -> io::Result<Option<Vec<u8>>> {
        let file = match self.files.entry(name.to_owned()) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                let path = self.offer.files.folder.join(name);
                let file = File::open(&path)?;
                let present = read_present(&path).map_err(io::Error::other)?;
                entry.insert(OpenFile { path, file, present })
            }
        };
        let absent = |present: &Option<RangeSet>| {
            let has = |set: &RangeSet, &(start, length): &(u64, u32)| {
                set.covers(&(start..start + u64::from(length)))
            };
            present.as_ref().is_some_and(|present| !ranges.iter().all(|range| has(present, range)))
        };
        if absent(&file.present) {
            // More may have come meanwhile.
            file.present = read_present(&file.path).map_err(io::Error::other)?;
            if absent(&file.present) {
                return Ok(None);
            }
        }
        let mut bytes = vec![0; total];
        let mut rest = bytes.as_mut_slice();
        for &(start, length) in ranges {
            let (place, behind) = rest.split_at_mut(length as usize);
            file.file.read_exact_at(place, start)?;
            rest = behind;
        }
        Ok(Some(bytes))
    }
}
