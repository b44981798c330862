//! `--cache`: where packed copies of the weights are kept.

use anyhow::{Context, Result};
use ashlar_model::CachePlace;
use clap::Args;
use std::path::PathBuf;

/// The argument, as several commands have it.
#[derive(Debug, Clone, Args)]
pub(crate) struct CacheArgs {
    /// Keep a packed copy of the weights, so that the next start reads it instead of packing them again; default of DIR:
    /// `.ashlar` in the model's directory, or beside its GGUF file. Takes as much disk as the weights take memory.
    #[arg(long, value_name = "DIR", num_args = 0..=1, require_equals = true)]
    cache: Option<Option<PathBuf>>,
}

impl CacheArgs {
    /// The place asked for, if one is. Roles run elsewhere, so that it does not depend on the working directory.
    pub(crate) fn place(&self) -> Result<Option<CachePlace>> {
        Ok(match &self.cache {
            None => None,
            Some(None) => Some(CachePlace::BesideModel),
            Some(Some(directory)) => Some(CachePlace::Directory(
                std::path::absolute(directory).with_context(|| format!("--cache={}", directory.display()))?,
            )),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        cache: CacheArgs,
        #[arg(long)]
        model: Option<String>,
    }

    #[test]
    fn a_directory_is_optional_and_never_the_next_argument() {
        let place = |args: &[&str]| {
            Command::try_parse_from([&["ashlar"], args].concat()).unwrap().cache.place().unwrap()
        };
        assert_eq!(place(&["--model", "m"]), None);
        assert_eq!(place(&["--cache", "--model", "m"]), Some(CachePlace::BesideModel));
        assert_eq!(place(&["--cache=/c"]), Some(CachePlace::Directory("/c".into())));
        let here = std::env::current_dir().unwrap();
        assert_eq!(place(&["--cache=c"]), Some(CachePlace::Directory(here.join("c"))));
    }
}
