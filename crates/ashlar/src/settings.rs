//! Where a role's configuration comes from: flags, environment and a file; and what a node finds out itself.

use crate::enrolment::endpoint::EnrolmentConfig;
use crate::enrolment::{as_host, own_address_towards};
use anyhow::{Context, Result};
use ashlar_gateway::GatewayConfig;
use ashlar_identity::{Credentials, name};
use ashlar_scheduler::SchedulerConfig;
use ashlar_service_kit::config::{Draft, Schema, Sources};
use ashlar_shard_node::NodeConfig;
use clap::{Args, ValueEnum};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// What configures a role on the command line.
#[derive(Debug, Default, Clone, PartialEq, Eq, Args)]
pub(crate) struct SettingArgs {
    /// The role's configuration file (TOML). Not needed where environment and --set say enough.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Sets a key, whatever file and environment say; levels are joined by dots. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

/// A role that can be configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConfigRole {
    Gateway,
    Scheduler,
    Node,
    Enrolment,
}

impl ConfigRole {
    /// All of them.
    pub(crate) const ALL: [ConfigRole; 4] =
        [ConfigRole::Gateway, ConfigRole::Scheduler, ConfigRole::Node, ConfigRole::Enrolment];

    /// Every key of it.
    pub(crate) fn schema(self) -> Schema {
        match self {
            ConfigRole::Gateway => GatewayConfig::schema(),
            ConfigRole::Scheduler => SchedulerConfig::schema(),
            ConfigRole::Node => NodeConfig::schema(),
            ConfigRole::Enrolment => EnrolmentConfig::schema(),
        }
    }

    /// What it is called.
    pub(crate) fn word(self) -> &'static str {
        match self {
            ConfigRole::Gateway => "gateway",
            ConfigRole::Scheduler => "scheduler",
            ConfigRole::Node => "node",
            ConfigRole::Enrolment => "enrolment",
        }
    }

    /// What the names of its variables begin with.
    fn prefix(self) -> String {
        format!("ASHLAR_{}__", self.word().to_uppercase())
    }
}

/// Whether an environment variable configures a role.
pub(crate) fn is_variable(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| ConfigRole::ALL.iter().any(|role| name.starts_with(&role.prefix())))
}

/// Whether a node is told how to run, rather than what to join.
pub(crate) fn configures_node(args: &SettingArgs) -> bool {
    let prefix = ConfigRole::Node.prefix();
    let mut environment = std::env::vars_os();
    args.config.is_some()
        || !args.set.is_empty()
        || environment.any(|(name, value)| {
            !value.is_empty() && name.to_str().is_some_and(|name| name.starts_with(&prefix))
        })
}

/// What flags, environment and file say.
pub(crate) fn draft(role: ConfigRole, args: &SettingArgs) -> Result<Draft> {
    let sources = Sources { file: args.config.clone(), settings: args.set.clone(), ..Sources::default() };
    Ok(Draft::gather(role.schema(), &sources.with_environment())?)
}

/// Gives a node without a `name` that of its identity or else of its machine.
pub(crate) fn supply_name(draft: &mut Draft) -> Result<()> {
    if draft.get("name").is_some() || !draft.problems().is_empty() {
        return Ok(());
    }
    let identity = draft.get("identity").and_then(toml::Value::as_str).map(Path::new);
    let certified = identity.and_then(|directory| Credentials::open(directory).ok()?.identity());
    match certified {
        Some(identity) => draft.supply("name", identity.name(), "the name in `identity`"),
        None => {
            let name =
                name::of_machine().context("this machine has no name that a node could have: set `name`")?;
            draft.supply("name", name, "this machine's name");
        }
    }
    Ok(())
}

/// Gives a node that listens on every address of its machine, and is not told which one others shall use, the one on the way to the
/// scheduler.
///
/// # Errors
/// If no way there is known, for example because the scheduler's name is not.
pub(crate) fn supply_address(draft: &mut Draft) -> Result<()> {
    let text = |key: &str| draft.get(key).and_then(toml::Value::as_str).map(str::to_owned);
    let everywhere = text("listen").is_some_and(|listen| is_every_address(&listen));
    if draft.get("advertise_host").is_some() || !everywhere || !draft.problems().is_empty() {
        return Ok(());
    }
    let first = match draft.get("scheduler") {
        Some(toml::Value::Array(several)) => several.first().and_then(toml::Value::as_str).map(str::to_owned),
        _ => text("scheduler"),
    };
    // That it is missing is told with everything else that is.
    let Some(scheduler) = first else { return Ok(()) };
    let own = own_address_towards(&scheduler)
        .with_context(|| format!("cannot tell this machine's address on the way to {scheduler}"))?;
    draft.supply("advertise_host", as_host(own), "this machine's address on the way to the scheduler");
    Ok(())
}

fn is_every_address(listen: &str) -> bool {
    let host = listen.rsplit_once(':').map_or(listen, |(host, _)| host);
    matches!(host, "0.0.0.0" | "[::]" | "::" | "")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn node(settings: &[&str]) -> Draft {
        let settings = settings.iter().map(|setting| (*setting).to_owned()).collect();
        Draft::gather(NodeConfig::schema(), &Sources { settings, ..Sources::default() }).unwrap()
    }

    #[test]
    fn a_node_without_a_name_has_that_of_its_machine() {
        let mut draft = node(&["scheduler=127.0.0.1:7401"]);
        supply_name(&mut draft).unwrap();
        let config: NodeConfig = draft.finish().unwrap();
        assert_eq!(Some(config.name.0), name::of_machine());
        let mut draft = node(&["scheduler=127.0.0.1:7401", "name=own"]);
        supply_name(&mut draft).unwrap();
        assert_eq!(draft.finish::<NodeConfig>().unwrap().name.0, "own");
    }

    #[test]
    fn a_node_that_listens_everywhere_is_reached_on_the_way_to_the_scheduler() {
        let advertised = |settings: &[&str]| {
            let mut draft = node(&[&["name=a", "scheduler=127.0.0.1:7401"], settings].concat());
            supply_address(&mut draft).unwrap();
            draft.finish::<NodeConfig>().unwrap().advertise_host
        };
        assert_eq!(advertised(&["listen=0.0.0.0:7410"]).as_deref(), Some("127.0.0.1"));
        assert_eq!(advertised(&["listen=0.0.0.0:7410", "advertise_host=me"]).as_deref(), Some("me"));
        assert_eq!(advertised(&["listen=10.0.0.1:7410"]), None);
        assert_eq!(advertised(&[]), None);
    }

    #[test]
    fn no_key_could_be_taken_for_a_file_of_another_or_for_a_level() {
        for role in ConfigRole::ALL {
            for key in role.schema().keys() {
                assert!(!key.path.ends_with("_file") && !key.path.contains("__"), "{}", key.path);
                assert!(!key.description.is_empty(), "{} has no description", key.path);
            }
        }
    }
}
