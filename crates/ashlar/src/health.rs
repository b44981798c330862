//! `ashlar health`: whether a role is well, for container health checks. One line, exit code 0 or 1.
//!
//! A gateway is asked over HTTP. A scheduler and a node end by themselves when they cannot work: it is enough that they listen.

use crate::http::Client;
use crate::roles;
use anyhow::{Context, Result, bail};
use ashlar_gateway::GatewayConfig;
use ashlar_scheduler::SchedulerConfig;
use ashlar_service_kit::config;
use ashlar_shard_node::NodeConfig;
use clap::{Args, ValueEnum};
use serde::de::DeserializeOwned;
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::TcpStream;

/// Arguments of `ashlar health`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar health                                    the gateway at http://127.0.0.1:8080
  ashlar health --ready                            and whether a request would be computed now
  ashlar health --role node --config node.toml     whether the node of this configuration listens
In a container: HEALTHCHECK CMD [\"ashlar\", \"health\", \"--role\", \"node\", \"--config\", \"/etc/ashlar/node.toml\"]")]
pub(crate) struct HealthArgs {
    /// Address of a gateway; default: where its configuration says that it listens, or http://127.0.0.1:8080.
    #[arg(long, conflicts_with = "role")]
    url: Option<String>,
    /// Which role; its address is in its configuration.
    #[arg(long, value_enum, requires = "config")]
    role: Option<Role>,
    /// The role's configuration file.
    #[arg(long, value_name = "FILE", requires = "role")]
    config: Option<PathBuf>,
    /// Of a gateway: whether a request would be computed now.
    #[arg(long)]
    ready: bool,
    /// How long to wait for an answer, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 2000)]
    timeout_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Role {
    Gateway,
    Scheduler,
    Node,
}

pub(crate) fn run(args: HealthArgs) -> Result<()> {
    let timeout = Duration::from_millis(args.timeout_ms);
    roles::runtime()?.block_on(async {
        let checked = tokio::time::timeout(timeout, check(&args)).await;
        let said = checked.with_context(|| format!("no answer within {} ms", args.timeout_ms))??;
        // Whoever runs it as a health check shows this line.
        println!("{said}");
        Ok(())
    })
}

async fn check(args: &HealthArgs) -> Result<String> {
    match args.role {
        None => ask(args.url.as_deref().unwrap_or("http://127.0.0.1:8080"), args.ready).await,
        Some(Role::Gateway) => {
            let config: GatewayConfig = read(args)?;
            let address = here(&config.listen.to_string())?;
            ask(&format!("http://{address}"), args.ready).await
        }
        Some(Role::Scheduler) => listens("scheduler", &read::<SchedulerConfig>(args)?.listen_gateways).await,
        Some(Role::Node) => listens("node", &read::<NodeConfig>(args)?.listen).await,
    }
}

fn read<T: DeserializeOwned>(args: &HealthArgs) -> Result<T> {
    let file = args.config.as_deref().context("--role needs --config")?;
    Ok(config::load(file)?)
}

async fn ask(url: &str, ready: bool) -> Result<String> {
    let path = if ready { "/ready" } else { "/health" };
    let (status, body) = Client::new(url, None)?.get(path).await?;
    let state = body["status"].as_str().unwrap_or("answers").to_owned();
    match (status, body["problem"].as_str()) {
        (200, _) => Ok(format!("gateway {url}: {state}")),
        (_, Some(problem)) => bail!("gateway {url}: {problem}"),
        (status, None) => bail!("gateway {url} answers with status {status}"),
    }
}

async fn listens(role: &str, listen: &str) -> Result<String> {
    let address = here(listen)?;
    let connected = TcpStream::connect(&address).await;
    connected.with_context(|| format!("the {role} does not listen at {address}"))?;
    Ok(format!("{role} {address}: listens"))
}

/// The address under which this machine reaches a listener of its own.
fn here(listen: &str) -> Result<String> {
    let (host, port) = listen.rsplit_once(':').context("an address is host:port")?;
    if port == "0" {
        bail!("a role that listens on port 0 chooses a port by itself: give it one");
    }
    Ok(match host {
        "0.0.0.0" => format!("127.0.0.1:{port}"),
        "[::]" => format!("[::1]:{port}"),
        _ => listen.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

    use super::*;

    #[test]
    fn a_listener_on_every_address_is_reached_here() {
        assert_eq!(here("0.0.0.0:80").unwrap(), "127.0.0.1:80");
        assert_eq!(here("[::]:80").unwrap(), "[::1]:80");
        assert_eq!(here("10.0.0.1:80").unwrap(), "10.0.0.1:80");
        assert!(here("10.0.0.1:0").unwrap_err().to_string().contains("port 0"));
    }
}
