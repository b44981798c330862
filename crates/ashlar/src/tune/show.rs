//! What a job's owner sees while it trains: a bar on a terminal, lines elsewhere, JSON where asked for.

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Where there is no bar, a line is printed for so many parts of a job.
const LINES: u64 = 20;

/// Shows events.
pub(super) struct Display {
    json: bool,
    terminal: bool,
    bar: ProgressBar,
    rate: Rate,
    /// Of the last line about steps.
    part_shown: Option<u64>,
    trouble_shown: String,
}

impl Display {
    pub(super) fn new(json: bool) -> Result<Display> {
        let terminal = !json && std::io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::new(0) } else { ProgressBar::hidden() };
        bar.set_style(
            ProgressStyle::with_template("{bar:30.cyan} step {pos}/{len}  {msg}").context("progress bar")?,
        );
        Ok(Display {
            json,
            terminal,
            bar,
            rate: Rate::default(),
            part_shown: None,
            trouble_shown: String::new(),
        })
    }

    /// The job as it is when following begins.
    pub(super) fn job(&mut self, job: &Value) {
        if let Some(steps) = job["ashlar"]["total_steps"].as_u64() {
            self.bar.set_length(steps);
        }
    }

    pub(super) fn event(&mut self, event: &Value) {
        if self.json {
            println!("{event}");
            return;
        }
        let data = &event["data"];
        let message = event["message"].as_str().unwrap_or_default();
        match (data["step"].as_u64(), data["total_steps"].as_u64()) {
            (Some(step), Some(steps)) => self.step(step, steps, data, message),
            _ => self.line(event["level"].as_str().unwrap_or("info"), message),
        }
    }

    fn step(&mut self, step: u64, steps: u64, data: &Value, message: &str) {
        self.rate.step(data["tokens"].as_u64().unwrap_or(0), Instant::now());
        let mut figures = match data["train_loss"].as_f64() {
            Some(loss) => format!("loss {loss:.4}"),
            None => "loss ?".to_owned(),
        };
        if let Some(margin) = data["train_reward_margin"].as_f64() {
            figures += &format!("  margin {margin:.3}");
        }
        if let Some((tokens_per_s, step_time)) = self.rate.now() {
            let left = step_time.mul_f64(steps.saturating_sub(step) as f64);
            figures += &format!("  {tokens_per_s:.0} tokens/s  {} left", duration(left));
        }
        self.bar.set_length(steps);
        self.bar.set_position(step);
        self.bar.set_message(figures.clone());
        let part = step * LINES / steps.max(1);
        if !self.terminal && (self.part_shown.is_none_or(|shown| shown < part) || step == steps) {
            self.part_shown = Some(part);
            eprintln!("{message}  {figures}");
        }
    }

    fn line(&self, level: &str, message: &str) {
        // A message may hold what a client's file is called: no control characters reach the terminal.
        let message: String = message.chars().filter(|c| !c.is_control()).collect();
        let shown = match (self.terminal, level) {
            (true, "warn") => format!("\x1b[33m{message}\x1b[0m"),
            (true, "error") => format!("\x1b[31m{message}\x1b[0m"),
            _ => message,
        };
        self.bar.suspend(|| eprintln!("{shown}"));
    }

    /// Following goes on in spite of this.
    pub(super) fn trouble(&mut self, error: &anyhow::Error) {
        let shown = format!("{error:#}: trying again");
        if shown != self.trouble_shown {
            self.bar.suspend(|| eprintln!("{shown}"));
            self.trouble_shown = shown;
        }
    }

    pub(super) fn close(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Speed of the last steps. Events come in batches; the first batch is history and tells nothing of it.
#[derive(Debug, Default)]
struct Rate {
    /// When the batch before the last one came.
    before: Option<Instant>,
    /// When the last one came, with its steps and tokens.
    last: Option<(Instant, u64, u64)>,
    /// Mean seconds of a step and of a token; later ones count more.
    mean: Option<(f64, f64)>,
}

impl Rate {
    fn step(&mut self, tokens: u64, now: Instant) {
        const WEIGHT: f64 = 0.2;
        const SAME_BATCH: Duration = Duration::from_millis(20);
        let Some((at, steps, sum)) = &mut self.last else {
            self.last = Some((now, 1, tokens));
            return;
        };
        if now.duration_since(*at) < SAME_BATCH {
            (*steps, *sum) = (*steps + 1, *sum + tokens);
            return;
        }
        if let Some(before) = self.before {
            let passed = at.duration_since(before).as_secs_f64();
            let (step, token) = (passed / *steps as f64, passed / (*sum).max(1) as f64);
            self.mean = Some(match self.mean {
                None => (step, token),
                Some((s, t)) => (s + WEIGHT * (step - s), t + WEIGHT * (token - t)),
            });
        }
        self.before = Some(*at);
        self.last = Some((now, 1, tokens));
    }

    /// Tokens per second, and the time of a step.
    fn now(&self) -> Option<(f64, Duration)> {
        self.mean.map(|(step, token)| (1.0 / token, Duration::from_secs_f64(step)))
    }
}

/// A job in one line.
pub(super) fn job_line(job: &Value) -> String {
    let text = |name: &str| job[name].as_str().unwrap_or("-").to_owned();
    let more = match (job["status"].as_str(), &job["ashlar"]) {
        (Some("succeeded"), own) if own["promotion"]["promoted"] == false => "not promoted".to_owned(),
        (Some("succeeded"), _) => text("fine_tuned_model"),
        (Some("failed"), _) => job["error"]["message"].as_str().unwrap_or("-").to_owned(),
        (_, own) => match (own["steps"].as_u64(), own["total_steps"].as_u64()) {
            (Some(step), Some(steps)) => format!("step {step}/{steps}"),
            _ => String::new(),
        },
    };
    format!("{:<38} {:<16} {:<20} {more}", text("id"), text("status"), text("model")).trim_end().to_owned()
}

fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn speed_counts_every_step_of_a_batch_but_no_history() {
        let mut rate = Rate::default();
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        // Ten steps at once, from before; then four steps of 50 tokens every two seconds.
        (0..10).for_each(|_| rate.step(50, at(0)));
        assert!(rate.now().is_none());
        for batch in 1..5 {
            (0..4).for_each(|_| rate.step(50, at(2000 * batch)));
        }
        let (tokens_per_s, step_time) = rate.now().unwrap();
        assert!((tokens_per_s - 100.0).abs() < 1e-6 && step_time == Duration::from_millis(500));
    }

    #[test]
    fn a_job_is_a_line() {
        let job = json!({"id": "ftjob-1", "status": "running", "model": "m", "ashlar": {"steps": 3, "total_steps": 9}});
        let line = job_line(&job);
        assert!(line.starts_with("ftjob-1 ") && line.ends_with("step 3/9"), "{line}");
        assert_eq!(duration(Duration::from_secs(3700)), "1 h 1 min");
    }
}
