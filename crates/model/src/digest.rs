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
use std::os::unix::fs::FileExt;
use std::path::Path;

const SAMPLES: u64 = 256;
const SAMPLE_BYTES: u64 = 4096;

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
            // Metadata and names lie in front, the tokenizer's lists among them.
            sample_file(&mut hasher, path, 16 << 20)?;
        }
        return Ok(ModelDigest(*hasher.finalize().as_bytes()));
    }
    let config = directory.join("config.json");
    let text = std::fs::read(&config).map_err(|source| WeightError::Read { path: config.clone(), source })?;
    hasher.update(&(text.len() as u64).to_le_bytes());
    hasher.update(&text);
    for name in weights::file_names(directory)? {
        let path = directory.join(name);
        let read = |source| WeightError::Read { path: path.clone(), source };
        let mut prefix = [0u8; 8];
        File::open(&path).and_then(|file| file.read_exact_at(&mut prefix, 0)).map_err(read)?;
        let header = u64::from_le_bytes(prefix).saturating_add(8);
        sample_file(&mut hasher, &path, header.min(128 << 20))?;
    }
    Ok(ModelDigest(*hasher.finalize().as_bytes()))
}

/// The file's length, its first `header` bytes, and samples of the rest.
fn sample_file(hasher: &mut blake3::Hasher, path: &Path, header: u64) -> Result<(), WeightError> {
    let read = |source| WeightError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(read)?;
    let length = file.metadata().map_err(read)?.len();
    hasher.update(&length.to_le_bytes());
    let header = header.min(length);
    let stride = ((length - header) / SAMPLES).max(SAMPLE_BYTES);
    let mut sample = |start: u64, end: u64| -> Result<(), WeightError> {
        let mut buffer = vec![0u8; (end - start) as usize];
        file.read_exact_at(&mut buffer, start).map_err(read)?;
        hasher.update(&buffer);
        Ok(())
    };
    sample(0, header)?;
    let mut at = header;
    while at < length {
        sample(at, (at + SAMPLE_BYTES).min(length))?;
        at += stride;
    }
    Ok(())
}
