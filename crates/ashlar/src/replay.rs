//! `ashlar replay`: has stored responses computed once more, and says whether they are the same.

use crate::http::GatewayArgs;
use crate::roles;
use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};

/// Some response is not what it was.
#[derive(Debug, thiserror::Error)]
#[error("a response is not what it was: see above")]
pub(crate) struct Differs;

/// Arguments of `ashlar replay`.
#[derive(Debug, Args)]
#[command(
    after_help = "Every response of POST /v1/responses is stored with its request (unless `store` is false) and can be computed again,
also after the cluster was laid out anew: with the same model the same tokens come, whatever the stages, ranks and replicas.

Examples:
  ashlar replay resp_5f0c…                          on the cluster as it is
  ashlar up --tp 2   (instead of --stages 2)        on another layout: start it over the same state directory, then
  ashlar replay resp_5f0c… resp_81aa… --json
Exit code: 0 if every event is the same to the byte (but for how many prompt tokens were cached), else 1."
)]
pub(crate) struct ReplayArgs {
    /// Names of stored responses.
    #[arg(required = true, value_name = "RESPONSE")]
    responses: Vec<String>,
    #[command(flatten)]
    gateway: GatewayArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: ReplayArgs) -> Result<()> {
    roles::runtime()?.block_on(replay(args))
}

async fn replay(args: ReplayArgs) -> Result<()> {
    let client = args.gateway.client()?;
    let mut replays = Vec::new();
    for response in &args.responses {
        let path = format!("/v1/responses/{response}/replay");
        let replayed = client.post(&path, &json!({})).await.with_context(|| response.clone())?;
        if !args.json {
            print!("{}", lines(&replayed));
        }
        replays.push(replayed);
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&replays)?);
    }
    let is_same = replays.iter().all(|replayed| replayed["identical"] == true);
    if is_same { Ok(()) } else { Err(Differs.into()) }
}

fn lines(replayed: &Value) -> String {
    let id = replayed["id"].as_str().unwrap_or_default();
    let difference = &replayed["first_difference"];
    if difference.is_null() {
        return format!("{id}  identical: {} events\n", replayed["events"]);
    }
    let side = |name: &str| difference[name].to_string();
    format!(
        "{id}  DIFFERENT at event {}\n  stored  {}\n  again   {}\n",
        difference["sequence_number"],
        side("stored"),
        side("again")
    )
}
