//! Handshakes and data over real sockets: who is let in, what is said to who is not, and that nothing waits that need not.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_identity::{
    Authority, Credentials, Identity, Role, Socket, Stream, Tls, TlsError, Transport, transport,
};
use std::io::{IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const LIMIT: Duration = Duration::from_secs(20);

struct Cluster {
    _folder: TempDir,
    authority: Authority,
}

impl Cluster {
    fn new() -> Cluster {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::open_or_create(&folder.path().join("ca")).unwrap();
        Cluster { _folder: folder, authority }
    }

    fn credentials(&self, role: Role, name: &str) -> Credentials {
        self.authority.credentials(&Identity::new(role, name).unwrap()).unwrap()
    }

    fn tls(&self, role: Role, name: &str) -> Tls {
        Tls::new(&self.credentials(role, name)).unwrap()
    }

    fn transport(&self, role: Role, name: &str) -> Transport {
        Transport::Encrypted(self.tls(role, name))
    }
}

fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let out = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (out, listener.accept().unwrap().0)
}

/// What a client and a server that each expect a role come to.
fn meet(
    client: &Transport,
    of_server: Role,
    server: &Transport,
    of_client: Role,
) -> (Result<Socket, TlsError>, Result<Socket, TlsError>) {
    let (out, inward) = tcp_pair();
    std::thread::scope(|scope| {
        let connecting = scope.spawn(move || client.connect_blocking(out, of_server, LIMIT));
        let accepted = server.accept_blocking(inward, of_client, LIMIT);
        (connecting.join().unwrap(), accepted)
    })
}

fn nodes() -> (Socket, Socket) {
    let cluster = Cluster::new();
    let (a, b) = (cluster.transport(Role::Node, "a"), cluster.transport(Role::Node, "b"));
    let (out, inward) = meet(&a, Role::Node, &b, Role::Node);
    (out.unwrap(), inward.unwrap())
}

fn numbers(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    (0..length).map(|_| next()).collect()
}

#[test]
fn both_sides_know_each_other_and_bytes_arrive_as_they_were_sent() {
    let (mut out, mut inward) = nodes();
    assert_eq!(out.peer().unwrap().to_string(), "node b");
    assert_eq!(inward.peer().unwrap().to_string(), "node a");
    for (seed, length) in [(1, 1), (2, 48), (3, 16 << 10), (4, (16 << 10) + 1), (5, 300_000)] {
        let bytes = numbers(seed, length);
        let (head, rest) = bytes.split_at(length / 3);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut written = 0;
                while written < length {
                    let from = written.min(head.len());
                    let parts = [IoSlice::new(&head[from..]), IoSlice::new(&rest[written - from..])];
                    written += out.write_vectored(&parts).unwrap();
                }
            });
            let mut read = vec![0; length];
            // Small pieces first: a record is taken in several.
            let (first, others) = read.split_at_mut(length.min(7));
            inward.read_exact(first).unwrap();
            inward.read_exact(others).unwrap();
            assert!(read == bytes, "{length}");
        });
    }
    out.shutdown().unwrap();
    assert_eq!(inward.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_read_that_waits_never_holds_up_a_write() {
    let (out, mut inward) = nodes();
    let mut waiting = out.try_clone().unwrap();
    let mut writing = out;
    let bytes = numbers(9, 4 << 20);
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let mut answer = [0; 5];
            waiting.read_exact(&mut answer).unwrap();
            answer
        });
        scope.spawn(|| writing.write_all(&bytes).unwrap());
        let mut read = vec![0; bytes.len()];
        inward.read_exact(&mut read).unwrap();
        assert!(read == bytes);
        // Only now there is something to read.
        inward.write_all(b"there").unwrap();
        assert_eq!(&reader.join().unwrap(), b"there");
    });
}

