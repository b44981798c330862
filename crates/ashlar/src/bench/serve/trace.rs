//! Recorded arrivals: JSON lines of our own, Azure's CSV and Mooncake's JSON lines.

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::path::Path;

/// One recorded request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TraceEntry {
    /// Seconds since the first request.
    pub(super) at_s: f64,
    /// Tokens of the prompt.
    pub(super) input_tokens: usize,
    /// Tokens of the answer.
    pub(super) output_tokens: usize,
    /// Names of the prompt's blocks of [`BLOCK_TOKENS`] tokens: equal names are equal tokens. Empty: nothing is shared.
    pub(super) blocks: Vec<u64>,
}

/// Tokens that one name of a Mooncake trace stands for.
pub(super) const BLOCK_TOKENS: usize = 512;

/// Reads the first `limit` requests of a trace file, in order of arrival.
pub(super) fn read(path: &Path, limit: usize) -> Result<Vec<TraceEntry>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text, limit).with_context(|| path.display().to_string())
}

/// Parses a format, told apart by the first line.
fn parse(text: &str, limit: usize) -> Result<Vec<TraceEntry>> {
    let mut entries = match text.trim_start().starts_with('{') {
        true if text
            .lines()
            .find(|line| !line.trim().is_empty())
            .is_some_and(|line| line.contains("\"at_s\"")) =>
        {
            parse_lines(text, 0, limit, ours)?
        }
        true => parse_lines(text, 0, limit, mooncake)?,
        false => {
            let header = text.lines().next().unwrap_or_default();
            if !header.trim_start_matches('\u{feff}').starts_with("TIMESTAMP,ContextTokens,GeneratedTokens") {
                bail!("neither JSON lines nor a CSV with TIMESTAMP,ContextTokens,GeneratedTokens");
            }
            parse_lines(text, 1, limit, azure)?
        }
    };
    entries.sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
    let Some(start) = entries.first().map(|entry| entry.at_s) else { bail!("the trace has no request") };
    entries.iter_mut().for_each(|entry| entry.at_s -= start);
    Ok(entries)
}

