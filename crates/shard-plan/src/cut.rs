//! The exact dynamic program: contiguous, non-empty layer ranges over an ordered choice of groups.

use ashlar_vocabulary::LayerRange;

/// One stage of a cut: which group takes which layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutStage {
    /// Index of the group, ascending over the stages.
    pub group: usize,
    /// Its layers.
    pub layers: LayerRange,
}

/// A stage that the program asks the price of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Group of the stage before, `None` for the first stage.
    pub before: Option<usize>,
    /// Group that would take the stage.
    pub group: usize,
    /// Its layers.
    pub layers: LayerRange,
    /// Whether it would be the last stage.
    pub last: bool,
}

/// The best cut of `layers` layers into exactly `stages` stages over groups `0..groups` in this order, groups may be
/// left out. `price` is what a stage costs, `None` where it is impossible; `combine` joins the price so far with that of
/// the next stage and must be monotonic in both (maximum or sum). Among equals the earliest groups win.
///
/// Work: O(stages · groups² · layers²) combinations, O(stages · groups · layers²) prices where the price depends on
/// the stage before only by a term that the caller keeps cheap.
#[allow(clippy::needless_range_loop, reason = "the indices are those of the recurrence")]
pub fn best_cut(
    stages: usize,
    groups: usize,
    layers: usize,
    price: impl Fn(Candidate) -> Option<f64>,
    combine: impl Fn(f64, f64) -> f64,
) -> Option<(f64, Vec<CutStage>)> {
    if stages == 0 || stages > groups || stages > layers {
        return None;
    }
    // best[s][group][end]: the best value of `s + 1` stages that hold layers 0..end, the last of them on `group`;
    // with the group and the start of that stage, to walk back.
    #[derive(Clone, Copy)]
    struct Entry {
        value: f64,
        before: usize,
        start: usize,
    }
    let mut best: Vec<Vec<Vec<Option<Entry>>>> = Vec::with_capacity(stages);
    for stage in 0..stages {
        let final_stage = stage + 1 == stages;
        let mut row = vec![vec![None; layers + 1]; groups];
        // Room must be left for a group and a layer per later stage.
        for group in stage..=groups - stages + stage {
            let ends = if final_stage { layers..=layers } else { stage + 1..=layers - (stages - 1 - stage) };
            for end in ends {
                let mut found: Option<Entry> = None;
                let mut consider = |value: f64, before: usize, start: usize| {
                    if found.is_none_or(|entry| value < entry.value) {
                        found = Some(Entry { value, before, start });
                    }
                };
                if stage == 0 {
                    let layers = LayerRange { start: 0, end };
                    let candidate = Candidate { before: None, group, layers, last: final_stage };
                    if let Some(value) = price(candidate) {
                        consider(value, 0, 0);
                    }
                } else {
                    for before in stage - 1..group {
                        for start in stage..end {
                            let Some(so_far) = best[stage - 1][before][start] else { continue };
                            let candidate = Candidate {
                                before: Some(before),
                                group,
                                layers: LayerRange { start, end },
                                last: final_stage,
                            };
                            if let Some(value) = price(candidate) {
                                consider(combine(so_far.value, value), before, start);
                            }
                        }
                    }
                }
                row[group][end] = found;
            }
        }
        best.push(row);
    }
    let (mut group, entry) = best[stages - 1]
        .iter()
        .enumerate()
        .filter_map(|(group, row)| row[layers].map(|entry| (group, entry)))
        .reduce(|a, b| if b.1.value < a.1.value { b } else { a })?;
    let mut cut = Vec::with_capacity(stages);
    let mut end = layers;
    for stage in (0..stages).rev() {
        let entry = best[stage][group][end]?;
        cut.push(CutStage { group, layers: LayerRange { start: entry.start, end } });
        (group, end) = (entry.before, entry.start);
    }
    cut.reverse();
    Some((entry.value, cut))
}

/// Minimises the slowest stage, then, among cuts that reach it, the sum over stages (the latency of a lone sequence).
pub fn best_balanced_cut(
    stages: usize,
    groups: usize,
    layers: usize,
    price: impl Fn(Candidate) -> Option<f64>,
) -> Option<((f64, f64), Vec<CutStage>)> {
    let (slowest, _) = best_cut(stages, groups, layers, &price, f64::max)?;
    let within = |candidate| price(candidate).filter(|&seconds| seconds <= slowest);
    let (sum, cut) = best_cut(stages, groups, layers, within, |a, b| a + b)?;
    Some(((slowest, sum), cut))
}
