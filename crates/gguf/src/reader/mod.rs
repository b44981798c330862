//! Reading: headers are parsed once and kept, tensor data is read by position, only what is asked for.
//!
//! Layout: [`GgufFiles`] (a model of one or several files), `header.rs` (what one file says, checked), `cursor.rs`
//! (bounded reading of the header), `split.rs` (which files belong together), `tensor.rs` (slices of a tensor).
//!
//! **Invariants:** an opened model is consistent: names are unique, every tensor lies within its file, aligned, and
//! overlaps no other. Whatever bytes a file has, opening it ends in a value or an error, in memory proportional to its
//! header.

mod cursor;
pub(crate) mod header;
mod split;
mod tensor;

pub use cursor::HEADER_BYTES_MAX;
pub use split::{SPLIT_FILES_MAX, split_file_name};
pub use tensor::{TensorInfo, TensorReader};

use crate::error::GgufError;
use crate::metadata::Metadata;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

#[derive(Debug)]
struct OpenFile {
    path: PathBuf,
    file: File,
}

/// The file or files of one model.
#[derive(Debug)]
pub struct GgufFiles {
    files: Vec<OpenFile>,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    places: BTreeMap<String, usize>,
}

impl GgufFiles {
    /// Opens a model and reads its header. Of a split model, `path` may be any of the files; all must be there.
    pub fn open(path: &Path) -> Result<GgufFiles, GgufError> {
        let (given, header) = open(path, 0)?;
        let members = split::members(path, &header.metadata)?;
        if members.len() == 1 {
            let mut model = GgufFiles::empty(header.metadata);
            model.add(given, header.tensors)?;
            return Ok(model);
        }
        let count = members.len() as u64;
        let mut whole: Option<GgufFiles> = None;
        for (index, member) in members.iter().enumerate() {
            let (file, header) = open(member, index)?;
            split::check_member(member, &header.metadata, index as u64, count)?;
            let model = whole.get_or_insert_with(|| GgufFiles::empty(header.metadata));
            model.add(file, header.tensors)?;
        }
        let model = whole.unwrap_or_else(|| GgufFiles::empty(Metadata::new(path)));
        if let Some(expected) = model.metadata.get::<u64>("split.tensors.count")?
            && expected != model.tensors.len() as u64
        {
            let reason = format!(
                "`split.tensors.count` is {expected}, but the {count} files have {}",
                model.tensors.len()
            );
            return Err(GgufError::Split { path: members[0].clone(), reason });
        }
        Ok(model)
    }

    fn empty(metadata: Metadata) -> GgufFiles {
        GgufFiles { files: Vec::new(), metadata, tensors: Vec::new(), places: BTreeMap::new() }
    }

    fn add(&mut self, file: OpenFile, tensors: Vec<TensorInfo>) -> Result<(), GgufError> {
        for info in tensors {
            if let Some(place) = self.places.insert(info.name.clone(), self.tensors.len()) {
                let other = self.files[self.tensors[place].file].path.display();
                let reason = format!("its tensor `{}` is in {other}, too", info.name);
                return Err(GgufError::Split { path: file.path, reason });
            }
            self.tensors.push(info);
        }
        self.files.push(file);
        Ok(())
    }

    /// The model's metadata: that of the (first) file.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The files in order.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// All tensors, in the order of the files.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Whether a tensor is present.
    pub fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// A reader for the tensor `name`.
    pub fn tensor(&self, name: &str) -> Result<TensorReader<'_>, GgufError> {
        let Some(place) = self.places.get(name) else {
            let path = self.files.first().map(|file| file.path.clone()).unwrap_or_default();
            return Err(GgufError::NoTensor { path, name: name.to_owned() });
        };
        let info = &self.tensors[*place];
        let file = &self.files[info.file];
        Ok(TensorReader { file: &file.file, path: &file.path, info })
    }
}

/// Bytes of the header of the file at `path`, which may be one of several of a model: all before its tensors' data. What lies
/// behind them is not read.
///
/// # Errors
/// [`GgufError`], where they are no header.
pub fn header_bytes(path: &Path) -> Result<u64, GgufError> {
    Ok(open(path, 0)?.1.data_start)
}

fn open(path: &Path, index: usize) -> Result<(OpenFile, header::Header), GgufError> {
    let read = |source| GgufError::Read { path: path.to_owned(), source };
    // Before it is opened, because opening a FIFO waits for somebody to write.
    let metadata = fs::metadata(path).map_err(read)?;
    if !metadata.is_file() {
        let reason = "it is not a regular file: give the path of a .gguf file".into();
        return Err(GgufError::Unsupported { path: path.to_owned(), reason });
    }
    let file = File::open(path).map_err(read)?;
    let length = file.metadata().map_err(read)?.len();
    let header = header::read(&file, path, length, index)?;
    Ok((OpenFile { path: path.to_owned(), file }, header))
}
