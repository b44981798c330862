//! Names and numbers of a model that is split over several files, `model-00001-of-00003.gguf` and so on.
//!
//! Files count from 1 in names and from 0 in `split.no`. The first carries the model's metadata, the others only their
//! `split.` keys; tensors may be in any.

use crate::error::GgufError;
use crate::metadata::Metadata;
use std::path::{Path, PathBuf};

/// Most files of one model; every one stays open.
pub const SPLIT_FILES_MAX: u64 = 512;

/// The name of file `number`, counted from 1, of `count` files.
pub fn split_file_name(stem: &str, number: u64, count: u64) -> String {
    format!("{stem}-{number:05}-of-{count:05}.gguf")
}

/// What a file's name says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SplitName {
    stem: String,
    number: u64,
    count: u64,
}

impl SplitName {
    fn of(path: &Path) -> Option<SplitName> {
        let rest = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = rest.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        Some(SplitName { stem: stem.to_owned(), number: digits(number)?, count: digits(count)? })
    }
}

/// At least five digits, as names have them.
fn digits(text: &str) -> Option<u64> {
    let all = text.len() >= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    if all { text.parse().ok() } else { None }
}

/// All files of the model that `path`, with this metadata, belongs to, in order; just `path` if it is not split.
pub(super) fn members(path: &Path, metadata: &Metadata) -> Result<Vec<PathBuf>, GgufError> {
    let wrong = |reason: String| GgufError::Split { path: path.to_owned(), reason };
    let count = metadata.get::<u64>("split.count")?.unwrap_or(1);
    let name = SplitName::of(path);
    if count <= 1 {
        return match name {
            Some(name) if name.count > 1 => {
                let named = name.count;
                Err(wrong(format!("its name says {named} files, but its header does not; fetch it again")))
            }
            _ => Ok(vec![path.to_owned()]),
        };
    }
    if count > SPLIT_FILES_MAX {
        return Err(wrong(format!("`split.count` is {count}, at most {SPLIT_FILES_MAX} are allowed")));
    }
    let Some(name) = name else {
        return Err(wrong(format!(
            "it is one of {count} files, which are found by names that end in -00001-of-{count:05}.gguf; \
             give them these names"
        )));
    };
    if name.count != count {
        return Err(wrong(format!("its name says {} files, `split.count` says {count}", name.count)));
    }
    Ok((1..=count).map(|number| path.with_file_name(split_file_name(&name.stem, number, count))).collect())
}

/// Checks that the file at `path` is number `index`, counted from 0, of `count`.
pub(super) fn check_member(
    path: &Path,
    metadata: &Metadata,
    index: u64,
    count: u64,
) -> Result<(), GgufError> {
    let wrong = |reason: String| Err(GgufError::Split { path: path.to_owned(), reason });
    let own_count = metadata.require::<u64>("split.count")?;
    if own_count != count {
        return wrong(format!("`split.count` is {own_count}, other files say {count}"));
    }
    let number = metadata.require::<u64>("split.no")?;
    if number != index {
        return wrong(format!("`split.no` is {number}, its name demands {index}; a copy of another file?"));
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart_from_the_end() {
        let name = SplitName::of(Path::new("/x/a-00001-of-00002-00003-of-00007.gguf")).unwrap();
        assert_eq!(name, SplitName { stem: "a-00001-of-00002".into(), number: 3, count: 7 });
        assert_eq!(split_file_name(&name.stem, 3, 7), "a-00001-of-00002-00003-of-00007.gguf");
        for other in
            ["a.gguf", "a-1-of-2.gguf", "a-00001-of-00002", "a-0000x-of-00002.gguf", "a-+0001-of-00002.gguf"]
        {
            assert_eq!(SplitName::of(Path::new(other)), None, "{other}");
        }
    }
}
