//! What was trained, put together from the shards of all ranks and stored as files: an adapter as PEFT has it, a whole model as Hugging
//! Face has it.

use super::Place;
use super::error::SessionError;
use super::session::refused;
use super::storage::Storage;
use ashlar_model::peft::{CONFIG_FILE, PeftError, WEIGHTS_FILE};
use ashlar_model::{RankSlice, TensorShare, Trained};
use ashlar_protocol::training::{ExportedFile, TrainingReport};
use ashlar_store::blobs::{BlobError, BlobInfo, Manifest};
use ashlar_training::checkpoint::{Position, Restore, Shard, model_tensor};
use ashlar_vocabulary::{AdapterId, BlobId};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

/// Beside the weights and the configuration, what a model's directory may have: all of it goes over as it is.
const COMPANIONS: [&str; 9] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];
/// Bytes that are copied at a time.
const PIECE_BYTES: usize = 256 << 10;
/// Numbers that are made bytes at a time.
const CHUNK: usize = 64 << 10;

/// Where results come from and go to.
pub(super) struct Export<'a> {
    pub(super) place: &'a Place,
    pub(super) storage: &'a Storage,
    /// Where shards are kept meanwhile.
    pub(super) directory: &'a Path,
    pub(super) at: Position,
    /// The share of its inputs that an adapter did not see while it was trained.
    pub(super) dropout: f32,
}

impl Export<'_> {
    fn open(&self, shards: &[BlobId]) -> Result<Vec<Shard<File>>, SessionError> {
        let open = |&shard| Ok(Shard::open(self.storage.fetch(shard, self.directory)?)?);
        shards.iter().map(open).collect()
    }

    /// Stores an adapter.
    pub(super) fn adapter(
        &self,
        trained: &Trained,
        shards: &[BlobId],
    ) -> Result<TrainingReport, SessionError> {
        let shape = &self.place.model.config().shape;
        let mut whole = Restore::new(trained, shape, &RankSlice::whole(shape), self.at);
        for shard in &mut self.open(shards)? {
            whole.take(shard)?;
        }
        let (adapter, usable) = whole.adapter(shape)?;
        let unwritable = |error: PeftError| refused(error.to_string());
        let (config, weights) = adapter.files(base_name(&self.place.model_name)).map_err(unwritable)?;
        let config = self.with_dropout(config)?;
        let mut files = Vec::new();
        for (name, bytes) in [(CONFIG_FILE, config), (WEIGHTS_FILE, weights)] {
            files.push(file(name, self.storage.put(&bytes)?));
        }
        let adapter = AdapterId(self.manifest(&files)?);
        Ok(TrainingReport::Exported { adapter, files, usable })
    }

    /// An adapter's configuration that says how it was trained. Serving has no use for it.
    fn with_dropout(&self, config: Vec<u8>) -> Result<Vec<u8>, SessionError> {
        if self.dropout == 0.0 {
            return Ok(config);
        }
        let unusable = |error: serde_json::Error| refused(format!("the adapter's configuration: {error}"));
        let mut config: Value = serde_json::from_slice(&config).map_err(unusable)?;
        // As it was asked for, not as it is rounded to an f32.
        config["lora_dropout"] = json!((f64::from(self.dropout) * 1e6).round() / 1e6);
        Ok(format!("{config:#}\n").into_bytes())
    }

    /// Stores a model: a directory that can be served.
    pub(super) fn model(&self, shards: &[BlobId]) -> Result<TrainingReport, SessionError> {
        let (weights, usable) = self.weights(shards)?;
        let mut files = vec![file("config.json", self.storage.put(&self.configuration()?)?)];
        for name in COMPANIONS {
            match File::open(self.place.directory.join(name)) {
                Ok(source) => files.push(file(name, self.copy(source)?)),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
        files.push(file("model.safetensors", weights));
        let manifest = self.manifest(&files)?;
        Ok(TrainingReport::ModelExported { manifest, files, usable })
    }

    /// The model's configuration; its weights are f32 now.
    fn configuration(&self) -> Result<Vec<u8>, SessionError> {
        let path = self.place.directory.join("config.json");
        let unusable = |error: serde_json::Error| refused(format!("{}: {error}", path.display()));
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?).map_err(unusable)?;
        let name = if config["dtype"].is_null() { "torch_dtype" } else { "dtype" };
        config[name] = json!("float32");
        Ok(format!("{config:#}\n").into_bytes())
    }

    fn copy(&self, mut source: File) -> Result<BlobInfo, SessionError> {
        self.storage.put_pieces(|put| {
            let mut piece = vec![0; PIECE_BYTES];
            loop {
                match source.read(&mut piece)? {
                    0 => return Ok(()),
                    read => put(&piece[..read])?,
                }
            }
        })
    }

    /// `model.safetensors`, one tensor after the other; and what makes the model useless, if anything does.
    fn weights(&self, shards: &[BlobId]) -> Result<(BlobInfo, Result<(), String>), SessionError> {
        let shape = &self.place.model.config().shape;
        let layout = Trained::Model.weights(shape, &RankSlice::whole(shape));
        let mut shards = self.open(shards)?;
        let mut usable = Ok(());
        let stored = self.storage.put_pieces(|put| {
            put(&header(layout.shares()))?;
            for share in layout.shares() {
                let (numbers, own) = model_tensor(share, self.at, &mut shards)?;
                usable = std::mem::replace(&mut usable, Ok(())).and(own);
                for chunk in numbers.chunks(CHUNK) {
                    put(&chunk.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?;
                }
            }
            Ok(())
        })?;
        Ok((stored, usable))
    }

    fn manifest(&self, files: &[ExportedFile]) -> Result<BlobId, SessionError> {
        let mut manifest = Manifest::default();
        for ExportedFile { name, blob, bytes } in files {
            let entry = BlobInfo { id: *blob, bytes: *bytes };
            manifest.insert(name, entry).map_err(|error: BlobError| SessionError::from(error))?;
        }
        Ok(self.storage.put_manifest(&manifest)?.id)
    }
}

fn file(name: &str, stored: BlobInfo) -> ExportedFile {
    ExportedFile { name: name.to_owned(), blob: stored.id, bytes: stored.bytes }
}

/// What a safetensors file begins with. Names ascend, whatever order a JSON object keeps, so that equal models are equal files.
fn header(shares: &[TensorShare]) -> Vec<u8> {
    let mut entries = BTreeMap::new();
    let mut offset = 0;
    for share in shares {
        let shape = if share.is_vector { &share.shape[1..] } else { &share.shape[..] };
        let end = offset + 4 * share.numbers();
        let entry = json!({"data_offsets": [offset, end], "dtype": "F32", "shape": shape});
        entries.insert(share.name.clone(), entry);
        offset = end;
    }
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    header.extend(entries);
    let mut header = Value::Object(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()
}

/// What an adapter's files call the model: a hub's id, or the name of a directory wherever it lies, so that the same training gives
/// the same files.
fn base_name(model: &str) -> &str {
    let path = std::path::Path::new(model);
    if !path.is_absolute() {
        return model;
    }
    path.file_name().and_then(std::ffi::OsStr::to_str).unwrap_or(model)
}
