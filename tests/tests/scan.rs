//! What a stranger on the network finds: a scan of every port from a network namespace of its own.
//!
//! Takes root and `ip` (Linux); says so and is skipped elsewhere.

use ashlar_tests::cluster::START_LIMIT;
use ashlar_tests::machines::{Machine, first_token, open_cluster};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Tells the scanner, which is this program in another namespace, whom to look at.
const TARGET: &str = "ASHLAR_SCAN_TARGET";
const SCANNERS: usize = 32;
/// On a link without other machines.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// How long an answer is waited for.
const ANSWER_LIMIT: Duration = Duration::from_millis(700);
/// The first byte of what TLS says before it hangs up: an alert.
const ALERT: u8 = 0x15;

/// A namespace with a link to this one. Dropping it removes both.
struct Elsewhere {
    name: String,
    here: Ipv4Addr,
}

fn ip(arguments: &str) -> bool {
    let output = Command::new("ip").args(arguments.split_whitespace()).output();
    output.is_ok_and(|output| output.status.success())
}

impl Elsewhere {
    /// `None` where that cannot be; says so.
    fn make(test: &str) -> Option<Elsewhere> {
        let number = std::process::id();
        let (high, low) = ((number >> 8) as u8, number as u8 & 0xfc);
        let here = Ipv4Addr::new(10, 214, high, low | 1);
        let there = Ipv4Addr::new(10, 214, high, low | 2);
        let elsewhere = Elsewhere { name: format!("ashlar-scan-{number}"), here };
        let name = &elsewhere.name;
        let (mine, theirs) = (format!("as{number}a"), format!("as{number}b"));
        let made = ip(&format!("netns add {name}"))
            && ip(&format!("link add {mine} type veth peer name {theirs}"))
            && ip(&format!("link set {theirs} netns {name}"))
            && ip(&format!("addr add {here}/30 dev {mine}"))
            && ip(&format!("link set {mine} up"))
            && ip(&format!("-n {name} addr add {there}/30 dev {theirs}"))
            && ip(&format!("-n {name} link set {theirs} up"))
            && ip(&format!("netns exec {name} true"));
        if !made {
            eprintln!("SKIPPED {test}: a network of its own takes root and `ip`");
            return None;
        }
        Some(elsewhere)
    }

    /// What is found there: an object for each port that is open.
    #[track_caller]
    fn scan(&self) -> Vec<Value> {
        let own = std::env::current_exe().expect("this program");
        let output = Command::new("ip")
            .args(["netns", "exec", &self.name])
            .arg(own)
            .args(["--ignored", "--exact", "scanner", "--nocapture", "--test-threads", "1"])
            .env(TARGET, self.here.to_string())
            .output()
            .expect("a scanner");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
        said.lines()
            .filter_map(|line| serde_json::from_str(line.trim().strip_prefix("found ")?).ok())
            .collect()
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        // The link goes with it.
        ip(&format!("netns delete {}", self.name));
    }
}

#[test]
fn a_stranger_on_the_network_finds_nothing_that_answers_without_an_identity() {
    let Some(elsewhere) =
        Elsewhere::make("a_stranger_on_the_network_finds_nothing_that_answers_without_an_identity")
    else {
        return;
    };
    let (cluster, port) = open_cluster(&["--nodes", "1", "--stages", "2", "--replicas", "1"]);
    let machine = Machine::join(port, &first_token(&cluster, port), "elsewhere");
    cluster.await_ready(START_LIMIT);

    let before = elsewhere.scan();
    // Other tests of this machine may listen to everybody, too: what is meant belongs to these processes.
    let mut own = cluster.pids().into_values().collect::<Vec<_>>();
    own.push(machine.node.id());
    let ours = listening(&own);
    assert!(ours.len() >= 4, "the endpoint, the scheduler and two nodes: {ours:?}");
    let gateway = cluster.address().rsplit(':').next().and_then(|port| port.parse::<u16>().ok());
    assert!(!ours.contains(&gateway.expect("a port")), "the gateway is on loopback alone");
    let mut found = Vec::new();
    for entry in before {
        let at = entry["port"].as_u64().expect("a port") as u16;
        if !ours.contains(&at) {
            continue;
        }
        found.push(at);
        println!("{entry}");
        for said in entry["clear"].as_array().expect("answers").iter().filter_map(Value::as_array) {
            let alert = said.first().is_none_or(|first| *first == u64::from(ALERT)) && said.len() < 16;
            assert!(alert, "port {at} answers in the clear: {entry}");
        }
        // Who has no identity yet gets one at the endpoint, for a token: to everybody it says which version it speaks.
        let most = if at == port { 64 } else { 0 };
        let said = entry["encrypted"].as_u64().expect("a count");
        assert!(said <= most, "port {at} answers who has no identity: {entry}");
    }
    found.sort_unstable();
    assert_eq!(found, ours, "all of them were found");
    let asked = json!({"prompt": "What is 12 + 34?", "max_tokens": 8, "temperature": 0});
    assert_eq!(cluster.post("/v1/completions", &asked).status, 200, "and none was disturbed");
    drop(machine);
}

