//! What roles check when they start, as far as that goes without starting: no port is bound, nobody is spoken to.

use crate::enrolment::endpoint::EnrolmentConfig;
use crate::findings::Finding;
use crate::settings::{self, ConfigRole};
use ashlar_gateway::GatewayConfig;
use ashlar_identity::{Credentials, Role, Transport};
use ashlar_model::hub;
use ashlar_scheduler::SchedulerConfig;
use ashlar_service_kit::config::{ConfigError, Draft, Sources};
use ashlar_shard_node::{NodeConfig, threads};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;

/// How a role's configuration is.
pub(crate) fn check(role: ConfigRole, sources: &Sources) -> Vec<Finding> {
    let mut draft = match Draft::gather(role.schema(), sources) {
        Ok(draft) => draft,
        Err(error) => return of_error(error),
    };
    if role == ConfigRole::Node {
        // That it has none is told as a missing key.
        let _ = settings::supply_name(&mut draft);
    }
    let checked = match role {
        ConfigRole::Gateway => draft.finish().map(|config| gateway(&config)),
        ConfigRole::Scheduler => draft.finish().map(|config| scheduler(&config)),
        ConfigRole::Node => draft.finish().map(|config| node(&config)),
        ConfigRole::Enrolment => draft.finish().map(|config| enrolment(&config)),
    };
    let mut findings = checked.unwrap_or_else(of_error);
    if findings.is_empty() {
        findings.push(Finding::good("nothing is wrong with it"));
    }
    findings
}

fn of_error(error: ConfigError) -> Vec<Finding> {
    match error {
        ConfigError::Problems(problems) => {
            problems.iter().map(|problem| Finding::problem(problem.to_string(), "")).collect()
        }
        error => vec![Finding::problem(error.to_string(), "")],
    }
}

fn gateway(config: &GatewayConfig) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(model(&config.model));
    findings.extend(identity(config.identity.as_deref(), Role::Gateway, None));
    findings.extend(blobs(config.blobs.as_deref()));
    if let Some(adapters) = config.adapters.as_ref().filter(|adapters| !adapters.is_dir()) {
        findings.push(Finding::warning(
            format!("`adapters`: {} is no directory on this machine", adapters.display()),
            "Create it, or leave the key out: adapters cannot be loaded by path.",
        ));
    }
    for index in 0..config.scheduler.count() {
        findings.extend(address("scheduler", config.scheduler.of_attempt(index)));
    }
    findings
}

fn scheduler(config: &SchedulerConfig) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Err(error) = config.validate_alone() {
        findings.push(Finding::problem(error.to_string(), ""));
    }
    findings.extend(model(&config.model));
    findings.extend(identity(config.identity.as_deref(), Role::Scheduler, None));
    findings.extend(blobs(config.blobs.as_deref()));
    for (key, listen) in
        [("listen_nodes", &config.listen_nodes), ("listen_gateways", &config.listen_gateways)]
    {
        findings.extend(address(key, listen));
        findings.extend(exposed(key, listen, config.identity.as_deref(), config.allow_plaintext));
    }
    match config.store.split_once(':') {
        Some(("redb", path)) if !path.is_empty() => {}
        Some(("redis", _)) => {}
        Some(("rediss", _)) => findings.push(Finding::problem(
            "`store`: redis over TLS is not built in",
            "Use a tunnel on this host, and redis:// to its end.",
        )),
        _ => findings.push(Finding::problem(
            "`store`: the address has no known scheme",
            "Write redb:PATH, or redis://HOST:PORT/DATABASE.",
        )),
    }
    findings
}

fn node(config: &NodeConfig) -> Vec<Finding> {
    let mut findings = Vec::new();
    for index in 0..config.scheduler.count() {
        findings.extend(address("scheduler", config.scheduler.of_attempt(index)));
    }
    findings.extend(address("listen", &config.listen));
    findings.extend(exposed("listen", &config.listen, config.identity.as_deref(), config.allow_plaintext));
    findings.extend(identity(config.identity.as_deref(), Role::Node, Some(&config.name.0)));
    findings.extend(blobs(config.blobs.as_deref()));
    if let Some(own) = &config.model {
        findings.extend(model(own));
    }
    match threads::check(config) {
        Ok(warnings) => findings.extend(warnings.into_iter().map(|warning| Finding::warning(warning, ""))),
        Err(error) => findings.push(Finding::problem(error.to_string(), "")),
    }
    if config.layers.is_some_and(|layers| layers.start >= layers.end) {
        findings.push(Finding::problem("`layers`: it is empty", "Let `start` be smaller than `end`."));
    }
    if config.memory_bytes == Some(0) {
        findings.push(Finding::problem(
            "`memory_bytes`: a node without memory holds nothing",
            "Leave the key out, and it offers nine tenths of what is available.",
        ));
    }
    findings
}

fn enrolment(config: &EnrolmentConfig) -> Vec<Finding> {
    let mut findings: Vec<_> = address("listen", &config.listen).into_iter().collect();
    findings.extend(identity(Some(&config.identity), Role::Enrolment, None));
    if !config.authority.is_dir() {
        findings.push(Finding::problem(
            format!("`authority`: {} is no directory on this machine", config.authority.display()),
            "Run the endpoint where the authority is, or make one with `ashlar identity`.",
        ));
    }
    findings
}

