//! `ashlar health`: whether a role is well, for container health checks. One line, exit code 0 or 1.
//!
//! A gateway is asked over HTTP. A scheduler and a node end by themselves when they cannot work: it is enough that they listen.

use crate::http::Client;
use crate::roles;
use crate::settings::{self, ConfigRole, SettingArgs};
use anyhow::{Context, Result, bail};
use clap::Args;
use std::time::Duration;
use tokio::net::TcpStream;

/// Arguments of `ashlar health`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar health                                    the gateway at http://127.0.0.1:8080
  ashlar health --ready                            and whether a request would be computed now
  ashlar health --role node --config node.toml     whether the node of this configuration listens
  ashlar health --role scheduler                   whether the one does that this environment configures
In a container: HEALTHCHECK CMD [\"ashlar\", \"health\", \"--role\", \"node\", \"--config\", \"/etc/ashlar/node.toml\"]")]
pub(crate) struct HealthArgs {
    /// Address of a gateway; default: where its configuration says that it listens, or http://127.0.0.1:8080.
    #[arg(long, conflicts_with = "role")]
    url: Option<String>,
    /// Which role; its address is in its configuration: file, environment and --set, as the role itself has them.
    #[arg(long, value_enum)]
    role: Option<ConfigRole>,
    #[command(flatten)]
    settings: SettingArgs,
    /// Of a gateway: whether a request would be computed now.
    #[arg(long)]
    ready: bool,
    /// How long to wait for an answer, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 2000)]
    timeout_ms: u64,
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
    let Some(role) = args.role else {
        return ask(args.url.as_deref().unwrap_or("http://127.0.0.1:8080"), args.ready).await;
    };
    match role {
        ConfigRole::Gateway => {
            let address = here(&configured(role, &args.settings, "listen")?)?;
            ask(&format!("http://{address}"), args.ready).await
        }
        _ if args.ready => bail!("only a gateway knows whether the cluster is ready: ask it, with --url"),
        ConfigRole::Scheduler => {
            listens("scheduler", &configured(role, &args.settings, "listen_gateways")?).await
        }
        ConfigRole::Node | ConfigRole::Enrolment => {
            listens(role.word(), &configured(role, &args.settings, "listen")?).await
        }
    }
}

/// What the role's configuration says of one key. What else is wrong with it is the role's own business.
fn configured(role: ConfigRole, args: &SettingArgs, key: &str) -> Result<String> {
    let draft = settings::draft(role, args)?;
    let known = draft.schema().keys().iter().find(|known| known.path == key);
    let default = known.and_then(|known| known.default.as_ref()?.as_str());
    let set = draft.get(key).and_then(toml::Value::as_str);
    let address = set.or(default).with_context(|| format!("the {} has no `{key}`", role.word()))?;
    Ok(address.to_owned())
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

    #[test]
    fn an_address_is_what_flags_or_else_defaults_say() {
        let mut settings = SettingArgs::default();
        let listen =
            |settings: &SettingArgs| configured(ConfigRole::Scheduler, settings, "listen_gateways").unwrap();
        assert_eq!(listen(&settings), "127.0.0.1:7402");
        settings.set.push("listen_gateways=0.0.0.0:18399".into());
        assert_eq!(listen(&settings), "0.0.0.0:18399");
        assert!(configured(ConfigRole::Enrolment, &SettingArgs::default(), "listen").is_err());
    }
}
