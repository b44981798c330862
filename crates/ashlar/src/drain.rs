//! `ashlar drain`: has others take a node's place, so that its machine can be taken away.

use crate::http::GatewayArgs;
use crate::roles;
use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How often it is looked.
const POLL: Duration = Duration::from_millis(250);

/// Arguments of `ashlar drain`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar drain node-1             a standby loads its slice beside it, takes its place, and the node holds nothing
  ashlar drain node-1 --undo      it may take a place again
  ashlar drain node-1 --force     even if nothing can take its place: what runs there is finished, what waits goes on waiting
Stopping a node (SIGTERM) does the same before its process ends.")]
pub(crate) struct DrainArgs {
    /// The node's name, as GET /admin/cluster lists it.
    #[arg(value_name = "NODE")]
    node: String,
    /// Use it again.
    #[arg(long, conflicts_with = "force")]
    undo: bool,
    /// Even if nothing can take its place.
    #[arg(long)]
    force: bool,
    /// How long to wait until it holds nothing, in seconds.
    #[arg(long, value_name = "S", default_value_t = 600)]
    wait_s: u64,
    #[command(flatten)]
    gateway: GatewayArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: DrainArgs) -> Result<()> {
    roles::runtime()?.block_on(drain(args))
}

async fn drain(args: DrainArgs) -> Result<()> {
    let client = args.gateway.client()?;
    let path = format!("/admin/nodes/{}/drain", args.node);
    if args.undo {
        client.delete(&path).await?;
        return say(&args, &json!({"node": args.node, "leaving": false}), "may take a place again");
    }
    let query = if args.force { "?force=true" } else { "" };
    client.post(&format!("{path}{query}"), &json!({})).await?;
    let bar = ProgressBar::new_spinner()
        .with_style(ProgressStyle::with_template("{spinner} {msg} {elapsed}").context("progress bar")?);
    bar.set_message(format!("others take the place of {}", args.node));
    let started = Instant::now();
    loop {
        let cluster = client.get_ok("/admin/cluster").await?;
        // It may belong to a model that is deployed beside the first.
        let deployed = cluster["models"].as_array().into_iter().flatten().map(|model| &model["cluster"]);
        let mut nodes = [&cluster["cluster"]]
            .into_iter()
            .chain(deployed)
            .filter_map(|part| part["nodes"].as_array())
            .flatten();
        match nodes.find(|node| node["node"] == args.node.as_str()) {
            None => bail!("node {} has left", args.node),
            Some(node) if node["leaving"] == true && node["place"].is_null() => break,
            Some(_) => {}
        }
        if started.elapsed() > Duration::from_secs(args.wait_s) {
            bail!(
                "node {} still holds its place after {} s: the scheduler's log says why",
                args.node,
                args.wait_s
            );
        }
        bar.tick();
        tokio::time::sleep(POLL).await;
    }
    bar.finish_and_clear();
    let took_s = started.elapsed().as_secs_f64();
    let drained = json!({"node": args.node, "leaving": true, "drained_after_s": took_s});
    say(&args, &drained, "holds nothing: its machine can be taken away")
}

fn say(args: &DrainArgs, result: &Value, words: &str) -> Result<()> {
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(result)?),
        false => println!("node {} {words}", args.node),
    }
    Ok(())
}
