//! `ashlar token` and `ashlar identity`.

use super::endpoint::EnrolmentConfig;
use super::{TOKEN_VALID, join_line};
use anyhow::{Context, Result, bail};
use ashlar_identity::{Authority, Identity, Ledger, Role};
use ashlar_service_kit::config::{Draft, Sources};
use clap::{Args, Subcommand};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// Longest time that a token may hold.
const TOKEN_VALID_MAX: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Arguments of `ashlar token`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar token create                      one more machine may join, within an hour
  ashlar token create --valid 24h          within a day
  ashlar token create --name node-a        a machine takes the place of node-a, whose disk was lost")]
pub(crate) struct TokenArgs {
    #[command(subcommand)]
    command: TokenCommand,
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make a token, with which one machine may join, and print what to run there.
    Create(CreateArgs),
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// The state directory of the cluster's `ashlar up`.
    #[arg(long, default_value = "./.ashlar", value_name = "DIR")]
    state: PathBuf,
    /// How long it holds: 30m, 1h, 2d; at most 30d.
    #[arg(long, value_name = "TIME", value_parser = parse_time, default_value = "1h")]
    valid: Duration,
    /// Only a machine of this name may use it, even if another one had that name.
    #[arg(long)]
    name: Option<String>,
}

/// Arguments of `ashlar identity`.
#[derive(Debug, Args)]
#[command(after_help = "Example, for a cluster whose processes are started by hand:
  ashlar identity --authority ca --to identities scheduler/a gateway/a node/node-0 node/node-1
then copy identities/scheduler-a to the scheduler's machine and set `identity` to it, and so on. The authority is made on first
use; keep its directory where nobody else can read it.
Once more, they are renewed: copied over those that are there, they count from the next connection on; nothing is restarted. Another
authority takes over in three rounds, each copied everywhere before the next:
  ashlar identity --authority ca --trust new-ca --to identities scheduler/a …
  ashlar identity --authority new-ca --trust ca --to identities scheduler/a …
  ashlar identity --authority new-ca --to identities scheduler/a …")]
pub(crate) struct IdentityArgs {
    /// The directory of the cluster's certificate authority.
    #[arg(long, value_name = "DIR")]
    authority: PathBuf,
    /// The directory of another authority, whose identities are trusted as well.
    #[arg(long, value_name = "DIR")]
    trust: Option<PathBuf>,
    /// Where each identity gets a directory, ROLE-NAME.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// For whom: gateway/NAME, scheduler/NAME, node/NAME or enrolment/NAME.
    #[arg(required = true, value_name = "ROLE/NAME", value_parser = parse_identity)]
    identities: Vec<Identity>,
}

pub(crate) fn token(args: TokenArgs) -> Result<()> {
    let TokenCommand::Create(args) = args.command;
    let file = args.state.join("config").join("enrolment.toml");
    if !file.exists() {
        bail!(
            "no machine can join the cluster in {}: start it with `ashlar up --join-listen`, or name its --state DIR",
            args.state.display()
        );
    }
    let config: EnrolmentConfig = Draft::gather(EnrolmentConfig::schema(), &Sources::file(file))?.finish()?;
    let name = args.name.as_deref().map(|name| Identity::new(Role::Node, name)).transpose()?;
    let authority = Authority::open(&config.authority)?;
    let ledger = Ledger::of(&config.authority);
    let token = ledger.create(authority.fingerprint(), args.valid, name.as_ref(), SystemTime::now())?;
    let name = args.name.map_or_else(String::new, |name| format!(" --name {name}"));
    println!("{}{name}", join_line(&config.advertise, &token));
    Ok(())
}

pub(crate) fn identity(args: IdentityArgs) -> Result<()> {
    let authority = Authority::open_or_create(&args.authority)?;
    let trusted = args.trust.as_deref().map(Authority::open_or_create).transpose()?;
    for identity in args.identities {
        let directory = args.to.join(format!("{}-{}", identity.role(), identity.name()));
        let mut credentials = authority.credentials(&identity)?;
        credentials.other_authority = trusted.as_ref().map(|authority| authority.certificate().clone());
        credentials.save(&directory)?;
        eprintln!("{identity}: {}", directory.display());
    }
    Ok(())
}

fn parse_identity(text: &str) -> Result<Identity, String> {
    let (role, name) = text.split_once('/').ok_or("write ROLE/NAME, for example node/node-0")?;
    let role = Role::of_word(role).ok_or("the role is gateway, scheduler, node or enrolment")?;
    Identity::new(role, name).map_err(|error| error.to_string())
}

fn parse_time(text: &str) -> Result<Duration, String> {
    let wrong = || "write a number and s, m, h or d: 30m, 1h, 2d".to_owned();
    let unit = text.chars().last().ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 60 * 60,
        'd' => 24 * 60 * 60,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..text.len() - unit.len_utf8()].parse().map_err(|_| wrong())?;
    let time = Duration::from_secs(number.saturating_mul(seconds));
    if time.is_zero() || time > TOKEN_VALID_MAX {
        return Err(format!(
            "a token holds for at least a second and at most {} days",
            TOKEN_VALID_MAX.as_secs() / 86_400
        ));
    }
    Ok(time)
}

/// What `ashlar up` prints for the first machine.
pub(crate) fn first_token(config: &EnrolmentConfig) -> Result<String> {
    let authority = Authority::open(&config.authority)?;
    let token = Ledger::of(&config.authority)
        .create(authority.fingerprint(), TOKEN_VALID, None, SystemTime::now())
        .context("cannot make a token")?;
    Ok(join_line(&config.advertise, &token))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn times_have_units_and_bounds() {
        assert_eq!(parse_time("30m").unwrap(), Duration::from_secs(1800));
        assert_eq!(parse_time("2d").unwrap(), Duration::from_secs(172_800));
        for wrong in ["", "h", "1", "1w", "0s", "31d", "-1h", "1é", "99999999999999999999d"] {
            assert!(parse_time(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn identities_are_a_role_and_a_name() {
        assert_eq!(parse_identity("node/a").unwrap(), Identity::new(Role::Node, "a").unwrap());
        for wrong in ["node", "king/a", "node/", "node/A"] {
            assert!(parse_identity(wrong).is_err(), "{wrong}");
        }
    }
}
