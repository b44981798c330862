//! Reads a header from front to back through a small window.
//!
//! **Invariant:** nothing is read or allocated from a claimed length that exceeds what is left of the file, or of
//! [`HEADER_BYTES_MAX`].

use crate::error::GgufError;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Longest header (metadata and tensor infos) accepted. The vocabularies of today take under 20 MiB.
pub const HEADER_BYTES_MAX: u64 = 512 << 20;

/// Bytes fetched at once.
const WINDOW_BYTES: u64 = 256 << 10;

pub(super) struct HeaderCursor<'a> {
    file: &'a File,
    path: &'a Path,
    length: u64,
    at: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl<'a> HeaderCursor<'a> {
    pub(super) fn new(file: &'a File, path: &'a Path, length: u64) -> HeaderCursor<'a> {
        HeaderCursor { file, path, length, at: 0, window: Vec::new(), window_at: 0 }
    }

    /// The next byte's place in the file.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// An error about the field that starts at `offset`.
    pub(super) fn corrupt(&self, offset: u64, reason: impl Into<String>) -> GgufError {
        GgufError::Corrupt { path: self.path.to_owned(), offset, reason: reason.into() }
    }

    fn left(&self) -> u64 {
        self.length.min(HEADER_BYTES_MAX) - self.at
    }

    fn too_long(&self, at: u64, needed: u128, what: &str) -> GgufError {
        let left = self.left();
        if self.length > HEADER_BYTES_MAX {
            let limit = HEADER_BYTES_MAX >> 20;
            return self.corrupt(
                at,
                format!("{what} needs {needed} bytes, but only {left} are left of a header's {limit} MiB"),
            );
        }
        self.corrupt(at, format!("{what} needs {needed} bytes, but the file ends {left} bytes on"))
    }

    /// The next `count` bytes.
    pub(super) fn bytes(&mut self, count: u64, what: &str) -> Result<&[u8], GgufError> {
        if count > self.left() {
            return Err(self.too_long(self.at, count.into(), what));
        }
        let window_end = self.window_at + self.window.len() as u64;
        if self.at + count > window_end {
            let fetch = count.max(WINDOW_BYTES).min(self.left());
            self.window.resize(fetch as usize, 0);
            let read = self.file.read_exact_at(&mut self.window, self.at);
            read.map_err(|source| GgufError::Read { path: self.path.to_owned(), source })?;
            self.window_at = self.at;
        }
        let start = (self.at - self.window_at) as usize;
        self.at += count;
        Ok(&self.window[start..start + count as usize])
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        out.copy_from_slice(self.bytes(N as u64, what)?);
        Ok(out)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A number of things that take at least `bytes_each` each, of which there must be enough left.
    pub(super) fn count(&mut self, bytes_each: u64, what: &str) -> Result<usize, GgufError> {
        let at = self.at;
        let count = self.u64(what)?;
        let needed = u128::from(count) * u128::from(bytes_each);
        if needed > u128::from(self.left()) {
            return Err(self.too_long(at, needed, &format!("a count of {count} for {what}")));
        }
        Ok(count as usize)
    }

    pub(super) fn string(&mut self, what: &str) -> Result<String, GgufError> {
        let length = self.u64(what)?;
        let at = self.at;
        let bytes = self.bytes(length, what)?.to_vec();
        String::from_utf8(bytes).map_err(|error| {
            let offset = at + error.utf8_error().valid_up_to() as u64;
            self.corrupt(offset, format!("{what} is not UTF-8"))
        })
    }
}
