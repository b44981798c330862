//! Ratios, bounds, and where the rest went.
//!
//! Let *T* be a layout's round, *t(n)* one rank's step of *n* rows, *C* the computing of a rank in a round. Two stages
//! with two micro-batches of *r* rows have, against one rank with the same 2*r* sequences,
//!
//! *T − t(2r)* = [2*t(r) − t(2r)*] + [mean *C* − 2*t(r)*] + [max *C* − mean *C*] + [*T* − max *C*]:
//!
//! weights read once per micro-batch, slower computing, imbalance, and links with waiting. The first term alone bounds
//! the ratio: *t(2r)* / 2*t(r)*, which is ½ where *t* does not depend on the rows (bandwidth) and 1 where it is
//! proportional to them. The ratio over this bound is the ratio to one rank at the same *rows*. Two tensor-parallel ranks
//! have no first term.

use super::LayoutArgs;
use super::layout::Kind;
use super::measure::{Load, Measurement};
use super::rank::Spent;
use crate::bench::machine::MachineReport;
use crate::bench::stats::median;
use crate::bench::table::{Table, figure, percent};
use ashlar_model::stage::LOGIT_ROWS_MAX;
use ashlar_vocabulary::ModelShape;
use serde::Serialize;

/// Everything that is reported.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    model: String,
    threads: usize,
    /// How the two tensor-parallel ranks exchange.
    transport: &'static str,
    context: usize,
    repeats: usize,
    /// Layers of the two stages, layout by layout.
    stage_layers: Vec<StageLayers>,
    machine: MachineReport,
    results: Vec<Row>,
}

/// How two stages share the layers.
#[derive(Debug, PartialEq, Serialize)]
struct StageLayers {
    layout: &'static str,
    layers: (usize, usize),
}

/// One layout under one load; medians over the repeats.
#[derive(Debug, Serialize)]
struct Row {
    layout: &'static str,
    #[serde(flatten)]
    load: Load,
    tokens_per_s: f64,
    round_ms: f64,
    /// Against one rank.
    against_one: Option<Against>,
    /// A round's times, rank by rank.
    ranks: Vec<Spent>,
    /// Microseconds per exchange of a tensor-parallel group, waiting for the slower rank included.
    exchange_us: Option<f64>,
}

/// A layout beside one rank, from pairs within a repeat.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Against {
    /// Tokens/s over one rank's with the same number of sequences in all; absent where that was not measured.
    ratio: Option<f64>,
    /// Lowest and highest ratio of the repeats.
    ratio_range: Option<(f64, f64)>,
    /// What reading the weights once per micro-batch leaves at best, from one rank's own times in this run.
    reread_bound: Option<f64>,
    /// Tokens/s over one rank's with the same rows per step: the share of that bound that is reached.
    ratio_at_same_rows: f64,
    /// Lowest and highest ratio of the repeats.
    ratio_at_same_rows_range: (f64, f64),
    /// Parts of the round that one rank does not spend, as shares of the round; negative where the layout is better.
    lost: Lost,
}

/// Where the difference went, as shares of the layout's round.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Lost {
    /// Reading the weights once per micro-batch.
    reread: f64,
    /// Computing slower than one rank with all threads at the same rows.
    computing: f64,
    /// The slower rank computing longer than the mean.
    imbalance: f64,
    /// Exchanges, links, waiting for each other, filling the pipeline.
    links_and_waiting: f64,
}

/// One repeat of a layout with its baselines, in seconds.
#[derive(Debug, Clone)]
struct Pair {
    round: f64,
    computing: Vec<f64>,
    /// One rank's time for the same tokens in steps of the same rows.
    one_at_same_rows: f64,
    /// One rank's time for the same tokens in one step.
    one_in_one_step: Option<f64>,
}

fn against(pairs: &[Pair]) -> Option<Against> {
    let of = |value: &dyn Fn(&Pair) -> Option<f64>| pairs.iter().filter_map(value).collect::<Vec<f64>>();
    let ratios = of(&|pair| Some(pair.one_in_one_step? / pair.round));
    let bounds = of(&|pair| Some(pair.one_in_one_step? / pair.one_at_same_rows));
    let same_rows = of(&|pair| Some(pair.one_at_same_rows / pair.round));
    let most = |pair: &Pair| pair.computing.iter().copied().fold(0.0, f64::max);
    let mean = |pair: &Pair| pair.computing.iter().sum::<f64>() / pair.computing.len().max(1) as f64;
    let share = |value: &dyn Fn(&Pair) -> f64| median(&of(&|pair| Some(value(pair) / pair.round)));
    let ratio_at_same_rows_range = range(&same_rows)?;
    Some(Against {
        ratio: (!ratios.is_empty()).then(|| median(&ratios)),
        ratio_range: range(&ratios),
        reread_bound: (!bounds.is_empty()).then(|| median(&bounds)),
        ratio_at_same_rows: median(&same_rows),
        ratio_at_same_rows_range,
        lost: Lost {
            reread: share(&|pair| pair.one_in_one_step.map_or(0.0, |one| pair.one_at_same_rows - one)),
            computing: share(&|pair| mean(pair) - pair.one_at_same_rows),
            imbalance: share(&|pair| most(pair) - mean(pair)),
            links_and_waiting: share(&|pair| pair.round - most(pair)),
        },
    })
}

