//! Messages between processes, on every plane.

use super::{LARGE, subject};
use crate::mutate::{Corpus, Seed};
use crate::{Memory, Subject, Target};
use anyhow::Result;
use ashlar_identity::{Authority, Identity, Role, Tls, transport};
use ashlar_protocol::data::{DataLink, LinkFaults, LinkHello, PayloadHeader, PayloadKind};
use ashlar_protocol::enrolment::{EnrolmentAnswer, EnrolmentRequest};
use ashlar_protocol::files::{FileAnswer, FileQuestion};
use ashlar_protocol::frame::{self, FrameError, Hello};
use ashlar_protocol::group::{GroupAnswer, GroupDecision, GroupOffer};
use ashlar_protocol::membership::{FromNode, ToNode};
use ashlar_protocol::serving::{FromScheduler, ToScheduler};
use ashlar_protocol::step::{StepPlan, StepResult};
use ashlar_protocol::{admin, responses, training};
use ashlar_vocabulary::{FloatType, ReplicaRevision, StepId};
use serde::de::DeserializeOwned;
use std::io::{self, Cursor, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;

/// A message of one byte per element becomes elements of hundreds.
const MESSAGE_MEMORY: Memory = Memory { fixed: 2 << 20, per_byte: 64 };

pub(super) const MESSAGES: Target = Target {
    name: "messages",
    about: "messages of every plane, decoded",
    memory: MESSAGE_MEMORY,
    open: messages,
};

pub(super) const FRAMES: Target = Target {
    name: "frames",
    about: "greeting and frames of a connection, blocking and not",
    memory: MESSAGE_MEMORY,
    open: frames,
};

pub(super) const ROWS: Target = Target {
    name: "rows",
    about: "payloads between ranks",
    memory: Memory { fixed: 4 << 20, per_byte: 64 },
    open: rows,
};

pub(super) const HANDSHAKE: Target = Target {
    name: "handshake",
    about: "the first bytes of an encrypted connection, from anybody",
    memory: LARGE,
    open: handshake,
};

type Decode = fn(&[u8]) -> bool;

fn decodes<M: DeserializeOwned>(payload: &[u8]) -> bool {
    frame::decode::<M>(payload).is_ok()
}

/// Every type of message that is read from a connection or a stored record.
const TYPES: [Decode; 24] = [
    decodes::<ToScheduler>,
    decodes::<FromScheduler>,
    decodes::<FromNode>,
    decodes::<ToNode>,
    decodes::<StepPlan>,
    decodes::<StepResult>,
    decodes::<LinkHello>,
    decodes::<GroupOffer>,
    decodes::<GroupAnswer>,
    decodes::<GroupDecision>,
    decodes::<FileQuestion>,
    decodes::<FileAnswer>,
    decodes::<EnrolmentRequest>,
    decodes::<EnrolmentAnswer>,
    decodes::<Hello>,
    decodes::<admin::AdminRequest>,
    decodes::<admin::AdminReply>,
    decodes::<admin::JobRecord>,
    decodes::<responses::ResponseRecord>,
    decodes::<training::OpenSession>,
    decodes::<training::TrainingWork>,
    decodes::<training::TrainingReport>,
    decodes::<training::TrainingSettings>,
    decodes::<responses::ResponseCall>,
];

fn messages(_: &Path) -> Result<Subject> {
    // Small numbers are variants, lengths and options alike: each type decodes from some of these.
    let payload = |kind: u8, fill: u8| {
        let mut bytes = vec![kind];
        bytes.extend((0..300_u32).map(|at| if fill < 3 { fill } else { (at * u32::from(fill) % 5) as u8 }));
        Seed::from(bytes)
    };
    let kinds = TYPES.len() as u8;
    let seeds = (0..kinds).flat_map(|kind| (0..8).map(move |fill| payload(kind, fill))).collect();
    let varint = |number: u64| {
        let mut bytes = Vec::new();
        let mut rest = number;
        while rest >= 0x80 {
            bytes.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        bytes.push(rest as u8);
        bytes
    };
    let lengths = [1, 2, 16, 127, 128, 1 << 16, 1 << 20, 1 << 32, u64::MAX - 1, u64::MAX];
    let mut own: Vec<Vec<u8>> = lengths.map(varint).into();
    own.extend((0..20).map(|variant| vec![variant]));
    own.push(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff".to_vec());
    own.push(b"\xc0\x80".to_vec());
    Ok(subject(Corpus { seeds, words: own, ..Corpus::default() }, |input| {
        let Some((kind, payload)) = input.split_first() else { return false };
        TYPES[usize::from(*kind) % TYPES.len()](payload)
    }))
}

/// A connection that says what it is given, and takes anything.
struct Peer<'a>(Cursor<&'a [u8]>);

impl Read for Peer<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        // In pieces, as they come.
        let piece = out.len().min(7);
        self.0.read(&mut out[..piece])
    }
}

