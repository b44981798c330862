//! A hub, asked for files.

use super::source::{Source, SourceError, SourceFile, check_files};
use ashlar_model::hub::HubFiles;
use std::ops::Range;

/// Bytes that are asked for at once: every question is a request.
const BATCH_BYTES: u64 = 16 << 20;

/// A hub that has the model.
#[derive(Debug)]
pub(crate) struct Hub {
    name: String,
    hub: HubFiles,
    files: Vec<SourceFile>,
}

impl Hub {
    /// Asks for the files of `model`, a hub id.
    pub(crate) fn connect(model: &str) -> Result<Hub, SourceError> {
        let hub = HubFiles::open(model)?;
        let files: Vec<SourceFile> = hub
            .files()
            .iter()
            .map(|(name, bytes)| SourceFile { name: name.clone(), bytes: *bytes, present: None })
            .collect();
        check_files(&files)?;
        Ok(Hub { name: format!("the hub ({model})"), hub, files })
    }
}

impl Source for Hub {
    fn name(&self) -> &str {
        &self.name
    }

    fn files(&self) -> &[SourceFile] {
        &self.files
    }

    fn batch(&self) -> (u64, usize) {
        // A request has one range: servers answer several in a format of their own, or not at all.
        (BATCH_BYTES, 1)
    }

    fn read(&mut self, file: &str, ranges: &[Range<u64>]) -> Result<Option<Vec<u8>>, SourceError> {
        let mut all = Vec::new();
        for range in ranges {
            all.extend(self.hub.read(file, range.clone())?);
        }
        Ok(Some(all))
    }
}
