//! Addresses: what is to be had where, encrypted or not.

use crate::http::Http;
use crate::scheduler::say;
use crate::world::{PLAIN_TEMPLATE, World, ask};
use ashlar_gateway::{GatewayConfig, GatewayError};
use ashlar_identity::web::{WebClient, issue};
use serde_json::json;
use std::net::SocketAddr;
use std::path::Path;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn refused(configure: impl FnOnce(&mut GatewayConfig)) -> Option<String> {
    let mut config = GatewayConfig::default();
    configure(&mut config);
    config.check_exposure().err().map(|error| error.to_string())
}

#[test]
fn nothing_is_offered_to_others_in_the_clear_or_without_keys() {
    let everywhere: SocketAddr = "0.0.0.0:8080".parse().unwrap();
    assert_eq!(refused(|_| {}), None);
    assert!(refused(|config| config.listen = everywhere).unwrap().contains("in the clear"));
    assert!(refused(|config| config.admin_listen = Some(everywhere)).unwrap().contains("in the clear"));
    assert!(refused(|config| config.metrics_listen = Some(everywhere)).unwrap().contains("in the clear"));
    assert_eq!(refused(|config| (config.listen, config.plain_http) = (everywhere, true)), None);
    let encrypted = |config: &mut GatewayConfig| {
        config.listen = everywhere;
        config.tls_certificate = Some("c".into());
        config.tls_key = Some("k".into());
    };
    assert_eq!(refused(encrypted), None);
    let without_keys = |config: &mut GatewayConfig| {
        encrypted(config);
        config.keys_required = Some(false);
    };
    assert!(refused(without_keys).unwrap().contains("keys_required"));
    assert!(refused(|config| config.tls_key = Some("k".into())).unwrap().contains("belong together"));
    let config = GatewayConfig { listen: everywhere, ..GatewayConfig::default() };
    assert!(config.keys_are_required() && !GatewayConfig::default().keys_are_required());
}

#[tokio::test]
async fn operators_and_metrics_have_addresses_of_their_own_where_that_is_wanted() {
    let free = || Some("127.0.0.1:0".parse().unwrap());
    let configure =
        |config: &mut GatewayConfig| (config.admin_listen, config.metrics_listen) = (free(), free());
    let world = World::with(PLAIN_TEMPLATE, configure, |_| say("hello")).await;
    let [clients, operators, metrics]: [Http; 3] = world
        .addresses
        .iter()
        .map(|address| Http { address: *address })
        .collect::<Vec<_>>()
        .try_into()
        .unwrap();
    let reached = async |path: &str| {
        let mut at = Vec::new();
        for (name, http) in [("clients", clients), ("operators", operators), ("metrics", metrics)] {
            if http.get(path).await.status == 200 {
                at.push(name);
            }
        }
        at
    };
    assert_eq!(reached("/v1/models").await, ["clients", "operators"]);
    assert_eq!(reached("/admin/cluster").await, ["operators"]);
    assert_eq!(reached("/").await, ["operators"]);
    assert_eq!(reached("/dashboard/app.js").await, ["operators"]);
    assert_eq!(reached("/metrics").await, ["metrics"]);
    assert_eq!(reached("/health").await, ["clients", "operators", "metrics"]);
    assert_eq!(reached("/ready").await, ["clients", "operators", "metrics"]);
    assert_eq!(clients.post("/v1/chat/completions", ask(json!({}))).await.status, 200);
    assert_eq!(metrics.post("/v1/chat/completions", ask(json!({}))).await.status, 404);
}

/// A gateway that speaks HTTPS, and who trusts it.
async fn encrypted(directory: &Path, head_timeout_ms: u64) -> (World, WebClient) {
    let files = issue(directory, &["127.0.0.1".to_owned()]).unwrap();
    let (certificate, key) = (files.certificate.clone(), files.key.clone());
    let configure = move |config: &mut GatewayConfig| {
        (config.tls_certificate, config.tls_key) = (Some(certificate), Some(key));
        config.head_timeout_ms = head_timeout_ms;
        config.connections_max = 4;
    };
    let world = World::with_tls(PLAIN_TEMPLATE, configure, |_| say("hello")).await;
    (world, WebClient::new(Some(&files.authority)).unwrap())
}

async fn get(world: &World, client: &WebClient, path: &str) -> Result<String, String> {
    let socket = TcpStream::connect(world.http.address).await.map_err(|error| error.to_string())?;
    let mut stream = client.connect("127.0.0.1", socket).await.map_err(|error| error.to_string())?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: gate\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
    let mut answer = String::new();
    // Whether the end of the connection is announced is the server's business.
    let _ = stream.read_to_string(&mut answer).await;
    Ok(answer)
}

#[tokio::test]
async fn clients_that_trust_the_authority_are_answered_over_https_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (world, client) = encrypted(directory.path(), 60_000).await;
    let answer = get(&world, &client, "/health").await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(get(&world, &WebClient::new(None).unwrap(), "/health").await.is_err());
    // In the clear, and what is nothing at all.
    for said in [&b"GET /health HTTP/1.1\r\nhost: gate\r\n\r\n"[..], &[0x16, 3, 1, 0xff, 0xff], &[0; 4096]] {
        let mut socket = TcpStream::connect(world.http.address).await.unwrap();
        socket.write_all(said).await.unwrap();
        let _ = socket.shutdown().await;
        let mut heard = Vec::new();
        let _ = socket.read_to_end(&mut heard).await;
        assert!(!heard.starts_with(b"HTTP"), "{heard:?}");
    }
    assert!(get(&world, &client, "/health").await.unwrap().starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn whoever_never_finishes_a_handshake_loses_its_place() {
    let directory = tempfile::tempdir().unwrap();
    let (world, _) = encrypted(directory.path(), 300).await;
    let mut silent = TcpStream::connect(world.http.address).await.unwrap();
    let mut heard = Vec::new();
    assert_eq!(silent.read_to_end(&mut heard).await.unwrap_or(0), 0, "its time is over");
    drop(world);
    // Those who come need not wait for that.
    let (world, client) = encrypted(directory.path(), 60_000).await;
    let mut silent = Vec::new();
    for _ in 0..10 {
        silent.push(TcpStream::connect(world.http.address).await.unwrap());
        let answer = get(&world, &client, "/health").await;
        assert!(answer.as_ref().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")), "{answer:?}");
    }
    assert_eq!(silent[0].read_to_end(&mut heard).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn a_certificate_that_cannot_be_used_is_said_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nothing.pem");
    let config = GatewayConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        tls_certificate: Some(path.clone()),
        tls_key: Some(path),
        ..GatewayConfig::default()
    };
    let error = ashlar_gateway::Gateway::bind(config, directory.path()).await.unwrap_err();
    assert!(matches!(error, GatewayError::Web(_)) && error.to_string().contains("nothing.pem"), "{error}");
}