#[test]
fn both_directions_go_on_at_once() {
    let (out, inward) = nodes();
    let bytes = [numbers(11, 3 << 20), numbers(12, 3 << 20)];
    std::thread::scope(|scope| {
        for (end, own, theirs) in [(&out, &bytes[0], &bytes[1]), (&inward, &bytes[1], &bytes[0])] {
            let (mut reading, mut writing) = (end.try_clone().unwrap(), end.try_clone().unwrap());
            scope.spawn(move || own.chunks(10_007).for_each(|piece| writing.write_all(piece).unwrap()));
            scope.spawn(move || {
                let mut read = vec![0; theirs.len()];
                read.chunks_mut(4_099).for_each(|piece| reading.read_exact(piece).unwrap());
                assert!(&read == theirs);
            });
        }
    });
}

#[test]
fn a_read_gives_up_after_its_time_and_goes_on_where_it_was() {
    let (mut out, mut inward) = nodes();
    inward.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
    let error = inward.read(&mut [0; 4]).unwrap_err();
    assert!(matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut), "{error}");
    out.write_all(b"data").unwrap();
    inward.set_read_timeout(None).unwrap();
    let mut read = [0; 2];
    inward.read_exact(&mut read).unwrap();
    assert!(inward.has_buffered(), "half of it has not been asked for");
    inward.read_exact(&mut read).unwrap();
    assert_eq!((&read, inward.has_buffered()), (b"ta", false));
}

#[test]
fn a_changed_bit_ends_the_connection() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.transport(Role::Node, "a"), cluster.transport(Role::Node, "b"));
    let ((out, mut middle_in), (mut middle_out, inward)) = (tcp_pair(), tcp_pair());
    let (mut back_in, mut back_out) = (middle_out.try_clone().unwrap(), middle_in.try_clone().unwrap());
    std::thread::spawn(move || std::io::copy(&mut back_in, &mut back_out));
    let (armed, arm) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = middle_in.read(&mut buffer) {
            if arm.try_recv().is_ok() {
                buffer[count - 1] ^= 1;
            }
            middle_out.write_all(&buffer[..count]).unwrap();
        }
    });
    let (mut out, mut inward) = std::thread::scope(|scope| {
        let connecting = scope.spawn(|| a.connect_blocking(out, Role::Node, LIMIT).unwrap());
        (b.accept_blocking(inward, Role::Node, LIMIT).unwrap(), connecting.join().unwrap())
    });
    std::mem::swap(&mut out, &mut inward);
    out.write_all(b"first").unwrap();
    inward.read_exact(&mut [0; 5]).unwrap();
    armed.send(()).unwrap();
    out.write_all(b"second").unwrap();
    let error = inward.read(&mut [0; 8]).unwrap_err().to_string();
    assert!(error.contains("changed on its way"), "{error}");
}

#[test]
fn a_certificate_of_another_cluster_is_refused_by_both_sides() {
    let (ours, theirs) = (Cluster::new(), Cluster::new());
    let (a, b) = (ours.transport(Role::Node, "a"), theirs.transport(Role::Node, "b"));
    let (client, server) = meet(&a, Role::Node, &b, Role::Node);
    let error = client.unwrap_err();
    assert!(matches!(error, TlsError::Stranger), "{error}");
    assert!(error.to_string().contains("another cluster"), "{error}");
    let error = server.unwrap_err();
    assert!(matches!(error, TlsError::RefusedUs(_)), "{error}");
}

#[test]
fn a_node_cannot_speak_as_a_gateway_nor_lead_as_a_scheduler() {
    let cluster = Cluster::new();
    let node = cluster.transport(Role::Node, "a");
    let scheduler = cluster.transport(Role::Scheduler, "s");
    let (_, server) = meet(&node, Role::Scheduler, &scheduler, Role::Gateway);
    let error = server.unwrap_err().to_string();
    assert!(error.contains("node a") && error.contains("gateway"), "{error}");
    let (client, _) = meet(&node, Role::Scheduler, &node, Role::Node);
    let error = client.unwrap_err().to_string();
    assert!(error.contains("node a") && error.contains("scheduler"), "{error}");
}

