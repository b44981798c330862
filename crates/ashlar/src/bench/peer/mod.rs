//! Another program's benchmark, run in turn with our own, so that ratios come from one run.
//!
//! Layout: [`process`] (a shell command with a time limit), [`figures`] (what benchmarks print, read). This file joins
//! them: a command with placeholders in, the peer's speed beside ours out.
//!
//! **Invariant:** nothing here knows a peer by name. What can be read is told by the fields of a record.

mod figures;
mod process;

pub(crate) use figures::{Figure, Phase};

use super::stats::median;
use super::table::figure;
use anyhow::{Result, bail};
use serde::Serialize;
use std::time::Duration;

/// A peer's command and how long it may take.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    command: String,
    limit: Duration,
}

/// What a command may ask for by placeholders: the sizes of our own measurements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes<'a> {
    /// `{threads}`.
    pub(crate) threads: usize,
    /// `{prefill}`: tokens of the prompt.
    pub(crate) prefill: usize,
    /// `{decode}`: steps.
    pub(crate) decode: usize,
    /// `{context}`: tokens in the cache before decoding.
    pub(crate) context: usize,
    /// `{batch}`: sequences per decode step, separated by commas.
    pub(crate) batches: &'a [usize],
}

/// A peer beside one of our measurements.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Beside {
    /// The peer's median.
    pub(crate) tokens_per_s: f64,
    /// Ours over the peer's in the same repeat; the median over the repeats.
    pub(crate) ratio: f64,
    /// Lowest and highest of these ratios.
    pub(crate) ratio_range: (f64, f64),
    /// Repeats in which both were measured.
    pub(crate) repeats: usize,
}

impl Peer {
    /// Fills the placeholders in. Other braces are the shell's.
    pub(crate) fn new(template: &str, sizes: &Sizes<'_>, limit: Duration) -> Peer {
        let batches: Vec<String> = sizes.batches.iter().map(usize::to_string).collect();
        let values = [
            ("{threads}", sizes.threads.to_string()),
            ("{prefill}", sizes.prefill.to_string()),
            ("{decode}", sizes.decode.to_string()),
            ("{context}", sizes.context.to_string()),
            ("{batch}", batches.join(",")),
        ];
        let fill = |command: String, (name, value): &(&str, String)| command.replace(name, value);
        Peer { command: values.iter().fold(template.to_owned(), fill), limit }
    }

    /// The command as the shell gets it.
    pub(crate) fn command(&self) -> &str {
        &self.command
    }

    /// Runs the peer once. An error where it fails, takes too long, or reports none of `wanted`.
    pub(crate) fn run(&self, wanted: &[(Phase, usize)]) -> Result<Vec<Figure>> {
        let said = process::run(&self.command, self.limit)?;
        let found = figures::parse(&said.output);
        if found.is_empty() {
            bail!(
                "the peer printed no figures that can be read: it should print `prefill ROWS TOKENS_PER_S` and \
                 `decode ROWS TOKENS_PER_S`, or JSON records (see --help); the end of what it said:\n{}",
                said.tail()
            );
        }
        if !found.iter().any(|found| wanted.contains(&(found.phase, found.rows))) {
            let names = |kinds: &mut dyn Iterator<Item = (Phase, usize)>| {
                kinds.map(|(phase, rows)| format!("{phase} × {rows}")).collect::<Vec<_>>().join(", ")
            };
            bail!(
                "the peer measured {} and we {}: choose --prefill and --batches (or the peer's options) so that they meet",
                names(&mut found.iter().map(|found| (found.phase, found.rows))),
                names(&mut wanted.iter().copied())
            );
        }
        Ok(found)
    }
}

