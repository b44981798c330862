//! Encrypted records over a blocking connection, in two halves that share nothing: one thread may wait in a read while another
//! writes, and neither waits for the other.
//!
//! rustls makes the handshake, and afterwards hands out the keys of both directions; its own ciphers protect the records here, too, so
//! that all that is left to do is counting them. Nothing but data follows a handshake: no tickets are issued, and the cipher needs no new
//! keys, so that anything else ends the connection. Bytes are copied once on their way out, into the record, and once on their way
//! in, out of it.

use crate::tls::TlsError;
use rustls::crypto::cipher::{
    InboundOpaqueMessage, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundPlainMessage,
};
use rustls::crypto::ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256;
use rustls::{
    AlertDescription, Connection, ConnectionTrafficSecrets, ContentType, Error, ExtractedSecrets,
    ProtocolVersion,
};
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

const HEADER_BYTES: usize = 5;
/// Most data in a record.
const PLAIN_BYTES_MAX: usize = 16 << 10;
/// Most that a record may announce (RFC 8446, section 5.2).
const SEALED_BYTES_MAX: usize = PLAIN_BYTES_MAX + 256;
/// Records that go out in one write.
const RECORDS_PER_WRITE: usize = 4;
/// What is read at once.
const READ_BYTES: usize = 4 * (HEADER_BYTES + SEALED_BYTES_MAX);

/// Both directions of a connection after its handshake.
pub(crate) struct Records {
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Outgoing>,
}

impl std::fmt::Debug for Records {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Records")
    }
}

/// Completes a handshake until `deadline`. Reads a record at a time, so that nothing that follows is taken.
pub(crate) fn handshake(
    connection: &mut Connection,
    tcp: &mut TcpStream,
    deadline: Instant,
) -> Result<(), TlsError> {
    let mut record = Vec::new();
    loop {
        while connection.wants_write() {
            connection.write_tls(tcp)?;
        }
        if !connection.is_handshaking() {
            return Ok(());
        }
        read_record(tcp, &mut record, deadline)?;
        let mut rest = record.as_slice();
        while !rest.is_empty() {
            connection.read_tls(&mut rest)?;
            if let Err(error) = connection.process_new_packets() {
                // So that the other side hears why, if it still listens.
                let _ = connection.write_tls(tcp);
                return Err(error.into());
            }
        }
    }
}

fn read_record(tcp: &mut TcpStream, record: &mut Vec<u8>, deadline: Instant) -> Result<(), TlsError> {
    record.clear();
    record.resize(HEADER_BYTES, 0);
    read_until(tcp, record, deadline)?;
    let length = usize::from(u16::from_be_bytes([record[3], record[4]]));
    if !(20..=23).contains(&record[0]) || record[1] != 3 || length > SEALED_BYTES_MAX {
        return Err(TlsError::NotTls);
    }
    record.resize(HEADER_BYTES + length, 0);
    read_until(tcp, &mut record[HEADER_BYTES..], deadline)
}

/// Fills `bytes`, however slowly they come, but not after `deadline`.
fn read_until(tcp: &mut TcpStream, mut bytes: &mut [u8], deadline: Instant) -> Result<(), TlsError> {
    while !bytes.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::from(io::ErrorKind::TimedOut).into());
        }
        tcp.set_read_timeout(Some(left))?;
        match tcp.read(bytes) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(count) => bytes = &mut bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

impl Records {
    /// Goes on from a handshake that is complete.
    pub(crate) fn new(connection: Connection) -> Result<Records, TlsError> {
        let ExtractedSecrets { tx, rx } = connection.dangerous_extract_secrets()?;
        let suite = TLS13_CHACHA20_POLY1305_SHA256.tls13().ok_or_else(|| unusable("no TLS 1.3"))?;
        let keys = |secrets| match secrets {
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok((key, iv)),
            _ => Err(unusable("another cipher")),
        };
        let ((key, iv), (their_key, their_iv)) = (keys(tx.1)?, keys(rx.1)?);
        let outgoing = Outgoing { cipher: suite.aead_alg.encrypter(key, iv), sequence: tx.0, broken: false };
        let incoming = Incoming {
            cipher: suite.aead_alg.decrypter(their_key, their_iv),
            sequence: rx.0,
            buffer: vec![0; READ_BYTES],
            filled: 0,
            at: 0,
            plain: 0..0,
            ended: false,
        };
        Ok(Records { incoming: Mutex::new(incoming), outgoing: Mutex::new(outgoing) })
    }

    /// Reads as [`TcpStream::read`] does, with its time-out.
    pub(crate) fn read(&self, tcp: &TcpStream, out: &mut [u8]) -> io::Result<usize> {
        held(&self.incoming).read(tcp, out)
    }

    /// Writes as [`TcpStream::write_vectored`] does.
    pub(crate) fn write_vectored(&self, tcp: &TcpStream, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        held(&self.outgoing).write(tcp, parts)
    }

    /// Whether something has been read from the connection that nobody has asked for yet.
    pub(crate) fn has_buffered(&self) -> bool {
        let incoming = held(&self.incoming);
        !incoming.plain.is_empty() || incoming.filled > incoming.at
    }
}

