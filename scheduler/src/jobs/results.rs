//! The table of a job's steps, as a file.

use ashlar_protocol::admin::{JobEvent, JobEventKind};
use ashlar_protocol::training::Rewards;
use std::collections::BTreeMap;
use std::fmt::Write;

/// What a results file is for.
pub const RESULTS_PURPOSE: &str = "fine-tune-results";
/// The file's name.
pub const RESULTS_NAME: &str = "results.csv";

/// Collects the table from a job's events, in any order.
#[derive(Debug, Default)]
pub struct ResultsTable {
    rows: BTreeMap<u64, Row>,
    /// Whether pairs of answers are learnt.
    preferences: bool,
}

#[derive(Debug, Default)]
struct Row {
    train: Option<(f64, f64)>,
    valid: Option<(f64, f64)>,
    rewards: Option<Rewards>,
}

impl ResultsTable {
    /// Adds what an event tells.
    pub fn add(&mut self, event: &JobEvent) {
        match &event.what {
            JobEventKind::Step { step, metrics, .. } => {
                let row = self.rows.entry(*step).or_default();
                row.train = (!metrics.skipped).then_some((metrics.loss, metrics.accuracy));
                row.rewards = metrics.rewards.filter(|_| !metrics.skipped);
                self.preferences |= metrics.rewards.is_some();
            }
            JobEventKind::Evaluated { step, loss, accuracy } => {
                self.rows.entry(*step).or_default().valid = Some((*loss, *accuracy));
            }
            _ => {}
        }
    }

    /// The table as CSV: OpenAI's columns, and where pairs of answers are learnt their mean rewards. What was not measured is empty.
    pub fn csv(&self) -> String {
        let mut text = match self.preferences {
            false => "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n".to_owned(),
            true => "step,train_loss,train_accuracy,valid_loss,valid_accuracy,train_reward_preferred,\
                     train_reward_non_preferred,train_reward_margin\n"
                .to_owned(),
        };
        for (step, row) in &self.rows {
            let _ = write!(text, "{step}");
            for pair in [row.train, row.valid] {
                match pair {
                    Some((loss, accuracy)) => {
                        let _ = write!(text, ",{loss:.5},{accuracy:.5}");
                    }
                    None => text.push_str(",,"),
                }
            }
            match row.rewards {
                Some(rewards) => {
                    let (preferred, other) = (rewards.preferred, rewards.non_preferred);
                    let _ = write!(text, ",{preferred:.5},{other:.5},{:.5}", rewards.margin());
                }
                None if self.preferences => text.push_str(",,,"),
                None => {}
            }
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ashlar_protocol::training::StepMetrics;

    fn metrics(loss: f64, skipped: bool, rewards: Option<Rewards>) -> StepMetrics {
        StepMetrics {
            loss,
            accuracy: 0.5,
            learning_rate: 1e-4,
            gradient_norm: 1.0,
            targets: 1,
            tokens: 1,
            skipped,
            rewards,
        }
    }

    #[test]
    fn preferences_have_their_rewards_in_columns_of_their_own() {
        let rewards = Some(Rewards { preferred: 0.5, non_preferred: -0.25 });
        let step =
            |step, skipped| JobEventKind::Step { step, steps: 2, metrics: metrics(0.5, skipped, rewards) };
        let mut table = ResultsTable::default();
        let events =
            [step(1, false), step(2, true), JobEventKind::Evaluated { step: 2, loss: 1.5, accuracy: 0.25 }];
        for (number, what) in (0..).zip(events) {
            table.add(&JobEvent { number, created_at: 0, what });
        }
        let lines = "step,train_loss,train_accuracy,valid_loss,valid_accuracy,train_reward_preferred,\
                     train_reward_non_preferred,train_reward_margin\n\
                     1,0.50000,0.50000,,,0.50000,-0.25000,0.75000\n2,,,1.50000,0.25000,,,\n";
        assert_eq!(table.csv(), lines);
    }

    #[test]
    fn a_row_has_what_was_measured_at_its_step() {
        let step = |step, loss, skipped| JobEventKind::Step {
            step,
            steps: 3,
            metrics: metrics(loss, skipped, None),
        };
        let mut table = ResultsTable::default();
        let events = [
            JobEventKind::Started,
            step(1, 2.25, false),
            step(2, f64::MAX, true),
            JobEventKind::Evaluated { step: 2, loss: 1.5, accuracy: 0.25 },
        ];
        for (number, what) in (0..).zip(events) {
            table.add(&JobEvent { number, created_at: 0, what });
        }
        let lines = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n\
                     1,2.25000,0.50000,,\n2,,,1.50000,0.25000\n";
        assert_eq!(table.csv(), lines);
    }
}