fn model(model: &str) -> Option<Finding> {
    if model.is_empty() {
        return Some(Finding::problem("`model`: it is empty", "Name a directory, a GGUF file or a hub id."));
    }
    if hub::local(model).is_some() {
        return None;
    }
    Some(if hub::is_id(model) {
        Finding::warning(
            format!("`model`: {model} is not on this machine"),
            "It is fetched from the hub when the role starts.",
        )
    } else {
        Finding::problem(
            format!("`model`: there is no model at {model} on this machine"),
            "Name a directory with config.json, tokenizer.json and *.safetensors, a GGUF file, or a hub id (org/name).",
        )
    })
}

fn identity(directory: Option<&Path>, role: Role, name: Option<&str>) -> Option<Finding> {
    let directory = directory?;
    let remedy = "Make it with `ashlar identity`, or let the machine join with `ashlar node --join`.";
    let credentials = match Credentials::open(directory) {
        Ok(credentials) => credentials,
        Err(error) => return Some(Finding::problem(format!("`identity`: {error}"), remedy)),
    };
    let theirs = credentials.identity()?;
    if theirs.role() != role || name.is_some_and(|name| name != theirs.name()) {
        let wanted = name.map_or_else(|| format!("a {role}"), |name| format!("{role} {name}"));
        let what = format!("`identity`: {} is that of {theirs}, this is {wanted}", directory.display());
        return Some(Finding::problem(what, "Name the directory of this process's own identity."));
    }
    let opened = Transport::open(Some(directory));
    opened.err().map(|error| Finding::problem(format!("`identity`: {error}"), remedy))
}

/// `host:port`, as far as that can be told without asking anybody.
fn address(key: &str, text: &str) -> Option<Finding> {
    let port = text
        .rsplit_once(':')
        .and_then(|(host, port)| (!host.is_empty()).then_some(port)?.parse::<u16>().ok());
    port.is_none().then(|| {
        Finding::problem(
            format!("`{key}`: {text} is no address"),
            "Write host:port, for example 127.0.0.1:7401 or scheduler.internal:7401.",
        )
    })
}

/// Nobody may listen for other machines in the clear without saying so.
fn exposed(key: &str, listen: &str, identity: Option<&Path>, allowed: bool) -> Option<Finding> {
    if identity.is_some() {
        return None;
    }
    // Numbers only: no resolver is asked.
    let literal: Option<SocketAddr> = listen.parse().ok();
    let address = literal.or_else(|| {
        let local = listen.starts_with("localhost:");
        local.then(|| listen.to_socket_addrs().ok()?.next()).flatten()
    })?;
    let refused = Transport::Plain.check_listening(address, allowed);
    refused.err().map(|error| Finding::problem(format!("`{key}`: {error}"), ""))
}

fn blobs(address: Option<&str>) -> Option<Finding> {
    let address = address?;
    let known = !address.contains("://") || address.starts_with("s3://") || address.starts_with("file:///");
    (address.is_empty() || !known).then(|| {
        Finding::problem(
            "`blobs`: the address has no known scheme",
            "Name a directory, or s3://BUCKET/PREFIX?endpoint=https://HOST&region=NAME.",
        )
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::findings::{Mark, any_problem};

    fn found(role: ConfigRole, settings: &[&str]) -> String {
        let settings = settings.iter().map(|setting| (*setting).to_owned()).collect();
        let findings = check(role, &Sources { settings, ..Sources::default() });
        findings.iter().map(|finding| format!("{:?} {}\n", finding.mark, finding.what)).collect()
    }

    #[test]
    fn a_scheduler_is_told_what_would_end_it_at_its_start() {
        let found = found(
            ConfigRole::Scheduler,
            &["model=/nowhere/m", "listen_nodes=0.0.0.0:7401", "store=postgres://x", "lease_ttl_ms=10"],
        );
        for part in
            ["no model at /nowhere/m", "listen_nodes", "no known scheme", "lease_ttl_ms must be at least"]
        {
            assert!(found.contains(part), "{found}");
        }
        assert!(!found.contains("listen_gateways"), "{found}");
    }

    #[test]
    fn a_node_is_told_what_would_end_it_at_its_start() {
        let problems = found(
            ConfigRole::Node,
            &["scheduler=nowhere", "isa=abacus", "layers={ start = 3, end = 3 }", "listen=0.0.0.0:1"],
        );
        for part in
            ["nowhere is no address", "abacus", "`layers`: it is empty", "`listen`: 0.0.0.0:1 can be reached"]
        {
            assert!(problems.contains(part), "{problems}");
        }
        let good = check(
            ConfigRole::Node,
            &Sources { settings: vec!["scheduler=s:1".into(), "name=a".into()], ..Sources::default() },
        );
        assert!(!any_problem(&good) && good[0].mark == Mark::Good, "{good:?}");
    }
}
