//! How the memory reaches the other ranks of a group, and nobody else.
//!
//! Rank 0 listens on an abstract Unix socket with a random name. A rank that has been told the name and its token (over a
//! connection that is trusted already) connects, both sides check that the other runs under the same user, the token is
//! shown, and the memory's file descriptor comes back. Other hosts, and containers with a network of their own, cannot
//! connect at all. Each token is good for one rank, once.

use crate::segment::{Geometry, GeometryError, Memory, Segment};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Duration;

/// How long the other side of a handover may take: it has nothing else to do.
const PATIENCE: Duration = Duration::from_secs(1);
/// Connections that may be refused before the offer is withdrawn: somebody is not one of us.
const REFUSALS_MAX: u32 = 64;

/// Proves that a rank was told by rank 0.
#[derive(Clone, Copy)]
pub struct Token([u8; Token::BYTES]);

impl Token {
    /// Length in bytes.
    pub const BYTES: usize = 16;

    /// A token that came from elsewhere.
    pub fn from_bytes(bytes: [u8; Token::BYTES]) -> Token {
        Token(bytes)
    }

    /// Its bytes, to be told to the rank it is for.
    pub fn to_bytes(self) -> [u8; Token::BYTES] {
        self.0
    }

    fn random() -> io::Result<Token> {
        let mut bytes = [0; Token::BYTES];
        let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        if filled != bytes.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Token(bytes))
    }

    /// Takes the same time wherever the first difference is.
    fn equals(self, other: Token) -> bool {
        self.0.iter().zip(other.0).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(secret)")
    }
}

/// Why memory could not be shared.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// An operating system call failed.
    #[error("{doing}: {source}")]
    Io {
        /// What failed.
        doing: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Too many ranks.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The other side runs under another user.
    #[error(
        "the other rank runs as user {theirs}, this one as {ours}: run both as the same user to share memory"
    )]
    User {
        /// The other side's.
        theirs: u32,
        /// This process's.
        ours: u32,
    },
    /// The token is none that was given out, or was used already.
    #[error("a process showed a token that was not given out")]
    Token,
    /// The other side answered with something else than a memory.
    #[error("the other rank did not hand over its memory")]
    Refused,
    /// Strangers knock.
    #[error("too many processes without a token tried to get the memory")]
    Strangers,
}

fn io_error(doing: &'static str) -> impl Fn(io::Error) -> HandoverError {
    move |source| HandoverError::Io { doing, source }
}

/// Memory that rank 0 offers to the others of its group.
#[derive(Debug)]
pub struct Offer {
    segment: Segment,
    file: OwnedFd,
    listener: UnixListener,
    name: String,
    /// By rank; rank 0 needs none.
    tokens: Vec<Token>,
    given: Vec<bool>,
    refused: u32,
}

impl Offer {
    /// Reserves memory, and listens for the ranks that are to share it.
    pub fn new(geometry: Geometry) -> Result<Offer, HandoverError> {
        let ranks = geometry.ranks();
        let (segment, file) = Segment::create(geometry).map_err(io_error("cannot make shared memory"))?;
        let random = || Token::random().map_err(io_error("no randomness"));
        let tokens = (0..ranks).map(|_| random()).collect::<Result<Vec<_>, _>>()?;
        let name: String = random()?.0.iter().map(|byte| format!("{byte:02x}")).collect();
        let name = format!("ashlar-group-{name}");
        let listening = io_error("cannot listen on a Unix socket");
        let address = SocketAddr::from_abstract_name(&name).map_err(&listening)?;
        let listener = UnixListener::bind_addr(&address).map_err(&listening)?;
        listener.set_nonblocking(true).map_err(&listening)?;
        Ok(Offer { segment, file, listener, name, tokens, given: vec![false; ranks], refused: 0 })
    }

    /// The abstract name of the socket to connect to.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What `rank` must show. `None` where there is no such rank.
    pub fn token(&self, rank: usize) -> Option<Token> {
        self.tokens.get(rank).copied().filter(|_| rank > 0)
    }

