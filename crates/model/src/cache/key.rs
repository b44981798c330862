//! Which copy is meant: everything that decides its bytes, and a name that people can read.

use super::file::FORMAT_VERSION;
use crate::slice::RankSlice;
use ashlar_kernels::PACKED_VERSION;
use ashlar_vocabulary::{ModelDigest, Quantization, ids::NUMERIC_VERSION};
use std::path::Path;

/// How the name of every copy ends.
pub(super) const EXTENSION: &str = ".packed";

/// Longest name of a model within a file name.
const NAME_CHARACTERS_MAX: usize = 100;

/// What tells copies apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    /// Of everything that decides the bytes. Not of threads or the instruction set: they do not.
    pub(super) digest: [u8; 32],
    /// Of the model's place: copies of one place, cut and name replace one another.
    pub(super) place: [u8; 16],
    /// The model's name, types and cut, for people.
    stem: String,
}

impl Key {
    pub(super) fn new(
        model: &Path,
        digest: &ModelDigest,
        quantization: Option<Quantization>,
        slice: &RankSlice,
    ) -> Key {
        let types = quantization.map_or("stored", Quantization::name);
        let mut hasher = blake3::Hasher::new();
        for version in [FORMAT_VERSION, PACKED_VERSION, NUMERIC_VERSION] {
            hasher.update(&version.to_le_bytes());
        }
        hasher.update(if cfg!(target_endian = "little") { b"little" } else { b"big" });
        hasher.update(&digest.0);
        let RankSlice { layers, first, last, tensor_rank, tensor_parallel_size, head } = slice;
        let (head_index, head_of) = head.map_or((0, 0), |head| (head.index, head.of));
        let cut = [
            layers.start,
            layers.end,
            (*first).into(),
            (*last).into(),
            *tensor_rank,
            *tensor_parallel_size,
            head_index,
            head_of,
        ];
        for number in cut {
            hasher.update(&(number as u64).to_le_bytes());
        }
        hasher.update(types.as_bytes());
        let canonical = model.canonicalize().unwrap_or_else(|_| model.to_owned());
        let place = blake3::hash(canonical.as_os_str().as_encoded_bytes());
        Key {
            digest: *hasher.finalize().as_bytes(),
            place: std::array::from_fn(|index| place.as_bytes()[index]),
            stem: format!(
                "{}.{types}.layers-{}-{}.tp-{tensor_rank}-of-{tensor_parallel_size}",
                name_of(&canonical),
                layers.start,
                layers.end
            ),
        }
    }

    /// `llama-3.2-1b.q4_0.layers-0-8.tp-0-of-2.<16 hexadecimal digits>.packed`.
    pub(super) fn file_name(&self) -> String {
        let digits: String = self.digest[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{}.{digits}{EXTENSION}", self.stem)
    }

    /// What the names of this copy, its predecessors and its unfinished files have in common.
    pub(super) fn stem(&self) -> &str {
        &self.stem
    }
}

/// The model's name in a file name: its directory's or file's; in the hub's cache, its id.
fn name_of(model: &Path) -> String {
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let folder = model.parent().filter(|folder| folder.ends_with("snapshots")).and_then(Path::parent);
    let hub_id = folder.and_then(name).and_then(|name| name.strip_prefix("models--").map(str::to_owned));
    let stem = || {
        let stem = if model.extension().is_some_and(|e| e == "gguf") {
            model.file_stem()
        } else {
            model.file_name()
        };
        stem.map(|stem| stem.to_string_lossy().into_owned())
    };
    let name = hub_id.or_else(stem).unwrap_or_default();
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' };
    let name: String = name.trim_start_matches('.').chars().map(plain).take(NAME_CHARACTERS_MAX).collect();
    if name.is_empty() { "model".into() } else { name }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use ashlar_vocabulary::{HeadSlice, LayerRange};
    use std::collections::BTreeSet;

    fn slice() -> RankSlice {
        RankSlice {
            layers: LayerRange { start: 0, end: 8 },
            first: true,
            last: false,
            tensor_rank: 1,
            tensor_parallel_size: 2,
            head: None,
        }
    }

    #[test]
    fn names_say_what_the_file_is() {
        let digest = ModelDigest([7; 32]);
        let key = |model: &str, quantization: Option<&str>| {
            let quantization = quantization.map(|name| name.parse().unwrap());
            Key::new(Path::new(model), &digest, quantization, &slice())
        };
        let name = key("/no/llama-3.2-1b", Some("q4_0")).file_name();
        let digits = name.strip_prefix("llama-3.2-1b.q4_0.layers-0-8.tp-1-of-2.").unwrap();
        let digits = digits.strip_suffix(".packed").unwrap();
        assert!(digits.len() == 16 && digits.chars().all(|c| c.is_ascii_hexdigit()), "{name}");
        assert!(key("/no/m q4.gguf", None).file_name().starts_with("m-q4.stored.layers-"));
        let cached = key("/hub/models--Qwen--Qwen3-0.6B/snapshots/0123abcd", None);
        assert!(cached.stem().starts_with("Qwen--Qwen3-0.6B.stored."), "{}", cached.stem());
        assert!(key("/", None).stem().starts_with("model."));
    }

    #[test]
    fn everything_that_decides_the_bytes_decides_the_key() {
        let (model, digest) = (Path::new("/no/model"), ModelDigest([7; 32]));
        let other_layers = RankSlice { layers: LayerRange { start: 1, end: 8 }, ..slice() };
        let keys = [
            Key::new(model, &digest, None, &slice()),
            Key::new(model, &ModelDigest([8; 32]), None, &slice()),
            Key::new(model, &digest, Some("q8_0".parse().unwrap()), &slice()),
            Key::new(model, &digest, None, &other_layers),
            Key::new(model, &digest, None, &RankSlice { first: false, ..slice() }),
            Key::new(model, &digest, None, &RankSlice { last: true, ..slice() }),
            Key::new(model, &digest, None, &RankSlice { tensor_rank: 0, ..slice() }),
            Key::new(model, &digest, None, &RankSlice { tensor_parallel_size: 4, ..slice() }),
            Key::new(
                model,
                &digest,
                None,
                &RankSlice { head: Some(HeadSlice { index: 0, of: 4 }), ..slice() },
            ),
            Key::new(
                model,
                &digest,
                None,
                &RankSlice { head: Some(HeadSlice { index: 1, of: 4 }), ..slice() },
            ),
            Key::new(
                model,
                &digest,
                None,
                &RankSlice { head: Some(HeadSlice { index: 1, of: 8 }), ..slice() },
            ),
        ];
        let digests: BTreeSet<_> = keys.iter().map(|key| key.digest).collect();
        assert_eq!(digests.len(), keys.len());
        let moved = Key::new(Path::new("/elsewhere/model"), &digest, None, &slice());
        assert_eq!((moved.digest, moved.file_name()), (keys[0].digest, keys[0].file_name()));
        assert!(moved.place != keys[0].place, "models of one name do not replace one another");
    }
}
