//! Framing: `length u32 | crc32 u32 | payload`, little-endian, preceded once per connection by a [`Hello`].

use crate::WIRE_VERSION;
use ashlar_identity::TlsError;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use socket2::{SockRef, TcpKeepalive};
use std::io::{self, Read, Write};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest control-plane payload in bytes; a longer announced length is refused before allocation.
pub const FRAME_BYTES_MAX: usize = 64 << 20;
/// A peer whose machine does not answer for this long is gone.
pub const VANISHED_AFTER: Duration = Duration::from_secs(8);
const HEADER_BYTES: usize = 8;
/// Longest greeting: it comes from anybody.
const GREETING_BYTES_MAX: usize = 512;

/// What can go wrong between two roles on a socket.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The other side closed the connection between frames.
    #[error("connection closed by the peer")]
    Closed,
    /// The socket failed.
    #[error("connection failed: {0}")]
    Io(#[from] io::Error),
    /// The announced length exceeds the cap.
    #[error("refused a frame of {announced} bytes: that is too long")]
    TooLong {
        /// What the peer announced.
        announced: usize,
    },
    /// The payload does not match its checksum.
    #[error("frame checksum mismatch: reconnect and replay")]
    Corrupt,
    /// The payload does not decode as the expected message.
    #[error("undecodable message: {0}")]
    Decode(postcard::Error),
    /// The peer speaks another wire version.
    #[error("peer speaks wire version {theirs}, this process {ours}: run the same release on both sides")]
    Version {
        /// This process's version.
        ours: u32,
        /// The peer's version.
        theirs: u32,
    },
    /// The first frame was not a [`Hello`].
    #[error("peer is not an ashlar process (bad greeting)")]
    NotAshlar,
    /// The connection is not encrypted as it should be, or the peer is not who belongs there.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The peer has said why it does not serve this process.
    #[error("{0}")]
    Refused(String),
    /// The peer encrypts, this process does not.
    #[error(
        "the peer speaks TLS, this process has no identity: let this machine join with `ashlar node --join`, or set `identity`"
    )]
    PeerSpeaksTls,
}

impl FrameError {
    /// Whether the other side has just gone away, as health checks and port scanners do: nothing to tell an operator before it has
    /// said who it is.
    pub fn is_departure(&self) -> bool {
        match self {
            FrameError::Closed => true,
            FrameError::Io(error) | FrameError::Tls(TlsError::Io(error)) => matches!(
                error.kind(),
                io::ErrorKind::UnexpectedEof
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::BrokenPipe
            ),
            _ => false,
        }
    }
}

/// First frame of every connection, in both directions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    magic: [u8; 8],
    /// The sender's [`WIRE_VERSION`].
    pub wire_version: u32,
    /// Which role speaks, for logs (`gateway`, `node a`…).
    pub speaker: String,
}

impl Hello {
    /// A greeting by `speaker` in this build's version.
    pub fn new(speaker: impl Into<String>) -> Hello {
        Hello { magic: *b"ASHLAR\0\0", wire_version: WIRE_VERSION, speaker: speaker.into() }
    }

    /// Accepts only the same wire version.
    pub fn check(self) -> Result<Hello, FrameError> {
        if self.magic != *b"ASHLAR\0\0" {
            return Err(FrameError::NotAshlar);
        }
        if self.wire_version != WIRE_VERSION {
            return Err(FrameError::Version { ours: WIRE_VERSION, theirs: self.wire_version });
        }
        Ok(self)
    }
}

/// Encodes `message` with its header.
pub fn encode<M: Serialize>(message: &M) -> Vec<u8> {
    let mut frame = vec![0u8; HEADER_BYTES];
    frame = postcard::to_extend(message, frame).unwrap_or_default();
    debug_assert!(frame.len() >= HEADER_BYTES, "messages are plain data and always encode");
    let payload_len = frame.len().saturating_sub(HEADER_BYTES) as u32;
    let checksum = crc32fast::hash(&frame[HEADER_BYTES..]);
    frame[..4].copy_from_slice(&payload_len.to_le_bytes());
    frame[4..8].copy_from_slice(&checksum.to_le_bytes());
    frame
}

