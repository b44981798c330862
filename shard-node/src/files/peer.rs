//! Another node, asked for files.

use super::source::{Source, SourceError, SourceFile, check_files};
use crate::links::{self, LinkBreaker};
use ashlar_identity::{Socket, Transport};
use ashlar_protocol::data::{LinkHello, LinkPurpose};
use ashlar_protocol::files::{ANSWER_BYTES_MAX, CHUNK_BYTES_MAX, FileAnswer, FileQuestion, RANGES_MAX};
use ashlar_protocol::frame;
use ashlar_vocabulary::{LeaseTerm, ModelDigest, ReplicaRevision};
use std::ops::Range;
use std::time::Duration;

/// How long a peer may take for an answer.
const PATIENCE: Duration = Duration::from_secs(15);

/// How other nodes are reached.
#[derive(Debug, Clone)]
pub(crate) struct PeerLinks {
    pub(crate) transport: Transport,
    /// Ends a wait at once, where there is one.
    pub(crate) breaker: Option<LinkBreaker>,
    pub(crate) term: LeaseTerm,
    pub(crate) revision: ReplicaRevision,
}

/// A node that has files of the model. Dropping it ends the connection.
#[derive(Debug)]
pub(crate) struct Peer {
    address: String,
    socket: Socket,
    files: Vec<SourceFile>,
}

impl Peer {
    /// Asks the node at `address` for the files of `model`.
    pub(crate) fn connect(address: &str, model: ModelDigest, links: &PeerLinks) -> Result<Peer, SourceError> {
        let hello = LinkHello { term: links.term, revision: links.revision, purpose: LinkPurpose::Files };
        let socket = links::connect(address, &hello, &links.transport)?;
        if let Some(breaker) = &links.breaker {
            breaker.register(&socket).map_err(frame::FrameError::Io)?;
        }
        let mut peer = Peer { address: address.to_owned(), socket, files: Vec::new() };
        peer.socket.set_read_timeout(Some(PATIENCE)).map_err(frame::FrameError::Io)?;
        peer.socket.set_write_timeout(Some(PATIENCE)).map_err(frame::FrameError::Io)?;
        peer.files = match peer.ask(&FileQuestion::List { model })? {
            FileAnswer::Files(files) => files
                .into_iter()
                .map(|file| SourceFile {
                    name: file.name,
                    bytes: file.bytes,
                    present: file.present.map(|all| all.into_iter().map(|(start, end)| start..end).collect()),
                })
                .collect(),
            other => return Err(unexpected(other)),
        };
        check_files(&peer.files)?;
        Ok(peer)
    }

    fn ask(&mut self, question: &FileQuestion) -> Result<FileAnswer, SourceError> {
        frame::write_blocking(&mut self.socket, question)?;
        Ok(frame::read_blocking_within(&mut self.socket, ANSWER_BYTES_MAX)?)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // The breaker has a handle, too: without this the connection would stay. One that has ended is as good.
        let _ = self.socket.shutdown();
    }
}

impl Source for Peer {
    fn name(&self) -> &str {
        &self.address
    }

    fn files(&self) -> &[SourceFile] {
        &self.files
    }

    fn batch(&self) -> (u64, usize) {
        (CHUNK_BYTES_MAX, RANGES_MAX)
    }

    fn read(&mut self, file: &str, ranges: &[Range<u64>]) -> Result<Option<Vec<u8>>, SourceError> {
        let asked = ranges.iter().map(|range| (range.start, (range.end - range.start) as u32)).collect();
        let expected: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        match self.ask(&FileQuestion::Read { name: file.to_owned(), ranges: asked })? {
            FileAnswer::Chunk { checksum, bytes } => {
                let whole = bytes.len() as u64 == expected && blake3::hash(&bytes) == checksum;
                if whole { Ok(Some(bytes)) } else { Err(SourceError::Damaged(file.to_owned())) }
            }
            FileAnswer::Absent => Ok(None),
            other => Err(unexpected(other)),
        }
    }
}

/// What an answer means that is none to the question.
fn unexpected(answer: FileAnswer) -> SourceError {
    match answer {
        FileAnswer::Unknown => SourceError::Unknown,
        FileAnswer::Busy => SourceError::Busy,
        FileAnswer::Refused(reason) => SourceError::Refused(reason),
        FileAnswer::Absent => SourceError::Improper("it has no list of files".into()),
        FileAnswer::Files(_) | FileAnswer::Chunk { .. } => {
            SourceError::Improper("an answer to another question".into())
        }
    }
}
