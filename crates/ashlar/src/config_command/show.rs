//! Every key, its value, and where that comes from.

use super::ShowArgs;
use crate::enrolment::endpoint::EnrolmentConfig;
use crate::roles::permanent;
use crate::settings::{self, ConfigRole};
use anyhow::Result;
use ashlar_gateway::GatewayConfig;
use ashlar_scheduler::SchedulerConfig;
use ashlar_service_kit::config::{Draft, Effective};
use ashlar_shard_node::NodeConfig;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub(crate) fn run(args: &ShowArgs) -> Result<()> {
    let mut draft = permanent(settings::draft(args.role, &args.settings))?;
    let shown = permanent(match args.role {
        ConfigRole::Gateway => effective::<GatewayConfig>(&draft),
        ConfigRole::Scheduler => effective::<SchedulerConfig>(&draft),
        ConfigRole::Enrolment => effective::<EnrolmentConfig>(&draft),
        ConfigRole::Node => {
            permanent(settings::supply_name(&mut draft))?;
            if let Err(error) = settings::supply_address(&mut draft) {
                eprintln!("advertise_host is found when the node starts: {error:#}");
            }
            effective::<NodeConfig>(&draft)
        }
    })?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&shown)?);
    } else {
        print!("{}", table(&shown));
    }
    Ok(())
}

fn effective<T: Serialize + DeserializeOwned>(draft: &Draft) -> Result<Vec<Effective>> {
    Ok(draft.effective(&draft.finish::<T>()?))
}

/// TOML that would say the same, each line with its origin; what has no value is commented out.
fn table(shown: &[Effective]) -> String {
    let lines: Vec<_> = shown.iter().map(|effective| (line(effective), &effective.origin)).collect();
    // A long value does not push everything to the right.
    let width = lines.iter().map(|(line, _)| line.chars().count()).filter(|width| *width <= 60).max();
    let width = width.unwrap_or_default();
    lines.iter().map(|(line, origin)| format!("{line:width$}  # {origin}\n")).collect()
}

fn line(effective: &Effective) -> String {
    match toml::Value::try_from(&effective.value) {
        Ok(value) if !effective.value.is_null() => format!("{} = {value}", effective.key),
        _ => format!("# {}", effective.key),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_shown_is_toml_with_origins() {
        let effective =
            |key: &str, value, origin: &str| Effective { key: key.into(), value, origin: origin.into() };
        let shown = [
            effective("listen", json!("0.0.0.0:8080"), "ASHLAR_GATEWAY__LISTEN"),
            effective("blobs", json!(null), "default"),
            effective("links.shared_memory", json!(true), "node.toml:7"),
        ];
        let text = table(&shown);
        assert_eq!(
            text,
            "listen = \"0.0.0.0:8080\"     # ASHLAR_GATEWAY__LISTEN\n# blobs                     # default\n\
             links.shared_memory = true  # node.toml:7\n"
        );
        let read: toml::Table = text.parse().unwrap();
        assert_eq!(read["links"]["shared_memory"].as_bool(), Some(true));
    }
}
