//! What came of it, for people.

use super::Run;
use crate::bench::table::{Table, figure, percent};
use ashlar_simulation::plan::{FaultKind, FaultReport, PlanReport, ReplicaCut, Spread};

/// Faults that are listed one by one.
const FAULTS_LISTED: usize = 12;

/// One run.
pub(super) fn print(run: &Run) {
    let report = &run.report;
    println!("\nseed {}: {}", report.seed, layout(&report.replicas));
    let failed: Vec<String> = report.failed.iter().map(|(why, count)| format!("{count} {why}")).collect();
    let failed =
        if failed.is_empty() { "none failed".to_owned() } else { format!("failed: {}", failed.join(", ")) };
    println!(
        "{} of {} requests finished in {:.1} s ({failed}); {} steps, {} preemptions, {} losses of a replica",
        report.finished,
        report.requests,
        report.seconds,
        report.steps,
        report.preemptions,
        report.replica_losses
    );
    println!(
        "throughput: {} output tokens/s; goodput: {} requests/s, {} of all, within TTFT {} ms and TPOT {} ms\n",
        figure(report.output_tokens_per_s),
        figure(report.goodput_requests_per_s),
        percent(report.goodput_share),
        report.objectives.ttft_ms,
        report.objectives.tpot_ms
    );
    let mut table = Table::new(["ms", "mean", "p50", "p90", "p99", "max", "of"]);
    for (name, spread) in spreads(report) {
        let Some(s) = spread else { continue };
        let cells =
            [figure(s.mean), figure(s.p50), figure(s.p90), figure(s.p99), figure(s.max), s.count.to_string()];
        table.row(std::iter::once(name.to_owned()).chain(cells));
    }
    print!("{}", table.render());
    print_faults(&report.faults);
    println!(
        "\n{:.0} s of the cluster in {:.2} s: {} times real time, {} events per second",
        report.virtual_s,
        run.real_s,
        figure(run.times_real_time),
        figure(report.events as f64 / run.real_s.max(1e-9))
    );
}

fn spreads(report: &PlanReport) -> [(&'static str, Option<Spread>); 6] {
    [
        ("TTFT", report.ttft_ms),
        ("ITL", report.itl_ms),
        ("TPOT", report.tpot_ms),
        ("E2E", report.e2e_ms),
        ("longest stall of a stream", report.stall_ms),
        ("recovery from a fault", report.recovery_ms),
    ]
}

fn print_faults(faults: &[FaultReport]) {
    if faults.is_empty() {
        return;
    }
    println!();
    let mut table = Table::new(["fault", "at s", "streams", "lost", "recovery ms"]);
    for fault in faults.iter().take(FAULTS_LISTED) {
        let kind = match fault.kind {
            FaultKind::Kill => "killed".to_owned(),
            FaultKind::Freeze { for_us } => format!("frozen for {} ms", for_us / 1000),
        };
        let who = format!("{:?} {}", fault.role, fault.index).to_lowercase();
        table.row([
            format!("{who} {kind}"),
            format!("{:.1}", fault.at_s),
            fault.streams.to_string(),
            fault.lost.to_string(),
            fault.recovery_ms.map_or_else(|| "-".to_owned(), figure),
        ]);
    }
    print!("{}", table.render());
    if faults.len() > FAULTS_LISTED {
        println!("and {} more faults", faults.len() - FAULTS_LISTED);
    }
}

/// Several runs side by side.
pub(super) fn print_all(runs: &[Run]) {
    let mut table = Table::new([
        "seed",
        "finished",
        "tokens/s",
        "goodput",
        "TTFT p99",
        "ITL p99",
        "stall p99",
        "stall max",
        "recovery max",
    ]);
    let p99 = |spread: Option<Spread>| spread.map_or_else(|| "-".to_owned(), |spread| figure(spread.p99));
    let max = |spread: Option<Spread>| spread.map_or_else(|| "-".to_owned(), |spread| figure(spread.max));
    for run in runs {
        let report = &run.report;
        table.row([
            report.seed.to_string(),
            format!("{}/{}", report.finished, report.requests),
            figure(report.output_tokens_per_s),
            percent(report.goodput_share),
            p99(report.ttft_ms),
            p99(report.itl_ms),
            p99(report.stall_ms),
            max(report.stall_ms),
            max(report.recovery_ms),
        ]);
    }
    println!("\nall runs (times in ms):");
    print!("{}", table.render());
    let of = |value: fn(&PlanReport) -> f64| {
        Spread::of(runs.iter().map(|run| value(&run.report)).collect()).unwrap_or_default()
    };
    let (tokens, goodput) = (of(|report| report.output_tokens_per_s), of(|report| report.goodput_share));
    println!(
        "{} output tokens/s and {} goodput in the middle; at best {} tokens/s",
        figure(tokens.p50),
        percent(goodput.p50),
        figure(tokens.max)
    );
}

/// `2 replicas of 4 stages (layers 8, 8, 8, 8) × 2 ranks`.
fn layout(replicas: &[ReplicaCut]) -> String {
    let Some(first) = replicas.first() else { return "no replica".into() };
    let layers: Vec<String> = first.stages.iter().map(|(from, to)| (to - from).to_string()).collect();
    let ranks = if first.ranks > 1 { format!(" × {} ranks", first.ranks) } else { String::new() };
    format!(
        "{} replica(s) of {} stage(s) (layers {}){ranks}, {} KV blocks each",
        replicas.len(),
        first.stages.len(),
        layers.join(", "),
        first.kv_blocks
    )
}
