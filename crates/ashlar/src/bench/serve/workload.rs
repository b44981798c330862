//! What is asked, and when: a pure function of arguments and seed.

use super::trace::{self, TraceEntry};
use crate::bench::random::Random;
use anyhow::{Result, bail};
use serde_json::{Value, json};
use std::str::FromStr;

/// A number of tokens: fixed, or uniform in a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Length {
    low: usize,
    high: usize,
}

impl FromStr for Length {
    type Err = String;

    fn from_str(text: &str) -> Result<Length, String> {
        let number =
            |part: &str| part.trim().parse::<usize>().map_err(|_| format!("`{text}`: write 128 or 64..512"));
        let (low, high) = match text.split_once("..") {
            Some((low, high)) => (number(low)?, number(high.trim_start_matches('='))?),
            None => (number(text)?, number(text)?),
        };
        match low > 0 && low <= high {
            true => Ok(Length { low, high }),
            false => Err(format!("`{text}`: at least 1, the smaller number first")),
        }
    }
}

impl Length {
    fn draw(self, random: &mut Random) -> usize {
        random.between(self.low as u64, self.high as u64) as usize
    }
}

/// Where lengths and prompts come from.
#[derive(Debug, Clone)]
pub(super) enum Source {
    /// Random lengths.
    Random {
        /// Tokens of a prompt, after the shared prefix.
        input: Length,
        /// Tokens of an answer.
        output: Length,
        /// Tokens of the shared prefix.
        prefix: usize,
        /// How many different prefixes there are.
        groups: usize,
    },
    /// A recorded trace.
    Trace(Vec<TraceEntry>),
}

/// When requests are sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Pace {
    /// Open loop: gaps of a Poisson process with so many requests per second.
    Poisson(f64),
    /// Open loop: at the trace's times, so many times faster.
    Recorded(f64),
    /// Closed loop: so many at any time.
    Closed(usize),
}

/// Bounds that the service or the caller sets.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caps {
    /// Longest prompt.
    pub(super) input: usize,
    /// Longest answer.
    pub(super) output: usize,
    /// Longest prompt and answer together.
    pub(super) context: usize,
}

/// One request to send.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Planned {
    /// Seconds after the start; `None` in a closed loop.
    pub(super) at_s: Option<f64>,
    /// The `prompt` field.
    pub(super) prompt: Value,
    /// Tokens to generate.
    pub(super) output_tokens: usize,
    /// Whether a cap shortened it.
    pub(super) shortened: bool,
}

/// Generates requests.
#[derive(Debug, Clone)]
pub(super) struct Workload {
    /// Lengths and prompts.
    pub(super) source: Source,
    /// Times.
    pub(super) pace: Pace,
    /// Bounds.
    pub(super) caps: Caps,
    /// Token ids are drawn below this number.
    pub(super) vocabulary: usize,
    /// Send words instead of token ids.
    pub(super) text: bool,
    /// Names all streams of randomness.
    pub(super) seed: u64,
}

/// The purposes of the streams of randomness.
mod purpose {
    pub(super) const ARRIVALS: u64 = 1;
    pub(super) const REQUEST: u64 = 1 << 40;
    pub(super) const PREFIX: u64 = 2 << 40;
    pub(super) const BLOCK: u64 = 3 << 40;
}

/// The smallest token id that is sent: the ones below are special in most vocabularies.
const FIRST_TOKEN: usize = 3;

/// Words that are one token, with the space before, in most vocabularies.
const WORDS: [&str; 16] = [
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "on", "by", "at", "from",
];

impl Workload {
    /// Checks what does not fit together.
    pub(super) fn check(&self) -> Result<()> {
        if self.vocabulary <= FIRST_TOKEN + 1 {
            bail!("--vocabulary must be larger than {}", FIRST_TOKEN + 1);
        }
        if self.caps.context < 2 {
            bail!("the model's context leaves no room for a prompt and an answer");
        }
        if let (Pace::Recorded(_), Source::Random { .. }) = (self.pace, &self.source) {
            bail!("recorded times need --trace");
        }
        Ok(())
    }

