//! `ashlar health`: whether a role is well, for container health checks. One line, exit code 0 or 1.
//!
//! A gateway is asked over HTTP. A scheduler and a node end by themselves when they cannot work: it is enough that they listen.

use crate::http::Client;
use crate::roles;
use crate::settings::{self, ConfigRole, SettingArgs};
use anyhow::{Context, Result, bail};
use ashlar_identity::web::WebClient;
use clap::Args;
use std::path::Path;
use std::time::Duration;
use tokio::net::TcpStream;

/// Where a gateway listens unless it is told otherwise.
const GATEWAY: &str = "127.0.0.1:8080";

/// Arguments of `ashlar health`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar health                                    the gateway at http://127.0.0.1:8080; in a container, whatever it runs
  ashlar health --ready                            and whether a request would be computed now
  ashlar health --role node --config node.toml     whether the node of this configuration listens
  ashlar health --role scheduler                   whether the one does that this environment configures
In a container of any role: HEALTHCHECK CMD [\"ashlar\", \"health\"]")]
pub(crate) struct HealthArgs {
    /// Address of a gateway; default: that of the role which is the first process of this container, or http://127.0.0.1:8080.
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
    if let Some(role) = args.role {
        return check_role(role, &args.settings, args.ready).await;
    }
    if let Some(url) = &args.url {
        return ask(url, args.ready).await;
    }
    match first_process() {
        Some(Runs::Role(role, settings)) => check_role(role, &settings, args.ready).await,
        Some(Runs::Joined) => Ok("node: runs".to_owned()),
        Some(Runs::Up { listen, tls: false }) => ask(&format!("http://{}", here(&listen)?), args.ready).await,
        Some(Runs::Up { listen, tls: true }) => listens("gateway", &listen).await,
        None => ask(&format!("http://{GATEWAY}"), args.ready).await,
    }
}

async fn check_role(role: ConfigRole, settings: &SettingArgs, ready: bool) -> Result<String> {
    match role {
        ConfigRole::Gateway => {
            let address = here(&configured(role, settings, "listen")?)?;
            match configured(role, settings, "tls_certificate").ok() {
                None => ask(&format!("http://{address}"), ready).await,
                // It may not name this machine: whoever has its files knows it all the same.
                Some(file) => {
                    let web = WebClient::of_server(Path::new(&file))?;
                    let url = format!("https://{address}");
                    ask_with(Client::trusting(&url, None, Some(web))?, &url, ready).await
                }
            }
        }
        _ if ready => bail!("only a gateway knows whether the cluster is ready: ask it, with --url"),
        ConfigRole::Scheduler => listens("scheduler", &configured(role, settings, "listen_gateways")?).await,
        ConfigRole::Node | ConfigRole::Enrolment => {
            listens(role.word(), &configured(role, settings, "listen")?).await
        }
    }
}

/// What a container's first process is.
#[derive(Debug, PartialEq, Eq)]
enum Runs {
    Role(ConfigRole, SettingArgs),
    /// A node that joined: it chooses its port by itself, and ends when it cannot work.
    Joined,
    /// A whole cluster, whose gateway listens there.
    Up {
        listen: String,
        tls: bool,
    },
}

/// What runs as the first process here, if it is one of ours: so it is in a container.
fn first_process() -> Option<Runs> {
    let line = std::fs::read("/proc/1/cmdline").ok()?;
    let words = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    runs(&words.collect::<Vec<_>>())
}

/// Reads a command line; what stands before the program (an `init` that a container was given) is passed over.
fn runs(words: &[String]) -> Option<Runs> {
    let is_program = |word: &&String| word.as_str() == "ashlar" || word.ends_with("/ashlar");
    let mut words = words.iter().skip_while(|word| !is_program(word)).skip(1);
    let command = words.next()?.as_str();
    let mut settings = SettingArgs::default();
    let mut listen = None;
    let (mut joins, mut tls) = (false, false);
    while let Some(word) = words.next() {
        let (flag, within) = match word.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => (flag, Some(value.to_owned())),
            _ => (word.as_str(), None),
        };
        let mut value = || within.clone().or_else(|| words.next().cloned());
        match flag {
            "--config" => settings.config = value().map(Into::into),
            "--set" => settings.set.extend(value()),
            "--listen" => listen = value(),
            "--join" => joins = true,
            "--tls" => tls = true,
            _ => {}
        }
    }
    Some(match command {
        "up" => Runs::Up { listen: listen.unwrap_or_else(|| GATEWAY.to_owned()), tls },
        "node" if joins => Runs::Joined,
        "gateway" => Runs::Role(ConfigRole::Gateway, settings),
        "scheduler" => Runs::Role(ConfigRole::Scheduler, settings),
        "node" => Runs::Role(ConfigRole::Node, settings),
        "enrolment" => Runs::Role(ConfigRole::Enrolment, settings),
        _ => return None,
    })
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
    ask_with(Client::new(url, None)?, url, ready).await
}

async fn ask_with(client: Client, url: &str, ready: bool) -> Result<String> {
    let path = if ready { "/ready" } else { "/health" };
    let (status, body) = client.get(path).await?;
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
    fn a_containers_first_process_says_what_to_look_at() {
        let runs = |line: &str| runs(&line.split(' ').map(str::to_owned).collect::<Vec<_>>());
        let settings = |config: &str, set: &[&str]| SettingArgs {
            config: Some(config.into()),
            set: set.iter().map(|one| (*one).to_owned()).collect(),
        };
        let node = Runs::Role(ConfigRole::Node, settings("/n.toml", &["threads=2", "listen=0.0.0.0:1"]));
        assert_eq!(runs("ashlar node --config /n.toml --set threads=2 --set=listen=0.0.0.0:1"), Some(node));
        let gateway = Runs::Role(ConfigRole::Gateway, settings("g.toml", &[]));
        assert_eq!(runs("/sbin/docker-init -- /usr/local/bin/ashlar gateway --config=g.toml"), Some(gateway));
        assert_eq!(
            runs("ashlar up --listen 0.0.0.0:9 --stages 2"),
            Some(Runs::Up { listen: "0.0.0.0:9".into(), tls: false })
        );
        assert_eq!(runs("ashlar node --join 10.0.0.1:7400 --token x"), Some(Runs::Joined));
        assert_eq!(
            (runs("/usr/lib/systemd/systemd"), runs("ashlar plan"), runs("ashlar")),
            (None, None, None)
        );
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