    /// Readable when somebody has connected: then call [`Offer::serve_one`].
    pub fn readiness(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Whether `rank` has got the memory.
    pub fn has_given(&self, rank: usize) -> bool {
        self.given.get(rank).copied().unwrap_or(false)
    }

    /// Serves one connection if there is one: the rank that got the memory, or why it did not. Such an error concerns this
    /// connection alone, but for [`HandoverError::Strangers`].
    pub fn serve_one(&mut self) -> Result<Option<usize>, HandoverError> {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(io_error("cannot accept on a Unix socket")(error)),
        };
        let served = self.serve(stream);
        if served.is_err() {
            self.refused += 1;
            if self.refused >= REFUSALS_MAX {
                return Err(HandoverError::Strangers);
            }
        }
        served.map(Some)
    }

    fn serve(&mut self, mut stream: UnixStream) -> Result<usize, HandoverError> {
        prepare(&stream)?;
        let mut shown = [0; Token::BYTES];
        stream.read_exact(&mut shown).map_err(io_error("a rank did not show its token"))?;
        let shown = Token(shown);
        let rank = (1..self.tokens.len()).find(|&rank| self.tokens[rank].equals(shown));
        let rank = rank.filter(|&rank| !self.given[rank]).ok_or(HandoverError::Token)?;
        let geometry = self.segment.geometry();
        let message =
            [geometry.ranks() as u64, geometry.slot_values() as u64, rank as u64].map(u64::to_ne_bytes);
        let files = [self.file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&files));
        let parts = [IoSlice::new(message.as_flattened())];
        let sent = rustix::net::sendmsg(&stream, &parts, &mut ancillary, SendFlags::NOSIGNAL)
            .map_err(|error| io_error("cannot hand the memory over")(error.into()))?;
        if sent != message.as_flattened().len() {
            return Err(HandoverError::Refused);
        }
        self.given[rank] = true;
        Ok(rank)
    }

    /// Rank 0's end.
    pub fn into_memory(self) -> Memory {
        Memory { segment: self.segment, rank: 0 }
    }
}

/// Gets the memory that is offered under `name`, as rank `rank`. Refused unless it is cut as `geometry` says.
pub fn attach(name: &str, token: Token, rank: usize, geometry: Geometry) -> Result<Memory, HandoverError> {
    let connecting = io_error("cannot connect to rank 0's memory (on another host or in another container?)");
    let address = SocketAddr::from_abstract_name(name).map_err(&connecting)?;
    let mut stream = UnixStream::connect_addr(&address).map_err(&connecting)?;
    prepare(&stream)?;
    stream.write_all(&token.0).map_err(io_error("cannot show the token"))?;
    let (numbers, file) = receive(&stream)?;
    let file = file.ok_or(HandoverError::Refused)?;
    if numbers != [geometry.ranks(), geometry.slot_values(), rank].map(|number| number as u64) {
        return Err(HandoverError::Refused);
    }
    let segment = Segment::open(&file, geometry).map_err(io_error("cannot map the shared memory"))?;
    Ok(Memory { segment, rank })
}

/// Three numbers and, with them, a file.
fn receive(stream: &UnixStream) -> Result<([u64; 3], Option<OwnedFd>), HandoverError> {
    let mut message = [[0u8; 8]; 3];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(message.as_flattened_mut())];
    let received = rustix::net::recvmsg(stream, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        .map_err(|error| io_error("the other rank did not hand over its memory")(error.into()))?;
    let mut file = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut files) = message {
            file = files.next();
        }
    }
    if received.bytes != message.as_flattened().len() {
        return Err(HandoverError::Refused);
    }
    Ok((message.map(u64::from_ne_bytes), file))
}

