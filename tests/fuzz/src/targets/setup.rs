//! Configuration, tokens, requests for certificates.

use super::{InputFile, SMALL, subject, texts};
use crate::mutate::{Corpus, Seed};
use crate::{Subject, Target};
use anyhow::Result;
use ashlar_gateway::GatewayConfig;
use ashlar_identity::{CertificateRequest, Fingerprint, KeyPair, Token};
use ashlar_protocol::frame;
use ashlar_scheduler::SchedulerConfig;
use ashlar_service_kit::config::{Draft, Schema, Sources};
use ashlar_shard_node::NodeConfig;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

pub(super) const GATEWAY: Target =
    Target { name: "gateway-config", about: "gateway.toml", memory: SMALL, open: gateway };
pub(super) const SCHEDULER: Target =
    Target { name: "scheduler-config", about: "scheduler.toml", memory: SMALL, open: scheduler };
pub(super) const NODE: Target = Target { name: "node-config", about: "node.toml", memory: SMALL, open: node };
pub(super) const SETTINGS: Target =
    Target { name: "settings", about: "--set and environment variables", memory: SMALL, open: settings };
pub(super) const TOKEN: Target =
    Target { name: "token", about: "a token to enrol with", memory: SMALL, open: token };
pub(super) const CERTIFICATE_REQUEST: Target = Target {
    name: "certificate-request",
    about: "what a machine sends that wants a certificate",
    memory: SMALL,
    open: certificate_request,
};

fn whole<T: DeserializeOwned + Serialize>(draft: &Draft) -> bool {
    match draft.finish::<T>() {
        Ok(config) => {
            let _ = draft.effective(&config);
            true
        }
        Err(error) => {
            let _ = error.to_string();
            false
        }
    }
}

fn file<T: DeserializeOwned + Serialize + 'static>(
    directory: &Path,
    schema: Schema,
    seeds: &[&str],
) -> Result<Subject> {
    let keys: Vec<&str> = schema.keys().iter().map(|key| key.path.as_str()).collect();
    let own = format!(
        "{} = [ ] [[ ]] {{ }} \"\"\" ''' # 0x 1e400 inf nan 1979-05-27T07:32:00Z true 127.0.0.1:0 [::1]:80 host:99999 . .. \\u0000 \\UFFFFFFFF _",
        keys.join(" ")
    );
    let corpus = texts(seeds.iter().copied(), &own);
    let file = InputFile::new(directory, "role.toml")?;
    Ok(subject(corpus, move |input| {
        file.put(input);
        Draft::gather(schema.clone(), &Sources::file(&file.path)).is_ok_and(|draft| whole::<T>(&draft))
    }))
}

const GATEWAY_TOML: &str = "model = \"m\"\nscheduler = \"127.0.0.1:7402\"\nlisten = \"0.0.0.0:8080\"\nn_max = 8\nserved_model_name = [\"a\", \"b\"]\naccept_priority = true\n";

fn gateway(directory: &Path) -> Result<Subject> {
    file::<GatewayConfig>(directory, GatewayConfig::schema(), &[GATEWAY_TOML])
}

fn scheduler(directory: &Path) -> Result<Subject> {
    let seeds = [
        include_str!("../../../../configs/scheduler.toml"),
        "model = \"m\"\nstore = \"s.redb\"\nlisten_nodes = \"127.0.0.1:7401\"\nstages = 2\n",
    ];
    file::<SchedulerConfig>(directory, SchedulerConfig::schema(), &seeds)
}

fn node(directory: &Path) -> Result<Subject> {
    let seeds = [
        include_str!("../../../../configs/node.toml"),
        "node = \"a\"\nscheduler = [\"h:1\", \"i:2\"]\n[links]\nshared_memory = false\n",
    ];
    file::<NodeConfig>(directory, NodeConfig::schema(), &seeds)
}

fn settings(_: &Path) -> Result<Subject> {
    let schema = GatewayConfig::schema();
    let keys: Vec<String> = schema.keys().iter().map(|key| schema.variable(&key.path)).collect();
    let own = format!(
        "{} _FILE __ ASHLAR_GATEWAY__ = [ ] {{ }} \" true inf 1e400 0x10 18446744073709551616",
        keys.join(" ")
    );
    let seeds = [
        "model=m\nscheduler=127.0.0.1:7402\nn_max=8",
        "ASHLAR_GATEWAY__MODEL=m\nASHLAR_GATEWAY__SCHEDULER=a:1,b:2\nserved_model_name=[\"a\"]",
    ];
    Ok(subject(texts(seeds, &own), move |input| {
        let mut sources = Sources::default();
        for line in input.split(|&byte| byte == b'\n').take(64) {
            let equals = line.iter().position(|&byte| byte == b'=').filter(|_| line.starts_with(b"ASHLAR"));
            match equals {
                // A value from a file: only of places that are not there.
                Some(at) if !line[..at].ends_with(b"_FILE") => {
                    let text = |part: &[u8]| std::ffi::OsString::from_vec(part.to_vec());
                    sources.environment.push((text(&line[..at]), text(&line[at + 1..])));
                }
                _ => sources.settings.push(String::from_utf8_lossy(line).into_owned()),
            }
        }
        Draft::gather(schema.clone(), &sources).is_ok_and(|draft| whole::<GatewayConfig>(&draft))
    }))
}

fn token(_: &Path) -> Result<Subject> {
    let seed = Token::generate(Fingerprint([7; 32]))?.reveal();
    Ok(subject(texts([seed.as_str()], "ashlar1 a 7 = \u{e9} aaaaaaaa"), |input| {
        std::str::from_utf8(input).is_ok_and(|text| text.parse::<Token>().is_ok())
    }))
}

fn certificate_request(_: &Path) -> Result<Subject> {
    let cluster = Fingerprint([1; 32]);
    let request = CertificateRequest::sign("a", &KeyPair::generate()?, cluster)?;
    let seeds = vec![Seed::from(frame::encode(&request)[8..].to_vec())];
    let corpus = Corpus {
        seeds,
        words: vec![vec![0x30, 0x45, 2], vec![4; 65], b"../a".to_vec(), vec![0xff; 9]],
        ..Corpus::default()
    };
    Ok(subject(corpus, move |input| {
        frame::decode::<CertificateRequest>(input).is_ok_and(|request| request.check(cluster).is_ok())
    }))
}