/// The peer beside our tokens per second in each repeat; `None` where it never reported this kind.
pub(crate) fn beside(ours: &[f64], peers: &[Vec<Figure>], phase: Phase, rows: usize) -> Option<Beside> {
    // Where a peer reports a kind twice, the later figure counts.
    let of =
        |figures: &Vec<Figure>| figures.iter().rev().find(|f| (f.phase, f.rows) == (phase, rows)).copied();
    let pairs: Vec<(f64, f64)> = ours
        .iter()
        .zip(peers)
        .filter_map(|(&ours, figures)| Some((ours, of(figures)?.tokens_per_s)))
        .collect();
    let ratios: Vec<f64> = pairs.iter().map(|(ours, peer)| ours / peer).collect();
    let least = ratios.iter().copied().reduce(f64::min)?;
    let most = ratios.iter().copied().reduce(f64::max)?;
    Some(Beside {
        tokens_per_s: median(&pairs.iter().map(|pair| pair.1).collect::<Vec<f64>>()),
        ratio: median(&ratios),
        ratio_range: (least, most),
        repeats: pairs.len(),
    })
}

impl Beside {
    /// Cells of a table: the peer's speed, and the ratio with its range.
    pub(crate) fn cells(beside: Option<&Beside>) -> [String; 2] {
        let Some(beside) = beside else { return ["–".to_owned(), "–".to_owned()] };
        let (low, high) = beside.ratio_range;
        let ratio = match beside.repeats {
            1 => format!("{:.2}", beside.ratio),
            _ => format!("{:.2} ({low:.2}…{high:.2})", beside.ratio),
        };
        [figure(beside.tokens_per_s), ratio]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const SIZES: Sizes<'static> =
        Sizes { threads: 2, prefill: 512, decode: 32, context: 128, batches: &[1, 8] };
    const WANTED: [(Phase, usize); 3] = [(Phase::Prefill, 512), (Phase::Decode, 1), (Phase::Decode, 8)];

    fn run(template: &str) -> Result<Vec<Figure>> {
        Peer::new(template, &SIZES, Duration::from_secs(30)).run(&WANTED)
    }

    fn error(template: &str) -> String {
        format!("{:#}", run(template).unwrap_err())
    }

    #[test]
    fn placeholders_become_sizes_and_other_braces_stay() {
        let peer = Peer::new(
            "bench -t {threads} -p {prefill} -n {decode} -c {context} -b {batch} ${HOME} {x}",
            &SIZES,
            Duration::ZERO,
        );
        assert_eq!(peer.command(), "bench -t 2 -p 512 -n 32 -c 128 -b 1,8 ${HOME} {x}");
    }

    #[test]
    fn a_peer_that_prints_lines_is_read() {
        let found = run("echo loading >&2; echo prefill {prefill} 123.5; echo decode 8 61").unwrap();
        let rates: Vec<_> = found.iter().map(|found| (found.phase, found.rows, found.tokens_per_s)).collect();
        assert_eq!(rates, [(Phase::Prefill, 512, 123.5), (Phase::Decode, 8, 61.0)]);
    }

    #[test]
    fn a_peer_that_fails_is_quoted() {
        let said = error("echo decode 1 5; echo no such model >&2; exit 3");
        assert!(said.contains("no such model") && said.contains("exit status: 3"), "{said}");
        let said = error("echo nothing to see");
        assert!(said.contains("no figures") && said.contains("nothing to see"), "{said}");
        let said = error("echo decode 2 5.0");
        assert!(said.contains("decode × 2") && said.contains("prefill × 512, decode × 1"), "{said}");
    }

    #[test]
    fn a_ratio_is_the_median_of_those_within_each_repeat() {
        let peer = |rate| vec![Figure { phase: Phase::Decode, rows: 1, tokens_per_s: rate }];
        let peers = [peer(10.0), peer(20.0), Vec::new(), peer(10.0)];
        let found = beside(&[20.0, 30.0, 99.0, 10.0], &peers, Phase::Decode, 1).unwrap();
        let expected = Beside { tokens_per_s: 10.0, ratio: 1.5, ratio_range: (1.0, 2.0), repeats: 3 };
        assert_eq!(found, expected);
        assert_eq!(Beside::cells(Some(&found)), ["10.0", "1.50 (1.00…2.00)"]);
        assert_eq!(beside(&[20.0], &peers, Phase::Decode, 2), None);
    }
}