/// Bounds every wait on a fresh connection, and checks who is at its other end.
fn prepare(stream: &UnixStream) -> Result<(), HandoverError> {
    let failed = io_error("cannot prepare a Unix socket");
    // Accepted sockets do not inherit the listener's mode on Linux; said all the same.
    stream.set_nonblocking(false).map_err(&failed)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(&failed)?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(&failed)?;
    let peer = rustix::net::sockopt::socket_peercred(stream).map_err(|error| failed(error.into()))?;
    check_user(peer.uid.as_raw(), rustix::process::geteuid().as_raw())
}

fn check_user(theirs: u32, ours: u32) -> Result<(), HandoverError> {
    if theirs == ours { Ok(()) } else { Err(HandoverError::User { theirs, ours }) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn cut(ranks: usize) -> Geometry {
        Geometry::new(ranks, 64).unwrap()
    }

    fn serve_when_asked(offer: &mut Offer) -> Result<usize, HandoverError> {
        loop {
            if let Some(rank) = offer.serve_one()? {
                return Ok(rank);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn attempt(
        offer: &mut Offer,
        token: Token,
        rank: usize,
        ranks: usize,
    ) -> (Result<usize, HandoverError>, bool) {
        let name = offer.name().to_owned();
        std::thread::scope(|scope| {
            let attaching = scope.spawn(move || attach(&name, token, rank, cut(ranks)).is_ok());
            (serve_when_asked(offer), attaching.join().unwrap())
        })
    }

    #[test]
    fn only_the_right_token_gets_the_memory_and_only_once() {
        let mut offer = Offer::new(cut(3)).unwrap();
        let wrong = Token::from_bytes([7; Token::BYTES]);
        assert!(matches!(attempt(&mut offer, wrong, 1, 3), (Err(HandoverError::Token), false)));
        // Rank 0 keeps its own end and gives its token to nobody.
        let own = offer.tokens[0];
        assert!(matches!(attempt(&mut offer, own, 0, 3), (Err(HandoverError::Token), false)));
        let token = offer.token(1).unwrap();
        assert!(matches!(attempt(&mut offer, token, 1, 3), (Ok(1), true)));
        assert!(matches!(attempt(&mut offer, token, 1, 3), (Err(HandoverError::Token), false)));
        assert!(offer.has_given(1) && !offer.has_given(2) && !offer.has_given(3));
        assert!(offer.token(0).is_none() && offer.token(3).is_none());
    }

    #[test]
    fn a_rank_that_expects_another_place_does_not_take_the_memory() {
        let mut offer = Offer::new(cut(3)).unwrap();
        let token = offer.token(1).unwrap();
        assert!(!attempt(&mut offer, token, 2, 3).1);
        let token = offer.token(2).unwrap();
        assert!(!attempt(&mut offer, token, 2, 4).1);
    }

    #[test]
    fn another_user_is_refused_and_the_message_names_both() {
        let text = check_user(1001, 0).unwrap_err().to_string();
        assert!(text.contains("1001") && text.contains("as 0"), "{text}");
        assert!(check_user(5, 5).is_ok());
    }

    #[test]
    fn nobody_listening_is_an_error_at_once_and_strangers_withdraw_the_offer() {
        let token = Token::from_bytes([0; Token::BYTES]);
        assert!(matches!(attach("ashlar-nobody", token, 1, cut(2)), Err(HandoverError::Io { .. })));
        let mut offer = Offer::new(cut(2)).unwrap();
        let address = SocketAddr::from_abstract_name(offer.name()).unwrap();
        let last = (0..REFUSALS_MAX)
            .map(|_| {
                drop(UnixStream::connect_addr(&address).unwrap());
                serve_when_asked(&mut offer).unwrap_err()
            })
            .last();
        assert!(matches!(last, Some(HandoverError::Strangers)));
    }

    #[test]
    fn a_token_is_never_printed() {
        assert_eq!(format!("{:?}", Token::from_bytes([65; Token::BYTES])), "Token(secret)");
    }
}
