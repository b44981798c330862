//! A file as lines of bounded length.

use std::io::{self, BufRead};

/// The longest line that is read, in bytes without its end.
pub const LINE_BYTES_MAX: usize = 8 << 20;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Reads lines one by one into one buffer, which never grows beyond the bound.
#[derive(Debug)]
pub(crate) struct Lines<R> {
    reader: R,
    bytes_max: usize,
    buffer: Vec<u8>,
    /// 1-based number of the line that was read last.
    number: u64,
}

/// One line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line<'b> {
    /// Without its end; never blank.
    Bytes(&'b [u8]),
    /// Longer than the bound, and passed over.
    TooLong,
}

impl<R: BufRead> Lines<R> {
    pub(crate) fn new(reader: R, bytes_max: usize) -> Lines<R> {
        Lines { reader, bytes_max, buffer: Vec::new(), number: 0 }
    }

    /// The next line that is not blank, with its 1-based number; `None` at the end.
    pub(crate) fn next(&mut self) -> io::Result<Option<(u64, Line<'_>)>> {
        loop {
            let Some(too_long) = self.fill()? else { return Ok(None) };
            self.number += 1;
            if too_long {
                return Ok(Some((self.number, Line::TooLong)));
            }
            if self.number == 1 && self.buffer.starts_with(BYTE_ORDER_MARK) {
                self.buffer.drain(..BYTE_ORDER_MARK.len());
            }
            if !self.buffer.iter().all(u8::is_ascii_whitespace) {
                return Ok(Some((self.number, Line::Bytes(&self.buffer))));
            }
        }
    }

    /// Reads one line into the buffer and says whether it was too long for that; `None` at the end of the file.
    fn fill(&mut self) -> io::Result<Option<bool>> {
        self.buffer.clear();
        let (mut any, mut too_long) = (false, false);
        loop {
            let available = match self.reader.fill_buf() {
                Ok(available) => available,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if available.is_empty() {
                return Ok(any.then_some(too_long));
            }
            any = true;
            let end = available.iter().position(|&byte| byte == b'\n');
            let part = &available[..end.unwrap_or(available.len())];
            too_long |= part.len() > self.bytes_max - self.buffer.len();
            if too_long {
                self.buffer.clear();
            } else {
                self.buffer.extend_from_slice(part);
            }
            let used = part.len() + usize::from(end.is_some());
            self.reader.consume(used);
            if end.is_some() {
                return Ok(Some(too_long));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::{BufReader, Cursor};

    /// Lines with their numbers; `None` for one that is too long.
    fn lines(text: &[u8], bytes_max: usize, buffer: usize) -> Vec<(u64, Option<Vec<u8>>)> {
        let mut lines = Lines::new(BufReader::with_capacity(buffer, Cursor::new(text)), bytes_max);
        let mut found = Vec::new();
        while let Some((number, line)) = lines.next().unwrap() {
            found.push((
                number,
                match line {
                    Line::Bytes(bytes) => Some(bytes.to_vec()),
                    Line::TooLong => None,
                },
            ));
        }
        found
    }

    #[test]
    fn blank_lines_count_and_are_passed_over() {
        for buffer in [1, 3, 100] {
            assert_eq!(
                lines(b"\xef\xbb\xbfa\n\n \r\nb\r\n\nc", 10, buffer),
                [(1, Some(b"a".to_vec())), (4, Some(b"b\r".to_vec())), (6, Some(b"c".to_vec())),]
            );
        }
        assert_eq!(lines(b"", 10, 4), []);
        assert_eq!(lines(b"\n\n", 10, 4), []);
    }

    #[test]
    fn a_line_beyond_the_bound_is_passed_over_and_the_next_one_read() {
        for buffer in [1, 2, 7, 100] {
            assert_eq!(
                lines(b"12345\n123456\n1234567890123\nab", 5, buffer),
                [(1, Some(b"12345".to_vec())), (2, None), (3, None), (4, Some(b"ab".to_vec()))]
            );
        }
    }
}
