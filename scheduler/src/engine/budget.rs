//! How much a step may hold: predicted time, not only a number of tokens.
//!
//! A stage's step time is modelled as `max(weights, rows × row) + attended positions × position`: reading all weights
//! once, or multiplying with them, whichever takes longer, plus reading the KV cache. The three costs come from the plan
//! (bytes ÷ measured bandwidth, operations ÷ measured rate) and are corrected by what is then observed.

/// Time of one stage, in microseconds, before correction.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct StageCost {
    /// Reading the stage's weights once.
    pub weights_us: f64,
    /// Multiplying one row with them.
    pub row_us: f64,
    /// Reading one position of KV cache for one row.
    pub position_us: f64,
}

/// What a step asks of every stage.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Rows.
    pub rows: u64,
    /// Positions attended to, summed over rows.
    pub positions: u64,
}

impl Work {
    /// This work and `count` more rows of a sequence from position `start`.
    pub fn and(self, start: u64, count: u64) -> Work {
        let positions = count * start + count * (count + 1) / 2;
        Work { rows: self.rows + count, positions: self.positions + positions }
    }
}

/// Weight of a new observation.
const EWMA_WEIGHT: f64 = 0.2;
/// Corrections stay within this factor, so that one absurd observation does not stop a replica.
const CORRECTION_MAX: f64 = 64.0;

/// The stages of one replica, corrected by observation.
#[derive(Debug, Clone, PartialEq)]
pub struct CostModel {
    stages: Vec<CorrectedStage>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct CorrectedStage {
    cost: StageCost,
    /// Factor on reading (weights and KV cache).
    read: f64,
    /// Factor on multiplying.
    multiply: f64,
}

impl CorrectedStage {
    fn read_us(&self) -> f64 {
        self.cost.weights_us * self.read
    }

    fn multiply_us(&self, work: Work) -> f64 {
        self.cost.row_us * work.rows as f64 * self.multiply
    }

    fn predict_us(&self, work: Work) -> f64 {
        let positions_us = self.cost.position_us * work.positions as f64 * self.read;
        self.read_us().max(self.multiply_us(work)) + positions_us
    }
}

impl CostModel {
    /// From the plan's prediction, stage by stage.
    pub fn new(stages: &[StageCost]) -> CostModel {
        let corrected = |&cost| CorrectedStage { cost, read: 1.0, multiply: 1.0 };
        CostModel { stages: stages.iter().map(corrected).collect() }
    }

    /// Time of the slowest stage for `work`, in microseconds.
    pub fn predict_us(&self, work: Work) -> f64 {
        self.stages.iter().map(|stage| stage.predict_us(work)).fold(0.0, f64::max)
    }

    /// Corrects a stage by what a step took on it. Only the term that dominated the prediction moves.
    pub fn observe(&mut self, stage: usize, work: Work, observed_us: u64) {
        let Some(stage) = self.stages.get_mut(stage) else { return };
        let predicted = stage.predict_us(work);
        if work.rows == 0 || observed_us == 0 || predicted <= 0.0 {
            return;
        }
        let factor = 1.0 + EWMA_WEIGHT * (observed_us as f64 / predicted - 1.0);
        let multiplying = stage.multiply_us(work) > stage.read_us();
        let correction = if multiplying { &mut stage.multiply } else { &mut stage.read };
        *correction = (*correction * factor).clamp(1.0 / CORRECTION_MAX, CORRECTION_MAX);
    }
}

/// Where one row alone exceeds the target, a step may take this much longer than that row: prompts advance at nearly the
/// full rate of multiplying, and the tokens of running answers come at worst at half their pace meanwhile.
const SINGLE_ROW_SLACK: f64 = 2.0;

/// What a step under construction may still take.
#[derive(Debug, Clone)]
pub struct Budget {
    model: CostModel,
    target_us: f64,
    rows_max: u64,
    work: Work,
}

impl Budget {
    /// An empty step. Where a single row already exceeds the target (weights that take longer to read than that), the
    /// target is twice what a single row takes: rows that hide behind the reading are free, and as many more are cheap.
    pub fn new(model: CostModel, step_target_ms: u64, max_num_batched_tokens: u32) -> Budget {
        let single_us = model.predict_us(Work::default().and(0, 1));
        let target_us = (step_target_ms as f64 * 1000.0).max(SINGLE_ROW_SLACK * single_us);
        Budget { model, target_us, rows_max: u64::from(max_num_batched_tokens), work: Work::default() }
    }

    /// How many of `wanted` rows from position `start` still fit: 0 … `wanted`. At least `least` do (as far as the row
    /// limit allows), whatever is predicted, so that nothing starves.
    pub fn room(&self, start: usize, wanted: usize, least: usize) -> usize {
        let most = (wanted as u64).min(self.rows_max.saturating_sub(self.work.rows));
        let fits = |count: u64| self.model.predict_us(self.work.and(start as u64, count)) <= self.target_us;
        // Largest count that fits; the prediction never falls with more rows.
        let (mut low, mut high) = (0, most);
        while low < high {
            let middle = (low + high).div_ceil(2);
            if fits(middle) { low = middle } else { high = middle - 1 }
        }
        low.max((least as u64).min(most)) as usize
    }

    /// Takes `count` rows from position `start` into the step.
    pub fn take(&mut self, start: usize, count: usize) {
        self.work = self.work.and(start as u64, count as u64);
    }

    /// What has been taken.
    pub fn work(&self) -> Work {
        self.work
    }

    /// Predicted time of the step so far, in microseconds.
    pub fn predicted_us(&self) -> f64 {
        self.model.predict_us(self.work)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn model() -> CostModel {
        CostModel::new(&[StageCost { weights_us: 10_000.0, row_us: 500.0, position_us: 0.5 }])
    }

    #[test]
    fn rows_that_hide_behind_the_weights_are_free() {
        let budget = Budget::new(model(), 1, 512);
        // Reading takes 10 ms and hides 20 rows; nearly as many more (they attend to positions, too) are within the slack.
        assert_eq!(budget.room(0, 100, 0), 39);
    }

    #[test]
    fn the_row_limit_holds_even_for_the_least() {
        let mut budget = Budget::new(model(), 1, 30);
        assert_eq!(budget.room(0, 100, 64), 30);
        budget.take(0, 25);
        assert_eq!(budget.room(0, 100, 64), 5);
    }

    #[test]
    fn observations_correct_the_term_that_dominated() {
        let mut corrected = model();
        let (decode, prefill) = (Work::default().and(0, 1), Work::default().and(0, 400));
        for _ in 0..100 {
            corrected.observe(0, prefill, 400_000);
        }
        assert!((corrected.predict_us(prefill) / 400_000.0 - 1.0).abs() < 0.05);
        assert_eq!(corrected.predict_us(decode), model().predict_us(decode));
        for _ in 0..100 {
            corrected.observe(0, decode, 5_000);
        }
        assert!((corrected.predict_us(decode) / 5_000.0 - 1.0).abs() < 0.05);
    }

    proptest! {
        #[test]
        fn room_is_the_most_that_fits(target in 1u64..300, start in 0usize..3000, taken in 0usize..100) {
            let mut budget = Budget::new(model(), target, 512);
            budget.take(0, taken);
            let room = budget.room(start, 512, 0);
            let with = |count: usize| {
                let mut full = budget.clone();
                full.take(start, count);
                full
            };
            prop_assert!(room == 0 || with(room).predicted_us() <= budget.target_us);
            prop_assert!(taken + room >= 512 || with(room + 1).predicted_us() > budget.target_us);
        }
    }
}
