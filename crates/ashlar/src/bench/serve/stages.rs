//! What share of the time each stage computed, waited, exchanged and sent, from the service's own counters.

use crate::bench::table::{Table, percent};
use crate::http::Client;
use serde::Serialize;
use serde_json::Value;
use std::time::{Duration, Instant};

/// Counters of a service at one moment.
#[derive(Debug, Clone)]
pub(super) struct Snapshot {
    at: Instant,
    cluster: Value,
}

/// Nodes report after every step and the service refreshes its view a few times per second.
const SETTLING: Duration = Duration::from_millis(700);

impl Snapshot {
    /// Asks the service; `None` where it keeps no such counters.
    pub(super) async fn take(client: &Client) -> Option<Snapshot> {
        tokio::time::sleep(SETTLING).await;
        let (status, body) = client.get("/admin/cluster").await.ok()?;
        let cluster = &body["cluster"];
        (status == 200 && cluster["nodes"].is_array())
            .then(|| Snapshot { at: Instant::now(), cluster: cluster.clone() })
    }
}

/// A rank's share of the wall-clock time between two snapshots.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct RankShare {
    node: String,
    replica: u64,
    stage: u64,
    rank: u64,
    layers: String,
    /// Computing.
    computed: f64,
    /// Waiting for the stage before.
    waited: f64,
    /// Exchanging within the tensor-parallel group.
    exchanged: f64,
    /// Sending on.
    sent: f64,
    /// Without a step to execute.
    idle: f64,
}

/// What the service's scheduler did between two snapshots.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub(super) struct SchedulerWork {
    steps: u64,
    tokens_per_step: f64,
    preemptions: u64,
    prefix_cache_hit_rate: Option<f64>,
}

/// The difference of two snapshots.
#[derive(Debug, Default, Clone, PartialEq, Serialize)]
pub(super) struct Shares {
    pub(super) ranks: Vec<RankShare>,
    pub(super) scheduler: SchedulerWork,
}

/// The difference; ranks that moved or restarted in between are left out.
pub(super) fn shares(before: &Snapshot, after: &Snapshot) -> Shares {
    shares_of(
        &before.cluster,
        &after.cluster,
        after.at.saturating_duration_since(before.at).as_micros() as f64,
    )
}

fn shares_of(before: &Value, after: &Value, wall_us: f64) -> Shares {
    let nodes = |cluster: &Value| cluster["nodes"].as_array().cloned().unwrap_or_default();
    let earlier = nodes(before);
    let mut ranks: Vec<RankShare> = nodes(after)
        .iter()
        .filter_map(|node| {
            let same = |old: &&Value| old["node"] == node["node"] && old["place"] == node["place"];
            rank_share(earlier.iter().find(same)?, node, wall_us)
        })
        .collect();
    ranks.sort_by_key(|rank| (rank.replica, rank.stage, rank.rank));
    let grown = |name: &str| {
        let count = |cluster: &Value| cluster["counters"][name].as_u64().unwrap_or(0);
        count(after).saturating_sub(count(before))
    };
    let (steps, queries) = (grown("steps"), grown("prefix_cache_queries"));
    let scheduler = SchedulerWork {
        steps,
        tokens_per_step: grown("scheduled_tokens") as f64 / steps.max(1) as f64,
        preemptions: grown("preemptions"),
        prefix_cache_hit_rate: (queries > 0).then(|| grown("prefix_cache_hits") as f64 / queries as f64),
    };
    Shares { ranks, scheduler }
}

fn rank_share(before: &Value, after: &Value, wall_us: f64) -> Option<RankShare> {
    let place = |index: usize| after["place"][index].as_u64();
    let share = |name: &str| {
        let spent = after["busy"][name].as_u64()?.checked_sub(before["busy"][name].as_u64()?)?;
        Some(spent as f64 / wall_us.max(1.0))
    };
    let (computed, waited) = (share("compute_us")?, share("wait_us")?);
    let (exchanged, sent) = (share("collective_us")?, share("send_us")?);
    Some(RankShare {
        node: after["node"].as_str()?.to_owned(),
        replica: place(0)?,
        stage: place(1)?,
        rank: place(2)?,
        layers: format!("{}..{}", after["layers"]["start"], after["layers"]["end"]),
        computed,
        waited,
        exchanged,
        sent,
        idle: (1.0 - computed - waited - exchanged - sent).max(0.0),
    })
}

impl Shares {
    /// A table and a line for people.
    pub(super) fn print(&self) {
        let mut table = Table::new([
            "node",
            "replica",
            "stage",
            "rank",
            "layers",
            "computed",
            "waited",
            "exchanged",
            "sent",
            "idle",
        ]);
        for rank in &self.ranks {
            table.row([
                rank.node.clone(),
                rank.replica.to_string(),
                rank.stage.to_string(),
                rank.rank.to_string(),
                rank.layers.clone(),
                percent(rank.computed),
                percent(rank.waited),
                percent(rank.exchanged),
                percent(rank.sent),
                percent(rank.idle),
            ]);
        }
        print!("\n{}", table.render());
        let work = &self.scheduler;
        let hits = work.prefix_cache_hit_rate.map_or(String::new(), |rate| {
            format!(", prefix cache hit by {} of the prompt tokens looked up", percent(rate))
        });
        println!(
            "scheduler: {} steps of {:.1} tokens on average, {} preemptions{hits}",
            work.steps, work.tokens_per_step, work.preemptions
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn cluster(compute: u64, wait: u64, steps: u64, place: Value) -> Value {
        json!({
            "nodes": [{"node": "a", "place": place, "layers": {"start": 0, "end": 4},
                       "busy": {"compute_us": compute, "wait_us": wait, "collective_us": 0, "send_us": 10}}],
            "counters": {"steps": steps, "scheduled_tokens": 4 * steps, "preemptions": 0,
                         "prefix_cache_queries": 100 * steps, "prefix_cache_hits": 25 * steps},
        })
    }

    #[test]
    fn shares_are_of_the_time_between_the_snapshots() {
        let shares = shares_of(
            &cluster(100, 50, 1, json!([0, 1, 0])),
            &cluster(600, 150, 3, json!([0, 1, 0])),
            1000.0,
        );
        let rank = &shares.ranks[0];
        assert_eq!((rank.stage, rank.computed, rank.waited, rank.sent), (1, 0.5, 0.1, 0.0));
        assert!((rank.idle - 0.4).abs() < 1e-12);
        assert_eq!(shares.scheduler.tokens_per_step, 4.0);
        assert_eq!(shares.scheduler.prefix_cache_hit_rate, Some(0.25));
    }

    #[test]
    fn a_rank_that_moved_restarted_or_stands_by_is_left_out() {
        let before = cluster(100, 50, 1, json!([0, 1, 0]));
        for after in [
            cluster(600, 150, 3, json!([0, 0, 0])),
            cluster(50, 150, 3, json!([0, 1, 0])),
            json!({"nodes": [{"node": "a", "place": null}]}),
        ] {
            assert!(shares_of(&before, &after, 1000.0).ranks.is_empty());
        }
    }
}