#[test]
fn who_speaks_in_the_clear_or_nothing_at_all_is_turned_away_in_time() {
    let node = Cluster::new().transport(Role::Node, "a");
    let (mut out, inward) = tcp_pair();
    out.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let error = node.accept_blocking(inward, Role::Node, LIMIT).unwrap_err();
    assert!(matches!(error, TlsError::NotTls), "{error}");
    assert!(error.to_string().contains("identity"), "{error}");
    // A byte now and then does not keep a place for ever.
    let (mut out, inward) = tcp_pair();
    let dripping = std::thread::spawn(move || {
        for byte in [22, 3, 3, 1, 0].into_iter().cycle() {
            std::thread::sleep(Duration::from_millis(20));
            if out.write_all(&[byte]).is_err() {
                return;
            }
        }
    });
    let started = Instant::now();
    assert!(node.accept_blocking(inward, Role::Node, Duration::from_millis(200)).is_err());
    assert!(started.elapsed() < LIMIT);
    dripping.join().unwrap();
}

async fn async_pair() -> (tokio::net::TcpStream, tokio::net::TcpStream) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let out = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (out, listener.accept().await.unwrap().0)
}

#[tokio::test]
async fn asynchronous_connections_are_mutual_and_end_cleanly() {
    let cluster = Cluster::new();
    let (gateway, scheduler) =
        (cluster.transport(Role::Gateway, "g"), cluster.transport(Role::Scheduler, "s"));
    for (gateway, scheduler, known) in
        [(&gateway, &scheduler, true), (&Transport::Plain, &Transport::Plain, false)]
    {
        let (out, inward) = async_pair().await;
        let (client, server) =
            tokio::join!(gateway.connect(out, Role::Scheduler), scheduler.accept(inward, Role::Gateway));
        let (client, server) = (client.unwrap(), server.unwrap());
        assert_eq!(server.peer().map(ToString::to_string), known.then(|| "gateway g".to_owned()));
        let (mut read, mut write) = client.into_split();
        let (mut their_read, mut their_write) = server.into_split();
        let bytes = numbers(3, 200_000);
        let sending = async {
            write.write_all(&bytes).await.unwrap();
            write.shutdown().await.unwrap();
        };
        let mut received = Vec::new();
        let (_, all) = tokio::join!(sending, their_read.read_to_end(&mut received));
        all.unwrap();
        assert!(received == bytes);
        // A process that is killed says no goodbye: that is an end, too.
        their_write.write_all(b"bye").await.unwrap();
        their_write.flush().await.unwrap();
        drop((their_read, their_write));
        let mut last = Vec::new();
        read.read_to_end(&mut last).await.unwrap();
        assert_eq!(last, b"bye");
    }
}

/// A client that trusts this cluster and enrols, and the endpoint as `credentials` make it.
async fn enrolling(
    cluster: &Cluster,
    endpoint: &Tls,
) -> (Result<Stream, TlsError>, Result<Stream, TlsError>) {
    let (out, inward) = async_pair().await;
    tokio::join!(
        transport::connect_to_enrol(out, cluster.authority.fingerprint()),
        transport::accept_anybody(endpoint, inward)
    )
}

#[tokio::test]
async fn a_machine_that_enrols_speaks_to_the_endpoint_of_its_tokens_cluster_alone() {
    let (ours, theirs) = (Cluster::new(), Cluster::new());
    let (client, server) = enrolling(&ours, &ours.tls(Role::Enrolment, "e")).await;
    assert_eq!(client.unwrap().peer().unwrap().role(), Role::Enrolment);
    assert!(server.unwrap().peer().is_none());
    let (client, _) = enrolling(&ours, &theirs.tls(Role::Enrolment, "e")).await;
    assert!(matches!(client.unwrap_err(), TlsError::Stranger));
    // A node of the same cluster could collect tokens.
    let (client, _) = enrolling(&ours, &ours.tls(Role::Node, "e")).await;
    assert!(client.is_err());
    // And one that shows the right authority, but a certificate of its own.
    let mixed = Credentials::new(
        ours.authority.certificate().to_vec(),
        theirs.credentials(Role::Enrolment, "e").certificate.to_vec(),
        Vec::new(),
    );
    assert!(Tls::new(&mixed).is_err(), "without the key there is nothing to show");
}

