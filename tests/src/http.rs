//! A small blocking HTTP/1.1 client over plain sockets: one connection per request, JSON and server-sent events. It sends
//! exactly the bytes it is given, so that it can also misbehave.

use serde_json::Value;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

/// No answer of these tests takes longer.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Headers, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

/// One thing that a stream says.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// An event's data, as sent.
    Data(String),
    /// `[DONE]`.
    Done,
    /// The connection ended, with this reason.
    Closed(String),
}

/// A stream of server-sent events; dropping it closes the connection.
#[derive(Debug)]
pub struct EventStream {
    /// HTTP status.
    pub status: u16,
    /// Headers, names in lower case.
    pub headers: Vec<(String, String)>,
    body: Body,
}

impl Answer {
    /// A header's value; the name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("status {}, no JSON ({error}): {}", self.status, self.text()))
    }

    /// The body of a successful answer as JSON.
    #[track_caller]
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        self.json()
    }
}

impl EventStream {
    /// The next event; after `Done` or `Closed` there is none.
    pub fn next_event(&mut self) -> Event {
        loop {
            match self.body.line() {
                Err(error) => return Event::Closed(error.to_string()),
                Ok(None) => return Event::Closed("end of the body".into()),
                Ok(Some(line)) => match line.strip_prefix("data:").map(str::trim) {
                    Some("[DONE]") => return Event::Done,
                    Some(data) => return Event::Data(data.to_owned()),
                    // Comments and the empty lines between events.
                    None => {}
                },
            }
        }
    }

    /// All events to the end, the end included.
    pub fn rest(mut self) -> Vec<Event> {
        let mut events = Vec::new();
        loop {
            events.push(self.next_event());
            if !matches!(events.last(), Some(Event::Data(_))) {
                return events;
            }
        }
    }
}

/// Sends a request without a body.
pub fn get(address: &str, path: &str) -> io::Result<Answer> {
    let head = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    raw(address, head.as_bytes())
}

/// Posts a body as JSON, whatever it is.
pub fn post(address: &str, path: &str, body: &[u8]) -> io::Result<Answer> {
    raw(address, &post_bytes(address, path, body))
}

/// Posts a request whose answer is a stream.
pub fn stream(address: &str, path: &str, body: &[u8]) -> io::Result<EventStream> {
    let mut socket = connect(address)?;
    socket.write_all(&post_bytes(address, path, body))?;
    let (status, headers, body) = head(socket)?;
    Ok(EventStream { status, headers, body })
}

/// Asks for a stream.
pub fn get_stream(address: &str, path: &str) -> io::Result<EventStream> {
    let mut socket = connect(address)?;
    let head = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    socket.write_all(head.as_bytes())?;
    let (status, headers, body) = self::head(socket)?;
    Ok(EventStream { status, headers, body })
}

/// Sends these bytes and reads one answer.
pub fn raw(address: &str, bytes: &[u8]) -> io::Result<Answer> {
    let mut socket = connect(address)?;
    // The other side may answer and close before it has read all: what it says counts.
    let sent = socket.write_all(bytes);
    match (read_answer(socket), sent) {
        (Ok(answer), _) => Ok(answer),
        (Err(_), Err(error)) | (Err(error), Ok(())) => Err(error),
    }
}

/// Sends these bytes, then no more (the reading side stays open), and reads one answer.
pub fn raw_half_closed(address: &str, bytes: &[u8]) -> io::Result<Answer> {
    let mut socket = connect(address)?;
    socket.write_all(bytes)?;
    socket.shutdown(Shutdown::Write)?;
    read_answer(socket)
}

/// Connects with timeouts, so that a hanging server fails a test instead of hanging it.
pub fn connect(address: &str) -> io::Result<TcpStream> {
    let socket = TcpStream::connect(address)?;
    socket.set_read_timeout(Some(READ_TIMEOUT))?;
    socket.set_write_timeout(Some(READ_TIMEOUT))?;
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// The bytes of a POST.
pub fn post_bytes(address: &str, path: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = format!(
        "POST {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

fn read_answer(socket: TcpStream) -> io::Result<Answer> {
    let (status, headers, mut body) = head(socket)?;
    let body = body.all()?;
    Ok(Answer { status, headers, body })
}

type Headers = Vec<(String, String)>;

fn head(socket: TcpStream) -> io::Result<(u16, Headers, Body)> {
    let mut reader = BufReader::new(socket);
    let status_line = text_line(&mut reader)?;
    let status = status_line
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.get(..3)?.parse().ok())
        .ok_or_else(|| malformed(format!("status line {status_line:?}")))?;
    let mut headers = Vec::new();
    loop {
        let line = text_line(&mut reader)?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').ok_or_else(|| malformed(format!("header {line:?}")))?;
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let header = |name: &str| headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    let frame = if header("transfer-encoding") == Some("chunked") {
        Frame::Chunked
    } else if let Some(length) = header("content-length").and_then(|length| length.parse().ok()) {
        Frame::Length(length)
    } else {
        Frame::UntilClosed
    };
    Ok((status, headers, Body { reader, frame, pending: Vec::new(), over: false }))
}

#[derive(Debug)]
struct Body {
    reader: BufReader<TcpStream>,
    frame: Frame,
    /// Read, not yet taken.
    pending: Vec<u8>,
    over: bool,
}

#[derive(Debug)]
enum Frame {
    Chunked,
    Length(usize),
    UntilClosed,
}

impl Body {
    /// Reads a piece into `pending`.
    fn fill(&mut self) -> io::Result<()> {
        match self.frame {
            Frame::Chunked => {
                let size = text_line(&mut self.reader)?;
                let size = usize::from_str_radix(size.trim(), 16)
                    .map_err(|_| malformed(format!("chunk {size:?}")))?;
                let start = self.pending.len();
                self.pending.resize(start + size, 0);
                self.reader.read_exact(&mut self.pending[start..])?;
                text_line(&mut self.reader)?;
                self.over = size == 0;
            }
            Frame::Length(length) => {
                let start = self.pending.len();
                self.pending.resize(start + length, 0);
                self.reader.read_exact(&mut self.pending[start..])?;
                self.over = true;
            }
            Frame::UntilClosed => {
                self.reader.read_to_end(&mut self.pending)?;
                self.over = true;
            }
        }
        Ok(())
    }

    fn all(&mut self) -> io::Result<Vec<u8>> {
        while !self.over {
            self.fill()?;
        }
        Ok(std::mem::take(&mut self.pending))
    }

    fn line(&mut self) -> io::Result<Option<String>> {
        loop {
            if let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return Ok(Some(String::from_utf8_lossy(&line).trim_end().to_owned()));
            }
            if self.over {
                return Ok(None);
            }
            self.fill()?;
        }
    }
}

fn text_line(reader: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended"));
    }
    Ok(line.trim_end().to_owned())
}

fn malformed(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