/// Decodes a payload (without header) whose checksum has been verified.
pub fn decode<M: DeserializeOwned>(payload: &[u8]) -> Result<M, FrameError> {
    postcard::from_bytes(payload).map_err(FrameError::Decode)
}

fn parse_header(header: [u8; HEADER_BYTES], bytes_max: usize) -> Result<(usize, u32), FrameError> {
    let [a, b, c, d, e, f, g, h] = header;
    let announced = u32::from_le_bytes([a, b, c, d]) as usize;
    if announced > bytes_max {
        return Err(FrameError::TooLong { announced });
    }
    Ok((announced, u32::from_le_bytes([e, f, g, h])))
}

fn verified<M: DeserializeOwned>(payload: &[u8], checksum: u32) -> Result<M, FrameError> {
    if crc32fast::hash(payload) != checksum {
        return Err(FrameError::Corrupt);
    }
    decode(payload)
}

/// Reads one message from an asynchronous socket. Not cancellation-safe: own the socket in one task.
pub async fn read<M: DeserializeOwned>(socket: &mut (impl AsyncRead + Unpin)) -> Result<M, FrameError> {
    read_within(socket, FRAME_BYTES_MAX).await
}

/// [`read`], of a payload of at most `bytes_max`: for peers whom nobody knows yet.
pub async fn read_within<M: DeserializeOwned>(
    socket: &mut (impl AsyncRead + Unpin),
    bytes_max: usize,
) -> Result<M, FrameError> {
    let mut header = [0u8; HEADER_BYTES];
    if socket.read(&mut header[..1]).await? == 0 {
        return Err(FrameError::Closed);
    }
    socket.read_exact(&mut header[1..]).await?;
    let (length, checksum) = parse_header(header, bytes_max)?;
    // Grow with what really arrives, not with what was announced.
    let mut payload = Vec::with_capacity(length.min(64 << 10));
    let received = (&mut *socket).take(length as u64).read_to_end(&mut payload).await?;
    if received < length {
        return Err(FrameError::Io(io::ErrorKind::UnexpectedEof.into()));
    }
    verified(&payload, checksum)
}

/// Writes one message to an asynchronous socket.
pub async fn write<M: Serialize>(
    socket: &mut (impl AsyncWrite + Unpin),
    message: &M,
) -> Result<(), FrameError> {
    socket.write_all(&encode(message)).await?;
    socket.flush().await?;
    Ok(())
}

/// Prepares a connection for small messages that must not wait, and for a peer whose machine vanishes: without an answer
/// for about [`VANISHED_AFTER`] the connection ends with an error, also while neither side has anything to say.
pub fn tune<'a>(socket: impl Into<SockRef<'a>>) -> io::Result<()> {
    let socket = socket.into();
    socket.set_tcp_nodelay(true)?;
    let interval = VANISHED_AFTER / 4;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(interval).with_interval(interval).with_retries(3))
}

/// Exchanges [`Hello`]s on a fresh asynchronous connection and returns the peer's.
pub async fn greet(
    socket: &mut (impl AsyncRead + AsyncWrite + Unpin),
    speaker: &str,
) -> Result<Hello, FrameError> {
    write(socket, &Hello::new(speaker)).await?;
    let mut first = [0; HEADER_BYTES];
    let mut count = 0;
    while count < HEADER_BYTES {
        match socket.read(&mut first[count..]).await? {
            0 => return Err(cut_off(&first[..count])),
            more => count += more,
        }
    }
    let mut greeting = AsyncReadExt::chain(&first[..], socket);
    hear(first, read_within(&mut greeting, GREETING_BYTES_MAX).await)
}

/// What a greeting comes to whose header is `first`.
fn hear(first: [u8; HEADER_BYTES], greeting: Result<Hello, FrameError>) -> Result<Hello, FrameError> {
    match greeting {
        Ok(hello) => hello.check(),
        Err(FrameError::Decode(_) | FrameError::TooLong { .. } | FrameError::Corrupt) => {
            Err(if is_tls(&first) { FrameError::PeerSpeaksTls } else { FrameError::NotAshlar })
        }
        Err(other) => Err(other),
    }
}