#[tokio::test]
async fn who_has_no_certificate_is_not_listened_to() {
    let cluster = Cluster::new();
    let node = cluster.transport(Role::Node, "a");
    let (out, inward) = async_pair().await;
    let enrolling = transport::connect_to_enrol(out, cluster.authority.fingerprint());
    let (_, server) = tokio::join!(enrolling, node.accept(inward, Role::Node));
    let error = server.unwrap_err();
    // The client ends the handshake first: a node is no enrolment endpoint.
    assert!(
        matches!(error, TlsError::NoCertificate | TlsError::Other(_) | TlsError::RefusedUs(_)),
        "{error}"
    );
}

#[test]
fn only_loopback_is_listened_on_in_the_clear() {
    let node = Cluster::new().transport(Role::Node, "a");
    let (here, everywhere) = ("127.0.0.1:1".parse().unwrap(), "0.0.0.0:1".parse().unwrap());
    assert!(Transport::Plain.check_listening(here, false).is_ok());
    assert!(Transport::Plain.check_listening(everywhere, true).is_ok());
    assert!(node.check_listening(everywhere, false).is_ok());
    let error = Transport::Plain.check_listening(everywhere, false).unwrap_err().to_string();
    assert!(
        error.contains("--join") && error.contains("identity") && error.contains("allow_plaintext"),
        "{error}"
    );
}

/// Until it does; meanwhile `a` and `b` always understand each other.
#[track_caller]
fn eventually(a: &Transport, b: &Transport, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < LIMIT, "not within {LIMIT:?}");
        let (out, inward) = meet(a, Role::Node, b, Role::Node);
        out.unwrap();
        inward.unwrap();
    }
}

#[test]
fn another_authority_takes_over_while_processes_go_on() {
    let (old, new) = (Cluster::new(), Cluster::new());
    let folder = tempfile::tempdir().unwrap();
    let save = |by: &Cluster, trusting: Option<&Cluster>, name: &str| {
        let mut credentials = by.credentials(Role::Node, name);
        credentials.other_authority = trusting.map(|other| other.authority.certificate().clone());
        credentials.save(&folder.path().join(name)).unwrap();
    };
    for name in ["a", "b"] {
        save(&old, None, name);
    }
    let [a, b] = ["a", "b"].map(|name| Transport::open(Some(&folder.path().join(name))).unwrap());
    // They trust both, and are made by one.
    let trusting = |by: &Cluster, other: &Cluster| {
        let mut credentials = by.credentials(Role::Node, "c");
        credentials.other_authority = Some(other.authority.certificate().clone());
        Transport::Encrypted(Tls::new(&credentials).unwrap())
    };
    let (of_old, of_new) = (trusting(&old, &new), trusting(&new, &old));
    let only_new = new.transport(Role::Node, "c");
    let lets_in = |at: &Transport, who: &Transport| meet(who, Role::Node, at, Role::Node).1.is_ok();
    assert!(lets_in(&a, &of_old) && !lets_in(&a, &of_new));

    for name in ["a", "b"] {
        save(&old, Some(&new), name);
        let at = if name == "a" { &a } else { &b };
        eventually(&a, &b, || lets_in(at, &of_new));
        assert!(lets_in(at, &of_old));
    }
    // The others are told of the new authority: now its identities can be used.
    for name in ["a", "b"] {
        save(&new, Some(&old), name);
    }
    for at in [&a, &b] {
        eventually(&a, &b, || meet(&only_new, Role::Node, at, Role::Node).0.is_ok());
        assert!(lets_in(at, &of_new));
    }
    for name in ["a", "b"] {
        save(&new, None, name);
        let at = if name == "a" { &a } else { &b };
        eventually(&a, &b, || !lets_in(at, &of_old));
        assert!(lets_in(at, &of_new));
    }

    // What cannot be used does not count, and neither does what is somebody else's.
    let place = folder.path().join("a");
    std::fs::write(place.join("certificate.der"), b"nothing").unwrap();
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(2500) {
        assert!(lets_in(&a, &of_new));
    }
    new.credentials(Role::Node, "d").save(&place).unwrap();
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(2500) {
        let (out, _) = meet(&of_new, Role::Node, &a, Role::Node);
        assert_eq!(out.unwrap().peer().unwrap().to_string(), "node a");
    }
}
