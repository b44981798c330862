//! The file that a drill keeps, so that it can be interrupted and go on: a line per fault, and one for what was noticed after the last
//! fault of each run.

use super::report::{FaultRecord, Rest};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// What has happened so far.
#[derive(Debug)]
pub(super) struct Log {
    path: Option<PathBuf>,
    /// All faults, those of earlier runs first.
    pub(super) records: Vec<FaultRecord>,
}

/// A line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Fault(FaultRecord),
    Rest(Rest),
}

impl Log {
    /// Takes up what a file has, if there is one. Half a line at its end, of a drill that was killed, is removed.
    pub(super) fn open(path: Option<&Path>) -> Result<Log> {
        let mut log = Log { path: path.map(Path::to_owned), records: Vec::new() };
        let Some(path) = path else { return Ok(log) };
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(log),
            text => text.with_context(|| format!("cannot read {}", path.display()))?,
        };
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        if whole < text.len() {
            let cut = OpenOptions::new().write(true).open(path).and_then(|file| file.set_len(whole as u64));
            cut.with_context(|| format!("cannot write {}", path.display()))?;
        }
        for (number, line) in text[..whole].lines().enumerate().filter(|(_, line)| !line.is_empty()) {
            let line = serde_json::from_str(line)
                .with_context(|| format!("{}, line {}: no line of a drill", path.display(), number + 1))?;
            log.take(line);
        }
        Ok(log)
    }

    /// A fault, when it is over.
    pub(super) fn fault(&mut self, record: FaultRecord) -> Result<()> {
        self.write(Line::Fault(record))
    }

    /// What was noticed after the last fault, when this run is over.
    pub(super) fn rest(&mut self, rest: Rest) -> Result<()> {
        self.write(Line::Rest(rest))
    }

    fn write(&mut self, line: Line) -> Result<()> {
        if let Some(path) = &self.path {
            let text = serde_json::to_string(&line)? + "\n";
            let opened = OpenOptions::new().create(true).append(true).open(path);
            opened
                .and_then(|mut file| file.write_all(text.as_bytes()))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        self.take(line);
        Ok(())
    }

    fn take(&mut self, line: Line) {
        match line {
            Line::Fault(record) => self.records.push(record),
            Line::Rest(rest) => {
                if let Some(last) = self.records.last_mut() {
                    last.add(rest);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::drill::fault::Kind;
    use crate::drill::jobs;
    use crate::drill::load::Noticed;
    use std::time::Duration;

    fn record(jobs: Option<jobs::Noticed>) -> FaultRecord {
        let noticed = Noticed { stalls_s: vec![0.1, 0.3], completed: 2, ..Noticed::default() };
        FaultRecord::new("node-0", Kind::Partition, Duration::from_millis(500), noticed, jobs)
    }

    #[test]
    fn a_log_goes_on_where_it_ended_even_in_the_middle_of_a_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("drill.jsonl");
        let mut log = Log::open(Some(&path)).unwrap();
        assert!(log.records.is_empty());
        log.fault(record(None)).unwrap();
        log.fault(record(Some(jobs::Noticed { finished: 1, ..jobs::Noticed::default() }))).unwrap();
        let rest = jobs::Noticed { finished: 2, longest_gap_s: 4.0, ..jobs::Noticed::default() };
        log.rest(Rest { noticed: Noticed { completed: 5, ..Noticed::default() }, jobs: Some(rest) }).unwrap();
        let again = Log::open(Some(&path)).unwrap();
        assert_eq!(again.records, log.records);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"process\": \"no").unwrap();
        let mut cut = Log::open(Some(&path)).unwrap();
        assert_eq!(cut.records, log.records);
        cut.fault(record(None)).unwrap();
        assert_eq!(Log::open(Some(&path)).unwrap().records.len(), 3);
        fs::write(&path, "{\"of\": \"somebody else\"}\n").unwrap();
        assert!(Log::open(Some(&path)).unwrap_err().to_string().contains("line 1"));
    }

    #[test]
    fn a_line_of_a_drill_without_jobs_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("drill.jsonl");
        let line = r#"{"process":"gateway","kind":"kill","recovered_s":0.3,"stalls_s":[0.2],"completed":1,"cut":1,"changed":0,"hung":0,"errors":[]}"#;
        fs::write(&path, format!("{line}\n")).unwrap();
        assert_eq!(Log::open(Some(&path)).unwrap().records.len(), 1);
    }
}
