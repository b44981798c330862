//! `ashlar keys`: who is let in.

use crate::http::GatewayArgs;
use crate::roles;
use anyhow::{Result, bail};
use ashlar_identity::ApiKey;
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

/// Arguments of `ashlar keys`.
#[derive(Debug, Args)]
pub(crate) struct KeysArgs {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    gateway: GatewayArgs,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a key. It is shown this once.
    #[command(after_help = "Examples:
  ashlar keys create notebooks                                   to ask models, nothing else
  ashlar keys create team-blue --tenant blue --scope inference --scope training --training-minutes 600
  ashlar keys create batch --requests-per-minute 60 --tokens-per-minute 20000 --concurrency 4 --kv-share 25
  ashlar keys create prometheus --scope metrics
  ashlar keys create --offline > admin.key                       for the scheduler's `admin_key`, before anything runs
Files, jobs, stored responses and cached prefixes belong to a tenant; by default each key is a tenant of its own.")]
    Create(Box<CreateArgs>),
    /// Show all keys, without their secrets.
    List,
    /// Let a key in no longer: every gateway knows within a second.
    Revoke {
        /// Its id.
        id: String,
    },
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// What people call it.
    #[arg(required_unless_present = "offline")]
    name: Option<String>,
    /// Make a key without a cluster: it is good for nothing until a configuration names it.
    #[arg(long, conflicts_with = "name")]
    offline: bool,
    /// Whose it is.
    #[arg(long)]
    tenant: Option<String>,
    /// What it is good for: inference, training, admin, metrics; may be said several times. Default: inference.
    #[arg(long = "scope", value_name = "SCOPE", value_parser = ["inference", "training", "admin", "metrics"])]
    scopes: Vec<String>,
    /// A base model that it may ask; may be said several times. Default: all.
    #[arg(long = "model", value_name = "NAME")]
    models: Vec<String>,
    /// An adapter that it may use; may be said several times. Default: all that are nobody's.
    #[arg(long = "adapter", value_name = "NAME")]
    adapters: Vec<String>,
    /// Requests per minute.
    #[arg(long, value_name = "N")]
    requests_per_minute: Option<u32>,
    /// Tokens of prompts and answers per minute.
    #[arg(long, value_name = "N")]
    tokens_per_minute: Option<u32>,
    /// Choices in progress at once.
    #[arg(long, value_name = "N")]
    concurrency: Option<u32>,
    /// Percent of a replica's KV cache.
    #[arg(long, value_name = "PERCENT")]
    kv_share: Option<u8>,
    /// Minutes for which its tenant's jobs may train in all.
    #[arg(long, value_name = "N")]
    training_minutes: Option<u32>,
    /// Priority of its requests, before turns between keys; lower goes first. Default: 0.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    priority: Option<i32>,
    /// Share cached prefixes with all others that do.
    #[arg(long)]
    share_prefix_cache: bool,
    /// Days until it is good for nothing.
    #[arg(long, value_name = "DAYS")]
    expires_in_days: Option<u32>,
}

pub(crate) fn run(args: KeysArgs) -> Result<()> {
    if let Command::Create(create) = &args.command
        && create.offline
    {
        println!("{}", ApiKey::generate()?.reveal());
        return Ok(());
    }
    roles::runtime()?.block_on(ask(&args))
}

async fn ask(args: &KeysArgs) -> Result<()> {
    let client = args.gateway.client()?;
    let answer = match &args.command {
        Command::Create(create) => client.post("/admin/keys", &body(create)).await?,
        Command::List => client.get_ok("/admin/keys").await?,
        Command::Revoke { id } => {
            if !id.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
                bail!("{id} is no key's id: `ashlar keys list` shows them");
            }
            client.delete(&format!("/admin/keys/{id}")).await?
        }
    };
    if args.json {
        println!("{answer:#}");
        return Ok(());
    }
    match &args.command {
        Command::Create(_) => {
            eprintln!("the key {}, which is shown only now:", shown(&answer["id"]));
            println!("{}", shown(&answer["key"]));
        }
        Command::List => print_table(&answer),
        Command::Revoke { id } => println!("{id} is let in no longer"),
    }
    Ok(())
}

fn body(create: &CreateArgs) -> Value {
    let names = |names: &[String]| (!names.is_empty()).then(|| json!(names));
    let number = |number: Option<u32>| number.map(Value::from);
    let fields = [
        ("name", create.name.clone().map(Value::from)),
        ("tenant", create.tenant.clone().map(Value::from)),
        ("scopes", names(&create.scopes)),
        ("models", names(&create.models)),
        ("adapters", names(&create.adapters)),
        ("requests_per_minute", number(create.requests_per_minute)),
        ("tokens_per_minute", number(create.tokens_per_minute)),
        ("concurrency", number(create.concurrency)),
        ("kv_share_percent", create.kv_share.map(Value::from)),
        ("training_minutes", number(create.training_minutes)),
        ("priority", create.priority.map(Value::from)),
        ("share_prefix_cache", create.share_prefix_cache.then(|| true.into())),
        ("expires_in_s", create.expires_in_days.map(|days| (u64::from(days) * 86_400).into())),
    ];
    let given = fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    Value::Object(given.collect::<Map<_, _>>())
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(shown).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

fn print_table(list: &Value) {
    let header = ["id", "name", "tenant", "scopes", "req/min", "tok/min", "at once", "expires"];
    let fields = [
        "id",
        "name",
        "tenant",
        "scopes",
        "requests_per_minute",
        "tokens_per_minute",
        "concurrency",
        "expires_at",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    let keys = list["data"].as_array().into_iter().flatten();
    rows.extend(keys.map(|key| fields.map(|field| shown(&key[field]))));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    for row in &rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        println!("{}", cells.join("  ").trim_end());
    }
    if list["required"] == false {
        println!("\nthis gateway lets in whoever reaches it: `keys_required = true` changes that");
    }
}
