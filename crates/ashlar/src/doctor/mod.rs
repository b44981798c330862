//! `ashlar doctor`: what is wrong with a machine ([`machine`]), a configuration, a link ([`link`]), a model ([`model`]) or a running
//! cluster ([`cluster`]), and what to do about it. It changes nothing.

mod cluster;
mod link;
mod machine;
mod model;

use crate::config_command::{check, rules};
use crate::findings::{self, Finding};
use crate::http::Client;
use crate::roles;
use anyhow::{Result, bail};
use ashlar_service_kit::config::Sources;
use clap::Args;
use serde::Serialize;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a gateway's answer may take.
const ANSWER: Duration = Duration::from_secs(5);

/// Arguments of `ashlar doctor`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit code 1 if something does not work (✗); what works, but could do better, is marked !. Examples:
  ashlar doctor                                  this machine
  ashlar doctor --measure                        … and how fast its memory is (takes a second and 256 MiB)
  ashlar doctor --config node.toml               a configuration, and whether the role could start with it
  ashlar doctor --link 10.0.0.7:7401             whether that is reached from here, and how fast
  ashlar doctor --model ./llama-3.2-1b           whether a model is whole and supported, and whether it fits here
  ashlar doctor --url http://10.0.0.1:8080       a running cluster"
)]
pub(crate) struct DoctorArgs {
    /// Look at this machine; so it does, too, where nothing else is asked for.
    #[arg(long)]
    machine: bool,
    /// Measure how fast this machine reads its memory.
    #[arg(long)]
    measure: bool,
    /// Where a node of this machine would keep its state: whether there is room.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// A configuration file, with what this environment says.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A listener of another machine; may be repeated.
    #[arg(long, value_name = "HOST:PORT")]
    link: Vec<String>,
    /// A model: a directory, a GGUF file, or a hub id that was fetched.
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
    /// A running cluster: the address of a gateway.
    #[arg(long)]
    url: Option<String>,
    /// API key, if the gateway wants one.
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    key: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What was looked at, and what was found there.
#[derive(Debug, Serialize)]
struct Part {
    of: String,
    findings: Vec<Finding>,
}

pub(crate) fn run(args: DoctorArgs) -> Result<()> {
    let parts = examine(&args)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&parts)?);
    } else {
        let coloured = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        for part in &parts {
            println!("{}\n{}", part.of, findings::list(&part.findings, coloured));
        }
    }
    let problems = parts.iter().flat_map(|part| &part.findings);
    match problems.filter(|finding| finding.mark == findings::Mark::Problem).count() {
        0 => Ok(()),
        1 => bail!("1 thing does not work"),
        count => bail!("{count} things do not work"),
    }
}

fn examine(args: &DoctorArgs) -> Result<Vec<Part>> {
    let mut parts = Vec::new();
    let mut add = |of: String, findings: Vec<Finding>| parts.push(Part { of, findings });
    let nothing_else =
        args.config.is_none() && args.link.is_empty() && args.model.is_none() && args.url.is_none();
    if args.machine || args.measure || args.state.is_some() || nothing_else {
        let state = args.state.as_deref().unwrap_or(Path::new(".ashlar"));
        let mut found = machine::examine(Path::new("/"), state);
        if args.measure {
            found.push(machine::measure());
        }
        add("this machine".into(), found);
    }
    if let Some(file) = &args.config {
        let found = match check::role_of(file) {
            Ok(role) => rules::check(role, &Sources::file(file).with_environment()),
            Err(error) => vec![Finding::problem(format!("{error:#}"), "")],
        };
        add(format!("configuration {}", file.display()), found);
    }
    for target in &args.link {
        add(format!("link to {target}"), link::examine(target));
    }
    if let Some(model) = &args.model {
        add(format!("model {model}"), model::examine(model));
    }
    if let Some(url) = &args.url {
        let client = Client::new(url, args.key.clone())?;
        let found = roles::runtime()?.block_on(async {
            match tokio::time::timeout(ANSWER, client.get_ok("/admin/cluster")).await {
                Ok(Ok(cluster)) => cluster::examine(&cluster),
                Ok(Err(error)) => vec![unreachable(&format!("{error:#}"))],
                Err(_) => vec![unreachable("it has not answered within 5 s")],
            }
        });
        add(format!("cluster of {url}"), found);
    }
    Ok(parts)
}

fn unreachable(reason: &str) -> Finding {
    Finding::problem(
        format!("the gateway says nothing of its cluster: {reason}"),
        "Start it, or name another gateway with --url; its log says why it does not answer.",
    )
}
