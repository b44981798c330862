//! The dynamic program against every cut there is.

use ashlar_shard_plan::cut::{Candidate, CutStage, best_balanced_cut, best_cut};
use ashlar_vocabulary::LayerRange;
use proptest::prelude::*;

/// Every way to choose `stages` ascending groups and cut the layers among them.
fn all_cuts(stages: usize, groups: usize, layers: usize) -> Vec<Vec<CutStage>> {
    fn extend(
        cuts: &mut Vec<Vec<CutStage>>,
        so_far: &mut Vec<CutStage>,
        stages: usize,
        groups: usize,
        layers: usize,
    ) {
        let (next_group, start) = so_far.last().map_or((0, 0), |stage| (stage.group + 1, stage.layers.end));
        if so_far.len() == stages {
            if start == layers {
                cuts.push(so_far.clone());
            }
            return;
        }
        for group in next_group..groups {
            for end in start + 1..=layers {
                so_far.push(CutStage { group, layers: LayerRange { start, end } });
                extend(cuts, so_far, stages, groups, layers);
                so_far.pop();
            }
        }
    }
    let mut cuts = Vec::new();
    extend(&mut cuts, &mut Vec::new(), stages, groups, layers);
    cuts
}

fn candidates(cut: &[CutStage]) -> impl Iterator<Item = Candidate> + '_ {
    (0..cut.len()).map(|index| Candidate {
        before: index.checked_sub(1).map(|before| cut[before].group),
        group: cut[index].group,
        layers: cut[index].layers,
        last: index + 1 == cut.len(),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn the_program_finds_what_brute_force_finds(
        stages in 1usize..5,
        layers in 1usize..9,
        speeds in prop::collection::vec(1u32..40, 1..6),
        rooms in prop::collection::vec(1usize..14, 6),
        hops in prop::collection::vec(0u32..20, 36),
        (embedding, head) in (0usize..3, 0usize..5),
    ) {
        let groups = speeds.len();
        let price = |c: Candidate| {
            let held = c.layers.len() + if c.before.is_none() { embedding } else { 0 } + if c.last { head } else { 0 };
            let work = c.layers.len() + if c.last { head } else { 0 };
            let hop = c.before.map_or(0, |before| hops[before * 6 + c.group]);
            (held <= rooms[c.group]).then(|| f64::from(work as u32 * speeds[c.group] + hop))
        };
        let prices = |cut: &Vec<CutStage>| -> Option<Vec<f64>> { candidates(cut).map(price).collect() };
        let possible: Vec<Vec<f64>> = all_cuts(stages, groups, layers).iter().filter_map(prices).collect();
        let slowest = |prices: &Vec<f64>| prices.iter().copied().fold(0.0, f64::max);
        let sum = |prices: &Vec<f64>| prices.iter().sum::<f64>();

        let least_slowest = possible.iter().map(slowest).reduce(f64::min);
        let least_sum = possible.iter().map(sum).reduce(f64::min);
        prop_assert_eq!(best_cut(stages, groups, layers, price, f64::max).map(|(v, _)| v), least_slowest);
        prop_assert_eq!(best_cut(stages, groups, layers, price, |a, b| a + b).map(|(v, _)| v), least_sum);

        match best_balanced_cut(stages, groups, layers, price) {
            None => prop_assert!(possible.is_empty()),
            Some((value, cut)) => {
                let best = possible.iter().map(|p| (slowest(p), sum(p)));
                let best = best.reduce(|a, b| if b < a { b } else { a });
                prop_assert_eq!(Some(value), best);
                let own = prices(&cut).expect("the cut it returns is possible");
                prop_assert_eq!(value, (slowest(&own), sum(&own)));
                let mut next = 0;
                for stage in &cut {
                    prop_assert_eq!(stage.layers.start, next);
                    prop_assert!(!stage.layers.is_empty());
                    next = stage.layers.end;
                }
                prop_assert_eq!(next, layers);
                prop_assert!(cut.windows(2).all(|pair| pair[0].group < pair[1].group));
            }
        }
    }
}
