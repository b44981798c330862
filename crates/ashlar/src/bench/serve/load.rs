//! Sends requests, in an open or a closed loop, and gathers how they went.

use super::client::{Outcome, Template, execute};
use super::workload::{Pace, Workload};
use crate::http::Client;
use anyhow::Result;
use indicatif::ProgressBar;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// When sending ends, whichever comes first.
#[derive(Debug, Clone, Copy)]
pub(super) struct Until {
    /// So many requests.
    pub(super) requests: usize,
    /// So long after the start.
    pub(super) duration: Option<Duration>,
}

/// Everything that happened.
#[derive(Debug, Default)]
pub(super) struct Run {
    /// Requests that ended, in order of their end.
    pub(super) outcomes: Vec<Outcome>,
    /// From the first sending to the last end.
    pub(super) seconds: f64,
    /// Requests that a cap shortened.
    pub(super) shortened: usize,
    /// Most requests in flight at once.
    pub(super) in_flight_max: usize,
    /// Requests given up because the user asked to end.
    pub(super) abandoned: usize,
}

/// Sends the workload. Ctrl-C ends it early with what there is.
pub(super) async fn run(
    client: &Client,
    template: &Template,
    workload: &Workload,
    until: Until,
    bar: &ProgressBar,
) -> Result<Run> {
    let (client, template) = (Arc::new(client.clone()), Arc::new(template.clone()));
    let most_in_flight = if let Pace::Closed(concurrency) = workload.pace { concurrency } else { usize::MAX };
    let mut run = Run::default();
    let mut in_flight: JoinSet<Outcome> = JoinSet::new();
    let mut planned = workload.requests().take(until.requests).peekable();
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    let started = Instant::now();
    loop {
        // The next request is generated before its time comes.
        let due = planned.peek().map(|next| next.at_s.map_or_else(Instant::now, |at| started + seconds(at)));
        let due = due.filter(|&due| until.duration.is_none_or(|duration| due < started + duration));
        if due.is_none() && in_flight.is_empty() {
            break;
        }
        let may_send = due.is_some() && in_flight.len() < most_in_flight;
        let at = due.unwrap_or(started);
        tokio::select! {
            () = tokio::time::sleep_until(at.into()), if may_send => {
                let Some(next) = planned.next() else { continue };
                run.shortened += usize::from(next.shortened);
                let (client, template) = (Arc::clone(&client), Arc::clone(&template));
                in_flight.spawn(async move { execute(&client, &template, &next, at).await });
                run.in_flight_max = run.in_flight_max.max(in_flight.len());
            }
            Some(ended) = in_flight.join_next(), if !in_flight.is_empty() => {
                let outcome = ended?;
                if outcome.failure.is_none() {
                    run.seconds = started.elapsed().as_secs_f64();
                }
                run.outcomes.push(outcome);
                bar.inc(1);
            }
            _ = &mut interrupted => {
                run.abandoned = in_flight.len();
                in_flight.abort_all();
                break;
            }
        }
        bar.set_message(format!("{} in flight", in_flight.len()));
    }
    if run.seconds == 0.0 {
        run.seconds = started.elapsed().as_secs_f64();
    }
    Ok(run)
}

fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::MAX / 4)
}
