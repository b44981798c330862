//! Whether files say what a role understands, and whether it could start with that.

use super::{CheckArgs, rules};
use crate::findings::{self, Mark};
use crate::roles::permanent;
use crate::settings::ConfigRole;
use anyhow::{Context, Result, anyhow};
use ashlar_service_kit::config::{Found, Sources};
use std::io::IsTerminal;
use std::path::Path;

pub(crate) fn run(args: &CheckArgs) -> Result<()> {
    let mut wrong = 0;
    for file in &args.files {
        let (role, findings) = match args.role.map_or_else(|| role_of(file), Ok) {
            Ok(role) => {
                let sources = Sources::file(file);
                let sources = if args.env { sources.with_environment() } else { sources };
                (role.word(), rules::check(role, &sources))
            }
            Err(error) => ("unknown role", vec![findings::Finding::problem(format!("{error:#}"), "")]),
        };
        let problems = findings.iter().filter(|finding| finding.mark == Mark::Problem).count();
        wrong += usize::from(problems > 0);
        println!("{} ({role})", file.display());
        print!("{}", findings::list(&findings, std::io::stdout().is_terminal()));
    }
    if wrong == 0 {
        return Ok(());
    }
    permanent(Err(anyhow!("{wrong} of {} files cannot be used", args.files.len())))
}

/// Whose file it is: the role that knows most of its keys, and of several the one that the file is named after.
pub(crate) fn role_of(file: &Path) -> Result<ConfigRole> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let table: toml::Table = match text.parse() {
        Ok(table) => table,
        // What is wrong with it is told with its line, whoever is asked.
        Err(_) => return Ok(named_role(file).unwrap_or(ConfigRole::Gateway)),
    };
    let unknown = |role: &ConfigRole| {
        let schema = role.schema();
        let unknown = table.keys().filter(|key| matches!(schema.find(key), Found::Unknown(_))).count();
        let missing =
            schema.keys().iter().filter(|key| key.required && !table.contains_key(&key.path)).count();
        unknown * 100 + missing
    };
    let least = ConfigRole::ALL.iter().map(unknown).min().unwrap_or_default();
    let fitting: Vec<_> = ConfigRole::ALL.into_iter().filter(|role| unknown(role) == least).collect();
    match fitting.as_slice() {
        [one] => Ok(*one),
        several => named_role(file).filter(|role| several.contains(role)).with_context(|| {
            format!("{}: it could be of several roles: say which with --role", file.display())
        }),
    }
}

fn named_role(file: &Path) -> Option<ConfigRole> {
    let name = file.file_name()?.to_str()?;
    ConfigRole::ALL.into_iter().find(|role| name.starts_with(role.word()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_file_is_of_the_role_whose_keys_it_has() {
        let folder = tempfile::tempdir().unwrap();
        let role = |name: &str, text: &str| {
            let file = folder.path().join(name);
            std::fs::write(&file, text).unwrap();
            role_of(&file).ok()
        };
        assert_eq!(role("a.toml", "model = \"m\"\nlisten_nodes = \"x\"\n"), Some(ConfigRole::Scheduler));
        assert_eq!(role("b.toml", "scheduler = \"s:1\"\nthreads = 1\n"), Some(ConfigRole::Node));
        assert_eq!(
            role("c.toml", "model = \"m\"\nlisten = \"0.0.0.0:1\"\nchoices_max = 1\n"),
            Some(ConfigRole::Gateway)
        );
        assert_eq!(role("d.toml", "model = \"m\"\n"), None);
        assert_eq!(role("gateway-1.toml", "model = \"m\"\n"), Some(ConfigRole::Gateway));
    }
}