fn range(values: &[f64]) -> Option<(f64, f64)> {
    let least = values.iter().copied().reduce(f64::min)?;
    Some((least, values.iter().copied().fold(least, f64::max)))
}

/// One rank's load with the same rows per step, and the one with the same tokens in one step.
fn baselines(load: Load) -> (Load, Load) {
    match load {
        Load::Decode { rows, micro_batches } => (
            Load::Decode { rows, micro_batches: 1 },
            Load::Decode { rows: rows * micro_batches, micro_batches: 1 },
        ),
        Load::Prompts { tokens, .. } | Load::LonePrompt { tokens, .. } => {
            let prompt = Load::Prompts { tokens, micro_batches: 1 };
            (prompt, prompt)
        }
    }
}

fn pair(measured: &Measurement, all: &[Measurement]) -> Option<Pair> {
    let one = |load: Load| {
        let found =
            all.iter().find(|m| m.kind == Kind::One && m.repeat == measured.repeat && m.load == load)?;
        Some(found.seconds)
    };
    let (same_rows, one_step) = baselines(measured.load);
    let micro_batches = measured.load.micro_batches() as f64;
    // Prompts are never joined into one step: their baseline is one after the other.
    let one_in_one_step = match measured.load {
        Load::Decode { .. } => one(one_step),
        _ => one(one_step).map(|seconds| seconds * micro_batches),
    };
    Some(Pair {
        round: measured.seconds,
        computing: measured.ranks.iter().map(|spent| spent.compute_us * 1e-6).collect(),
        one_at_same_rows: one(same_rows)? * micro_batches,
        one_in_one_step,
    })
}

impl Report {
    /// Puts the figures together.
    pub(super) fn new(
        args: &LayoutArgs,
        shape: &ModelShape,
        machine: MachineReport,
        comparisons: &[Vec<Measurement>],
    ) -> Report {
        let mut results: Vec<Row> = Vec::new();
        let mut stage_layers: Vec<StageLayers> = Vec::new();
        for measurements in comparisons {
            let mut seen: Vec<(Kind, Load)> = Vec::new();
            for found in measurements.iter().map(|m| (m.kind, m.load)) {
                if !seen.contains(&found) {
                    seen.push(found);
                }
            }
            for kind in seen.iter().map(|(kind, _)| *kind) {
                let Kind::Stages { cut, .. } = kind else { continue };
                let found = StageLayers { layout: kind.name(), layers: (cut, shape.num_layers - cut) };
                if !stage_layers.contains(&found) {
                    stage_layers.push(found);
                }
            }
            for (kind, load) in seen {
                let own: Vec<&Measurement> =
                    measurements.iter().filter(|m| m.kind == kind && m.load == load).collect();
                results.push(row(kind, load, &own, measurements, shape));
            }
        }
        Report {
            model: args.model.clone(),
            threads: args.threads,
            transport: args.transport.name(),
            context: args.context,
            repeats: args.repeat,
            stage_layers,
            machine,
            results,
        }
    }

    /// Tables for people.
    pub(super) fn print(&self) {
        println!(
            "{}: one rank × {} threads against two ranks ({}) and two stages (loopback TCP) × {}, context {}, median of {} \
             repeats",
            self.model,
            self.threads,
            self.transport,
            self.threads / 2,
            self.context,
            self.repeats
        );
        for StageLayers { layout, layers: (front, back) } in &self.stage_layers {
            println!("{layout}: {front} layers and {back}");
        }
        println!("{}\n", self.machine.line());
        self.print_ratios();
        self.print_ranks();
    }

    fn print_ratios(&self) {
        let mut table = Table::new([
            "",
            "load",
            "tokens/s",
            "round ms",
            "vs one rank",
            "min…max",
            "re-read bound",
            "of bound",
            "re-reading",
            "computing",
            "imbalance",
            "links+waits",
        ]);
        for row in &self.results {
            let mut cells = vec![
                row.layout.to_owned(),
                load_name(row.load),
                figure(row.tokens_per_s),
                figure(row.round_ms),
            ];
            if let Some(against) = &row.against_one {
                let optional = |value: Option<f64>| value.map_or("-".to_owned(), ratio);
                let range =
                    against.ratio_range.map_or("-".to_owned(), |(a, b)| format!("{}…{}", ratio(a), ratio(b)));
                cells.extend([
                    optional(against.ratio),
                    range,
                    optional(against.reread_bound),
                    ratio(against.ratio_at_same_rows),
                    percent(against.lost.reread),
                    percent(against.lost.computing),
                    percent(against.lost.imbalance),
                    percent(against.lost.links_and_waiting),
                ]);
            }
            table.row(cells);
        }
        print!("{}", table.render());
        println!(
            "\nvs one rank: tokens/s over one rank's with the same sequences in all (in one batch), pairs within a repeat.\n\
             re-read bound: what is left at best if every micro-batch reads the weights once, from one rank's own times.\n\
             of bound: tokens/s over one rank's with the same rows per step.\n\
             The last four columns: shares of the round that one rank does not spend.\n"
        );
    }

