//! The one binary: every role, and the commands that talk to them.
//!
//! Layout: [`up`] (a small real cluster as supervised children), [`roles`] (gateway, scheduler, node),
//! configured by [`settings`], which [`config_command`] shows and checks; machines that join ([`enrolment`]), client commands
//! ([`chat`], [`tune`], [`top`], [`health`], [`doctor`], [`bench`], [`model`], [`keys`], [`certs`], [`drain`], [`replan`], [`drill`], [`replay`]), and what needs no cluster ([`plan`], [`simulate`], [`quantize`], [`synth`]). [`demo`] holds the demo model,
//! [`http`] a plain HTTP client, [`supervisor`] a child process kept alive, [`processes`] which ones there are, [`edge`] how clients reach an `up`, [`first_key`] the key that it begins with, [`network`] networks of their own for
//! them.
#![forbid(unsafe_code)]

mod bench;
mod cache;
mod certs;
mod chat;
mod config_command;
mod demo;
mod doctor;
mod drain;
mod drill;
mod edge;
mod enrolment;
mod findings;
mod first_key;
mod health;
mod http;
mod keys;
mod model;
mod network;
mod plan;
mod port;
mod precision;
mod processes;
mod quantize;
mod replan;
mod replay;
mod roles;
mod settings;
mod simulate;
mod supervisor;
mod synth;
mod top;
mod tune;
mod up;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Serve one large model from several ordinary machines, exactly.
#[derive(Debug, Parser)]
#[command(
    name = "ashlar",
    version,
    max_term_width = 110,
    after_help = "Examples:
  ashlar up                                   a gateway, a scheduler and two nodes with the demo model
  ashlar up --model ./llama-3.2-1b --tp 2     a model directory, cut over two tensor-parallel ranks
  ashlar chat                                 talk to it
  ashlar top                                  watch it
  ashlar doctor                               what is wrong with this machine, and what to do
  ashlar up --join-listen                     other machines may join: it prints what to run there
  ashlar node --join 10.0.0.1:7400 --token …  one of them
  ashlar tune train.jsonl                     teach it something
  ashlar plan --model ./llama-3.2-1b          what would go where, and how fast it would be"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a whole cluster on this machine: gateway, scheduler and nodes, supervised.
    Up(up::UpArgs),
    /// Run the gateway: OpenAI's HTTP API.
    Gateway(roles::RoleArgs),
    /// Run the scheduler: admission, batching, placement.
    Scheduler(roles::RoleArgs),
    /// Run a shard node: one rank. With --join, of a cluster that runs elsewhere.
    Node(roles::NodeArgs),
    /// Run the enrolment endpoint: certificates for machines that join.
    Enrolment(roles::RoleArgs),
    /// Show, check and describe the configuration of a role.
    Config(config_command::ConfigArgs),
    /// Let further machines join a running cluster.
    Token(enrolment::commands::TokenArgs),
    /// Make identities for the processes of a cluster that is started by hand.
    Identity(enrolment::commands::IdentityArgs),
    /// Chat with a served model in the terminal.
    Chat(chat::ChatArgs),
    /// Fine-tune a served model: upload examples, create the job, watch it.
    Tune(tune::TuneArgs),
    /// Show which node would hold what, the memory ledger and the predicted speed, without starting anything.
    Plan(plan::PlanArgs),
    /// Simulate a cluster under a load, with faults: goodput, latencies, recovery times. Starts nothing.
    Simulate(Box<simulate::SimulateArgs>),
    /// Measure: a model on this machine, layouts against each other, or a running service.
    Bench(bench::BenchArgs),
    /// Serve several models on one cluster: deploy, scale and remove them.
    Model(model::ModelArgs),
    /// Certificates for HTTPS, from an authority of one's own.
    Certs(certs::CertsArgs),
    /// API keys: make, list, revoke.
    Keys(keys::KeysArgs),
    /// Watch the cluster in the terminal: requests, latencies, nodes, memory, jobs.
    Top(top::TopArgs),
    /// Say whether a role is well: for health checks of containers.
    Health(health::HealthArgs),
    /// Explain what is wrong with a machine, a configuration, a link, a model or a running cluster, and what to do.
    Doctor(doctor::DoctorArgs),
    /// Have others take a node's place, so that its machine can be taken away.
    Drain(drain::DrainArgs),
    /// Have the model laid out as it would be planned from nothing now, or see what that would be.
    Replan(replan::ReplanArgs),
    /// Kill, freeze and cut off processes of a running cluster under load, and say what clients noticed.
    Drill(drill::DrillArgs),
    /// Compute stored responses once more, on whatever layout there is, and compare them byte by byte.
    Replay(replay::ReplayArgs),
    /// Write a model as one GGUF file, quantised: for this server and for llama.cpp.
    Quantize(quantize::QuantizeArgs),
    /// Write a random-weight model of a real shape.
    Synth(synth::SynthArgs),
}

fn main() -> ExitCode {
    end_quietly_when_nobody_reads();
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Up(args) => up::run(args),
        Command::Gateway(args) => roles::gateway(&args),
        Command::Scheduler(args) => roles::scheduler(&args),
        Command::Node(args) => roles::node(&args),
        Command::Enrolment(args) => roles::enrolment(&args),
        Command::Config(args) => config_command::run(args),
        Command::Token(args) => enrolment::commands::token(args),
        Command::Identity(args) => enrolment::commands::identity(args),
        Command::Chat(args) => chat::run(args),
        Command::Tune(args) => tune::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Simulate(args) => simulate::run(*args),
        Command::Bench(args) => bench::run(args),
        Command::Model(args) => model::run(args),
        Command::Certs(args) => certs::run(args),
        Command::Keys(args) => keys::run(args),
        Command::Top(args) => top::run(args),
        Command::Health(args) => health::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Drain(args) => drain::run(args),
        Command::Replan(args) => replan::run(args),
        Command::Drill(args) => drill::run(args),
        Command::Replay(args) => replay::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Synth(args) => synth::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The whole chain once, innermost cause last.
            eprintln!("error: {error:#}");
            ExitCode::from(roles::exit_code(&error))
        }
    }
}

/// `ashlar tune --list | head -3` is no fault: who reads has read enough. Printing panics then, as the standard library has it.
fn end_quietly_when_nobody_reads() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let said = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        if said.starts_with("failed printing to stdout") && said.contains("Broken pipe") {
            std::process::exit(0);
        }
        report(panic);
    }));
}