/// Ports on which these processes listen for others than this machine, in order.
fn listening(pids: &[u32]) -> Vec<u16> {
    let mut sockets = Vec::new();
    for pid in pids {
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            if let Ok(link) = std::fs::read_link(entry.path())
                && let Some(inode) =
                    link.to_string_lossy().strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']'))
            {
                sockets.push(inode.to_owned());
            }
        }
    }
    let mut ports = Vec::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        for line in std::fs::read_to_string(table).unwrap_or_default().lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [_, local, _, state, ..] = fields[..] else { continue };
            let Some((address, port)) = local.split_once(':') else { continue };
            let is_loopback = address == "0100007F" || address.ends_with("01000000") && address.len() == 32;
            if state == "0A"
                && !is_loopback
                && fields.get(9).is_some_and(|inode| sockets.iter().any(|own| own == inode))
            {
                ports.extend(u16::from_str_radix(port, 16));
            }
        }
    }
    ports.sort_unstable();
    ports.dedup();
    ports
}

#[test]
#[ignore = "run by another test, in a namespace of its own"]
fn scanner() {
    let Some(target) = std::env::var(TARGET).ok().and_then(|target| target.parse::<Ipv4Addr>().ok()) else {
        return;
    };
    println!();
    let next = AtomicU32::new(1);
    std::thread::scope(|scope| {
        for _ in 0..SCANNERS {
            scope.spawn(|| {
                loop {
                    let port = next.fetch_add(1, Ordering::Relaxed);
                    let Ok(port) = u16::try_from(port) else { return };
                    let address = SocketAddr::from((target, port));
                    if TcpStream::connect_timeout(&address, CONNECT_LIMIT).is_ok() {
                        println!("found {}", look_at(address));
                    }
                }
            });
        }
    });
}

/// What a port answers to nothing, to HTTP, to this system's own greeting and to noise; and how many bytes it says to who
/// speaks TLS without a certificate.
fn look_at(address: SocketAddr) -> Value {
    let noise: Vec<u8> = (0..4096_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let probes: [&[u8]; 5] = [
        b"",
        b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n",
        b"ASHLAR\0\0\x0f\0\0\0\x01\0\0\0\0\0\0\0",
        &[0; 64],
        &noise,
    ];
    let clear: Vec<Vec<u8>> = probes.iter().map(|probe| in_the_clear(address, probe)).collect();
    json!({"port": address.port(), "clear": clear, "encrypted": encrypted(address, &noise)})
}

fn in_the_clear(address: SocketAddr, probe: &[u8]) -> Vec<u8> {
    let Ok(mut socket) = TcpStream::connect_timeout(&address, CONNECT_LIMIT) else { return Vec::new() };
    let _ = socket.set_read_timeout(Some(ANSWER_LIMIT));
    let _ = socket.write_all(probe);
    said(&mut socket)
}

/// All that comes until it ends, or nothing more comes.
fn said(from: &mut impl Read) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        all.extend_from_slice(&buffer[..read]);
    }
    all
}

/// Bytes of content that are said to somebody without a certificate, who accepts any.
fn encrypted(address: SocketAddr, probe: &[u8]) -> usize {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_no_client_auth();
    let name = ServerName::IpAddress(address.ip().into());
    let mut connection = ClientConnection::new(Arc::new(config), name).expect("a connection");
    let Ok(mut socket) = TcpStream::connect_timeout(&address, CONNECT_LIMIT) else { return 0 };
    let _ = socket.set_read_timeout(Some(ANSWER_LIMIT));
    let mut stream = rustls::Stream::new(&mut connection, &mut socket);
    for part in [probe, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"] {
        let _ = stream.write_all(part);
    }
    said(&mut stream).len()
}

/// Trusts whoever answers.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