impl Write for Peer<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn frames(_: &Path) -> Result<Subject> {
    let hello = frame::encode(&Hello::new("node a"));
    let beat = frame::encode(&ToScheduler::Refused { term: ashlar_vocabulary::LeaseTerm(3) });
    let seeds = vec![Seed::from([hello.clone(), beat.clone(), beat].concat()), Seed::from(hello)];
    let own = vec![
        b"ASHLAR\0\0".to_vec(),
        vec![22, 3, 1],
        vec![21, 3, 3],
        vec![0xff; 4],
        (64_u32 << 20).to_le_bytes().to_vec(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
    ];
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    Ok(subject(
        Corpus { seeds, words: own, repair: Some(repair_frames), ..Corpus::default() },
        move |input| {
            let mut peer = Peer(Cursor::new(input));
            let greeted = frame::greet_blocking(&mut peer, "fuzz").is_ok();
            while frame::read_blocking::<ToScheduler>(&mut peer).is_ok() {}
            runtime.block_on(async {
                // What is written goes nowhere that is read.
                let mut socket = tokio::io::join(input, tokio::io::sink());
                let again = frame::greet(&mut socket, "fuzz").await.is_ok();
                assert_eq!(again, greeted, "one way of reading takes the greeting, the other does not");
                while frame::read::<ToScheduler>(&mut socket).await.is_ok() {}
            });
            greeted
        },
    ))
}

/// The checksum of every frame, as far as lengths lead.
fn repair_frames(bytes: &mut [u8]) {
    let mut at = 0;
    while let Some(head) = bytes.get(at..at + 8) {
        let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let Some(payload) = bytes.get(at + 8..).and_then(|rest| rest.get(..length)) else { return };
        let checksum = crc32fast::hash(payload);
        bytes[at + 4..at + 8].copy_from_slice(&checksum.to_le_bytes());
        at += 8 + length;
    }
}

/// Connections on this machine that have said all they will ever say.
struct Loopback(TcpListener);

impl Loopback {
    fn new() -> io::Result<Loopback> {
        TcpListener::bind("127.0.0.1:0").map(Loopback)
    }