/// A connection that ended within the header of a greeting.
fn cut_off(header: &[u8]) -> FrameError {
    match header {
        [] => FrameError::Closed,
        // An alert is shorter than a header.
        header if is_tls(header) => FrameError::PeerSpeaksTls,
        _ => FrameError::Io(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Whether a record of TLS begins like this: an alert or a handshake. Taken for a length, it is longer than any greeting.
fn is_tls(header: &[u8]) -> bool {
    matches!(header, [21 | 22, 3, 0..=4, ..])
}

/// Reads one message from a blocking socket.
pub fn read_blocking<M: DeserializeOwned>(socket: &mut impl Read) -> Result<M, FrameError> {
    read_blocking_within(socket, FRAME_BYTES_MAX)
}

/// [`read_blocking`], of a payload of at most `bytes_max`.
pub fn read_blocking_within<M: DeserializeOwned>(
    socket: &mut impl Read,
    bytes_max: usize,
) -> Result<M, FrameError> {
    let mut header = [0u8; HEADER_BYTES];
    if socket.read(&mut header[..1])? == 0 {
        return Err(FrameError::Closed);
    }
    socket.read_exact(&mut header[1..])?;
    let (length, checksum) = parse_header(header, bytes_max)?;
    let mut payload = Vec::with_capacity(length.min(64 << 10));
    if socket.take(length as u64).read_to_end(&mut payload)? < length {
        return Err(FrameError::Io(io::ErrorKind::UnexpectedEof.into()));
    }
    verified(&payload, checksum)
}

/// Writes one message to a blocking socket.
pub fn write_blocking<M: Serialize>(socket: &mut impl Write, message: &M) -> Result<(), FrameError> {
    socket.write_all(&encode(message))?;
    socket.flush()?;
    Ok(())
}

/// Exchanges [`Hello`]s on a fresh blocking connection and returns the peer's.
pub fn greet_blocking(socket: &mut (impl Read + Write), speaker: &str) -> Result<Hello, FrameError> {
    write_blocking(socket, &Hello::new(speaker))?;
    let mut first = [0; HEADER_BYTES];
    let mut count = 0;
    while count < HEADER_BYTES {
        match socket.read(&mut first[count..])? {
            0 => return Err(cut_off(&first[..count])),
            more => count += more,
        }
    }
    let mut greeting = Read::chain(&first[..], socket);
    hear(first, read_blocking_within(&mut greeting, GREETING_BYTES_MAX))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn another_wire_version_is_refused_naming_both() {
        let mut hello = Hello::new("test");
        hello.wire_version = 999;
        let text = hello.check().unwrap_err().to_string();
        assert!(text.contains("999") && text.contains(&WIRE_VERSION.to_string()), "{text}");
    }

    #[test]
    fn an_absurd_length_is_refused_before_allocation() {
        let mut frame = encode(&"hello");
        frame[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(read_blocking::<String>(&mut frame.as_slice()), Err(FrameError::TooLong { .. })));
    }

    proptest! {
        #[test]
        fn a_flipped_bit_or_a_cut_never_yields_a_message(text in ".{0,40}", at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let frame = encode(&text);
            prop_assert_eq!(read_blocking::<String>(&mut frame.as_slice()).unwrap(), text);
            let cut = at.index(frame.len());
            prop_assert!(read_blocking::<String>(&mut &frame[..cut]).is_err());
            let mut flipped = frame.clone();
            flipped[cut] ^= 1 << bit;
            prop_assert!(read_blocking::<String>(&mut flipped.as_slice()).is_err());
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<crate::step::StepPlan>(&bytes);
            let _ = decode::<crate::serving::ToScheduler>(&bytes);
            let _ = decode::<crate::membership::FromNode>(&bytes);
            let _ = read_blocking::<crate::membership::ToNode>(&mut bytes.as_slice());
        }
    }
}
