//! What is tried: everything that reads bytes of others.
//!
//! Layout: [`weights`] (files of models), [`text`] (tokenizers, templates, grammars), [`learning`] (datasets, adapters, checkpoints),
//! [`requests`] (HTTP bodies), [`wire`] (messages between processes), [`setup`] (configuration, tokens, certificates).

pub mod learning;
pub mod requests;
pub mod setup;
pub mod text;
pub mod weights;
pub mod wire;

use crate::mutate::{Corpus, Seed};
use crate::{Memory, Subject, Target};
use anyhow::{Context, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Enough for what a parser keeps of a small input.
const SMALL: Memory = Memory { fixed: 4 << 20, per_byte: 256 };
/// With room for what is built from it: tries, automata, vocabularies.
/// A grammar's compiler takes some 80 MiB before it gives up.
const LARGE: Memory = Memory { fixed: 128 << 20, per_byte: 1024 };

/// Every target.
pub static ALL: &[Target] = &[
    weights::SAFETENSORS,
    weights::INDEX,
    weights::GGUF,
    weights::MODEL_CONFIG,
    weights::PRESENT,
    weights::PACKED_COPY,
    text::TOKENIZER,
    text::TOKENIZER_CONFIG,
    text::TEMPLATE,
    text::SCHEMA,
    text::REGEX,
    text::TOOLS,
    text::ANSWER,
    learning::SUPERVISED,
    learning::PREFERENCES,
    learning::SAMPLES,
    learning::ADAPTER,
    learning::ADAPTER_IMPORT,
    learning::CHECKPOINT,
    requests::CHAT,
    requests::COMPLETION,
    requests::RESPONSE,
    requests::TOKENIZE,
    requests::JOB,
    requests::DEPLOYMENT,
    requests::LIST,
    requests::MULTIPART,
    wire::MESSAGES,
    wire::FRAMES,
    wire::ROWS,
    wire::HANDSHAKE,
    setup::GATEWAY,
    setup::SCHEDULER,
    setup::NODE,
    setup::SETTINGS,
    setup::TOKEN,
    setup::CERTIFICATE_REQUEST,
];

/// A target that fails in every way, for the campaign's own test.
pub static SELF_TEST: Target =
    Target { name: "self-test", about: "fails in every way", memory: SMALL, open: self_test };

fn self_test(_: &Path) -> Result<Subject> {
    let corpus = texts(["good", "panic", "caught", "memory", "abort", "good"], "");
    Ok(subject(corpus, |input| {
        match input {
            b"panic" => panic!("out loud"),
            b"caught" => {
                let caught = std::panic::catch_unwind(|| panic!("in secret"));
                drop(caught);
            }
            b"memory" => drop(vec![1_u8; 8 << 20]),
            b"abort" => std::process::abort(),
            _ => {}
        }
        true
    }))
}

/// The target of this name.
pub fn named(name: &str) -> Option<&'static Target> {
    ALL.iter().chain([&SELF_TEST]).find(|target| target.name == name)
}

/// A subject without more ado.
fn subject(corpus: Corpus, read: impl FnMut(&[u8]) -> bool + 'static) -> Subject {
    Subject { corpus, read: Box::new(read) }
}

/// The words of a text, by white space.
fn words(text: &str) -> Vec<Vec<u8>> {
    text.split_whitespace().map(|word| word.as_bytes().to_vec()).collect()
}

/// A corpus of texts.
fn texts<S: Into<Seed>>(seeds: impl IntoIterator<Item = S>, own: &str) -> Corpus {
    Corpus { seeds: seeds.into_iter().map(Into::into).collect(), words: words(own), ..Corpus::default() }
}

/// A file whose content is replaced by each input.
struct InputFile {
    path: PathBuf,
    file: File,
}

impl InputFile {
    fn new(directory: &Path, name: &str) -> Result<InputFile> {
        let path = directory.join(name);
        let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(InputFile { path, file })
    }

    /// Puts an input in the place of the one before.
    fn put(&self, input: &[u8]) {
        let put = self.file.set_len(0).and_then(|()| self.file.write_all_at(input, 0));
        assert!(put.is_ok(), "an input cannot be written: {put:?}");
    }
}

/// Puts a model's small files into a directory: a vocabulary of bytes, a template that knows tools and reasoning.
fn model_texts(directory: &Path) -> Result<PathBuf> {
    let model = directory.join("model");
    std::fs::create_dir_all(&model)?;
    std::fs::write(model.join("tokenizer.json"), text::DEMO_TOKENIZER)?;
    let config = serde_json::json!({
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "chat_template": text::TEMPLATES[1],
    });
    std::fs::write(model.join("tokenizer_config.json"), config.to_string())?;
    Ok(model)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_target_accepts_one_of_its_seeds_and_each_has_its_own_name() {
        let mut names: Vec<_> = ALL.iter().map(|target| target.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
        for target in ALL {
            let directory = tempfile::tempdir().unwrap();
            let mut subject = (target.open)(directory.path()).unwrap();
            let seeds = subject.corpus.seeds.clone();
            let accepted = seeds.iter().filter(|seed| (subject.read)(&seed.bytes)).count();
            assert!(accepted > 0, "{}: none of {} seeds is accepted", target.name, seeds.len());
        }
    }
}