    fn print_ranks(&self) {
        let mut table = Table::new([
            "ms of a round",
            "load",
            "rank",
            "computing",
            "(head)",
            "exchanging",
            "waiting",
            "sending",
            "no step",
            "µs/exchange",
        ]);
        for row in &self.results {
            for (rank, spent) in row.ranks.iter().enumerate() {
                let ms = |us: f64| figure(us / 1e3);
                table.row([
                    row.layout.to_owned(),
                    load_name(row.load),
                    rank.to_string(),
                    ms(spent.compute_us),
                    ms(spent.head_us),
                    ms(spent.collective_us),
                    ms(spent.wait_us),
                    ms(spent.send_us),
                    ms(spent.idle_us),
                    row.exchange_us.map_or(String::new(), figure),
                ]);
            }
        }
        print!("{}", table.render());
    }
}

fn row(kind: Kind, load: Load, own: &[&Measurement], all: &[Measurement], shape: &ModelShape) -> Row {
    let seconds = median(&own.iter().map(|m| m.seconds).collect::<Vec<f64>>());
    let mut ranks = vec![Spent::default(); own.first().map_or(0, |m| m.ranks.len())];
    for measured in own {
        for (sum, spent) in ranks.iter_mut().zip(&measured.ranks) {
            *sum += spent.scaled(1.0 / own.len() as f64);
        }
    }
    let exchange_us = (kind == Kind::TensorParallel).then(|| {
        // The embedding, two per layer, and the gathers of the logits.
        let logit_rows = if let Load::Decode { rows, .. } = load { rows } else { 1 };
        let exchanges = 1 + 2 * shape.num_layers + logit_rows.div_ceil(LOGIT_ROWS_MAX);
        ranks.iter().map(|spent| spent.collective_us).sum::<f64>() / (ranks.len().max(1) * exchanges) as f64
    });
    let against_one = match kind {
        Kind::One => None,
        _ => against(&own.iter().filter_map(|measured| pair(measured, all)).collect::<Vec<Pair>>()),
    };
    Row {
        layout: kind.name(),
        load,
        tokens_per_s: load.tokens() as f64 / seconds,
        round_ms: 1e3 * seconds,
        against_one,
        ranks,
        exchange_us,
    }
}

fn ratio(value: f64) -> String {
    format!("{value:.2}")
}

fn load_name(load: Load) -> String {
    let times =
        |micro_batches: usize| if micro_batches > 1 { format!("{micro_batches} × ") } else { String::new() };
    match load {
        Load::Prompts { tokens, micro_batches } => format!("{}prompt {tokens}", times(micro_batches)),
        Load::LonePrompt { tokens, chunk } => format!("prompt {tokens} by {chunk}"),
        Load::Decode { rows, micro_batches } => format!("{}decode {rows}", times(micro_batches)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn pair_of(round: f64, computing: [f64; 2], same_rows: f64, one_step: f64) -> Pair {
        Pair {
            round,
            computing: computing.to_vec(),
            one_at_same_rows: same_rows,
            one_in_one_step: Some(one_step),
        }
    }

    #[test]
    fn bandwidth_bound_stages_are_bounded_by_a_half() {
        // A step takes 1 s whatever its rows: two micro-batches need 2 s at best.
        let against = against(&[pair_of(2.5, [2.2, 2.0], 2.0, 1.0)]).unwrap();
        assert_eq!(against.reread_bound, Some(0.5));
        assert_eq!(against.ratio, Some(0.4));
        assert_eq!(against.ratio_at_same_rows, 0.8);
        assert!((against.ratio.unwrap() / 0.5 - against.ratio_at_same_rows).abs() < 1e-12);
    }

    #[test]
    fn the_losses_add_up_to_the_difference() {
        let against = against(&[pair_of(2.5, [2.2, 2.0], 2.0, 1.0)]).unwrap();
        let Lost { reread, computing, imbalance, links_and_waiting } = against.lost;
        assert!((reread + computing + imbalance + links_and_waiting - 1.5 / 2.5).abs() < 1e-12);
        assert!((imbalance - 0.04).abs() < 1e-12);
    }

    #[test]
    fn without_a_baseline_in_one_step_only_the_same_rows_count() {
        let mut pair = pair_of(2.0, [1.0, 1.0], 1.0, 0.0);
        pair.one_in_one_step = None;
        let against = against(&[pair]).unwrap();
        assert_eq!((against.ratio, against.reread_bound, against.lost.reread), (None, None, 0.0));
        assert_eq!(against.ratio_at_same_rows, 0.5);
        assert_eq!(super::against(&[]), None);
    }
}
