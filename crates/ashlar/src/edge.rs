//! How clients reach the cluster of an `up`: where, with which key, encrypted or not.

use crate::enrolment::opening::from_here;
use crate::enrolment::own_address;
use crate::first_key::FirstKey;
use crate::http::Client;
use anyhow::{Result, bail};
use ashlar_gateway::GatewayConfig;
use ashlar_identity::web::{self, WebClient, WebFiles};
use ashlar_scheduler::SchedulerConfig;
use ashlar_service_kit::config::Secret;
use clap::Args;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;

/// What `ashlar up` is told of it.
#[derive(Debug, Args)]
pub(crate) struct EdgeArgs {
    /// Where the HTTP API listens.
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub(crate) listen: SocketAddr,
    /// Let in only who shows an API key; the first one is printed when it is made. Always so where --listen is not this machine alone.
    #[arg(long)]
    keys: bool,
    /// Speak HTTPS, with a certificate of an authority that is made for it; prints what clients are to trust. For a certificate of
    /// another one: --set-gateway tls_certificate=… and tls_key=….
    #[arg(long)]
    tls: bool,
    /// Listen in the clear even where others than this machine can connect: something in front of it encrypts.
    #[arg(long, conflicts_with = "tls")]
    plain_http: bool,
}

impl EdgeArgs {
    /// Refuses what the gateway would refuse, before anything is loaded.
    pub(crate) fn check(&self, listen: &[SocketAddr], gateway_settings: &[String]) -> Result<()> {
        let encrypted = |setting: &String| setting.starts_with("tls_") || setting.starts_with("plain_http");
        let told = self.tls || self.plain_http || gateway_settings.iter().any(encrypted);
        match listen.iter().find(|listen| !listen.ip().is_loopback()).filter(|_| !told) {
            None => Ok(()),
            Some(listen) => bail!(
                "{listen} can be reached from other machines, and keys and prompts would go there in the clear: add --tls, or, where \
                 something in front encrypts, --plain-http"
            ),
        }
    }
}

/// Where clients are let in, and how.
#[derive(Debug)]
pub(crate) struct Edge {
    /// Where HTTPS is spoken.
    web: Option<WebFiles>,
    /// Where clients need one.
    first_key: Option<FirstKey>,
    plain_http: bool,
}

impl Edge {
    /// With the keys and certificates of the state directory, which are made if they are not there.
    pub(crate) fn open(args: &EdgeArgs, listen: &[SocketAddr], state: &Path) -> Result<Edge> {
        let needs_keys = args.keys || listen.iter().any(|listen| !listen.ip().is_loopback());
        Ok(Edge {
            web: args.tls.then(|| web_files(state, listen)).transpose()?,
            first_key: needs_keys.then(|| FirstKey::open(state)).transpose()?,
            plain_http: args.plain_http,
        })
    }

    /// Tells the roles.
    pub(crate) fn configure(
        &self,
        scheduler: &mut SchedulerConfig,
        gateway: &mut GatewayConfig,
        state: &Path,
    ) {
        scheduler.admin_key = self.first_key.as_ref().map(|first| Secret(first.key.reveal().to_owned()));
        gateway.keys_required = Some(self.first_key.is_some());
        gateway.tls_certificate = self.web.as_ref().map(|files| files.certificate.clone());
        gateway.tls_key = self.web.as_ref().map(|files| files.key.clone());
        gateway.plain_http = self.plain_http;
        gateway.audit_log = Some(state.join("logs/audit.jsonl"));
    }

    /// The address of a gateway that listens there, as this machine reaches it.
    pub(crate) fn url(&self, listen: SocketAddr) -> String {
        let scheme = if self.web.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", from_here(listen))
    }

    /// A client that is let in.
    pub(crate) fn client(&self, url: &str) -> Result<Client> {
        let trusted = self.web.as_ref().map(|files| WebClient::of_server(&files.certificate)).transpose()?;
        Client::trusting(url, self.first_key.as_ref().map(|first| first.key.reveal().to_owned()), trusted)
    }

    /// Says what clients need.
    pub(crate) fn announce(&self) {
        if let Some(first) = &self.first_key {
            first.announce();
        }
        if let Some(files) = &self.web {
            eprintln!("clients are to trust {}", files.authority.display());
        }
    }

    /// What `ashlar chat` needs before it.
    pub(crate) fn trust_prefix(&self) -> String {
        self.web
            .as_ref()
            .map_or_else(String::new, |files| format!("ASHLAR_CA={} ", files.authority.display()))
    }

    /// What `curl` needs besides the address.
    pub(crate) fn curl_options(&self) -> String {
        let trust = self.web.as_ref().map(|files| format!(" --cacert {}", files.authority.display()));
        let key = self.first_key.as_ref().map(|_| " -H \"authorization: Bearer $OPENAI_API_KEY\"");
        trust.unwrap_or_default() + key.unwrap_or_default()
    }
}

/// A certificate for where clients reach the gateways.
fn web_files(state: &Path, listen: &[SocketAddr]) -> Result<WebFiles> {
    let mut hosts = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    hosts.extend(fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()));
    let addresses = listen.iter().map(|listen| match listen.ip().is_unspecified() {
        true => own_address(),
        false => listen.ip(),
    });
    hosts.extend(addresses.map(|address| address.to_string()));
    hosts.retain(|host| !host.is_empty());
    hosts.sort();
    hosts.dedup();
    Ok(web::issue(&state.join("tls"), &hosts)?)
}
