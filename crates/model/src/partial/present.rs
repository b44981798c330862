//! The journal beside a sparse file: which of its bytes are there.
//!
//! It is replaced whole, by a file that is durable before it gets the name, and only after the bytes that it adds are durable: what
//! it says is there, is there, also after a power cut.

use super::ranges::RangeSet;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// What the name of a journal ends in.
pub const PRESENT_SUFFIX: &str = ".present";

const FIRST_LINE: &str = "ashlar ranges 1";

/// Longest journal that is read, in bytes: a million ranges.
const JOURNAL_BYTES_MAX: u64 = 64 << 20;

/// Why a journal cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum PresentError {
    /// The file.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The journal.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not what was written.
    #[error("{path} is damaged ({reason}): remove it, and what it speaks of is fetched again")]
    Damaged {
        /// The journal.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// Where the journal of the file at `path` is.
pub fn present_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(PRESENT_SUFFIX);
    name.into()
}

/// The bytes that are there of the file at `path`; `None` where it has no journal, because it is whole.
///
/// # Errors
/// [`PresentError`].
pub fn read_present(path: &Path) -> Result<Option<RangeSet>, PresentError> {
    let path = present_path(path);
    let read = |source| PresentError::Read { path: path.clone(), source };
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(read(error)),
    };
    let mut text = String::new();
    file.take(JOURNAL_BYTES_MAX).read_to_string(&mut text).map_err(read)?;
    parse(&text).map(Some).map_err(|reason| PresentError::Damaged { path, reason })
}

/// Says durably that `present` is there of the file at `path`. What it adds must be durable already.
///
/// # Errors
/// Of the file system; the former journal then holds.
pub fn write_present(path: &Path, present: &RangeSet) -> io::Result<()> {
    let mut text = format!("{FIRST_LINE}\n");
    for range in present.iter() {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{} {}", range.start, range.end);
    }
    let _ = writeln!(text, "end {}", present.count());
    let journal = present_path(path);
    let new = journal.with_extension("present-new");
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, &journal)?;
    journal.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

fn parse(text: &str) -> Result<RangeSet, &'static str> {
    let mut lines = text.lines();
    if lines.next() != Some(FIRST_LINE) {
        return Err("it does not begin as one");
    }
    let (mut present, mut last) = (RangeSet::default(), 0);
    for line in lines.by_ref() {
        let (start, end) = line.split_once(' ').ok_or("a line is not two words")?;
        if start == "end" {
            let whole = end.parse() == Ok(present.count()) && lines.next().is_none();
            return if whole { Ok(present) } else { Err("it does not end as one") };
        }
        let number = |word: &str| word.parse::<u64>().map_err(|_| "a line is not two numbers");
        let (start, end) = (number(start)?, number(end)?);
        if start >= end || (start <= last && !present.is_empty()) {
            return Err("its ranges are not in order");
        }
        present.insert(start..end);
        last = end;
    }
    Err("it has no end")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_was_written_is_read_and_replaces_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.safetensors");
        assert!(read_present(&file).unwrap().is_none(), "without a journal a file is whole");
        for ranges in [vec![], vec![0..8], vec![0..8, 100..1 << 40]] {
            let present: RangeSet = ranges.into_iter().collect();
            write_present(&file, &present).unwrap();
            assert_eq!(read_present(&file).unwrap(), Some(present));
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left over");
    }

    #[test]
    fn a_journal_cut_off_anywhere_is_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.safetensors");
        write_present(&file, &[0..8, 16..24].into_iter().collect()).unwrap();
        let text = fs::read_to_string(present_path(&file)).unwrap();
        for length in 0..text.len() - 1 {
            fs::write(present_path(&file), &text[..length]).unwrap();
            let error = read_present(&file).unwrap_err();
            assert!(matches!(error, PresentError::Damaged { .. }), "{length}: {error}");
        }
        for other in ["0 8\n0 9\nend 2", "8 0\nend 1", "0 8\n8 9\nend 2", "0 8\nend 1\nend 1", "0 x\nend 1"] {
            fs::write(present_path(&file), format!("{FIRST_LINE}\n{other}\n")).unwrap();
            assert!(read_present(&file).is_err(), "{other}");
        }
    }
}
