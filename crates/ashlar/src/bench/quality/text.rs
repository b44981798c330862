//! A text as chunks of tokens, cut as `llama-perplexity` cuts it, so that figures can be compared.

use anyhow::{Context, Result, bail};
use ashlar_tokenizer::Tokenizer;
use ashlar_vocabulary::TokenId;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

/// Longer texts are refused: tokenising takes many times their size in memory, and nobody waits for them.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// A tokenised text.
#[derive(Debug)]
pub(super) struct Text {
    /// Length of the text.
    pub(super) bytes: usize,
    /// All whole chunks, one after the other.
    tokens: Vec<TokenId>,
    /// Replaces the first token of each chunk, if the tokenizer begins texts with one.
    bos: Option<TokenId>,
    chunk: usize,
}

impl Text {
    /// Reads and tokenises `path`; at most `tokens_max` tokens in whole chunks of `chunk`.
    pub(super) fn read(
        path: &Path,
        tokenizer: &Tokenizer,
        chunk: usize,
        tokens_max: Option<usize>,
    ) -> Result<Text> {
        let text = read(path).with_context(|| format!("cannot use the text {}", path.display()))?;
        let mut tokens = tokenizer.encode(&text, true)?;
        let all = tokens.len();
        tokens.truncate(tokens_max.unwrap_or(all));
        tokens.truncate(tokens.len() / chunk * chunk);
        if tokens.is_empty() {
            bail!(
                "{} has {all} tokens and a chunk takes {chunk}: give a longer text or a shorter --chunk (--tokens must \
                 allow for one)",
                path.display()
            );
        }
        // Only a tokenizer that adds the token to every text does so to an empty one.
        let bos =
            tokenizer.encode("", true)?.first().copied().filter(|id| tokenizer.bos_token_id() == Some(*id));
        Ok(Text { bytes: text.len(), tokens, bos, chunk })
    }

    /// Tokens that are computed.
    pub(super) fn tokens(&self) -> &[TokenId] {
        &self.tokens
    }

    /// How many chunks there are.
    pub(super) fn chunks_count(&self) -> usize {
        self.tokens.len() / self.chunk
    }

    /// The chunks as models see them.
    pub(super) fn chunks(&self) -> impl Iterator<Item = Vec<TokenId>> {
        self.tokens.chunks_exact(self.chunk).map(|chunk| {
            let mut chunk = chunk.to_vec();
            if let Some(bos) = self.bos {
                chunk[0] = bos;
            }
            chunk
        })
    }

    /// The positions of a chunk of `chunk` tokens whose predictions are scored: those of its second half that are
    /// followed by a token.
    pub(super) fn scored(chunk: usize) -> Range<usize> {
        chunk / 2..chunk.saturating_sub(1)
    }

    /// An error where `other` reads these tokens as another text: its model would be asked something else.
    pub(super) fn require_same_pieces(&self, ours: &Tokenizer, other: &Tokenizer, name: &str) -> Result<()> {
        for &token in &self.tokens {
            let (ours, other) = (ours.token_text(token), other.token_text(token));
            if ours != other {
                bail!("the vocabularies differ: token {token} is {ours:?}, and {other:?} for {name}");
            }
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(TEXT_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > TEXT_BYTES_MAX {
        bail!("it is longer than {} MiB: give the beginning of it", TEXT_BYTES_MAX >> 20);
    }
    if bytes.is_empty() {
        bail!("it is empty");
    }
    String::from_utf8(bytes).context("it is not UTF-8")
}
