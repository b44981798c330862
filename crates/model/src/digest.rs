//! What identifies a model's bits: numeric version, configuration, and the weight files.
//!
//! Hashing every byte of a large model would dominate start-up, so the digest covers each file's length, its whole
//! header (names, shapes, types, offsets) and evenly spread samples of its data. Two different checkpoints of one
//! architecture differ in nearly every sample; a flipped bit elsewhere is the file system's and the hub's business.

use crate::gguf;
use crate::weights::{self, WeightError};
use ashlar_gguf::GgufFiles;
use ashlar_vocabulary::{FloatType, ModelDigest, Precision, ids::NUMERIC_VERSION};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

const SAMPLES: u64 = 256;
const SAMPLE_BYTES: u64 = 4096;
/// So much of a GGUF file counts as its header: metadata and names lie in front, the tokenizer's lists among them.
pub(crate) const GGUF_HEADER_BYTES: u64 = 16 << 20;
/// Most that counts as the header of any other.
const HEADER_BYTES_MAX: u64 = 128 << 20;

/// Digest of the model in `directory`, served in `precision`.
pub fn model_digest(directory: &Path, precision: impl Into<Precision>) -> Result<ModelDigest, WeightError> {
    let Precision { quantization, kv_cache, activations } = precision.into();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&NUMERIC_VERSION.to_le_bytes());
    if let Some(quantization) = quantization {
        hasher.update(quantization.name().as_bytes());
    }
    if kv_cache != FloatType::default() {
        hasher.update(kv_cache.name().as_bytes());
    }
    if activations != FloatType::default() {
        // The same names mean a cache above.
        hasher.update(b"activations ").update(activations.name().as_bytes());
    }
    if let Some(file) = gguf::file_of(directory) {
        for path in GgufFiles::open(&file)?.paths() {
            sample_file(&mut hasher, path)?;
        }
        return Ok(ModelDigest(*hasher.finalize().as_bytes()));
    }
    let config = directory.join("config.json");
    let text = std::fs::read(&config).map_err(|source| WeightError::Read { path: config.clone(), source })?;
    hasher.update(&(text.len() as u64).to_le_bytes());
    hasher.update(&text);
    for name in weights::file_names(directory)? {
        sample_file(&mut hasher, &directory.join(name))?;
    }
    Ok(ModelDigest(*hasher.finalize().as_bytes()))
}

/// The file's length, its header, and samples of the rest.
fn sample_file(hasher: &mut blake3::Hasher, path: &Path) -> Result<(), WeightError> {
    let read = |source| WeightError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(read)?;
    hasher.update(&file.metadata().map_err(read)?.len().to_le_bytes());
    for range in sampled_ranges(path)? {
        let mut buffer = vec![0u8; (range.end - range.start) as usize];
        file.read_exact_at(&mut buffer, range.start).map_err(read)?;
        hasher.update(&buffer);
    }
    Ok(())
}

/// What the digest looks at in the file with weights at `path`: its header, which must be there, and samples.
pub(crate) fn sampled_ranges(path: &Path) -> Result<Vec<Range<u64>>, WeightError> {
    let read = |source| WeightError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(read)?;
    let length = file.metadata().map_err(read)?.len();
    let header = if path.extension().is_some_and(|extension| extension == "gguf") {
        GGUF_HEADER_BYTES
    } else {
        let mut prefix = [0u8; 8];
        file.read_exact_at(&mut prefix, 0).map_err(read)?;
        u64::from_le_bytes(prefix).saturating_add(8).min(HEADER_BYTES_MAX)
    };
    let header = header.min(length);
    let stride = ((length - header) / SAMPLES).max(SAMPLE_BYTES);
    let samples = (header..length).step_by(stride as usize);
    Ok([0..header].into_iter().chain(samples.map(|at| at..(at + SAMPLE_BYTES).min(length))).collect())
}