/// A half belongs to whoever uses it; after a panic in the middle of a record it is of no use, and its cipher says so.
fn held<T>(half: &Mutex<T>) -> MutexGuard<'_, T> {
    half.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Incoming {
    cipher: Box<dyn MessageDecrypter>,
    /// Of the next record.
    sequence: u64,
    buffer: Vec<u8>,
    /// How much of the buffer has been read.
    filled: usize,
    /// Where in the buffer the next record begins.
    at: usize,
    /// Where in the buffer data is that has been decrypted and not been taken.
    plain: Range<usize>,
    ended: bool,
}

impl Incoming {
    fn read(&mut self, mut tcp: &TcpStream, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        loop {
            let count = self.take(out);
            if count > 0 || self.ended {
                return Ok(count);
            }
            if self.open_next()? {
                continue;
            }
            if self.at > 0 {
                self.buffer.copy_within(self.at..self.filled, 0);
                (self.filled, self.at) = (self.filled - self.at, 0);
            }
            // There is room: a whole record would have been opened.
            match tcp.read(&mut self.buffer[self.filled..])? {
                0 => {
                    self.ended = true;
                    let whole = self.filled == self.at;
                    return if whole { Ok(0) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
                }
                count => self.filled += count,
            }
        }
    }

    fn take(&mut self, out: &mut [u8]) -> usize {
        let count = out.len().min(self.plain.len());
        out[..count].copy_from_slice(&self.buffer[self.plain.start..self.plain.start + count]);
        self.plain.start += count;
        count
    }

    /// Decrypts the next record if it is there; whether it was.
    fn open_next(&mut self) -> io::Result<bool> {
        let waiting = &mut self.buffer[self.at..self.filled];
        let Some((header, rest)) = waiting.split_at_mut_checked(HEADER_BYTES) else { return Ok(false) };
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if header[0] != 23 || header[1..3] != [3, 3] || length > SEALED_BYTES_MAX {
            return Err(self.end("a record that is none"));
        }
        let Some(sealed) = rest.get_mut(..length) else { return Ok(false) };
        let message =
            InboundOpaqueMessage::new(ContentType::ApplicationData, ProtocolVersion::TLSv1_2, sealed);
        let opened = self.cipher.decrypt(message, self.sequence);
        let Ok(opened) = opened else { return Err(self.end("a record that was changed on its way")) };
        let (kind, bytes) = (opened.typ, opened.payload.len());
        let alert = opened.payload.get(1).copied();
        let begin = self.at + HEADER_BYTES;
        self.sequence += 1;
        self.at = begin + length;
        match kind {
            // Decrypted in its place, from the beginning.
            ContentType::ApplicationData => self.plain = begin..begin + bytes,
            ContentType::Alert => {
                self.ended = true;
                let alert = AlertDescription::from(alert.unwrap_or_default());
                if alert != AlertDescription::CloseNotify {
                    let error = TlsError::from(Error::AlertReceived(alert));
                    return Err(io::Error::new(io::ErrorKind::ConnectionAborted, error));
                }
            }
            _ => return Err(self.end("something that is no data")),
        }
        Ok(true)
    }

    fn end(&mut self, what: &str) -> io::Error {
        self.ended = true;
        io::Error::new(io::ErrorKind::InvalidData, format!("the peer has sent {what}"))
    }
}

struct Outgoing {
    cipher: Box<dyn MessageEncrypter>,
    /// Of the next record.
    sequence: u64,
    /// Whether a record has gone out in part only.
    broken: bool,
}

impl Outgoing {
    fn write(&mut self, mut tcp: &TcpStream, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        if self.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let parts: Vec<&[u8]> = parts.iter().map(|part| &**part).collect();
        let mut rest = OutboundChunks::new(&parts);
        let mut records: Vec<Vec<u8>> = Vec::with_capacity(RECORDS_PER_WRITE);
        let mut count = 0;
        while !rest.is_empty() && records.len() < RECORDS_PER_WRITE {
            let (payload, after) = rest.split_at(PLAIN_BYTES_MAX.min(rest.len()));
            count += payload.len();
            let message = OutboundPlainMessage {
                typ: ContentType::ApplicationData,
                version: ProtocolVersion::TLSv1_3,
                payload,
            };
            let sealed = self.cipher.encrypt(message, self.sequence).map_err(io::Error::other)?;
            self.sequence += 1;
            records.push(sealed.encode());
            rest = after;
        }
        let mut slices: Vec<IoSlice<'_>> = records.iter().map(|record| IoSlice::new(record)).collect();
        let mut slices = slices.as_mut_slice();
        // Until the last byte is out, nothing else may go.
        self.broken = true;
        while !slices.is_empty() {
            match tcp.write_vectored(slices) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => IoSlice::advance_slices(&mut slices, written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.broken = false;
        Ok(count)
    }
}

fn unusable(what: &str) -> TlsError {
    TlsError::Other(Error::General(format!("{what} was agreed upon")))
}
