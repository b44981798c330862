//! `ashlar top`: the cluster at a glance, in the terminal.
//!
//! Layout: [`facts`] (what a gateway says, twice, and what follows from it), [`view`] (the lines). Both are pure; here are the
//! questions and the screen.

mod facts;
mod view;

use crate::http::{Client, GatewayArgs};
use crate::roles;
use anyhow::{Context, Result};
use clap::Args;
use facts::{Facts, Look};
use serde_json::Value;
use std::io::{IsTerminal, Write, stdout};
use std::time::{Duration, Instant};

const INTERVAL_MS_MIN: u64 = 100;
/// Other screen, no cursor; and back.
const OPEN_SCREEN: &str = "\x1b[?1049h\x1b[?25l";
const CLOSE_SCREEN: &str = "\x1b[?25h\x1b[?1049l";
const HOME: &str = "\x1b[H";
const REST_OF_LINE: &str = "\x1b[K";
const REST_OF_SCREEN: &str = "\x1b[J";

/// Arguments of `ashlar top`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar top                       nodes, requests, latencies, memory, jobs; Ctrl-C ends it
  ashlar top --once                the same, once, for a log or a mail
  ashlar top --json --interval-ms 5000 >> cluster.jsonl
                                   a line of JSON every five seconds
Shares of a node's time are those between two looks; throughput is the whole cluster's, latencies are those of the gateway that is
asked.")]
pub(crate) struct TopArgs {
    #[command(flatten)]
    gateway: GatewayArgs,
    /// Time between two looks, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    interval_ms: u64,
    /// Look once (twice, an interval apart, for there is no rate at one moment), print, end.
    #[arg(long)]
    once: bool,
    /// Print a line of JSON for each look.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: TopArgs) -> Result<()> {
    roles::runtime()?.block_on(watch(args))
}

async fn watch(args: TopArgs) -> Result<()> {
    let client = args.gateway.client()?;
    let interval = Duration::from_millis(args.interval_ms.max(INTERVAL_MS_MIN));
    let on_screen = stdout().is_terminal() && !args.once && !args.json;
    let colours = stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    // The first one shows whether there is anybody.
    let mut before = look(&client).await?;
    let screen = on_screen.then(Screen::open).transpose()?;
    loop {
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            _ = tokio::signal::ctrl_c() => break,
        }
        let now = match look(&client).await {
            Ok(now) => now,
            // On a screen it is waited for; a program wants to know.
            Err(error) if on_screen => {
                draw(&[
                    format!("{}: {error:#}", args.gateway.url),
                    "Trying again; Ctrl-C ends it.".to_owned(),
                ])?;
                continue;
            }
            Err(error) => return Err(error),
        };
        let facts = Facts::between(&before, &now);
        if args.json {
            writeln!(stdout(), "{}", facts.json()).context("standard output")?;
        } else {
            let lines = view::lines(&facts, colours);
            match on_screen {
                true => draw(&lines)?,
                false => writeln!(stdout(), "{}\n", lines.join("\n")).context("standard output")?,
            }
        }
        if args.once {
            break;
        }
        before = now;
    }
    drop(screen);
    Ok(())
}

async fn look(client: &Client) -> Result<Look> {
    let cluster = client.get_ok("/admin/cluster").await?;
    let live = client.get_ok("/admin/live").await?;
    // Where there is no place for files there are no jobs.
    let jobs = client.get("/v1/fine_tuning/jobs?limit=20").await;
    let jobs = jobs.ok().filter(|(status, _)| *status == 200).map_or(Value::Null, |(_, jobs)| jobs);
    Ok(Look { at: Instant::now(), cluster, live, jobs })
}

/// The terminal's other screen; dropping it gives the first one back.
struct Screen;

impl Screen {
    fn open() -> Result<Screen> {
        write!(stdout(), "{OPEN_SCREEN}").context("terminal")?;
        Ok(Screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = write!(stdout(), "{CLOSE_SCREEN}");
        let _ = stdout().flush();
    }
}

/// In one write, over what was there: nothing flickers.
fn draw(lines: &[String]) -> Result<()> {
    let mut text = HOME.to_owned();
    for line in lines {
        text.push_str(line);
        text.push_str(REST_OF_LINE);
        text.push_str("\r\n");
    }
    text.push_str(REST_OF_SCREEN);
    stdout().write_all(text.as_bytes()).context("terminal")?;
    stdout().flush().context("terminal")
}