    /// Requests in order; endless for random lengths, the trace once for a trace.
    pub(super) fn requests(&self) -> impl Iterator<Item = Planned> + '_ {
        let mut arrivals = Random::new(self.seed, purpose::ARRIVALS);
        let mut clock = 0.0;
        (0u64..).map_while(move |index| {
            let (prompt, output, recorded) = self.tokens(index)?;
            let at_s = match self.pace {
                Pace::Poisson(rate) => {
                    clock += arrivals.exponential(1.0 / rate);
                    Some(clock)
                }
                Pace::Recorded(speed) => Some(recorded / speed),
                Pace::Closed(_) => None,
            };
            Some(self.capped(at_s, prompt, output))
        })
    }

    /// Prompt, answer length and recorded time of request `index`.
    fn tokens(&self, index: u64) -> Option<(Vec<u64>, usize, f64)> {
        let mut random = Random::new(self.seed, purpose::REQUEST + index);
        match &self.source {
            Source::Random { input, output, prefix, groups } => {
                let (input, output) = (input.draw(&mut random), output.draw(&mut random));
                let mut tokens = Vec::with_capacity(prefix + input);
                if *prefix > 0 {
                    let group = random.between(0, groups.saturating_sub(1) as u64);
                    self.extend(&mut tokens, *prefix, &mut Random::new(self.seed, purpose::PREFIX + group));
                }
                self.extend(&mut tokens, input, &mut random);
                Some((tokens, output, 0.0))
            }
            Source::Trace(entries) => {
                let entry = entries.get(usize::try_from(index).ok()?)?;
                let mut tokens = Vec::with_capacity(entry.input_tokens);
                for block in &entry.blocks {
                    let missing = entry.input_tokens - tokens.len();
                    let block = &mut Random::new(self.seed, purpose::BLOCK + block);
                    self.extend(&mut tokens, missing.min(trace::BLOCK_TOKENS), block);
                }
                let missing = entry.input_tokens - tokens.len();
                self.extend(&mut tokens, missing, &mut random);
                Some((tokens, entry.output_tokens, entry.at_s))
            }
        }
    }

    fn extend(&self, tokens: &mut Vec<u64>, count: usize, random: &mut Random) {
        tokens.extend((0..count).map(|_| random.between(FIRST_TOKEN as u64, self.vocabulary as u64 - 1)));
    }

    fn capped(&self, at_s: Option<f64>, mut tokens: Vec<u64>, output: usize) -> Planned {
        let Caps { input, output: output_cap, context } = self.caps;
        let output_tokens = output.min(output_cap).min(context - 1);
        let keep = tokens.len().min(input).min(context - output_tokens);
        let shortened = keep < tokens.len() || output_tokens < output;
        // The end is dropped, so that shared beginnings stay shared.
        tokens.truncate(keep);
        let prompt = match self.text {
            false => json!(tokens),
            true => {
                let words = tokens.iter().map(|&token| WORDS[token as usize % WORDS.len()]);
                json!(words.collect::<Vec<_>>().join(" "))
            }
        };
        Planned { at_s, prompt, output_tokens, shortened }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const NO_CAPS: Caps = Caps { input: usize::MAX, output: usize::MAX, context: usize::MAX };

    fn random(prefix: usize, pace: Pace) -> Workload {
        let (input, output) = ("8..16".parse().unwrap(), "4".parse().unwrap());
        let source = Source::Random { input, output, prefix, groups: 2 };
        Workload { source, pace, caps: NO_CAPS, vocabulary: 256, text: false, seed: 5 }
    }

    fn tokens(planned: &Planned) -> Vec<u64> {
        planned.prompt.as_array().unwrap().iter().map(|token| token.as_u64().unwrap()).collect()
    }

    #[test]
    fn lengths_are_one_number_or_a_range() {
        assert_eq!("64".parse(), Ok(Length { low: 64, high: 64 }));
        assert_eq!("64..128".parse(), Ok(Length { low: 64, high: 128 }));
        for wrong in ["", "0", "9..8", "a..b"] {
            assert!(wrong.parse::<Length>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_seed_gives_the_same_requests_again_and_another_seed_others() {
        let workload = random(0, Pace::Poisson(10.0));
        let take = |workload: &Workload| workload.requests().take(20).collect::<Vec<_>>();
        assert_eq!(take(&workload), take(&workload));
        assert_ne!(take(&workload), take(&Workload { seed: 6, ..workload.clone() }));
        for planned in take(&workload) {
            assert!((8..=16).contains(&tokens(&planned).len()));
            assert!(tokens(&planned).iter().all(|token| (3..256).contains(token)));
        }
    }

    #[test]
    fn poisson_arrivals_ascend_at_the_asked_rate() {
        let workload = random(0, Pace::Poisson(50.0));
        let times: Vec<f64> = workload.requests().take(2000).filter_map(|planned| planned.at_s).collect();
        assert!(times.is_sorted());
        assert!((times[1999] / 2000.0 - 0.02).abs() < 0.002, "{}", times[1999]);
    }

    #[test]
    fn prefixes_are_shared_within_a_group_only() {
        let workload = random(32, Pace::Closed(1));
        let mut prefixes: Vec<Vec<u64>> =
            workload.requests().take(40).map(|p| tokens(&p)[..32].to_vec()).collect();
        prefixes.sort();
        prefixes.dedup();
        assert_eq!(prefixes.len(), 2);
    }

    #[test]
    fn equal_blocks_of_a_trace_are_equal_tokens() {
        let entry = |at_s, blocks: &[u64], input_tokens| TraceEntry {
            at_s,
            input_tokens,
            output_tokens: 9,
            blocks: blocks.to_vec(),
        };
        let trace = vec![entry(0.0, &[7, 8], 600), entry(2.0, &[7, 9], 1100)];
        let workload = Workload { source: Source::Trace(trace), ..random(0, Pace::Recorded(4.0)) };
        let planned: Vec<Planned> = workload.requests().collect();
        assert_eq!((planned.len(), planned[1].at_s), (2, Some(0.5)));
        let (a, b) = (tokens(&planned[0]), tokens(&planned[1]));
        assert_eq!((a.len(), b.len()), (600, 1100));
        assert_eq!(a[..512], b[..512]);
        assert_ne!(a[512..600], b[512..600]);
    }

    #[test]
    fn caps_shorten_the_end_and_say_so() {
        let caps = Caps { input: 100, output: 3, context: 10 };
        let planned = Workload { caps, ..random(0, Pace::Closed(1)) }.requests().next().unwrap();
        assert_eq!((tokens(&planned).len(), planned.output_tokens, planned.shortened), (7, 3, true));
    }

    #[test]
    fn text_prompts_have_a_word_per_token() {
        let planned = Workload { text: true, ..random(0, Pace::Closed(1)) }.requests().next().unwrap();
        let words = planned.prompt.as_str().unwrap().split(' ').count();
        assert!((8..=16).contains(&words));
    }
}
