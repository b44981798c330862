//! `ashlar replan`: has the model laid out as it would be planned from nothing now.

use crate::http::{Client, GatewayArgs};
use crate::roles;
use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How often it is looked.
const POLL: Duration = Duration::from_millis(250);

/// Arguments of `ashlar replan`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar replan --dry-run         the layout that would be planned for the nodes that there are now
  ashlar replan                   have it: what serves goes on until the new slices are in memory
By itself the layout changes only where it must, or where another one is much better.")]
pub(crate) struct ReplanArgs {
    /// Only show what that would be.
    #[arg(long)]
    dry_run: bool,
    /// How long to wait until the new layout serves, in seconds.
    #[arg(long, value_name = "S", default_value_t = 600)]
    wait_s: u64,
    #[command(flatten)]
    gateway: GatewayArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: ReplanArgs) -> Result<()> {
    roles::runtime()?.block_on(replan(&args))
}

async fn replan(args: &ReplanArgs) -> Result<()> {
    let client = args.gateway.client()?;
    let plan = client.post("/admin/replan", &json!({"dry_run": args.dry_run})).await?;
    let changes = plan["change"] == "a new layout";
    if changes && !args.dry_run {
        await_layout(args, &client, &plan).await?;
    }
    if args.json {
        println!("{plan:#}");
        return Ok(());
    }
    match (plan["possible"] == true, changes, args.dry_run) {
        (false, ..) => {
            bail!("the model cannot be laid out: {}", plan["problem"].as_str().unwrap_or_default())
        }
        (true, false, _) => println!("it is laid out so already:"),
        (true, true, true) => println!("it would be laid out so:"),
        (true, true, false) => println!("it is laid out anew:"),
    }
    print_layout(&plan);
    Ok(())
}

/// Waits until every rank of the plan is where the plan has it, and every replica serves.
async fn await_layout(args: &ReplanArgs, client: &Client, plan: &Value) -> Result<()> {
    let bar = ProgressBar::new_spinner()
        .with_style(ProgressStyle::with_template("{spinner} {msg} {elapsed}").context("progress bar")?);
    bar.set_message("slices are brought into memory; what serves goes on");
    let started = Instant::now();
    loop {
        if serves_so(&client.get_ok("/admin/cluster").await?["cluster"], plan) {
            bar.finish_and_clear();
            return Ok(());
        }
        if started.elapsed() > Duration::from_secs(args.wait_s) {
            bail!("the new layout does not serve after {} s: the scheduler's log says why", args.wait_s);
        }
        bar.tick();
        tokio::time::sleep(POLL).await;
    }
}

fn serves_so(cluster: &Value, plan: &Value) -> bool {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let replicas = list(&cluster["replicas"]);
    let planned = list(&plan["replicas"]);
    let nodes = list(&cluster["nodes"]);
    replicas.len() == planned.len()
        && replicas.iter().all(|replica| replica["ready"] == true)
        && planned.iter().all(|replica| {
            list(&replica["stages"]).iter().all(|stage| {
                list(&stage["ranks"]).iter().all(|rank| {
                    nodes.iter().any(|node| node["node"] == rank["node"] && node["layers"] == stage["layers"])
                })
            })
        })
}

fn print_layout(plan: &Value) {
    for replica in plan["replicas"].as_array().into_iter().flatten() {
        println!("replica {}, {} KV blocks", replica["replica"], replica["kv_blocks"]);
        for (stage, cut) in replica["stages"].as_array().into_iter().flatten().enumerate() {
            let ranks = cut["ranks"].as_array().into_iter().flatten();
            let ranks: Vec<String> = ranks
                .map(|rank| {
                    let mib = rank["memory_bytes"].as_f64().unwrap_or_default() / f64::from(1 << 20);
                    format!("{} ({mib:.0} MiB)", rank["node"].as_str().unwrap_or_default())
                })
                .collect();
            let (start, end) = (&cut["layers"]["start"], &cut["layers"]["end"]);
            println!("  stage {stage}: layers {start}..{end} on {}", ranks.join(", "));
        }
    }
}
