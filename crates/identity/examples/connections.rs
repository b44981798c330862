//! What encryption costs on a blocking connection over loopback: `cargo run --release -p ashlar-identity --example connections`.
#![allow(clippy::unwrap_used)]

use ashlar_identity::{Authority, Identity, Role, Socket, Tls, Transport};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(5);
const PIECE: usize = 256 << 10;
const PIECES: usize = 4_000;
const ROUNDS: u32 = 20_000;

fn pair(transport: &Transport) -> (Socket, Socket) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let out = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (inward, _) = listener.accept().unwrap();
    out.set_nodelay(true).unwrap();
    inward.set_nodelay(true).unwrap();
    std::thread::scope(|scope| {
        let connecting = scope.spawn(|| transport.connect_blocking(out, Role::Node, LIMIT).unwrap());
        let accepted = transport.accept_blocking(inward, Role::Node, LIMIT).unwrap();
        (connecting.join().unwrap(), accepted)
    })
}

fn main() {
    let folder = std::env::temp_dir().join(format!("ashlar-connections-{}", std::process::id()));
    let authority = Authority::open_or_create(&folder).unwrap();
    let node = authority.credentials(&Identity::new(Role::Node, "a").unwrap()).unwrap();
    let encrypted = Transport::Encrypted(Tls::new(&node).unwrap());
    for (name, transport) in [("plain", Transport::Plain), ("encrypted", encrypted)] {
        let (mut out, mut inward) = pair(&transport);
        let started = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let piece = vec![7; PIECE];
                (0..PIECES).for_each(|_| out.write_all(&piece).unwrap());
            });
            let mut piece = vec![0; PIECE];
            (0..PIECES).for_each(|_| inward.read_exact(&mut piece).unwrap());
        });
        let rate = (PIECE * PIECES) as f64 / started.elapsed().as_secs_f64() / 1e9;
        let started = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut message = [0; 4096];
                for _ in 0..ROUNDS {
                    inward.read_exact(&mut message).unwrap();
                    inward.write_all(&message).unwrap();
                }
            });
            let mut message = [1; 4096];
            for _ in 0..ROUNDS {
                out.write_all(&message).unwrap();
                out.read_exact(&mut message).unwrap();
            }
        });
        let round = started.elapsed().as_secs_f64() / f64::from(ROUNDS) * 1e6;
        println!("{name:<10} {rate:.2} GB/s one way, {round:.1} µs for 4 KiB there and back");
    }
    std::fs::remove_dir_all(folder).unwrap();
}
