//! `ashlar certs`: certificates for the HTTP side, from an authority of one's own.

use anyhow::Result;
use ashlar_identity::web::{self, WebFiles};
use clap::Args;
use serde_json::json;
use std::path::PathBuf;

/// Arguments of `ashlar certs`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar certs --host gate.example --host 10.0.0.5        into ./tls: ca.pem for clients, server.pem and server-key.pem for the gateway
  ashlar certs --host gate.example                        again: a new certificate of the same authority; a running gateway takes it
  curl --cacert tls/ca.pem https://gate.example:8080/health
  ASHLAR_CA=tls/ca.pem ashlar chat --url https://gate.example:8080
A certificate holds for 397 days, the authority for ten years. Keep ca-key.pem to yourself, away from the gateway's machine if you can.
Certificates of another authority do as well: `tls_certificate` and `tls_key` in the gateway's configuration.
What the processes of a cluster say to each other is encrypted otherwise: see `ashlar identity`.")]
pub(crate) struct CertsArgs {
    /// A name or an address under which clients reach the gateway; may be said several times.
    #[arg(long = "host", value_name = "NAME|ADDRESS", required = true)]
    hosts: Vec<String>,
    /// Where the files are put, and the authority is kept.
    #[arg(long, value_name = "DIR", default_value = "tls")]
    out: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: CertsArgs) -> Result<()> {
    let WebFiles { authority, certificate, key } = web::issue(&args.out, &args.hosts)?;
    if args.json {
        println!(
            "{:#}",
            json!({"authority": authority, "certificate": certificate, "key": key, "hosts": args.hosts})
        );
        return Ok(());
    }
    println!("for the gateway's configuration:");
    println!("  tls_certificate = {:?}", certificate.display().to_string());
    println!("  tls_key = {:?}", key.display().to_string());
    println!("clients are to trust {}", authority.display());
    Ok(())
}