fn parse_lines(
    text: &str,
    skip: usize,
    limit: usize,
    entry: fn(&str) -> Result<TraceEntry>,
) -> Result<Vec<TraceEntry>> {
    text.lines()
        .enumerate()
        .skip(skip)
        .filter(|(_, line)| !line.trim().is_empty())
        .take(limit)
        .map(|(index, line)| entry(line.trim()).with_context(|| format!("line {}", index + 1)))
        .collect()
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct OurLine {
    /// Seconds.
    at_s: f64,
    prompt_tokens: usize,
    output_tokens: usize,
}

fn ours(line: &str) -> Result<TraceEntry> {
    let line: OurLine = serde_json::from_str(line)?;
    if !line.at_s.is_finite() || line.at_s < 0.0 {
        bail!("at_s is {}: it counts seconds from 0", line.at_s);
    }
    if line.prompt_tokens == 0 || line.output_tokens == 0 {
        bail!("a request has at least one token of each: prompt_tokens and output_tokens");
    }
    Ok(TraceEntry {
        at_s: line.at_s,
        input_tokens: line.prompt_tokens,
        output_tokens: line.output_tokens,
        blocks: Vec::new(),
    })
}

#[derive(Debug, Deserialize)]
struct MooncakeLine {
    /// Milliseconds.
    timestamp: f64,
    input_length: usize,
    output_length: usize,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

fn mooncake(line: &str) -> Result<TraceEntry> {
    let line: MooncakeLine = serde_json::from_str(line)?;
    Ok(TraceEntry {
        at_s: line.timestamp / 1e3,
        input_tokens: line.input_length.max(1),
        output_tokens: line.output_length.max(1),
        blocks: line.hash_ids,
    })
}

fn azure(line: &str) -> Result<TraceEntry> {
    let fields: Vec<&str> = line.split(',').collect();
    let [timestamp, input, output] = fields[..] else { bail!("three fields are expected") };
    let tokens =
        |field: &str| field.trim().parse::<usize>().with_context(|| format!("`{field}` is no number"));
    Ok(TraceEntry {
        at_s: seconds(timestamp).with_context(|| format!("`{timestamp}` is no time"))?,
        input_tokens: tokens(input)?.max(1),
        output_tokens: tokens(output)?.max(1),
        blocks: Vec::new(),
    })
}

/// Seconds of `2023-11-16 18:17:03.9799600`; a zone after it is ignored, for only differences count.
fn seconds(timestamp: &str) -> Option<f64> {
    let (date, time) = timestamp.trim().split_once([' ', 'T'])?;
    let mut date = date.splitn(3, '-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let digits = time.find(|c: char| !(c.is_ascii_digit() || c == ':' || c == '.')).unwrap_or(time.len());
    let mut time = time[..digits].splitn(3, ':').map(|part| part.parse::<f64>().ok());
    let (hour, minute, second) = (time.next()??, time.next()??, time.next()??);
    Some(days(year, month, day) as f64 * 86_400.0 + hour * 3600.0 + minute * 60.0 + second)
}

/// Days since an arbitrary one in the Gregorian calendar (H. Hinnant, "chrono-compatible low-level date algorithms").
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_azure_csv_counts_from_its_first_arrival_across_midnight() {
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2024-02-28 23:59:59.5000000,374,44\r\n\
                    2024-02-29 00:00:01.2500000+00:00,396,109\r\n2024-03-01 00:00:00,1,0\r\n";
        let entries = parse(text, 10).unwrap();
        assert_eq!(entries.len(), 3);
        assert_eq!((entries[0].at_s, entries[0].input_tokens, entries[0].output_tokens), (0.0, 374, 44));
        assert_eq!(entries[1].at_s, 1.75);
        assert_eq!((entries[2].at_s, entries[2].output_tokens), (86_400.5, 1));
    }

    #[test]
    fn lines_of_our_own_are_read_and_bad_ones_named() {
        let line = |at_s: &str, prompt: &str| {
            format!("{{\"at_s\": {at_s}, \"prompt_tokens\": {prompt}, \"output_tokens\": 120}}\n")
        };
        let entries = parse(&(line("0.5", "300") + "\n" + &line("2", "7")), 9).unwrap();
        assert_eq!((entries[0].at_s, entries[0].input_tokens, entries[0].output_tokens), (0.0, 300, 120));
        assert_eq!((entries.len(), entries[1].at_s), (2, 1.5));
        for (bad, why) in [
            (line("-1", "3"), "at_s"),
            (line("1", "0"), "at least one"),
            ("{\"at_s\": 1}\n".to_owned(), "prompt_tokens"),
            (line("1", "3").replace("output", "generated"), "generated_tokens"),
        ] {
            let error = format!("{:#}", parse(&(line("0", "1") + &bad), 9).unwrap_err());
            assert!(error.contains("line 2") && error.contains(why), "{error}");
        }
    }

    #[test]
    fn mooncake_lines_keep_their_blocks_and_the_limit_holds() {
        let text = "{\"timestamp\": 3000, \"input_length\": 6758, \"output_length\": 500, \"hash_ids\": [0, 1]}\n\
                    {\"timestamp\": 4500, \"input_length\": 10, \"output_length\": 3, \"hash_ids\": [0]}\n";
        let entries = parse(text, 2).unwrap();
        assert_eq!((entries[0].at_s, entries[1].at_s), (0.0, 1.5));
        assert_eq!(entries[0].blocks, [0, 1]);
        assert_eq!(parse(text, 1).unwrap().len(), 1);
    }

    #[test]
    fn a_bad_line_is_named() {
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,374,44\nnonsense\n";
        assert!(format!("{:#}", parse(text, 9).unwrap_err()).contains("line 3"));
        assert!(parse("a,b\n1,2\n", 9).is_err());
        assert!(parse("TIMESTAMP,ContextTokens,GeneratedTokens\n", 9).is_err());
    }
}
