//! A multipart form with one file, read from the disk while it is sent.

use anyhow::{Context, Result};
use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use indicatif::ProgressBar;
use std::fs::File;
use std::io::{self, Read};
use std::pin::Pin;
use std::task::{self, Poll};

/// Read and sent at once.
const CHUNK_BYTES: usize = 64 << 10;

/// The body of the request.
#[derive(Debug)]
pub(super) struct Form {
    boundary: String,
    head: Option<Bytes>,
    file: File,
    /// Bytes of the file that are still to come.
    left: u64,
    tail: Option<Bytes>,
    bar: ProgressBar,
}

impl Form {
    pub(super) fn new(texts: &[(&str, &str)], name: &str, file: File, bar: ProgressBar) -> Result<Form> {
        let metadata = file.metadata().context("cannot tell how long the file is")?;
        // A pipe has no length that could be announced.
        anyhow::ensure!(metadata.is_file(), "only a regular file can be uploaded");
        // Cannot stand in the file but by intent: what it then makes of the form is the uploader's own business.
        let boundary = format!("ashlar-{:016x}-{:016x}", metadata.len(), u64::from(std::process::id()));
        let mut head = String::new();
        for (name, text) in texts {
            head +=
                &format!("--{boundary}\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{text}\r\n");
        }
        let plain = |c: char| if c.is_control() || "\"\\".contains(c) { '_' } else { c };
        let name: String = name.chars().map(plain).collect();
        head += &format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\
             Content-Type: application/octet-stream\r\n\r\n"
        );
        bar.set_length(metadata.len());
        Ok(Form {
            tail: Some(format!("\r\n--{boundary}--\r\n").into()),
            boundary,
            head: Some(head.into()),
            file,
            left: metadata.len(),
            bar,
        })
    }

    pub(super) fn content_type(&self) -> String {
        format!("multipart/form-data; boundary={}", self.boundary)
    }

    fn next(&mut self) -> io::Result<Option<Bytes>> {
        if let Some(head) = self.head.take() {
            return Ok(Some(head));
        }
        if self.left == 0 {
            return Ok(self.tail.take());
        }
        let mut chunk = vec![0; CHUNK_BYTES.min(usize::try_from(self.left).unwrap_or(CHUNK_BYTES))];
        let read = self.file.read(&mut chunk)?;
        if read == 0 {
            return Err(io::Error::other("the file became shorter while it was uploaded"));
        }
        chunk.truncate(read);
        self.left -= read as u64;
        self.bar.inc(read as u64);
        Ok(Some(chunk.into()))
    }
}

impl Body for Form {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        // A local file, read in a command that does nothing else meanwhile.
        Poll::Ready(self.next().map(|chunk| chunk.map(Frame::data)).transpose())
    }

    fn size_hint(&self) -> SizeHint {
        let length = |part: &Option<Bytes>| part.as_ref().map_or(0, |part| part.len() as u64);
        SizeHint::with_exact(length(&self.head) + self.left + length(&self.tail))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::http::{Client, is_refusal};
    use std::io::Write;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// Takes one request whole and answers it.
    async fn serve(listener: TcpListener, answer: &'static str) -> String {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        loop {
            let mut chunk = [0; 4096];
            let read = socket.read(&mut chunk).await.unwrap();
            request.extend_from_slice(&chunk[..read]);
            let text = String::from_utf8_lossy(&request);
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
            if body.len() == length.parse::<usize>().unwrap() {
                break;
            }
        }
        socket.write_all(answer.as_bytes()).await.unwrap();
        String::from_utf8(request).unwrap()
    }

    #[tokio::test]
    async fn a_file_travels_as_a_form_of_announced_length() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let content = "{\"text\": \"x\"}\n".repeat(20_000);
        file.write_all(content.as_bytes()).unwrap();
        for (answer, refused) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n{\"id\":\"file-1\"}", false),
            ("HTTP/1.1 400 Bad\r\ncontent-length: 31\r\n\r\n{\"error\":{\"message\":\"why not\"}}", true),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let client = Client::new(&format!("http://{}", listener.local_addr().unwrap()), None).unwrap();
            let server = tokio::spawn(serve(listener, answer));
            let (opened, bar) = (File::open(file.path()).unwrap(), ProgressBar::hidden());
            let sent =
                client.upload("/v1/files", &[("purpose", "fine-tune")], "a\"b.jsonl", opened, &bar).await;
            match sent {
                Ok(json) => assert!(!refused && json["id"] == "file-1"),
                Err(error) => assert!(refused && is_refusal(&error), "{error:#}"),
            }
            let request = server.await.unwrap();
            assert_eq!(bar.position(), content.len() as u64);
            let boundary = request.split_once("boundary=").unwrap().1.split_once("\r\n").unwrap().0;
            let (_, body) = request.split_once("\r\n\r\n").unwrap();
            let parts: Vec<&str> = body.split(&format!("--{boundary}")).collect();
            assert_eq!((parts.len(), parts[0], parts[3]), (4, "", "--\r\n"));
            assert!(parts[1].contains("name=\"purpose\"\r\n\r\nfine-tune\r\n"), "{}", parts[1]);
            assert!(parts[2].contains("filename=\"a_b.jsonl\""), "{}", &parts[2][..200]);
            assert!(parts[2].ends_with(&format!("\r\n\r\n{content}\r\n")));
        }
    }
}
