//! `ashlar config`: what a role would be told ([`show`]), whether that can work ([`check`], [`rules`]), and what can be said at all
//! ([`describe`]).

pub(crate) mod check;
mod describe;
#[cfg(test)]
mod examples;
pub(crate) mod rules;
mod show;

use crate::settings::{ConfigRole, SettingArgs};
use anyhow::Result;
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Arguments of `ashlar config`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar config show gateway                        every key, its value, and where that comes from
  ashlar config show node --config node.toml --set threads=4
  ashlar config check configs/*.toml                exit code 2 if something is wrong
  ashlar config schema scheduler                    every key with its type, default and description
  ashlar config schema scheduler --json             the same as JSON Schema, for editors")]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Show every key of a role, its value, and whether that is a default or comes from a file, the environment or a flag.
    Show(ShowArgs),
    /// Check configuration files without starting anything.
    Check(CheckArgs),
    /// List every key of a role, with its type, default and description.
    Schema(SchemaArgs),
}

/// Arguments of `ashlar config show`.
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// The role.
    role: ConfigRole,
    #[command(flatten)]
    settings: SettingArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `ashlar config check`.
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The files.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Whose files they are; default: whose keys they have.
    #[arg(long)]
    role: Option<ConfigRole>,
    /// With what the environment of this command says.
    #[arg(long)]
    env: bool,
}

/// Arguments of `ashlar config schema`.
#[derive(Debug, Args)]
pub(crate) struct SchemaArgs {
    /// The role.
    role: ConfigRole,
    /// Print JSON Schema (draft 2020-12).
    #[arg(long, alias = "json-schema")]
    json: bool,
}

pub(crate) fn run(args: ConfigArgs) -> Result<()> {
    match args.command {
        ConfigCommand::Show(args) => show::run(&args),
        ConfigCommand::Check(args) => check::run(&args),
        ConfigCommand::Schema(args) => describe::run(&args),
    }
}
