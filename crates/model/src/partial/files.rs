//! Which files make up a model.

use crate::gguf;
use crate::weights::{self, INDEX_FILE, WeightError};
use ashlar_gguf::GgufFiles;
use std::fs;
use std::path::{Path, PathBuf};

/// Files of a Hugging Face directory beside its weights; only the first is always there.
const SMALL_FILES: [&str; 11] = [
    "config.json",
    INDEX_FILE,
    "tokenizer.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];

/// Longest name of a file.
const NAME_BYTES_MAX: usize = 200;

/// One file of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFile {
    /// Its name in the folder.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Whether it has weights; any other is small.
    pub weights: bool,
}

/// The files of one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFiles {
    /// Where they are.
    pub folder: PathBuf,
    /// All of them: small ones first.
    pub files: Vec<ModelFile>,
}

impl ModelFiles {
    /// Those of the model in `directory`, or of the GGUF file that it names.
    ///
    /// # Errors
    /// [`WeightError`], also for a name that is not plain.
    pub fn of(directory: &Path) -> Result<ModelFiles, WeightError> {
        let mut model = ModelFiles { folder: directory.to_owned(), files: Vec::new() };
        if let Some(file) = gguf::file_of(directory) {
            model.folder = file.parent().map(Path::to_owned).unwrap_or_default();
            for path in GgufFiles::open(&file)?.paths() {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                model.add(&name, true)?;
            }
            return Ok(model);
        }
        for name in SMALL_FILES {
            if name == SMALL_FILES[0] || directory.join(name).is_file() {
                model.add(name, false)?;
            }
        }
        for name in weights::file_names(directory)? {
            model.add(&name, true)?;
        }
        Ok(model)
    }

    fn add(&mut self, name: &str, weights: bool) -> Result<(), WeightError> {
        let path = self.folder.join(name);
        if !is_plain_name(name) {
            return Err(WeightError::UnsafeName { path: self.folder.clone(), name: name.to_owned() });
        }
        let bytes = fs::metadata(&path).map_err(|source| WeightError::Read { path, source })?.len();
        self.files.push(ModelFile { name: name.to_owned(), bytes, weights });
        Ok(())
    }
}

/// Whether `name` names a file of a model, in its own folder and nowhere else: letters, digits, `-`, `_` and `.`, not first.
pub fn is_plain_name(name: &str) -> bool {
    weights::is_plain(name) && name.len() <= NAME_BYTES_MAX && (is_small(name) || is_weight_file(name))
}

/// Whether a plain name is that of a file with weights.
pub fn is_weight_file(name: &str) -> bool {
    let extension = Path::new(name).extension();
    extension.is_some_and(|extension| extension == "safetensors" || extension == "gguf")
}

fn is_small(name: &str) -> bool {
    SMALL_FILES.contains(&name)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_stay_within_the_folder_and_the_model() {
        for name in ["config.json", "model-00001-of-00002.safetensors", "m.gguf", "tokenizer.json"] {
            assert!(is_plain_name(name), "{name}");
        }
        for name in [
            "",
            ".",
            "..",
            "../config.json",
            "/etc/passwd",
            "a/b.gguf",
            ".hidden.gguf",
            "m.gguf\0",
            "ä.gguf",
            "id_rsa",
            "model.safetensors.present",
        ] {
            assert!(!is_plain_name(name), "{name}");
        }
    }

    #[test]
    fn a_directory_is_its_small_files_and_its_weights() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/llama-sharded");
        let model = ModelFiles::of(&golden).unwrap();
        let names: Vec<&str> = model.files.iter().map(|file| file.name.as_str()).collect();
        assert_eq!(names[..2], ["config.json", INDEX_FILE]);
        assert_eq!(model.files.iter().filter(|file| file.weights).count(), 5, "{names:?}");
    }
}