    /// The far end, after the near one has said `bytes`; the near one is given, too, so that it lives on.
    fn saying(&self, bytes: &[u8]) -> io::Result<(TcpStream, TcpStream)> {
        let near = TcpStream::connect(self.0.local_addr()?)?;
        let (far, _) = self.0.accept()?;
        // Nothing reads meanwhile: more than the buffers hold is not sent.
        let _ = (&near).write(bytes.get(..64 << 10).unwrap_or(bytes))?;
        near.shutdown(std::net::Shutdown::Write)?;
        Ok((near, far))
    }
}

/// What the far end of a rank's connection expects.
const EXPECTED: (PayloadKind, ReplicaRevision) =
    (PayloadKind::Activations(FloatType::F32), ReplicaRevision(1));

fn rows(_: &Path) -> Result<Subject> {
    let loopback = Loopback::new()?;
    let header = PayloadHeader { kind: EXPECTED.0, revision: EXPECTED.1, step: StepId(3), sequence: 0 };
    let (near, mut far) = loopback.saying(&[])?;
    let mut link = DataLink::new(far.try_clone()?, LinkFaults::default())?;
    link.send(header, &[1.0; 8])?;
    link.send(PayloadHeader { sequence: 1, ..header }, &[2.0; 4])?;
    drop(link);
    far.flush()?;
    far.shutdown(std::net::Shutdown::Write)?;
    let mut sent = Vec::new();
    (&near).read_to_end(&mut sent)?;
    let own = vec![(1_u64 << 30).to_le_bytes().to_vec(), u64::MAX.to_le_bytes().to_vec(), vec![0; 8]];
    let corpus =
        Corpus { seeds: vec![Seed::from(sent)], words: own, repair: Some(repair_rows), ..Corpus::default() };
    Ok(subject(corpus, move |input| {
        let Ok((_near, far)) = loopback.saying(input) else { return false };
        let _ = rustix_linger(&far);
        let Ok(mut link) = DataLink::new(far, LinkFaults::default()) else { return false };
        let mut values = Vec::new();
        let mut idle = || Err(FrameError::Closed);
        let mut count = 0;
        while link.receive_any(EXPECTED, (4, 64), &mut values, &mut idle).is_ok() {
            count += 1;
        }
        count > 0
    }))
}

/// Ends a connection at once when it is closed: thousands a second would use up all ports.
fn rustix_linger(socket: &TcpStream) -> io::Result<()> {
    Ok(rustix::net::sockopt::set_socket_linger(socket, Some(std::time::Duration::ZERO))?)
}

/// Checksums of headers and of payloads that are all there.
fn repair_rows(bytes: &mut [u8]) {
    let mut at = 0;
    while bytes.len() >= at + 48 {
        let mut length = [0; 8];
        length.copy_from_slice(&bytes[at + 28..at + 36]);
        let end =
            usize::try_from(u64::from_le_bytes(length)).ok().and_then(|length| length.checked_add(at + 48));
        let payload = end.and_then(|end| bytes.get(at + 48..end)).map(crc32fast::hash);
        if let Some(checksum) = payload {
            bytes[at + 36..at + 40].copy_from_slice(&checksum.to_le_bytes());
        }
        let checksum = crc32fast::hash(&bytes[at..at + 40]);
        bytes[at + 40..at + 44].copy_from_slice(&checksum.to_le_bytes());
        match (payload, end) {
            (Some(_), Some(end)) => at = end,
            _ => return,
        }
    }
}

fn handshake(directory: &Path) -> Result<Subject> {
    let authority = Authority::open_or_create(&directory.join("ca"))?;
    let tls = Tls::new(&authority.credentials(&Identity::new(Role::Enrolment, "a")?)?)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // What a client says first, as it says it.
    let cluster = tls.cluster();
    let seed = runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let client = tokio::net::TcpStream::connect(listener.local_addr()?).await?;
        let (mut server, _) = listener.accept().await?;
        let connecting = tokio::spawn(transport::connect_to_enrol(client, cluster));
        let mut first = vec![0; 4096];
        let count = tokio::io::AsyncReadExt::read(&mut server, &mut first).await?;
        first.truncate(count);
        connecting.abort();
        io::Result::Ok(first)
    })?;
    let own = vec![
        vec![22, 3, 1],
        vec![22, 3, 3],
        vec![21, 3, 3, 0, 2, 1, 0],
        vec![20, 3, 3, 0, 1, 1],
        vec![23, 3, 3, 0xff, 0xff],
        vec![0, 43],
        vec![0, 51],
        vec![0xff, 0xff],
    ];
    let loopback = Loopback::new()?;
    Ok(subject(Corpus { seeds: vec![Seed::from(seed)], words: own, ..Corpus::default() }, move |input| {
        let Ok((near, far)) = loopback.saying(input) else { return false };
        let _ = rustix_linger(&far);
        runtime.block_on(async {
            if far.set_nonblocking(true).is_err() {
                return false;
            }
            let Ok(far) = tokio::net::TcpStream::from_std(far) else { return false };
            // Never whole: the client's keys are not here. An answer shows that its greeting was understood.
            let _ = transport::accept_anybody(&tls, far).await;
            let mut answer = [0; 1];
            matches!((&near).read(&mut answer), Ok(1)) && answer[0] == 22
        })
    }))
}
