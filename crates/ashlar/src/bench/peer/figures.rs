//! Speeds in what a benchmark prints.
//!
//! Accepted, mixed with other text: lines `prefill ROWS TOKENS_PER_S` and `decode ROWS TOKENS_PER_S`, and JSON values
//! (one record, an array, or records under `results`; on one line or several) whose records have one of these sets of
//! fields:
//!
//! | fields | meaning |
//! |---|---|
//! | `phase`, `rows`, `tokens_per_s` | what `ashlar bench model --json` prints |
//! | `n_prompt`, `n_gen`, `avg_ts` | a prompt of `n_prompt` tokens, or `n_gen` tokens of one sequence (not both) |
//! | `pl`, `pp`, `speed_pp`, `speed_tg` | `pl` sequences decoding together; where it is one, its prompt of `pp` tokens |

use serde_json::Value;
use std::fmt;

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// One prompt; its rows are its tokens.
    Prefill,
    /// Tokens after tokens; its rows are the sequences.
    Decode,
}

/// One speed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Figure {
    /// What was measured.
    pub(crate) phase: Phase,
    /// Rows per step.
    pub(crate) rows: usize,
    /// Tokens per second, all sequences together.
    pub(crate) tokens_per_s: f64,
}

impl Phase {
    /// The name, as reports write it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
        }
    }

    fn of(name: &str) -> Option<Phase> {
        [Phase::Prefill, Phase::Decode].into_iter().find(|phase| phase.name() == name)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// All figures in `output`, in its order.
pub(super) fn parse(output: &str) -> Vec<Figure> {
    let mut found = Vec::new();
    let mut rest = output;
    while !rest.is_empty() {
        let line = rest.lines().next().unwrap_or_default();
        if line.trim_start().starts_with(['{', '[']) {
            // A value may end many lines later; what is no JSON after all is a line like any other.
            let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
            if let Some(Ok(value)) = values.next() {
                records(&value, &mut found);
                rest = &rest[values.byte_offset()..];
                continue;
            }
        }
        found.extend(plain(line));
        rest = rest.split_once('\n').map_or("", |(_, rest)| rest);
    }
    found
}

/// `decode 8 61.0`.
fn plain(line: &str) -> Option<Figure> {
    let mut words = line.split_whitespace();
    let phase = Phase::of(words.next()?)?;
    let rows = words.next()?.parse().ok()?;
    let rate = words.next()?.parse().ok()?;
    words.next().is_none().then_some(())?;
    figure(phase, rows, rate)
}

fn records(value: &Value, found: &mut Vec<Figure>) {
    match value {
        Value::Array(values) => {
            for value in values.iter().filter(|value| value.is_object()) {
                records(value, found);
            }
        }
        Value::Object(record) => match record.get("results") {
            Some(Value::Array(values)) => found.extend(values.iter().flat_map(record_figures)),
            _ => found.extend(record_figures(value)),
        },
        _ => {}
    }
}

/// The figures of one record: none, one or two.
fn record_figures(record: &Value) -> Vec<Figure> {
    let count = |name: &str| Some(record.get(name)?.as_u64()? as usize);
    let rate = |name: &str| record.get(name)?.as_f64();
    let own = || {
        let phase = Phase::of(record.get("phase")?.as_str()?)?;
        figure(phase, count("rows")?, rate("tokens_per_s")?)
    };
    let single = || match (count("n_prompt")?, count("n_gen")?) {
        (prompt, 0) => figure(Phase::Prefill, prompt, rate("avg_ts")?),
        (0, _) => figure(Phase::Decode, 1, rate("avg_ts")?),
        _ => None,
    };
    let batched = || figure(Phase::Decode, count("pl")?, rate("speed_tg")?);
    let prompt = || (count("pl")? == 1).then(|| figure(Phase::Prefill, count("pp")?, rate("speed_pp")?))?;
    [own(), single(), prompt(), batched()].into_iter().flatten().collect()
}

/// A figure, unless it says nothing.
fn figure(phase: Phase, rows: usize, tokens_per_s: f64) -> Option<Figure> {
    let says = rows > 0 && tokens_per_s.is_finite() && tokens_per_s > 0.0;
    says.then_some(Figure { phase, rows, tokens_per_s })
}

#[cfg(test)]
mod tests {
    use super::*;
    use Phase::{Decode, Prefill};

    fn check(output: &str, expected: &[(Phase, usize, f64)]) {
        let found: Vec<_> = parse(output).into_iter().map(|f| (f.phase, f.rows, f.tokens_per_s)).collect();
        assert_eq!(found, expected, "{output}");
    }

    #[test]
    fn lines_are_read_between_others() {
        check(
            "loading…\nprefill 512 123.4\n  decode 8 61\ndone",
            &[(Prefill, 512, 123.4), (Decode, 8, 61.0)],
        );
        check("prefill 512\ndecode x 3\ndecode 8 61 tokens\ndecode 0 5\ndecode 1 -3\ndecode 1 nan", &[]);
        check("", &[]);
    }

    #[test]
    fn records_of_prompts_and_generations_are_read() {
        let lines = "{\"n_threads\": 2, \"n_prompt\": 512, \"n_gen\": 0, \"n_depth\": 0, \"avg_ts\": 142.5}\n\
                     {\"n_threads\": 2, \"n_prompt\": 0, \"n_gen\": 32, \"n_depth\": 0, \"avg_ts\": 27.5}\n\
                     {\"n_threads\": 2, \"n_prompt\": 64, \"n_gen\": 32, \"avg_ts\": 99.5}\n";
        check(lines, &[(Prefill, 512, 142.5), (Decode, 1, 27.5)]);
        let array = "warming up\n[\n  {\n    \"n_prompt\": 512,\n    \"n_gen\": 0,\n    \"avg_ts\": 142.5\n  },\n  {\n    \
                     \"n_prompt\": 0,\n    \"n_gen\": 32,\n    \"avg_ts\": 27.5\n  }\n]\nprefill 64 1\n";
        check(array, &[(Prefill, 512, 142.5), (Decode, 1, 27.5), (Prefill, 64, 1.0)]);
    }

    #[test]
    fn records_of_batches_are_read() {
        let lines = "main: n_kv_max = 4096\n\n\
            {\"n_kv_max\": 4096, \"pp\": 128, \"tg\": 32, \"pl\": 1, \"speed_pp\": 140.0, \"speed_tg\": 27.0, \"speed\": 66.0}\n\
            {\"n_kv_max\": 4096, \"pp\": 128, \"tg\": 32, \"pl\": 8, \"speed_pp\": 150.0, \"speed_tg\": 61.0, \"speed\": 99.0}\n";
        check(lines, &[(Prefill, 128, 140.0), (Decode, 1, 27.0), (Decode, 8, 61.0)]);
    }

    #[test]
    fn our_own_reports_are_read_so_two_builds_can_be_compared() {
        let report =
            "{\"model\": \"m\", \"results\": [{\"phase\": \"decode\", \"rows\": 4, \"tokens_per_s\": 20.5}]}";
        check(report, &[(Decode, 4, 20.5)]);
    }

    #[test]
    fn broken_json_is_passed_over() {
        check(
            "{\"n_prompt\": 512, \"n_gen\"\n[1, {\"a\": \n{}\n[[[]]]\n[3]\ndecode 1 2",
            &[(Decode, 1, 2.0)],
        );
        check("{\"n_prompt\": \"512\", \"n_gen\": 0, \"avg_ts\": null}\n{\"pl\": -1, \"speed_tg\": 3}", &[]);
    }
}
